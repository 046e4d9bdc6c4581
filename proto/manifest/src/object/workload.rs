//! Validation of v1 Pod and Node, and EndpointSlice.

use std::collections::BTreeSet;

use ovl_proto::resource::{
    AddressType, ConditionStatus, EndpointSlice, NodeObject, Pod, PodCondition, PodIp, READY_CONDITION,
};

use crate::problem::FieldProblems;

use super::names::{LABEL, LABEL_VALUE, PORT_NAME, is_label, is_label_value, is_port_name, is_subdomain};
use super::{USABLE, check_number, is_usable};

/// The maximum number of containers of a pod. Kubernetes has no limit of its own.
const MAX_CONTAINERS: usize = 1000;
/// The maximum number of ports of a slice, as in Kubernetes, and of all containers of a pod, for which Kubernetes has no limit.
const MAX_PORTS: usize = 20_000;
/// The maximum number of endpoints of a slice, as in Kubernetes.
const MAX_SLICE_ENDPOINTS: usize = 1000;
/// The maximum number of addresses of a slice's endpoint, as in Kubernetes.
const MAX_SLICE_ADDRESSES: usize = 100;

/// The maximum number of addresses of a node. Kubernetes has no limit.
const MAX_NODE_ADDRESSES: usize = 100;
/// The maximum number of hints of a slice's endpoint of each kind, as in Kubernetes.
const MAX_HINTS: usize = 8;

/// The annotation of a mirror Pod, with the uid of the static pod that it stands for. Container runtimes name that one.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// Makes the single address and the list of addresses consistent, and keeps of the conditions the one that counts. A pod
/// that is being deleted (`terminating`) is not ready. A mirror Pod gets the uid of its static pod.
pub(super) fn complete(pod: &mut Pod, terminating: bool) {
    if let Some(uid) = pod.metadata.annotations.get(MIRROR_ANNOTATION).filter(|uid| !uid.is_empty()) {
        pod.metadata.uid.clone_from(uid);
    }
    let status = &mut pod.status;
    // As in Kubernetes, the first condition of a type counts.
    let ready = status.conditions.iter().position(|condition| condition.kind == READY_CONDITION);
    status.conditions = ready.map(|n| status.conditions.swap_remove(n)).into_iter().collect();
    if terminating {
        status.conditions =
            vec![PodCondition { kind: READY_CONDITION.to_owned(), status: ConditionStatus::False }];
    }
    match (status.pod_ip, status.pod_ips.first()) {
        (Some(ip), None) => status.pod_ips.push(PodIp { ip }),
        (None, Some(first)) => status.pod_ip = Some(first.ip),
        (None, None) | (Some(_), Some(_)) => {}
    }
}

pub(super) fn check_node(node: &NodeObject, problems: &mut FieldProblems) {
    problems.want(
        node.status.addresses.len() <= MAX_NODE_ADDRESSES,
        "status.addresses",
        format!("exceed the limit of {MAX_NODE_ADDRESSES}"),
    );
}

pub(super) fn check_pod(pod: &Pod, problems: &mut FieldProblems) {
    let (spec, status) = (&pod.spec, &pod.status);
    for (field, name) in [("spec.hostname", &spec.hostname), ("spec.subdomain", &spec.subdomain)] {
        problems.want(name.is_empty() || is_label(name), field, LABEL);
    }
    problems.want(
        spec.containers.len() <= MAX_CONTAINERS,
        "spec.containers",
        format!("exceed the limit of {MAX_CONTAINERS}"),
    );
    let ports: usize = spec.containers.iter().map(|container| container.ports.len()).sum();
    problems.want(
        ports <= MAX_PORTS,
        "spec.containers",
        format!("have more than {MAX_PORTS} ports in total"),
    );
    for (n, container) in spec.containers.iter().enumerate() {
        let path = format!("spec.containers[{n}]");
        problems.want(is_label(&container.name), format!("{path}.name"), LABEL);
        let mut names = BTreeSet::new();
        for (n, port) in container.ports.iter().enumerate() {
            let path = format!("{path}.ports[{n}]");
            check_number(&format!("{path}.containerPort"), port.container_port, problems);
            if !port.name.is_empty() {
                problems.want(is_port_name(&port.name), format!("{path}.name"), PORT_NAME);
                problems.want(
                    names.insert(&port.name),
                    format!("{path}.name"),
                    "is a duplicate in the container",
                );
            }
        }
    }
    problems.want(
        status.conditions.len() <= 1
            && status.conditions.iter().all(|condition| condition.kind == READY_CONDITION),
        "status.conditions",
        "only the condition Ready is kept, once",
    );
    let ips: Vec<_> = status.pod_ips.iter().map(|pod_ip| pod_ip.ip).collect();
    problems.want(status.pod_ip == ips.first().copied(), "status.podIP", "is not the first of podIPs");
    problems.want(
        matches!(*ips.as_slice(), [] | [_])
            || matches!(*ips.as_slice(), [a, b] if a.is_ipv4() != b.is_ipv4()),
        "status.podIPs",
        "at most one IPv4 and one IPv6 address",
    );
    for (n, ip) in ips.iter().enumerate() {
        problems.want(is_usable(*ip), format!("status.podIPs[{n}].ip"), USABLE);
    }
}

/// Whether a text names a zone, which is the value of a label, or a host.
fn is_hint(text: &str) -> bool {
    !text.is_empty() && (is_label_value(text) || is_subdomain(text))
}

pub(super) fn check_slice(slice: &EndpointSlice, problems: &mut FieldProblems) {
    let ipv4 = slice.address_type == AddressType::IPv4;
    problems.want(
        slice.endpoints.len() <= MAX_SLICE_ENDPOINTS,
        "endpoints",
        format!("exceed the limit of {MAX_SLICE_ENDPOINTS}"),
    );
    for (n, endpoint) in slice.endpoints.iter().enumerate() {
        let path = format!("endpoints[{n}]");
        problems.want(
            (1..=MAX_SLICE_ADDRESSES).contains(&endpoint.addresses.len()),
            format!("{path}.addresses"),
            format!("must be between 1 and {MAX_SLICE_ADDRESSES} addresses"),
        );
        for (n, address) in endpoint.addresses.iter().enumerate() {
            let path = format!("{path}.addresses[{n}]");
            problems.want(address.is_ipv4() == ipv4, &path, "is not of the slice's addressType");
            problems.want(is_usable(*address), &path, USABLE);
        }
        problems.want(
            endpoint.hostname.is_empty() || is_label(&endpoint.hostname),
            format!("{path}.hostname"),
            LABEL,
        );
        let hints = endpoint
            .hints
            .iter()
            .flat_map(|hints| [("forZones", &hints.for_zones), ("forNodes", &hints.for_nodes)]);
        for (field, targets) in hints {
            let path = format!("{path}.hints.{field}");
            problems.want(targets.len() <= MAX_HINTS, &path, format!("exceed the limit of {MAX_HINTS}"));
            for target in targets {
                problems.want(is_hint(&target.name), &path, LABEL_VALUE);
            }
        }
    }
    problems.want(slice.ports.len() <= MAX_PORTS, "ports", format!("exceed the limit of {MAX_PORTS}"));
    let mut names = BTreeSet::new();
    for (n, port) in slice.ports.iter().enumerate() {
        let path = format!("ports[{n}]");
        problems.want(port.name.is_empty() || is_label(&port.name), format!("{path}.name"), LABEL);
        problems.want(names.insert(&port.name), format!("{path}.name"), "is a duplicate");
        if let Some(number) = port.port {
            check_number(&format!("{path}.port"), number, problems);
        }
    }
}
