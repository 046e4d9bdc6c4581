//! Attaches in flight: what must be in the kernel before an endpoint is in the owner table.
//!
//! [`Attaches`] owns the state. An attach first wants the devices of its network, then begins with its endpoint, and
//! ends when the endpoint is in the table or the attach has failed.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::table::Endpoint;

/// Attaches in flight, and endpoints whose container interface a Docker Engine configures.
#[derive(Debug, Clone, Default)]
pub struct Attaches {
    /// The number of attaches in flight, by network.
    wanted: BTreeMap<NetworkId, u32>,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    by_engine: BTreeSet<EndpointId>,
}

impl Attaches {
    /// Records that an attach needs the devices of a network. To be taken back with [`Self::unwant`].
    pub fn want(&mut self, network: NetworkId) {
        *self.wanted.entry(network).or_default() += 1;
    }

    /// Records that an attach no longer needs the devices of a network.
    pub fn unwant(&mut self, network: NetworkId) {
        if let Some(count) = self.wanted.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                self.wanted.remove(&network);
            }
        }
    }

    /// Whether an attach needs the devices of a network.
    pub fn wants(&self, network: NetworkId) -> bool {
        self.wanted.contains_key(&network)
    }

    /// Returns the networks whose devices attaches need.
    pub fn networks(&self) -> impl Iterator<Item = NetworkId> {
        self.wanted.keys().copied()
    }

    /// Records an endpoint that is about to be created. Policies, names and published ports apply to it before it can
    /// be reached.
    pub fn begin(&mut self, endpoint: Endpoint) {
        self.endpoints.insert(endpoint.id, endpoint);
    }

    /// Returns an endpoint whose attach has ended, and forgets it. `None` if no attach of it was in flight.
    pub fn end(&mut self, id: EndpointId) -> Option<Endpoint> {
        self.endpoints.remove(&id)
    }

    /// Returns the endpoint with this id whose attach is in flight. `None` if there is none.
    pub fn get(&self, id: EndpointId) -> Option<&Endpoint> {
        self.endpoints.get(&id)
    }

    /// Returns the endpoints whose attach is in flight.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values()
    }

    /// Records that a Docker Engine configures the container interface of an endpoint. To be taken back with
    /// [`Self::forget_engine`] when the endpoint ends.
    pub fn set_by_engine(&mut self, id: EndpointId) {
        self.by_engine.insert(id);
    }

    /// Whether a Docker Engine configures the container interface of an endpoint. It sets no neighbour entry for an
    /// IPv6 gateway.
    pub fn is_by_engine(&self, id: EndpointId) -> bool {
        self.by_engine.contains(&id)
    }

    /// Takes back [`Self::set_by_engine`].
    pub fn forget_engine(&mut self, id: EndpointId) {
        self.by_engine.remove(&id);
    }
}
