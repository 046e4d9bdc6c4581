//! Hands on to ovld what watchers tell: at once, again after ovld was restarted, and again what was not in force.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ovl_control::Balanced;
use ovl_proto::resource::{Kind, Name, ResourceKey};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::balance::{Addresses, Due, due};
use crate::ovld::{Connection, Failure, names_of};
use crate::refusals::Refusal;
use crate::reports::Heard;
use crate::store::{News, Store};
use crate::watcher::Item;
use crate::writer::Say;

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

/// What a feeder has beside the objects.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// The control socket of ovld.
    pub socket: PathBuf,
    /// What ovld says.
    pub heard: watch::Receiver<Option<Heard>>,
    /// What is to be written to the API server.
    pub say: mpsc::Sender<Say>,
}

/// A feeder.
pub(crate) struct Feeder {
    feeds: Feeds,
    surroundings: Surroundings,
    stores: Vec<Store>,
    /// Why a kind cannot be followed.
    troubles: watch::Sender<Vec<(Kind, String)>>,
    connection: Option<Connection>,
    /// Failures of ovld in a row.
    failures: u32,
    /// Before that time ovld is not asked again.
    not_before: Instant,
    /// The statuses of Services that are to be written, until their objects change.
    asked: BTreeMap<Name, Addresses>,
    /// Whether Services, or what ovld says of them, may have changed since statuses were looked at.
    unbalanced: bool,
}

impl Feeder {
    /// Creates a feeder for some kinds. `troubles` hears why a kind cannot be followed.
    pub(crate) fn new(
        feeds: Feeds,
        kinds: &[Kind],
        surroundings: Surroundings,
        troubles: watch::Sender<Vec<(Kind, String)>>,
    ) -> Self {
        Self {
            feeds,
            surroundings,
            stores: kinds.iter().map(|kind| Store::new(*kind)).collect(),
            troubles,
            connection: None,
            failures: 0,
            not_before: Instant::now(),
            asked: BTreeMap::new(),
            unbalanced: false,
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
                _ = again.tick() => {
                    self.stores.iter_mut().for_each(Store::try_again);
                    self.asked.clear();
                    self.unbalanced = true;
                }
                Ok(()) = self.surroundings.heard.changed(), if self.feeds == Feeds::Cluster => {
                    self.unbalanced = true;
                }
                () = sleep_until(self.not_before), if waits => {}
            }
            if Instant::now() >= self.not_before
                && let Err(failure) = self.tell().await
            {
                self.lost(&failure);
            }
            if self.feeds == Feeds::Cluster && std::mem::take(&mut self.unbalanced) {
                self.balance();
            }
        }
    }

    /// Says the addresses of LoadBalancers to the API server.
    fn balance(&mut self) {
        let heard = self.surroundings.heard.borrow().clone();
        let report = heard.and_then(|heard| heard.report);
        let Some(balanced): Option<Balanced> = report.and_then(|report| report.balanced) else { return };
        let Some(store) = self.stores.iter().find(|store| store.kind() == Kind::Service) else { return };
        for due in due(store.objects(), &balanced) {
            match due {
                Due::Write(addresses) => {
                    let name = &addresses.name;
                    if self.asked.get(name) != Some(&addresses)
                        && self.surroundings.say.try_send(Say::Addresses(addresses.clone())).is_ok()
                    {
                        self.asked.insert(name.clone(), addresses);
                    }
                }
                Due::Refused(name, reason) => {
                    let key = ResourceKey { kind: Kind::Service, name };
                    self.refuse(&key, reason);
                }
            }
        }
    }

    /// Says why an object is not in force. If too much is to be said, it is said later: it is tried again every few seconds.
    fn refuse(&self, key: &ResourceKey, reason: &str) {
        let store = self.stores.iter().find(|store| store.kind() == key.kind);
        let uid = store.and_then(|store| store.get(&key.name)).map(|object| object.uid.clone());
        let refusal = Refusal { key: key.clone(), uid: uid.unwrap_or_default(), reason: reason.to_owned() };
        self.surroundings.say.try_send(Say::Refused(refusal)).ok();
    }

    fn take(&mut self, item: Item) {
        self.unbalanced |= matches!(
            item,
            Item::Listed(Kind::Service, ..)
                | Item::Changed(Kind::Service, _)
                | Item::Deleted(Kind::Service, _)
        );
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
            none => none.insert(Connection::open(&self.surroundings.socket).await?),
        };
        let news: Vec<News> = self.stores.iter_mut().filter_map(Store::take).collect();
        if news.is_empty() {
            return Ok(());
        }
        let names = |news: &News| news.objects.iter().map(|(name, _)| name.clone()).collect();
        let mut told: BTreeMap<Kind, Vec<Name>> = news.iter().map(|news| (news.kind, names(news))).collect();
        let failed: BTreeMap<ResourceKey, String> = connection.tell(cluster.as_deref(), news).await?;
        self.failures = 0;
        failed.iter().for_each(|(key, reason)| self.refuse(key, reason));
        // What was told may be in the way of another object.
        for key in failed.keys() {
            told.entry(key.kind).or_default().push(key.name.clone());
        }
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
