//! Cluster objects: writing them, merging those of other hosts, and applying what they change.

use std::collections::BTreeMap;

use ovl_cluster::backends::Settled;
use ovl_cluster::networks::{self, Resolution};
use ovl_cluster::objects::{Full, MAX_OBJECT_BYTES};
use ovl_cluster::view::NetworkState;
use ovl_manifest::object as manifest;
use ovl_mesh::keys;
use ovl_proto::alloc::Change;
use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Driver, Network, Object, ObjectKey, SignedObject};
use ovl_proto::record::Domain;
use ovl_proto::resource::{Name, Resource, ResourceKey};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use ovl_subsystems::services::allocation::{ReservedClaims, ServiceAllocator};

use super::state::State;
use super::{Failed, Node};
use crate::problems::Code;
use ovl_subsystems::Change as What;

/// Time in milliseconds for which a tombstone is kept. A host that was away for longer may restore a deleted
/// object.
const TOMBSTONE_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// Maximum number of objects in one message. The receiver checks a signature for each, and its loop is
/// blocked meanwhile.
const OBJECTS_A_MESSAGE: usize = 250;
/// Size of the objects in one message, in bytes, beyond which no further one is added. Even with the largest
/// object as the last one, a message is far below the maximum frame.
const BYTES_A_MESSAGE: usize = 1 << 20;
/// Time in milliseconds without new objects after which a peer is asked for missing ones. While objects
/// arrive, the missing ones are probably in flight.
const QUIET_MS: u64 = 300;

impl Node {
    /// Writes a network or its tombstone and sends it to all peers.
    pub(super) fn write_network(&self, network: Network, deleted: bool) -> Result<(), Failed> {
        self.write_objects(vec![(Body::Network(network), deleted)])
    }

    /// Writes objects and sends them to all peers. `true` next to an object writes its tombstone. If there is
    /// not enough room, none is written.
    pub(super) fn write_objects(&self, writes: Vec<(Body, bool)>) -> Result<(), Failed> {
        let signed = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let me = state.view.me;
            let mut written = Vec::with_capacity(writes.len());
            for (body, deleted) in writes {
                let object =
                    Object { stamp: state.clock.tick(state.environment.wall_ms(), me), deleted, body };
                let body = wire::encode_body(&object).map_err(|error| Failed::internal(error.to_string()))?;
                let signed = SignedObject {
                    signature: self.identity.sign(Domain::Object, &body),
                    writer_key: *self.identity.public_key(),
                    body,
                };
                written.push((signed, object));
            }
            let room = state.objects.has_room(written.iter().map(|(signed, object)| (object.key(), signed)));
            room.map_err(|full| Failed::exhausted(full.to_string()))?;
            let mut all = Vec::with_capacity(written.len());
            let mut changes = Changes::default();
            for (signed, object) in written {
                all.push(signed.clone());
                changes.put(state, signed, object).map_err(|full| Failed::exhausted(full.to_string()))?;
            }
            self.objects_changed(state, changes);
            all
        };
        for part in messages(&signed) {
            self.links().broadcast(&Message::Objects(part.to_vec()));
        }
        self.settle_objects();
        Ok(())
    }

    /// Merges objects from a peer. An object is kept if it is later than the local one.
    pub(super) fn take_objects(&self, from: NodeId, objects: Vec<SignedObject>) {
        let mut changes = Changes::default();
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            state.objects_seen = true;
            for signed in objects {
                if let Err(error) = take_object(state, signed, &mut changes) {
                    tracing::warn!(%from, error, "refused an object");
                }
            }
            if changes.any {
                state.objects_taken_at = state.now();
                self.objects_changed(state, changes);
            } else {
                return;
            }
        }
        self.settle_objects();
    }

    /// Compares a peer's objects with the local ones. Sends what the peer lacks, and the local index if it
    /// asked for that.
    pub(super) fn compare_objects(&self, from: NodeId, theirs: &[(ObjectKey, Stamp)], reply: bool) {
        let theirs: std::collections::BTreeMap<&ObjectKey, Stamp> =
            theirs.iter().map(|(key, stamp)| (key, *stamp)).collect();
        let (newer, index) = {
            let state = self.state.borrow();
            let newer: Vec<SignedObject> = state
                .objects
                .iter()
                .filter(|(key, ours)| theirs.get(key).is_none_or(|stamp| *stamp < ours.stamp))
                .map(|(_, ours)| ours.signed.clone())
                .collect();
            (newer, reply.then(|| state.objects.index()))
        };
        // An empty reply tells the peer that it has everything.
        if newer.is_empty() {
            self.links().send(from, &Message::Objects(Vec::new()));
        }
        for part in messages(&newer) {
            self.links().send(from, &Message::Objects(part.to_vec()));
        }
        if let Some(index) = index {
            self.links().send(from, &Message::ObjectIndex { index, reply: false });
        }
    }

    /// Asks a peer to compare its objects with the local ones, in both directions.
    pub(super) fn ask_objects(&self, peer: NodeId) {
        let index = self.state.borrow().objects.index();
        self.links().send(peer, &Message::ObjectIndex { index, reply: true });
    }

    /// Deletes tombstones that all hosts have had time to receive.
    pub(super) fn drop_old_tombstones(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let before = state.objects.len();
        let wall_ms = state.wall_ms();
        let (networks, blocks) = (&state.view.networks, &state.view.alloc.blocks);
        state.objects.retain(|key, object| {
            !is_old_tombstone(object.deleted, object.stamp, wall_ms)
                || match key {
                    ObjectKey::Network(id) => {
                        networks.contains_key(id) || blocks.keys().any(|block| block.network == *id)
                    }
                    ObjectKey::Resource(_) => false,
                }
        });
        if state.objects.len() != before {
            self.objects_changed(state, Changes::default());
        }
    }

    /// Asks peers whose objects differ from the local ones. Each is asked once for a digest that it
    /// announces, or again if `anew` is set, because a reply may have been lost or rejected.
    pub(super) fn ask_missing_objects(&self, anew: bool) {
        let differ: Vec<NodeId> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            if state.now().saturating_sub(state.objects_taken_at) < QUIET_MS && state.objects_seen {
                return;
            }
            let ours = state.objects_digest;
            let mut differ = Vec::new();
            for (id, peer) in state.peers.iter_mut().filter(|(_, peer)| peer.signs.gossip) {
                let says = peer.hints.objects;
                let asked = peer.objects_asked.replace(says) == Some(says);
                if says != ours && (anew || !asked) {
                    differ.push(*id);
                }
            }
            differ
        };
        for peer in differ {
            self.ask_objects(peer);
        }
    }

    fn objects_changed(&self, state: &mut State, changes: Changes) {
        state.objects_digest = state.objects.digest();
        self.publish_hints(state);
        state.save.wanted = true;
        self.saver.notify_one();
        self.resources_changed(state, &changes.resources);
    }

    /// Signals that Kubernetes objects were added, changed or deleted. The reconcile loop applies the
    /// effects.
    fn resources_changed(&self, state: &mut State, keys: &[ResourceKey]) {
        state.changed(What::Resources(keys));
        self.work.notify_one();
    }

    /// Updates the backends of Services after changes of endpoints, hosts and objects. Later plans use the
    /// result.
    pub(super) fn settle_backends(&self, state: &mut State) {
        let settled = state.workloads.settle(&state.view);
        if settled != Settled::default() {
            state.changed(What::Backends(&settled));
            tracing::debug!(
                services = settled.services.len(),
                selectables = settled.selectables.len(),
                "backends"
            );
        }
    }

    /// Resolves conflicts between objects that were created in a network partition.
    fn settle_objects(&self) {
        self.recompute_networks();
        self.mend_services();
    }

    /// Assigns addresses and ports to Services that lack them: those that lost theirs to an older Service,
    /// and LoadBalancers once there is a pool. Only the coordinator does this; every host would choose the
    /// same values.
    pub(super) fn mend_services(&self) {
        let writes: Vec<(Body, bool)> = {
            let state = self.state.borrow();
            if !state.is_coordinator() {
                return;
            }
            let resources = &state.view.resources;
            let lacking: std::collections::BTreeSet<&Name> = resources.claims().lacking().collect();
            let mut promised = ReservedClaims::default();
            let mut allocator = ServiceAllocator::new(resources, &self.config.ranges, &mut promised);
            let mended = lacking.into_iter().filter_map(|name| {
                let before = resources.services().get(name)?;
                let mut service = before.clone();
                allocator.allocate(&mut service).ok()?;
                (service != *before).then(|| (Body::Resource(Resource::Service(Box::new(service))), false))
            });
            mended.collect()
        };
        for (body, _) in &writes {
            if let Body::Resource(resource) = body {
                self.event("service", &resource.name().to_string(), "given addresses or ports of its own");
            }
        }
        if !writes.is_empty()
            && let Err(Failed(failure)) = self.write_objects(writes)
        {
            tracing::error!(error = failure.message, "cannot write a Service");
        }
    }

    /// Stores a bridge network of this host.
    pub(super) fn put_bridge(&self, network: Network) {
        self.state.borrow_mut().bridges.insert(network.id, network);
        self.save_soon();
        self.recompute_networks();
    }

    /// Deletes a bridge network. Returns whether it existed.
    pub(super) fn drop_bridge(&self, id: NetworkId) -> bool {
        let was = self.state.borrow_mut().bridges.remove(&id).is_some();
        if was {
            self.save_soon();
            self.recompute_networks();
        }
        was
    }

    /// Resolves conflicts of names and VNIs again, and marks networks that changed for the reconcile loop.
    pub(super) fn recompute_networks(&self) {
        let (rewrites, drops) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let mut used: std::collections::BTreeSet<NetworkId> =
                state.view.nodes.values().flat_map(|node| node.table.networks()).collect();
            used.extend(state.local.attaches.networks());
            let Resolution { networks, rewritten, overlaps } =
                networks::resolve(state.objects.networks(), |id| used.contains(&id));
            let networks = with_bridges(state, networks);
            let before = std::mem::replace(&mut state.view.networks, networks);
            let after = &state.view.networks;
            let changed: std::collections::BTreeSet<NetworkId> = before
                .keys()
                .chain(after.keys())
                .filter(|id| before.get(id) != after.get(id))
                .copied()
                .collect();
            for network in &changed {
                state.changed(What::Network(*network));
            }
            if !changed.is_empty() {
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
            if let Err(Failed(failure)) = self.write_network(network, false) {
                tracing::error!(error = failure.message, "cannot write a network");
            }
        }
        for network in drops {
            self.request_change(Change::DropNetwork(network), None);
        }
        self.routed.notify_one();
    }
}

/// Adds the bridge networks of this host to the networks of the cluster. A network that the cluster got later
/// may conflict with a bridge network, because no other host knows of that. Each conflict is reported as a
/// problem.
fn with_bridges(
    state: &mut State,
    mut networks: BTreeMap<NetworkId, NetworkState>,
) -> BTreeMap<NetworkId, NetworkState> {
    let mut conflicts = Vec::new();
    let bridges: Vec<Network> = state.bridges.values().cloned().collect();
    for network in &bridges {
        for NetworkState { network: other, .. } in networks.values() {
            let (name, ours) = (&other.name, &network.name);
            let clash = if name == ours {
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
    state.problems.replace(Code::BridgeConflict, conflicts);
    for network in bridges {
        networks.insert(network.id, NetworkState { network, removing: false });
    }
    networks
}

/// Effects of a batch of writes.
#[derive(Default)]
struct Changes {
    any: bool,
    resources: Vec<ResourceKey>,
}

impl Changes {
    /// Stores a write if it is later than the stored one.
    fn put(&mut self, state: &mut State, signed: SignedObject, object: Object) -> Result<(), Full> {
        if let Some(changed) = state.objects.put(signed, object, &mut state.view.resources)? {
            self.any = true;
            self.resources.extend(changed);
        }
        Ok(())
    }
}

/// Splits objects into parts that fit one message each.
fn messages(objects: &[SignedObject]) -> impl Iterator<Item = &[SignedObject]> {
    let mut rest = objects;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fit = rest.iter().take(OBJECTS_A_MESSAGE).take_while(|signed| {
            let before = bytes;
            bytes += signed.body.len();
            before < BYTES_A_MESSAGE
        });
        let (part, behind) = rest.split_at_checked(fit.count())?;
        rest = behind;
        (!part.is_empty()).then_some(part)
    })
}

/// Merges a write of another host.
fn take_object(state: &mut State, signed: SignedObject, changes: &mut Changes) -> Result<(), String> {
    let object = signed.object().map_err(|error| error.to_string())?;
    let ours = state.objects.get(&object.key());
    // A known object, or an old tombstone that this host has deleted and the sender has not, is skipped
    // without a signature check.
    if ours.is_some_and(|ours| ours.stamp >= object.stamp)
        || (ours.is_none() && is_old_tombstone(object.deleted, object.stamp, state.wall_ms()))
    {
        return Ok(());
    }
    check_object(&signed, &object)?;
    state.clock.observe(object.stamp, state.environment.wall_ms()).map_err(|error| error.to_string())?;
    changes.put(state, signed, object).map_err(|full| full.to_string())
}

fn is_old_tombstone(deleted: bool, stamp: Stamp, wall_ms: u64) -> bool {
    deleted && wall_ms.saturating_sub(stamp.wall_ms) > TOMBSTONE_MS
}

/// Returns the networks that are deleted but still have blocks.
fn unused_blocks(state: &State) -> Vec<NetworkId> {
    let mut gone: Vec<NetworkId> = state
        .view
        .alloc
        .blocks
        .keys()
        .map(|block| block.network)
        .filter(|network| {
            !state.view.networks.contains_key(network)
                && state.objects.network(*network).is_some_and(|stored| stored.deleted)
        })
        .collect();
    gone.dedup();
    gone
}

fn note_overlaps(state: &mut State, overlaps: &[(NetworkId, NetworkId)]) {
    let sentences: Vec<_> = overlaps
        .iter()
        .map(|(later, earlier)| {
            let name = |id: &NetworkId| {
                state.view.networks.get(id).map_or_else(|| id.to_string(), |state| state.network.name.clone())
            };
            let sentence = format!(
                "networks {} and {} overlap; they were made on two sides of a split. Remove one of them",
                name(later),
                name(earlier)
            );
            (format!("{} {}", name(later), name(earlier)), sentence)
        })
        .collect();
    state.problems.replace(Code::NetworkOverlap, sentences);
}

/// Checks the signature and the content of an object.
fn check_object(signed: &SignedObject, object: &Object) -> Result<(), String> {
    if signed.body.len() > MAX_OBJECT_BYTES {
        return Err(Full::Object(signed.body.len()).to_string());
    }
    if keys::node_id(&signed.writer_key) != object.stamp.node {
        return Err(format!("its key is not that of its writer {}", object.stamp.node));
    }
    if !keys::verify(&signed.writer_key, Domain::Object, &signed.body, &signed.signature) {
        return Err(format!("not signed by its writer {}", object.stamp.node));
    }
    match &object.body {
        Body::Network(network) => check_network(network),
        Body::Resource(resource) => check_resource(resource, object.deleted),
    }
}

/// Checks a Kubernetes object. If it is deleted, only its name matters.
fn check_resource(resource: &Resource, deleted: bool) -> Result<(), String> {
    if deleted {
        return Ok(());
    }
    manifest::check(resource).map_err(|problems| {
        let first = problems.first().map(|it| format!("{} {}", it.field, it.reason)).unwrap_or_default();
        format!("{}: {first}", resource.key())
    })
}

/// Checks the properties of a network that every host relies on.
fn check_network(network: &Network) -> Result<(), String> {
    if !crate::config::is_name(&network.name) {
        return Err("a network with a name that is none".to_owned());
    }
    if network.driver != Driver::Overlay {
        return Err(format!("network {}, which can only be its host's own", network.name));
    }
    if !(1..=networks::MAX_VNI).contains(&network.vni) {
        return Err(format!("network {} with the VNI {}", network.name, network.vni));
    }
    if network.subnets.is_empty() || network.subnets.len() > 16 {
        return Err(format!("network {} with {} subnets", network.name, network.subnets.len()));
    }
    for subnet in &network.subnets {
        ovl_cluster::addresses::validate_subnet(subnet.prefix)
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

impl Node {
    /// Loads the objects of the state file.
    pub(super) fn load_objects(&self, objects: Vec<SignedObject>) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let mut changes = Changes::default();
        for signed in objects {
            // The stamps are not compared with the clock: it may not be set yet, and this host has accepted
            // these objects before.
            let loaded = signed.object().map_err(|error| error.to_string()).and_then(|object| {
                check_object(&signed, &object)?;
                changes.put(state, signed, object).map_err(|full| full.to_string())
            });
            if let Err(error) = loaded {
                tracing::error!(error, "passed over an object of the state file");
            }
        }
        state.objects_digest = state.objects.digest();
        self.resources_changed(state, &changes.resources);
    }
}
