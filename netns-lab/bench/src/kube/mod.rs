//! `bench kube`: figures with a Kubernetes API server, which is the tests' own.

pub(crate) mod follow;
pub(crate) mod size;

use std::net::IpAddr;

use serde_json::{Value, json};

/// The network of pods.
const NETWORK: &str = "pods";
/// The namespace of all objects.
const NAMESPACE: &str = "bench";
/// Port of Services and of backends.
const PORT: u16 = 8080;

/// Builds a Pod of a node with a label.
fn pod(node: &str, name: &str, app: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": { "app": app } },
        "spec": { "nodeName": node, "containers": [{ "name": "c", "image": "i" }] },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

/// Builds a Service at an address. Its endpoints are in slices.
fn service(name: &str, address: IpAddr) -> Value {
    json!({
        "kind": "Service",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{ "port": PORT, "targetPort": PORT, "protocol": "TCP" }],
        },
    })
}

/// Builds the EndpointSlice of a Service. Each endpoint has an address, a node, and is ready or not.
fn slice(name: &str, endpoints: &[(IpAddr, String, bool)]) -> Value {
    let endpoint = |(address, node, ready): &(IpAddr, String, bool)| {
        json!({
            "addresses": [address], "nodeName": node,
            "conditions": { "ready": ready, "serving": ready, "terminating": false },
        })
    };
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "labels": { "kubernetes.io/service-name": name },
        },
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "", "port": PORT, "protocol": "TCP" }],
    })
}
