//! Cluster objects: exchanges them with peers and applies what they change. [`crate::objects`] stores them.

use ovl_cluster::backends::Settled;
use ovl_cluster::networks::{Resolution, resolve};
use ovl_proto::alloc::Change;
use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Network, Object, ObjectKey, SignedObject};
use ovl_proto::record::Domain;
use ovl_proto::resource::{Name, Resource, ResourceKey};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use ovl_subsystems::Change as What;
use ovl_subsystems::services::allocation::{ReservedClaims, ServiceAllocator};

use super::state::State;
use super::{Failed, Node};
use crate::networks::{overlap_sentences, unused_blocks};
use crate::objects::messages;
use crate::problems::Code;

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
            let wall_ms = state.wall_ms();
            let (mut written, mut all) = (Vec::with_capacity(writes.len()), Vec::new());
            for (body, deleted) in writes {
                // What a later release says would be lost.
                if let Some((key, why)) = state.objects.not_understood(&body.key()) {
                    return Err(Failed::conflict(format!(
                        "{key} was written by a later release of ovld, and this host does not know {why}: change it \
                         on a host that runs that release, or upgrade ovld on this host"
                    )));
                }
                let object = Object { stamp: state.objects.stamp(wall_ms, me), deleted, body };
                let body = wire::encode_body(&object).map_err(|error| Failed::internal(error.to_string()))?;
                let signed = SignedObject {
                    signature: self.identity.sign(Domain::Object, &body),
                    writer_key: *self.identity.public_key(),
                    body,
                };
                all.push(signed.clone());
                written.push((signed, object));
            }
            let changed = state.objects.write(written, &mut state.view.resources);
            let changed = changed.map_err(|full| Failed::exhausted(full.to_string()))?;
            self.objects_changed(state, &changed);
            all
        };
        for part in messages(&signed) {
            self.links().broadcast(&Message::Objects(part.to_vec()));
        }
        self.settle_objects();
        Ok(())
    }

    /// Merges objects from a peer. An object is kept if it is later than the local one. No objects are the end of an
    /// answer.
    pub(super) fn take_objects(&self, from: NodeId, objects: Vec<SignedObject>) {
        let is_end = objects.is_empty();
        let (is_new, want) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let (now, wall_ms) = (state.now(), state.wall_ms());
            let refused = |error: String| tracing::warn!(%from, error, "refused an object");
            let changed = state.objects.receive(objects, wall_ms, &mut state.view.resources, refused);
            if let Some(changed) = &changed {
                self.objects_changed(state, changed);
            }
            let State { objects, exchanges, .. } = state;
            let lacks = |key: &ObjectKey, stamp| objects.all().lacks(key, stamp);
            (changed.is_some(), exchanges.on_objects(from, is_end, lacks, now))
        };
        if is_new {
            self.settle_objects();
        }
        self.want_objects(from, want);
    }

    /// Answers [`Message::ObjectParts`].
    pub(super) fn send_index(&self, to: NodeId, parts: &[u64]) {
        let index = self.state.borrow().objects.all().index(parts);
        self.links().send(to, &Message::ObjectIndex(index));
    }

    /// Requests what a peer's index has and this host lacks.
    pub(super) fn take_index(&self, from: NodeId, index: Vec<(ObjectKey, Stamp)>) {
        let want = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            let lacks = |key: &ObjectKey, stamp| state.objects.all().lacks(key, stamp);
            let Some(want) = state.exchanges.on_index(from, index, lacks, now) else { return };
            if want.is_empty() {
                state.objects.note_seen();
            }
            want
        };
        self.want_objects(from, want);
    }

    fn want_objects(&self, from: NodeId, want: Vec<ObjectKey>) {
        if !want.is_empty() {
            self.links().send(from, &Message::ObjectWant(want));
        }
    }

    /// Answers [`Message::ObjectWant`].
    pub(super) fn send_objects(&self, to: NodeId, keys: Vec<ObjectKey>) {
        let found = self.state.borrow().objects.signed_of(keys);
        for part in messages(&found) {
            self.links().send(to, &Message::Objects(part.to_vec()));
        }
        self.links().send(to, &Message::Objects(Vec::new()));
    }

    /// Asks a peer whose objects differ from the local ones, if it is time to.
    pub(super) fn ask_missing_objects(&self) {
        let (peer, parts) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let (now, own) = (state.now(), state.objects.digest());
            let State { peers, exchanges, .. } = state;
            let is_alive = |id: &NodeId| peers.get(id).is_some_and(|peer| peer.signs.gossip);
            let Some(peer) = exchanges.begin(now, own, is_alive) else { return };
            (peer, state.objects.all().parts())
        };
        self.links().send(peer, &Message::ObjectParts(parts));
    }

    /// Deletes tombstones that all hosts have had time to receive.
    pub(super) fn drop_old_tombstones(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let wall_ms = state.wall_ms();
        let (networks, blocks) = (&state.view.networks, &state.view.alloc.blocks);
        let in_use =
            |id: &NetworkId| networks.contains_key(id) || blocks.keys().any(|block| block.network == *id);
        if state.objects.drop_old_tombstones(wall_ms, in_use) {
            self.objects_changed(state, &[]);
        }
    }

    fn objects_changed(&self, state: &mut State, changed: &[ResourceKey]) {
        self.publish_hints(state);
        state.save.wanted = true;
        self.saver.notify_one();
        super::newer::note_newer(state);
        self.resources_changed(state, changed);
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
            let mut lacking: Vec<&Name> = lacking.into_iter().collect();
            // The one that has waited longest comes first.
            lacking.sort_by_key(|name| {
                resources.services().get(*name).map(|service| service.metadata.creation_timestamp)
            });
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
        self.state.borrow_mut().bridges.put(network);
        self.save_soon();
        self.recompute_networks();
    }

    /// Deletes a bridge network. Returns whether it existed.
    pub(super) fn drop_bridge(&self, id: NetworkId) -> bool {
        let was = self.state.borrow_mut().bridges.remove(id);
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
            let Resolution { mut networks, rewritten, overlaps } =
                resolve(state.objects.all().networks(), |id| used.contains(&id));
            state.problems.replace(Code::BridgeConflict, state.bridges.join(&mut networks));
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
                let sentences = overlap_sentences(&state.view, &overlaps);
                state.problems.replace(Code::NetworkOverlap, sentences);
                self.work.notify_one();
            }
            let acts = state.is_coordinator();
            (
                rewritten.into_iter().filter(|_| acts).collect::<Vec<_>>(),
                if acts { unused_blocks(&state.view, state.objects.all()) } else { Vec::new() },
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

impl Node {
    /// Loads the objects of the state file.
    pub(super) fn load_objects(&self, objects: Vec<SignedObject>) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let refused = |error: String| tracing::error!(error, "passed over an object of the state file");
        let changed = state.objects.load(objects, &mut state.view.resources, refused);
        super::newer::note_newer(state);
        self.resources_changed(state, &changed);
    }
}
