//! Addresses of this host's endpoints: which are free, which are reserved by requests in flight, and which are lent to
//! other hosts.
//!
//! [`Addresses`] owns the reservations, the loans and the last choice on each subnet. Which blocks this host holds is
//! agreed upon by the members; the arithmetic is in [`ovl_cluster::addresses`]. Begin to read at [`Addresses::pick`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_cluster::table::Table;
use ovl_cluster::view::View;
use ovl_proto::alloc::Block;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::Subnet;

/// Time in milliseconds after which a borrower loses a leased address that its table never contained.
const UNUSED_LEASE_MS: u64 = 60_000;

/// An address on a network.
pub(crate) type NetworkAddress = (NetworkId, IpAddr);

/// Addresses that are in use for reasons that no table says, and the last choice on each subnet.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    /// Last address that was picked on each subnet, which its gateway identifies.
    cursors: BTreeMap<NetworkAddress, IpAddr>,
    /// Addresses that are lent to other hosts.
    lent: BTreeMap<NetworkAddress, Loan>,
    /// Addresses that are chosen and not yet in the table.
    reserved: BTreeSet<NetworkAddress>,
}

/// A loan of an address to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loan {
    /// The borrower.
    to: NodeId,
    /// Time when it was lent, in milliseconds of this run.
    at: u64,
    /// Whether the borrower's table has ever contained it.
    seen: bool,
}

impl Addresses {
    /// Takes the loans of the state file, each with its borrower.
    pub(crate) fn new(lent: impl IntoIterator<Item = (NetworkId, IpAddr, NodeId)>) -> Self {
        let loan = |(network, address, to)| ((network, address), Loan { to, at: 0, seen: true });
        Self { lent: lent.into_iter().map(loan).collect(), ..Self::default() }
    }

    /// Returns the addresses that are lent, each with its borrower.
    pub(crate) fn lent(&self) -> impl Iterator<Item = (NetworkId, IpAddr, NodeId)> {
        self.lent.iter().map(|((network, address), loan)| (*network, *address, loan.to))
    }

    /// Whether an address is lent to this host.
    pub(crate) fn is_lent_to(&self, network: NetworkId, address: IpAddr, to: NodeId) -> bool {
        self.lent.get(&(network, address)).is_some_and(|loan| loan.to == to)
    }

    /// Lends an address. `now` is in milliseconds of this run.
    pub(crate) fn lend(&mut self, network: NetworkId, address: IpAddr, to: NodeId, now: u64) {
        self.lent.insert((network, address), Loan { to, at: now, seen: false });
    }

    /// Ends the loans of a borrower that its changed table no longer uses. Returns their addresses.
    pub(crate) fn take_returned(&mut self, borrower: NodeId, table: &Table) -> Vec<NetworkAddress> {
        self.end_loans(|(network, address), loan| {
            if loan.to != borrower {
                return false;
            }
            let used = table.with_address(network, address).next().is_some();
            let over = loan.seen && !used;
            loan.seen |= used;
            over
        })
    }

    /// Ends the loans that a live borrower never used, and those that are moot: the borrower was forgotten, or the block
    /// belongs to another host. Returns their addresses. `now` is in milliseconds of this run.
    pub(crate) fn take_expired(
        &mut self,
        view: &View,
        alive: &BTreeSet<NodeId>,
        now: u64,
    ) -> Vec<NetworkAddress> {
        let is_member = view.alloc.members.contains(&view.me);
        self.end_loans(|(network, address), loan| {
            let unused =
                !loan.seen && alive.contains(&loan.to) && now.saturating_sub(loan.at) > UNUSED_LEASE_MS;
            let moot = is_member
                && (!view.alloc.members.contains(&loan.to)
                    || view.holder_of(network, address) != Some(view.me));
            unused || moot
        })
    }

    fn end_loans(&mut self, is_over: impl Fn(NetworkAddress, &mut Loan) -> bool) -> Vec<NetworkAddress> {
        let mut ended = Vec::new();
        self.lent.retain(|at, loan| {
            let over = is_over(*at, loan);
            ended.extend(over.then_some(*at));
            !over
        });
        ended
    }

    /// Reserves an address. Returns whether it was free of reservations.
    pub(crate) fn reserve(&mut self, network: NetworkId, address: IpAddr) -> bool {
        self.reserved.insert((network, address))
    }

    /// Ends the reservation of an address.
    pub(crate) fn release(&mut self, network: NetworkId, address: IpAddr) {
        self.reserved.remove(&(network, address));
    }

    /// Returns the reserved addresses.
    pub(crate) fn reserved(&self) -> impl Iterator<Item = NetworkAddress> {
        self.reserved.iter().copied()
    }

    /// Returns a predicate for addresses of a network that this host must not assign.
    ///
    /// These are the addresses of its endpoints, addresses that are lent to other hosts, and those that are reserved
    /// for attaches in flight. After a subnet was extended, it also includes the addresses that older endpoints take for
    /// the network or broadcast address.
    pub(crate) fn in_use(&self, view: &View, network: NetworkId) -> impl Fn(IpAddr) -> bool {
        let edges = edges(view, network);
        move |address| {
            let own = view.own().is_some_and(|own| own.table.with_address(network, address).next().is_some());
            own || self.lent.contains_key(&(network, address))
                || self.reserved.contains(&(network, address))
                || edges.contains(&address)
        }
    }

    /// Picks a free address of the blocks that this host holds. `None` if there is none.
    pub(crate) fn pick(&mut self, view: &View, network: NetworkId, subnet: &Subnet) -> Option<IpAddr> {
        let cursor = (network, subnet.gateway);
        let address = {
            let in_use = self.in_use(view, network);
            // An address that an endpoint may send from beside its own is a virtual one: only `--ip` gives it away.
            let is_allowed = |address| view.all_allowing_address(network, address).next().is_some();
            ipam::allocate(
                &own_blocks(view, network, subnet),
                subnet,
                |address| in_use(address) || is_allowed(address),
                self.cursors.get(&cursor).copied(),
            )?
        };
        self.cursors.insert(cursor, address);
        Some(address)
    }

    /// Describes who uses an address, for an error message.
    pub(crate) fn describe_use(&self, view: &View, network: NetworkId, address: IpAddr) -> String {
        if let Some(placed) = view.all_with_address(network, address).next() {
            return format!(
                "{address} is in use by endpoint {} on host {}",
                placed.endpoint.name, placed.node.record.name
            );
        }
        match self.lent.get(&(network, address)) {
            Some(loan) => format!("{address} is set aside for an endpoint of host {}", view.name_of(loan.to)),
            None if edges(view, network).contains(&address) => format!(
                "{address} is the broadcast address, or the network's own, for endpoints that were attached before \
                 the range was made larger"
            ),
            None => format!("{address} is being given to another endpoint at this moment"),
        }
    }
}

/// Returns the blocks of a subnet that this host holds. For a bridge network, it is the whole subnet.
pub(crate) fn own_blocks(view: &View, network: NetworkId, subnet: &Subnet) -> Vec<IpNet> {
    if view.is_own(network) {
        return vec![subnet.prefix];
    }
    held(view, network, subnet).filter(|(_, holder)| *holder == view.me).map(|(prefix, _)| prefix).collect()
}

/// Returns the holder of each claimed block of a subnet.
pub(crate) fn holders<'a>(
    view: &'a View,
    network: NetworkId,
    subnet: &'a Subnet,
) -> impl Iterator<Item = NodeId> + 'a {
    held(view, network, subnet).map(|(_, holder)| holder)
}

/// Returns the claimed blocks of a subnet with their holders.
fn held<'a>(
    view: &'a View,
    network: NetworkId,
    subnet: &'a Subnet,
) -> impl Iterator<Item = (IpNet, NodeId)> + 'a {
    view.alloc
        .blocks
        .range(Block { network, prefix: IpNet::default() }..)
        .take_while(move |(block, _)| block.network == network)
        .filter(|(block, _)| subnet.prefix.contains(&block.prefix))
        .map(|(block, holder)| (block.prefix, *holder))
}

/// Returns the first and the last address of each range with which endpoints were attached.
fn edges(view: &View, network: NetworkId) -> BTreeSet<IpAddr> {
    let ranges = view.nodes.values().flat_map(|node| node.table.ranges(network));
    ranges.flat_map(|range| [range.network(), range.broadcast()]).collect()
}

/// Returns the block that contains an address, whether it is claimed or not. `None` if no subnet contains it.
pub(crate) fn block_of(view: &View, network: NetworkId, address: IpAddr) -> Option<IpNet> {
    let network = &view.networks.get(&network)?.network;
    let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&address))?;
    IpNet::new(address, subnet.block_length).ok().map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use ovl_proto::table::Key;

    use super::*;
    use crate::world::{NET, endpoint, give, id, net, switched};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn subnet(view: &View) -> Subnet {
        view.networks[&NET].network.subnets[0]
    }

    #[test]
    fn addresses_are_picked_in_turn_from_the_blocks_of_this_host() {
        let view = switched();
        let mut addresses = Addresses::default();
        let picked: Vec<IpAddr> = (0..3).filter_map(|_| addresses.pick(&view, NET, &subnet(&view))).collect();
        assert_eq!(picked, [ip("10.9.0.8"), ip("10.9.0.9"), ip("10.9.0.10")]);
        assert_eq!(block_of(&view, NET, picked[0]), Some(net("10.9.0.8/29")));
        assert_eq!(own_blocks(&view, NET, &subnet(&view)), [net("10.9.0.8/29")]);
        assert_eq!(holders(&view, NET, &subnet(&view)).count(), 3);
    }

    #[test]
    fn address_that_is_used_lent_or_reserved_is_not_picked_and_the_use_is_told() {
        let mut view = switched();
        let mut addresses = Addresses::default();
        give(&mut view, 1, vec![endpoint(1, "10.9.0.8/24")]);
        addresses.lend(NET, ip("10.9.0.9"), id(2), 0);
        assert!(addresses.reserve(NET, ip("10.9.0.10")) && !addresses.reserve(NET, ip("10.9.0.10")));
        assert_eq!(addresses.pick(&view, NET, &subnet(&view)), Some(ip("10.9.0.11")));
        let told = |address| addresses.describe_use(&view, NET, ip(address));
        assert_eq!(told("10.9.0.8"), "10.9.0.8 is in use by endpoint w1 on host h1");
        assert_eq!(told("10.9.0.9"), "10.9.0.9 is set aside for an endpoint of host h2");
        assert_eq!(told("10.9.0.10"), "10.9.0.10 is being given to another endpoint at this moment");
        assert!(told("10.9.0.255").contains("is the broadcast address"));
        addresses.release(NET, ip("10.9.0.10"));
        assert_eq!(addresses.reserved().count(), 0);
        assert!(!addresses.in_use(&view, NET)(ip("10.9.0.10")));
    }

    #[test]
    fn loan_ends_when_its_borrower_gives_the_address_back() {
        let mut view = switched();
        let mut addresses = Addresses::default();
        let at = (NET, ip("10.9.0.9"));
        addresses.lend(at.0, at.1, id(2), 0);
        assert!(addresses.take_returned(id(2), &view.nodes[&id(2)].table).is_empty(), "not used yet");
        give(&mut view, 2, vec![endpoint(2, "10.9.0.9/24")]);
        assert!(addresses.take_returned(id(3), &view.nodes[&id(3)].table).is_empty(), "another host");
        assert!(addresses.take_returned(id(2), &view.nodes[&id(2)].table).is_empty(), "in use");
        let Some(node) = view.nodes.get_mut(&id(2)) else { panic!() };
        let gone = vec![Key::Endpoint(ovl_proto::id::EndpointId([2; 5]))];
        node.table.write(1, vec![], gone, |_| ovl_proto::record::Signature([0; 64]));
        assert!(addresses.is_lent_to(at.0, at.1, id(2)));
        assert_eq!(addresses.take_returned(id(2), &view.nodes[&id(2)].table), [at]);
        assert!(!addresses.is_lent_to(at.0, at.1, id(2)));
    }

    #[test]
    fn loan_expires_if_it_is_never_used_or_moot() {
        let mut view = switched();
        let at = (NET, ip("10.9.0.9"));
        let lend = || {
            let mut addresses = Addresses::default();
            addresses.lend(at.0, at.1, id(2), 1000);
            addresses
        };
        let alive = BTreeSet::from([id(1), id(2)]);
        let later = 1000 + UNUSED_LEASE_MS + 1;
        assert!(lend().take_expired(&view, &alive, later - 1).is_empty());
        assert_eq!(lend().take_expired(&view, &alive, later), [at]);
        assert!(lend().take_expired(&view, &BTreeSet::new(), later).is_empty(), "it may be in use");
        // A loan of the state file has been used.
        let mut saved = Addresses::new([(at.0, at.1, id(2))]);
        assert!(saved.take_expired(&view, &alive, later).is_empty());
        assert_eq!(saved.lent().collect::<Vec<_>>(), [(at.0, at.1, id(2))]);
        view.alloc.members.remove(&id(2));
        assert_eq!(lend().take_expired(&view, &BTreeSet::new(), 1000), [at], "the borrower was forgotten");
        view.alloc.members.remove(&id(1));
        assert!(lend().take_expired(&view, &alive, 1000).is_empty(), "this host does not know");
    }
}
