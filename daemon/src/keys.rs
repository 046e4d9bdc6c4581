//! The cluster keys of this host, and its part of a rotation. `ovl_cluster::keys` decides about the steps, and `node::keys`
//! carries them out.

use std::collections::HashMap;
use std::sync::Arc;

use ovl_cluster::keys::{RotationState, RotationStep};
use ovl_mesh::keys::{ClusterKey, KeyFile, Keyring};
use ovl_proto::alloc::AgreedKey;
use ovl_proto::id::{ClusterKeyId, NodeId};

/// How long members without a known record count as live after the list of members changed, in milliseconds.
const UNKNOWN_FOR_MS: u64 = 10_000;

/// The keys of this host, and the state of a rotation.
#[derive(Debug)]
pub(crate) struct Keys {
    /// The keys with which this host seals and opens. They are on disk.
    ring: Arc<Keyring>,
    /// The key file. `None` with `--insecure`, and while another thread writes it.
    file: Option<KeyFile>,
    /// A key that came from a request or a member before the allocation map named it.
    offered: Option<ClusterKey>,
    /// The key of a request in flight, which is kept although the allocation map does not name it yet.
    beginning: Option<ClusterKeyId>,
    /// When each member was last given the key, or was first seen to lack it.
    given: HashMap<NodeId, u64>,
    /// When the list of members in the allocation map last changed.
    map_changed: u64,
    insecure: bool,
}

impl Keys {
    /// The keys on disk. Without a key file the cluster is insecure.
    pub(crate) fn new(ring: Arc<Keyring>, file: Option<KeyFile>) -> Self {
        Self {
            ring,
            insecure: file.is_none(),
            file,
            offered: None,
            beginning: None,
            given: HashMap::new(),
            map_changed: 0,
        }
    }

    /// Returns the keys with which this host seals and opens.
    pub(crate) fn ring(&self) -> &Arc<Keyring> {
        &self.ring
    }

    /// Replaces the keys by others, which are on disk.
    pub(crate) fn set_ring(&mut self, ring: Arc<Keyring>) {
        self.offered.take_if(|key| ring.get(key.id()).is_some());
        self.ring = ring;
    }

    /// Whether the cluster has no key.
    pub(crate) fn is_insecure(&self) -> bool {
        self.insecure
    }

    /// Notes that the list of members in the allocation map has changed now, in milliseconds of this run.
    pub(crate) fn note_members(&mut self, now: u64) {
        self.map_changed = now;
    }

    /// Whether members without a known record count as live.
    pub(crate) fn counts_unknown(&self, now: u64) -> bool {
        now.saturating_sub(self.map_changed) < UNKNOWN_FOR_MS
    }

    /// Takes the key file, for a thread that writes it. `None` if there is none, or another thread has it.
    pub(crate) fn take_file(&mut self) -> Option<KeyFile> {
        self.file.take()
    }

    /// Puts the key file back.
    pub(crate) fn put_file(&mut self, file: KeyFile) {
        self.file = Some(file);
    }

    /// Whether a rotation is over, and its copy of the key is still to be written to the key file.
    pub(crate) fn is_copy_due(&self) -> bool {
        self.ring.ids().opens.is_empty() && self.file.as_ref().is_some_and(KeyFile::has_copy)
    }

    /// Takes note of a key that a member sent. Returns whether it is new.
    pub(crate) fn offer(&mut self, key: ClusterKey) -> bool {
        let is_new = !self.insecure && self.ring.get(key.id()).is_none();
        if is_new {
            self.offered = Some(key);
        }
        is_new
    }

    /// Sets the key of a request in flight. `None` once it is answered.
    pub(crate) fn set_beginning(&mut self, key: Option<ClusterKeyId>) {
        self.beginning = key;
    }

    /// Whether a request to rotate the key is in flight.
    pub(crate) fn is_beginning(&self) -> bool {
        self.beginning.is_some()
    }

    /// The keys after the next step of a rotation, and what the step is. `None` if no step is allowed now.
    pub(crate) fn next(
        &self,
        agreed: Option<AgreedKey>,
        rotation: &RotationState,
    ) -> Option<(Keyring, &'static str)> {
        // The id has 32 bits only, so another key can have it.
        let agreed = agreed.map(|key| key.commitment);
        let offered = self.offered.as_ref().filter(|key| Some(key.commitment()) == agreed);
        if let Some(key) = offered.filter(|key| self.ring.get(key.id()).is_none()) {
            return Some((self.ring.opening_too(key.clone()), "this host has the new cluster key"));
        }
        match rotation.step(&self.ring.ids()) {
            RotationStep::Seal(id) => {
                let ring = self.ring.sealing_with(id)?;
                Some((ring, "all hosts have the new cluster key: it is used from now on"))
            }
            RotationStep::Drop if self.beginning.is_none() => Some((
                self.ring.alone(),
                "all hosts use the same cluster key: no other one is taken any more",
            )),
            RotationStep::Drop | RotationStep::Wait => None,
        }
    }

    /// The members among those that lack the key which are to get it now: each only after it was seen to lack it for `every`
    /// milliseconds, because another host may be about to send it.
    pub(crate) fn due(&mut self, lacking: Vec<NodeId>, every: u64, now: u64) -> Vec<NodeId> {
        self.given.retain(|id, _| lacking.contains(id));
        let given = &mut self.given;
        let is_due = |id: &NodeId| {
            let at = given.entry(*id).or_insert(now);
            let due = now.saturating_sub(*at) >= every;
            if due {
                *at = now;
            }
            due
        };
        lacking.into_iter().filter(is_due).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys {
            insecure: false,
            ..Keys::new(Arc::new(Keyring::new(ClusterKey::new([1; 32]), Vec::new())), None)
        }
    }

    #[test]
    fn member_gets_the_key_when_it_has_lacked_it_for_a_while_and_again_later() {
        let (mut keys, [a, b]) = (keys(), [1, 2].map(|byte| NodeId([byte; 10])));
        assert_eq!(keys.due(vec![a], 2000, 5000), []);
        assert_eq!(keys.due(vec![a, b], 2000, 6999), []);
        assert_eq!(keys.due(vec![a, b], 2000, 7000), [a]);
        assert_eq!(keys.due(vec![a, b], 2000, 8999), [b]);
        assert_eq!(keys.due(vec![b], 2000, 9000), [], "the other one has it now");
        assert_eq!(keys.due(vec![a, b], 2000, 11_000), [b], "and is asked after anew");
        assert_eq!(keys.due(vec![a], 0, 11_000), [a], "at once by request");
    }

    #[test]
    fn only_a_key_that_is_new_is_taken_and_a_cluster_without_keys_takes_none() {
        let mut keys = keys();
        assert!(!keys.offer(ClusterKey::new([1; 32])));
        assert!(keys.offer(ClusterKey::new([2; 32])));
        keys.set_ring(Arc::new(keys.ring().opening_too(ClusterKey::new([2; 32]))));
        assert!(keys.offered.is_none(), "it is on disk");
        let mut insecure = Keys::new(Arc::clone(keys.ring()), None);
        assert!(!insecure.offer(ClusterKey::new([3; 32])));
    }
}
