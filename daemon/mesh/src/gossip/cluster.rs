//! chitchat over the socket of the hub.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chitchat::transport::{Socket, Transport};
use chitchat::{
    Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, ChitchatMessage, FailureDetectorConfig,
    spawn_chitchat,
};
use ovl_proto::record::SignedRecord;
use ovl_proto::table::Revision;
use tokio::sync::mpsc;
use tracing::error;

use super::hub::Hub;

/// The cluster id of chitchat. It is the same for all clusters, which differ by their cluster keys.
const CLUSTER: &str = "ovl";
/// The time after which a dead host is forgotten. Until then its id is in every digest.
const GRACE: Duration = Duration::from_secs(600);
/// The maximum number of messages that wait for chitchat.
const INBOX: usize = 512;

/// The keys in chitchat: short, because every delta repeats them.
pub(super) const KEY_RECORD: &str = "r";
const KEY_TABLE: &str = "t";
const KEY_OBJECTS: &str = "o";
const KEY_ALLOC: &str = "a";

/// The hints of a host: a summary of its state, by which peers detect missing state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hints {
    /// The revision of its owner table.
    pub table: Revision,
    /// The digest of its cluster objects.
    pub objects: [u8; 32],
    /// The version of its allocation map.
    pub alloc: u64,
}

/// A running chitchat, which is restarted if its task fails.
pub(super) struct Cluster {
    hub: Arc<Hub>,
    id: ChitchatId,
    interval: Duration,
    handle: Mutex<Arc<ChitchatHandle>>,
    /// The published values.
    values: Mutex<Values>,
}

#[derive(Clone)]
struct Values {
    record: String,
    hints: Hints,
}

impl Values {
    fn pairs(&self) -> [(&'static str, String); 4] {
        let hex: String = self.hints.objects.iter().map(|byte| format!("{byte:02x}")).collect();
        [
            (KEY_RECORD, self.record.clone()),
            (KEY_TABLE, self.hints.table.to_string()),
            (KEY_OBJECTS, hex),
            (KEY_ALLOC, self.hints.alloc.to_string()),
        ]
    }
}

impl Cluster {
    pub(super) async fn start(
        hub: Arc<Hub>,
        id: ChitchatId,
        interval: Duration,
        record: &SignedRecord,
        hints: Hints,
    ) -> anyhow::Result<Self> {
        let values = Values { record: record.to_text()?, hints };
        let handle = spawn(&hub, id.clone(), interval, &values).await?;
        Ok(Self { hub, id, interval, handle: Mutex::new(handle), values: Mutex::new(values) })
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
        // It fails only while chitchat is being restarted. The caller retries.
        if self.handle().gossip(to).is_err() {
            tracing::debug!(%to, "cannot gossip: chitchat is not running");
        }
    }

    pub(super) async fn set_record(&self, record: &SignedRecord) -> anyhow::Result<()> {
        let text = record.to_text()?;
        self.values.lock().unwrap_or_else(PoisonError::into_inner).record = text;
        self.publish().await;
        Ok(())
    }

    pub(super) async fn set_hints(&self, hints: Hints) {
        self.values.lock().unwrap_or_else(PoisonError::into_inner).hints = hints;
        self.publish().await;
    }

    /// Writes the values to chitchat, which ignores those that have not changed.
    pub(super) async fn publish(&self) {
        let pairs = self.values.lock().unwrap_or_else(PoisonError::into_inner).pairs();
        self.with(|chitchat| {
            let state = chitchat.self_node_state();
            for (key, value) in &pairs {
                state.set(key, value);
            }
        })
        .await;
    }

    /// Restarts chitchat if its task fails: a faulty peer could trigger its assertions. It restarts with a new
    /// generation, so that peers discard the state of the old one.
    pub(super) async fn supervise(&self) {
        let mut id = self.id.clone();
        loop {
            let ended = self.handle().termination_watcher().await;
            error!(?ended, "chitchat failed: it is restarted");
            tokio::time::sleep(Duration::from_secs(1)).await;
            id.generation_id += 1;
            let values = self.values.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match spawn(&self.hub, id.clone(), self.interval, &values).await {
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
    values: &Values,
) -> anyhow::Result<Arc<ChitchatHandle>> {
    let config = ChitchatConfig {
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
    };
    let pairs = values.pairs().map(|(key, value)| (key.to_owned(), value)).to_vec();
    let handle = spawn_chitchat(config, pairs, &OurTransport(Arc::clone(hub))).await?;
    let news = Arc::downgrade(hub);
    handle
        .with_chitchat(|chitchat| {
            let news = news.clone();
            let listener = chitchat.subscribe_event("", move |_| {
                if let Some(hub) = news.upgrade() {
                    hub.news.notify_one();
                }
            });
            listener.forever();
        })
        .await;
    Ok(Arc::new(handle))
}

/// Configures the failure detector as a timeout of about 2 s: with one sample and a threshold of 1 it is five sixths of
/// the initial interval and one sixth of the last one.
fn failure_detector(interval: Duration) -> FailureDetectorConfig {
    FailureDetectorConfig {
        phi_threshold: 1.0,
        sampling_window_size: 1,
        initial_interval: (interval * 12).max(Duration::from_millis(2400)),
        max_interval: (interval * 7).max(Duration::from_millis(1500)),
        dead_node_grace_period: GRACE,
    }
}

/// Parses the hints in the state of a host. A missing or malformed value has its default.
pub(super) fn hints_of(state: &chitchat::NodeState) -> Hints {
    let number = state.get(KEY_ALLOC).and_then(|text| text.parse().ok());
    Hints {
        table: state.get(KEY_TABLE).and_then(|text| text.parse().ok()).unwrap_or_default(),
        objects: state.get(KEY_OBJECTS).and_then(from_hex).unwrap_or_default(),
        alloc: number.unwrap_or_default(),
    }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(out)
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
        self.hub.send_chitchat(to, &message);
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        self.inbox.recv().await.ok_or_else(|| anyhow::anyhow!("the inbox was replaced"))
    }
}
