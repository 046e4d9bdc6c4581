//! The rotation of the cluster key: the next step of a host, from the keys in all hosts' records.
//!
//! A majority agrees on the id of the new key ([`AllocMap::key`]). Members that have the key send it to those that do
//! not. A host goes through three phases, and stores each step on disk before it announces the step:
//!
//! 1. It has the new key, and opens with both keys.
//! 2. When every live member has the new key, it seals with the new one.
//! 3. When every live member seals with the new one, it drops the old one.
//!
//! A host's record only ever goes forward, so an outdated record delays a host but never lets it proceed too early:
//! no host seals with a key that another one lacks, and no host drops a key that another one seals with. Dead hosts
//! are not waited for.
//!
//! [`AllocMap::key`]: ovl_proto::alloc::AllocMap::key

use ovl_proto::alloc::AgreedKey;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::ClusterKeys;

use crate::view::View;

/// The next step of a host in a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationStep {
    /// No step, or not yet.
    Wait,
    /// Seal with this key, which the host has.
    Seal(ClusterKeyId),
    /// Drop all keys but the sealing key.
    Drop,
}

/// The live members and their keys, from which the steps of a rotation derive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationState {
    /// The key that the members agreed on.
    agreed: Option<AgreedKey>,
    /// The live members, including the local host if it is one. `None`: the keys are not known yet.
    hosts: Vec<(NodeId, Option<ClusterKeys>)>,
    /// Whether they are a majority of all members. A side of a split without a majority must not proceed, because the
    /// other side may not have the key.
    majority: bool,
}

/// The progress of a rotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationProgress {
    /// The new key, and the start of the rotation.
    pub key: AgreedKey,
    /// The number of live members.
    pub hosts: usize,
    /// The number of live members that have the key.
    pub have: usize,
    /// The number of live members that seal with it.
    pub seal: usize,
    /// Whether a majority is alive.
    pub majority: bool,
    /// The hosts that the rotation waits for.
    pub waits_for: Vec<NodeId>,
}

impl RotationState {
    /// Computes the state from the view. `own` are the keys of this host, which its record may not contain yet.
    ///
    /// With `unknown`, members without a known record count as live, because they may have been admitted just now.
    /// Without it they do not, because members that have been dead for long have no record either.
    pub fn of(view: &View, own: &ClusterKeys, unknown: bool) -> Self {
        let members = &view.alloc.members;
        let hosts: Vec<_> = members
            .iter()
            .filter_map(|id| match view.nodes.get(id) {
                _ if *id == view.me => Some((*id, Some(own.clone()))),
                Some(node) => view.counts(node).then(|| (*id, Some(node.record.keys.clone()))),
                None => unknown.then_some((*id, None)),
            })
            .collect();
        let known = hosts.iter().filter(|(_, keys)| keys.is_some()).count();
        Self { agreed: view.alloc.key, majority: known > members.len() / 2, hosts }
    }

    /// Returns the next step of a host that has these keys.
    pub fn step(&self, own: &ClusterKeys) -> RotationStep {
        let all = |says: &dyn Fn(&ClusterKeys) -> bool| {
            self.majority && self.hosts.iter().all(|(_, keys)| keys.as_ref().is_some_and(says))
        };
        match self.agreed {
            Some(key) if key.id != own.seals => {
                if own.has(key.id) && all(&|keys| keys.has(key.id)) {
                    RotationStep::Seal(key.id)
                } else {
                    RotationStep::Wait
                }
            }
            // Without an agreed key: a host proposed a key and died.
            _ if !own.opens.is_empty() && all(&|keys| keys.seals == own.seals) => RotationStep::Drop,
            _ => RotationStep::Wait,
        }
    }

    /// Returns the progress of the rotation; `None` if every live member has completed it.
    pub fn progress(&self) -> Option<RotationProgress> {
        let key = self.agreed?;
        let lacks = |says: &dyn Fn(&ClusterKeys) -> bool| -> Vec<NodeId> {
            let lacking = self.hosts.iter().filter(|(_, keys)| !keys.as_ref().is_some_and(says));
            lacking.map(|(id, _)| *id).collect()
        };
        let without = lacks(&|keys| keys.has(key.id));
        let on_another = lacks(&|keys| keys.seals == key.id);
        let not_through = lacks(&|keys| keys.seals == key.id && keys.opens.is_empty());
        let hosts = self.hosts.len();
        let (have, seal) = (hosts - without.len(), hosts - on_another.len());
        let waits_for = [without, on_another, not_through].into_iter().find(|some| !some.is_empty())?;
        Some(RotationProgress { key, hosts, have, seal, majority: self.majority, waits_for })
    }
}

/// Returns the key for datagrams to a host that has the keys `theirs`: the sealing key, or another one of this host
/// if the peer lacks it. So a host that joins late, or returns, understands this one.
pub fn key_towards(own: &ClusterKeys, theirs: &ClusterKeys) -> ClusterKeyId {
    let ours = std::iter::once(&own.seals).chain(&own.opens);
    ours.copied().find(|key| theirs.has(*key)).unwrap_or(own.seals)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OLD: ClusterKeyId = ClusterKeyId([0; 4]);
    const NEW: ClusterKeyId = ClusterKeyId([1; 4]);

    fn agreed(id: ClusterKeyId) -> AgreedKey {
        AgreedKey { id, commitment: [id.0[0]; 16], since_ms: 7 }
    }

    fn keys(seals: ClusterKeyId, opens: &[ClusterKeyId]) -> ClusterKeys {
        ClusterKeys { seals, opens: opens.to_vec() }
    }

    fn live(key: Option<AgreedKey>, members: usize, hosts: &[Option<ClusterKeys>]) -> RotationState {
        let known = hosts.iter().flatten().count();
        let hosts = (0_u8..).zip(hosts).map(|(n, keys)| (NodeId([n; 10]), keys.clone())).collect();
        RotationState { agreed: key, hosts, majority: known > members / 2 }
    }

    #[test]
    fn host_seals_when_all_have_the_key_and_drops_the_old_one_when_all_seal() {
        let (before, has, seals, through) =
            (keys(OLD, &[]), keys(OLD, &[NEW]), keys(NEW, &[OLD]), keys(NEW, &[]));
        for (own, other, step) in [
            (&has, Some(&before), RotationStep::Wait),
            (&before, Some(&has), RotationStep::Wait),
            (&has, None, RotationStep::Wait),
            (&has, Some(&has), RotationStep::Seal(NEW)),
            (&has, Some(&seals), RotationStep::Seal(NEW)),
            (&has, Some(&through), RotationStep::Seal(NEW)),
            (&seals, Some(&has), RotationStep::Wait),
            (&seals, None, RotationStep::Wait),
            (&seals, Some(&seals), RotationStep::Drop),
            (&through, Some(&seals), RotationStep::Wait),
        ] {
            let live = live(Some(agreed(NEW)), 2, &[Some(own.clone()), other.cloned()]);
            assert_eq!(live.step(own), step, "{own:?} {other:?}");
        }
    }

    #[test]
    fn minority_does_not_proceed() {
        let has = keys(OLD, &[NEW]);
        assert_eq!(live(Some(agreed(NEW)), 2, &[Some(has.clone())]).step(&has), RotationStep::Wait);
        assert_eq!(live(Some(agreed(NEW)), 1, &[Some(has.clone())]).step(&has), RotationStep::Seal(NEW));
    }

    #[test]
    fn key_without_agreement_is_dropped() {
        let (has, before) = (keys(OLD, &[NEW]), keys(OLD, &[]));
        assert_eq!(live(None, 2, &[Some(has.clone()), Some(before)]).step(&has), RotationStep::Drop);
    }

    #[test]
    fn progress_names_the_hosts_it_waits_for() {
        let (before, has, seals, through) =
            (keys(OLD, &[]), keys(OLD, &[NEW]), keys(NEW, &[OLD]), keys(NEW, &[]));
        let progress = |hosts: [&ClusterKeys; 3]| {
            live(Some(agreed(NEW)), 3, &hosts.map(|keys| Some(keys.clone()))).progress().map(|progress| {
                let who: Vec<u8> = progress.waits_for.iter().map(|id| id.0[0]).collect();
                (progress.have, progress.seal, who)
            })
        };
        assert_eq!(progress([&has, &before, &has]), Some((2, 0, vec![1])));
        assert_eq!(progress([&has, &seals, &has]), Some((3, 1, vec![0, 2])));
        assert_eq!(progress([&seals, &seals, &through]), Some((3, 3, vec![0, 1])));
        assert_eq!(progress([&through, &through, &through]), None);
        assert_eq!(live(None, 1, &[Some(before)]).progress(), None);
    }

    #[test]
    fn datagrams_are_sealed_with_a_key_of_the_receiver() {
        let seals = keys(NEW, &[OLD]);
        assert_eq!(key_towards(&seals, &keys(OLD, &[])), OLD);
        assert_eq!(key_towards(&seals, &keys(OLD, &[NEW])), NEW);
        assert_eq!(key_towards(&keys(OLD, &[NEW]), &keys(NEW, &[])), NEW);
        assert_eq!(key_towards(&keys(NEW, &[]), &keys(OLD, &[])), NEW);
    }

    /// A host of the model: its keys on disk, the key that it knows to be agreed, and the last record that it
    /// received of each other host.
    #[derive(Clone)]
    struct Host {
        keys: ClusterKeys,
        agreed: Option<AgreedKey>,
        heard: Vec<Option<ClusterKeys>>,
    }

    impl Host {
        fn live(&self) -> RotationState {
            live(self.agreed, self.heard.len(), &self.heard)
        }

        fn set(&mut self, me: usize, keys: ClusterKeys) {
            self.heard[me] = Some(keys.clone());
            self.keys = keys;
        }

        fn step(&mut self, me: usize) {
            match self.live().step(&self.keys) {
                RotationStep::Wait => {}
                RotationStep::Seal(key) => {
                    let mut opens = self.keys.opens.clone();
                    opens.retain(|other| *other != key);
                    opens.push(self.keys.seals);
                    self.set(me, ClusterKeys { seals: key, opens });
                }
                RotationStep::Drop => self.set(me, keys(self.keys.seals, &[])),
            }
        }

        /// Receives a key, and stores it if it is the agreed one.
        fn take(&mut self, me: usize, key: ClusterKeyId) {
            if self.agreed.is_some_and(|agreed| agreed.id == key) && !self.keys.has(key) {
                let opens = [&self.keys.opens[..], &[key]].concat();
                self.set(me, ClusterKeys { seals: self.keys.seals, opens });
            }
        }
    }

    /// Checks that every host can open what any other one sends, whatever records they have.
    fn all_understand(hosts: &[Host]) -> Result<(), TestCaseError> {
        for (a, from) in hosts.iter().enumerate() {
            prop_assert!(from.keys.opens.len() <= ovl_proto::record::MAX_OTHER_KEYS);
            for (b, to) in hosts.iter().enumerate() {
                prop_assert!(to.keys.has(from.keys.seals), "{a} -> {b}: {:?} {:?}", from.keys, to.keys);
                if let Some(heard) = &from.heard[b] {
                    let key = key_towards(&from.keys, heard);
                    prop_assert!(to.keys.has(key), "{a} -> {b}: {key} {:?} {:?}", from.keys, to.keys);
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Maps, keys and records arrive late and in any order, hosts restart without knowledge of the others, and
        /// rotations follow one another. No host ever seals with a key that another one lacks, and at the end all
        /// hosts have only the last key.
        #[test]
        fn hosts_understand_each_other_after_any_order_of_events(
            count in 2_usize..5,
            events in prop::collection::vec((0_u8..7, 0_usize..4, 0_usize..4), 0..300),
        ) {
            let first = Host { keys: keys(OLD, &[]), agreed: None, heard: vec![Some(keys(OLD, &[])); count] };
            let mut hosts = vec![first; count];
            // The key that a majority has agreed on.
            let mut map: Option<AgreedKey> = None;
            let mut begun = 0;
            for (kind, a, b) in events {
                let (a, b) = (a % count, b % count);
                match kind {
                    // A host that knows the last map, and that the last rotation is complete.
                    0 if hosts[a].agreed == map && hosts[a].live().progress().is_none()
                        && hosts[a].heard.iter().all(Option::is_some) =>
                    {
                        begun += 1;
                        map = Some(agreed(ClusterKeyId([begun; 4])));
                        hosts[a].agreed = map;
                        hosts[a].take(a, ClusterKeyId([begun; 4]));
                    }
                    1 => hosts[a].agreed = map,
                    2 => {
                        if let Some(key) = hosts[a].agreed && hosts[a].keys.has(key.id) {
                            hosts[b].take(b, key.id);
                        }
                    }
                    3 if begun > 0 => {
                        let me = hosts[a].keys.clone();
                        hosts[a].heard = vec![None; count];
                        hosts[a].heard[a] = Some(me);
                    }
                    4 => hosts[a].step(a),
                    _ => hosts[b].heard[a] = Some(hosts[a].keys.clone()),
                }
                all_understand(&hosts)?;
            }
            for _ in 0..4 {
                for a in 0..count {
                    hosts[a].agreed = map;
                    for b in 0..count {
                        if let Some(key) = map && hosts[b].keys.has(key.id) {
                            hosts[a].take(a, key.id);
                        }
                        hosts[a].heard[b] = Some(hosts[b].keys.clone());
                    }
                    hosts[a].step(a);
                    all_understand(&hosts)?;
                }
            }
            for host in &hosts {
                prop_assert_eq!(&host.keys, &keys(map.map_or(OLD, |key| key.id), &[]));
            }
        }
    }
}
