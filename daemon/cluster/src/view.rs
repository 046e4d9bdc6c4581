//! The view: the cluster as one host sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::alloc::AllocMap;
use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::object::{Driver, Mode, Network};
use ovl_proto::record::{NodeRecord, PeerState};
use ovl_proto::table::{Endpoint, Entry, Key};

use crate::addresses;
use crate::resources::Resources;
use crate::table::Table;

/// A host.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its record.
    pub record: NodeRecord,
    /// Its liveness; [`PeerState::Alive`] for the local host.
    pub state: PeerState,
    /// Its owner table.
    pub table: Table,
}

/// The cluster as one host sees it.
#[derive(Debug, Clone)]
pub struct View {
    /// The local host.
    pub me: NodeId,
    /// All known hosts, including the local host.
    pub nodes: BTreeMap<NodeId, Node>,
    /// All networks after conflicts are resolved, including those that are being deleted.
    pub networks: BTreeMap<NetworkId, NetworkState>,
    /// The allocation map.
    pub alloc: AllocMap,
    /// Kubernetes objects.
    pub resources: Resources,
    /// The hosts that are reached at another address than their main one, or reach this host so.
    pub elsewhere: BTreeSet<NodeId>,
}

/// A network, and whether it is being deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkState {
    /// The network.
    pub network: Network,
    /// Whether it was deleted while it had endpoints. It stays in use until they are gone.
    pub removing: bool,
}

/// An endpoint with its host.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    /// Its host.
    pub node: &'a Node,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
}

impl View {
    /// Returns the local host.
    pub fn own(&self) -> Option<&Node> {
        self.nodes.get(&self.me)
    }

    /// Returns a host's name, or its id if no record is known.
    pub fn name_of(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |node| node.record.name.clone())
    }

    /// Whether the entries of a host are used: it is a member, and alive or suspect.
    pub fn counts(&self, node: &Node) -> bool {
        self.alloc.members.contains(&node.record.id)
            && match node.state {
                PeerState::Alive | PeerState::Suspect => true,
                PeerState::Dead | PeerState::Left => false,
            }
    }

    /// Whether what this host and another one exchange crosses NAT.
    pub fn crosses_nat(&self, node: &Node) -> bool {
        node.record.is_behind_nat() || self.own().is_some_and(|own| own.record.is_behind_nat())
    }

    /// Whether the VTEPs of this host and another one are of different address families.
    pub fn has_other_family(&self, node: &Node) -> bool {
        self.own().is_some_and(|own| own.record.vtep.is_ipv4() != node.record.vtep.is_ipv4())
    }

    /// Whether all that this host and another one exchange is sealed, and goes through the sockets of relayed datagrams: it crosses NAT,
    /// or one of the two is not reached at its main address.
    pub fn is_framed(&self, node: &Node) -> bool {
        self.crosses_nat(node) || self.has_other_family(node) || self.elsewhere.contains(&node.record.id)
    }

    /// Whether packets that are not sealed can be sent to another host.
    pub fn is_plainly_reached(&self, node: &Node) -> bool {
        self.own().is_some() && !self.is_framed(node)
    }

    /// Whether this host and another one have no address family in common, so that they reach each other through members alone.
    pub fn is_apart(&self, node: &Node) -> bool {
        self.own().is_some_and(|own| own.record.is_apart(&node.record))
    }

    /// Whether a network is a bridge network of the local host, which needs no consensus and ignores all peers.
    pub fn is_own(&self, network: NetworkId) -> bool {
        self.networks.get(&network).is_some_and(|found| found.network.driver == Driver::Bridge)
    }

    /// Whether the entries of a host on a network are used.
    pub fn counts_on(&self, node: &Node, network: NetworkId) -> bool {
        if self.is_own(network) { node.record.id == self.me } else { self.counts(node) }
    }

    /// Returns all endpoints in all tables, whether they are used or not.
    pub fn all_endpoints(&self) -> impl Iterator<Item = Placed<'_>> {
        self.placed(Table::endpoints)
    }

    /// Returns all endpoints on a network, whether they are used or not.
    pub fn all_endpoints_on(&self, network: NetworkId) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.endpoints_on(network))
    }

    /// Returns all endpoints with an address on a network, whether they are used or not.
    pub fn all_with_address(&self, network: NetworkId, address: IpAddr) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.with_address(network, address))
    }

    /// Returns all endpoints with a MAC address on a network, whether they are used or not.
    pub fn all_with_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.with_mac(network, mac))
    }

    /// Returns all endpoints that may send from an address of a network that is not their own, whether they are used or
    /// not.
    pub fn all_allowing_address(
        &self,
        network: NetworkId,
        address: IpAddr,
    ) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.allowing_address(network, address))
    }

    /// Returns all endpoints that may send from a MAC address of a network that is not their own, whether they are used
    /// or not.
    pub fn all_allowing_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.allowing_mac(network, mac))
    }

    /// Returns all endpoints of a name, in any spelling of it, on any network, whether they are used or not.
    pub fn all_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Placed<'a>> {
        self.placed(move |table| table.named(name))
    }

    /// Returns all endpoints with a name, alias or pod's name, given in its canonical form, on any network.
    pub fn all_called<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Placed<'a>> {
        self.placed(move |table| table.called(name))
    }

    /// Returns the endpoints that `find` returns for each host's table.
    pub(crate) fn placed<'a, I: Iterator<Item = &'a Endpoint> + 'a>(
        &'a self,
        find: impl Fn(&'a Table) -> I + 'a,
    ) -> impl Iterator<Item = Placed<'a>> {
        self.nodes
            .values()
            .flat_map(move |node| find(&node.table).map(move |endpoint| Placed { node, endpoint }))
    }

    /// Returns the endpoints of a network that are used: those of live members, with addresses that the host may use.
    pub fn endpoints(&self, network: NetworkId) -> impl Iterator<Item = Placed<'_>> {
        self.nodes
            .values()
            .filter(move |node| self.counts_on(node, network))
            .flat_map(move |node| {
                node.table.endpoints_on(network).map(move |endpoint| Placed { node, endpoint })
            })
            .filter(|placed| self.address_conflict(placed.node.record.id, placed.endpoint).is_none())
    }

    /// Whether an endpoint is used, as those of [`Self::endpoints`].
    pub fn is_counted(&self, placed: &Placed<'_>) -> bool {
        self.counts_on(placed.node, placed.endpoint.network)
            && self.address_conflict(placed.node.record.id, placed.endpoint).is_none()
    }

    /// Returns the hosts with used endpoints on a network.
    pub fn hosts_on(&self, network: NetworkId) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |node| {
            self.counts_on(node, network)
                && node
                    .table
                    .endpoints_on(network)
                    .any(|endpoint| self.address_conflict(node.record.id, endpoint).is_none())
        })
    }

    /// Returns the first address of an endpoint that its host may not use.
    pub fn address_conflict(&self, owner: NodeId, endpoint: &Endpoint) -> Option<IpAddr> {
        endpoint
            .addresses
            .iter()
            .map(IpNet::addr)
            .find(|address| !self.may_use(owner, endpoint.network, *address))
    }

    /// Whether a host may use an address: it holds the block or has a lease of its holder, or the network is a bridge
    /// network of that host.
    pub fn may_use(&self, node: NodeId, network: NetworkId, address: IpAddr) -> bool {
        if self.is_own(network) {
            return node == self.me;
        }
        match self.holder_of(network, address) {
            Some(holder) if holder == node => true,
            Some(holder) => self.nodes.get(&holder).is_some_and(|holder| {
                matches!(
                    holder.table.get(&Key::Lease(network, address)),
                    Some(Entry::Lease { to, .. }) if *to == node
                )
            }),
            None => false,
        }
    }

    /// Returns the host that holds the block of an address.
    pub fn holder_of(&self, network: NetworkId, address: IpAddr) -> Option<NodeId> {
        use ovl_proto::alloc::Block;
        let host = IpNet::from(address);
        // Blocks do not overlap, so the one that holds the address sorts last of those before it.
        let last = Block { network, prefix: host };
        self.alloc
            .blocks
            .range(..=last)
            .next_back()
            .filter(|(block, _)| block.network == network && block.prefix.contains(&host))
            .map(|(_, holder)| *holder)
    }

    /// Returns the blocks of a network with their holders.
    pub fn blocks(&self, network: NetworkId) -> impl Iterator<Item = (IpNet, NodeId)> {
        let all = self.alloc.blocks.iter().filter(move |(block, _)| block.network == network);
        all.map(|(block, holder)| (block.prefix, *holder))
    }

    /// Returns the blocks of a network that a host holds, in order.
    pub fn blocks_of(&self, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpNet> {
        self.blocks(network).filter(move |(_, holder)| *holder == node).map(|(block, _)| block)
    }

    /// Whether the local host holds a block of a network.
    pub fn has_block(&self, network: NetworkId) -> bool {
        self.blocks_of(network, self.me).next().is_some()
    }

    /// Returns the gateways of a routed network on a host: one for each block that the host holds, in order.
    pub fn gateways(&self, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpAddr> {
        self.blocks_of(network, node).map(addresses::gateway)
    }

    /// Returns the first gateway of a routed network on a host with the address family of `like`. It is the host's
    /// source address, and the next hop for other hosts.
    pub fn first_gateway(&self, network: NetworkId, node: NodeId, like: IpAddr) -> Option<IpAddr> {
        self.gateways(network, node).find(|gateway| gateway.is_ipv4() == like.is_ipv4())
    }

    /// Returns the used endpoint that has an address on a network.
    pub fn endpoint_by_address(&self, network: NetworkId, address: IpAddr) -> Option<Placed<'_>> {
        self.all_with_address(network, address).find(|placed| self.is_counted(placed))
    }

    /// Returns the switched networks.
    pub fn switched(&self) -> impl Iterator<Item = &Network> {
        self.networks.values().map(|found| &found.network).filter(|network| network.mode == Mode::L2)
    }

    /// Whether there are Services.
    pub fn has_services(&self) -> bool {
        !self.resources.services().is_empty()
    }

    /// Returns a network by name or id. If a network of the cluster and a bridge network have the same name, the
    /// bridge network takes precedence, because it was there first.
    pub fn network(&self, name: &str) -> Option<&NetworkState> {
        let named = || self.networks.values().filter(|state| state.network.name == name);
        named()
            .find(|state| state.network.driver == Driver::Bridge)
            .or_else(|| named().next())
            .or_else(|| name.parse().ok().and_then(|id: NetworkId| self.networks.get(&id)))
    }
}
