//! Indexes of a table's endpoints. A host has thousands of endpoints, and the cost of a change of one must not
//! depend on their number.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, Mac, NetworkId};
use ovl_proto::table::Endpoint;

const FIRST: EndpointId = EndpointId([0; 5]);
const LAST: EndpointId = EndpointId([u8::MAX; 5]);

/// The endpoints of one table by network, address, MAC address and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EndpointIndex {
    networks: BTreeMap<NetworkId, BTreeSet<EndpointId>>,
    addresses: BTreeSet<(NetworkId, IpAddr, EndpointId)>,
    macs: BTreeSet<(NetworkId, Mac, EndpointId)>,
    /// Single addresses that endpoints may send from, beside their own.
    allowed: BTreeSet<(NetworkId, IpAddr, EndpointId)>,
    /// MAC addresses that endpoints may send from, beside their own.
    allowed_macs: BTreeSet<(NetworkId, Mac, EndpointId)>,
    /// By the canonical forms of names, aliases and names of pods.
    called: BTreeSet<(Box<str>, EndpointId)>,
    /// The subnets with which endpoints were attached, and the number of endpoints of each.
    ranges: BTreeMap<(NetworkId, IpNet), usize>,
    /// The multicast groups that endpoints have joined, and the number of endpoints of each.
    groups: BTreeMap<(NetworkId, IpAddr), usize>,
    /// The number of endpoints whose groups are not followed.
    unfollowed: BTreeMap<NetworkId, usize>,
}

impl EndpointIndex {
    pub(crate) fn insert(&mut self, endpoint: &Endpoint) {
        let Endpoint { id, network, mac, .. } = *endpoint;
        self.networks.entry(network).or_default().insert(id);
        self.macs.insert((network, mac, id));
        self.allowed.extend(endpoint.allowed_addresses().map(|address| (network, address, id)));
        self.allowed_macs.extend(endpoint.allowed_macs.iter().map(|mac| (network, *mac, id)));
        self.called.extend(endpoint.canonical_names().map(|name| (name.into(), id)));
        for net in &endpoint.addresses {
            self.addresses.insert((network, net.addr(), id));
            *self.ranges.entry((network, net.trunc())).or_default() += 1;
        }
        match &endpoint.groups {
            Some(groups) => {
                groups.iter().for_each(|group| *self.groups.entry((network, *group)).or_default() += 1)
            }
            None => *self.unfollowed.entry(network).or_default() += 1,
        }
    }

    pub(crate) fn remove(&mut self, endpoint: &Endpoint) {
        let Endpoint { id, network, mac, .. } = *endpoint;
        take(&mut self.networks, &network, id);
        self.macs.remove(&(network, mac, id));
        for address in endpoint.allowed_addresses() {
            self.allowed.remove(&(network, address, id));
        }
        for mac in &endpoint.allowed_macs {
            self.allowed_macs.remove(&(network, *mac, id));
        }
        for name in endpoint.canonical_names() {
            self.called.remove(&(name.into(), id));
        }
        for net in &endpoint.addresses {
            self.addresses.remove(&(network, net.addr(), id));
            count_down(&mut self.ranges, &(network, net.trunc()));
        }
        match &endpoint.groups {
            Some(groups) => groups.iter().for_each(|group| count_down(&mut self.groups, &(network, *group))),
            None => count_down(&mut self.unfollowed, &network),
        }
    }

    /// Returns the networks with endpoints.
    pub(crate) fn networks(&self) -> impl Iterator<Item = NetworkId> {
        self.networks.keys().copied()
    }

    pub(crate) fn on(&self, network: NetworkId) -> impl Iterator<Item = EndpointId> {
        self.networks.get(&network).into_iter().flatten().copied()
    }

    pub(crate) fn with_address(
        &self,
        network: NetworkId,
        address: IpAddr,
    ) -> impl Iterator<Item = EndpointId> {
        self.addresses.range((network, address, FIRST)..=(network, address, LAST)).map(|(_, _, id)| *id)
    }

    pub(crate) fn with_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = EndpointId> {
        self.macs.range((network, mac, FIRST)..=(network, mac, LAST)).map(|(_, _, id)| *id)
    }

    pub(crate) fn allowing_address(
        &self,
        network: NetworkId,
        address: IpAddr,
    ) -> impl Iterator<Item = EndpointId> {
        self.allowed.range((network, address, FIRST)..=(network, address, LAST)).map(|(_, _, id)| *id)
    }

    pub(crate) fn allowing_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = EndpointId> {
        self.allowed_macs.range((network, mac, FIRST)..=(network, mac, LAST)).map(|(_, _, id)| *id)
    }

    pub(crate) fn called<'a>(&'a self, name: &str) -> impl Iterator<Item = EndpointId> + use<'a> {
        self.called.range((name.into(), FIRST)..=(name.into(), LAST)).map(|(_, id)| *id)
    }

    pub(crate) fn ranges(&self, network: NetworkId) -> impl Iterator<Item = IpNet> {
        let from = (network, IpNet::default());
        self.ranges.range(from..).take_while(move |((on, _), _)| *on == network).map(|((_, range), _)| *range)
    }

    pub(crate) fn groups(&self, network: NetworkId) -> impl Iterator<Item = IpAddr> {
        let from = (network, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        self.groups.range(from..).take_while(move |((on, _), _)| *on == network).map(|((_, group), _)| *group)
    }

    pub(crate) fn is_followed(&self, network: NetworkId) -> bool {
        !self.unfollowed.contains_key(&network)
    }
}

fn count_down<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn take<K: Ord>(sets: &mut BTreeMap<K, BTreeSet<EndpointId>>, key: &K, id: EndpointId) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(&id);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}
