//! Networks that this host does not build, because their subnets cover addresses that the host itself needs.
//!
//! A route to a network must not cover what keeps the hosts together or connects this host to the rest of the world,
//! whatever a peer wrote. [`refused`] decides; [`RefusedNetworks`] owns the result, and [`super::Local::is_built`] follows
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::networks;
use ovl_cluster::view::View;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;

use crate::encryption::tunnel;

/// What this host observes of its own connections, apart from ovl's devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostRanges {
    /// Prefixes of the addresses of its devices, each with the name of a device.
    pub connected: BTreeMap<IpNet, String>,
    /// Gateways of default routes of both address families.
    pub gateways: BTreeSet<IpAddr>,
    /// Resolvers that the host asks.
    pub resolvers: BTreeSet<IpAddr>,
}

/// What a subnet would cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Needed {
    /// The underlay address of a member.
    Member {
        /// The address.
        address: IpAddr,
        /// The name of the host.
        host: String,
    },
    /// A prefix in which this host has an address.
    Connected {
        /// The prefix.
        prefix: IpNet,
        /// The device with the address.
        device: String,
    },
    /// The gateway of a default route of this host.
    Gateway(IpAddr),
    /// A resolver of this host.
    Resolver(IpAddr),
    /// The range of the hosts' addresses in the tunnel.
    Tunnel(IpNet),
    /// A `service_range`.
    Services(IpNet),
    /// A subnet of another network, on which this host has endpoints.
    Network {
        /// The subnet.
        prefix: IpNet,
        /// The name of the network.
        name: String,
    },
}

impl fmt::Display for Needed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member { address, host } => {
                write!(f, "contains {address}, the underlay address of host {host}")
            }
            Self::Connected { prefix, device } => {
                write!(f, "overlaps {prefix}, to which this host is connected by {device}")
            }
            Self::Gateway(address) => write!(f, "contains {address}, the default gateway of this host"),
            Self::Resolver(address) => write!(f, "contains {address}, a resolver of this host"),
            Self::Tunnel(prefix) => {
                write!(f, "overlaps {prefix}, where the hosts' addresses in the tunnel are")
            }
            Self::Services(range) => write!(f, "overlaps the service_range {range}"),
            Self::Network { prefix, name } => {
                write!(f, "overlaps {prefix} of network {name}, on which this host has endpoints")
            }
        }
    }
}

/// Why this host does not build a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The subnet of the network.
    pub subnet: IpNet,
    /// What it would cover.
    pub needed: Needed,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its subnet {} {}", self.subnet, self.needed)
    }
}

/// The addresses and prefixes that no network may cover on this host.
#[derive(Debug)]
pub struct NeededRanges {
    addresses: BTreeMap<IpAddr, Needed>,
    prefixes: Vec<(IpNet, Needed)>,
}

impl NeededRanges {
    /// Collects them. `services` are the configured service ranges.
    pub fn new(view: &View, host: &HostRanges, services: &[IpNet]) -> Self {
        let mut addresses = BTreeMap::new();
        // A resolver may be an endpoint of this host: then the host's queries have to go to its network.
        let own = view.own().into_iter().flat_map(|own| own.table.endpoints());
        let own: BTreeSet<IpAddr> =
            own.flat_map(|endpoint| endpoint.addresses.iter().map(IpNet::addr)).collect();
        let resolvers = host.resolvers.iter().filter(|address| !own.contains(address));
        addresses.extend(resolvers.map(|address| (*address, Needed::Resolver(*address))));
        addresses.extend(host.gateways.iter().map(|address| (*address, Needed::Gateway(*address))));
        for node in view.nodes.values().map(|node| &node.record) {
            if node.id == view.me || view.alloc.members.contains(&node.id) {
                for address in [node.vtep, node.address.ip()] {
                    addresses.insert(address, Needed::Member { address, host: node.name.clone() });
                }
            }
        }
        let tunnel = tunnel::prefix(view.alloc.cluster);
        let mut prefixes = vec![(tunnel, Needed::Tunnel(tunnel))];
        prefixes.extend(services.iter().map(|range| (*range, Needed::Services(*range))));
        let connected = |(prefix, device): (&IpNet, &String)| {
            (*prefix, Needed::Connected { prefix: *prefix, device: device.clone() })
        };
        prefixes.extend(host.connected.iter().map(connected));
        Self { addresses, prefixes }
    }

    /// Returns what a subnet would cover. `None` if it is free for a network.
    pub fn covered_by(&self, subnet: IpNet) -> Option<&Needed> {
        let mut addresses = self.addresses.range(subnet.network()..=subnet.broadcast());
        let address = addresses.next().map(|(_, needed)| needed);
        let overlapping = || self.prefixes.iter().find(|(prefix, _)| networks::overlaps(*prefix, subnet));
        address.or_else(|| overlapping().map(|(_, needed)| needed))
    }

    /// Returns all of them as prefixes.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.addresses
            .keys()
            .map(|address| IpNet::from(*address))
            .chain(self.prefixes.iter().map(|(net, _)| *net))
    }

    fn conflict(&self, network: &Network) -> Option<Conflict> {
        network.subnets.iter().find_map(|subnet| {
            let needed = self.covered_by(subnet.prefix)?.clone();
            Some(Conflict { subnet: subnet.prefix, needed })
        })
    }
}

/// Returns the networks that this host must not build, each with the reason.
///
/// Of two networks that overlap, this host builds the one on which it has endpoints. If it has endpoints on both, or on
/// neither, both are built: a partition made them, and the user has to choose.
pub fn refused(view: &View, needed: &NeededRanges) -> BTreeMap<NetworkId, Conflict> {
    let own = view.own().into_iter().flat_map(|own| own.table.endpoints());
    let used: BTreeSet<NetworkId> = own.map(|endpoint| endpoint.network).collect();
    let all = || view.networks.values().map(|found| &found.network);
    let subnet_in_use = |prefix: IpNet| {
        let mut others = all().filter(|other| used.contains(&other.id));
        others.find_map(|other| {
            let subnet = other.subnets.iter().find(|s| networks::overlaps(s.prefix, prefix))?;
            Some(Needed::Network { prefix: subnet.prefix, name: other.name.clone() })
        })
    };
    let conflict = |network: &Network| {
        needed.conflict(network).or_else(|| {
            let mut subnets = network.subnets.iter().filter(|_| !used.contains(&network.id));
            subnets.find_map(|subnet| {
                Some(Conflict { subnet: subnet.prefix, needed: subnet_in_use(subnet.prefix)? })
            })
        })
    };
    all().filter_map(|network| Some((network.id, conflict(network)?))).collect()
}

/// The networks that this host does not build, each with the reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RefusedNetworks(BTreeMap<NetworkId, Conflict>);

impl RefusedNetworks {
    /// Replaces all of them. Returns the networks that were added or removed.
    pub fn replace(&mut self, networks: BTreeMap<NetworkId, Conflict>) -> BTreeSet<NetworkId> {
        let before = std::mem::replace(&mut self.0, networks);
        let added = self.0.keys().filter(|id| !before.contains_key(id));
        added.chain(before.keys().filter(|id| !self.0.contains_key(id))).copied().collect()
    }

    /// Returns why a network is not built. `None` if it may be.
    pub fn get(&self, network: NetworkId) -> Option<&Conflict> {
        self.0.get(&network)
    }

    /// Whether a network is not built.
    pub fn contains(&self, network: NetworkId) -> bool {
        self.0.contains_key(&network)
    }

    /// Returns all of them.
    pub fn iter(&self) -> impl Iterator<Item = (NetworkId, &Conflict)> {
        self.0.iter().map(|(id, conflict)| (*id, conflict))
    }
}
