//! The socket and all that is shared around it: what is sent is sealed here, what arrives is
//! opened here and handed to whom it concerns.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chitchat::{ChitchatMessage, Deserializable, Serializable};
use ovl_control::GossipCounters;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::SignedRecord;
use tokio::io::ReadBuf;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::GossipEvent;
use super::book::{Book, Due};
use super::fragment::{Joiner, Splitter};
use super::packet::{Fragment, Packet};
use super::seal::{Opener, Refused, RunId, Sealer, Sender};
use super::strangers::Strangers;
use crate::keys::{self, ClusterKey, Keyring};
use crate::transport::Datagrams;

/// Announcements that wait for the engine, at most.
const MAX_QUEUE: usize = 1024;
/// Nodes whose last announcement is remembered, at most.
const MAX_ANNOUNCED: usize = 4096;
/// A sender that has not yet proved to be there is asked again after this time.
const CHALLENGE_EVERY: Duration = Duration::from_secs(1);

/// Sources of datagrams that are sealed with another key, and addresses that sealed with one of ours:
/// of each no more than this are remembered.
const MAX_ADDRESSES: usize = 1024;
/// How long such a source is remembered.
const OTHER_KEY_FOR: Duration = Duration::from_secs(10);

/// With which key to seal for whom, while there are several: whoever joins or comes back within a
/// rotation does not have the new one yet.
#[derive(Default)]
struct Towards {
    /// By what the hosts there say of their keys.
    known: HashMap<SocketAddr, ClusterKeyId>,
    /// By what last came from there.
    heard: HashMap<SocketAddr, ClusterKeyId>,
}

impl Towards {
    fn key(&self, to: SocketAddr, usual: ClusterKeyId) -> ClusterKeyId {
        let heard = self.heard.get(&to).copied();
        // Whoever seals with the usual one has it, whatever an old record says.
        if heard == Some(usual) {
            return usual;
        }
        self.known.get(&to).copied().or(heard).unwrap_or(usual)
    }

    fn heard(&mut self, from: SocketAddr, key: ClusterKeyId) {
        if self.heard.len() >= MAX_ADDRESSES && !self.heard.contains_key(&from) {
            self.heard.clear();
        }
        self.heard.insert(from, key);
    }
}

/// See the module.
pub(super) struct Hub {
    pub(super) node: NodeId,
    socket: Box<dyn Datagrams>,
    state: Mutex<State>,
    /// Wakes the monitor: something changed that it has to look at.
    pub(super) news: Notify,
}

/// What the lock protects.
pub(super) struct State {
    pub(super) book: Book,
    /// For the monitor to pass on.
    pub(super) queue: VecDeque<GossipEvent>,
    counters: GossipCounters,
    strangers: Strangers,
    /// One for each key; the first one is for all that need no other.
    sealers: Vec<Sealer>,
    towards: Towards,
    /// Who sends what is sealed with a key that we do not have.
    other_keys: HashMap<IpAddr, Instant>,
    opener: Opener,
    splitter: Splitter,
    joiner: Joiner,
    announced: HashMap<NodeId, SignedRecord>,
    inbox: Option<mpsc::Sender<(SocketAddr, ChitchatMessage)>>,
    datagram: Vec<u8>,
}

impl Hub {
    pub(super) fn new(
        socket: Box<dyn Datagrams>,
        node: NodeId,
        keyring: Arc<Keyring>,
        link_mtu: u16,
    ) -> anyhow::Result<Self> {
        let sealers = keyring.all().map(Sealer::new).collect::<anyhow::Result<Vec<_>>>()?;
        let [a, b, c, d, e, f, g, h, ..] = sealers.first().map(Sealer::run).unwrap_or_default();
        let state = State {
            // Random, and used by nobody else.
            book: Book::new(link_mtu, u64::from_be_bytes([a, b, c, d, e, f, g, h])),
            queue: VecDeque::new(),
            counters: GossipCounters::default(),
            strangers: Strangers::default(),
            sealers,
            towards: Towards::default(),
            other_keys: HashMap::new(),
            opener: Opener::new(keyring),
            splitter: Splitter::new()?,
            joiner: Joiner::default(),
            announced: HashMap::new(),
            inbox: None,
            datagram: Vec::new(),
        };
        Ok(Self { node, socket, state: Mutex::new(state), news: Notify::new() })
    }

    /// Never held across an await.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counters(&self) -> GossipCounters {
        let state = self.lock();
        GossipCounters { strangers: state.strangers.recent(), ..state.counters.clone() }
    }

    /// Seals with the first of these keys from now on, or with another one where `known` says so, and
    /// opens with all of them.
    pub(super) fn set_keys(
        &self,
        keyring: Arc<Keyring>,
        known: HashMap<SocketAddr, ClusterKeyId>,
    ) -> anyhow::Result<()> {
        let mut guard = self.lock();
        let state = &mut *guard;
        // A run whose key stays goes on: peers have seen that it is there.
        let lacking = keyring.all().filter(|key| state.sealer_of(key.id()).is_none());
        let new = lacking.map(Sealer::new).collect::<anyhow::Result<Vec<_>>>()?;
        state.sealers.extend(new);
        let order: Vec<ClusterKeyId> = keyring.all().map(ClusterKey::id).collect();
        state.sealers.retain(|sealer| order.contains(&sealer.key_id()));
        state.sealers.sort_by_key(|sealer| order.iter().position(|id| *id == sealer.key_id()));
        state.towards.known = known;
        if keyring.ids().opens.is_empty() {
            state.towards = Towards::default();
        }
        state.opener.set_keyring(keyring);
        Ok(())
    }

    /// Where datagrams came from lately that are sealed with a key that we do not have.
    pub(super) fn other_keys(&self) -> Vec<IpAddr> {
        let mut state = self.lock();
        state.other_keys.retain(|_, at| at.elapsed() < OTHER_KEY_FOR);
        state.other_keys.keys().copied().collect()
    }

    /// Where messages for chitchat go from now on.
    pub(super) fn set_inbox(&self, inbox: mpsc::Sender<(SocketAddr, ChitchatMessage)>) {
        self.lock().inbox = Some(inbox);
    }

    /// Sends now or never: a datagram that the kernel has no room for is lost like any other.
    pub(super) fn send(&self, to: SocketAddr, packet: &Packet) {
        let sent = self.lock().send(&*self.socket, to, packet);
        if let Err(error) = sent {
            debug!(%to, %error, "not sent");
        }
    }

    pub(super) fn send_chitchat(&self, to: SocketAddr, message: &ChitchatMessage) {
        let bytes = message.serialize_to_vec();
        let length = bytes.len();
        let mut state = self.lock();
        let fragments = state.splitter.split(bytes);
        if fragments.is_empty() {
            warn!(%to, length, "a gossip message is too large to be sent: the cluster has too many hosts");
        }
        for fragment in fragments {
            if let Err(error) = state.send(&*self.socket, to, &Packet::Chitchat(fragment)) {
                debug!(%to, %error, "not sent");
                return;
            }
        }
    }

    /// Pings and probes that are due.
    pub(super) fn send_due(&self, due: Vec<Due>) {
        let mut state = self.lock();
        for due in due {
            match due {
                Due::Ping { to, nonce } => {
                    let ping = Packet::Ping { node: self.node, nonce };
                    if let Err(error) = state.send(&*self.socket, to, &ping) {
                        debug!(%to, %error, "no ping");
                    }
                }
                Due::Probe { node, to, nonce, size } => {
                    let probe = Packet::probe(nonce, size, to.ip());
                    match state.send(&*self.socket, to, &probe) {
                        Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {
                            state.book.too_big(node, size);
                        }
                        Err(error) => debug!(%to, %error, "no probe"),
                        Ok(()) => {}
                    }
                }
            }
        }
    }

    /// Reads for ever.
    pub(super) async fn receive(&self) {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let mut buffer = ReadBuf::new(&mut buffer);
            match poll_fn(|context| self.socket.poll_receive(context, &mut buffer)).await {
                Ok(from) => self.received(buffer.filled_mut(), from),
                Err(error) => {
                    // Of the link, not of the socket: it passes.
                    debug!(%error, "cannot receive");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    fn received(&self, datagram: &mut [u8], from: SocketAddr) {
        let now = Instant::now();
        let mut state = self.lock();
        let state = &mut *state;
        let (run, plain) = match state.opener.open(datagram) {
            Ok(opened) => opened,
            Err(Refused::Replayed) => {
                state.counters.dropped_replayed += 1;
                return;
            }
            Err(refused) => return state.stranger(from, refused, now),
        };
        if state.sealers.iter().any(|sealer| sealer.run() == run) {
            // One of the addresses to join is our own.
            return;
        }
        if state.sealers.len() > 1
            && let Some(key) = state.opener.key_of(&run)
        {
            state.towards.heard(from, key);
        }
        let Ok(packet) = Packet::decode(plain) else {
            state.counters.dropped_malformed += 1;
            return;
        };
        state.counters.received += 1;
        if let Packet::Pong { node, nonce } = packet {
            let expected = state.book.ponged(node, nonce, now);
            if state.opener.answered(&run, node, nonce, expected) {
                // Whoever was just seen to be there is alive: the monitor does not wait for its tick.
                self.news.notify_one();
            }
        }
        let sender = state.opener.sender(&run);
        let challenge = match sender {
            Sender::Proved(node) => {
                state.book.heard(node, now);
                None
            }
            Sender::Asked(at) if now.saturating_duration_since(at) < CHALLENGE_EVERY => None,
            Sender::Asked(_) | Sender::New => {
                let nonce = state.book.nonce();
                state.opener.ask(&run, nonce, now);
                Some(Packet::Ping { node: self.node, nonce })
            }
        };
        let answer = match packet {
            Packet::Chitchat(fragment) => {
                state.chitchat(run, fragment, from, now);
                None
            }
            Packet::Ping { nonce, .. } => Some(Packet::Pong { node: self.node, nonce }),
            Packet::Pong { .. } => None,
            Packet::Announce(signed) => {
                if state.announced(self.node, signed) {
                    self.news.notify_one();
                }
                None
            }
            Packet::Probe { nonce, .. } => Some(Packet::ProbeAck { nonce }),
            Packet::ProbeAck { nonce } => {
                if let Sender::Proved(node) = sender {
                    state.book.probed(node, nonce, now);
                    self.news.notify_one();
                }
                None
            }
        };
        for packet in [answer, challenge].into_iter().flatten() {
            if let Err(error) = state.send(&*self.socket, from, &packet) {
                debug!(%from, %error, "no answer");
            }
        }
    }
}

impl State {
    /// Drops what waits in vain.
    pub(super) fn expire(&mut self, now: Instant) {
        self.joiner.expire(now);
    }

    fn sealer_of(&self, key: ClusterKeyId) -> Option<usize> {
        self.sealers.iter().position(|sealer| sealer.key_id() == key)
    }

    fn send(&mut self, socket: &dyn Datagrams, to: SocketAddr, packet: &Packet) -> io::Result<()> {
        let plain = packet.encode().map_err(io::Error::other)?;
        let usual = self.sealers.first().map(Sealer::key_id).unwrap_or_default();
        let key = if self.sealers.len() > 1 { self.towards.key(to, usual) } else { usual };
        let at = self.sealer_of(key).unwrap_or_default();
        self.sealers
            .get_mut(at)
            .ok_or_else(|| io::Error::other("there is no key"))?
            .seal(&plain, &mut self.datagram)
            .ok_or_else(|| io::Error::other("the datagram cannot be sealed"))?;
        socket.send(&self.datagram, to)?;
        self.counters.sent += 1;
        Ok(())
    }

    fn stranger(&mut self, from: SocketAddr, refused: Refused, now: Instant) {
        self.counters.dropped_unauthenticated += 1;
        if refused == Refused::UnknownKey
            && (self.other_keys.len() < MAX_ADDRESSES || self.other_keys.contains_key(&from.ip()))
        {
            self.other_keys.insert(from.ip(), now);
        }
        if self.strangers.note(from.ip(), now) {
            let reason = match refused {
                Refused::UnknownKey => "it is sealed with another cluster key",
                Refused::BadSeal => "its seal is broken: it was damaged, or forged",
                Refused::Foreign => "it is not gossip of ours, or of another version",
                Refused::Replayed => "it was seen before",
            };
            warn!(source = %from, "a datagram is dropped: {reason} (said at most once a minute for a source)");
        }
    }

    fn chitchat(&mut self, run: RunId, fragment: Fragment, from: SocketAddr, now: Instant) {
        let message = match self.joiner.join(run, fragment, now) {
            Ok(None) => return,
            Ok(Some(bytes)) => {
                ChitchatMessage::deserialize(&mut bytes.as_slice()).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_owned()),
        };
        match message {
            // A full inbox loses the message, as the network might have.
            Ok(message) => {
                if self.inbox.as_ref().is_none_or(|inbox| inbox.try_send((from, message)).is_err()) {
                    debug!(%from, "chitchat does not keep up");
                }
            }
            Err(error) => {
                self.counters.dropped_malformed += 1;
                debug!(%from, %error, "malformed");
            }
        }
    }

    /// Whether this is news.
    fn announced(&mut self, own: NodeId, signed: SignedRecord) -> bool {
        // Everything is said three times: do not check signatures three times.
        let Ok(claimed) = signed.record() else {
            self.counters.dropped_malformed += 1;
            return false;
        };
        if claimed.id == own || self.announced.get(&claimed.id) == Some(&signed) {
            return false;
        }
        match keys::open_record(&signed) {
            Ok(record) if self.queue.len() < MAX_QUEUE => {
                if self.announced.len() >= MAX_ANNOUNCED {
                    self.announced.clear();
                }
                self.announced.insert(record.id, signed.clone());
                self.queue.push_back(GossipEvent::Announced { record, signed });
                true
            }
            Ok(_) => false,
            Err(error) => {
                self.counters.dropped_malformed += 1;
                debug!(%error, "announcement refused");
                false
            }
        }
    }
}
