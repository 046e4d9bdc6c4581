//! The hosts to or from which no packet in VXLAN on the underlay passes, although their daemons reach each other.

use std::collections::BTreeSet;

use ovl_proto::id::NodeId;

/// What path probes found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LostVxlan {
    hosts: BTreeSet<NodeId>,
}

impl LostVxlan {
    /// Replaces the hosts. Returns whether they are not as before.
    pub fn replace(&mut self, hosts: BTreeSet<NodeId>) -> bool {
        let before = std::mem::replace(&mut self.hosts, hosts);
        before != self.hosts
    }

    /// Whether no packet in VXLAN passes to or from a host.
    pub fn contains(&self, host: NodeId) -> bool {
        self.hosts.contains(&host)
    }
}
