//! The networks that this host knows: those of the cluster, and its own bridge networks.
//!
//! [`Bridges`] owns the bridge networks of this host, which no other host knows of. What networks have in the kernel is
//! decided by [`ovl_subsystems::networks`], and conflicts between networks of the cluster by [`ovl_cluster::networks`].
//! Begin to read at [`Bridges::join`].

use std::collections::BTreeMap;

use ovl_cluster::networks;
use ovl_cluster::objects::Objects;
use ovl_cluster::view::{NetworkState, View};
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::table::is_same_name;

/// The bridge networks of this host.
#[derive(Debug, Default)]
pub(crate) struct Bridges(BTreeMap<NetworkId, Network>);

impl Bridges {
    /// Takes the bridge networks of the state file.
    pub(crate) fn new(all: impl IntoIterator<Item = Network>) -> Self {
        Self(all.into_iter().map(|network| (network.id, network)).collect())
    }

    /// Returns the bridge networks.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Network> {
        self.0.values()
    }

    /// Whether a network is a bridge network of this host.
    pub(crate) fn contains(&self, id: NetworkId) -> bool {
        self.0.contains_key(&id)
    }

    /// Adds a bridge network, or changes one.
    pub(crate) fn put(&mut self, network: Network) {
        self.0.insert(network.id, network);
    }

    /// Removes a bridge network. Returns whether it existed.
    pub(crate) fn remove(&mut self, id: NetworkId) -> bool {
        self.0.remove(&id).is_some()
    }

    /// Adds the bridge networks to the networks of the cluster. A network that the cluster got later may conflict with
    /// a bridge network, because no other host knows of that. Returns each conflict: a key and a sentence.
    pub(crate) fn join(&self, networks: &mut BTreeMap<NetworkId, NetworkState>) -> Vec<(String, String)> {
        let mut conflicts = Vec::new();
        for network in self.iter() {
            for NetworkState { network: other, .. } in networks.values() {
                let (name, ours) = (&other.name, &network.name);
                let clash = if is_same_name(name, ours) {
                    format!(
                        "is called like one: on this host {ours} means the bridge network, and {} the other",
                        other.id
                    )
                } else if networks::overlap(other, network) {
                    format!("overlaps {name}: endpoints of this host on the two cannot all be reached")
                } else {
                    continue;
                };
                let sentence = format!(
                    "bridge network {ours} is older on this host than a network of the cluster, and {clash}. Remove one of \
                     them"
                );
                conflicts.push((format!("{ours} {}", other.id), sentence));
            }
        }
        for network in self.iter() {
            networks.insert(network.id, NetworkState { network: network.clone(), removing: false });
        }
        conflicts
    }
}

/// Returns a key and a sentence for each two networks that overlap, the later one first.
pub(crate) fn overlap_sentences(view: &View, overlaps: &[(NetworkId, NetworkId)]) -> Vec<(String, String)> {
    let name = |id: &NetworkId| {
        view.networks.get(id).map_or_else(|| id.to_string(), |state| state.network.name.clone())
    };
    let sentence = |(later, earlier): &(NetworkId, NetworkId)| {
        let sentence = format!(
            "networks {} and {} overlap; they were made on two sides of a split. Remove one of them",
            name(later),
            name(earlier)
        );
        (format!("{} {}", name(later), name(earlier)), sentence)
    };
    overlaps.iter().map(sentence).collect()
}

/// Returns the networks that are deleted but still have blocks.
pub(crate) fn unused_blocks(view: &View, objects: &Objects) -> Vec<NetworkId> {
    let of_blocks = view.alloc.blocks.keys().map(|block| block.network);
    let mut gone: Vec<NetworkId> = of_blocks
        .filter(|network| {
            !view.networks.contains_key(network)
                && objects.network(*network).is_some_and(|stored| stored.deleted)
        })
        .collect();
    gone.dedup();
    gone
}

#[cfg(test)]
mod tests {
    use ovl_proto::object::Driver;

    use super::*;
    use crate::world::{NET, net, switched};

    const OWN: NetworkId = NetworkId([5; 5]);

    /// A bridge network with the subnet of the cluster's network.
    fn bridge(name: &str) -> Network {
        let blue = switched().networks[&NET].network.clone();
        Network { id: OWN, name: name.to_owned(), driver: Driver::Bridge, ..blue }
    }

    #[test]
    fn bridge_networks_join_those_of_the_cluster_and_conflicts_are_told() {
        let mut networks = switched().networks;
        let mut bridges = Bridges::new([bridge("own")]);
        assert!(bridges.contains(OWN) && !bridges.contains(NET));
        let conflicts = bridges.join(&mut networks);
        assert!(networks.contains_key(&OWN) && networks.contains_key(&NET));
        assert_eq!(conflicts.len(), 1);
        assert!(conflicts[0].1.contains("overlaps blue"), "{conflicts:?}");

        let mut apart = bridge("own");
        apart.subnets = vec![ovl_cluster::addresses::new_subnet(net("10.77.0.0/24")).unwrap()];
        bridges.put(apart);
        assert!(bridges.join(&mut switched().networks).is_empty());

        bridges.put(bridge("blue"));
        assert!(bridges.join(&mut switched().networks)[0].1.contains("is called like one"));
        assert!(bridges.remove(OWN) && !bridges.remove(OWN));
        assert!(bridges.join(&mut switched().networks).is_empty());
    }

    #[test]
    fn overlapping_networks_are_named() {
        let view = switched();
        let sentences = overlap_sentences(&view, &[(NET, OWN)]);
        assert_eq!(sentences[0].0, format!("blue {OWN}"), "{sentences:?}");
    }

    #[test]
    fn only_blocks_of_deleted_networks_are_unused() {
        let mut view = switched();
        let objects = Objects::default();
        assert!(unused_blocks(&view, &objects).is_empty());
        view.networks.clear();
        assert!(unused_blocks(&view, &objects).is_empty(), "a network that is not known yet");
    }
}
