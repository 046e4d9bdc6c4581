//! The hub of gossip: seals and sends packets, and opens received datagrams and dispatches their packets.

mod check;
mod elsewhere;
mod nat;
mod records;
mod tcp;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chitchat::{ChitchatMessage, Serializable};
use ovl_control::GossipCounters;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, SignedRecord, WireVersions};
use ovl_proto::wire;
use tokio::io::ReadBuf;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::admission::Admission;
use super::book::{Due, PeerBook};
use super::decode::{DecodeError, Exchange, Incarnation};
use super::ends::{Ends, Families};
use super::fragment::{Joiner, Splitter};
use super::packet::{Fragment, Packet};
use super::pair::{Agreement, PairStatement};
use super::rounds::Rounds;
use super::seal::{OpenError, Opener, RunId, Sender};
use super::sealing::Sealing;
use super::statement::{AgreementKey, Answer, Budget, Hints, SignedStatement, Statement};
use super::strangers::Strangers;
use super::{GossipConfig, GossipEvent, WallClock};
use crate::keys::{Identity, Keyring};
use crate::transport::Datagrams;
use tcp::TcpEnds;

/// The maximum number of announcements that wait for the daemon.
const MAX_QUEUE: usize = 1024;
/// The maximum number of senders that have just proved to be live and wait for gossip.
const MAX_PROVED: usize = 256;
/// The number of hosts from which on a host that has just proved to be live is gossiped with at once only if its record is
/// not known.
const GREETED_HOSTS: usize = 20;
/// The interval between challenges of a sender that has not answered one.
const CHALLENGE_EVERY: Duration = Duration::from_secs(1);

/// The maximum number of signatures a second that known senders cause: 1,000 take 7 % of a core. Only the first answer to
/// each run of a host, and those to unanswered pings, are signed.
const PEER_SIGNATURES: u32 = 1_000;
/// The maximum number of verifications of hints a second: 1,000 take 11 % of a core. 60 hosts that change ten times a
/// second need 600.
const PEER_VERIFICATIONS: u32 = 1_000;
/// The maximum number of signatures and verifications a second that senders cause which have proved nothing.
const STRANGER_SIGNATURES: u32 = 256;
/// The maximum number of pings of others that are passed on at once.
const MAX_RELAYS: usize = 256;
/// The maximum number of questions about NAT that are answered a second.
const CHECKS: u32 = 50;
/// The maximum number of hosts a second that this host tells, and is told, where another one behind NAT is seen.
const MEETINGS: u32 = 50;

/// The maximum number of remembered sources of datagrams with an unknown key, and of addresses that were introduced to.
const MAX_ADDRESSES: usize = 1024;
/// The time for which a source of datagrams with an unknown key is remembered.
const OTHER_KEY_FOR: Duration = Duration::from_secs(10);

/// A record that its host has sent itself, verified.
pub(super) struct Learned {
    /// The run that it names.
    pub(super) name: Incarnation,
    /// The signed record, as chitchat has it.
    pub(super) text: String,
    /// Its version in chitchat.
    pub(super) version: u64,
}

/// The socket and the state of gossip.
pub(super) struct Hub {
    pub(super) node: NodeId,
    identity: Arc<Identity>,
    agreement: Agreement,
    socket: Box<dyn Datagrams>,
    wall_clock: WallClock,
    state: Mutex<State>,
    /// Wakes the monitor after a change.
    pub(super) news: Notify,
}

/// The state that the lock protects.
pub(super) struct State {
    pub(super) book: PeerBook,
    pub(super) rounds: Rounds,
    /// Whether a record in the state of chitchat has changed since the monitor looked.
    changed: bool,
    pub(super) admission: Admission,
    /// Events that the monitor passes on.
    pub(super) queue: VecDeque<GossipEvent>,
    counters: GossipCounters,
    strangers: Strangers,
    sealing: Sealing,
    /// The sources of datagrams with an unknown key, and when the last one arrived.
    other_keys: HashMap<IpAddr, Instant>,
    opener: Opener,
    /// The position of the hints of the local host: the generation of its record, and the number of changes.
    sequence: (u64, u64),
    hints: Hints,
    /// The pings of other hosts that were passed on, and who asked for them. The oldest is first.
    relays: VecDeque<(u64, SocketAddr)>,
    signatures: Budget,
    verifications: Budget,
    strange_signatures: Budget,
    meetings: Budget,
    checks: Budget,
    trials: Budget,
    /// The questions for the own address that wait for an answer, each with the host that was asked.
    asked: HashMap<u64, SocketAddr>,
    /// Whether this host knocks.
    knocks: bool,
    ends: Ends,
    tcp: TcpEnds,
    /// Where the sockets of relayed datagrams of hosts behind NAT are seen from here.
    relay_ends: BTreeMap<NodeId, SocketAddr>,
    /// Where members have seen them.
    suggested: BTreeMap<NodeId, SocketAddr>,
    splitter: Splitter,
    joiner: Joiner,
    announced: HashMap<NodeId, SignedRecord>,
    /// The record of the local host.
    own_record: Option<SignedRecord>,
    /// When the local host has last introduced itself to an address.
    introduced: HashMap<SocketAddr, Instant>,
    /// The addresses of senders that have proved to be live, or have named a new host, since the monitor took them.
    proved: Vec<SocketAddr>,
    /// Records for chitchat.
    learned: Vec<Learned>,
    inbox: Option<mpsc::Sender<(SocketAddr, ChitchatMessage)>>,
    datagram: Vec<u8>,
}

impl Hub {
    pub(super) fn new(
        socket: Box<dyn Datagrams>,
        config: &GossipConfig,
        record: &NodeRecord,
    ) -> anyhow::Result<Self> {
        let keyring = Arc::clone(&config.keyring);
        let sealing = Sealing::new(&keyring)?;
        let (node, now) = (record.id, Instant::now());
        let state = State {
            book: PeerBook::new(record.link_mtu, now),
            rounds: Rounds::new(now),
            changed: true,
            admission: Admission::new(Incarnation {
                node,
                generation: record.generation,
                address: record.address,
            }),
            sequence: (record.generation, 0),
            hints: config.hints,
            relays: VecDeque::new(),
            signatures: Budget::new(PEER_SIGNATURES, now),
            verifications: Budget::new(PEER_VERIFICATIONS, now),
            strange_signatures: Budget::new(STRANGER_SIGNATURES, now),
            meetings: Budget::new(MEETINGS, now),
            checks: Budget::new(CHECKS, now),
            asked: HashMap::new(),
            knocks: false,
            ends: Ends::new(Families::of([config.listen].into_iter().chain(config.listen_also))),
            trials: Budget::new(elsewhere::TRIALS, now),
            tcp: TcpEnds::default(),
            relay_ends: BTreeMap::new(),
            suggested: BTreeMap::new(),
            queue: VecDeque::new(),
            counters: GossipCounters::default(),
            strangers: Strangers::default(),
            sealing,
            other_keys: HashMap::new(),
            opener: Opener::new(node, keyring),
            splitter: Splitter::new()?,
            joiner: Joiner::default(),
            announced: HashMap::new(),
            own_record: None,
            introduced: HashMap::new(),
            proved: Vec::new(),
            learned: Vec::new(),
            inbox: None,
            datagram: Vec::new(),
        };
        let (identity, wall_clock) = (Arc::clone(&config.identity), Arc::clone(&config.wall_clock));
        let agreement = Agreement::new(node)?;
        let (state, news) = (Mutex::new(state), Notify::new());
        Ok(Self { node, identity, agreement, socket, wall_clock, state, news })
    }

    /// Locks the state. The guard must not be held across an await.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counters(&self) -> GossipCounters {
        let state = self.lock();
        GossipCounters { strangers: state.strangers.recent(), ..state.counters.clone() }
    }

    /// Replaces the cluster keys, see [`super::Gossip::set_keys`].
    pub(super) fn set_keys(
        &self,
        keyring: Arc<Keyring>,
        known: HashMap<SocketAddr, ClusterKeyId>,
    ) -> anyhow::Result<()> {
        let mut state = self.lock();
        state.sealing.set_keys(&keyring, known)?;
        state.opener.set_keyring(keyring);
        Ok(())
    }

    /// The recent sources of datagrams with an unknown key.
    pub(super) fn other_keys(&self) -> Vec<IpAddr> {
        let mut state = self.lock();
        state.other_keys.retain(|_, at| at.elapsed() < OTHER_KEY_FOR);
        state.other_keys.keys().copied().collect()
    }

    /// Sets the channel for messages to chitchat.
    pub(super) fn set_inbox(&self, inbox: mpsc::Sender<(SocketAddr, ChitchatMessage)>) {
        self.lock().inbox = Some(inbox);
    }

    /// Sends a packet without waiting. If the send buffer is full, the datagram is lost.
    pub(super) fn send(&self, to: SocketAddr, packet: &Packet) {
        let sent = self.lock().send(&*self.socket, to, packet);
        if let Err(error) = sent {
            debug!(%to, %error, "cannot send a packet");
        }
    }

    /// Sets the hints of the local host, which are part of each pong.
    pub(super) fn set_hints(&self, hints: Hints) {
        let mut state = self.lock();
        if state.hints != hints {
            state.hints = hints;
            state.sequence.1 += 1;
        }
    }

    /// What the local host says of itself now.
    fn statement(&self, state: &State, answer: Option<Answer>, agreement: Option<AgreementKey>) -> Statement {
        let wall_ms = (self.wall_clock)();
        Statement { answer, sequence: state.sequence, hints: state.hints, wall_ms, agreement, ping: None }
    }

    /// Signs a statement. It cannot fail, because statements have a fixed size.
    fn sign(&self, statement: &Statement) -> Option<SignedStatement> {
        SignedStatement::sign(&self.identity, statement).ok()
    }

    /// Whether the first message of an exchange is sent to an address now.
    pub(super) fn permits_exchange(&self, to: SocketAddr) -> bool {
        let mut state = self.lock();
        let hosts = state.book.len();
        state.rounds.permits(to, hosts, Instant::now())
    }

    /// Sends the record of the local host to a host that may not know it.
    pub(super) fn introduce_self(&self, to: SocketAddr) {
        self.lock().introduce_self(&*self.socket, to);
    }

    /// Sends a message of chitchat in fragments.
    pub(super) fn send_chitchat(&self, to: SocketAddr, message: &ChitchatMessage) {
        let bytes = message.serialize_to_vec();
        let length = bytes.len();
        let mut state = self.lock();
        let fragments = state.splitter.split(bytes);
        if fragments.is_empty() {
            warn!(%to, length, "cannot send a gossip message: it is too large, because the cluster has too many hosts");
        }
        for fragment in fragments {
            if let Err(error) = state.send(&*self.socket, to, &Packet::Chitchat(fragment)) {
                debug!(%to, %error, "cannot send a fragment");
                return;
            }
        }
    }

    /// Sends pings and probes.
    pub(super) fn send_due(&self, due: Vec<Due>) {
        let mut state = self.lock();
        for due in due {
            match due {
                Due::PingFor { to, node, nonce } => {
                    if let Err(error) = state.send(&*self.socket, to, &Packet::PingFor { node, nonce }) {
                        debug!(%to, %error, "cannot send a request for a ping");
                    }
                }
                Due::Ping { to, nonce, pair, introduce } => {
                    if introduce {
                        state.introduce_self(&*self.socket, to);
                    }
                    let ping = match pair {
                        Some(pair) => Packet::PairPing { nonce, pair },
                        None => Packet::Ping { nonce },
                    };
                    if let Err(error) = state.send(&*self.socket, to, &ping) {
                        debug!(%to, %error, "cannot send a ping");
                    }
                }
                Due::Probe { node, to, nonce, size } => {
                    let Some(at) = state.way_to(to) else { continue };
                    let probe = Packet::probe(nonce, size, at.ip());
                    match state.send(&*self.socket, to, &probe) {
                        Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {
                            state.book.too_big(node, size);
                        }
                        Err(error) => debug!(%to, %error, "cannot send a path MTU probe"),
                        Ok(()) => {}
                    }
                }
            }
        }
    }

    /// Receives datagrams forever.
    pub(super) async fn receive(&self) {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let mut buffer = ReadBuf::new(&mut buffer);
            match poll_fn(|context| self.socket.poll_receive(context, &mut buffer)).await {
                Ok(from) => self.received(buffer.filled_mut(), from),
                Err(error) => {
                    // The error is about the link and temporary; the socket remains usable.
                    debug!(%error, "cannot receive a datagram");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    fn received(&self, datagram: &mut [u8], from: SocketAddr) {
        let now = Instant::now();
        let mut state = self.lock();
        let state = &mut *state;
        let (at, version) = (from, datagram.first().copied().unwrap_or_default());
        let (run, plain) = match state.opener.open(datagram) {
            Ok(opened) => opened,
            Err(OpenError::Replayed) => {
                state.counters.dropped_replayed += 1;
                return;
            }
            Err(refused) => return state.stranger(from, refused, now),
        };
        if state.sealing.is_own(run) {
            // One of the addresses to join is that of the local host.
            return;
        }
        let packet = (version == wire::version()).then(|| Packet::decode(plain));
        // It comes from another socket than that of gossip.
        let is_check = matches!(packet, Some(Ok(Packet::Check { .. })));
        let from =
            if is_check { at } else { state.name_of(&*self.socket, state.opener.sender(&run), at, now) };
        if state.sealing.selects()
            && let Some(key) = state.opener.key_of(&run)
        {
            state.sealing.heard(from, key);
        }
        let Some(packet) = packet else {
            return self.other_version(state, (version == wire::INTRODUCTION).then_some(plain), from, now);
        };
        let Ok(packet) = packet else {
            state.counters.dropped_malformed += 1;
            return;
        };
        state.counters.received += 1;
        let pinged = match &packet {
            Packet::Pong(signed) => {
                self.pong(state, run, signed, from, now);
                None
            }
            Packet::PairPong(made) => self.pair_pong(state, run, made, from, now),
            _ => None,
        };
        let sender = state.opener.sender(&run);
        state.note_udp(sender, at, now);
        let from = if is_check { at } else { state.name_of(&*self.socket, sender, at, now) };
        let challenge = match sender {
            Sender::Proved(_) => None,
            Sender::Asked(at) if now.saturating_duration_since(at) < CHALLENGE_EVERY => None,
            Sender::Asked(_) | Sender::New => state.challenge(&run, now),
        };
        let answer = pinged.or_else(|| self.answer(state, run, sender, packet, (from, at), now));
        for packet in [answer, challenge].into_iter().flatten() {
            state.reply(&*self.socket, (from, at), &packet);
        }
    }

    /// Handles a datagram that is not of the wire version that the local host speaks: an introduction, or what it cannot
    /// understand. The sender gets the record of the local host, so that each side can name the other.
    fn other_version(&self, state: &mut State, introduction: Option<&[u8]>, from: SocketAddr, now: Instant) {
        if let Some(plain) = introduction {
            let Ok(signed) = wire::decode_body::<SignedRecord>(plain) else {
                state.counters.dropped_malformed += 1;
                return;
            };
            let strange = signed.head().is_ok_and(|head| !head.wire.overlap(WireVersions::own()));
            if state.announced(self.node, signed, now) {
                self.news.notify_one();
            }
            if !strange {
                return;
            }
        } else {
            state.counters.dropped_malformed += 1;
        }
        if let Err(error) = state.introduce(&*self.socket, from, now) {
            debug!(%from, %error, "cannot send an introduction");
        }
    }

    /// Sets the record by which the local host introduces itself to hosts of other wire versions.
    pub(super) fn set_record(&self, record: SignedRecord) {
        self.lock().own_record = Some(record);
    }

    /// Handles a packet from a host that is known at `from`, and whose datagram came from `at`. Returns the reply.
    fn answer(
        &self,
        state: &mut State,
        run: RunId,
        sender: Sender,
        packet: Packet,
        (from, at): (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Option<Packet> {
        let proved = match sender {
            Sender::Proved(node) => Some(node),
            Sender::New | Sender::Asked(_) => None,
        };
        match packet {
            // Nothing is decoded from a sender that may be a recording. It gets a challenge, and once it has answered,
            // the monitor gossips with it.
            Packet::Chitchat(fragment) => {
                if proved.is_some() {
                    state.chitchat(run, fragment, from, now);
                }
                None
            }
            Packet::Ping { nonce } => {
                let budget =
                    if proved.is_some() { &mut state.signatures } else { &mut state.strange_signatures };
                if !budget.take(now) {
                    return None;
                }
                let answer = Some(Answer { nonce, run: state.sealing.run_to(from)? });
                let agreement = Some(self.agreement.public());
                self.sign(&self.statement(state, answer, agreement)).map(Packet::Pong)
            }
            Packet::PairPing { nonce, pair } => {
                let run_id = state.sealing.run_to(from)?;
                let known = |node: &NodeId| state.book.pair(*node).is_some_and(|shared| shared.id() == pair);
                let Some(node) = proved.filter(known) else {
                    // A run with another key, or none: it learns the key from a signed answer.
                    return self.answer(state, run, sender, Packet::Ping { nonce }, (from, at), now);
                };
                let ping = state.book.ping_along(node, now);
                let statement = self.statement(state, Some(Answer { nonce, run: run_id }), None);
                let statement = Statement { ping, ..statement };
                PairStatement::new(state.book.pair(node)?, &statement).ok().map(Packet::PairPong)
            }
            Packet::Pong(_) | Packet::PairPong(_) => None,
            Packet::Hints(signed) => {
                let (node, statement) = signed.claim()?;
                let fresh = proved == Some(node) && state.book.is_later(node, statement.sequence);
                if fresh && state.verifications.take(now) && signed.is_valid() {
                    state.book.take_hints(node, statement.sequence, statement.hints, now);
                    self.news.notify_one();
                }
                None
            }
            Packet::PingFor { node, nonce } => {
                if state.relays.iter().any(|(known, _)| *known == nonce) {
                    // It went in a circle.
                    return None;
                }
                let hops = state.book.towards(node, proved?, now);
                if hops.is_empty() {
                    return None;
                }
                if state.relays.len() >= MAX_RELAYS {
                    state.relays.pop_front();
                }
                state.relays.push_back((nonce, from));
                if let Some(asker) = proved
                    && hops.iter().any(|(hop, _)| *hop == node)
                {
                    state.introduce_both(&*self.socket, (asker, node), now);
                }
                for (hop, to) in hops {
                    let ping =
                        if hop == node { Packet::Ping { nonce } } else { Packet::PingFor { node, nonce } };
                    if let Err(error) = state.send(&*self.socket, to, &ping) {
                        debug!(%to, %error, "cannot pass on a ping");
                    }
                }
                None
            }
            Packet::Relayed(signed) => {
                let (node, statement) = signed.claim()?;
                let nonce = statement.answer?.nonce;
                if state.pass_on(&*self.socket, nonce, &signed) {
                    return None;
                }
                if state.book.take_relayed(node, nonce) && signed.is_valid() {
                    if let Some(by) = proved {
                        state.book.reached_through(node, by, now);
                    }
                    let news = state.book.proved(node, now);
                    state.book.take_clock(node, statement.wall_ms, now);
                    if state.book.take_hints(node, statement.sequence, statement.hints, now) || news {
                        self.news.notify_one();
                    }
                }
                None
            }
            Packet::Meet { .. }
            | Packet::Seek { .. }
            | Packet::WhereAmI { .. }
            | Packet::SeenAt { .. }
            | Packet::Knock { .. } => self.answer_about_nat(state, packet, proved, at, now),
            Packet::Check { .. } | Packet::CheckFor { .. } => {
                self.answer_check(state, packet, (proved?, at), now);
                None
            }
            // Such a probe is not gossip, and such an answer is for another socket.
            Packet::RelayProbe { .. } | Packet::RelayFollow { .. } | Packet::Checked { .. } => None,
            Packet::Try { .. } | Packet::Tried { .. } => {
                state.answer_try(&*self.socket, packet, (proved?, from, at), now);
                None
            }
            Packet::Announce(signed) => {
                let mut news = state.announced(self.node, signed, now);
                if let Some(node) = proved {
                    news |= state.take_announced(node, now);
                }
                if news {
                    self.news.notify_one();
                }
                None
            }
            Packet::Probe { nonce, .. } => Some(Packet::ProbeAck { nonce }),
            Packet::ProbeAck { nonce } => {
                if let Some(node) = proved {
                    state.book.probed(node, nonce, now);
                    self.news.notify_one();
                }
                None
            }
        }
    }

    /// Handles a pong: it proves that its sender is alive, or is passed on to the host that asked for it.
    fn pong(&self, state: &mut State, run: RunId, signed: &SignedStatement, from: SocketAddr, now: Instant) {
        let Some((node, statement)) = signed.claim() else { return };
        let Statement { answer: Some(answer), agreement, .. } = statement else { return };
        if answer.run != run {
            return;
        }
        let pinged = state.book.take_ping(node, answer.nonce);
        let challenged = state.opener.take_challenge(&run, answer.nonce);
        if pinged.is_none() && !challenged {
            state.pass_on(&*self.socket, answer.nonce, signed);
            return;
        }
        if !signed.is_valid() {
            state.counters.dropped_malformed += 1;
            return;
        }
        if !agreement.is_some_and(|key| state.book.pair(node).is_some_and(|pair| pair.is_with(&key))) {
            state.book.set_pair(node, agreement.and_then(|key| self.agreement.pair(node, key)));
        }
        self.believe(state, (run, node), &statement, pinged, from, now);
    }

    /// Handles the answer to a ping of the local host that is authenticated with the key of the two. Returns the answer to the
    /// ping that came along.
    fn pair_pong(
        &self,
        state: &mut State,
        run: RunId,
        made: &PairStatement,
        from: SocketAddr,
        now: Instant,
    ) -> Option<Packet> {
        let Sender::Proved(node) = state.opener.sender(&run) else { return None };
        let pair = state.book.pair(node)?;
        let Some((statement, answer)) = made.open(pair).and_then(|made| Some((made, made.answer?))) else {
            state.counters.dropped_malformed += 1;
            return None;
        };
        if answer.run != run {
            return None;
        }
        let sent = state.book.take_ping(node, answer.nonce)?;
        self.believe(state, (run, node), &statement, Some(sent), from, now);
        let answer = Answer { nonce: statement.ping?, run: state.sealing.run_to(from)? };
        let answer = self.statement(state, Some(answer), None);
        PairStatement::new(state.book.pair(node)?, &answer).ok().map(Packet::PairPong)
    }

    /// Takes what a host says of itself in an authenticated answer to a ping, which was sent at `pinged`, or to a challenge.
    fn believe(
        &self,
        state: &mut State,
        (run, node): (RunId, NodeId),
        statement: &Statement,
        pinged: Option<Instant>,
        from: SocketAddr,
        now: Instant,
    ) {
        if let Some(sent) = pinged {
            state.book.answered(node, sent, now);
        }
        state.book.take_clock(node, statement.wall_ms, now);
        let mut news = state.book.proved(node, now);
        news |= state.book.take_hints(node, statement.sequence, statement.hints, now);
        if state.opener.prove(&run, node) {
            state.take_announced(node, now);
            // In a large cluster, one exchange with each host that is known already would be as much as all others.
            let greet = state.book.len() < GREETED_HOSTS || !state.admission.knows(node);
            if greet && state.proved.len() < MAX_PROVED {
                state.proved.push(from);
            }
            news = true;
        }
        if news {
            // The monitor need not wait for its tick.
            self.news.notify_one();
        }
    }
}

impl State {
    /// Passes a pong on to the host that asked for it. Returns whether one did.
    fn pass_on(&mut self, socket: &dyn Datagrams, nonce: u64, signed: &SignedStatement) -> bool {
        let Some(at) = self.relays.iter().position(|(known, _)| *known == nonce) else { return false };
        if let Some((_, to)) = self.relays.remove(at)
            && let Err(error) = self.send(socket, to, &Packet::Relayed(signed.clone()))
        {
            debug!(%to, %error, "cannot pass on a pong");
        }
        true
    }

    /// Takes the addresses of senders that have proved to be live since the last call.
    pub(super) fn take_proved(&mut self) -> Vec<SocketAddr> {
        std::mem::take(&mut self.proved)
    }

    /// Notes that a record in the state of chitchat has changed.
    pub(super) fn stir(&mut self, now: Instant) {
        self.rounds.stir(now);
        self.changed = true;
    }

    /// Whether a record in the state of chitchat has changed since the last call.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Takes the records that hosts have sent themselves since the last call, for chitchat.
    pub(super) fn take_learned(&mut self) -> Vec<Learned> {
        std::mem::take(&mut self.learned)
    }

    /// Drops incomplete messages that are too old.
    pub(super) fn expire(&mut self, now: Instant) {
        self.joiner.expire(now);
        let Self { book, ends, tcp, suggested, .. } = self;
        ends.retain(|host| book.address(host).is_some());
        tcp.retain(|host| book.address(host).is_some());
        suggested.retain(|host, _| book.address(*host).is_some());
    }

    /// A challenge to a sender that has proved nothing. `None` if there are too many of them.
    fn challenge(&mut self, run: &RunId, now: Instant) -> Option<Packet> {
        let nonce = self.book.nonce()?;
        if !self.strange_signatures.take(now) {
            return None;
        }
        self.opener.ask(run, nonce, now);
        Some(Packet::Ping { nonce })
    }

    fn send(&mut self, socket: &dyn Datagrams, to: SocketAddr, packet: &Packet) -> io::Result<()> {
        let plain = packet.encode().map_err(io::Error::other)?;
        let receiver = self.book.live_at(to);
        self.send_plain(socket, to, (wire::version(), &plain), receiver)
    }

    fn send_plain(
        &mut self,
        socket: &dyn Datagrams,
        to: SocketAddr,
        plain: (u8, &[u8]),
        receiver: Option<NodeId>,
    ) -> io::Result<()> {
        let unheard = || {
            let why = "it is behind NAT and was not heard, or has no address of this host's family";
            io::Error::new(io::ErrorKind::HostUnreachable, why)
        };
        let at = self.way_to(to).ok_or_else(unheard)?;
        self.send_sealed(socket, (to, at), plain, receiver)
    }

    /// Seals a datagram for a host that is known by the first address, and sends it to the second one.
    fn send_sealed(
        &mut self,
        socket: &dyn Datagrams,
        (to, at): (SocketAddr, SocketAddr),
        plain: (u8, &[u8]),
        receiver: Option<NodeId>,
    ) -> io::Result<()> {
        self.sealing.seal(to, plain, receiver, &mut self.datagram)?;
        socket.send(&self.datagram, at)?;
        self.counters.sent += 1;
        Ok(())
    }

    /// Counts and logs a datagram that could not be opened.
    fn stranger(&mut self, from: SocketAddr, refused: OpenError, now: Instant) {
        self.counters.dropped_unauthenticated += 1;
        if refused == OpenError::UnknownKey
            && (self.other_keys.len() < MAX_ADDRESSES || self.other_keys.contains_key(&from.ip()))
        {
            self.other_keys.insert(from.ip(), now);
        }
        if self.strangers.note(from.ip(), now) {
            let reason = match refused {
                OpenError::UnknownKey => "it is sealed with an unknown cluster key",
                OpenError::BadSeal => "its seal is invalid: it was damaged or forged",
                OpenError::Foreign => "it is not gossip",
                OpenError::Replayed => "it was received before",
            };
            warn!(source = %from, "dropped a gossip datagram: {reason} (logged at most once a minute per source)");
        }
    }

    fn chitchat(&mut self, run: RunId, fragment: Fragment, from: SocketAddr, now: Instant) {
        let message = match self.joiner.join(run, fragment, now) {
            Ok(None) => return,
            Ok(Some(bytes)) => self.exchange(&bytes, from, now).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_owned()),
        };
        match message {
            // If the inbox is full, the message is lost, as on the network.
            Ok(message) => {
                if self.inbox.as_ref().is_none_or(|inbox| inbox.try_send((from, message)).is_err()) {
                    debug!(%from, "dropped a gossip message: the inbox of chitchat is full");
                }
            }
            Err(error) => {
                self.counters.dropped_malformed += 1;
                debug!(%from, %error, "dropped a malformed gossip message");
            }
        }
    }

    /// Decodes a message for chitchat, within what its sender may say.
    fn exchange(
        &mut self,
        bytes: &[u8],
        from: SocketAddr,
        now: Instant,
    ) -> Result<ChitchatMessage, DecodeError> {
        let mut exchange = Exchange::decode(bytes)?;
        // chitchat learns of a host by a digest, and only then takes its record. So gossip again at once.
        if self.admission.filter(&mut exchange, now)? && self.proved.len() < MAX_PROVED {
            self.proved.push(from);
        }
        exchange.into_message()
    }
}
