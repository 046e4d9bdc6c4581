//! What a host knows beside its table and the cluster, and several subsystems read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Mode;
use ovl_proto::table::Endpoint;

use crate::encryption::epochs::KeyEpochs;

/// This host's own part, beside its table.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Endpoints of this host that must not talk: their addresses belong to others now.
    pub isolated: BTreeMap<EndpointId, String>,
    /// Networks whose devices are needed although no endpoint is in the table yet: an attach is
    /// under way.
    pub wanted: BTreeMap<NetworkId, u32>,
    /// The segment of the underlay that this host is on: other hosts' addresses in it are reached
    /// without a router.
    pub segment: Option<IpNet>,
    /// Networks with endpoints of this host that have a resolver.
    pub resolved: BTreeSet<NetworkId>,
    /// Where pods find the cluster's DNS: at most one address a family.
    pub cluster_dns: Vec<IpAddr>,
    /// Whether traffic that leaves the cluster gets this host's address.
    pub masquerade: bool,
    /// What is remembered and seen of tunnels while keys are rotated.
    pub key_epochs: KeyEpochs,
    /// Endpoints that are being made: policies stand before one can be reached.
    pub attaching: BTreeMap<EndpointId, Endpoint>,
    /// Endpoints whose other ends a Docker Engine sets up.
    pub fetched: BTreeSet<EndpointId>,
    /// Ports are, or were a moment ago, published here: their table stands.
    pub publishing: bool,
    /// There are, or were a moment ago, Services: an endpoint may reach itself by one.
    pub served: bool,
}

impl Local {
    /// Whether the local host needs the devices of a network: endpoints, a block of a routed network, or an attach under
    /// way.
    pub fn is_built(&self, view: &View, network: NetworkId) -> bool {
        let is_routed = view.networks.get(&network).is_some_and(|state| state.network.mode == Mode::L3);
        self.wanted.contains_key(&network)
            || view.is_own(network)
            || (is_routed && view.has_block(network))
            || view.own().is_some_and(|own| own.table.endpoints_on(network).next().is_some())
    }
}
