//! `ovlctl subnets`: lists the address blocks.

use ovl_control::{Reply, Request, SubnetUse};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::TextTable;

/// Requests the blocks and prints them.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Subnets(blocks) = context.request(&Request::Subnets)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&blocks, |blocks| render(blocks))
}

fn render(blocks: &[SubnetUse]) -> String {
    TextTable::new()
        .column("NETWORK", blocks.iter().map(|block| &block.network))
        .column("PREFIX", blocks.iter().map(|block| block.prefix))
        .column("NODE", blocks.iter().map(|block| &block.node))
        .column("USED", blocks.iter().map(|block| block.used))
        .column("SIZE", blocks.iter().map(|block| block.size))
        .render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_rendered_as_rows() {
        let block = |prefix: &str, node: &str, used, size| SubnetUse {
            network: "blue".into(),
            prefix: prefix.parse().unwrap(),
            node: node.into(),
            used,
            size,
        };
        assert_eq!(
            render(&[block("10.1.0.0/28", "host1", 3, 15), block("fd00:1::/64", "host2", 1, u64::MAX)]),
            "\
NETWORK  PREFIX       NODE   USED  SIZE
blue     10.1.0.0/28  host1  3     15
blue     fd00:1::/64  host2  1     18446744073709551615
"
        );
    }
}
