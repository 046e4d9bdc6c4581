//! Output of `ovlctl describe`.

use ovl_control::{AnnouncedAddress, BackendInfo, ResourceInfo, ServiceBackends};
use ovl_manifest::yaml::to_yaml;
use ovl_proto::clock::timestamp;
use serde_json::Value;

use super::table::{labels, selector, text};
use crate::text::{comma_separated, key_value_block, prefixed_lines, printable_lines};

pub(super) fn object(object: &ResourceInfo, behind: Option<&ServiceBackends>) -> String {
    let at = |path: &str| text(object.manifest.pointer(path));
    let mut pairs = vec![("Name:", object.name.clone())];
    if !object.namespace.is_empty() {
        pairs.push(("Namespace:", object.namespace.clone()));
    }
    pairs.push(("Created:", timestamp(object.created_ms)));
    if let Some(source) = &object.source {
        let source =
            format!("Kubernetes API server, version {} of cluster {}", source.version, source.cluster);
        pairs.push(("Source:", source));
    }
    pairs.push(("Labels:", labels(object.manifest.pointer("/metadata/labels"))));
    pairs.push(("Annotations:", labels(object.manifest.pointer("/metadata/annotations"))));
    if object.manifest.pointer("/spec/podSelector").is_some() {
        let all = "all pods of the namespace".to_owned();
        let chosen = selector(object.manifest.pointer("/spec/podSelector"));
        pairs.push(("Selects:", if chosen.is_empty() { all } else { chosen }));
        pairs.push(("Selected now:", comma_separated(&object.selects)));
    }
    if behind.is_some() {
        pairs.push(("Selector:", labels(object.manifest.pointer("/spec/selector"))));
        pairs.push(("Type:", at("/spec/type")));
        pairs.push(("IPs:", items(&object.manifest, "/spec/clusterIPs")));
        pairs.push(("IP families:", items(&object.manifest, "/spec/ipFamilies")));
        let ingress = object.manifest.pointer("/status/loadBalancer/ingress").and_then(Value::as_array);
        pairs.push((
            "LoadBalancer:",
            comma_separated(ingress.into_iter().flatten().map(|it| text(it.get("ip")))),
        ));
    }
    if let Some(behind) = behind.filter(|behind| !behind.announced.is_empty()) {
        pairs.push(("Announced:", comma_separated(behind.announced.iter().map(announced))));
    }
    let mut out = key_value_block(&pairs);
    for endpoint in &object.endpoints {
        let ready = if endpoint.ready { "ready" } else { "not ready" };
        out.push_str(&prefixed_lines(
            "Endpoint: ",
            &[format!("{} on {}, {ready}", comma_separated(&endpoint.addresses), endpoint.node)],
        ));
    }
    if let Some(behind) = behind {
        out.push_str(&prefixed_lines("Note: ", &behind.notes));
        out.push_str(&ports(behind));
    }
    // The manifest itself is the clearest form of the remaining fields.
    if let Some(spec) = object.manifest.get("spec") {
        out.push_str("Spec:\n");
        for line in to_yaml(spec).lines() {
            out.push_str(&printable_lines(&format!("  {line}")));
            out.push('\n');
        }
    }
    out
}

/// Renders an announced address: `192.0.2.1 by h2`.
fn announced(address: &AnnouncedAddress) -> String {
    let by = if address.nodes.is_empty() { "no host".to_owned() } else { address.nodes.join(" and ") };
    format!("{} by {by}", address.address)
}

fn items(manifest: &Value, path: &str) -> String {
    comma_separated(
        manifest.pointer(path).and_then(Value::as_array).into_iter().flatten().map(|it| text(Some(it))),
    )
}

/// Renders the ports of a Service, each with its backends.
pub(super) fn backends(service: &ServiceBackends) -> String {
    let pairs = [("Name:", service.name.clone()), ("Namespace:", service.namespace.clone())];
    key_value_block(&pairs) + &ports(service)
}

fn ports(service: &ServiceBackends) -> String {
    let mut out = String::new();
    for port in &service.ports {
        let number = port.port.map(|number| format!(" {number}/{}", port.protocol)).unwrap_or_default();
        let name = if port.name.is_empty() { String::new() } else { format!(" {}", port.name) };
        let none = if port.backends.is_empty() { " no backends" } else { "" };
        out.push_str(&prefixed_lines("", &[format!("Port{name}{number}:{none}")]));
        let each: Vec<String> = port
            .backends
            .iter()
            .map(|backend| {
                let ready = if backend.ready { "" } else { ", not ready" };
                let node =
                    if backend.node.is_empty() { String::new() } else { format!(" on {}", backend.node) };
                let name = if backend.name.is_empty() { String::new() } else { format!(" {}", backend.name) };
                format!("{}{name}{node}{ready}", address(backend))
            })
            .collect();
        out.push_str(&prefixed_lines("  ", &each));
    }
    out
}

/// Renders a backend's address: `10.0.0.1:80`, `[fd00::1]:80`, or the address alone if it has no port.
pub(super) fn address(backend: &BackendInfo) -> String {
    match backend.port {
        Some(port) => std::net::SocketAddr::new(backend.address, port).to_string(),
        None => backend.address.to_string(),
    }
}
