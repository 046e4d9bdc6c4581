//! `ovlctl routes`: lists the routes and addresses of ovl's devices.

use ovl_control::{Reply, Request, RouteRow};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, optional};

/// Requests the routes and prints them.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Routes(rows) = context.request(&Request::Routes)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&rows, |rows| render(rows))
}

fn render(rows: &[RouteRow]) -> String {
    TextTable::new()
        .column("NETWORK", rows.iter().map(|row| &row.network))
        .column("DESTINATION", rows.iter().map(|row| row.destination))
        .column("VIA", rows.iter().map(|row| optional(row.via)))
        .column("DEVICE", rows.iter().map(|row| &row.device))
        .column("NODE", rows.iter().map(|row| optional(row.node.as_ref())))
        .render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_remote_destinations_are_rendered() {
        let own = RouteRow {
            network: "blue".into(),
            destination: "10.1.0.1/16".parse().unwrap(),
            via: None,
            device: "ovb-04gc3g8k".into(),
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
NETWORK  DESTINATION  VIA       DEVICE        NODE
blue     10.1.0.1/16  -         ovb-04gc3g8k  -
blue     10.2.1.0/24  10.2.1.0  ovb-04gc3g8k  host2
"
        );
    }
}
