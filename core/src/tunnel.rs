//! The tunnel between hosts: what carries encrypted networks.

use std::net::Ipv6Addr;

use ovl_proto::id::NodeId;

/// Bytes that WireGuard puts around an IP packet, the outer IP header aside: UDP 8, its own header 16,
/// the tag 16.
pub const OVERHEAD: u16 = 8 + 16 + 16;

/// A host's address inside the tunnel: a unique local one (RFC 4193) with the cluster's number as global
/// id and the host's id after it, so nobody has to hand it out and it says whose it is.
pub fn address(cluster: u64, node: NodeId) -> Ipv6Addr {
    let mut bytes = [0; 16];
    let [_, _, _, global @ ..] = cluster.to_be_bytes();
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&global);
    bytes[6..].copy_from_slice(&node.0);
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_cluster_and_host() {
        let address = address(0x0102_0304_0506_0708, NodeId([9, 10, 11, 12, 13, 14, 15, 16, 17, 18]));
        assert_eq!(address.to_string(), "fd04:506:708:90a:b0c:d0e:f10:1112");
    }
}
