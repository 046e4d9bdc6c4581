//! `bench services`: the figures of issue 7 about Services.

pub(crate) mod failover;
mod layouts;
pub(crate) mod many;
mod reference;
pub(crate) mod removed;
mod watch;

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use netns_lab::Host;
use serde_json::{Value, json};

use super::client::Client;

const NETWORK: &str = "bench";
/// What the real backends of the measured Service have for a label.
const LABEL: &str = "web";
/// Where they listen.
const BACKEND_PORT: u16 = 8080;
/// Of each Service.
const PORT: u16 = 80;

/// The address of a Service by its number, in the default range.
fn service_address(number: usize) -> Result<Ipv4Addr> {
    let offset = u32::try_from(number)? + 1024;
    Ok(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + offset))
}

/// The addresses of its endpoints, which nobody has.
fn endpoint_addresses(number: usize) -> Result<[Ipv4Addr; 3]> {
    let first = u32::from(Ipv4Addr::new(10, 200, 0, 0)) + 4 * u32::try_from(number)?;
    Ok([0, 1, 2].map(|more| Ipv4Addr::from(first + more)))
}

/// A Service at an address, whose endpoints a label selects or slices list.
fn service(name: &str, address: Ipv4Addr, label: Option<&str>) -> Value {
    let mut spec = json!({
        "clusterIP": address.to_string(),
        "ports": [{ "port": PORT, "targetPort": BACKEND_PORT }],
    });
    if let Some(label) = label {
        spec["selector"] = json!({ "app": label });
    }
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": spec })
}

/// The slice of such a Service.
fn slice(name: &str, addresses: [Ipv4Addr; 3]) -> Value {
    let endpoint = |address: Ipv4Addr| json!({ "addresses": [address.to_string()] });
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": name } },
        "addressType": "IPv4",
        "endpoints": addresses.map(endpoint),
        "ports": [{ "port": BACKEND_PORT, "protocol": "TCP" }],
    })
}

/// Applies objects on a host.
fn apply(host: &Host, objects: &[Value]) -> Result<()> {
    let path = host.dir().join("services.json");
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
    std::fs::write(&path, list.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    host.ctl_ok(&["apply", "-f", &path.display().to_string()]).map(drop)
}

/// Attaches a backend, and listens in it.
fn backend(host: &Host, name: &str) -> Result<SocketAddr> {
    let workload = host.workload(name)?;
    let mut request = super::client::attach(name, NETWORK, workload.path(), None);
    request["labels"] = json!({ "app": LABEL });
    let attached = Client::connect(&host.socket())?.ask(&request)?;
    super::connect::serve(&workload, BACKEND_PORT)?;
    Ok(SocketAddr::new(super::cluster::address_of(&attached)?, BACKEND_PORT))
}

/// The request that says whether a backend takes connections.
fn ready(name: &str, ready: bool) -> Value {
    json!({ "request": "endpoint-ready", "name": name, "ready": ready })
}
