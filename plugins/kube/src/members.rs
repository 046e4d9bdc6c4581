//! Members of the cluster by the API server: the hosts through which ovld joins, the host that begins the cluster, and which
//! Nodes there are.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::{GetParams, ListParams, PostParams};
use kube::core::Request;
use kube::{Client, Resource as _};
use ovl_control::Join;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::ovld::{Connection, Failure};
use crate::reports::Heard;
use crate::watcher::Item;
use crate::writer::{WriteError, send};

/// How often ovld is told hosts to join through, while it needs them.
const EVERY: Duration = Duration::from_secs(2);
/// The wait before ovld is told again which Nodes there are: after a failure, and after a change, for many may follow.
const AGAIN: Duration = Duration::from_secs(1);
/// How many Nodes a page of a list has.
const PAGE: u32 = 500;
/// The name and the namespace of the Lease whose holder begins the cluster.
const LEASE: (&str, &str) = ("ovl", "kube-system");

/// Names hosts to ovld through which it joins, whenever it needs them.
pub(crate) async fn join(
    client: Client,
    node: String,
    socket: PathBuf,
    mut heard: watch::Receiver<Option<Heard>>,
) {
    let mut failed = false;
    loop {
        let report = heard.borrow_and_update().clone().and_then(|heard| heard.report);
        let Some(id) = report.and_then(|report| report.seeks) else {
            if heard.changed().await.is_err() {
                return;
            }
            continue;
        };
        match name_hosts(&client, &node, &id.to_string(), &socket).await {
            Ok(()) => failed = false,
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!(error, "cannot name hosts to join through");
                }
            }
        }
        if let Ok(Err(_)) = timeout(EVERY, heard.changed()).await {
            return;
        }
        sleep(EVERY / 4).await;
    }
}

/// Names hosts to ovld once.
async fn name_hosts(client: &Client, node: &str, id: &str, socket: &std::path::Path) -> Result<(), String> {
    let nodes = list(client).await.map_err(|error| format!("listing the Nodes: {error}"))?;
    let begin =
        begins(client, id).await.map_err(|error| format!("reading the Lease {}: {error}", LEASE.0))?;
    let hosts = addresses(&nodes, node, usize::from(id.bytes().fold(0u8, u8::wrapping_add)));
    let tell = async { Connection::open(socket).await?.join(Join { hosts, begin }).await };
    tell.await.map_err(|error: Failure| error.to_string())
}

async fn list(client: &Client) -> Result<Vec<Value>, WriteError> {
    let mut params = ListParams::default().limit(PAGE);
    let mut nodes = Vec::new();
    loop {
        let request = Request::new(Node::url_path(&(), None)).list(&params);
        let mut page = send(client, request).await?;
        if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
            nodes.extend(items);
        }
        match page.pointer("/metadata/continue").and_then(Value::as_str) {
            Some(token) if !token.is_empty() => params.continue_token = Some(token.to_owned()),
            Some(_) | None => return Ok(nodes),
        }
    }
}

/// Whether this host begins the cluster: it is the holder of the Lease, or there is none and it becomes the holder. The API
/// server lets one client create it. It is never given to another host: a cluster is begun once.
async fn begins(client: &Client, id: &str) -> Result<bool, WriteError> {
    let (name, namespace) = LEASE;
    let path = Lease::url_path(&(), Some(namespace));
    let found = send(client, Request::new(path.clone()).get(name, &GetParams::default())).await;
    let lease = match found {
        Err(error) if error.code() == Some(404) => {
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": { "name": name, "namespace": namespace },
                "spec": { "holderIdentity": id },
            });
            let request = Request::new(path).create(&PostParams::default(), serde_json::to_vec(&lease)?);
            match send(client, request).await {
                // Another host was faster.
                Err(error) if error.code() == Some(409) => return Ok(false),
                created => created?,
            }
        }
        found => found?,
    };
    Ok(lease.pointer("/spec/holderIdentity").is_some_and(|holder| holder == id))
}

/// Returns the addresses of other Nodes, of many some. Which ones depends on `start`, so that not all hosts join through the
/// same.
fn addresses(nodes: &[Value], own: &str, start: usize) -> Vec<IpAddr> {
    let all: Vec<IpAddr> = nodes
        .iter()
        .filter(|node| node.pointer("/metadata/name").is_some_and(|name| name != own))
        .flat_map(|node| node.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten())
        .filter(|address| address.get("type").is_some_and(|kind| kind == "InternalIP"))
        .filter_map(|address| address.get("address")?.as_str()?.parse().ok())
        .collect();
    let start = start.checked_rem(all.len()).unwrap_or(0);
    all.iter().cycle().skip(start).take(all.len().min(Join::MOST)).copied().collect()
}

/// Tells ovld which Nodes there are, whenever that changes, and hands `items`, which are about Nodes, `onward`.
pub(crate) async fn tell(socket: PathBuf, mut items: mpsc::Receiver<Item>, onward: mpsc::Sender<Item>) {
    let mut names = BTreeSet::new();
    let (mut known, mut told, mut failed) = (false, false, false);
    loop {
        let wait = if known && !told { AGAIN } else { Duration::MAX };
        match timeout(wait, items.recv()).await {
            Ok(None) => return,
            Ok(Some(item)) => {
                told &= !take(&item, &mut names, &mut known);
                if onward.send(item).await.is_err() {
                    return;
                }
            }
            Err(_) => {
                let tell = async { Connection::open(&socket).await?.nodes(names.clone()).await };
                let done: Result<(), Failure> = tell.await;
                if let Err(error) = &done
                    && !std::mem::replace(&mut failed, true)
                {
                    tracing::warn!(%error, "cannot tell ovld which Nodes there are");
                }
                told = done.is_ok();
                failed &= !told;
            }
        }
    }
}

/// Takes over a change. Returns whether there are other Nodes now.
fn take(item: &Item, names: &mut BTreeSet<String>, known: &mut bool) -> bool {
    match item {
        Item::Listed(_, _, nodes) => {
            *names = nodes.iter().map(|node| node.name.name.clone()).collect();
            *known = true;
            true
        }
        Item::Changed(_, node) => names.insert(node.name.name.clone()),
        Item::Deleted(_, node) => names.remove(&node.name.name),
        // A mirror that does not know the Nodes forgets nothing. The watcher says why in the log.
        Item::Trouble(..) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use ovl_proto::resource::Kind;

    use super::*;

    fn node(name: &str, addresses: &[(&str, &str)]) -> Value {
        let addresses: Vec<Value> =
            addresses.iter().map(|(kind, address)| json!({ "type": kind, "address": address })).collect();
        json!({ "metadata": { "name": name }, "status": { "addresses": addresses } })
    }

    #[test]
    fn hosts_join_through_the_internal_addresses_of_other_nodes() {
        let nodes = [
            node("n1", &[("InternalIP", "192.0.2.1")]),
            node("n2", &[("Hostname", "n2"), ("ExternalIP", "203.0.113.2"), ("InternalIP", "192.0.2.2")]),
            node("n3", &[("InternalIP", "192.0.2.3"), ("InternalIP", "2001:db8::3")]),
            node("n4", &[("InternalIP", "no address")]),
        ];
        let found: Vec<String> = addresses(&nodes, "n1", 0).iter().map(IpAddr::to_string).collect();
        assert_eq!(found, ["192.0.2.2", "192.0.2.3", "2001:db8::3"]);
        assert_eq!(addresses(&nodes, "n1", 2).first().unwrap().to_string(), "2001:db8::3");
        assert_eq!(addresses(&nodes[..1], "n1", 7), Vec::<IpAddr>::new());
        let many: Vec<Value> =
            (0..100).map(|n| node(&format!("m{n}"), &[("InternalIP", &format!("192.0.2.{n}"))])).collect();
        assert_eq!(addresses(&many, "m7", 95).len(), Join::MOST);
    }

    #[test]
    fn ovld_is_told_of_nodes_that_come_and_go_and_of_nothing_else() {
        let object = |name: &str| {
            let value = json!({ "metadata": { "name": name, "resourceVersion": "1" } });
            crate::kind::object(Kind::Node, value).unwrap()
        };
        let (mut names, mut known) = (BTreeSet::new(), false);
        assert!(take(&Item::Listed(Kind::Node, 1, vec![object("n1"), object("n2")]), &mut names, &mut known));
        assert!(known);
        // A heartbeat.
        assert!(!take(&Item::Changed(Kind::Node, object("n1")), &mut names, &mut known));
        assert!(take(&Item::Deleted(Kind::Node, object("n1")), &mut names, &mut known));
        assert!(take(&Item::Changed(Kind::Node, object("n3")), &mut names, &mut known));
        assert_eq!(names, BTreeSet::from(["n2".to_owned(), "n3".to_owned()]));
    }
}
