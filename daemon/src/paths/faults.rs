//! Faults of paths that this host works around until it is started again.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::id::NodeId;

/// The faults, by the host that a path leads to.
#[derive(Debug, Default)]
pub(crate) struct PathFaults {
    limits: BTreeMap<NodeId, u16>,
    damaged: BTreeSet<NodeId>,
}

impl PathFaults {
    /// Notes that in VXLAN only packets of workloads up to this length in bytes pass to a host.
    pub(crate) fn note_limit(&mut self, host: NodeId, bytes: u16) {
        self.limits.insert(host, bytes);
    }

    /// Notes that packets in VXLAN to a host are lost if their checksums are left to the offload.
    pub(crate) fn note_damage(&mut self, host: NodeId) {
        self.damaged.insert(host);
    }

    /// Forgets the faults of paths to all hosts but those for which `known` is true.
    pub(crate) fn keep(&mut self, known: impl Fn(&NodeId) -> bool) {
        self.limits.retain(|host, _| known(host));
        self.damaged.retain(|host| known(host));
    }

    /// Returns the length that was noted for a host. `None` if its path is not limited.
    pub(crate) fn limit_to(&self, host: NodeId) -> Option<u16> {
        self.limits.get(&host).copied()
    }

    /// Lists the paths that are limited.
    pub(crate) fn limits(&self) -> impl Iterator<Item = (NodeId, u16)> {
        self.limits.iter().map(|(host, bytes)| (*host, *bytes))
    }

    /// Whether any path damages packets whose checksums are left to the offload. No VXLAN device leaves them to it then.
    pub(crate) fn has_damage(&self) -> bool {
        !self.damaged.is_empty()
    }

    /// Lists the hosts to which packets are damaged.
    pub(crate) fn damaged(&self) -> impl Iterator<Item = NodeId> {
        self.damaged.iter().copied()
    }
}
