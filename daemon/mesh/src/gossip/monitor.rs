//! Converts the state of chitchat to events: the latest record of each host, its hints, and its liveness.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chitchat::{Chitchat, ChitchatId};
use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, SignedRecord};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::warn;

use super::GossipEvent;
use super::admission::KEY_RECORD;
use super::cluster::{Cluster, name_of};
use super::hub::Hub;
use super::statement::{Budget, Hints};
use crate::keys::{self, RecordError};

/// The time after which two live generations of a host are a clash. It is longer than the old generation of a
/// restarted host can seem alive.
const CLASH_AFTER: Duration = Duration::from_secs(15);
const CLASH_EVERY: Duration = Duration::from_secs(10);
/// The maximum gap between ticks. After a longer one this process was suspended, and its liveness data is stale.
const MAX_TICK_GAP: Duration = Duration::from_secs(1);
/// The maximum number of hosts a second with which gossip begins at once because they have just proved to be live. What
/// the others have to tell comes with the rounds.
const GREETINGS: u32 = 10;
/// With more hosts than this, there is a pause between two scans.
const FEW_HOSTS: usize = 20;
/// How often the state of chitchat is looked at while it tells of no change. Heartbeats, of which it does not tell, only
/// make this host ping others.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The pause, for each host: 15 ms with 60 hosts.
const PAUSE_EACH: Duration = Duration::from_micros(250);
/// The time after a suspension in which no host is declared dead.
const RECOVERY: Duration = Duration::from_secs(2);

/// Sends events until their receiver is dropped.
pub(super) async fn run(hub: Arc<Hub>, cluster: Arc<Cluster>, events: mpsc::Sender<GossipEvent>) {
    let mut monitor = Monitor::default();
    let mut last = Instant::now();
    let mut trust_from = last;
    let mut greetings = Budget::new(GREETINGS, last);
    loop {
        hub.news.notified().await;
        let now = Instant::now();
        let (proved, learned) = {
            let mut state = hub.lock();
            (state.take_proved(), state.take_learned())
        };
        if !learned.is_empty() {
            cluster.learn(learned).await;
        }
        proved.into_iter().filter(|_| greetings.take(now)).for_each(|to| cluster.gossip(to));
        if now.saturating_duration_since(last) > MAX_TICK_GAP {
            trust_from = now + RECOVERY;
        }
        last = now;
        let mut news = Vec::new();
        if monitor.is_due(hub.lock().take_changed(), now) {
            cluster.with(|chitchat| monitor.look(chitchat, &hub, now, &mut news)).await;
            if hub.lock().admission.is_crowded() {
                cluster.forget_superseded().await;
            }
        }
        monitor.judge(&hub, now, now >= trust_from, &mut news);
        {
            let mut state = hub.lock();
            news.extend(state.queue.drain(..));
            let mtus = state.book.new_mtus();
            news.extend(mtus.into_iter().map(|(node, mtu)| GossipEvent::PathMtu { node, mtu }));
        }
        for event in news {
            if events.send(event).await.is_err() {
                return;
            }
        }
        // Each scan looks at all hosts. When many start at once, there is news all the time.
        let hosts = hub.lock().book.len();
        if hosts > FEW_HOSTS {
            tokio::time::sleep(PAUSE_EACH * u32::try_from(hosts).unwrap_or(u32::MAX)).await;
        }
        // Time that the receiver of events needed is not a suspension.
        last = last.max(Instant::now());
    }
}

#[derive(Default)]
struct Monitor {
    seen: BTreeMap<ChitchatId, SeenGeneration>,
    /// When the state of chitchat was last looked at.
    looked: Option<Instant>,
    reported: BTreeMap<NodeId, ReportedPeer>,
    clashes: BTreeMap<NodeId, (Instant, Option<Instant>)>,
}

/// A generation of a host in the state of chitchat.
struct SeenGeneration {
    /// `None` if chitchat has a name that no host has.
    node: Option<NodeId>,
    version: u64,
    /// Whether chitchat considers it alive. Any host with the cluster key can forge that.
    live: bool,
    record: Option<(NodeRecord, SignedRecord)>,
    scan: Instant,
}

/// The last event about a peer.
#[derive(PartialEq)]
struct ReportedPeer {
    signed: SignedRecord,
    hints: Hints,
    alive: bool,
}

impl Monitor {
    /// Whether to look at the state of chitchat, which `changed` or may have.
    fn is_due(&self, changed: bool, now: Instant) -> bool {
        changed || self.looked.is_none_or(|at| now.saturating_duration_since(at) >= LOOK_EVERY)
    }

    /// Looks at the state of chitchat.
    fn look(&mut self, chitchat: &mut Chitchat, hub: &Hub, now: Instant, events: &mut Vec<GossipEvent>) {
        self.looked = Some(now);
        let own = chitchat.self_chitchat_id().clone();
        let live: HashSet<&ChitchatId> = chitchat.live_nodes().collect();
        for (id, state) in chitchat.node_states() {
            let version = state.max_version();
            let seen = self.seen.get_mut(id);
            if let Some(seen) = seen
                && seen.version == version
            {
                seen.live = live.contains(id);
                seen.scan = now;
                continue;
            }
            let text = state.get(KEY_RECORD).filter(|_| *id != own);
            let record = text.and_then(|text| self.read(id, text, hub, events));
            let node = id.node_id.parse().ok();
            let seen = SeenGeneration { node, version, live: live.contains(id), record, scan: now };
            self.seen.insert(id.clone(), seen);
        }
        let before = self.seen.len();
        self.seen.retain(|_, seen| seen.scan == now);
        if self.seen.len() != before {
            let present: HashSet<NodeId> = self.seen.values().filter_map(|seen| seen.node).collect();
            self.clashes.retain(|node, _| present.contains(node));
            let gone = self.reported.keys().filter(|node| !present.contains(node));
            for node in gone.copied().collect::<Vec<_>>() {
                self.reported.remove(&node);
                hub.lock().book.unlist(node);
                events.push(GossipEvent::Gone(node));
            }
        }
        let mut state = hub.lock();
        // All that chitchat has was let in, so it has all of it if it has as much. It has this host besides.
        if state.admission.inside() != self.seen.len().saturating_sub(1) {
            let inside = self.seen.keys().filter(|id| **id != own).filter_map(name_of).collect();
            state.admission.set_inside(inside);
        }
    }

    /// Adds the events since the last call.
    fn judge(&mut self, hub: &Hub, now: Instant, trust: bool, events: &mut Vec<GossipEvent>) {
        let ids = self.seen.iter().filter_map(|(id, seen)| Some((seen.node?, id, seen)));
        let ids: Vec<(NodeId, &ChitchatId, &SeenGeneration)> = ids.collect();
        // The generations of a host are adjacent, because the ids are sorted by their text.
        for group in ids.chunk_by(|one, other| one.0 == other.0) {
            let Some(&(node, ..)) = group.first() else { continue };
            clash(&mut self.clashes, node, group, now, events);
            if node != hub.node {
                report(&mut self.reported, node, group, hub, now, trust, events);
            }
        }
    }

    /// Decodes and verifies the record of a host. `None` if it is invalid, not understood or of another host. A record
    /// that was verified before is not verified again.
    fn read(
        &self,
        id: &ChitchatId,
        text: &str,
        hub: &Hub,
        events: &mut Vec<GossipEvent>,
    ) -> Option<(NodeRecord, SignedRecord)> {
        let signed = match SignedRecord::from_text(text) {
            Ok(signed) => signed,
            Err(error) => {
                warn!(node = %id.node_id, %error, "cannot decode the record of a host in gossip");
                return None;
            }
        };
        if let Some(SeenGeneration { record: Some((record, known)), .. }) = self.seen.get(id)
            && *known == signed
        {
            return Some((record.clone(), signed));
        }
        let node = id.node_id.parse();
        let verified = node.is_ok_and(|node| hub.lock().admission.has_record(node, text));
        let opened = if verified { keys::reopen_record(&signed) } else { keys::open_record(&signed) };
        match opened {
            Ok(record) if record.id.to_string() == *id.node_id => Some((record, signed)),
            Ok(record) => {
                warn!(node = %id.node_id, record = %record.id, "rejected a record in gossip: it is of another host");
                None
            }
            Err(RecordError::NotUnderstood { head, why }) => {
                events.push(GossipEvent::NotUnderstood { head, signed, why });
                None
            }
            Err(error) => {
                warn!(node = %id.node_id, %error, "rejected an invalid record in gossip");
                None
            }
        }
    }
}

/// Adds an event about the latest generation of a peer, if it differs from the last event.
fn report(
    reported: &mut BTreeMap<NodeId, ReportedPeer>,
    node: NodeId,
    group: &[(NodeId, &ChitchatId, &SeenGeneration)],
    hub: &Hub,
    now: Instant,
    trust: bool,
    events: &mut Vec<GossipEvent>,
) {
    let readable = group.iter().filter_map(|(_, id, seen)| Some((id, seen, seen.record.as_ref()?)));
    // By the order in the record first, because it is signed.
    let latest = readable
        .max_by_key(|(id, _, (record, _))| (record.order(), id.generation_id, id.gossip_advertise_addr));
    let Some((_, seen, (record, signed))) = latest else { return };
    let before = reported.get(&node);
    let mut state = hub.lock();
    let mut alive = state.book.is_alive(node, now);
    let hints = state.book.hints(node);
    if !alive && !trust && before.is_some_and(|before| before.alive) {
        alive = true;
    }
    state.book.list(node, record.address, record.link_mtu, (alive, seen.live), now);
    let news = before.is_none_or(|told| told.alive != alive || told.hints != hints || told.signed != *signed);
    if news {
        reported.insert(node, ReportedPeer { signed: signed.clone(), hints, alive });
        let (record, signed) = (record.clone(), signed.clone());
        events.push(GossipEvent::Peer { record, signed, hints, alive });
    }
}

/// Adds an event if two generations of a host are alive: two daemons run with the same identity.
fn clash(
    clashes: &mut BTreeMap<NodeId, (Instant, Option<Instant>)>,
    node: NodeId,
    group: &[(NodeId, &ChitchatId, &SeenGeneration)],
    now: Instant,
    events: &mut Vec<GossipEvent>,
) {
    let mut live = group.iter().filter(|(_, _, seen)| seen.live).map(|(_, id, _)| *id);
    let one = live.next();
    // Two daemons cannot run at one address: the older generation there is that of a restarted daemon.
    let other =
        live.find(|other| one.is_none_or(|one| one.gossip_advertise_addr != other.gossip_advertise_addr));
    let (Some(one), Some(other)) = (one, other) else {
        clashes.remove(&node);
        return;
    };
    let (since, said) = clashes.entry(node).or_insert((now, None));
    let late = now.saturating_duration_since(*since) >= CLASH_AFTER;
    if late && said.is_none_or(|said| now.saturating_duration_since(said) >= CLASH_EVERY) {
        *said = Some(now);
        let addresses: [SocketAddr; 2] = [one.gossip_advertise_addr, other.gossip_advertise_addr];
        events.push(GossipEvent::Clash {
            node,
            addresses,
            generations: [one.generation_id, other.generation_id],
        });
    }
}
