//! Cluster objects: writing them, taking in those of others, and what follows from them.

use ovl_core::networks::{self, Resolution};
use ovl_proto::alloc::Change;
use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Network, Object, ObjectKey, SignedObject};
use ovl_proto::record::Domain;
use ovl_proto::sync::Message;
use ovl_proto::wire;

use super::state::State;
use super::{Node, wall_ms};
use crate::crypto;

/// Networks, removed ones included: an index of all of them fits a frame many times.
pub(super) const MAX_OBJECTS: usize = 65_536;
/// A tombstone is kept this long, in milliseconds: a host that was away for longer may bring a
/// removed network back.
const TOMBSTONE_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// Objects in one message: far from the largest frame.
const OBJECTS_A_MESSAGE: usize = 1000;

impl Node {
    /// Writes a network, or its tombstone, and tells all peers.
    pub(super) fn write_network(&self, network: Network, deleted: bool) -> Result<(), wire::WireError> {
        let signed = {
            let mut state = self.state.borrow_mut();
            let me = state.view.me;
            let stamp = state.clock.tick(wall_ms(), me);
            let object = Object { stamp, deleted, body: Body::Network(network) };
            let body = wire::encode_body(&object)?;
            let signed = SignedObject {
                signature: self.identity.sign(Domain::Object, &body),
                writer_key: *self.identity.public_key(),
                body,
            };
            state.objects.insert(object.key(), (signed.clone(), object));
            self.objects_changed(&mut state);
            signed
        };
        self.links().broadcast(&Message::Objects(vec![signed]));
        self.recompute_networks();
        Ok(())
    }

    /// Takes in objects from a peer; keeps those that are later than ours.
    pub(super) fn take_objects(&self, from: NodeId, objects: Vec<SignedObject>) {
        let mut changed = false;
        {
            let mut state = self.state.borrow_mut();
            state.objects_seen = true;
            for signed in objects {
                match open_object(&signed) {
                    // One that we have forgotten, and the sender has not yet.
                    Ok(object) if is_old_tombstone(&object) && !state.objects.contains_key(&object.key()) => {
                    }
                    Ok(object) => changed |= insert(&mut state, signed, object),
                    Err(error) => tracing::warn!(%from, error, "refused an object"),
                }
            }
            if changed {
                self.objects_changed(&mut state);
            }
        }
        if changed {
            self.recompute_networks();
        }
    }

    /// Compares a peer's objects with ours: sends what it lacks, and our own index if it asked.
    pub(super) fn compare_objects(&self, from: NodeId, theirs: &[(ObjectKey, Stamp)], reply: bool) {
        let theirs: std::collections::BTreeMap<&ObjectKey, Stamp> =
            theirs.iter().map(|(key, stamp)| (key, *stamp)).collect();
        let (newer, index) = {
            let state = self.state.borrow();
            let newer: Vec<SignedObject> = state
                .objects
                .iter()
                .filter(|(key, (_, object))| theirs.get(key).is_none_or(|stamp| *stamp < object.stamp))
                .map(|(_, (signed, _))| signed.clone())
                .collect();
            (newer, reply.then(|| object_index(&state)))
        };
        // An empty answer says that the peer has all that there is.
        if newer.is_empty() {
            self.links().send(from, &Message::Objects(Vec::new()));
        }
        for part in newer.chunks(OBJECTS_A_MESSAGE) {
            self.links().send(from, &Message::Objects(part.to_vec()));
        }
        if let Some(index) = index {
            self.links().send(from, &Message::ObjectIndex { index, reply: false });
        }
    }

    /// Asks a peer to compare its objects with ours, both ways.
    pub(super) fn ask_objects(&self, peer: NodeId) {
        let index = object_index(&self.state.borrow());
        self.links().send(peer, &Message::ObjectIndex { index, reply: true });
    }

    /// Forgets tombstones that everybody has had time to hear of.
    pub(super) fn drop_old_tombstones(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let before = state.objects.len();
        let (networks, blocks) = (&state.view.networks, &state.view.alloc.blocks);
        state.objects.retain(|ObjectKey::Network(id), (_, object)| {
            !is_old_tombstone(object)
                || networks.contains_key(id)
                || blocks.keys().any(|block| block.network == *id)
        });
        if state.objects.len() != before {
            self.objects_changed(state);
        }
    }

    /// Asks peers whose objects differ from ours, in case an answer was lost or refused.
    pub(super) fn ask_objects_again(&self) {
        let differ: Vec<NodeId> = {
            let state = self.state.borrow();
            let peers = state.peers.iter();
            peers
                .filter(|(_, peer)| peer.signs.gossip && peer.hints.objects != state.objects_digest)
                .map(|(id, _)| *id)
                .collect()
        };
        for peer in differ {
            self.ask_objects(peer);
        }
    }

    fn objects_changed(&self, state: &mut State) {
        state.objects_digest = digest(state);
        self.publish_hints(state);
        state.save.wanted = true;
        self.saver.notify_one();
    }

    /// Settles names and VNIs anew, and marks what changed for the kernel.
    pub(super) fn recompute_networks(&self) {
        let (rewrites, drops) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let mut used: std::collections::BTreeSet<NetworkId> =
                state.view.nodes.values().flat_map(|node| node.table.networks()).collect();
            used.extend(state.local.wanted.keys());
            let Resolution { networks, rewritten, overlaps } =
                networks::resolve(state.objects.values().map(|(_, object)| object), |id| used.contains(&id));
            for (id, network) in &networks {
                if state.view.networks.get(id) != Some(network) {
                    state.dirty.networks.insert(*id);
                    state.dirty.host = true;
                }
            }
            for id in state.view.networks.keys().filter(|id| !networks.contains_key(id)) {
                state.dirty.networks.insert(*id);
                state.dirty.host = true;
            }
            let changed = state.view.networks != networks;
            state.view.networks = networks;
            if changed {
                note_overlaps(state, &overlaps);
                self.work.notify_one();
            }
            let acts = state.is_coordinator();
            (
                rewritten.into_iter().filter(|_| acts).collect::<Vec<_>>(),
                if acts { unused_blocks(state) } else { Vec::new() },
            )
        };
        for network in rewrites {
            self.event(
                "network",
                &network.name,
                "renamed or renumbered: two networks made in a split had the same",
            );
            if let Err(error) = self.write_network(network, false) {
                tracing::error!(%error, "cannot write a network");
            }
        }
        for network in drops {
            self.request_change(Change::DropNetwork(network), None);
        }
        self.routed.notify_one();
    }
}

fn is_old_tombstone(object: &Object) -> bool {
    object.deleted && wall_ms().saturating_sub(object.stamp.wall_ms) > TOMBSTONE_MS
}

/// Networks that are gone and still have blocks.
fn unused_blocks(state: &State) -> Vec<NetworkId> {
    let mut gone: Vec<NetworkId> = state
        .view
        .alloc
        .blocks
        .keys()
        .map(|block| block.network)
        .filter(|network| {
            !state.view.networks.contains_key(network)
                && state.objects.get(&ObjectKey::Network(*network)).is_some_and(|(_, object)| object.deleted)
        })
        .collect();
    gone.dedup();
    gone
}

fn note_overlaps(state: &mut State, overlaps: &[(NetworkId, NetworkId)]) {
    state.problems.retain(|key, _| !key.starts_with("overlap "));
    for (later, earlier) in overlaps {
        let name = |id: &NetworkId| {
            state.view.networks.get(id).map_or_else(|| id.to_string(), |state| state.network.name.clone())
        };
        let sentence = format!(
            "networks {} and {} overlap; they were made on two sides of a split. Remove one of them",
            name(later),
            name(earlier)
        );
        state.problem(format!("overlap {later} {earlier}"), Some(sentence));
    }
}

fn object_index(state: &State) -> Vec<(ObjectKey, Stamp)> {
    state.objects.iter().map(|(key, (_, object))| (key.clone(), object.stamp)).collect()
}

/// Checks who wrote an object.
fn open_object(signed: &SignedObject) -> Result<Object, String> {
    let object = signed.object().map_err(|error| error.to_string())?;
    if crypto::node_id(&signed.writer_key) != object.stamp.node {
        return Err(format!("its key is not that of its writer {}", object.stamp.node));
    }
    if !crypto::verify(&signed.writer_key, Domain::Object, &signed.body, &signed.signature) {
        return Err(format!("not signed by its writer {}", object.stamp.node));
    }
    match &object.body {
        Body::Network(network) => check_network(network)?,
    }
    Ok(object)
}

/// What every host relies on when it builds a network.
fn check_network(network: &Network) -> Result<(), String> {
    if !crate::config::is_name(&network.name) {
        return Err("a network with a name that is none".to_owned());
    }
    if !(1..=networks::MAX_VNI).contains(&network.vni) {
        return Err(format!("network {} with the VNI {}", network.name, network.vni));
    }
    if network.subnets.is_empty() || network.subnets.len() > 16 {
        return Err(format!("network {} with {} subnets", network.name, network.subnets.len()));
    }
    for subnet in &network.subnets {
        ovl_core::ipam::validate_subnet(subnet.prefix)
            .map_err(|error| format!("{}: {error}", network.name))?;
        if !subnet.prefix.contains(&subnet.gateway)
            || subnet.block_length < subnet.prefix.prefix_len()
            || subnet.block_length > subnet.prefix.max_prefix_len()
        {
            return Err(format!(
                "network {} with the subnet {} at odds with itself",
                network.name, subnet.prefix
            ));
        }
    }
    Ok(())
}

/// Keeps the later of two writes; says whether that was the new one.
pub(super) fn insert(state: &mut State, signed: SignedObject, object: Object) -> bool {
    if let Err(error) = state.clock.observe(object.stamp, wall_ms()) {
        tracing::warn!(writer = %object.stamp.node, %error, "refused an object");
        return false;
    }
    let key = object.key();
    if state.objects.len() >= MAX_OBJECTS && !state.objects.contains_key(&key) {
        tracing::warn!(writer = %object.stamp.node, "refused an object: there are {MAX_OBJECTS} already");
        return false;
    }
    if state.objects.get(&key).is_some_and(|(_, ours)| ours.stamp >= object.stamp) {
        return false;
    }
    state.objects.insert(key, (signed, object));
    true
}

/// The digest of which objects there are, at which state.
pub(super) fn digest(state: &State) -> [u8; 32] {
    if state.objects.is_empty() {
        return [0; 32];
    }
    crypto::sha256(&wire::encode_body(&object_index(state)).unwrap_or_default())
}

impl Node {
    /// Objects of the state file.
    pub(super) fn load_objects(&self, objects: Vec<SignedObject>) {
        let mut guard = self.state.borrow_mut();
        for signed in objects {
            match open_object(&signed) {
                // Whatever the clock says now: it may not be set yet, and these were ours before.
                Ok(object) => {
                    guard.objects.insert(object.key(), (signed, object));
                }
                Err(error) => tracing::error!(error, "passed over an object of the state file"),
            }
        }
        let digest = digest(&guard);
        guard.objects_digest = digest;
    }
}
