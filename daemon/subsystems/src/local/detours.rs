//! The sockets of this host that stand in for hosts which it does not reach directly: the detours of the crate `ovl-relay`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ovl_proto::id::NodeId;

/// The detours in use. WireGuard sends to them in place of the hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Detours {
    /// For each host and each of the two ports of a tunnel (false: the even one) the address of the socket.
    open: BTreeMap<(NodeId, bool), SocketAddr>,
}

impl Detours {
    /// Replaces the detours. Returns the hosts whose detours are not as before.
    pub fn replace(&mut self, open: BTreeMap<(NodeId, bool), SocketAddr>) -> Vec<NodeId> {
        let before = std::mem::replace(&mut self.open, open);
        let is_new = |(key, at): &(&(NodeId, bool), &SocketAddr)| before.get(key) != Some(at);
        let changed = self.open.iter().filter(is_new).map(|(key, _)| key.0);
        let closed = before.keys().filter(|key| !self.open.contains_key(key)).map(|key| key.0);
        let mut hosts: Vec<NodeId> = changed.chain(closed).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }

    /// Returns the socket that stands in for a port of a host. `None` if the host is reached directly.
    pub fn get(&self, host: NodeId, port: u16) -> Option<SocketAddr> {
        self.open.get(&(host, port & 1 == 1)).copied()
    }

    /// Whether a host is reached by a detour.
    pub fn contains(&self, host: NodeId) -> bool {
        [false, true].iter().any(|odd| self.open.contains_key(&(host, *odd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_with_another_detour_are_named() {
        let at = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let [a, b, c] = [1, 2, 3].map(|byte| NodeId([byte; 10]));
        let mut detours = Detours::default();
        assert_eq!(detours.replace([((a, false), at(1)), ((b, false), at(2))].into()), [a, b]);
        assert_eq!(detours.replace([((b, false), at(2)), ((c, true), at(3))].into()), [a, c]);
        assert_eq!((detours.get(b, 51940), detours.get(b, 51941)), (Some(at(2)), None));
        assert_eq!(
            (detours.get(c, 51941), detours.contains(a), detours.contains(c)),
            (Some(at(3)), false, true)
        );
        assert_eq!(detours.replace([((b, false), at(9)), ((c, true), at(3))].into()), [b]);
    }
}
