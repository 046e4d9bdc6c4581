//! A client of the Engine's API. It finds the container of an endpoint and the container's names, which no call to a
//! plugin contains.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request as HttpRequest, StatusCode};
use hyper_util::rt::TokioIo;
use ovl_control::{DockerName, Request};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::ovld::Ovld;

/// How long to wait until the Engine knows an endpoint that has just joined.
const KNOWN: Duration = Duration::from_secs(30);
/// The pause after the first query. It doubles with each query.
const PAUSE: Duration = Duration::from_millis(50);
/// The timeout of one query. While it starts a container, the Engine may not answer queries about that network.
const ANSWER: Duration = Duration::from_secs(10);
/// The maximum size of a response in bytes: that of a network with very many containers.
const MAX_ANSWER: usize = 16 << 20;

/// A client of the Engine's API.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    socket: Arc<PathBuf>,
}

impl Engine {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket: Arc::new(socket) }
    }

    /// Finds the names of a container that has just joined, and sends them to ovld.
    pub(crate) async fn name(self, ovld: Ovld, join: Value) {
        let id = |key: &str| join.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (network, endpoint) = (id("NetworkID"), id("EndpointID"));
        let end = Instant::now() + KNOWN;
        let mut pause = PAUSE;
        while Instant::now() < end {
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
            match self.names(&network, &endpoint).await {
                Ok(Some(names)) => {
                    // The endpoint may have been deleted meanwhile.
                    let _ = ovld.ask(Request::DockerName(names), KNOWN).await;
                    return;
                }
                Ok(None) => {}
                Err(error) => eprintln!("ovl-docker: cannot get the name of endpoint {endpoint}: {error:#}"),
            }
        }
    }

    /// Returns the names of an endpoint's container; `None` while the Engine does not know the endpoint.
    async fn names(&self, network: &str, endpoint: &str) -> Result<Option<DockerName>> {
        let Some(found) = self.get(&format!("/networks/{network}")).await? else { return Ok(None) };
        let containers = found.get("Containers").and_then(Value::as_object);
        let is_it = |container: &Value| container.get("EndpointID").and_then(Value::as_str) == Some(endpoint);
        let Some((id, _)) = containers.into_iter().flatten().find(|(_, container)| is_it(container)) else {
            return Ok(None);
        };
        let Some(container) = self.get(&format!("/containers/{id}/json")).await? else { return Ok(None) };
        let name = container.get("Name").and_then(Value::as_str).unwrap_or_default();
        let networks = container.pointer("/NetworkSettings/Networks").and_then(Value::as_object);
        let here =
            networks.into_iter().flatten().map(|(_, settings)| settings).find(|settings| is_it(settings));
        let aliases = here.and_then(|settings| settings.get("Aliases")).and_then(Value::as_array);
        Ok(Some(DockerName {
            endpoint: endpoint.to_owned(),
            name: name.trim_start_matches('/').to_owned(),
            aliases: aliases.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect(),
        }))
    }

    /// Queries the Engine with a timeout; `None` if the object does not exist.
    async fn get(&self, path: &str) -> Result<Option<Value>> {
        timeout(ANSWER, self.ask(path))
            .await
            .with_context(|| format!("no response to {path} within {} s", ANSWER.as_secs()))?
    }

    async fn ask(&self, path: &str) -> Result<Option<Value>> {
        let stream = UnixStream::connect(self.socket.as_path())
            .await
            .with_context(|| format!("cannot connect to the Engine at {}", self.socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = HttpRequest::get(path).header(HOST, "docker").body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        driver.abort();
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        ensure!(status.is_success(), "the Engine responds to {path} with {status}");
        let bytes = body.map_err(|error| anyhow::anyhow!("{path}: {error}"))?.to_bytes();
        Ok(Some(serde_json::from_slice(&bytes)?))
    }
}
