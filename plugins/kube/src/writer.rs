//! Writes to the API server: the statuses of Services and Events. One request at a time.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::{Client, Resource as _};
use ovl_proto::resource::Kind;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::balance::Addresses;
use crate::refusals::{Refusal, Refusals};

/// How long a request may take.
const WITHIN: Duration = Duration::from_secs(10);
/// The name under which Events are reported.
pub(crate) const CONTROLLER: &str = "ovl.io/ovl-kube";
/// How many bytes the API takes of an Event's note and of its instance, and how many of the object's name are in its name.
const MOST_NOTE: usize = 1024;
const MOST_NAME: usize = 200;
const MOST_INSTANCE: usize = 128;

/// What is to be written.
#[derive(Debug)]
pub(crate) enum Say {
    /// The addresses of a LoadBalancer.
    Addresses(Addresses),
    /// Why an object is not in force as it is there.
    Refused(Refusal),
}

/// A request has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The server refused, or was not reached.
    #[error(transparent)]
    Kube(#[from] Box<kube::Error>),
    /// The server did not answer.
    #[error("the API server did not answer within {} s", WITHIN.as_secs())]
    Silent,
    /// The request cannot be made.
    #[error("cannot make the request: {0}")]
    Json(#[from] serde_json::Error),
}

impl WriteError {
    /// Returns the status code of the server's answer. `None` if it did not answer.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(error) => match &**error {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Silent | Self::Json(_) => None,
        }
    }
}

/// Sends a request whose answer is an object.
pub(crate) async fn send(
    client: &Client,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<Value, WriteError> {
    let request = request.map_err(|error| Box::new(kube::Error::BuildRequest(error)))?;
    let answer = timeout(WITHIN, client.request::<Value>(request)).await;
    answer.map_err(|_| WriteError::Silent)?.map_err(|error| Box::new(error).into())
}

/// Writes to the API server.
pub(crate) struct Writer {
    client: Client,
    /// The name of this host's node, which Events have.
    node: String,
    refusals: Refusals,
    began: Instant,
    /// Why something cannot be written.
    trouble: watch::Sender<Option<String>>,
}

impl Writer {
    /// Creates a writer. `trouble` hears why something cannot be written.
    pub(crate) fn new(client: Client, node: String, trouble: watch::Sender<Option<String>>) -> Self {
        Self { client, node, refusals: Refusals::default(), began: Instant::now(), trouble }
    }

    /// Writes what is to be said, until nothing more can be.
    pub(crate) async fn run(mut self, mut says: mpsc::Receiver<Say>) {
        while let Some(say) = says.recv().await {
            let what = match &say {
                Say::Addresses(addresses) => format!("the status of Service {}", addresses.name),
                Say::Refused(refusal) => format!("an Event about {}", refusal.key),
            };
            let done = match say {
                Say::Addresses(addresses) => self.addresses(addresses).await,
                Say::Refused(refusal) => self.refused(&refusal).await,
            };
            self.note(&what, done);
        }
    }

    /// Records how a request ended.
    fn note(&self, what: &str, done: Result<bool, WriteError>) {
        let trouble = match done {
            Ok(true) => None,
            Ok(false) => return,
            Err(error) => Some(format!("cannot write {what}: {error}")),
        };
        self.trouble.send_if_modified(|last| {
            if let Some(trouble) = trouble.as_ref().filter(|_| last.is_none()) {
                tracing::warn!("{trouble}");
            }
            let is_new = *last != trouble;
            *last = trouble;
            is_new
        });
    }

    /// Writes the addresses of a LoadBalancer. Returns whether something was written.
    async fn addresses(&self, addresses: Addresses) -> Result<bool, WriteError> {
        let Addresses { name, version, addresses } = addresses;
        let ingress: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
        let patch = json!({
            "metadata": { "resourceVersion": version.to_string() },
            "status": { "loadBalancer": { "ingress": if ingress.is_empty() { Value::Null } else { ingress.into() } } },
        });
        let path = Service::url_path(&(), Some(&name.namespace));
        let params = PatchParams::default();
        let request =
            Request::new(path).patch_subresource("status", &name.name, &params, &Patch::Merge(&patch));
        match send(&self.client, request).await {
            Ok(_) => {
                tracing::info!(service = %name, ?addresses, "wrote the status of a LoadBalancer");
                Ok(true)
            }
            // Another program has changed it, or it was deleted: it is decided again with what it is now.
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Tells of an object that is not in force, if it was not told lately. Returns whether something was written.
    async fn refused(&mut self, refusal: &Refusal) -> Result<bool, WriteError> {
        let Some(count) = self.refusals.note(refusal, self.began.elapsed()) else { return Ok(false) };
        let done = self.tell(refusal, count).await;
        if done.is_err() {
            self.refusals.not_told(refusal);
        }
        done.map(|()| true)
    }

    async fn tell(&self, refusal: &Refusal, count: u32) -> Result<(), WriteError> {
        if count > 0 {
            return match self.repeat(refusal, count.saturating_add(1)).await {
                // Servers delete Events after a while.
                Err(error) if error.code() == Some(404) => self.create(refusal).await,
                done => done,
            };
        }
        match self.create(refusal).await {
            // Another host has told it, or this one before it was restarted: the same Event goes on.
            Err(error) if error.code() == Some(409) => self.repeat(refusal, 2).await,
            // Its namespace was deleted, and the object with it.
            Err(error) if error.code() == Some(404) => Ok(()),
            done => done,
        }
    }

    async fn create(&self, refusal: &Refusal) -> Result<(), WriteError> {
        let event = serde_json::to_vec(&event(refusal, &self.node, &now()?))?;
        let path = Event::url_path(&(), Some(event_namespace(refusal)));
        send(&self.client, Request::new(path).create(&PostParams::default(), event)).await.map(drop)
    }

    async fn repeat(&self, refusal: &Refusal, count: u32) -> Result<(), WriteError> {
        let series = json!({ "series": { "count": count, "lastObservedTime": now()? } });
        let request = Request::new(Event::url_path(&(), Some(event_namespace(refusal))));
        let request = request.patch(&event_name(refusal), &PatchParams::default(), &Patch::Merge(&series));
        send(&self.client, request).await.map(drop)
    }
}

/// Returns the present as the API has it.
pub(crate) fn now() -> Result<Value, serde_json::Error> {
    serde_json::to_value(MicroTime(Timestamp::now()))
}

/// Returns the namespace of the Event about an object: its own, or `default`.
fn event_namespace(refusal: &Refusal) -> &str {
    match refusal.key.name.namespace.as_str() {
        "" => "default",
        namespace => namespace,
    }
}

/// Returns the name of the Event about a refusal: the same for the same object and reason, whichever host tells it.
fn event_name(refusal: &Refusal) -> String {
    let mut hasher = DefaultHasher::new();
    refusal.hash(&mut hasher);
    let name = &refusal.key.name.name;
    let name =
        name.get(..name.floor_char_boundary(MOST_NAME)).unwrap_or_default().trim_end_matches(['.', '-']);
    format!("{name}.{:016x}", hasher.finish())
}

fn event(refusal: &Refusal, node: &str, now: &Value) -> Value {
    let Refusal { key, uid, reason } = refusal;
    let note = reason.get(..reason.floor_char_boundary(MOST_NOTE)).unwrap_or_default();
    let mut regarding =
        json!({ "apiVersion": key.kind.api_version(), "kind": key.kind.name(), "name": key.name.name });
    if key.kind != Kind::Namespace {
        regarding["namespace"] = key.name.namespace.clone().into();
    }
    if !uid.is_empty() {
        regarding["uid"] = uid.clone().into();
    }
    json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": { "name": event_name(refusal), "namespace": event_namespace(refusal) },
        "eventTime": now, "type": "Warning", "reason": "NotInForce", "action": "Mirror",
        "reportingController": CONTROLLER, "reportingInstance": node.get(..node.floor_char_boundary(MOST_INSTANCE)).unwrap_or_default(),
        "regarding": regarding, "note": note,
    })
}
