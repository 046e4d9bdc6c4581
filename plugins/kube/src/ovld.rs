//! Requests to ovld over its control socket.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ovl_control::{
    ApiReport, DeletedObject, DeletedPod, Document, Join, ListedKind, MAX_REQUEST, Mirror, MirrorOffer,
    Mirrored, NetworkCreate, NetworkInfo, NodePods, Nodes, NotMirrored, OwnNode, Reply, Request,
};
use ovl_proto::resource::{Kind, Name, ResourceKey};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::store::News;

/// How long ovld may take for a request. It waits up to ten seconds until it is a member and knows its peers.
const WITHIN: Duration = Duration::from_secs(60);
/// What a request has beside its documents, in bytes.
const FRAME: usize = 1024;
/// How many bytes of documents a request has, unless a single one has more: while it is written, they take many times that.
const AT_ONCE: usize = 256 << 10;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The socket cannot be connected to, or the connection was lost.
    #[error("lost ovld: {0}")]
    Io(#[from] std::io::Error),
    /// What ovld sent is not a reply.
    #[error("ovld sent a reply that this release does not understand: {0}. Run the same release of both")]
    Protocol(#[from] serde_json::Error),
    /// ovld replied something else than expected.
    #[error("ovld sent another reply than was expected. Run the same release of both")]
    Unexpected,
    /// ovld refused.
    #[error("{0}")]
    Refused(String),
    /// ovld did not answer.
    #[error("ovld did not answer within {} s", WITHIN.as_secs())]
    Silent,
}

/// A connection to ovld.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(socket: &Path) -> Result<Self, Failure> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(socket).await?) })
    }

    /// Says that `ovl-kube` runs. [`Self::turn`] then tells whether it is this host's turn to mirror.
    pub(crate) async fn offer(&mut self, offer: MirrorOffer) -> Result<(), Failure> {
        self.write(&Request::MirrorTurn(offer)).await
    }

    /// Waits until ovld tells whether it is this host's turn to mirror.
    pub(crate) async fn turn(&mut self) -> Result<bool, Failure> {
        match self.read().await? {
            Reply::MirrorTurn { acts } => Ok(acts),
            reply => Err(unexpected(reply)),
        }
    }

    /// Asks what is to be said to the API server. [`Self::report`] then tells.
    pub(crate) async fn ask_report(&mut self) -> Result<(), Failure> {
        self.write(&Request::ApiReport).await
    }

    /// Waits until ovld tells what is to be said to the API server.
    pub(crate) async fn report(&mut self) -> Result<ApiReport, Failure> {
        match self.read().await? {
            Reply::ApiReport(report) => Ok(*report),
            reply => Err(unexpected(reply)),
        }
    }

    /// Names hosts to join through.
    pub(crate) async fn join(&mut self, join: Join) -> Result<(), Failure> {
        self.done(&Request::Join(join)).await
    }

    /// Says which Nodes there are.
    pub(crate) async fn nodes(&mut self, names: BTreeSet<String>) -> Result<(), Failure> {
        self.done(&Request::Nodes(Nodes { names })).await
    }

    /// Says what the API server has of this host's Node.
    pub(crate) async fn own_node(&mut self, own: OwnNode) -> Result<(), Failure> {
        self.done(&Request::OwnNode(own)).await
    }

    /// Returns all networks.
    pub(crate) async fn networks(&mut self) -> Result<Vec<NetworkInfo>, Failure> {
        match self.request(&Request::NetworkLs).await? {
            Reply::Networks(networks) => Ok(networks),
            reply => Err(unexpected(reply)),
        }
    }

    /// Creates a network.
    pub(crate) async fn create_network(&mut self, create: NetworkCreate) -> Result<(), Failure> {
        match self.request(&Request::NetworkCreate(create)).await? {
            Reply::Network(_) => Ok(()),
            reply => Err(unexpected(reply)),
        }
    }

    /// Sends a request to which nothing is to be said.
    async fn done(&mut self, request: &Request) -> Result<(), Failure> {
        match self.request(request).await? {
            Reply::Done => Ok(()),
            reply => Err(unexpected(reply)),
        }
    }

    /// Waits until ovld closes the connection. It says nothing by itself.
    pub(crate) async fn closed(&mut self) -> Failure {
        match self.stream.fill_buf().await {
            Ok([]) => std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into(),
            Ok(_) => Failure::Unexpected,
            Err(error) => error.into(),
        }
    }

    /// Hands on what is new of some kinds. `cluster` is that of the API server; `None`: they are the pods of this node.
    /// Returns the objects that are not in force, each with the reason.
    pub(crate) async fn tell(
        &mut self,
        cluster: Option<&str>,
        news: Vec<News>,
    ) -> Result<BTreeMap<ResourceKey, String>, Failure> {
        let Handed { staged, request } = hand_on(cluster, news)?;
        for manifests in staged {
            let documents: Vec<Document> =
                manifests.iter().map(|manifest| document(manifest)).collect::<Result<_, _>>()?;
            self.done(&Request::Stage { documents }).await?;
        }
        let Reply::Mirrored(mirrored) = self.request(&request).await? else {
            return Err(Failure::Unexpected);
        };
        let Mirrored { changed, stale, failed } = *mirrored;
        tracing::debug!(changed, stale, failed = failed.len(), "handed on");
        // It is tried again every few seconds.
        Ok(failed.into_iter().map(|NotMirrored { key, reason }| (key, reason)).collect())
    }

    async fn request(&mut self, request: &Request) -> Result<Reply, Failure> {
        let exchange = async {
            self.write(request).await?;
            self.read().await
        };
        timeout(WITHIN, exchange).await.map_err(|_| Failure::Silent)?
    }

    async fn write(&mut self, request: &Request) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        Ok(self.stream.get_mut().write_all(&line).await?)
    }

    async fn read(&mut self) -> Result<Reply, Failure> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_str(&line)? {
            Reply::Error(failure) => Err(Failure::Refused(failure.message)),
            reply => Ok(reply),
        }
    }
}

fn unexpected(reply: Reply) -> Failure {
    match reply {
        Reply::Error(failure) => Failure::Refused(failure.message),
        _ => Failure::Unexpected,
    }
}

/// Requests that hand on what is new.
#[derive(Debug, PartialEq)]
struct Handed {
    /// Manifests, as many together as fit a request.
    staged: Vec<Vec<Arc<str>>>,
    /// The request about them.
    request: Request,
}

/// Makes requests of what is new.
fn hand_on(cluster: Option<&str>, news: Vec<News>) -> Result<Handed, Failure> {
    let mut staged: Vec<Vec<Arc<str>>> = Vec::new();
    // With a comma. What stands for the manifest is longer than nothing.
    let around = serde_json::to_vec(&document("0")?)?.len();
    let mut space = 0;
    let mut mirror = Mirror { cluster: cluster.unwrap_or_default().to_owned(), ..Mirror::default() };
    let mut pods = NodePods::default();
    for News { kind, listed, objects, deleted } in news {
        mirror.listed.extend(listed.map(|version| ListedKind { kind, version }));
        pods.whole |= listed.is_some();
        for (name, deletion) in deleted {
            pods.deleted.push(DeletedPod {
                namespace: name.namespace.clone(),
                name: name.name.clone(),
                uid: deletion.uid,
            });
            mirror.deleted.push(DeletedObject { key: ResourceKey { kind, name }, version: deletion.version });
        }
        for (name, manifest) in objects {
            let length = manifest.len() + around;
            if length > MAX_REQUEST - FRAME {
                let key = ResourceKey { kind, name };
                let reason = format!("is {length} bytes long, more than ovld takes");
                mirror.failed.push(NotMirrored { key, reason });
                continue;
            }
            match staged.last_mut().filter(|_| length <= space) {
                Some(last) => last.push(manifest),
                None => {
                    space = length.max(AT_ONCE);
                    staged.push(vec![manifest]);
                }
            }
            space -= length;
        }
    }
    // A pod is reduced to a few fields, so none is too long.
    let request = if cluster.is_some() { Request::Mirror(mirror) } else { Request::NodePods(pods) };
    Ok(Handed { staged, request })
}

/// Returns what ovld takes for a manifest.
fn document(manifest: &str) -> Result<Document, serde_json::Error> {
    Ok(Document {
        file: "the Kubernetes API server".to_owned(),
        line: 1,
        within: String::new(),
        value: serde_json::from_str(manifest)?,
    })
}

/// Returns the names of a kind's objects among these keys.
pub(crate) fn names_of(kind: Kind, keys: &BTreeMap<ResourceKey, String>) -> BTreeSet<Name> {
    keys.keys().filter(|key| key.kind == kind).map(|key| key.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;
    use crate::store::Deletion;

    fn news(kind: Kind, listed: Option<u64>, objects: Vec<Value>) -> News {
        let named = |object: Value| {
            let name = object["metadata"]["name"].as_str().unwrap();
            (Name::new("shop", name), object.to_string().into())
        };
        let objects = objects.into_iter().map(named).collect();
        let deletion = Deletion { version: 9, uid: "u".to_owned() };
        News { kind, listed, objects, deleted: vec![(Name::new("shop", "gone"), deletion)] }
    }

    #[test]
    fn documents_are_divided_into_requests_that_ovld_takes() {
        let object = |n: usize, bytes: usize| json!({ "metadata": { "namespace": "shop", "name": format!("o{n}") }, "data": "x".repeat(bytes) });
        let mut objects: Vec<Value> = (0..5).map(|n| object(n, AT_ONCE * 2 / 5)).collect();
        objects.push(object(5, MAX_REQUEST));
        objects.push(object(6, MAX_REQUEST - FRAME - 200));
        objects.push(object(7, 1));
        let handed = hand_on(Some("c"), vec![news(Kind::Service, Some(7), objects)]).unwrap();
        assert_eq!(handed.staged.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1, 1, 1]);
        for manifests in handed.staged {
            let documents = manifests.iter().map(|it| document(it).unwrap()).collect();
            let line = serde_json::to_vec(&Request::Stage { documents }).unwrap();
            assert!(line.len() < MAX_REQUEST, "{}", line.len());
        }
        let Request::Mirror(mirror) = handed.request else { panic!("another request") };
        assert_eq!(mirror.cluster, "c");
        assert_eq!(mirror.listed, [ListedKind { kind: Kind::Service, version: 7 }]);
        assert_eq!(mirror.deleted.len(), 1);
        // One that is too long stops no other, and is named.
        assert_eq!(mirror.failed.len(), 1);
        assert_eq!(mirror.failed[0].key.to_string(), "Service shop/o5");
    }

    #[test]
    fn pods_are_handed_on_as_those_of_the_node() {
        let pod = json!({ "metadata": { "namespace": "shop", "name": "p" } });
        let handed = hand_on(None, vec![news(Kind::Pod, None, vec![pod])]).unwrap();
        let deleted =
            vec![DeletedPod { namespace: "shop".to_owned(), name: "gone".to_owned(), uid: "u".to_owned() }];
        assert_eq!(handed.request, Request::NodePods(NodePods { whole: false, deleted }));
    }
}
