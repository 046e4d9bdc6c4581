//! chitchat, on our socket.

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

/// The cluster key keeps clusters apart; this only has to be the same everywhere.
const CLUSTER: &str = "ovl";
/// After this a dead node is forgotten. Its id is in every digest until then.
const GRACE: Duration = Duration::from_secs(600);
/// Messages that wait for chitchat, at most.
const INBOX: usize = 512;

/// Keys in chitchat: short, as they are repeated.
pub(super) const KEY_RECORD: &str = "r";
const KEY_TABLE: &str = "t";
const KEY_OBJECTS: &str = "o";
const KEY_ALLOC: &str = "a";

/// What a node tells in gossip of its state, so that peers notice what they missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hints {
    /// Of its own table.
    pub table: Revision,
    /// Over all cluster objects that it has.
    pub objects: [u8; 32],
    /// Version of the allocation map.
    pub alloc: u64,
}

/// The handle of chitchat, which may be replaced when its task has failed.
pub(super) struct Cluster {
    hub: Arc<Hub>,
    id: ChitchatId,
    interval: Duration,
    handle: Mutex<Arc<ChitchatHandle>>,
    /// What we publish.
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

    /// Looks at chitchat's state, or changes it.
    pub(super) async fn with<T>(&self, act: impl FnMut(&mut Chitchat) -> T) -> T {
        self.handle().with_chitchat(act).await
    }

    /// Gossips with that address at once.
    pub(super) fn gossip(&self, to: SocketAddr) {
        // It fails only while chitchat is being replaced, and will be done again.
        if self.handle().gossip(to).is_err() {
            tracing::debug!(%to, "no gossip: chitchat is not running");
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

    /// chitchat sees by itself what has not changed.
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

    /// chitchat has assertions that a peer with a fault could trip: then it starts again, as a later
    /// run, for what peers have of this one must not count.
    pub(super) async fn supervise(&self) {
        let mut id = self.id.clone();
        loop {
            let ended = self.handle().termination_watcher().await;
            error!(?ended, "gossip has failed and is started again");
            tokio::time::sleep(Duration::from_secs(1)).await;
            id.generation_id += 1;
            let values = self.values.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match spawn(&self.hub, id.clone(), self.interval, &values).await {
                Ok(handle) => *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = handle,
                Err(error) => error!(%error, "gossip cannot be started again"),
            }
        }
    }

    /// Stops chitchat, and waits until it has let go of the socket.
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
        // Seeds and the dead are dialled by ourselves: see `pulse`.
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

/// With one sample and a threshold of 1 this is a time-out: five parts of the initial interval and
/// one of the last one seen, over six; about 2 s.
fn failure_detector(interval: Duration) -> FailureDetectorConfig {
    FailureDetectorConfig {
        phi_threshold: 1.0,
        sampling_window_size: 1,
        initial_interval: (interval * 12).max(Duration::from_millis(2400)),
        max_interval: (interval * 7).max(Duration::from_millis(1500)),
        dead_node_grace_period: GRACE,
    }
}

/// The hints in a node's state; what is missing or malformed is as if it had nothing.
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
    // chitchat does nothing else meanwhile, so this neither waits nor fails.
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        self.hub.send_chitchat(to, &message);
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        self.inbox.recv().await.ok_or_else(|| anyhow::anyhow!("the socket was replaced"))
    }
}
