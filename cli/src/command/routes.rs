//! `ovlctl routes`

use ovl_control::{Reply, Request, RouteRow};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{Table, maybe};

/// Asks and prints.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Routes(rows) = context.ask(&Request::Routes)? else { return Err(Error::unexpected_reply()) };
    context.print(&rows, |rows| render(rows))
}

fn render(rows: &[RouteRow]) -> String {
    Table::new()
        .column("NETWORK", rows.iter().map(|row| &row.network))
        .column("DESTINATION", rows.iter().map(|row| row.destination))
        .column("VIA", rows.iter().map(|row| maybe(row.via)))
        .column("DEVICE", rows.iter().map(|row| &row.device))
        .column("NODE", rows.iter().map(|row| maybe(row.node.as_ref())))
        .render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_and_remote_destinations() {
        let own = RouteRow {
            network: "blue".into(),
            destination: "10.1.0.1/16".parse().unwrap(),
            via: None,
            device: "ovlb1".into(),
            node: None,
        };
        let remote = RouteRow {
            destination: "10.2.1.0/24".parse().unwrap(),
            via: Some("10.2.1.0".parse().unwrap()),
            node: Some("host2".into()),
            ..own.clone()
        };
        assert_eq!(
            render(&[own, remote]),
            "\
NETWORK  DESTINATION  VIA       DEVICE  NODE
blue     10.1.0.1/16  -         ovlb1   -
blue     10.2.1.0/24  10.2.1.0  ovlb1   host2
"
        );
    }
}
