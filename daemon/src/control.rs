//! The control socket, which serves `ovlctl` and the CNI plugin. The protocol is in `ovl_control`.
//!
//! It reads and writes; what a request means is for [`Answers`]. Begin to read at [`serve`].

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use ovl_control::{
    ApiReport, CaptureRequest, CapturedFrom, Document, Event, Failure, FailureKind, Flows, FlowsOf,
    MAX_REQUEST, MAX_STAGED, MAX_STAGED_BYTES, MirrorOffer, Reply, Request,
};
use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};

use crate::events::Events;
use crate::slots::ClientSlots;

/// Maximum number of clients that are served at a time. Further clients wait.
const MAX_CLIENTS: usize = 256;

/// What answers the requests of clients.
pub(crate) trait Answers: 'static {
    /// Answers a request, with the documents that were staged for it. The socket itself handles [`Request::Events`]
    /// and [`Request::Flows`] that follow, [`Request::Capture`], [`Request::MirrorTurn`], [`Request::ApiReport`] and [`Request::Stage`].
    async fn answer(self: &Rc<Self>, request: Request, staged: Vec<Document>) -> Reply;

    /// Returns the recent events.
    fn events(&self) -> &Events;

    /// Begins a connection of `ovl-kube`. Returns its number, and whether it is this host's turn to mirror.
    fn begin_mirror(self: &Rc<Self>, offer: MirrorOffer) -> (u64, watch::Receiver<bool>);

    /// Ends a connection of `ovl-kube`.
    fn end_mirror(&self, connection: u64);

    /// Returns what is to be said to the API server.
    fn api_report(&self) -> watch::Receiver<ApiReport>;

    /// Captures packets. It ends when the receiver is dropped.
    async fn capture(
        self: &Rc<Self>,
        request: CaptureRequest,
    ) -> Result<mpsc::Receiver<CapturedFrom>, Failure>;

    /// Follows flows. It ends when the receiver is dropped.
    async fn follow_flows(self: &Rc<Self>, of: FlowsOf) -> Result<mpsc::Receiver<Flows>, Failure>;
}

/// Creates the socket, accessible to root and its group only. A socket that is left over belongs to no
/// daemon, because this process holds the lock on the run directory.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("removing {}", path.display()));
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("protecting {}", path.display()))?;
    Ok(listener)
}

/// Serves clients forever.
pub(crate) async fn serve(node: Rc<impl Answers>, listener: UnixListener) {
    let slots = ClientSlots::new(MAX_CLIENTS);
    loop {
        let Some(slot) = slots.wait().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let node = Rc::clone(&node);
                tokio::task::spawn_local(async move {
                    if let Err(error) = client(&node, stream).await {
                        tracing::debug!(%error, "a client of the socket went away");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // The usual cause is that the file descriptors are exhausted. Clients that disconnect free
                // some.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn client(node: &Rc<impl Answers>, stream: UnixStream) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    let mut staged = Staged::default();
    loop {
        line.clear();
        // The extra byte distinguishes a line that is too long from one that just fits.
        let length = (&mut read).take(MAX_REQUEST as u64 + 1).read_until(b'\n', &mut line).await?;
        if length == 0 {
            return Ok(());
        }
        if length > MAX_REQUEST {
            let message = format!("a request is at most {MAX_REQUEST} bytes long");
            return send(&mut write, &Reply::Error(Failure { kind: FailureKind::Invalid, message })).await;
        }
        match parse(&line) {
            Ok(Request::Events { follow: true, .. }) => {
                // A client that disconnects is only seen by reading from its connection.
                let mut ignored = tokio::io::sink();
                return tokio::select! {
                    result = follow(node, &mut write) => result,
                    _ = tokio::io::copy(&mut read, &mut ignored) => Ok(()),
                };
            }
            Ok(Request::MirrorTurn(offer)) => {
                let (connection, turn) = node.begin_mirror(offer);
                let mut ignored = tokio::io::sink();
                let result = tokio::select! {
                    result = tell_turn(turn, &mut write) => result,
                    _ = tokio::io::copy(&mut read, &mut ignored) => Ok(()),
                };
                node.end_mirror(connection);
                return result;
            }
            Ok(Request::ApiReport) => {
                let mut ignored = tokio::io::sink();
                return tokio::select! {
                    result = tell_report(node.api_report(), &mut write) => result,
                    _ = tokio::io::copy(&mut read, &mut ignored) => Ok(()),
                };
            }
            Ok(Request::Capture(request)) => match node.capture(request).await {
                Ok(captured) => {
                    let mut ignored = tokio::io::sink();
                    return tokio::select! {
                        result = tell_all(captured, &mut write, Reply::Captured) => result,
                        _ = tokio::io::copy(&mut read, &mut ignored) => Ok(()),
                    };
                }
                Err(failure) => send(&mut write, &Reply::Error(failure)).await?,
            },
            Ok(Request::Flows { follow: true, of }) => match node.follow_flows(of).await {
                Ok(flows) => {
                    let mut ignored = tokio::io::sink();
                    return tokio::select! {
                        result = tell_all(flows, &mut write, Reply::Flows) => result,
                        _ = tokio::io::copy(&mut read, &mut ignored) => Ok(()),
                    };
                }
                Err(failure) => send(&mut write, &Reply::Error(failure)).await?,
            },
            Ok(Request::Stage { documents }) => {
                let reply = staged.add(documents, length);
                send(&mut write, &reply).await?;
            }
            Ok(request) => {
                let documents = std::mem::take(&mut staged).documents;
                let reply = node.answer(request, documents).await;
                send(&mut write, &reply).await?;
            }
            Err(error) => {
                let message = format!("not a request that this release understands: {error}");
                send(&mut write, &Reply::Error(Failure { kind: FailureKind::Invalid, message })).await?;
            }
        }
    }
}

/// Documents that a client sends in several requests.
#[derive(Default)]
struct Staged {
    documents: Vec<Document>,
    bytes: usize,
}

impl Staged {
    fn add(&mut self, documents: Vec<Document>, bytes: usize) -> Reply {
        self.bytes += bytes;
        if self.documents.len() + documents.len() > MAX_STAGED || self.bytes > MAX_STAGED_BYTES {
            *self = Self::default();
            let message = format!(
                "at most {MAX_STAGED} documents of {} MiB together at a time",
                MAX_STAGED_BYTES >> 20
            );
            return Reply::Error(Failure { kind: FailureKind::Invalid, message });
        }
        self.documents.extend(documents);
        Reply::Done
    }
}

/// Parses a request and rejects unknown fields.
fn parse(line: &[u8]) -> Result<Request, String> {
    let request: Request = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    // serde ignores unknown fields next to a request that has no fields.
    let given: Map<String, Value> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let known = serde_json::to_value(&request).map_err(|error| error.to_string())?;
    match given.keys().find(|key| known.get(*key).is_none()) {
        Some(key) => Err(format!("unknown field `{key}`")),
        None => Ok(request),
    }
}

async fn follow(
    node: &Rc<impl Answers>,
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let (all, mut live) = node.events().follow();
    send(write, &Reply::Events(all)).await?;
    loop {
        let events: Vec<Event> = match live.recv().await {
            Ok(event) => vec![event],
            // A client that reads too slowly misses events and continues with the next one.
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return Ok(()),
        };
        send(write, &Reply::Events(events)).await?;
    }
}

/// Tells whether it is this host's turn to mirror, now and whenever that changes.
async fn tell_turn(
    mut turn: watch::Receiver<bool>,
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> std::io::Result<()> {
    loop {
        let acts = *turn.borrow_and_update();
        send(write, &Reply::MirrorTurn { acts }).await?;
        if turn.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Tells what is to be said to the API server, now and whenever that changes.
async fn tell_report(
    mut report: watch::Receiver<ApiReport>,
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> std::io::Result<()> {
    loop {
        let now = Box::new(report.borrow_and_update().clone());
        send(write, &Reply::ApiReport(now)).await?;
        if report.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Tells what comes, until it ends.
async fn tell_all<T>(
    mut all: mpsc::Receiver<T>,
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
    reply: impl Fn(Box<T>) -> Reply,
) -> std::io::Result<()> {
    while let Some(some) = all.recv().await {
        send(write, &reply(Box::new(some))).await?;
    }
    Ok(())
}

async fn send(write: &mut (impl tokio::io::AsyncWrite + Unpin), reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    write.write_all(&line).await
}
