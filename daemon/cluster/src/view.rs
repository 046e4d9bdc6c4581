//! The cluster as one host knows it.

use std::collections::BTreeMap;
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

/// One host.
#[derive(Debug, Clone)]
pub struct Node {
    /// As it describes itself.
    pub record: NodeRecord,
    /// As we find it; [`PeerState::Alive`] for the own one.
    pub state: PeerState,
    /// What it owns.
    pub table: Table,
}

/// The cluster as one host sees it.
#[derive(Debug, Clone)]
pub struct View {
    /// The host that looks.
    pub me: NodeId,
    /// All hosts known, the own one included.
    pub nodes: BTreeMap<NodeId, Node>,
    /// All networks after conflicts are resolved, those being removed included.
    pub networks: BTreeMap<NetworkId, NetworkState>,
    /// Members and blocks.
    pub alloc: AllocMap,
    /// Kubernetes' objects.
    pub resources: Resources,
}

/// A network, and whether it is on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkState {
    /// As asked for.
    pub network: Network,
    /// Removed while it had endpoints somewhere: it is served until they are gone.
    pub removing: bool,
}

/// An endpoint that counts, with its host.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    /// Its host.
    pub node: &'a Node,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
}

impl View {
    /// The own host.
    pub fn own(&self) -> Option<&Node> {
        self.nodes.get(&self.me)
    }

    /// A host's name, or its id where no record is known.
    pub fn name_of(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |node| node.record.name.clone())
    }

    /// Whether what a host says it owns is used: a member's is, while it lives or is expected back.
    pub fn counts(&self, node: &Node) -> bool {
        self.alloc.members.contains(&node.record.id)
            && match node.state {
                PeerState::Alive | PeerState::Suspect => true,
                PeerState::Dead | PeerState::Left => false,
            }
    }

    /// Whether a network is of this host alone: what is on it needs nobody's agreement, and others have no say.
    pub fn is_own(&self, network: NetworkId) -> bool {
        self.networks.get(&network).is_some_and(|found| found.network.driver == Driver::Bridge)
    }

    /// Whether what a host says it has on a network is used.
    pub fn counts_on(&self, node: &Node, network: NetworkId) -> bool {
        if self.is_own(network) { node.record.id == self.me } else { self.counts(node) }
    }

    /// All endpoints that any host says it has, whether they count or not.
    pub fn all_endpoints(&self) -> impl Iterator<Item = Placed<'_>> {
        self.placed(Table::endpoints)
    }

    /// Those on a network.
    pub fn all_endpoints_on(&self, network: NetworkId) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.endpoints_on(network))
    }

    /// Those with an address on a network.
    pub fn all_with_address(&self, network: NetworkId, address: IpAddr) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.with_address(network, address))
    }

    /// Those with a MAC address on a network.
    pub fn all_with_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = Placed<'_>> {
        self.placed(move |table| table.with_mac(network, mac))
    }

    /// Those of a name, on any network.
    pub fn all_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Placed<'a>> {
        self.placed(move |table| table.named(name))
    }

    /// Those with a name or alias, which is in lower case, on any network.
    pub fn all_called<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Placed<'a>> {
        self.placed(move |table| table.called(name))
    }

    /// What `find` finds in each host's table.
    fn placed<'a, I: Iterator<Item = &'a Endpoint> + 'a>(
        &'a self,
        find: impl Fn(&'a Table) -> I + 'a,
    ) -> impl Iterator<Item = Placed<'a>> {
        self.nodes
            .values()
            .flat_map(move |node| find(&node.table).map(move |endpoint| Placed { node, endpoint }))
    }

    /// The endpoints of a network that count: those of members that are there, with addresses
    /// which the host may use.
    pub fn endpoints(&self, network: NetworkId) -> impl Iterator<Item = Placed<'_>> {
        self.nodes
            .values()
            .filter(move |node| self.counts_on(node, network))
            .flat_map(move |node| {
                node.table.endpoints_on(network).map(move |endpoint| Placed { node, endpoint })
            })
            .filter(|placed| self.address_conflict(placed.node.record.id, placed.endpoint).is_none())
    }

    /// Whether an endpoint is one of [`Self::endpoints`].
    pub fn is_counted(&self, placed: &Placed<'_>) -> bool {
        self.counts_on(placed.node, placed.endpoint.network)
            && self.address_conflict(placed.node.record.id, placed.endpoint).is_none()
    }

    /// The hosts with endpoints on a network that count.
    pub fn hosts_on(&self, network: NetworkId) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |node| {
            self.counts_on(node, network)
                && node
                    .table
                    .endpoints_on(network)
                    .any(|endpoint| self.address_conflict(node.record.id, endpoint).is_none())
        })
    }

    /// The first address of an endpoint that its host has no right to.
    pub fn address_conflict(&self, owner: NodeId, endpoint: &Endpoint) -> Option<IpAddr> {
        endpoint
            .addresses
            .iter()
            .map(IpNet::addr)
            .find(|address| !self.may_use(owner, endpoint.network, *address))
    }

    /// Whether a host may use an address: it holds the block, or leased it from the holder; or the network is
    /// its own.
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

    /// Who holds the block that an address is in.
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

    /// The blocks of a network, with their holders.
    pub fn blocks(&self, network: NetworkId) -> impl Iterator<Item = (IpNet, NodeId)> {
        let all = self.alloc.blocks.iter().filter(move |(block, _)| block.network == network);
        all.map(|(block, holder)| (block.prefix, *holder))
    }

    /// The blocks of a network that a host holds, in order.
    pub fn blocks_of(&self, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpNet> {
        self.blocks(network).filter(move |(_, holder)| *holder == node).map(|(block, _)| block)
    }

    /// Whether the local host holds a block of a network.
    pub fn has_block(&self, network: NetworkId) -> bool {
        self.blocks_of(network, self.me).next().is_some()
    }

    /// The gateways of a routed network on a host: one for each block that the host holds, in the order of the blocks.
    pub fn gateways(&self, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpAddr> {
        self.blocks_of(network, node).map(addresses::gateway)
    }

    /// The first gateway of a routed network on a host that has the address family of `like`: what the host sends
    /// from, and the next hop of the other hosts.
    pub fn first_gateway(&self, network: NetworkId, node: NodeId, like: IpAddr) -> Option<IpAddr> {
        self.gateways(network, node).find(|gateway| gateway.is_ipv4() == like.is_ipv4())
    }

    /// The endpoint that has an address on a network, if it counts.
    pub fn endpoint_by_address(&self, network: NetworkId, address: IpAddr) -> Option<Placed<'_>> {
        self.all_with_address(network, address).find(|placed| self.is_counted(placed))
    }

    /// Switched networks.
    pub fn switched(&self) -> impl Iterator<Item = &Network> {
        self.networks.values().map(|found| &found.network).filter(|network| network.mode == Mode::L2)
    }

    /// Whether there are Services.
    pub fn has_services(&self) -> bool {
        !self.resources.services().is_empty()
    }

    /// A network by name or id. Should the cluster have got one with the name of a network of this host, this
    /// host's is meant, as it was before.
    pub fn network(&self, name: &str) -> Option<&NetworkState> {
        let named = || self.networks.values().filter(|state| state.network.name == name);
        named()
            .find(|state| state.network.driver == Driver::Bridge)
            .or_else(|| named().next())
            .or_else(|| name.parse().ok().and_then(|id: NetworkId| self.networks.get(&id)))
    }
}
