//! chitchat over the socket of the hub.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chitchat::transport::{Socket, Transport};
use chitchat::{
    Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, ChitchatMessage, DeletionStatus,
    FailureDetectorConfig, VersionedValue, spawn_chitchat,
};
use ovl_proto::record::SignedRecord;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::error;

use super::admission::{KEY_RECORD, version_of};
use super::decode::Incarnation;
use super::hub::{Hub, Learned};

/// The cluster id of chitchat. It is the same for all clusters, which differ by their cluster keys.
const CLUSTER: &str = "ovl";
/// The time after which a dead host is forgotten. Until then its id is in every digest.
const GRACE: Duration = Duration::from_secs(600);
/// The maximum number of messages that wait for chitchat.
const INBOX: usize = 512;

/// A running chitchat, which is restarted if its task fails.
pub(super) struct Cluster {
    hub: Arc<Hub>,
    id: ChitchatId,
    interval: Duration,
    handle: Mutex<Arc<ChitchatHandle>>,
    /// The published record, and its version.
    record: Mutex<(String, u64)>,
}

impl Cluster {
    pub(super) async fn start(
        hub: Arc<Hub>,
        id: ChitchatId,
        interval: Duration,
        record: &SignedRecord,
    ) -> anyhow::Result<Self> {
        let record = text_and_version(record)?;
        let handle = spawn(&hub, id.clone(), interval, &record).await?;
        Ok(Self { hub, id, interval, handle: Mutex::new(handle), record: Mutex::new(record) })
    }

    fn handle(&self) -> Arc<ChitchatHandle> {
        Arc::clone(&self.handle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a closure on the state of chitchat.
    pub(super) async fn with<T>(&self, act: impl FnMut(&mut Chitchat) -> T) -> T {
        self.handle().with_chitchat(act).await
    }

    /// Gossips with an address at once.
    pub(super) fn gossip(&self, to: SocketAddr) {
        self.hub.lock().rounds.ask(to);
        // It fails only while chitchat is being restarted. The caller retries.
        if self.handle().gossip(to).is_err() {
            tracing::debug!(%to, "cannot gossip: chitchat is not running");
        }
    }

    /// Publishes the record of the local host.
    pub(super) async fn set_record(&self, record: &SignedRecord) -> anyhow::Result<()> {
        let record = text_and_version(record)?;
        self.with(|chitchat| set_record(chitchat, &record)).await;
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
        Ok(())
    }

    /// Adds records that hosts have sent themselves to the state of chitchat.
    pub(super) async fn learn(&self, learned: Vec<Learned>) {
        self.with(|chitchat| {
            for Learned { name, text, version } in &learned {
                let id = ChitchatId::new(name.node.to_string(), name.generation, name.address);
                // chitchat warns of what is not later.
                if chitchat.node_state(&id).is_some_and(|state| state.monotonic_property() >= (0, *version)) {
                    continue;
                }
                let (value, status) = (text.clone(), DeletionStatus::Set);
                let value = VersionedValue { value, version: *version, status };
                let values = std::iter::once((KEY_RECORD.to_owned(), value));
                chitchat.reset_node_state_if_update(&id, values, *version, 0);
            }
        })
        .await;
        self.hub.lock().stir(Instant::now());
    }

    /// Replaces the state of chitchat by one without superseded runs. It has no call to forget one, and names each in
    /// every digest for some minutes.
    pub(super) async fn forget_superseded(&self) {
        let (hub, id, interval) = (&self.hub, &self.id, self.interval);
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.with(|chitchat| {
            let mut state = hub.lock();
            let admission = &mut state.admission;
            let is_kept = |other: &ChitchatId| {
                name_of(other).is_some_and(|name| other != id && !admission.is_superseded(&name))
            };
            let (_, no_seeds) = watch::channel(HashSet::new());
            let mut new =
                Chitchat::with_chitchat_id_and_seeds(config(id.clone(), interval), no_seeds, Vec::new());
            set_record(&mut new, &record);
            // Peers pass over what is not later than they know.
            new.self_node_state().try_set_heartbeat(chitchat.self_node_state().heartbeat());
            let mut inside = HashSet::new();
            for (other, known) in chitchat.node_states().iter().filter(|(other, _)| is_kept(other)) {
                let Some(value) = known.get_versioned(KEY_RECORD) else { continue };
                let values = std::iter::once((KEY_RECORD.to_owned(), value.clone()));
                new.reset_node_state_if_update(other, values, known.max_version(), known.last_gc_version());
                inside.extend(name_of(other));
            }
            admission.set_inside(inside);
            drop(state);
            subscribe(&new, hub);
            *chitchat = new;
        })
        .await;
    }

    /// Restarts chitchat if its task fails.
    pub(super) async fn supervise(&self) {
        loop {
            let ended = self.handle().termination_watcher().await;
            error!(?ended, "chitchat failed: it is restarted");
            tokio::time::sleep(Duration::from_secs(1)).await;
            let record = self.record.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match spawn(&self.hub, self.id.clone(), self.interval, &record).await {
                Ok(handle) => *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = handle,
                Err(error) => error!(%error, "cannot restart chitchat"),
            }
        }
    }

    /// Stops chitchat, and waits until it has released the socket.
    pub(super) async fn stop(&self) {
        let handle = self.handle();
        let stopping = handle.initiate_shutdown();
        let stopped = tokio::time::timeout(Duration::from_secs(1), handle.termination_watcher()).await;
        if stopping.is_err() || stopped.is_err() {
            handle.abort();
        }
    }
}

async fn spawn(
    hub: &Arc<Hub>,
    id: ChitchatId,
    interval: Duration,
    record: &(String, u64),
) -> anyhow::Result<Arc<ChitchatHandle>> {
    let handle = spawn_chitchat(config(id, interval), Vec::new(), &OurTransport(Arc::clone(hub))).await?;
    handle
        .with_chitchat(|chitchat| {
            set_record(chitchat, record);
            subscribe(chitchat, hub);
        })
        .await;
    Ok(Arc::new(handle))
}

fn config(id: ChitchatId, interval: Duration) -> ChitchatConfig {
    ChitchatConfig {
        listen_addr: id.gossip_advertise_addr,
        chitchat_id: id,
        cluster_id: CLUSTER.to_owned(),
        gossip_interval: interval,
        // The module `pulse` dials seeds and dead hosts.
        seed_nodes: Vec::new(),
        failure_detector_config: failure_detector(interval),
        marked_for_deletion_grace_period: Duration::from_secs(3600),
        catchup_callback: None,
        extra_liveness_predicate: None,
    }
}

/// Tells the hub of changes.
fn subscribe(chitchat: &Chitchat, hub: &Arc<Hub>) {
    let news = Arc::downgrade(hub);
    let listener = chitchat.subscribe_event("", move |_| {
        if let Some(hub) = news.upgrade() {
            hub.lock().stir(Instant::now());
            hub.news.notify_one();
        }
    });
    listener.forever();
}

/// The name of a run. `None` if chitchat has one that no host has.
pub(super) fn name_of(id: &ChitchatId) -> Option<Incarnation> {
    let node = id.node_id.parse().ok()?;
    Some(Incarnation { node, generation: id.generation_id, address: id.gossip_advertise_addr })
}

/// Encodes a record as a value of chitchat, with the version that peers expect.
fn text_and_version(record: &SignedRecord) -> anyhow::Result<(String, u64)> {
    Ok((record.to_text()?, version_of(record.head()?.revision)))
}

/// Writes the record of the local host, unless it has not changed.
fn set_record(chitchat: &mut Chitchat, (text, version): &(String, u64)) {
    let state = chitchat.self_node_state();
    if state.get(KEY_RECORD) != Some(text) {
        // chitchat increments the version itself.
        state.set_max_version(version.saturating_sub(1));
        state.set(KEY_RECORD, text);
    }
}

/// Configures the failure detector as a timeout of about 10 s: with one sample and a threshold of 1 it is five sixths of
/// the initial interval and one sixth of the last one. Heartbeats arrive seldom while nothing changes, see
/// [`super::rounds`], and no host is given up because of them.
fn failure_detector(interval: Duration) -> FailureDetectorConfig {
    FailureDetectorConfig {
        phi_threshold: 1.0,
        sampling_window_size: 1,
        initial_interval: (interval * 12).max(Duration::from_secs(12)),
        max_interval: (interval * 7).max(Duration::from_secs(10)),
        dead_node_grace_period: GRACE,
    }
}

struct OurTransport(Arc<Hub>);

#[async_trait]
impl Transport for OurTransport {
    async fn open(&self, _: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let (sender, inbox) = mpsc::channel(INBOX);
        self.0.set_inbox(sender);
        Ok(Box::new(OurSocket { hub: Arc::clone(&self.0), inbox }))
    }
}

struct OurSocket {
    hub: Arc<Hub>,
    inbox: mpsc::Receiver<(SocketAddr, ChitchatMessage)>,
}

#[async_trait]
impl Socket for OurSocket {
    // chitchat blocks on this call, so it neither waits nor fails.
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        if matches!(message, ChitchatMessage::Syn { .. }) && !self.hub.permits_exchange(to) {
            return Ok(());
        }
        self.hub.send_chitchat(to, &message);
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        self.inbox.recv().await.ok_or_else(|| anyhow::anyhow!("the inbox was replaced"))
    }
}
