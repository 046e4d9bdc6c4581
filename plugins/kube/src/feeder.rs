//! Hands on to ovld what watchers tell: at once, again after ovld was restarted, and again what was not in force.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ovl_proto::resource::{Kind, Name, ResourceKey};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::ovld::{Connection, Failure, name_of, names_of};
use crate::store::{News, Store};
use crate::watcher::Item;

/// How often ovld is told again of what is not in force.
const AGAIN: Duration = Duration::from_secs(10);
/// The wait after the first failure of ovld in a row, and the longest one.
const WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How many items are taken at once before ovld is told.
const AT_ONCE: usize = 1000;

/// What kinds of objects a feeder hands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feeds {
    /// The pods of this node.
    Pods,
    /// The objects of the cluster.
    Cluster,
}

/// A feeder.
pub(crate) struct Feeder {
    feeds: Feeds,
    socket: PathBuf,
    stores: Vec<Store>,
    /// Why a kind cannot be followed.
    troubles: watch::Sender<Vec<(Kind, String)>>,
    connection: Option<Connection>,
    /// Failures of ovld in a row.
    failures: u32,
    /// Before that time ovld is not asked again.
    not_before: Instant,
}

impl Feeder {
    /// Creates a feeder for some kinds. `troubles` hears why a kind cannot be followed.
    pub(crate) fn new(
        feeds: Feeds,
        kinds: &[Kind],
        socket: PathBuf,
        troubles: watch::Sender<Vec<(Kind, String)>>,
    ) -> Self {
        Self {
            feeds,
            socket,
            stores: kinds.iter().map(|kind| Store::new(*kind)).collect(),
            troubles,
            connection: None,
            failures: 0,
            not_before: Instant::now(),
        }
    }

    /// Hands on what watchers tell, until there are none.
    pub(crate) async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        let mut again = tokio::time::interval(AGAIN);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let waits = self.connection.is_none() && self.failures > 0;
            tokio::select! {
                item = items.recv() => {
                    let Some(item) = item else { return };
                    self.take(item);
                    for _ in 0..AT_ONCE {
                        let Ok(item) = items.try_recv() else { break };
                        self.take(item);
                    }
                }
                failure = closed(&mut self.connection) => self.lost(&failure),
                _ = again.tick() => self.stores.iter_mut().for_each(Store::try_again),
                () = sleep_until(self.not_before), if waits => {}
            }
            if Instant::now() >= self.not_before
                && let Err(failure) = self.tell().await
            {
                self.lost(&failure);
            }
        }
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Listed(kind, version, objects) => self.store(kind, |store| store.listed(version, objects)),
            Item::Changed(kind, object) => self.store(kind, |store| store.changed(object)),
            Item::Deleted(kind, object) => self.store(kind, |store| store.deleted(object)),
            Item::Trouble(kind, trouble) => {
                self.troubles.send_if_modified(|all| {
                    let before = all.clone();
                    all.retain(|(other, _)| *other != kind);
                    all.extend(trouble.map(|trouble| (kind, trouble)));
                    *all != before
                });
            }
        }
    }

    fn store(&mut self, kind: Kind, change: impl FnOnce(&mut Store)) {
        if let Some(store) = self.stores.iter_mut().find(|store| store.kind() == kind) {
            change(store);
        }
    }

    /// Records that ovld was lost, or refused. It is told everything when it is back.
    fn lost(&mut self, failure: &Failure) {
        if self.failures == 0 {
            tracing::info!(error = %failure, "ovld is asked again");
        }
        let (shortest, longest) = WAITS;
        let wait = shortest.saturating_mul(1 << self.failures.min(10)).min(longest);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Instant::now() + wait;
        self.connection = None;
        self.stores.iter_mut().for_each(Store::tell_all);
    }

    /// Tells ovld what it was not told yet.
    async fn tell(&mut self) -> Result<(), Failure> {
        let cluster = match self.feeds {
            Feeds::Pods => None,
            // Without it, versions have no meaning.
            Feeds::Cluster => match self.cluster() {
                Some(cluster) => Some(cluster),
                None => {
                    self.failures = 0;
                    return Ok(());
                }
            },
        };
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(Connection::open(&self.socket).await?),
        };
        let news: Vec<News> = self.stores.iter_mut().filter_map(Store::take).collect();
        if news.is_empty() {
            return Ok(());
        }
        let told: Vec<(Kind, Vec<Name>)> =
            news.iter().map(|news| (news.kind, news.objects.iter().map(name_of).collect())).collect();
        let failed: BTreeSet<ResourceKey> = connection.tell(cluster.as_deref(), news).await?;
        self.failures = 0;
        for (kind, names) in told {
            self.store(kind, |store| store.note_failed(&names, &names_of(kind, &failed)));
        }
        Ok(())
    }

    /// Returns the identity of the Kubernetes cluster: the uid of its namespace `kube-system`. `None` if it is not known
    /// yet.
    fn cluster(&self) -> Option<String> {
        let namespaces = self.stores.iter().find(|store| store.kind() == Kind::Namespace)?;
        let found = namespaces.get(&Name::new("", "kube-system"))?;
        Some(found.uid.clone()).filter(|uid| !uid.is_empty())
    }
}

/// Waits until a connection is closed; for ever if there is none.
async fn closed(connection: &mut Option<Connection>) -> Failure {
    match connection {
        Some(connection) => connection.closed().await,
        None => std::future::pending().await,
    }
}
