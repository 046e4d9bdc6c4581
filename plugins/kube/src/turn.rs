//! The connection that says to ovld that this program runs and reaches the API server, and hears whether it is this host's
//! turn to mirror. While it is, the cluster's objects are followed.

use std::path::Path;
use std::time::Duration;

use kube::Client;
use ovl_control::MirrorOffer;
use ovl_proto::resource::Kind;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::QUEUE;
use crate::feeder::{Feeder, Feeds, Surroundings};
use crate::kind::MIRRORED;
use crate::members;
use crate::ovld::{Connection, Failure};
use crate::watcher;

/// The wait before ovld is connected to again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long ovld may take to answer a new connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How long a trouble with the API server lasts before ovld hears of it.
const LASTS: Duration = Duration::from_secs(2);

/// Why kinds cannot be followed.
type Troubles = Vec<(Kind, String)>;

/// The turns of this host.
pub(crate) struct Turns {
    client: Client,
    surroundings: Surroundings,
    /// Troubles of the watcher of this node's pods, which says whether the API server is reached.
    own: watch::Receiver<Troubles>,
    /// Why something cannot be written to the API server.
    writes: watch::Receiver<Option<String>>,
    /// Troubles of the watchers of the cluster's objects.
    cluster: watch::Sender<Troubles>,
    /// What follows the cluster's objects, if it is this host's turn.
    mirror: JoinSet<()>,
}

impl Turns {
    /// Creates the turns of this host.
    pub(crate) fn new(
        client: Client,
        surroundings: Surroundings,
        own: watch::Receiver<Troubles>,
        writes: watch::Receiver<Option<String>>,
    ) -> Self {
        let (cluster, mirror) = (watch::Sender::new(Vec::new()), JoinSet::new());
        Self { client, surroundings, own, writes, cluster, mirror }
    }

    /// Returns what is to be said to ovld now, and takes note of it.
    fn offer(&mut self, cluster: &mut watch::Receiver<Troubles>) -> MirrorOffer {
        offer(
            &self.own.borrow_and_update(),
            &cluster.borrow_and_update(),
            self.writes.borrow_and_update().as_deref(),
        )
    }

    /// Waits until a trouble begins or ends.
    async fn changed(&mut self, cluster: &mut watch::Receiver<Troubles>) {
        tokio::select! {
            // A sender that is gone has ended with the program.
            Ok(()) = self.own.changed() => {}
            Ok(()) = self.writes.changed() => {}
            Ok(()) = cluster.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// Takes turns for ever.
    pub(crate) async fn run(mut self) {
        let mut cluster = self.cluster.subscribe();
        // Until the first list has succeeded or failed, there is nothing to say.
        if self.own.changed().await.is_err() {
            return;
        }
        loop {
            let offer = self.offer(&mut cluster);
            let failure = match connect(&self.surroundings.socket, offer.clone()).await {
                Ok((connection, acts)) => self.hold(connection, acts, offer, &mut cluster).await,
                Err(failure) => failure,
            };
            tracing::debug!(error = %failure, "ovld is asked again whose turn it is");
            self.act(false);
            sleep(AGAIN).await;
        }
    }

    /// Holds a connection until it is lost. If what is to be said changes, another one takes its place, and only then it is
    /// closed: meanwhile no other host should take the turn.
    async fn hold(
        &mut self,
        mut connection: Connection,
        acts: bool,
        mut said: MirrorOffer,
        cluster: &mut watch::Receiver<Troubles>,
    ) -> Failure {
        self.act(acts);
        loop {
            tokio::select! {
                turn = connection.turn() => match turn {
                    Ok(acts) => self.act(acts),
                    Err(failure) => return failure,
                },
                () = self.changed(cluster) => {
                    let mut now = self.offer(cluster);
                    if now != said && now != MirrorOffer::default() {
                        // It may pass by itself.
                        timeout(LASTS, async { while now != MirrorOffer::default() {
                            self.changed(cluster).await;
                            now = self.offer(cluster);
                        } }).await.ok();
                    }
                    if now == said {
                        continue;
                    }
                    match connect(&self.surroundings.socket, now.clone()).await {
                        Ok((other, acts)) => {
                            (connection, said) = (other, now);
                            self.act(acts);
                        }
                        Err(failure) => return failure,
                    }
                }
            }
        }
    }

    /// Begins or ends to follow the cluster's objects.
    fn act(&mut self, acts: bool) {
        if acts != self.mirror.is_empty() {
            return;
        }
        if !acts {
            tracing::info!("another host mirrors the cluster's objects");
            self.mirror = JoinSet::new();
            self.cluster.send_replace(Vec::new());
            return;
        }
        tracing::info!("this host mirrors the cluster's objects");
        let (tell, items) = mpsc::channel(QUEUE);
        let (tell_nodes, nodes) = mpsc::channel(QUEUE);
        for kind in MIRRORED {
            let tell = if kind == Kind::Node { &tell_nodes } else { &tell };
            self.mirror.spawn(watcher::follow(self.client.clone(), kind, None, tell.clone()));
        }
        self.mirror.spawn(members::tell(self.surroundings.socket.clone(), nodes, tell));
        let feeder = Feeder::new(Feeds::Cluster, &MIRRORED, self.surroundings.clone(), self.cluster.clone());
        self.mirror.spawn(feeder.run(items));
    }
}

/// Connects to ovld, and waits until it says whose turn it is.
async fn connect(socket: &Path, offer: MirrorOffer) -> Result<(Connection, bool), Failure> {
    let mut connection = Connection::open(socket).await?;
    connection.offer(offer).await?;
    let acts = timeout(ANSWERS_WITHIN, connection.turn()).await.map_err(|_| Failure::Silent)??;
    Ok((connection, acts))
}

/// Returns what is to be said of troubles with the watcher of this node's pods, with those of the cluster's objects, and with
/// what is written.
fn offer(own: &[(Kind, String)], cluster: &[(Kind, String)], writes: Option<&str>) -> MirrorOffer {
    let sentence = |(kind, why): &(Kind, String)| format!("{kind} objects: {why}");
    MirrorOffer {
        unreachable: own.first().map(sentence),
        trouble: cluster.first().map(sentence).or(writes.map(str::to_owned)).filter(|_| own.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_with_the_own_pods_takes_the_turn_away() {
        let trouble = |kind| vec![(kind, "forbidden".to_owned())];
        assert_eq!(offer(&[], &[], None), MirrorOffer::default());
        let said = offer(&[], &trouble(Kind::Service), Some("cannot write"));
        assert_eq!((said.unreachable, said.trouble.as_deref()), (None, Some("Service objects: forbidden")));
        let said = offer(&[], &[], Some("cannot write"));
        assert_eq!((said.unreachable, said.trouble.as_deref()), (None, Some("cannot write")));
        let said = offer(&trouble(Kind::Pod), &trouble(Kind::Service), Some("cannot write"));
        assert_eq!((said.unreachable.as_deref(), said.trouble), (Some("Pod objects: forbidden"), None));
    }
}
