//! Routed networks: claims the blocks of this host.

use std::rc::Rc;
use std::time::Duration;

use ovl_proto::object::{Mode, Network, Subnet};

use super::Node;
use super::state::State;
use crate::problems::Code;

/// Pause after a failed claim. A majority may be available again then.
const AGAIN: Duration = Duration::from_secs(1);

impl Node {
    /// Claims a block of each subnet of every routed network as soon as the network exists. Programs of this
    /// host then have an address there, and the first endpoint need not wait for a majority. Runs forever.
    pub(super) async fn claim_loop(self: Rc<Self>) {
        loop {
            let missing = missing(&self.state.borrow());
            let mut failed = false;
            for (network, subnet) in missing {
                let object = format!("{} {}", network.name, subnet.prefix);
                let why = match self.claim_block(&network, &subnet).await {
                    Ok(Ok(())) => None,
                    Ok(Err(refusal)) => Some(self.explain(&refusal).0.message),
                    Err(error) => Some(error.0.message),
                };
                failed |= why.is_some();
                let sentence = why.map(|why| {
                    format!("this host has no block of {} on network {}: {why}", subnet.prefix, network.name)
                });
                self.state.borrow_mut().problems.set(Code::NoBlock, object, sentence);
            }
            if failed {
                tokio::time::sleep(AGAIN).await;
                self.state.borrow_mut().problems.replace(Code::NoBlock, []);
            } else {
                self.routed.notified().await;
            }
        }
    }
}

/// Returns the subnets of routed networks of which this host has no block.
fn missing(state: &State) -> Vec<(Network, Subnet)> {
    if !state.is_member() {
        return Vec::new();
    }
    let networks = state.view.networks.values().filter(|found| !found.removing).map(|found| &found.network);
    networks
        .filter(|network| network.mode == Mode::L3)
        .flat_map(|network| network.subnets.iter().map(move |subnet| (network.clone(), *subnet)))
        .filter(|(network, subnet)| {
            !state.view.blocks_of(network.id, state.view.me).any(|block| subnet.prefix.contains(&block))
        })
        .collect()
}
