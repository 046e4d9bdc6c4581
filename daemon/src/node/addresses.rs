//! Addresses for endpoints: from a block of this host, from a newly claimed block, or leased from another host.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_proto::alloc::{Block, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Driver, Network, Subnet};
use ovl_proto::sync::LeaseWish;

use super::state::State;
use super::{Failed, Node};

/// An address that is reserved for an attach, and released when this is dropped.
pub(super) struct Reserved<'a> {
    node: &'a Node,
    network: NetworkId,
    /// The address, with the prefix length that the endpoint gets.
    pub(super) net: IpNet,
}

impl Reserved<'_> {
    /// Keeps the address reserved after this value is gone, and returns it.
    pub(super) fn keep(self) -> IpNet {
        let net = self.net;
        std::mem::forget(self);
        net
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.node.state.borrow_mut().pending.addresses.remove(&(self.network, self.net.addr()));
    }
}

impl Node {
    /// Reserves any free address of a subnet.
    ///
    /// # Errors
    ///
    /// Every address is in use, or no majority of the members can be reached to claim a block.
    pub(super) async fn reserve_any(
        &self,
        network: &Network,
        subnet: &Subnet,
    ) -> Result<Reserved<'_>, Failed> {
        if let Some(reserved) = self.try_pick(network, subnet) {
            return Ok(reserved);
        }
        if self.state.borrow().view.is_own(network.id) {
            return Err(self.full(network, subnet));
        }
        // A concurrent attach may take the addresses of the claimed block before this one runs again, hence the loop.
        for _ in 0..16 {
            match self.claim_block(network, subnet).await? {
                Ok(()) => {
                    if let Some(reserved) = self.try_pick(network, subnet) {
                        return Ok(reserved);
                    }
                }
                // On a routed network, an address is routed to the holder of its block, so it cannot be leased to
                // another host.
                Err(Refusal::Full { .. }) if subnet.routed => return Err(self.full(network, subnet)),
                Err(Refusal::Full { .. }) => return self.lease_any(network, subnet).await,
                Err(refusal) => return Err(self.explain(&refusal)),
            }
        }
        Err(self.full(network, subnet))
    }

    /// Reserves a free address of the blocks that this host holds. `None` if they have none.
    fn try_pick(&self, network: &Network, subnet: &Subnet) -> Option<Reserved<'_>> {
        let mut state = self.state.borrow_mut();
        let address = pick(&mut state, network.id, subnet)?;
        drop(state);
        self.set_aside(network.id, subnet, address)
    }

    /// Takes over an address that was reserved earlier with [`Reserved::keep`]. `None` if it is in no subnet.
    pub(super) fn reserve_kept(&self, network: &Network, address: IpAddr) -> Option<Reserved<'_>> {
        let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&address))?;
        self.state.borrow_mut().pending.addresses.remove(&(network.id, address));
        self.set_aside(network.id, subnet, address)
    }

    /// Marks an address as reserved. `None` if it is reserved already.
    fn set_aside(&self, network: NetworkId, subnet: &Subnet, address: IpAddr) -> Option<Reserved<'_>> {
        // On a routed network, no other host is on the link.
        let length = if subnet.routed { subnet.prefix.max_prefix_len() } else { subnet.prefix.prefix_len() };
        let net = IpNet::new(address, length).ok()?;
        let fresh = self.state.borrow_mut().pending.addresses.insert((network, address));
        // Not `then_some`: that would create the value in any case, and dropping it would release the other
        // reservation.
        fresh.then(|| Reserved { node: self, network, net })
    }

    /// Claims one block more than this host holds.
    pub(super) async fn claim_block(
        &self,
        network: &Network,
        subnet: &Subnet,
    ) -> Result<Result<(), Refusal>, Failed> {
        let (me, held) = {
            let state = self.state.borrow();
            (state.view.me, blocks(&state, network.id, subnet).len())
        };
        let change = Change::Claim {
            network: network.id,
            subnet: subnet.prefix,
            block_length: subnet.block_length,
            owner: me,
            blocks: u32::try_from(held).unwrap_or(u32::MAX).saturating_add(1),
        };
        let result = self.agree(&change).await?;
        if result.is_ok() {
            self.event("block", &network.name, &format!("claimed a block of {}", subnet.prefix));
        }
        Ok(result)
    }

    /// Leases any free address of a subnet from a live host. To be called when every block has a holder.
    async fn lease_any(&self, network: &Network, subnet: &Subnet) -> Result<Reserved<'_>, Failed> {
        let holders: BTreeSet<NodeId> = {
            let state = self.state.borrow();
            let alive = state.alive();
            holders(&state, network.id, subnet)
                .filter(|holder| alive.contains(holder) && *holder != state.view.me)
                .collect()
        };
        for holder in holders {
            if let Ok(address) = self.lease(holder, network.id, LeaseWish::AnyOf(subnet.prefix)).await
                && let Some(reserved) = self.set_aside(network.id, subnet, address)
            {
                return Ok(reserved);
            }
        }
        Err(self.full(network, subnet))
    }

    /// Returns the error for a full subnet: how many addresses are in use, and how to extend the subnet.
    fn full(&self, network: &Network, subnet: &Subnet) -> Failed {
        let state = self.state.borrow();
        let used: usize = state
            .view
            .all_endpoints_on(network.id)
            .flat_map(|placed| &placed.endpoint.addresses)
            .filter(|net| subnet.prefix.contains(&net.addr()))
            .count();
        let dead: Vec<String> = holders(&state, network.id, subnet)
            .filter(|holder| !state.alive().contains(holder))
            .map(|holder| state.view.name_of(holder))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let dead = if dead.is_empty() {
            String::new()
        } else {
            format!(
                " Blocks are also held by hosts that do not answer: {}; `ovlctl peers forget` frees them.",
                dead.join(", ")
            )
        };
        Failed::exhausted(format!(
            "no address is free in {} of network {}: {used} of {} are in use.{dead} `ovlctl network update {} --subnet \
             LARGER` makes it larger while it is in use; LARGER must contain {}",
            subnet.prefix,
            network.name,
            ipam::usable(subnet),
            network.name,
            subnet.prefix
        ))
    }

    /// Reserves one particular address.
    ///
    /// # Errors
    ///
    /// The address is outside the subnets, not usable, in use, or in a block whose holder does not lease it; or no
    /// majority can be reached to claim its block.
    pub(super) async fn reserve_exact(
        &self,
        network: &Network,
        address: IpAddr,
    ) -> Result<Reserved<'_>, Failed> {
        let Some(subnet) = network.subnets.iter().find(|subnet| subnet.prefix.contains(&address)) else {
            let ranges: Vec<String> =
                network.subnets.iter().map(|subnet| subnet.prefix.to_string()).collect();
            return Err(Failed::invalid(format!(
                "{address} is not in network {}, which has {}",
                network.name,
                ranges.join(", ")
            )));
        };
        if !ipam::is_usable(address, subnet) {
            return Err(Failed::invalid(format!(
                "{address} is set aside in {}: it is the gateway, the network's own, or the broadcast address",
                subnet.prefix
            )));
        }
        self.check_free(network.id, address)?;
        let (me, holder, block) = {
            let state = self.state.borrow();
            (state.view.me, state.view.holder_of(network.id, address), block_of(&state, network.id, address))
        };
        match (holder, block) {
            _ if network.driver == Driver::Bridge => {}
            (Some(holder), _) if holder == me => {}
            (Some(holder), _) if subnet.routed => {
                return Err(Failed::conflict(format!(
                    "{address} is in a block of host {}, and on a routed network only endpoints of that host have such \
                     addresses",
                    self.state.borrow().view.name_of(holder)
                )));
            }
            (Some(holder), _) => {
                self.lease(holder, network.id, LeaseWish::Exact(address)).await.map_err(|error| {
                    let name = self.state.borrow().view.name_of(holder);
                    Failed::conflict(format!(
                        "{address} is in a block of host {name}, which does not give it: {error}"
                    ))
                })?;
            }
            (None, Some(prefix)) => {
                let claim = Change::ClaimExact { block: Block { network: network.id, prefix }, owner: me };
                self.change(claim).await?;
            }
            (None, None) => {
                return Err(Failed::invalid(format!("{address} is in no block of {}", subnet.prefix)));
            }
        }
        self.check_free(network.id, address)?;
        self.set_aside(network.id, subnet, address).ok_or_else(|| {
            Failed::conflict(format!("{address} is being given to another endpoint at this moment"))
        })
    }

    fn check_free(&self, network: NetworkId, address: IpAddr) -> Result<(), Failed> {
        let state = self.state.borrow();
        let foreign = state.view.endpoint_by_address(network, address).is_some();
        if foreign || in_use(&state, network)(address) {
            return Err(Failed::conflict(describe_use(&state, network, address)));
        }
        Ok(())
    }
}

/// Returns the blocks of a subnet that this host holds. For a bridge network, it is the whole subnet.
fn blocks(state: &State, network: NetworkId, subnet: &Subnet) -> Vec<IpNet> {
    if state.view.is_own(network) {
        return vec![subnet.prefix];
    }
    held(state, network, subnet)
        .filter(|(_, holder)| *holder == state.view.me)
        .map(|(prefix, _)| prefix)
        .collect()
}

/// Returns the holder of each claimed block of a subnet.
fn holders<'a>(
    state: &'a State,
    network: NetworkId,
    subnet: &'a Subnet,
) -> impl Iterator<Item = NodeId> + 'a {
    held(state, network, subnet).map(|(_, holder)| holder)
}

/// Returns the claimed blocks of a subnet with their holders.
fn held<'a>(
    state: &'a State,
    network: NetworkId,
    subnet: &'a Subnet,
) -> impl Iterator<Item = (IpNet, NodeId)> + 'a {
    state
        .view
        .alloc
        .blocks
        .range(Block { network, prefix: IpNet::default() }..)
        .take_while(move |(block, _)| block.network == network)
        .filter(|(block, _)| subnet.prefix.contains(&block.prefix))
        .map(|(block, holder)| (block.prefix, *holder))
}

/// Returns a predicate for addresses of a network that this host must not assign.
///
/// These are the addresses of its endpoints, addresses that are leased to other hosts, and those that are reserved
/// for attaches in flight. After a subnet was extended, it also includes the addresses that older endpoints take for
/// the network or broadcast address.
pub(super) fn in_use(state: &State, network: NetworkId) -> impl Fn(IpAddr) -> bool {
    let edges = edges(state, network);
    move |address| {
        let own =
            state.view.own().is_some_and(|own| own.table.with_address(network, address).next().is_some());
        own || state.lent.contains_key(&(network, address))
            || state.pending.addresses.contains(&(network, address))
            || edges.contains(&address)
    }
}

/// Returns the first and the last address of each range with which endpoints were attached.
fn edges(state: &State, network: NetworkId) -> BTreeSet<IpAddr> {
    let ranges = state.view.nodes.values().flat_map(|node| node.table.ranges(network));
    ranges.flat_map(|range| [range.network(), range.broadcast()]).collect()
}

/// Picks a free address of the blocks that this host holds. `None` if there is none.
pub(super) fn pick(state: &mut State, network: NetworkId, subnet: &Subnet) -> Option<IpAddr> {
    let cursor = (network, subnet.gateway);
    let address = {
        let in_use = in_use(state, network);
        // An address that an endpoint may send from beside its own is a virtual one: only `--ip` gives it away.
        let is_allowed = |address| state.view.all_allowing_address(network, address).next().is_some();
        ipam::allocate(
            &blocks(state, network, subnet),
            subnet,
            |address| in_use(address) || is_allowed(address),
            state.cursors.get(&cursor).copied(),
        )?
    };
    state.cursors.insert(cursor, address);
    Some(address)
}

/// Returns the block that contains an address, whether it is claimed or not. `None` if no subnet contains it.
pub(super) fn block_of(state: &State, network: NetworkId, address: IpAddr) -> Option<IpNet> {
    let network = &state.view.networks.get(&network)?.network;
    let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&address))?;
    IpNet::new(address, subnet.block_length).ok().map(|net| net.trunc())
}

/// Describes who uses an address, for an error message.
pub(super) fn describe_use(state: &State, network: NetworkId, address: IpAddr) -> String {
    match state.view.all_with_address(network, address).next() {
        Some(placed) => {
            format!(
                "{address} is in use by endpoint {} on host {}",
                placed.endpoint.name, placed.node.record.name
            )
        }
        None => match state.lent.get(&(network, address)) {
            Some(lent) => {
                format!("{address} is set aside for an endpoint of host {}", state.view.name_of(lent.to))
            }
            None if edges(state, network).contains(&address) => format!(
                "{address} is the broadcast address, or the network's own, for endpoints that were attached before \
                 the range was made larger"
            ),
            None => format!("{address} is being given to another endpoint at this moment"),
        },
    }
}
