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
    /// The peers among `seen`, each with its latest record.
    peers: BTreeMap<NodeId, Latest>,
    /// Hosts of which two generations at different addresses are alive.
    clashes: BTreeMap<NodeId, Clash>,
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

/// The latest readable record of a peer, and what the last event about it said.
struct Latest {
    record: NodeRecord,
    signed: SignedRecord,
    /// Whether chitchat considers this generation alive.
    hinted: bool,
    /// Whether an event had this record.
    told: bool,
    hints: Hints,
    alive: bool,
}

struct Clash {
    addresses: [SocketAddr; 2],
    generations: [u64; 2],
    since: Instant,
    /// When there was last an event about it.
    said: Option<Instant>,
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
        let mut changed = false;
        for (id, state) in chitchat.node_states() {
            let version = state.max_version();
            let seen = self.seen.get_mut(id);
            if let Some(seen) = seen
                && seen.version == version
            {
                let is_live = live.contains(id);
                changed |= seen.live != is_live;
                (seen.live, seen.scan) = (is_live, now);
                continue;
            }
            changed = true;
            let text = state.get(KEY_RECORD).filter(|_| *id != own);
            let record = text.and_then(|text| self.read(id, text, hub, events));
            let node = id.node_id.parse().ok();
            let seen = SeenGeneration { node, version, live: live.contains(id), record, scan: now };
            self.seen.insert(id.clone(), seen);
        }
        let before = self.seen.len();
        self.seen.retain(|_, seen| seen.scan == now);
        if self.seen.len() != before {
            changed = true;
            let present: HashSet<NodeId> = self.seen.values().filter_map(|seen| seen.node).collect();
            for (node, _) in self.peers.extract_if(.., |node, _| !present.contains(node)) {
                hub.lock().book.unlist(node);
                events.push(GossipEvent::Gone(node));
            }
        }
        if changed {
            self.group(hub.node, now);
        }
        let mut state = hub.lock();
        // All that chitchat has was let in, so it has all of it if it has as much. It has this host besides.
        if state.admission.inside() != self.seen.len().saturating_sub(1) {
            let inside = self.seen.keys().filter(|id| **id != own).filter_map(name_of).collect();
            state.admission.set_inside(inside);
        }
    }

    /// Finds the latest record of each peer, and the clashes, among the generations that were seen.
    fn group(&mut self, own: NodeId, now: Instant) {
        let Self { seen, peers, clashes, .. } = self;
        let before = std::mem::take(clashes);
        let ids: Vec<_> = seen.iter().filter_map(|(id, seen)| Some((seen.node?, id, seen))).collect();
        // The generations of a host are adjacent, because the ids are sorted by their text.
        for group in ids.chunk_by(|one, other| one.0 == other.0) {
            let Some(&(node, ..)) = group.first() else { continue };
            if let Some(clash) = clash(group, before.get(&node), now) {
                clashes.insert(node, clash);
            }
            let readable = group.iter().filter_map(|(_, id, seen)| Some((id, seen, seen.record.as_ref()?)));
            // By the order in the record first, because it is signed.
            let latest = readable.max_by_key(|(id, _, (record, _))| {
                (record.order(), id.generation_id, id.gossip_advertise_addr)
            });
            let Some((_, seen, (record, signed))) = latest.filter(|_| node != own) else { continue };
            let known = peers.get_mut(&node);
            if let Some(known) = known {
                known.hinted = seen.live;
                if known.signed != *signed {
                    (known.record, known.signed, known.told) = (record.clone(), signed.clone(), false);
                }
                continue;
            }
            let (record, signed) = (record.clone(), signed.clone());
            let (hints, alive) = (Hints::default(), false);
            peers.insert(node, Latest { record, signed, hinted: seen.live, told: false, hints, alive });
        }
    }

    /// Adds the events since the last call.
    fn judge(&mut self, hub: &Hub, now: Instant, trust: bool, events: &mut Vec<GossipEvent>) {
        for (node, clash) in &mut self.clashes {
            let late = now.saturating_duration_since(clash.since) >= CLASH_AFTER;
            if late && clash.said.is_none_or(|said| now.saturating_duration_since(said) >= CLASH_EVERY) {
                clash.said = Some(now);
                let Clash { addresses, generations, .. } = *clash;
                events.push(GossipEvent::Clash { node: *node, addresses, generations });
            }
        }
        let mut state = hub.lock();
        for (&node, peer) in &mut self.peers {
            let alive = state.book.is_alive(node, now) || (peer.alive && !trust);
            let hints = state.book.hints(node);
            let record = &peer.record;
            let inside = SocketAddr::new(record.vtep, record.address.port());
            let at = (record.address, record.is_behind_nat().then_some(inside));
            state.book.list(node, at, record.link_mtu, (alive, peer.hinted), now);
            state.set_addresses(node, (record.address, &record.further), now);
            if !peer.told || peer.alive != alive || peer.hints != hints {
                (peer.told, peer.hints, peer.alive) = (true, hints, alive);
                let (record, signed) = (peer.record.clone(), peer.signed.clone());
                events.push(GossipEvent::Peer { record, signed, hints, alive });
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

/// Two live generations of a host, whose daemons therefore run with the same identity. `None` if there are no two.
fn clash(
    group: &[(NodeId, &ChitchatId, &SeenGeneration)],
    before: Option<&Clash>,
    now: Instant,
) -> Option<Clash> {
    let mut live = group.iter().filter(|(_, _, seen)| seen.live).map(|(_, id, _)| *id);
    let one = live.next()?;
    // Two daemons cannot run at one address: the older generation there is that of a restarted daemon.
    let other = live.find(|other| one.gossip_advertise_addr != other.gossip_advertise_addr)?;
    Some(Clash {
        addresses: [one.gossip_advertise_addr, other.gossip_advertise_addr],
        generations: [one.generation_id, other.generation_id],
        since: before.map_or(now, |before| before.since),
        said: before.and_then(|before| before.said),
    })
}
