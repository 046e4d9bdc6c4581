//! State of the local host that several subsystems read and that is in neither the view nor the owner table.
//!
//! The daemon owns one [`Local`] and writes it; subsystems only read it, through [`crate::Cluster`]. The doc comment of
//! each field says which part of the daemon writes it and why others read it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Mode;
use ovl_proto::table::Endpoint;

use crate::encryption::epochs::KeyEpochs;

/// Local state of the host, beside its owner table.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Endpoints of this host that are disconnected, with the reason: their addresses belong to other hosts now.
    /// Written when blocks or leases change hands. Networks, endpoints and published ports leave them out.
    pub isolated: BTreeMap<EndpointId, String>,
    /// Networks whose devices are needed although no endpoint is in the table yet, with the number of attaches in
    /// flight. Written by attach. Networks create the devices.
    pub wanted: BTreeMap<NetworkId, u32>,
    /// The on-link prefix of this host's underlay address: hosts in it are reached without a router. Written when the
    /// underlay is observed. Routed networks choose direct routes by it.
    pub segment: Option<IpNet>,
    /// Addresses of this host that endpoints of internal networks may reach. Fixed. The packet filter reads it.
    pub open: Vec<IpAddr>,
    /// Whether traffic that leaves the cluster is masqueraded. Written from the configuration. The packet filter reads
    /// it.
    pub masquerade: bool,
    /// Previous tunnel keys and the sessions of the tunnel interfaces. Written by key rotation and when the record of a
    /// peer changes. The tunnel and routed networks choose the output interface by it.
    pub key_epochs: KeyEpochs,
    /// Endpoints whose attach is in flight. Written by attach. Policies, names and published ports apply to them before
    /// they can be reached.
    pub attaching: BTreeMap<EndpointId, Endpoint>,
    /// Endpoints whose container interface a Docker Engine configures. Written by attach. Routed endpoints read it:
    /// the Engine sets no neighbour entry for an IPv6 gateway.
    pub fetched: BTreeSet<EndpointId>,
    /// Whether the tables of published ports are wanted: ports are published, or were until the last full pass. Written
    /// by publish and reconcile. Networks read it.
    pub publishing: bool,
    /// Whether there are Services, or were until the last full pass. Written when objects change and by reconcile.
    /// Switched endpoints read it: one may reach itself through a Service and then needs hairpin.
    pub served: bool,
}

impl Local {
    /// Whether the local host needs the devices of a network: it has endpoints there, holds a block of a routed
    /// network, or an attach is in flight. A bridge network always needs them.
    pub fn is_built(&self, view: &View, network: NetworkId) -> bool {
        let is_routed = view.networks.get(&network).is_some_and(|state| state.network.mode == Mode::L3);
        self.wanted.contains_key(&network)
            || view.is_own(network)
            || (is_routed && view.has_block(network))
            || view.own().is_some_and(|own| own.table.endpoints_on(network).next().is_some())
    }
}
