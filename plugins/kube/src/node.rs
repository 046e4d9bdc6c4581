//! Looks at this host's Node: keeps its condition NetworkUnavailable, and tells ovld its zone and the blocks of its pods.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{GetParams, Patch, PatchParams};
use kube::core::Request;
use kube::{Client, Resource as _};
use ovl_control::OwnNode;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::condition::{Condition, Health, due, reconsider_in};
use crate::ovld::Connection;
use crate::reports::Heard;
use crate::writer::{WriteError, send};

/// How often the Node is looked at: another program may have changed it, or it was made anew.
const LOOK: Duration = Duration::from_secs(60);
/// The label that names the zone of a Node.
const ZONE: &str = "topology.kubernetes.io/zone";
/// The wait after a failure: at first there may be no such Node.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps the condition of a Node for ever, and tells ovld what the Node says.
pub(crate) async fn keep(
    client: Client,
    node: String,
    socket: PathBuf,
    mut heard: watch::Receiver<Option<Heard>>,
) {
    let mut failed = false;
    loop {
        let Some(Heard { report, since }) = heard.borrow_and_update().clone() else {
            if heard.changed().await.is_err() {
                return;
            }
            continue;
        };
        let health = match report {
            None => Health::Silent,
            Some(report) => report.unready.map_or(Health::Ready, Health::Unready),
        };
        let wait = match look(&client, &node, &socket, &health, since.elapsed()).await {
            Ok(()) => {
                failed = false;
                reconsider_in(&health, since.elapsed()).unwrap_or(LOOK)
            }
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!(node, %error, "cannot say at the Node whether its network is available");
                }
                AGAIN
            }
        };
        match timeout(wait, heard.changed()).await {
            Ok(Err(_)) => return,
            // What is said often is looked at not more often than that.
            Ok(Ok(())) => sleep(Duration::from_millis(200)).await,
            Err(_) => {}
        }
    }
}

/// Looks at the Node, and writes its condition if it is to be another one.
async fn look(
    client: &Client,
    node: &str,
    socket: &Path,
    health: &Health,
    lasted: Duration,
) -> Result<(), WriteError> {
    let path = Node::url_path(&(), None);
    // As a cache of the server has it.
    let params = GetParams { resource_version: Some("0".to_owned()) };
    let found = send(client, Request::new(path.clone()).get(node, &params)).await?;
    if !matches!(health, Health::Silent) {
        let zone = found.pointer("/metadata/labels").and_then(|labels| labels.get(ZONE));
        let zone = zone.and_then(Value::as_str).unwrap_or_default().to_owned();
        let told = async {
            let own = OwnNode { zone, pod_cidrs: pod_cidrs(&found) };
            Connection::open(socket).await?.own_node(own).await
        };
        if let Err(error) = told.await {
            tracing::debug!(%error, "cannot tell ovld what the Node says");
        }
    }
    let now = serde_json::to_value(Time(Timestamp::now()))?;
    let now = now.as_str().unwrap_or_default();
    let Some(condition) = due(Condition::of(&found).as_ref(), health, lasted, now) else { return Ok(()) };
    let patch = Patch::Strategic(condition.patch(now));
    let request = Request::new(path).patch_subresource("status", node, &PatchParams::default(), &patch);
    send(client, request).await?;
    tracing::info!(?health, "wrote the condition NetworkUnavailable of the Node");
    Ok(())
}

/// Returns the blocks of addresses that the API server gives to the pods of a Node: one of each family at most.
fn pod_cidrs(node: &Value) -> Vec<IpNet> {
    let all = node.pointer("/spec/podCIDRs").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(|cidr| cidr.as_str()?.parse::<IpNet>().ok()).take(2).collect()
}
