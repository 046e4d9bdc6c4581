//! Gossip: who is there, and what each says of itself.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`seal`], [`replay`] | every datagram is sealed, and opened once |
//! | [`packet`], [`fragment`] | what is inside |
//! | [`socket`], [`hub`] | the socket, and who gets what arrives |
//! | [`cluster`] | chitchat, which spreads records and hints |
//! | [`monitor`] | from chitchat's state to events |
//! | [`book`], [`mtu`] | the way to each peer: pings, round trips, path MTU |
//! | [`pulse`] | the timer, and dialling those who do not answer |
//! | [`strangers`] | who sends what we cannot open |

mod book;
mod cluster;
mod fragment;
mod hub;
mod monitor;
mod mtu;
mod packet;
mod pulse;
mod replay;
mod seal;
mod socket;
mod strangers;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use chitchat::ChitchatId;
use ovl_control::GossipCounters;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, SignedRecord};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::error;

use crate::keys::{self, Keyring};
use crate::transport::Transport;
use cluster::Cluster;
pub use cluster::Hints;
use hub::Hub;
use packet::Packet;
use pulse::Seeds;
pub(crate) use socket::open as open_socket;
pub(crate) use strangers::Strangers;

/// Changed hints are published no more often than this: they are a safety net.
const HINTS_EVERY: Duration = Duration::from_millis(100);
/// A change of ours is told to this many peers at once; they tell the others.
const TELL_AT_ONCE: usize = 64;
/// When the copies of an announcement go out: one of them gets through.
const COPIES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(25)];

/// What gossip has to be told.
pub struct GossipConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// What seals and opens.
    pub keyring: Arc<Keyring>,
    /// The own record. Its id, generation and address are used for the whole run.
    pub record: SignedRecord,
    /// The first ones.
    pub hints: Hints,
    /// Where to find the cluster: `host[:port]`.
    pub join: Vec<String>,
    /// Between rounds.
    pub interval: Duration,
    /// Opens the socket.
    pub transport: Arc<dyn Transport>,
}

/// What gossip has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GossipEvent {
    /// Something about a peer is new: its record, its hints, or whether it is alive.
    Peer {
        /// Verified. The latest one, whatever came before.
        record: NodeRecord,
        /// The same, to be passed on.
        signed: SignedRecord,
        /// See [`Hints`].
        hints: Hints,
        /// Heard lately, directly or through others.
        alive: bool,
    },
    /// It was dead for so long that gossip has forgotten it.
    Gone(NodeId),
    /// A record that came in an announcement. Not known to be the latest one.
    Announced {
        /// Verified.
        record: NodeRecord,
        /// The same, to be passed on.
        signed: SignedRecord,
    },
    /// What the path to a peer carries was measured.
    PathMtu {
        /// The peer.
        node: NodeId,
        /// In bytes, the outer IP header included.
        mtu: u16,
    },
    /// Two daemons with one key have been at work for longer than a restart takes. Repeated every
    /// ten seconds while it lasts. The node may be this one.
    Clash {
        /// Who both say they are.
        node: NodeId,
        /// Where they are.
        addresses: [SocketAddr; 2],
        /// Of their gossip.
        generations: [u64; 2],
    },
}

/// The direct way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contact {
    /// When anything came from it directly.
    pub last_heard: Instant,
    /// Round trip, smoothed.
    pub rtt: Option<Duration>,
    /// Where gossip reaches it.
    pub addr: SocketAddr,
    /// What the path carries, as far as it is known.
    pub path_mtu: Option<u16>,
}

/// A run of gossip. Ends when dropped.
pub struct Gossip {
    hub: Arc<Hub>,
    cluster: Arc<Cluster>,
    seeds: Arc<Seeds>,
    outgoing: Arc<Outgoing>,
    tasks: JoinSet<()>,
}

/// What waits to be published.
#[derive(Default)]
struct Outgoing {
    waiting: Mutex<(Option<SignedRecord>, Option<Hints>)>,
    changed: Notify,
}

impl Gossip {
    /// Opens the socket and joins. Events that the receiver is slow to take are merged, not lost.
    pub async fn start(config: GossipConfig, events: mpsc::Sender<GossipEvent>) -> anyhow::Result<Self> {
        let record = keys::open_record(&config.record).context("the own record is not usable")?;
        let socket = config
            .transport
            .datagrams(config.listen)
            .with_context(|| format!("cannot listen for gossip on {} (UDP)", config.listen))?;
        let hub = Arc::new(Hub::new(socket, record.id, config.keyring, record.link_mtu)?);
        let id = ChitchatId::new(record.id.to_string(), record.generation, record.address);
        let cluster = Arc::new(
            Cluster::start(Arc::clone(&hub), id, config.interval, &config.record, config.hints).await?,
        );
        let seeds = Arc::new(Seeds::new(record.address));
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

    /// Publishes a new record and gossips it at once. Its address must be that of the start.
    pub fn set_record(&self, record: SignedRecord) {
        if let Ok(record) = record.record() {
            self.set_link_mtu(record.link_mtu);
        }
        self.outgoing.waiting.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(record);
        self.outgoing.changed.notify_one();
    }

    /// Publishes new hints, soon.
    pub fn set_hints(&self, hints: Hints) {
        self.outgoing.waiting.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(hints);
        self.outgoing.changed.notify_one();
    }

    /// Those that are dialled for as long as they are not alive, beside those to join.
    pub fn set_known(&self, mut known: Vec<(NodeId, SocketAddr)>) {
        known.retain(|(node, _)| *node != self.hub.node);
        self.hub.lock().book.set_known(&known, Instant::now());
    }

    /// The MTU of the link to the underlay, where it has changed since the start.
    pub fn set_link_mtu(&self, mtu: u16) {
        self.hub.lock().book.set_link_mtu(mtu, Instant::now());
    }

    /// Seals with the first of these keys from now on, or with another one towards the addresses that
    /// `known` has, and opens with all of them.
    pub fn set_keys(
        &self,
        keyring: Arc<Keyring>,
        known: HashMap<SocketAddr, ClusterKeyId>,
    ) -> anyhow::Result<()> {
        self.hub.set_keys(keyring, known)
    }

    /// Where datagrams came from lately that are sealed with a key that we do not have.
    pub fn other_keys(&self) -> Vec<IpAddr> {
        self.hub.other_keys()
    }

    /// Sends a record to everybody right away, several times: gossip is not waited for. Done when the
    /// last copy is out, after about 50 ms.
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

    /// The direct way to each peer that was ever heard.
    pub fn contacts(&self) -> HashMap<NodeId, Contact> {
        self.hub.lock().book.contacts()
    }

    /// What the path to each peer carries, as far as it is known.
    pub fn path_mtus(&self) -> HashMap<NodeId, u16> {
        let contacts = self.contacts();
        contacts.into_iter().filter_map(|(node, contact)| Some((node, contact.path_mtu?))).collect()
    }

    /// Since the start.
    pub fn counters(&self) -> GossipCounters {
        self.hub.counters()
    }

    /// Stops, and gives the socket back.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
        self.cluster.stop().await;
    }
}

async fn publish(hub: Arc<Hub>, cluster: Arc<Cluster>, outgoing: Arc<Outgoing>) {
    let mut next_hints = Instant::now();
    let mut hints = None;
    loop {
        let due = hints.is_some();
        tokio::select! {
            () = outgoing.changed.notified() => {}
            () = tokio::time::sleep_until(next_hints), if due => {}
        }
        let record = {
            let mut waiting = outgoing.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            hints = waiting.1.take().or(hints);
            waiting.0.take()
        };
        let mut changed = false;
        if let Some(record) = record {
            changed = true;
            if let Err(error) = cluster.set_record(&record).await {
                error!(%error, "the own record cannot be published");
            }
        }
        if Instant::now() >= next_hints
            && let Some(hints) = hints.take()
        {
            changed = true;
            cluster.set_hints(hints).await;
            next_hints = Instant::now() + HINTS_EVERY;
        }
        if changed {
            let alive = hub.lock().book.addresses(true);
            for to in alive.into_iter().take(TELL_AT_ONCE) {
                cluster.gossip(to);
            }
        }
    }
}

#[cfg(test)]
mod tests;
