//! Which hosts messages may name, and what they may say of them.
//!
//! A message of chitchat is unsigned, and any host with the cluster key can send one. So each record in it is verified
//! before chitchat sees it, its version must be the one that the record implies, and a host is named only as its own
//! record names it. All that another host can set is then the heartbeat, which is not used as a sign of life.
//!
//! Hosts that the daemon does not know are guests. There are at most [`MAX_GUESTS`], and the oldest gives way, at most
//! one a second, because chitchat forgets a host only after ten minutes.
//!
//! A digest of chitchat has one entry for each run of a host that chitchat has not forgotten, and must fit a datagram:
//! chitchat fails, or drops all messages, if it does not. So a run that a later one at the same address has superseded is
//! dropped from messages, chitchat's state is replaced by one without such runs when there are some of them
//! ([`Admission::is_crowded`]), and no run is let in for which there is no room.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;
use tokio::time::Instant;

use super::decode::{DecodeError, Exchange, HostDelta, Incarnation, Operation};
use crate::keys::{self, RecordError};

/// The key of a host's record in chitchat: short, because every delta repeats it.
pub(super) const KEY_RECORD: &str = "r";

/// The maximum number of hosts that the daemon does not know.
const MAX_GUESTS: usize = 64;
/// The minimum time between two guests that give way.
const EVICT_EVERY: Duration = Duration::from_secs(1);
/// The maximum number of runs of a host: after a restart, the old one may be named for a while.
const MAX_RUNS: usize = 2;
/// The minimum time between two runs of a host.
const RUN_EVERY: Duration = Duration::from_millis(500);
/// The maximum size in bytes of all entries of a digest. A message of chitchat has at most 65,507 bytes, and some of them
/// are for the news that go with the digest. About 1,070 hosts with IPv4 addresses have room, 880 with IPv6.
const MAX_DIGEST: usize = 61_000;
/// How many superseded runs chitchat may have, apart from one for each [`HOSTS_PER_SUPERSEDED`] of all runs.
const MAX_SUPERSEDED: usize = 16;
const HOSTS_PER_SUPERSEDED: usize = 32;

/// The hosts that messages may name.
pub(super) struct Admission {
    own: Incarnation,
    known: HashSet<NodeId>,
    /// The oldest is first.
    guests: VecDeque<NodeId>,
    evicted: Option<Instant>,
    runs: HashMap<NodeId, Vec<Run>>,
    /// The runs that may be in the state of chitchat.
    inside: HashSet<Incarnation>,
    /// The size of a digest with all of these, in bytes.
    digest: usize,
}

/// A run of a host, with its latest record.
struct Run {
    name: Incarnation,
    record: String,
    version: u64,
    since: Instant,
}

/// The version of a record in chitchat. It follows from what the host has signed, so no other host can raise it.
pub(super) fn version_of(revision: u64) -> u64 {
    revision.saturating_add(1)
}

impl Admission {
    pub(super) fn new(own: Incarnation) -> Self {
        Self {
            own,
            known: HashSet::new(),
            guests: VecDeque::new(),
            evicted: None,
            runs: HashMap::new(),
            inside: HashSet::new(),
            digest: 0,
        }
    }

    /// Notes which runs are in the state of chitchat. It forgets some by itself.
    pub(super) fn set_inside(&mut self, inside: HashSet<Incarnation>) {
        self.digest = inside.iter().map(entry_len).sum();
        self.inside = inside;
    }

    /// How many runs may be in the state of chitchat.
    pub(super) fn inside(&self) -> usize {
        self.inside.len()
    }

    /// Whether chitchat has so many superseded runs that its state is to be replaced by one without them.
    pub(super) fn is_crowded(&self) -> bool {
        let superseded = self.inside.iter().filter(|host| self.is_superseded(host)).count();
        let room = if self.digest > MAX_DIGEST / 10 * 9 {
            0
        } else {
            MAX_SUPERSEDED.saturating_add(self.inside.len() / HOSTS_PER_SUPERSEDED)
        };
        superseded > room
    }

    /// Whether the host has been started again at its address since this run. Two daemons cannot run at one address.
    pub(super) fn is_superseded(&self, host: &Incarnation) -> bool {
        if (host.node, host.address) == (self.own.node, self.own.address) {
            return host.generation < self.own.generation;
        }
        let runs = self.runs.get(&host.node).map(Vec::as_slice).unwrap_or_default();
        let since = runs.iter().find(|run| run.name == *host).map(|run| run.since);
        runs.iter().any(|run| {
            run.name.address == host.address
                && run.name.generation > host.generation
                // After a restart with an old copy of the state, the later run may have the lower generation.
                && since.is_none_or(|since| run.since >= since)
        })
    }

    /// Lets a run in if there is room. Returns whether there is.
    fn let_in(&mut self, host: Incarnation) -> bool {
        if host == self.own || self.inside.contains(&host) {
            return true;
        }
        let digest = self.digest.saturating_add(entry_len(&host));
        if digest > MAX_DIGEST {
            return false;
        }
        self.digest = digest;
        self.inside.insert(host)
    }

    /// Replaces the set of hosts that the daemon knows.
    pub(super) fn set_known(&mut self, known: HashSet<NodeId>) {
        self.known = known;
        self.guests.retain(|guest| !self.known.contains(guest));
        let Self { own, known, guests, runs, .. } = self;
        runs.retain(|node, _| known.contains(node) || guests.contains(node) || *node == own.node);
    }

    /// Drops what a message must not say. Returns whether there are runs that were not named before.
    ///
    /// # Errors
    ///
    /// The message has something that no correct host sends, or an invalid record. Each message costs at most one failed
    /// verification.
    pub(super) fn filter(&mut self, exchange: &mut Exchange, now: Instant) -> Result<bool, DecodeError> {
        let mut new = false;
        let mut kept = Vec::new();
        for delta in std::mem::take(&mut exchange.delta) {
            // Only this host itself writes its state.
            if delta.host != self.own
                && self.accepts(&delta, now, &mut new)?
                && !self.is_superseded(&delta.host)
                && self.let_in(delta.host)
            {
                kept.push(delta);
            }
        }
        exchange.delta = kept;
        exchange.digest.retain(|(host, _)| *host == self.own || self.is_named(host) && self.let_in(*host));
        Ok(new)
    }

    fn is_named(&self, host: &Incarnation) -> bool {
        self.run(host).is_some() && !self.is_superseded(host)
    }

    fn run(&self, host: &Incarnation) -> Option<&Run> {
        self.runs.get(&host.node)?.iter().find(|run| run.name == *host)
    }

    /// Whether to accept the news of a host.
    fn accepts(&mut self, delta: &HostDelta, now: Instant, new: &mut bool) -> Result<bool, DecodeError> {
        let ([deleted, _], [Operation::Set { key, value, version, status: 0 }]) =
            (&delta.base, delta.operations.as_slice())
        else {
            return Err(DecodeError::Malformed("news that no host has"));
        };
        if *deleted != 0 || key != KEY_RECORD {
            return Err(DecodeError::Malformed("news that no host has"));
        }
        if let Some(run) = self.run(&delta.host) {
            if run.record == *value {
                return if run.version == *version {
                    Ok(true)
                } else {
                    Err(DecodeError::Malformed("version"))
                };
            }
            if run.version >= *version {
                // An older record, or a forged one: not worth a verification.
                return Ok(false);
            }
        }
        let signed = SignedRecord::from_text(value).map_err(|_| DecodeError::Malformed("record"))?;
        // A record that this release does not understand is passed on all the same.
        let record = match keys::open_record(&signed) {
            Ok(_) | Err(RecordError::NotUnderstood { .. }) => signed.head().ok(),
            Err(_) => None,
        };
        let record = record.ok_or(DecodeError::Malformed("invalid record"))?;
        let name = delta.host;
        // A host raises the generation of its record without a new run after a clash with a copy of it.
        let is_own =
            (record.id, record.address) == (name.node, name.address) && record.generation >= name.generation;
        if !is_own || version_of(record.revision) != *version {
            return Err(DecodeError::Malformed("record of another host, or version"));
        }
        Ok(self.note_record(name, value, *version, now, new))
    }

    /// Takes a record that its host has sent itself and that was verified. Returns whether chitchat is to have it.
    ///
    /// A host raises the generation of its record without a new run after a clash with a copy of it. Such a record, and the
    /// first one after a restart, are left to rounds of gossip, which name the run.
    pub(super) fn take_own(&mut self, name: Incarnation, text: &str, version: u64, now: Instant) -> bool {
        if name.node == self.own.node {
            return false;
        }
        match self.run(&name) {
            Some(run) if run.version >= version => return false,
            Some(_) => {}
            None => {
                let runs = self.runs.get(&name.node).map(Vec::as_slice).unwrap_or_default();
                if runs.iter().any(|run| run.name.address == name.address) {
                    return false;
                }
            }
        }
        self.note_record(name, text, version, now, &mut false)
            && !self.is_superseded(&name)
            && self.let_in(name)
    }

    /// Whether a text is the latest record of a run of a host. It was verified then.
    pub(super) fn has_record(&self, node: NodeId, text: &str) -> bool {
        self.runs.get(&node).is_some_and(|runs| runs.iter().any(|run| run.record == text))
    }

    /// Whether a run of a host may be named.
    pub(super) fn knows(&self, node: NodeId) -> bool {
        self.runs.contains_key(&node)
    }

    /// Notes the verified record of a run, unless there is no place for the host or the run.
    fn note_record(
        &mut self,
        name: Incarnation,
        value: &str,
        version: u64,
        now: Instant,
        new: &mut bool,
    ) -> bool {
        if !self.admit(name.node, now) {
            return false;
        }
        let runs = self.runs.entry(name.node).or_default();
        if let Some(run) = runs.iter_mut().find(|run| run.name == name) {
            (run.record, run.version) = (value.to_owned(), version);
            return true;
        }
        let latest = runs.iter().map(|run| run.name.generation).max();
        let recent = runs.iter().any(|run| now.saturating_duration_since(run.since) < RUN_EVERY);
        if runs.len() >= MAX_RUNS {
            if recent || latest.is_some_and(|latest| name.generation < latest) {
                return false;
            }
            // The older one ends.
            let oldest = runs.iter().enumerate().min_by_key(|(_, run)| run.name.generation);
            if let Some((at, _)) = oldest {
                runs.remove(at);
            }
        }
        runs.push(Run { name, record: value.to_owned(), version, since: now });
        *new = true;
        true
    }

    /// Whether a host may be named: it is known, or there is a place for a guest.
    fn admit(&mut self, node: NodeId, now: Instant) -> bool {
        if node == self.own.node || self.known.contains(&node) || self.guests.contains(&node) {
            return true;
        }
        if self.guests.len() >= MAX_GUESTS {
            if self.evicted.is_some_and(|at| now.saturating_duration_since(at) < EVICT_EVERY) {
                return false;
            }
            self.evicted = Some(now);
            if let Some(oldest) = self.guests.pop_front() {
                self.runs.remove(&oldest);
            }
        }
        self.guests.push_back(node);
        true
    }
}

/// The size of the entry of a run in a digest of chitchat, in bytes: its name, and three numbers.
fn entry_len(host: &Incarnation) -> usize {
    let address = if host.address.is_ipv4() { 4 } else { 16 };
    2 + 16 + 8 + 1 + address + 2 + 3 * 8
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ovl_proto::record::NodeRecord;

    use super::*;
    use crate::keys::Identity;
    use crate::keys::tests::record_of;

    fn own() -> Incarnation {
        Incarnation { node: NodeId([9; 10]), generation: 1, address: SocketAddr::from(([10, 0, 0, 9], 7940)) }
    }

    fn news_of(identity: &Identity, change: impl FnOnce(&mut NodeRecord)) -> (Incarnation, HostDelta) {
        let mut record = record_of(identity);
        change(&mut record);
        let signed = identity.sign_record(&record).unwrap();
        let host = Incarnation { node: record.id, generation: record.generation, address: record.address };
        let set = Operation::Set {
            key: KEY_RECORD.to_owned(),
            value: signed.to_text().unwrap(),
            version: version_of(record.revision),
            status: 0,
        };
        (host, HostDelta { host, base: [0, 0], operations: vec![set] })
    }

    /// What is left of a message with a delta and a digest.
    fn filtered(
        admission: &mut Admission,
        delta: Vec<HostDelta>,
        digest: &[Incarnation],
        now: Instant,
    ) -> Result<(usize, usize), DecodeError> {
        let mut exchange = Exchange::syn(digest.iter().map(|host| (*host, [1, 0, 0])).collect());
        exchange.delta = delta;
        admission.filter(&mut exchange, now)?;
        Ok((exchange.delta.len(), exchange.digest.len()))
    }

    #[test]
    fn host_is_named_once_its_record_is_known() {
        let mut admission = Admission::new(own());
        let identity = Identity::ephemeral();
        let (host, news) = news_of(&identity, |_| {});
        let now = Instant::now();
        assert_eq!(filtered(&mut admission, vec![], &[host, own()], now), Ok((0, 1)));
        assert_eq!(filtered(&mut admission, vec![news], &[host], now), Ok((1, 1)));
        assert_eq!(filtered(&mut admission, vec![], &[host], now), Ok((0, 1)));
        // Not as another run, which its record does not name.
        let other = Incarnation { generation: host.generation + 1, ..host };
        assert_eq!(filtered(&mut admission, vec![], &[other], now), Ok((0, 0)));
    }

    #[test]
    fn record_that_its_host_has_sent_is_taken_once_and_names_no_other_run() {
        let mut admission = Admission::new(own());
        let identity = Identity::ephemeral();
        let now = Instant::now();
        let take = |admission: &mut Admission, change: &dyn Fn(&mut NodeRecord)| {
            let (name, news) = news_of(&identity, change);
            let [Operation::Set { value, version, .. }] = news.operations.as_slice() else {
                panic!("one operation");
            };
            admission.take_own(name, value, *version, now)
        };
        assert!(take(&mut admission, &|_| {}));
        assert!(!take(&mut admission, &|_| {}), "known");
        assert!(take(&mut admission, &|record| record.revision += 2));
        assert!(!take(&mut admission, &|record| record.revision += 1), "older");
        // Rounds say whether the host was started again, or is still the same run.
        assert!(!take(&mut admission, &|record| record.generation += 1));
        let (host, news) = news_of(&identity, |record| record.revision += 2);
        let [Operation::Set { value, .. }] = news.operations.as_slice() else { panic!("one operation") };
        assert!(admission.has_record(host.node, value) && admission.knows(host.node));
        assert_eq!(filtered(&mut admission, vec![], &[host], now), Ok((0, 1)), "it may be named");
        assert!(!admission.take_own(own(), "", 9, now), "this host");
    }

    #[test]
    fn host_that_raises_the_generation_of_its_record_keeps_its_run() {
        let mut admission = Admission::new(own());
        let identity = Identity::ephemeral();
        let (run, news) = news_of(&identity, |_| {});
        let now = Instant::now();
        assert_eq!(filtered(&mut admission, vec![news], &[run], now), Ok((1, 1)));
        let (later, news) = news_of(&identity, |record| {
            record.generation += 5;
            record.revision += 1;
        });
        let renewed = HostDelta { host: run, ..news };
        assert_eq!(filtered(&mut admission, vec![renewed], &[run], now), Ok((1, 1)));
        // A record of an earlier generation is not that of a later run.
        let (_, old) = news_of(&identity, |record| record.revision += 9);
        assert!(filtered(&mut admission, vec![HostDelta { host: later, ..old }], &[], now).is_err());
    }

    #[test]
    fn other_hosts_cannot_change_a_record_or_its_version() {
        let mut admission = Admission::new(own());
        let (identity, forger) = (Identity::ephemeral(), Identity::ephemeral());
        let now = Instant::now();
        let (_, news) = news_of(&identity, |_| {});
        let (host, _) = news_of(&identity, |_| {});
        let changed = |change: &dyn Fn(&mut HostDelta)| {
            let (_, mut news) = news_of(&identity, |_| {});
            change(&mut news);
            news
        };
        let set = |value: Option<String>, new_version: Option<u64>, new_status: u8| {
            changed(&|news| {
                let [Operation::Set { value: text, version, status, .. }] = news.operations.as_mut_slice()
                else {
                    panic!("one operation");
                };
                *status = new_status;
                *version = new_version.unwrap_or(*version);
                if let Some(value) = &value {
                    text.clone_from(value);
                }
            })
        };
        let (_, other) = news_of(&forger, |record| record.id = identity.id());
        let [Operation::Set { value: forged, .. }] = other.operations.as_slice() else {
            panic!("one operation")
        };
        let bad = [
            set(Some(forged.clone()), None, 0),
            set(Some("x".to_owned()), None, 0),
            set(None, Some(u64::MAX), 0),
            set(None, None, 1),
            changed(&|news| news.base[0] = 5),
            changed(&|news| news.operations = vec![Operation::Version(u64::MAX)]),
            changed(&|news| news.operations.clear()),
            changed(&|news| news.host.generation += 1),
        ];
        for round in 0..2 {
            for (number, bad) in bad.iter().enumerate() {
                let copy = HostDelta { host: bad.host, base: bad.base, operations: copies(&bad.operations) };
                let found = filtered(&mut admission, vec![copy], &[], now);
                // A record that is not later than the known one is dropped without a verification.
                assert!(found.is_err() || (round == 1 && found == Ok((0, 0))), "{round} {number}");
            }
            let copy = HostDelta { host, base: [0, 0], operations: copies(&news.operations) };
            assert_eq!(filtered(&mut admission, vec![copy], &[host], now), Ok((1, 1)));
        }
    }

    fn copies(operations: &[Operation]) -> Vec<Operation> {
        let copy = |operation: &Operation| match operation {
            Operation::Set { key, value, version, status } => {
                Operation::Set { key: key.clone(), value: value.clone(), version: *version, status: *status }
            }
            Operation::Version(version) => Operation::Version(*version),
        };
        operations.iter().map(copy).collect()
    }

    #[test]
    fn guests_are_bounded_and_known_hosts_are_not_among_them() {
        let mut admission = Admission::new(own());
        let now = Instant::now();
        let member = Identity::ephemeral();
        admission.set_known([member.id()].into());
        let guests: Vec<Identity> = (0..MAX_GUESTS + 20).map(|_| Identity::ephemeral()).collect();
        let mut hosts = Vec::new();
        for guest in &guests {
            let (host, news) = news_of(guest, |_| {});
            hosts.push(host);
            filtered(&mut admission, vec![news], &[], now).unwrap();
        }
        // One gave way, and the others found no place.
        assert_eq!(filtered(&mut admission, vec![], &hosts, now), Ok((0, MAX_GUESTS)));
        assert!(!admission.is_named(&hosts[0]) && admission.is_named(&hosts[MAX_GUESTS]));
        let (host, news) = news_of(&member, |_| {});
        assert_eq!(filtered(&mut admission, vec![news], &[host], now), Ok((1, 1)));
        let (latest, news) = news_of(&guests[MAX_GUESTS + 19], |_| {});
        let later = now + EVICT_EVERY;
        assert_eq!(filtered(&mut admission, vec![news], &[latest, hosts[1]], later), Ok((1, 1)));
    }

    /// The state of chitchat: what messages have let in, until it is replaced. It forgets nothing here, as if all of it
    /// happened at once.
    #[derive(Default)]
    struct Inside(HashSet<Incarnation>);

    impl Inside {
        fn receive(
            &mut self,
            admission: &mut Admission,
            delta: Vec<HostDelta>,
            digest: &[Incarnation],
            now: Instant,
        ) {
            let mut exchange = Exchange::syn(digest.iter().map(|host| (*host, [1, 0, 0])).collect());
            exchange.delta = delta;
            admission.filter(&mut exchange, now).unwrap();
            self.0.extend(exchange.delta.iter().map(|delta| delta.host));
            self.0.extend(exchange.digest.iter().map(|(host, _)| *host));
            if admission.is_crowded() {
                self.0.retain(|host| !admission.is_superseded(host));
                admission.set_inside(self.0.clone());
            }
        }

        /// The size of the digest in bytes.
        fn digest(&self) -> usize {
            self.0.iter().map(entry_len).sum()
        }
    }

    /// Returns an admission that knows this number of hosts, none of which is in the state of chitchat.
    fn with_hosts(count: usize) -> (Admission, Inside, Vec<Identity>) {
        let mut admission = Admission::new(own());
        let hosts: Vec<Identity> = (0..count).map(|_| Identity::ephemeral()).collect();
        admission.set_known(hosts.iter().map(Identity::id).collect());
        (admission, Inside::default(), hosts)
    }

    #[test]
    fn digest_stays_small_when_all_hosts_are_restarted_again_and_again() {
        let (mut admission, mut inside, hosts) = with_hosts(100);
        let mut now = Instant::now();
        let mut former: Vec<Incarnation> = Vec::new();
        for restart in 0..1_000_u64 {
            now += RUN_EVERY / 50;
            let host = &hosts[restart as usize % hosts.len()];
            let (run, news) = news_of(host, |record| record.generation = 1 + restart);
            // Peers that have not noticed yet name all former runs, too.
            inside.receive(&mut admission, vec![news], &former, now);
            former.push(run);
        }
        assert!(
            inside.0.len() <= 100 + MAX_SUPERSEDED + 100 / HOSTS_PER_SUPERSEDED + 1,
            "{}",
            inside.0.len()
        );
        let latest: HashSet<Incarnation> = former[900..].iter().copied().collect();
        assert!(latest.is_subset(&inside.0));
    }

    #[test]
    fn rolling_upgrade_of_many_hosts_never_fills_the_digest() {
        let (mut admission, mut inside, hosts) = with_hosts(600);
        let now = Instant::now();
        for generation in 1..=2 {
            let at = now + RUN_EVERY * generation;
            for host in &hosts {
                let (_, news) = news_of(host, |record| record.generation = generation.into());
                inside.receive(&mut admission, vec![news], &[], at);
                assert!(inside.digest() <= MAX_DIGEST);
            }
        }
        let current = inside.0.iter().filter(|run| run.generation == 2).count();
        assert_eq!(current, 600, "each host is known in its later run");
    }

    #[test]
    fn hosts_for_which_there_is_no_room_are_left_out() {
        let mut admission = Admission::new(own());
        let mut inside = Inside::default();
        let room = MAX_DIGEST / entry_len(&own());
        for number in 0..room + 5 {
            let [.., high, low] = number.to_be_bytes();
            let host = Incarnation { node: NodeId([1, 2, 3, 4, 5, 6, 7, 8, high, low]), ..own() };
            let run = Run { name: host, record: String::new(), version: 1, since: Instant::now() };
            admission.runs.insert(host.node, vec![run]);
            inside.receive(&mut admission, Vec::new(), &[host], Instant::now());
        }
        assert_eq!((inside.0.len(), admission.inside()), (room, room));
        // chitchat forgets some of them.
        inside.0 = inside.0.iter().copied().take(room - 3).collect();
        admission.set_inside(inside.0.clone());
        let all: Vec<Incarnation> = admission.runs.values().map(|runs| runs[0].name).collect();
        inside.receive(&mut admission, Vec::new(), &all, Instant::now());
        assert_eq!(inside.0.len(), room);
    }

    #[test]
    fn later_run_with_a_lower_generation_is_named() {
        let mut admission = Admission::new(own());
        let identity = Identity::ephemeral();
        let now = Instant::now();
        let (high, news) = news_of(&identity, |record| record.generation = 50);
        assert_eq!(filtered(&mut admission, vec![news], &[high], now), Ok((1, 1)));
        let (low, news) = news_of(&identity, |record| record.generation = 5);
        assert_eq!(filtered(&mut admission, vec![news], &[low], now + RUN_EVERY), Ok((1, 1)));
        let (later, news) = news_of(&identity, |record| record.generation = 51);
        assert_eq!(
            filtered(&mut admission, vec![news], &[high, low, later], now + RUN_EVERY * 2),
            Ok((1, 1))
        );
    }

    #[test]
    fn runs_of_a_host_are_bounded() {
        let mut admission = Admission::new(own());
        let identity = Identity::ephemeral();
        let mut now = Instant::now();
        let mut latest = None;
        for generation in 1..50 {
            now += RUN_EVERY;
            let (host, news) = news_of(&identity, |record| record.generation = generation);
            assert_eq!(filtered(&mut admission, vec![news], &[host], now), Ok((1, 1)));
            latest = Some(host);
        }
        assert_eq!(admission.runs[&identity.id()].len(), MAX_RUNS);
        let (host, news) = news_of(&identity, |record| record.generation = 2);
        assert_eq!(filtered(&mut admission, vec![news], &[host, latest.unwrap()], now), Ok((0, 1)));
    }
}
