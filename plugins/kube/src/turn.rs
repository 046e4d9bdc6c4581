//! The connection that says to ovld that this program runs and reaches the API server, and hears whether it is this host's
//! turn to mirror. While it is, the cluster's objects are followed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::Client;
use ovl_control::MirrorOffer;
use ovl_proto::resource::Kind;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::QUEUE;
use crate::feeder::{Feeder, Feeds};
use crate::kind::MIRRORED;
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
    socket: PathBuf,
    /// Troubles of the watcher of this node's pods, which says whether the API server is reached.
    own: watch::Receiver<Troubles>,
    /// Troubles of the watchers of the cluster's objects.
    cluster: watch::Sender<Troubles>,
    /// What follows the cluster's objects, if it is this host's turn.
    mirror: JoinSet<()>,
}

impl Turns {
    /// Creates the turns of this host.
    pub(crate) fn new(client: Client, socket: PathBuf, own: watch::Receiver<Troubles>) -> Self {
        Self { client, socket, own, cluster: watch::Sender::new(Vec::new()), mirror: JoinSet::new() }
    }

    /// Takes turns for ever.
    pub(crate) async fn run(mut self) {
        let (mut own, mut cluster) = (self.own.clone(), self.cluster.subscribe());
        // Until the first list has succeeded or failed, there is nothing to say.
        if own.changed().await.is_err() {
            return;
        }
        loop {
            let offer = offer(&own.borrow_and_update(), &cluster.borrow_and_update());
            let failure = match connect(&self.socket, offer.clone()).await {
                Ok((connection, acts)) => self.hold(connection, acts, offer, &mut own, &mut cluster).await,
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
        own: &mut watch::Receiver<Troubles>,
        cluster: &mut watch::Receiver<Troubles>,
    ) -> Failure {
        self.act(acts);
        loop {
            tokio::select! {
                turn = connection.turn() => match turn {
                    Ok(acts) => self.act(acts),
                    Err(failure) => return failure,
                },
                () = changed(own, cluster) => {
                    let mut now = offer(&own.borrow_and_update(), &cluster.borrow_and_update());
                    if now != said && now != MirrorOffer::default() {
                        // It may pass by itself.
                        timeout(LASTS, async { while now != MirrorOffer::default() {
                            changed(own, cluster).await;
                            now = offer(&own.borrow_and_update(), &cluster.borrow_and_update());
                        } }).await.ok();
                    }
                    if now == said {
                        continue;
                    }
                    match connect(&self.socket, now.clone()).await {
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
        for kind in MIRRORED {
            self.mirror.spawn(watcher::follow(self.client.clone(), kind, None, tell.clone()));
        }
        let feeder = Feeder::new(Feeds::Cluster, &MIRRORED, self.socket.clone(), self.cluster.clone());
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

/// Waits until a trouble begins or ends.
async fn changed(own: &mut watch::Receiver<Troubles>, cluster: &mut watch::Receiver<Troubles>) {
    tokio::select! {
        // A sender that is gone has ended with the program.
        Ok(()) = own.changed() => {}
        Ok(()) = cluster.changed() => {}
        else => std::future::pending().await,
    }
}

/// Returns what is to be said of troubles with the watcher of this node's pods and with those of the cluster's objects.
fn offer(own: &[(Kind, String)], cluster: &[(Kind, String)]) -> MirrorOffer {
    let sentence = |(kind, why): &(Kind, String)| format!("{kind} objects: {why}");
    MirrorOffer {
        unreachable: own.first().map(sentence),
        trouble: cluster.first().map(sentence).filter(|_| own.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_with_the_own_pods_takes_the_turn_away() {
        let trouble = |kind| vec![(kind, "forbidden".to_owned())];
        assert_eq!(offer(&[], &[]), MirrorOffer::default());
        let said = offer(&[], &trouble(Kind::Service));
        assert_eq!((said.unreachable, said.trouble.as_deref()), (None, Some("Service objects: forbidden")));
        let said = offer(&trouble(Kind::Pod), &trouble(Kind::Service));
        assert_eq!((said.unreachable.as_deref(), said.trouble), (Some("Pod objects: forbidden"), None));
    }
}
