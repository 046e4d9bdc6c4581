//! Networks that this host does not build, because they cover addresses that it needs.
//!
//! [`ovl_subsystems::networks::ranges`] decides; this file observes how the host is connected and reports the result.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use ovl_kernel::HostConnections;
use ovl_proto::id::NetworkId;
use ovl_proto::record::MAX_NOT_BUILT;
use ovl_subsystems::Change;
use ovl_subsystems::local::ranges::{Conflict, Needed};
use ovl_subsystems::networks::ranges::{NeededRanges, overlapped, refused};
use ovl_subsystems::services::allocation::Ranges;

use super::state::State;
use super::{Failed, Node};
use crate::problems::Code;

/// Interval of the checks of resolv.conf(5). Links, addresses and routes are notified by the kernel.
const RESOLV_CONF_INTERVAL: Duration = Duration::from_secs(2);

impl Node {
    /// Follows how this host is connected, forever.
    pub(super) async fn ranges_loop(self: Rc<Self>) {
        loop {
            tokio::select! {
                () = self.ranges.notified() => self.observe_connections().await,
                () = tokio::time::sleep(RESOLV_CONF_INTERVAL) => self.observe_resolvers(),
            }
        }
    }

    /// Reads the prefixes and default gateways of this host from the kernel.
    pub(super) async fn observe_connections(&self) {
        let HostConnections { connected, gateways } = match self.kernel.host_connections().await {
            Ok(found) => found,
            // The last ones stand. A full pass reports that the kernel cannot be read.
            Err(error) => return tracing::warn!(%error, "cannot read how this host is connected"),
        };
        let mut state = self.state.borrow_mut();
        if state.host_ranges.set_connections(connected, gateways) {
            self.ranges_changed(&mut state);
        }
    }

    /// Reads the resolvers of this host if resolv.conf(5) changed.
    pub(super) fn observe_resolvers(&self) {
        if !self.environment.owns_host() {
            return;
        }
        let Some(upstreams) = self.resolv_conf.borrow_mut().changed() else { return };
        let resolvers = upstreams.servers.iter().map(std::net::SocketAddr::ip);
        let resolvers = resolvers.filter(|ip| !ip.is_loopback()).collect();
        let mut state = self.state.borrow_mut();
        if state.host_ranges.set_resolvers(resolvers) {
            self.ranges_changed(&mut state);
        }
    }

    fn ranges_changed(&self, state: &mut State) {
        state.reconcile.mark_ranges();
        self.work.notify_one();
    }

    /// Returns what no network may cover on this host.
    pub(super) fn needed_ranges(&self, state: &State) -> NeededRanges {
        NeededRanges::new(&state.view, &state.host_ranges, &self.config.ranges.services)
    }

    /// Decides again which networks this host does not build, if that may have changed.
    pub(super) fn refuse_networks(&self) {
        if let Some(not_built) = self.refuse_again() {
            self.change_record(|record| record.not_built = not_built);
        }
    }

    /// As [`Self::refuse_networks`]. Returns the networks of endpoints of this host that it does not build, as many as its
    /// record may name. `None` if nothing can have changed.
    fn refuse_again(&self) -> Option<Vec<NetworkId>> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if !state.reconcile.take_ranges() {
            return None;
        }
        let changed = state.local.refused.replace(refused(&state.view, &self.needed_ranges(state)));
        let used: BTreeSet<NetworkId> = state.own_endpoints().map(|endpoint| endpoint.network).collect();
        let sentences = state.local.refused.iter().filter_map(|(id, conflict)| {
            let network = &state.view.networks.get(&id)?.network;
            let cut_off =
                if used.contains(&id) { " Until then, its endpoints on this host are cut off" } else { "" };
            Some((network.name.clone(), format!("{}.{cut_off}", sentence(&network.name, conflict))))
        });
        let sentences: Vec<(String, String)> = sentences.collect();
        state.problems.replace(Code::NetworkRange, sentences);
        let Ranges { load_balancers, external, .. } = &self.config.ranges;
        state.problems.replace(Code::PoolOverlap, overlapped(&state.view, load_balancers, external));
        for id in &changed {
            let Some(found) = state.view.networks.get(id) else { continue };
            let message = match state.local.refused.get(*id) {
                Some(conflict) => format!("is not built on this host: {conflict}"),
                None => "covers no address that this host needs any more".to_owned(),
            };
            self.event("network", &found.network.name, &message);
        }
        for id in &changed {
            state.changed(Change::Built(*id));
        }
        if !changed.is_empty() {
            state.changed(Change::ThisHost);
            self.work.notify_one();
        }
        let not_built = state.local.refused.iter().map(|(id, _)| id).filter(|id| used.contains(id));
        Some(not_built.take(MAX_NOT_BUILT).collect())
    }

    /// Checks that a network may be built on this host. A network that is unknown passes.
    ///
    /// # Errors
    ///
    /// The network covers addresses that this host needs.
    pub(super) fn check_built(&self, network: &str) -> Result<(), Failed> {
        self.refuse_networks();
        let state = self.state.borrow();
        let Some(found) = state.view.network(network) else { return Ok(()) };
        match state.local.refused.get(found.network.id) {
            Some(conflict) => Err(Failed::conflict(sentence(&found.network.name, conflict))),
            None => Ok(()),
        }
    }

    /// Checks that a subnet of a new or larger network covers nothing that this host needs.
    ///
    /// # Errors
    ///
    /// It does: the error says what.
    pub(super) fn check_needed(&self, state: &State, subnet: IpNet) -> Result<(), Failed> {
        match self.needed_ranges(state).covered_by(subnet) {
            Some(needed) => Err(Failed::conflict(format!("{subnet} {needed}: give another --subnet"))),
            None => Ok(()),
        }
    }
}

/// Says why a network is not built on this host, and what to do.
fn sentence(network: &str, conflict: &Conflict) -> String {
    let advice = match conflict.needed {
        Needed::Connected { .. } | Needed::Gateway(_) | Needed::Resolver(_) => {
            "Use the network on other hosts only, create it again with another subnet, or renumber what this host is \
             connected to"
        }
        Needed::Member { .. } | Needed::Tunnel(_) => "Create the network again with another subnet",
        Needed::Services(_) => {
            "Create the network again with another subnet, or change service_range on all hosts"
        }
        Needed::Network { .. } => "Remove one of the two networks",
    };
    format!("network {network} is not built on this host: {conflict}. {advice}")
}
