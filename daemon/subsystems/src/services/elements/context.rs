//! The properties of networks and hosts on which the elements of all Services depend.
//!
//! [`NetworkContext`] is computed from the view and owned by [`super::Services`]. Begin to read at
//! [`NetworkContext::of`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::backends::{Position, Target};
use ovl_cluster::view::View;
use ovl_dataplane::nft::Set;
use ovl_proto::id::NodeId;
use ovl_proto::object::Network;

use crate::services::allocation::Ranges;
use crate::services::permits::Permits;

/// The address (`None` for a node port), the IP protocol number and the port of a Service.
pub(super) type At = (Option<IpAddr>, u8, u16);

/// Properties of networks and hosts on which all Services depend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NetworkContext {
    /// The local host.
    pub(super) me: Option<NodeId>,
    /// The name and the zone of the local host.
    name: String,
    zone: String,
    /// The underlay address of the local host.
    pub(super) vtep: Option<IpAddr>,
    /// Prefixes of switched networks. Their endpoints on remote hosts cannot answer outside clients through this host.
    switched: Vec<IpNet>,
    /// Prefixes of all networks.
    networks: Vec<IpNet>,
    /// Prefixes of encrypted switched networks. Their packets must not cross the underlay unencrypted.
    encrypted: Vec<IpNet>,
    /// What Services may take.
    pub(super) permits: Permits,
    /// Underlay addresses of the remote hosts that are alive or suspect. Connections are relayed to their node ports.
    pub(super) hosts: BTreeMap<NodeId, IpAddr>,
}

impl NetworkContext {
    /// Returns the context of a view.
    pub(super) fn of(view: &View, ranges: &Ranges) -> Self {
        let prefixes = |networks: Vec<&Network>| -> Vec<IpNet> {
            networks.into_iter().flat_map(|network| &network.subnets).map(|subnet| subnet.prefix).collect()
        };
        let switched: Vec<&Network> = view.switched().collect();
        let encrypted = switched.iter().copied().filter(|network| network.encrypted).collect();
        // Remote hosts matter only if there are switched networks, whose connections are relayed.
        let others = view.nodes.values().filter(|node| !switched.is_empty() && node.record.id != view.me);
        let hosts = others.filter(|node| view.counts(node)).map(|node| (node.record.id, node.record.vtep));
        Self {
            me: Some(view.me),
            name: view.own().map(|own| own.record.name.clone()).unwrap_or_default(),
            zone: view.own().map(|own| own.record.zone.clone()).unwrap_or_default(),
            permits: Permits::of(view, ranges),
            vtep: view.own().map(|own| own.record.vtep),
            hosts: hosts.collect(),
            networks: prefixes(view.networks.values().map(|state| &state.network).collect()),
            encrypted: prefixes(encrypted),
            switched: prefixes(switched),
        }
    }

    /// Returns where the clients are whose connections this host translates.
    pub(super) fn position(&self) -> Position<'_> {
        Position { zone: &self.zone, host: &self.name }
    }

    /// Whether an address is on a switched network.
    pub(super) fn is_switched(&self, address: IpAddr) -> bool {
        self.switched.iter().any(|prefix| prefix.contains(&address))
    }

    /// Whether an address is on no network: of a host, such as that of a pod with `hostNetwork`, or outside of the cluster.
    pub(super) fn is_elsewhere(&self, address: IpAddr) -> bool {
        !self.networks.iter().any(|prefix| prefix.contains(&address))
    }

    /// Whether connections from outside to an endpoint may be relayed over the underlay to its host.
    pub(super) fn is_relayed(&self, address: IpAddr) -> bool {
        self.is_switched(address) && !self.encrypted.iter().any(|prefix| prefix.contains(&address))
    }

    /// Returns the underlay address of the host to which connections from outside are relayed. `None` if they are not
    /// relayed, or if a host has no underlay address of the backend's family.
    pub(super) fn relay(&self, target: &Target) -> Option<IpAddr> {
        let host = *self.hosts.get(&target.host?)?;
        let fits = |address: &IpAddr| address.is_ipv4() == target.address.is_ipv4();
        (self.is_relayed(target.address) && self.vtep.is_some_and(|own| fits(&own)))
            .then_some(host)
            .filter(fits)
    }
}

/// Returns the set of an address family, out of a pair.
pub(super) fn of_family(sets: &[Set; 2], ipv4: bool) -> &Set {
    let [v4, v6] = sets;
    if ipv4 { v4 } else { v6 }
}
