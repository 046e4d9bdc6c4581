//! Endpoints of this host that are disconnected, because their addresses belong to other hosts now.
//!
//! [`Isolation`] owns the state. Networks and published ports leave these endpoints out.

use std::collections::BTreeMap;

use ovl_proto::id::EndpointId;

/// The disconnected endpoints, each with the reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Isolation {
    endpoints: BTreeMap<EndpointId, String>,
}

impl Isolation {
    /// Replaces all of them, when blocks or leases change hands. Returns whether anything changed.
    pub fn replace(&mut self, endpoints: BTreeMap<EndpointId, String>) -> bool {
        let before = std::mem::replace(&mut self.endpoints, endpoints);
        before != self.endpoints
    }

    /// Forgets an endpoint that ended.
    pub fn forget(&mut self, id: EndpointId) {
        self.endpoints.remove(&id);
    }

    /// Whether an endpoint is disconnected.
    pub fn contains(&self, id: EndpointId) -> bool {
        self.endpoints.contains_key(&id)
    }
}
