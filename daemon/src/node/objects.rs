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
use crate::clocks::RefusedObject;
use crate::networks::{overlap_sentences, unused_blocks};
use crate::objects::{Moment, Rejected, WantedObject, messages};
use crate::problems::Code;

/// Maximum number of objects that are stamped again at once: each is signed, which takes 70 us.
const STAMPED_AT_ONCE: usize = 2000;

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
            let clocks = self.clocks(state);
            self.check_refusing(state, &clocks)?;
            let (mut written, mut all) = (Vec::with_capacity(writes.len()), Vec::new());
            for (body, deleted) in writes {
                // What a later release says would be lost.
                if let Some((key, why)) = state.objects.not_understood(&body.key()) {
                    return Err(Failed::conflict(format!(
                        "{key} was written by a later release of ovld, and this host does not know {why}: change it \
                         on a host that runs that release, or upgrade ovld on this host"
                    )));
                }
                let stamp = state.objects.stamp(&clocks, Some(&body.key()), me);
                let object = Object { stamp, deleted, body };
                let signed = self.sign_object(&object)?;
                all.push(signed.clone());
                written.push((signed, object));
            }
            let changed = state.objects.write(written, state.view.resources_mut());
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
        let mut earlier: Vec<WantedObject> = Vec::new();
        let (is_new, want) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let clocks = self.clocks(state);
            let now = state.now();
            let moment = Moment { wall_ms: clocks.now(), void_after: clocks.void_after() };
            let known = state.peers.get(from).is_some();
            let refusals = &mut state.refused_objects;
            let refused = |why: Rejected| match why {
                // A problem says it, and it is repeated for as long as it lasts.
                Rejected::Future { what, by_ms, .. } if known => {
                    refusals.note(from, RefusedObject { what, by_ms, at: now });
                }
                Rejected::Earlier { key, stamp } => earlier.push((key, stamp)),
                why => tracing::warn!(%from, error = %why, "refused an object"),
            };
            let changed = state.objects.receive(objects, moment, state.view.resources_mut(), refused);
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
        self.write_again(&earlier);
        self.want_objects(from, want);
    }

    /// Signs a write of this host.
    fn sign_object(&self, object: &Object) -> Result<SignedObject, Failed> {
        let body = wire::encode_body(object).map_err(|error| Failed::internal(error.to_string()))?;
        Ok(SignedObject {
            signature: self.identity.sign(Domain::Object, &body),
            writer_key: *self.identity.public_key(),
            body,
        })
    }

    /// Writes objects again that a peer asks for and will refuse, because they were stamped while the clock of their writer
    /// was ahead: with the smallest stamps that are later than what the peer has.
    fn stamp_again(&self, peer: NodeId, wanted: &[WantedObject]) {
        let refused = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let clocks = self.clocks(state);
            self.note_future(state, &clocks, wanted);
            let refused = state.objects.refused_by(wanted, clocks.void_after(), STAMPED_AT_ONCE);
            if refused.is_empty() {
                return;
            }
            let name = state.view.name_of(peer);
            self.event(
                "objects",
                &name,
                &format!("{} stamped again: their stamps were in the future", refused.len()),
            );
            refused
        };
        self.write_again(&refused);
    }

    /// Writes stored objects again, each with a stamp after one that another host has of it.
    fn write_again(&self, objects: &[WantedObject]) {
        if objects.is_empty() {
            return;
        }
        let all = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let clocks = self.clocks(state);
            let me = state.view.me;
            let (mut written, mut all) = (Vec::new(), Vec::new());
            for (key, has) in objects {
                let stamp = state.objects.stamp(&clocks, Some(key), me).max(has.next(me));
                let Some(object) = state.objects.to_stamp_again(key, stamp) else { continue };
                match self.sign_object(&object) {
                    Ok(signed) => {
                        all.push(signed.clone());
                        written.push((signed, object));
                    }
                    Err(Failed(failure)) => tracing::error!(%key, error = failure.message, "cannot sign"),
                }
            }
            match state.objects.write(written, state.view.resources_mut()) {
                Ok(changed) => self.objects_changed(state, &changed),
                Err(full) => {
                    tracing::error!(error = %full, "cannot stamp objects again");
                    return;
                }
            }
            all
        };
        for part in messages(&all) {
            self.links().broadcast(&Message::Objects(part.to_vec()));
        }
        self.settle_objects();
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
            state.exchanges.on_index(from, index, lacks, now)
        };
        self.want_objects(from, want.unwrap_or_default());
    }

    fn want_objects(&self, from: NodeId, want: Vec<ObjectKey>) {
        if want.is_empty() {
            return;
        }
        let want = {
            let state = self.state.borrow();
            let stamped = |key: ObjectKey| {
                let has = state.objects.all().get(&key).map(|stored| stored.stamp);
                (key, has.unwrap_or_default())
            };
            want.into_iter().map(stamped).collect()
        };
        self.links().send(from, &Message::ObjectWant(want));
    }

    /// Answers [`Message::ObjectWant`].
    pub(super) fn send_objects(&self, to: NodeId, wanted: Vec<WantedObject>) {
        self.stamp_again(to, &wanted);
        let keys = wanted.into_iter().map(|(key, _)| key).collect();
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
            let State { peers, exchanges, clock, .. } = state;
            let said = |id: &NodeId| {
                peers.get(*id).filter(|peer| peer.signs().gossip)?;
                Some(clock.at(self.gossip().hinted(*id)?))
            };
            let Some(peer) = exchanges.begin(now, own, said) else { return };
            (peer, state.objects.all().parts())
        };
        self.links().send(peer, &Message::ObjectParts(parts));
    }

    /// Deletes tombstones that all hosts have had time to receive.
    pub(super) fn drop_old_tombstones(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let wall_ms = self.clocks(state).now();
        let (networks, blocks) = (&state.view.networks, &state.view.alloc.blocks);
        let in_use =
            |id: &NetworkId| networks.contains_key(id) || blocks.keys().any(|block| block.network == *id);
        if state.objects.drop_old_tombstones(wall_ms, in_use) {
            self.objects_changed(state, &[]);
        }
    }

    fn objects_changed(&self, state: &mut State, changed: &[ResourceKey]) {
        self.publish_hints(state);
        state.save.want();
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
            let mut allocator = ServiceAllocator::new(&state.view, &self.config.ranges, &mut promised);
            let mended = lacking.into_iter().filter_map(|name| {
                let before = resources.services().get(name)?;
                let mut service = before.clone();
                allocator.allocate(&mut service).ok()?;
                // What a mirrored Service has is for its API server to decide, except for addresses of ovl's pool.
                let is_decided = before.metadata.source.is_some() && service.spec != before.spec;
                (service != *before && !is_decided)
                    .then(|| (Body::Resource(Resource::Service(Box::new(service))), false))
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
            let before = state.view.set_networks(networks);
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
        let changed = state.objects.load(objects, state.view.resources_mut(), refused);
        super::newer::note_newer(state);
        self.resources_changed(state, &changed);
    }
}
