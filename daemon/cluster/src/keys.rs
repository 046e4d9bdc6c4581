//! Rotating the cluster key: what a host does next, out of what all hosts say of their keys.
//!
//! A majority agrees on the id of the new key ([`AllocMap::key`]). Members that have the key hand it
//! to those that do not. A host goes through three phases, and each step is on its disk before others
//! hear of it:
//!
//! 1. It has the new key, and opens with both.
//! 2. When every live member has it, it seals with the new one.
//! 3. When every live member seals with the new one, it drops the old one.
//!
//! What a host says of itself only ever goes forward, so a record that is late holds a host up and
//! never lets it go too far: nobody seals with what another one lacks, and nobody drops what another
//! one seals with. A host that is dead is not waited for.
//!
//! [`AllocMap::key`]: ovl_proto::alloc::AllocMap::key

use ovl_proto::alloc::AgreedKey;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::ClusterKeys;

use crate::view::View;

/// What a host does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, or nothing yet.
    Wait,
    /// Seal with this key, which it has.
    Seal(ClusterKeyId),
    /// Drop all keys but the one that it seals with.
    Drop,
}

/// The members that a rotation waits for, and what each has; nothing where that is not known yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// The key that all shall have.
    agreed: Option<AgreedKey>,
    /// Live members, the own host among them if it is one.
    hosts: Vec<(NodeId, Option<ClusterKeys>)>,
    /// Whether they are a majority of all members: a side that has none goes no further, for the
    /// other one may not have the key.
    majority: bool,
}

/// How far a rotation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// To which key, and since when.
    pub key: AgreedKey,
    /// Live members.
    pub hosts: usize,
    /// Of those, the ones that have the key.
    pub have: usize,
    /// Of those, the ones that seal with it.
    pub seal: usize,
    /// Whether a majority is alive.
    pub majority: bool,
    /// Who holds it up.
    pub waits_for: Vec<NodeId>,
}

impl Live {
    /// Out of the view. `own` is what this host has, which its record may not say yet. With
    /// `unknown`, members that nobody has told us of count as live: they were admitted a moment ago.
    /// Without it they do not, for of those that are long dead nobody has a record.
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

    /// What a host that has these keys does next.
    pub fn step(&self, own: &ClusterKeys) -> Step {
        let all = |says: &dyn Fn(&ClusterKeys) -> bool| {
            self.majority && self.hosts.iter().all(|(_, keys)| keys.as_ref().is_some_and(says))
        };
        match self.agreed {
            Some(key) if key.id != own.seals => {
                if own.has(key.id) && all(&|keys| keys.has(key.id)) {
                    Step::Seal(key.id)
                } else {
                    Step::Wait
                }
            }
            // Without an agreed one a key was about to be, and the host died.
            _ if !own.opens.is_empty() && all(&|keys| keys.seals == own.seals) => Step::Drop,
            _ => Step::Wait,
        }
    }

    /// The rotation that is under way; nothing when every live member is through.
    pub fn progress(&self) -> Option<Progress> {
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
        Some(Progress { key, hosts, have, seal, majority: self.majority, waits_for })
    }
}

/// The key for what goes to a host that has `theirs`: the one that we seal with, unless it lacks that
/// one and has another of ours. So one that joins late, or comes back, understands us.
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
        AgreedKey { id, since_ms: 7 }
    }

    fn keys(seals: ClusterKeyId, opens: &[ClusterKeyId]) -> ClusterKeys {
        ClusterKeys { seals, opens: opens.to_vec() }
    }

    fn live(key: Option<AgreedKey>, members: usize, hosts: &[Option<ClusterKeys>]) -> Live {
        let known = hosts.iter().flatten().count();
        let hosts = (0_u8..).zip(hosts).map(|(n, keys)| (NodeId([n; 10]), keys.clone())).collect();
        Live { agreed: key, hosts, majority: known > members / 2 }
    }

    #[test]
    fn a_host_seals_when_all_have_the_key_and_drops_the_old_one_when_all_seal() {
        let (before, has, seals, through) =
            (keys(OLD, &[]), keys(OLD, &[NEW]), keys(NEW, &[OLD]), keys(NEW, &[]));
        for (own, other, step) in [
            (&has, Some(&before), Step::Wait),
            (&before, Some(&has), Step::Wait),
            (&has, None, Step::Wait),
            (&has, Some(&has), Step::Seal(NEW)),
            (&has, Some(&seals), Step::Seal(NEW)),
            (&has, Some(&through), Step::Seal(NEW)),
            (&seals, Some(&has), Step::Wait),
            (&seals, None, Step::Wait),
            (&seals, Some(&seals), Step::Drop),
            (&through, Some(&seals), Step::Wait),
        ] {
            let live = live(Some(agreed(NEW)), 2, &[Some(own.clone()), other.cloned()]);
            assert_eq!(live.step(own), step, "{own:?} {other:?}");
        }
    }

    #[test]
    fn a_minority_goes_no_further() {
        let has = keys(OLD, &[NEW]);
        assert_eq!(live(Some(agreed(NEW)), 2, &[Some(has.clone())]).step(&has), Step::Wait);
        assert_eq!(live(Some(agreed(NEW)), 1, &[Some(has.clone())]).step(&has), Step::Seal(NEW));
    }

    #[test]
    fn a_key_that_was_never_agreed_on_is_dropped() {
        let (has, before) = (keys(OLD, &[NEW]), keys(OLD, &[]));
        assert_eq!(live(None, 2, &[Some(has.clone()), Some(before)]).step(&has), Step::Drop);
    }

    #[test]
    fn progress_names_who_holds_it_up() {
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
    fn what_goes_to_a_host_is_sealed_with_a_key_that_it_has() {
        let seals = keys(NEW, &[OLD]);
        assert_eq!(key_towards(&seals, &keys(OLD, &[])), OLD);
        assert_eq!(key_towards(&seals, &keys(OLD, &[NEW])), NEW);
        assert_eq!(key_towards(&keys(OLD, &[NEW]), &keys(NEW, &[])), NEW);
        assert_eq!(key_towards(&keys(NEW, &[]), &keys(OLD, &[])), NEW);
    }

    /// A host of the model: what it has on disk, what it knows to be agreed, and the last record of
    /// each other one that reached it.
    #[derive(Clone)]
    struct Host {
        keys: ClusterKeys,
        agreed: Option<AgreedKey>,
        heard: Vec<Option<ClusterKeys>>,
    }

    impl Host {
        fn live(&self) -> Live {
            live(self.agreed, self.heard.len(), &self.heard)
        }

        fn set(&mut self, me: usize, keys: ClusterKeys) {
            self.heard[me] = Some(keys.clone());
            self.keys = keys;
        }

        fn step(&mut self, me: usize) {
            match self.live().step(&self.keys) {
                Step::Wait => {}
                Step::Seal(key) => {
                    let mut opens = self.keys.opens.clone();
                    opens.retain(|other| *other != key);
                    opens.push(self.keys.seals);
                    self.set(me, ClusterKeys { seals: key, opens });
                }
                Step::Drop => self.set(me, keys(self.keys.seals, &[])),
            }
        }

        /// A key arrives; it is taken if it is the agreed one.
        fn take(&mut self, me: usize, key: ClusterKeyId) {
            if self.agreed.is_some_and(|agreed| agreed.id == key) && !self.keys.has(key) {
                let opens = [&self.keys.opens[..], &[key]].concat();
                self.set(me, ClusterKeys { seals: self.keys.seals, opens });
            }
        }
    }

    /// What goes from one to the other is understood, whatever each has heard of the other.
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
        /// Maps, keys and records arrive in any order and late, hosts restart and know nothing of the
        /// others, and rotations follow one another: no host ever seals with what another one lacks,
        /// and at the end all have the last key and no other.
        #[test]
        fn no_order_of_events_leaves_two_hosts_that_do_not_understand_each_other(
            count in 2_usize..5,
            events in prop::collection::vec((0_u8..7, 0_usize..4, 0_usize..4), 0..300),
        ) {
            let first = Host { keys: keys(OLD, &[]), agreed: None, heard: vec![Some(keys(OLD, &[])); count] };
            let mut hosts = vec![first; count];
            // What a majority has agreed on.
            let mut map: Option<AgreedKey> = None;
            let mut begun = 0;
            for (kind, a, b) in events {
                let (a, b) = (a % count, b % count);
                match kind {
                    // One that knows the last map, and that the last rotation is over.
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
