//! The cluster key and its rotation: `ovl_cluster::keys` decides, and this module carries it out. A key is on disk
//! before anything is sealed with it and before this host's record names it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ovl_cluster::keys::{RotationProgress, RotationState, key_towards};
use ovl_control::{FailureKind, HostKeys, KeyRotation, KeyStatus, PeerState};
use ovl_mesh::keys::{ClusterKey, KeyFile, Keyring};
use ovl_proto::alloc::{AgreedKey, Change};
use ovl_proto::secret::Secret;
use ovl_proto::sync::Message;

use super::state::State;
use super::{Failed, Node};
use crate::encryption;
use crate::environment::Disk;
use crate::problems::Code;

/// Time between two checks if there is no event.
const LOOK: Duration = Duration::from_secs(1);
/// Time after which a member that lacks the key gets it again, in milliseconds.
const GIVE_AGAIN_MS: u64 = 2000;
/// Time after which a rotation is reported as a problem, in milliseconds.
const STALLED_MS: u64 = 15_000;

/// The lock that is held from a read of the keys until the change that follows from it is done.
type Turn<'a> = tokio::sync::MutexGuard<'a, ()>;

impl State {
    fn live(&self) -> RotationState {
        RotationState::of(&self.view, &self.keys.ring().ids(), self.keys.counts_unknown(self.now()))
    }
}

impl Node {
    /// Takes each step of a rotation as soon as it is allowed. Runs forever.
    pub(super) async fn key_loop(self: Rc<Self>) {
        loop {
            if !self.state.borrow().keys.is_insecure() {
                self.turn_keys().await;
                self.use_keys_towards();
                self.hand_out_key(GIVE_AGAIN_MS);
                self.settle_key_file().await;
                self.note_keys();
            }
            tokio::time::timeout(LOOK, self.keys.notified()).await.ok();
        }
    }

    /// Takes all steps of a rotation that are allowed now.
    async fn turn_keys(&self) {
        loop {
            let turn = self.key_turn.lock().await;
            let next = {
                let state = self.state.borrow();
                state.keys.next(state.view.alloc.key, &state.live())
            };
            let Some((ring, what)) = next else { return };
            let key = self.state.borrow().view.alloc.key.map(|key| key.id.to_string()).unwrap_or_default();
            if let Err(error) = self.keep_keys(&turn, ring).await {
                let sentence =
                    format!("the rotation of the cluster key waits for this host's disk: {error:#}");
                self.state.borrow_mut().problems.set(Code::KeyDisk, "", Some(sentence));
                return;
            }
            self.state.borrow_mut().problems.set(Code::KeyDisk, "", None);
            self.event("key", &key, what);
        }
    }

    /// Stores the keys on disk, then uses them, then names them in the record.
    async fn keep_keys(&self, turn: &Turn<'_>, ring: Keyring) -> anyhow::Result<()> {
        let ring = Arc::new(ring);
        let kept = Arc::clone(&ring);
        self.with_key_file(turn, move |file| file.save(&kept)).await?;
        self.state.borrow_mut().keys.set_ring(Arc::clone(&ring));
        self.use_keys()?;
        let ids = ring.ids();
        self.change_record(|record| record.keys = ids);
        Ok(())
    }

    /// Runs work on the key file in another thread, because this thread must not wait for the disk.
    async fn with_key_file(
        &self,
        _: &Turn<'_>,
        work: impl FnOnce(&mut KeyFile) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let file = self.state.borrow_mut().keys.take_file();
        let mut file = file.context("this host has no cluster key file")?;
        let (file, result) = match self.environment.disk() {
            Disk::Synced => {
                tokio::task::spawn_blocking(move || {
                    let result = work(&mut file);
                    (file, result)
                })
                .await?
            }
            Disk::Simulated(latency) => {
                tokio::time::sleep(latency()).await;
                let result = work(&mut file);
                (file, result)
            }
        };
        self.state.borrow_mut().keys.put_file(file);
        result
    }

    /// Passes the keys to gossip and streams.
    pub(super) fn use_keys(&self) -> anyhow::Result<()> {
        let (ring, known) = {
            let state = self.state.borrow();
            let own = state.keys.ring().ids();
            let others = state.view.nodes.values().filter(|node| node.record.id != state.view.me);
            // The address of a host that left may now belong to another host.
            let others = others.filter(|node| node.state != PeerState::Left);
            let known = others.map(|node| (node.record.address, key_towards(&own, &node.record.keys)));
            (Arc::clone(state.keys.ring()), known.collect())
        };
        self.gossip().set_keys(Arc::clone(&ring), known)?;
        self.links().set_keyring(ring);
        Ok(())
    }

    /// Updates the key with which this host seals for each peer, which depends on the keys of the peer. Does nothing
    /// if this host has only one key.
    fn use_keys_towards(&self) {
        if !self.state.borrow().keys.ring().ids().opens.is_empty()
            && let Err(error) = self.use_keys()
        {
            tracing::error!("{error:#}");
        }
    }

    /// Sends the agreed key to members that lack it. Each gets it only after it was seen to lack it for `every`
    /// milliseconds, because another host may be about to send it.
    fn hand_out_key(&self, every: u64) {
        let (lacking, key) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let agreed = state.view.alloc.key;
            let is_agreed = |key: &&ClusterKey| agreed.is_some_and(|it| it.commitment == key.commitment());
            let key = state.keys.ring().all().find(is_agreed).cloned();
            let view = &state.view;
            let lacks = |node: &&ovl_cluster::view::Node| {
                node.record.id != view.me
                    && view.alloc.members.contains(&node.record.id)
                    && key.as_ref().is_some_and(|key| !node.record.keys.has(key.id()))
            };
            let lacking = view.nodes.values().filter(lacks).map(|node| node.record.id).collect();
            let now = state.now();
            (state.keys.due(lacking, every, now), key)
        };
        let Some(key) = key else { return };
        for id in lacking {
            self.links().send(id, &Message::ClusterKey(key.secret()));
        }
    }

    /// Takes note of a key that a member sent. It is used once the allocation map names it.
    pub(super) fn take_key(&self, secret: &Secret<[u8; 32]>) {
        let key = ClusterKey::new(secret.0);
        if self.state.borrow_mut().keys.offer(key) {
            self.keys.notify_one();
        }
    }

    /// Writes the key to the configured key file once it is the only key, and deletes the copy.
    async fn settle_key_file(&self) {
        let turn = self.key_turn.lock().await;
        let ring = {
            let state = self.state.borrow();
            state.keys.is_copy_due().then(|| Arc::clone(state.keys.ring()))
        };
        let Some(ring) = ring else { return };
        let settled = self.with_key_file(&turn, move |file| file.settle(&ring)).await;
        let sentence = settled.err().map(|error| {
            format!(
                "the cluster key was rotated, and its file does not have the new one: {error:#}. Put the new key into \
                 it, or let ovld write it (owned by root, mode 0600). Until then the copy in {} counts",
                self.config.state_dir.display()
            )
        });
        self.state.borrow_mut().problems.set(Code::KeyFile, "", sentence);
    }

    /// Reports a rotation that takes too long, and hosts that seal with a key that this host does not have.
    fn note_keys(&self) {
        let others = self.gossip().other_keys();
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let stalled = state
            .live()
            .progress()
            .filter(|progress| self.wall_ms().saturating_sub(progress.key.since_ms) > STALLED_MS);
        let sentence = stalled.map(|progress| rotation_sentence(&rotation_of(state, &progress)));
        state.problems.set(Code::KeyRotation, "", sentence);
        let away: Vec<String> = state
            .view
            .nodes
            .values()
            .filter(|node| node.record.id != state.view.me && node.state != PeerState::Alive)
            .filter(|node| others.contains(&node.record.address.ip()))
            .map(|node| format!("{} ({})", node.record.name, node.record.address.ip()))
            .collect();
        let alone = state.alive().len() <= 1;
        let file = self.config.cluster_key.as_deref().unwrap_or_else(|| std::path::Path::new(""));
        let sentence = (!away.is_empty()).then(|| {
            let (away, file) = (away.join(", "), file.display());
            if alone && state.view.alloc.members.len() > 1 {
                format!(
                    "the cluster has another key: {away} seal with one that this host does not have. It was rotated \
                     while this host was off: put the new key into {file}, mode 0600, and restart ovld"
                )
            } else {
                format!(
                    "{away}: sealed with another cluster key than this host's. If the key was rotated while that host \
                     was off, put the new key into its cluster key file, mode 0600, and restart ovld there"
                )
            }
        });
        state.problems.set(Code::KeyMissed, "", sentence);
    }

    /// Returns the progress of a rotation for `ovlctl status`. `None` if there is none.
    pub(super) fn key_rotation(state: &State) -> Option<KeyRotation> {
        state
            .live()
            .progress()
            .filter(|_| !state.keys.is_insecure())
            .map(|progress| rotation_of(state, &progress))
    }

    /// Returns the answer to `ovlctl key status`.
    pub(super) fn key_status(&self) -> Result<KeyStatus, Failed> {
        let state = self.state.borrow();
        let own_keys = state.keys.ring().ids();
        let mut hosts: Vec<HostKeys> = state
            .view
            .nodes
            .values()
            .map(|node| {
                let own = node.record.id == state.view.me;
                let keys = if own { &own_keys } else { &node.record.keys };
                HostKeys {
                    name: node.record.name.clone(),
                    id: node.record.id,
                    state: node.state,
                    member: state.view.alloc.members.contains(&node.record.id),
                    seals: keys.seals,
                    opens: keys.opens.clone(),
                    tunnel: node.record.tunnel.map(|end| end.key),
                    tunnel_rotating: node.record.tunnel.is_some_and(|end| end.rotating),
                    own,
                }
            })
            .collect();
        hosts.sort_by(|a, b| (!a.own, &a.name, a.id).cmp(&(!b.own, &b.name, b.id)));
        let rotation = Self::key_rotation(&state);
        let is_own = state.view.own().and_then(|own| own.record.tunnel).is_some_and(|end| end.rotating);
        let awaited = || {
            encryption::awaited(&state.view, &state.local.key_epochs)
                .map(|id| state.view.name_of(id))
                .collect()
        };
        Ok(KeyStatus { rotation, tunnel_waits_for: is_own.then(awaited), hosts })
    }

    /// Begins a rotation: `ovlctl key rotate --cluster`. Returns once a majority has agreed and the key is on this
    /// host's disk. The remaining steps follow without further requests.
    pub(super) async fn rotate_cluster_key(&self, text: &Secret<String>) -> Result<KeyStatus, Failed> {
        if self.state.borrow().keys.is_insecure() {
            return Err(no_key());
        }
        let key = ClusterKey::parse(text.0.as_bytes())
            .map_err(|error| Failed::invalid(format!("this is not a cluster key: {error:#}")))?;
        let agreed = self.may_begin(&key)?;
        let id = key.id();
        self.state.borrow_mut().keys.set_beginning(Some(id));
        let begun = self.begin_rotation(key, agreed).await;
        self.state.borrow_mut().keys.set_beginning(None);
        self.keys.notify_one();
        begun?;
        self.event("key", &id.to_string(), "the rotation of the cluster key begins, by request");
        self.hand_out_key(0);
        self.key_status()
    }

    /// Checks whether a rotation to this key can begin or continue, and returns the key that the allocation map
    /// names.
    fn may_begin(&self, key: &ClusterKey) -> Result<Option<AgreedKey>, Failed> {
        let state = self.state.borrow();
        if !state.is_member() {
            return Err(Failed::unavailable(
                "this host is not a member of the cluster yet; `ovlctl status` says what it waits for",
            ));
        }
        if state.keys.is_beginning() {
            return Err(Failed::conflict(
                "another request to rotate the cluster key is at work on this host",
            ));
        }
        let (id, agreed) = (key.id(), state.view.alloc.key);
        if state.keys.ring().get(id).is_some_and(|known| known != key) {
            return Err(Failed::invalid("by chance this key has the id of one in use: make another one"));
        }
        let progress = state.live().progress();
        match &progress {
            // The key of that rotation is sent again, even if no live host has it any more.
            Some(progress) if progress.key.id == id => {}
            Some(progress) if progress.have > 0 => {
                return Err(Failed::conflict(format!(
                    "the cluster key is being changed to another one already, {}: wait until `ovlctl key status` says \
                     that it is done",
                    progress.key.id
                )));
            }
            Some(_) | None if state.keys.ring().sealing() == key => {
                return Err(Failed::invalid(format!(
                    "this key, {id}, is the one in use: make a new one with `ovlctl key generate`"
                )));
            }
            Some(_) | None => {}
        }
        Ok(agreed)
    }

    async fn begin_rotation(&self, key: ClusterKey, agreed: Option<AgreedKey>) -> Result<(), Failed> {
        let id = key.id();
        {
            // The key is stored on disk first: once it is agreed, the rotation can complete whatever happens to this
            // host.
            let turn = self.key_turn.lock().await;
            let ring = Arc::clone(self.state.borrow().keys.ring());
            if ring.get(id).is_none() {
                self.keep_keys(&turn, ring.opening_too(key.clone()))
                    .await
                    .map_err(|error| Failed::internal(format!("the new key cannot be kept: {error:#}")))?;
            }
        }
        let to = AgreedKey { id, commitment: key.commitment(), since_ms: self.wall_ms() };
        let change = Change::Key { from: agreed.map(|key| key.id), to };
        let result = self.change(change).await;
        if result.as_ref().is_err_and(|failed| failed.0.kind == FailureKind::Conflict) {
            // The members agreed on another key, so no host uses this one.
            let turn = self.key_turn.lock().await;
            let ring = self.state.borrow().keys.ring().without(id);
            if let Err(error) = self.keep_keys(&turn, ring).await {
                tracing::error!("{error:#}");
            }
        }
        result
    }
}

fn rotation_of(state: &State, progress: &RotationProgress) -> KeyRotation {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    KeyRotation {
        key: progress.key.id,
        since_ms: progress.key.since_ms,
        hosts: count(progress.hosts),
        have: count(progress.have),
        seal: count(progress.seal),
        majority: progress.majority,
        waits_for: progress.waits_for.iter().map(|id| state.view.name_of(*id)).collect(),
    }
}

fn rotation_sentence(rotation: &KeyRotation) -> String {
    let waits = if !rotation.majority {
        "no majority of the hosts is alive, and without one it goes no further".to_owned()
    } else if rotation.have == 0 {
        "no live host has the new key: run `ovlctl key rotate --cluster FILE` again".to_owned()
    } else {
        format!("it waits for {}", rotation.waits_for.join(", "))
    };
    format!(
        "the cluster key is being changed to {}: {} of {} hosts have the new one, {} seal with it; {waits}. See \
         `ovlctl key status`",
        rotation.key, rotation.have, rotation.hosts, rotation.seal
    )
}

fn no_key() -> Failed {
    Failed::invalid(
        "this cluster runs with --insecure and has no key. To give it one, stop all hosts, and start them with \
         --cluster-key FILE in place of --insecure",
    )
}
