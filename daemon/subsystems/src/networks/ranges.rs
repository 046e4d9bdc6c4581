//! Decides which networks this host does not build, because their subnets cover addresses that the host itself needs.
//!
//! A route to a network must not cover what keeps the hosts together or connects this host to the rest of the world,
//! whatever a peer wrote. The module owns no state. Begin to read at [`refused`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::networks;
use ovl_cluster::view::View;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;

use crate::encryption::tunnel;
use crate::local::ranges::{Conflict, Needed};

/// What this host observes of its own connections, apart from ovl's devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostRanges {
    /// Prefixes of the addresses of its devices, each with the name of a device.
    connected: BTreeMap<IpNet, String>,
    /// Gateways of default routes of both address families.
    gateways: BTreeSet<IpAddr>,
    /// Resolvers that the host asks.
    resolvers: BTreeSet<IpAddr>,
}

impl HostRanges {
    /// Takes the prefixes of the addresses of this host's devices, and the gateways of its default routes. Returns whether
    /// they changed.
    pub fn set_connections(
        &mut self,
        connected: BTreeMap<IpNet, String>,
        gateways: BTreeSet<IpAddr>,
    ) -> bool {
        let is_new = (&self.connected, &self.gateways) != (&connected, &gateways);
        (self.connected, self.gateways) = (connected, gateways);
        is_new
    }

    /// Takes the resolvers that this host asks. Returns whether they changed.
    pub fn set_resolvers(&mut self, resolvers: BTreeSet<IpAddr>) -> bool {
        let is_new = self.resolvers != resolvers;
        self.resolvers = resolvers;
        is_new
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
        let tunnel = tunnel::prefix(view.alloc.origin());
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

/// Returns the networks that overlap a configured range of LoadBalancer addresses or external IPs, each with what to do
/// about it. Such a network can only be older than the range, or come from a host that is configured differently, so it
/// works as before; networks over a service range are not built at all.
pub fn overlapped(view: &View, load_balancers: &[IpNet], external: &[IpNet]) -> Vec<(String, String)> {
    let pools = load_balancers.iter().map(|range| ("load_balancer_pool", *range));
    let all: Vec<(&str, IpNet)> =
        pools.chain(external.iter().map(|range| ("external_ranges", *range))).collect();
    let overlap = |network: &Network| {
        let subnets = network.subnets.iter().map(|subnet| subnet.prefix);
        subnets.flat_map(|subnet| all.iter().map(move |range| (subnet, range))).find_map(
            |(subnet, (name, range))| {
                networks::overlaps(*range, subnet).then(|| {
                    format!(
                        "network {}: its subnet {subnet} overlaps the {name} {range}: a Service that gets an address of one of its \
                         endpoints takes their connections. Choose another {name} in ovld.toml on all hosts",
                        network.name
                    )
                })
            },
        )
    };
    let networks = view.networks.values().map(|found| &found.network);
    networks.filter_map(|network| Some((network.name.clone(), overlap(network)?))).collect()
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
