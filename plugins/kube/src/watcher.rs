//! Follows one kind at the API server: lists it, then watches, for ever.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use ovl_proto::resource::Kind;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::kind::{Object, Unusable, is_optional, object, path};
use crate::position::{End, Position, Step};

/// How many objects a page of a list has.
const PAGE: u32 = 500;
/// How long a page of a list may take.
const LIST_WITHIN: Duration = Duration::from_secs(30);
/// After which time the server is asked to end a watch, in seconds.
const WATCH_SECONDS: u32 = 290;
/// How long a watch may be silent. The server sends a bookmark every minute; otherwise the way to it is broken.
const SILENT: Duration = Duration::from_secs(90);

/// How often an API server is asked that does not have the kind.
const ABSENT: Duration = Duration::from_secs(15);

/// What a watcher tells.
#[derive(Debug)]
pub(crate) enum Item {
    /// All objects of a kind.
    Listed(Kind, u64, Vec<Object>),
    /// An object was added or changed.
    Changed(Kind, Object),
    /// An object was deleted.
    Deleted(Kind, Object),
    /// Why the API server cannot be followed. `None`: it can again.
    Trouble(Kind, Option<String>),
}

/// Why a list or a watch has failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Kube(Box<kube::Error>),
    #[error("it does not answer")]
    Silent,
    #[error("the list has the resourceVersion '{0}', which is not a number")]
    NoVersion(String),
    #[error("its list has the version {0}, which is older than what it sent before")]
    OldList(u64),
    #[error(transparent)]
    Object(#[from] Unusable),
    #[error("{0}")]
    Refused(String),
    /// Nobody hears any more.
    #[error("stopping")]
    Stopping,
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        Self::Kube(Box::new(error))
    }
}

impl<T> From<mpsc::error::SendError<T>> for Failure {
    fn from(_: mpsc::error::SendError<T>) -> Self {
        Self::Stopping
    }
}

/// A list, as far as it matters.
#[derive(Debug, Deserialize)]
struct Page {
    metadata: PageMeta,
    #[serde(default)]
    items: Option<Vec<Text>>,
}

/// An object as JSON: as trees of values, those of a page would take many times the memory.
#[derive(Debug)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self(value.to_string()))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    r#continue: Option<String>,
}

/// Follows the objects of a kind that a field selector chooses, until nobody hears any more.
pub(crate) async fn follow(client: Client, kind: Kind, selector: Option<String>, tell: mpsc::Sender<Item>) {
    let mut position = Position::default();
    let mut troubled = false;
    loop {
        let (end, trouble) =
            match step(&client, kind, selector.as_deref(), &mut position, &tell, &mut troubled).await {
                Ok(end) => (end, None),
                Err(Failure::Stopping) => return,
                Err(failure) if is_answered(&failure, GONE) => (End::Gone, None),
                Err(failure) if is_optional(kind) && is_answered(&failure, NOT_FOUND) => {
                    if settled(kind, &tell, &mut troubled).await.is_err() {
                        return;
                    }
                    sleep(ABSENT).await;
                    continue;
                }
                Err(failure) => (End::Failed, Some(sentence(&failure))),
            };
        if let Some(trouble) = trouble {
            tracing::warn!(%kind, error = trouble, "cannot follow the API server");
            troubled = true;
            if tell.send(Item::Trouble(kind, Some(trouble))).await.is_err() {
                return;
            }
        }
        let wait = position.ended(end);
        // Hosts that lost the server at once do not come back at once.
        sleep(wait.mul_f64(0.5 + spread())).await;
    }
}

/// Lists, or watches until the watch ends.
async fn step(
    client: &Client,
    kind: Kind,
    selector: Option<&str>,
    position: &mut Position,
    tell: &mpsc::Sender<Item>,
    troubled: &mut bool,
) -> Result<End, Failure> {
    if let Step::List = position.step() {
        let (version, objects) = list(client, kind, selector).await?;
        if !position.listed(version) {
            return Err(Failure::OldList(version));
        }
        tell.send(Item::Listed(kind, version, objects)).await?;
        settled(kind, tell, troubled).await?;
    }
    let Step::Watch(version) = position.step() else { return Ok(End::Gone) };
    let params = WatchParams {
        field_selector: selector.map(str::to_owned),
        timeout: Some(WATCH_SECONDS),
        bookmarks: true,
        ..WatchParams::default()
    };
    let request = Request::new(path(kind)).watch(&params, &version.to_string()).map_err(request_error)?;
    let events = timeout(LIST_WITHIN, client.request_events::<Value>(request)).await;
    let events = events.map_err(|_| Failure::Silent)??;
    let mut events = std::pin::pin!(events);
    settled(kind, tell, troubled).await?;
    loop {
        let Some(event) = timeout(SILENT, events.try_next()).await.map_err(|_| Failure::Silent)?? else {
            return Ok(End::Closed);
        };
        match event {
            WatchEvent::Added(value) | WatchEvent::Modified(value) => {
                let changed = object(kind, value)?;
                position.seen(changed.version);
                tell.send(Item::Changed(kind, changed)).await?;
            }
            WatchEvent::Deleted(value) => {
                let deleted = object(kind, value)?;
                position.seen(deleted.version);
                tell.send(Item::Deleted(kind, deleted)).await?;
            }
            WatchEvent::Bookmark(bookmark) => {
                let version = bookmark.metadata.resource_version;
                position.seen(version.parse().map_err(|_| Failure::NoVersion(version))?);
            }
            WatchEvent::Error(status) if status.code == GONE => return Ok(End::Gone),
            WatchEvent::Error(status) => return Err(Failure::Refused(status.message)),
        }
    }
}

/// Tells that a trouble is over.
async fn settled(kind: Kind, tell: &mpsc::Sender<Item>, troubled: &mut bool) -> Result<(), Failure> {
    if std::mem::take(troubled) {
        tracing::info!(%kind, "follows the API server again");
    }
    Ok(tell.send(Item::Trouble(kind, None)).await?)
}

/// Lists all objects of a kind. Returns the version of the list.
async fn list(client: &Client, kind: Kind, selector: Option<&str>) -> Result<(u64, Vec<Object>), Failure> {
    let mut params =
        ListParams { field_selector: selector.map(str::to_owned), ..ListParams::default() }.limit(PAGE);
    let mut objects = Vec::new();
    loop {
        let request = Request::new(path(kind)).list(&params).map_err(request_error)?;
        let page = timeout(LIST_WITHIN, client.request::<Page>(request)).await;
        let Page { metadata, items } = page.map_err(|_| Failure::Silent)??;
        for Text(item) in items.unwrap_or_default() {
            let value = serde_json::from_str(&item).map_err(kube::Error::SerdeError)?;
            objects.push(object(kind, value)?);
        }
        // All pages have the version of the first one.
        let version = metadata.resource_version;
        match metadata.r#continue.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok((version.parse().map_err(|_| Failure::NoVersion(version))?, objects)),
        }
    }
}

/// 410 Gone.
const GONE: u16 = 410;

/// 404 Not Found.
const NOT_FOUND: u16 = 404;

/// Whether the API server has answered with a code.
fn is_answered(failure: &Failure, code: u16) -> bool {
    matches!(failure, Failure::Kube(error) if matches!(&**error, kube::Error::Api(status) if status.code == code))
}

fn request_error(error: kube::core::request::Error) -> Failure {
    Failure::from(kube::Error::BuildRequest(error))
}

/// Returns an error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Returns a number from 0 to below 1 that differs from host to host and from time to time.
fn spread() -> f64 {
    f64::from(RandomState::new().hash_one(0) as u16) / f64::from(u16::MAX)
}
