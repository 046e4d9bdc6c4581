//! `ovlctl fdb`: lists forwarding database entries.

use ovl_control::{FdbRow, Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, optional};

/// Requests the entries and prints them.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Fdb(rows) = context.request(&Request::Fdb)? else { return Err(Error::unexpected_reply()) };
    context.print(&rows, |rows| render(rows))
}

fn render(rows: &[FdbRow]) -> String {
    TextTable::new()
        .column("NETWORK", rows.iter().map(|row| &row.network))
        .column("MAC", rows.iter().map(|row| row.mac))
        .column("DEVICE", rows.iter().map(|row| &row.device))
        .column("DESTINATION", rows.iter().map(|row| optional(row.destination)))
        .column("NODE", rows.iter().map(|row| optional(row.node.as_ref())))
        .column("ENDPOINT", rows.iter().map(|row| optional(row.endpoint.as_ref())))
        .column("ADDRESSES", rows.iter().map(|row| comma_separated(&row.addresses)))
        .render()
}

#[cfg(test)]
mod tests {
    use ovl_proto::id::Mac;

    use super::*;

    #[test]
    fn unicast_and_flood_entries_are_rendered() {
        let replication = FdbRow {
            network: "blue".into(),
            mac: Mac::default(),
            device: "ovx-04gc3g8k".into(),
            destination: Some("192.0.2.2".parse().unwrap()),
            node: Some("host2".into()),
            endpoint: None,
            addresses: Vec::new(),
        };
        let remote = FdbRow {
            mac: Mac([2, 0, 10, 1, 0, 18]),
            endpoint: Some("db".into()),
            addresses: vec!["10.1.0.18".parse().unwrap(), "fd00::12".parse().unwrap()],
            ..replication.clone()
        };
        assert_eq!(
            render(&[replication, remote]),
            "\
NETWORK  MAC                DEVICE        DESTINATION  NODE   ENDPOINT  ADDRESSES
blue     00:00:00:00:00:00  ovx-04gc3g8k  192.0.2.2    host2  -         -
blue     02:00:0a:01:00:12  ovx-04gc3g8k  192.0.2.2    host2  db        10.1.0.18,fd00::12
"
        );
    }
}
