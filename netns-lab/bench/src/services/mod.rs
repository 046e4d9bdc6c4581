//! `bench services`: the Service figures.

pub(crate) mod failover;
mod layouts;
pub(crate) mod many;
mod reference;
pub(crate) mod removed;

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use netns_lab::Host;
use serde_json::{Value, json};

use super::client::Client;

const NETWORK: &str = "bench";
/// Label of the real backends of the measured Service.
const LABEL: &str = "web";
/// Port at which they listen.
const BACKEND_PORT: u16 = 8080;
/// Port of each Service.
const PORT: u16 = 80;

/// Returns the address of a Service by its number, in the default range.
fn service_address(number: usize) -> Result<Ipv4Addr> {
    let offset = u32::try_from(number)? + 1024;
    Ok(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + offset))
}

/// Returns the addresses of a Service's endpoints, which do not exist.
fn endpoint_addresses(number: usize) -> Result<[Ipv4Addr; 3]> {
    let first = u32::from(Ipv4Addr::new(10, 200, 0, 0)) + 4 * u32::try_from(number)?;
    Ok([0, 1, 2].map(|more| Ipv4Addr::from(first + more)))
}

/// Builds a Service at an address. Its endpoints are selected by the label, or listed in slices if `None`.
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

/// Builds the EndpointSlice of a Service.
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

/// Attaches a backend, and listens in its namespace.
fn backend(host: &Host, name: &str) -> Result<SocketAddr> {
    let workload = host.workload(name)?;
    let mut request = super::client::attach(name, NETWORK, workload.path(), None);
    request["labels"] = json!({ "app": LABEL });
    let attached = Client::connect(&host.socket())?.ask(&request)?;
    super::connect::serve(&workload, BACKEND_PORT)?;
    Ok(SocketAddr::new(super::cluster::address_of(&attached)?, BACKEND_PORT))
}

/// Builds the request that marks a backend as ready or not ready.
fn ready(name: &str, ready: bool) -> Value {
    json!({ "request": "endpoint-ready", "name": name, "ready": ready })
}
