//! What Docker Engines have here: their networks, and what they requested and have not used yet.
//!
//! [`Engines`] owns that. What a call of an Engine means is decided by [`ovl_runtimes::docker`]. Begin to read at
//! [`Engines::choose`]. All times are in milliseconds of this run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::table::Entry;
use ovl_runtimes::docker::{EngineNetwork, Pool};

use crate::addresses::NetworkAddress;

/// Time after which an unused reservation is released or an unused network is removed, in milliseconds. An Engine
/// uses what it requested at once, so one that has not used it by then has given it up.
const UNUSED_MS: u64 = 60_000;
/// Time after which an endpoint is deleted whose container interface is in the host's namespace, in milliseconds: the
/// Engine has not moved it, or has moved it back without a call. Starting a container takes a second.
const UNFETCHED_MS: u64 = 120_000;

/// The state of the networks and endpoints of Docker Engines.
#[derive(Debug, Default)]
pub(crate) struct Engines {
    /// The networks, by the id that the Engine uses.
    networks: BTreeMap<String, EngineNetwork>,
    /// Addresses that are reserved for endpoints yet to be created, with the time of the reservation.
    reserved: BTreeMap<NetworkAddress, u64>,
    /// Pools that were chosen for networks yet to be created, with the time of the choice.
    chosen: Vec<(Pool, u64)>,
    /// Endpoints whose container interface is in the host's namespace, with the time when it was first seen there.
    unfetched: BTreeMap<EndpointId, u64>,
    /// Networks that were created for Engines and are unused, with the time when this was first seen.
    unused: BTreeMap<NetworkId, u64>,
}

impl Engines {
    /// Takes the networks of the state file.
    pub(crate) fn new(networks: &[(String, EngineNetwork)]) -> Self {
        Self { networks: networks.iter().cloned().collect(), ..Self::default() }
    }

    /// Returns the networks for the state file.
    pub(crate) fn kept(&self) -> Vec<(String, EngineNetwork)> {
        self.networks.iter().map(|(id, kept)| (id.clone(), kept.clone())).collect()
    }

    /// Returns the entries of the owner table that keep these networks from removal.
    pub(crate) fn held(&self) -> Vec<Entry> {
        let all: BTreeSet<NetworkId> = self.networks.values().map(|kept| kept.network).collect();
        all.into_iter().map(Entry::Held).collect()
    }

    /// Returns the networks.
    pub(crate) fn networks(&self) -> impl Iterator<Item = &EngineNetwork> {
        self.networks.values()
    }

    /// Returns the network of the cluster that an Engine's network stands for. `None` if the Engine has none with this
    /// id.
    pub(crate) fn network(&self, id: &str) -> Option<NetworkId> {
        self.networks.get(id).map(|kept| kept.network)
    }

    /// Records that an Engine's network stands for a network of the cluster.
    pub(crate) fn join(&mut self, id: &str, kept: EngineNetwork) {
        self.networks.insert(id.to_owned(), kept);
    }

    /// Forgets an Engine's network. Returns the network of the cluster, and whether no Engine of this host has it any
    /// more. `None` if there was none.
    pub(crate) fn leave(&mut self, id: &str) -> Option<(NetworkId, bool)> {
        let network = self.networks.remove(id)?.network;
        Some((network, self.networks.values().all(|kept| kept.network != network)))
    }

    /// Records a pool that was chosen for a network yet to be created.
    pub(crate) fn choose(&mut self, pool: Pool, now: u64) {
        self.chosen.push((pool, now));
    }

    /// Returns the pools that were chosen for networks yet to be created.
    pub(crate) fn chosen(&self) -> impl Iterator<Item = Pool> {
        self.chosen.iter().map(|(pool, _)| *pool)
    }

    /// Returns the chosen pools with these prefixes.
    pub(crate) fn chosen_of(&self, prefixes: &[IpNet]) -> Vec<Pool> {
        let pool = |prefix: &IpNet| self.chosen().find(|pool| pool.prefix == *prefix);
        prefixes.iter().filter_map(pool).collect()
    }

    /// Forgets pools that a network has now.
    pub(crate) fn use_pools(&mut self, pools: &[Pool]) {
        self.chosen.retain(|(pool, _)| !pools.contains(pool));
    }

    /// Records an address that is reserved for an endpoint yet to be created.
    pub(crate) fn reserve(&mut self, network: NetworkId, address: IpAddr, now: u64) {
        self.reserved.insert((network, address), now);
    }

    /// Forgets a reservation. Returns whether it existed.
    pub(crate) fn take_reserved(&mut self, network: NetworkId, address: IpAddr) -> bool {
        self.reserved.remove(&(network, address)).is_some()
    }

    /// Forgets pools and reservations that no Engine used in time. Returns the reserved addresses.
    pub(crate) fn take_stale(&mut self, now: u64) -> Vec<NetworkAddress> {
        self.chosen.retain(|(_, since)| now < since.saturating_add(UNUSED_MS));
        let mut stale = Vec::new();
        self.reserved.retain(|at, since| {
            let keep = now < since.saturating_add(UNUSED_MS);
            stale.extend((!keep).then_some(*at));
            keep
        });
        stale
    }

    /// Takes the endpoints whose container interface is in the host's namespace. Returns those of which it has been there
    /// for too long.
    pub(crate) fn unfetched(&mut self, here: impl Iterator<Item = EndpointId>, now: u64) -> Vec<EndpointId> {
        since_long(&mut self.unfetched, here, now, UNFETCHED_MS)
    }

    /// Takes the networks that were created for Engines and are unused. Returns those that have been so for too long.
    pub(crate) fn unused(&mut self, unused: impl Iterator<Item = NetworkId>, now: u64) -> Vec<NetworkId> {
        since_long(&mut self.unused, unused, now, UNUSED_MS)
    }
}

/// Replaces what was seen by what is seen now, with the time when it was first seen. Returns what has been seen for
/// `long`.
fn since_long<K: Ord + Copy>(
    seen: &mut BTreeMap<K, u64>,
    now_seen: impl Iterator<Item = K>,
    now: u64,
    long: u64,
) -> Vec<K> {
    let before = std::mem::take(seen);
    *seen = now_seen.map(|key| (key, before.get(&key).copied().unwrap_or(now))).collect();
    let old = seen.iter().filter(|(_, since)| now >= since.saturating_add(long));
    old.map(|(key, _)| *key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: NetworkId = NetworkId([1; 5]);

    fn pool(prefix: &str, number: u32) -> Pool {
        Pool { prefix: prefix.parse().unwrap(), chosen: Some(number) }
    }

    #[test]
    fn network_is_held_until_the_last_of_an_engine_leaves() {
        let kept = EngineNetwork { network: NET, pools: Vec::new() };
        let mut engines = Engines::new(&[("a".to_owned(), kept.clone())]);
        engines.join("b", kept);
        assert_eq!(engines.held(), [Entry::Held(NET)]);
        assert_eq!((engines.network("a"), engines.network("c")), (Some(NET), None));
        assert_eq!(engines.leave("a"), Some((NET, false)));
        assert_eq!(engines.leave("a"), None);
        assert_eq!(engines.kept().len(), 1);
        assert_eq!(engines.leave("b"), Some((NET, true)));
        assert!(engines.held().is_empty() && engines.networks().next().is_none());
    }

    #[test]
    fn pools_and_reservations_that_are_not_used_are_given_back() {
        let mut engines = Engines::default();
        let (one, two) = (pool("10.1.0.0/24", 1), pool("10.2.0.0/24", 2));
        engines.choose(one, 0);
        engines.choose(two, 5);
        assert_eq!(engines.chosen_of(&[two.prefix]), [two]);
        engines.use_pools(&[two]);
        assert_eq!(engines.chosen().collect::<Vec<_>>(), [one]);
        let address: IpAddr = "10.1.0.9".parse().unwrap();
        engines.reserve(NET, address, 10);
        assert!(engines.take_stale(UNUSED_MS - 1).is_empty() && engines.chosen().count() == 1);
        assert!(engines.take_stale(UNUSED_MS).is_empty() && engines.chosen().count() == 0);
        assert_eq!(engines.take_stale(UNUSED_MS + 10), [(NET, address)]);
        assert!(!engines.take_reserved(NET, address));
        engines.reserve(NET, address, 10);
        assert!(engines.take_reserved(NET, address));
    }

    #[test]
    fn only_what_is_seen_without_a_break_is_old() {
        let mut engines = Engines::default();
        let id = EndpointId([1; 5]);
        let here = || std::iter::once(id);
        assert!(engines.unfetched(here(), 100).is_empty());
        assert_eq!(engines.unfetched(here(), 100 + UNFETCHED_MS), [id]);
        assert!(engines.unfetched(std::iter::empty(), 100 + UNFETCHED_MS).is_empty());
        assert!(engines.unfetched(here(), 101 + UNFETCHED_MS).is_empty());
        assert!(engines.unused(std::iter::once(NET), 0).is_empty());
        assert_eq!(engines.unused(std::iter::once(NET), UNUSED_MS), [NET]);
    }
}
