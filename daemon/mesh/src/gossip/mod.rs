//! Gossip: the exchange of sealed datagrams that spreads each host's record and detects silent hosts.
//!
//! | module | content |
//! | --- | --- |
//! | [`seal`], [`replay`] | encryption, authentication and replay protection of datagrams |
//! | [`packet`], [`fragment`], [`decode`] | the plaintext of datagrams |
//! | [`decompress`] | decompression with a limit |
//! | [`hub`] | the dispatch of packets |
//! | [`statement`] | signed answers to pings and signed hints, the only signs of life |
//! | [`cluster`] | chitchat, which spreads records |
//! | [`admission`] | which hosts a message may name, and what it may say of them |
//! | [`monitor`] | the conversion of chitchat's state to events |
//! | [`ends`], [`candidates`] | where hosts are reached that are behind NAT, or have several addresses |
//! | [`book`], [`mtu`] | the path to each peer: pings, round-trip times, path MTU |
//! | [`pulse`] | the timer, and dialling of peers that are not alive |
//! | [`strangers`] | the sources of datagrams that do not authenticate |

mod admission;
mod book;
mod bytes;
mod candidates;
mod cluster;
mod decode;
mod decompress;
mod ends;
mod fragment;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hub;
mod monitor;
mod mtu;
mod packet;
mod pair;
mod pulse;
mod replay;
mod rounds;
mod seal;
mod sealing;
mod statement;
mod strangers;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use chitchat::ChitchatId;
use ovl_control::GossipCounters;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, RecordHead, SignedRecord};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::error;

use crate::keys::{self, Identity, Keyring};
use crate::transport::{BothFamilies, Transport};
use cluster::Cluster;
use hub::Hub;
pub use packet::Answerer;
use packet::Packet;
use pulse::Seeds;
pub use statement::Hints;
pub(crate) use strangers::Strangers;

/// The maximum number of peers that receive a local change directly. They spread it to the others.
const MAX_DIRECT_PEERS: usize = 64;
/// The pauses before the copies of an announcement, so that a lost datagram does not lose it.
const COPIES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(25)];

/// The configuration of gossip.
pub struct GossipConfig {
    /// The UDP address to listen on.
    pub listen: SocketAddr,
    /// The address of the other family to listen on. `None` if this host has none.
    pub listen_also: Option<SocketAddr>,
    /// The identity of the local host, which signs its answers and hints.
    pub identity: Arc<Identity>,
    /// The cluster keys.
    pub keyring: Arc<Keyring>,
    /// The record of the local host. Its id, generation and address must not change until gossip is stopped.
    pub record: SignedRecord,
    /// The initial hints.
    pub hints: Hints,
    /// The addresses of hosts to join: `host[:port]`.
    pub join: Vec<String>,
    /// The interval between rounds of gossip.
    pub interval: Duration,
    /// Opens the socket.
    pub transport: Arc<dyn Transport>,
    /// The wall clock of the local host, which it tells its peers.
    pub wall_clock: WallClock,
}

/// A wall clock: returns milliseconds since 1970.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// An event of gossip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GossipEvent {
    /// The record, the hints or the liveness of a peer changed.
    Peer {
        /// The latest record, verified.
        record: NodeRecord,
        /// The signed record, to be passed on.
        signed: SignedRecord,
        /// The hints of the peer.
        hints: Hints,
        /// Whether it has lately given an authentic answer to a ping, directly or through other hosts.
        alive: bool,
    },
    /// A peer was dead for so long that gossip has forgotten it.
    Gone(NodeId),
    /// A record that arrived in an announcement. It may not be the latest one.
    Announced {
        /// The record, verified.
        record: NodeRecord,
        /// The signed record, to be passed on.
        signed: SignedRecord,
    },
    /// The record of a host that this release does not understand, verified. It has no effect.
    NotUnderstood {
        /// What every release can read of it.
        head: Box<RecordHead>,
        /// The signed record, to be passed on.
        signed: SignedRecord,
        /// What is not known.
        why: String,
    },
    /// A host is at another address now, because it is behind NAT, or was silent at the one of its addresses that was used. What was
    /// connected to it before is lost.
    Moved(NodeId),
    /// A host to join says at which address it sees this host, and whether it has knocked there.
    Seen(SocketAddr, bool),
    /// The knock of a host to join has arrived.
    Knocked,
    /// A host wants to know whether it can be dialled: this datagram is to be sent to the address from another socket than that of gossip.
    Knock {
        /// Where to.
        at: SocketAddr,
        /// A sealed datagram of gossip.
        datagram: Vec<u8>,
    },
    /// The path MTU of a peer was measured.
    PathMtu {
        /// The peer.
        node: NodeId,
        /// The path MTU in bytes, including the outer IP header.
        mtu: u16,
    },
    /// Two daemons with the same identity have run for longer than a restart takes. The event repeats every ten
    /// seconds while it lasts. The identity may be that of the local host.
    Clash {
        /// The id of both.
        node: NodeId,
        /// Their gossip addresses.
        addresses: [SocketAddr; 2],
        /// Their gossip generations.
        generations: [u64; 2],
    },
}

/// The state of the direct path to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contact {
    /// The time of its last authentic answer to a ping of the local host.
    pub last_heard: Instant,
    /// The smoothed round-trip time; `None` before the first.
    pub rtt: Option<Duration>,
    /// Its gossip address.
    pub addr: SocketAddr,
    /// The path MTU in bytes; `None` if it is not known yet.
    pub path_mtu: Option<u16>,
}

/// A probe between the sockets of relayed datagrams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayProbe {
    /// Its sender, and what it says.
    Heard(NodeId, ProbeSigns),
    /// It is a question about NAT: the answer, to be sent to where it came from.
    Answer(Vec<u8>),
}

/// What a probe between the sockets of relayed datagrams says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeSigns {
    /// Whether probes of the receiver arrive at the sender.
    pub heard: bool,
    /// Whether the sender itself needs the path. Otherwise it follows the receiver, which does.
    pub needs: bool,
}

/// A TCP path to a host, for gossip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpEnd {
    /// The local socket that stands in for the host.
    pub local: SocketAddr,
    /// The other end of the connection, as this host sees it.
    pub remote: SocketAddr,
    /// The addresses that the host is known by. Without one, only its own datagrams are answered.
    pub known_as: Vec<SocketAddr>,
    /// Whether datagrams to the host are sent there, and not by UDP.
    pub is_used: bool,
}

/// Running gossip. It stops when dropped.
pub struct Gossip {
    hub: Arc<Hub>,
    cluster: Arc<Cluster>,
    seeds: Arc<Seeds>,
    outgoing: Arc<Outgoing>,
    tasks: JoinSet<()>,
}

/// The record that waits to be published.
#[derive(Default)]
struct Outgoing {
    waiting: Mutex<Option<SignedRecord>>,
    changed: Notify,
}

impl Gossip {
    /// Opens the socket and joins the cluster. If the receiver is slow, events are merged, not lost.
    ///
    /// # Errors
    ///
    /// The record is invalid, or the address cannot be bound.
    pub async fn start(config: GossipConfig, events: mpsc::Sender<GossipEvent>) -> anyhow::Result<Self> {
        let record = keys::open_record(&config.record).context("invalid record of the local host")?;
        let socket = BothFamilies::open(&*config.transport, config.listen, config.listen_also)
            .context("cannot listen for gossip (UDP)")?;
        let hub = Arc::new(Hub::new(socket, &config, &record)?);
        hub.set_record(config.record.clone());
        let id = ChitchatId::new(record.id.to_string(), record.generation, record.address);
        let cluster = Arc::new(Cluster::start(Arc::clone(&hub), id, config.interval, &config.record).await?);
        let seeds = Arc::new(Seeds::new(config.listen, config.listen_also));
        let outgoing = Arc::new(Outgoing::default());

        let mut tasks = JoinSet::new();
        let receiver = Arc::clone(&hub);
        tasks.spawn(async move { receiver.receive().await });
        let names: HashSet<String> = config.join.iter().map(|entry| pulse::with_port(entry)).collect();
        for name in names {
            tasks.spawn(Arc::clone(&seeds).resolve(name));
        }
        tasks.spawn(pulse::run(Arc::clone(&hub), Arc::clone(&cluster), Arc::clone(&seeds)));
        tasks.spawn(monitor::run(Arc::clone(&hub), Arc::clone(&cluster), events));
        tasks.spawn(publish(Arc::clone(&hub), Arc::clone(&cluster), Arc::clone(&outgoing)));
        let supervised = Arc::clone(&cluster);
        tasks.spawn(async move { supervised.supervise().await });
        Ok(Self { hub, cluster, seeds, outgoing, tasks })
    }

    /// Publishes a new record and gossips it at once. Its address must be the initial one.
    pub fn set_record(&self, record: SignedRecord) {
        if let Ok(record) = record.record() {
            self.set_link_mtu(record.link_mtu);
        }
        self.hub.set_record(record.clone());
        *self.outgoing.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(record);
        self.outgoing.changed.notify_one();
    }

    /// Sets the hints. Each peer gets them with the answer to its next ping: after 0.6 seconds, or up to 1.5 seconds if
    /// there are many peers.
    ///
    /// Nothing is sent for them. What changed is pushed over streams, and hints only find what was lost there. If each
    /// host told each other one at once, a change that all hosts take over would cost the square of their number.
    pub fn set_hints(&self, hints: Hints) {
        self.hub.set_hints(hints);
    }

    /// Sets the peers that are dialled while they are not alive, in addition to the hosts to join.
    pub fn set_known(&self, mut known: Vec<(NodeId, SocketAddr)>) {
        known.retain(|(node, _)| *node != self.hub.node);
        let mut state = self.hub.lock();
        state.admission.set_known(known.iter().map(|(node, _)| *node).collect());
        state.book.set_known(&known, Instant::now());
    }

    /// Sets the further addresses of a peer. Those in its record count instead once gossip has it.
    pub fn set_further(&self, node: NodeId, main: SocketAddr, further: &[SocketAddr]) {
        let mut state = self.hub.lock();
        if !state.book.is_listed(node) {
            state.set_addresses(node, (main, further), Instant::now());
        }
    }

    /// Sets hosts to join besides the configured ones. Of many, some are used.
    pub fn set_joined(&self, hosts: &[SocketAddr]) {
        self.seeds.set_found(hosts);
    }

    /// Sets the MTU of the underlay device.
    pub fn set_link_mtu(&self, mtu: u16) {
        self.hub.lock().book.set_link_mtu(mtu, Instant::now());
    }

    /// Replaces the cluster keys: the first one seals, except for the addresses in `known`, which use the key given
    /// there. All keys open.
    ///
    /// # Errors
    ///
    /// The kernel returns no random numbers.
    pub fn set_keys(
        &self,
        keyring: Arc<Keyring>,
        known: HashMap<SocketAddr, ClusterKeyId>,
    ) -> anyhow::Result<()> {
        self.hub.set_keys(keyring, known)
    }

    /// The recent sources of datagrams that were sealed with an unknown cluster key.
    pub fn other_keys(&self) -> Vec<IpAddr> {
        self.hub.other_keys()
    }

    /// Sends a record to all known addresses, several times, without waiting for a round of gossip. The future
    /// completes after the last copy, about 50 ms later.
    pub fn announce(&self, record: SignedRecord) -> impl Future<Output = ()> + Send + use<> {
        let mut to: HashSet<SocketAddr> = self.hub.lock().book.addresses(false).into_iter().collect();
        to.extend(self.seeds.addresses());
        let hub = Arc::clone(&self.hub);
        let packet = Packet::Announce(record);
        async move {
            for pause in COPIES {
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                for &to in &to {
                    hub.send(to, &packet);
                }
            }
        }
    }

    /// The state of the direct path to each peer that was ever heard.
    pub fn contacts(&self) -> HashMap<NodeId, Contact> {
        self.hub.lock().book.contacts()
    }

    /// The time of a peer's last authentic answer to a ping of the local host. `None` if it never gave one.
    pub fn last_heard(&self, node: NodeId) -> Option<Instant> {
        self.hub.lock().book.last_heard(node)
    }

    /// When a peer last passed on an answer of another one, because that did not answer directly. `None` if none did.
    pub fn last_relayed(&self) -> Option<Instant> {
        self.hub.lock().book.last_relayed()
    }

    /// The peer that last passed on an answer of a peer, because that did not answer directly, and when. `None` if none did.
    pub fn last_through(&self, node: NodeId) -> Option<(NodeId, Instant)> {
        self.hub.lock().book.through(node)
    }

    /// The interval between pings to each live peer.
    pub fn ping_every(&self) -> Duration {
        self.hub.lock().book.ping_every()
    }

    /// How long a live peer may take for its next answer to a ping: the interval of pings, and longer while this host is late itself.
    pub fn patience(&self) -> Duration {
        self.hub.lock().book.patience()
    }

    /// When a peer last said that its hints are those of its last [`GossipEvent::Peer`]. `None` if it never did.
    pub fn hinted(&self, node: NodeId) -> Option<Instant> {
        self.hub.lock().book.hinted(node)
    }

    /// What the wall clock of each peer says now, in milliseconds since 1970, as far as its last answer tells.
    pub fn clocks(&self) -> BTreeMap<NodeId, u64> {
        self.hub.lock().book.clocks(Instant::now())
    }

    /// The same of one peer.
    pub fn clock(&self, peer: NodeId) -> Option<u64> {
        self.hub.lock().book.clock(peer, Instant::now())
    }

    /// The known path MTUs, in bytes.
    pub fn path_mtus(&self) -> HashMap<NodeId, u16> {
        let contacts = self.contacts();
        contacts.into_iter().filter_map(|(node, contact)| Some((node, contact.path_mtu?))).collect()
    }

    /// Sets the peer through which each one is reached that is not reached directly: it passes pings on, also those of others.
    pub fn set_hops(&self, hops: BTreeMap<NodeId, NodeId>) {
        self.hub.lock().book.set_hops(hops);
    }

    /// Where a host is reached that is known by an address. `None` if it is behind NAT and was not heard.
    pub fn end(&self, known_as: SocketAddr) -> Option<SocketAddr> {
        self.hub.lock().end(known_as)
    }

    /// The hosts that are reached at another address than the main one, each with it.
    pub fn elsewhere(&self) -> BTreeMap<NodeId, SocketAddr> {
        self.hub.lock().elsewhere()
    }

    /// Asks members to tell this host and another one, both behind NAT, where they see the other one. Both then send to each other at
    /// once.
    pub fn seek(&self, host: NodeId) {
        self.hub.seek(host);
    }

    /// Sets whether [`GossipEvent::Knock`] is carried out.
    pub fn set_knocks(&self, knocks: bool) {
        self.hub.lock().set_knocks(knocks);
    }

    /// Sets where the sockets of relayed datagrams of hosts behind NAT are seen from here, which hosts that look for them are told.
    pub fn set_relay_ends(&self, ends: BTreeMap<NodeId, SocketAddr>) {
        self.hub.lock().set_relay_ends(ends);
    }

    /// Where a member has last seen the socket of relayed datagrams of a host behind NAT. It may not be reached there from here.
    pub fn suggested_relay_end(&self, host: NodeId) -> Option<SocketAddr> {
        self.hub.lock().suggested_relay_end(host)
    }

    /// A sealed probe of the path between the sockets of relayed datagrams, which only that peer opens. `None` if the peer is not
    /// known.
    pub fn relay_probe(&self, to: NodeId, signs: ProbeSigns) -> Option<Vec<u8>> {
        self.hub.lock().relay_probe(to, signs)
    }

    /// Opens such a probe in place, which came from an address. `None` if it is forged, a copy, or of a host that has not proved to
    /// be live.
    pub fn open_relay_probe(&self, datagram: &mut [u8], from: SocketAddr) -> Option<RelayProbe> {
        self.hub.lock().open_relay_probe(datagram, from, Instant::now())
    }

    /// A sealed question to a peer about the NAT of this host, to be sent from a socket of its own. `None` if the peer is not known.
    pub fn check(&self, to: NodeId, nonce: u64, by: Answerer) -> Option<Vec<u8>> {
        self.hub.lock().check(to, nonce, by)
    }

    /// Opens the answer in place. Returns the nonce of the question, and where it came from. `None` if it is no answer of a live peer.
    pub fn open_checked(&self, datagram: &mut [u8]) -> Option<(u64, SocketAddr)> {
        self.hub.lock().open_checked(datagram)
    }

    /// Replaces the TCP paths.
    pub fn set_tcp_ends(&self, ends: Vec<TcpEnd>) {
        self.hub.lock().set_tcp_ends(ends);
    }

    /// When each peer last answered by UDP.
    pub fn udp_answers(&self) -> BTreeMap<NodeId, Instant> {
        self.hub.lock().udp_answers()
    }

    /// When anything last came from each peer by UDP.
    pub fn udp_heard(&self) -> BTreeMap<NodeId, Instant> {
        self.hub.lock().udp_heard()
    }

    /// Tries whether UDP works to a peer, whatever way gossip with it takes, with so many datagrams.
    pub fn try_udp(&self, peer: NodeId, copies: u32) {
        self.hub.try_udp(peer, copies);
    }

    /// Asks a host to join where it sees this host.
    pub fn ask_where(&self, to: SocketAddr) {
        self.hub.ask_where(to);
    }

    /// The addresses of hosts to join, while no peer is alive.
    pub fn missing_seeds(&self) -> Vec<SocketAddr> {
        let is_alone = self.hub.lock().book.addresses(true).is_empty();
        if is_alone { self.seeds.addresses() } else { Vec::new() }
    }

    /// The round-trip time to a peer. `None` if it is not known.
    pub fn rtt(&self, peer: NodeId) -> Option<Duration> {
        self.hub.lock().book.rtt(peer)
    }

    /// The path MTU to a peer, in bytes. `None` if it is not known.
    pub fn path_mtu(&self, peer: NodeId) -> Option<u16> {
        self.hub.lock().book.path_mtu(peer)
    }

    /// The counters since the start.
    pub fn counters(&self) -> GossipCounters {
        self.hub.counters()
    }

    /// Stops gossip and closes the socket.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
        self.cluster.stop().await;
    }
}

async fn publish(hub: Arc<Hub>, cluster: Arc<Cluster>, outgoing: Arc<Outgoing>) {
    loop {
        outgoing.changed.notified().await;
        let record = outgoing.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(record) = record else { continue };
        if let Err(error) = cluster.set_record(&record).await {
            error!(%error, "cannot publish the record of the local host");
        }
        // The record alone: an exchange with each peer would name all hosts in each, which is the cube of their number when
        // all hosts start at once. Rounds of gossip bring what is lost.
        let packet = Packet::Announce(record);
        live(&hub).into_iter().for_each(|to| hub.send(to, &packet));
    }
}

/// The addresses of live peers, up to [`MAX_DIRECT_PEERS`].
fn live(hub: &Hub) -> Vec<SocketAddr> {
    let mut live = hub.lock().book.addresses(true);
    live.truncate(MAX_DIRECT_PEERS);
    live
}

#[cfg(test)]
mod tests;
