//! Addresses for endpoints: from a block of this host, from a newly claimed block, or leased from another host.
//! [`crate::addresses`] knows which are free.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_proto::alloc::{Block, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Driver, Network, Subnet};
use ovl_proto::sync::LeaseWish;

use super::state::State;
use super::{Failed, Node};
use crate::addresses::{block_of, holders, own_blocks};

/// How long a host that is a Node of an API server waits to hear which block the server gives to it.
const NODE_WITHIN: Duration = Duration::from_secs(10);

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
        self.node.state.borrow_mut().addresses.release(self.network, self.net.addr());
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
        let address = {
            let mut state = self.state.borrow_mut();
            let State { view, addresses, .. } = &mut *state;
            addresses.pick(view, network.id, subnet)?
        };
        self.set_aside(network.id, subnet, address)
    }

    /// Takes over an address that was reserved earlier with [`Reserved::keep`]. `None` if it is in no subnet.
    pub(super) fn reserve_kept(&self, network: &Network, address: IpAddr) -> Option<Reserved<'_>> {
        let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&address))?;
        self.state.borrow_mut().addresses.release(network.id, address);
        self.set_aside(network.id, subnet, address)
    }

    /// Marks an address as reserved. `None` if it is reserved already.
    fn set_aside(&self, network: NetworkId, subnet: &Subnet, address: IpAddr) -> Option<Reserved<'_>> {
        // On a routed network, no other host is on the link.
        let length = if subnet.routed { subnet.prefix.max_prefix_len() } else { subnet.prefix.prefix_len() };
        let net = IpNet::new(address, length).ok()?;
        let fresh = self.state.borrow_mut().addresses.reserve(network, address);
        // Not `then_some`: that would create the value in any case, and dropping it would release the other
        // reservation.
        fresh.then(|| Reserved { node: self, network, net })
    }

    /// Claims one block more than this host holds: the one that an API server gives to its pods, if it is free, else the
    /// first free one.
    pub(super) async fn claim_block(
        &self,
        network: &Network,
        subnet: &Subnet,
    ) -> Result<Result<(), Refusal>, Failed> {
        if let Some(prefix) = self.block_of_node(network, subnet).await {
            let owner = self.state.borrow().view.me;
            let change = Change::ClaimExact { block: Block { network: network.id, prefix }, owner };
            if self.agree(&change).await?.is_ok() {
                self.event(
                    "block",
                    &network.name,
                    &format!("claimed the block {prefix} of this host's Node"),
                );
                return Ok(Ok(()));
            }
        }
        let (me, held) = {
            let state = self.state.borrow();
            (state.view.me, own_blocks(&state.view, network.id, subnet).len())
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

    /// Returns the block of a subnet that the API server gives to pods of this host. `None` if it gives none, or if it is
    /// taken. A host that is a Node waits for a moment to hear it.
    async fn block_of_node(&self, network: &Network, subnet: &Subnet) -> Option<IpNet> {
        if !subnet.routed {
            return None;
        }
        let mut said = self.state.borrow().kubernetes.pod_cidrs();
        if self.config.join_nodes {
            let heard = tokio::time::timeout(NODE_WITHIN, said.wait_for(Option::is_some)).await.is_ok();
            if !heard {
                // It is not waited for again.
                self.state.borrow_mut().kubernetes.set_pod_cidrs(Vec::new());
            }
        }
        let blocks = said.borrow().clone().unwrap_or_default();
        let state = self.state.borrow();
        blocks.into_iter().find(|block| {
            block.prefix_len() == subnet.block_length
                && subnet.prefix.contains(block)
                && state.view.holder_of(network.id, block.addr()).is_none()
        })
    }

    /// Leases any free address of a subnet from a live host. To be called when every block has a holder.
    async fn lease_any(&self, network: &Network, subnet: &Subnet) -> Result<Reserved<'_>, Failed> {
        let holders: BTreeSet<NodeId> = {
            let state = self.state.borrow();
            let alive = state.alive();
            holders(&state.view, network.id, subnet)
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
        let dead: Vec<String> = holders(&state.view, network.id, subnet)
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
            (
                state.view.me,
                state.view.holder_of(network.id, address),
                block_of(&state.view, network.id, address),
            )
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
        if foreign || state.addresses.in_use(&state.view, network)(address) {
            return Err(Failed::conflict(state.addresses.describe_use(&state.view, network, address)));
        }
        Ok(())
    }
}
