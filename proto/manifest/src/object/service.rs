//! Validation of v1 Service as far as it needs only the Service itself. The host that applies a Service checks for
//! conflicts with others.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::resource::{
    ClusterIp, IntOrString, IpFamily, IpFamilyPolicy, Service, ServiceCidr, ServiceSpec, ServiceType,
    SessionAffinity, TrafficPolicy,
};

use crate::problem::{FieldProblem, FieldProblems};

use super::names::{LABEL, LABEL_KEY, SUBDOMAIN, is_label, is_label_key, is_subdomain};
use super::{USABLE, check_labels, check_number, check_port, is_usable};

/// The maximum number of ports of a Service.
const MAX_PORTS: usize = 1000;
/// The maximum number of source ranges.
const MAX_SOURCE_RANGES: usize = 1000;
/// The annotation that has the source ranges of a LoadBalancer, if its specification has none.
pub(super) const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
/// The maximum affinity timeout in seconds.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// Fills in the fields that derive from others, and removes those without effect, which the Kubernetes API accepts.
pub(super) fn complete(service: &mut Service, warnings: &mut Vec<FieldProblem>) {
    let spec = &mut service.spec;
    let mut without_effect = |field: &str, reason: &str| {
        warnings.push(FieldProblem { field: field.to_owned(), reason: reason.to_owned() });
    };
    if spec.kind == ServiceType::ExternalName && !spec.external_ips.is_empty() {
        spec.external_ips.clear();
        without_effect("spec.externalIPs", "has no effect: an ExternalName has no addresses");
    }
    if spec.kind != ServiceType::ExternalName && !spec.external_name.is_empty() {
        spec.external_name.clear();
        without_effect("spec.externalName", "has no effect: it requires type ExternalName");
    }
    if spec.session_affinity == SessionAffinity::None {
        spec.session_affinity_config = None;
    }
    match (spec.cluster_ip, spec.cluster_ips.first()) {
        (Some(ip), None) => spec.cluster_ips.push(ip),
        (None, Some(first)) => spec.cluster_ip = Some(*first),
        (None, None) | (Some(_), Some(_)) => {}
    }
    spec.load_balancer_source_ranges.iter_mut().for_each(|range| *range = range.trunc());
    for port in &mut spec.ports {
        port.target_port.get_or_insert(IntOrString::Int(port.port));
    }
}

/// Takes over the source ranges that a Service of type LoadBalancer has in its annotation, if it has none in its
/// specification: as in Kubernetes.
pub(super) fn take_source_ranges(service: &mut Service, problems: &mut FieldProblems) {
    let spec = &mut service.spec;
    let Some(text) = service.metadata.annotations.get(SOURCE_RANGES_ANNOTATION) else { return };
    if spec.kind != ServiceType::LoadBalancer || !spec.load_balancer_source_ranges.is_empty() {
        return;
    }
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        match part.parse::<IpNet>() {
            Ok(range) => spec.load_balancer_source_ranges.push(range.trunc()),
            Err(_) => problems.add(
                format!("metadata.annotations.{SOURCE_RANGES_ANNOTATION}"),
                format!("'{part}' is not a prefix such as 203.0.113.0/24"),
            ),
        }
    }
}

pub(super) fn check(service: &Service, problems: &mut FieldProblems) {
    let spec = &service.spec;
    check_labels("spec.selector", &spec.selector, problems);
    check_ports(service, problems);
    check_addresses(spec, problems);
    check_policies(service, problems);
    match spec.kind {
        ServiceType::ExternalName => {
            let name = spec.external_name.trim_end_matches('.');
            problems.want(is_subdomain(name), "spec.externalName", SUBDOMAIN);
            problems.want(spec.cluster_ips.is_empty(), "spec.clusterIP", "an ExternalName has none");
            problems.want(spec.external_ips.is_empty(), "spec.externalIPs", "an ExternalName has none");
            problems.want(spec.ip_families.is_empty(), "spec.ipFamilies", "an ExternalName has none");
            problems.want(spec.ip_family_policy.is_none(), "spec.ipFamilyPolicy", "an ExternalName has none");
        }
        ServiceType::ClusterIP | ServiceType::NodePort | ServiceType::LoadBalancer => {
            problems.want(spec.external_name.is_empty(), "spec.externalName", "requires type ExternalName");
            problems.want(
                !spec.ports.is_empty() || service.is_headless(),
                "spec.ports",
                "needs at least one port, unless the Service is headless",
            );
        }
    }
}

fn check_ports(service: &Service, problems: &mut FieldProblems) {
    let spec = &service.spec;
    problems.want(spec.ports.len() <= MAX_PORTS, "spec.ports", format!("exceed the limit of {MAX_PORTS}"));
    let (mut names, mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (n, port) in spec.ports.iter().enumerate() {
        let path = format!("spec.ports[{n}]");
        check_number(&format!("{path}.port"), port.port, problems);
        let unnamed = port.name.is_empty();
        problems.want(!unnamed || spec.ports.len() == 1, format!("{path}.name"), "several ports need names");
        problems.want(unnamed || is_label(&port.name), format!("{path}.name"), LABEL);
        problems.want(unnamed || names.insert(&port.name), format!("{path}.name"), "is a duplicate");
        problems.want(
            numbers.insert((port.protocol, port.port)),
            format!("{path}.port"),
            format!("{} {} is a duplicate", port.protocol, port.port),
        );
        // The default, the same number, was validated above.
        if let Some(target) =
            port.target_port.as_ref().filter(|target| **target != IntOrString::Int(port.port))
        {
            check_port(&format!("{path}.targetPort"), target, problems);
        }
        if let Some(node_port) = port.node_port {
            let path = format!("{path}.nodePort");
            let exposed = matches!(spec.kind, ServiceType::NodePort | ServiceType::LoadBalancer);
            problems.want(exposed, &path, "requires type NodePort or LoadBalancer");
            check_number(&path, node_port, problems);
            problems.want(node_ports.insert((port.protocol, node_port)), &path, "is a duplicate");
        }
    }
    if let Some(port) = spec.health_check_node_port {
        let path = "spec.healthCheckNodePort";
        problems.want(
            spec.wants_health_check(),
            path,
            "requires type LoadBalancer and externalTrafficPolicy Local",
        );
        check_number(path, port, problems);
    }
}

fn check_addresses(spec: &ServiceSpec, problems: &mut FieldProblems) {
    let ips = &spec.cluster_ips;
    problems.want(
        spec.cluster_ip == ips.first().copied(),
        "spec.clusterIP",
        "is not the first of clusterIPs",
    );
    let headless = ips.contains(&ClusterIp::Headless);
    problems.want(!headless || ips.len() == 1, "spec.clusterIPs", "None must be the only entry");
    problems.want(
        !headless || spec.kind == ServiceType::ClusterIP,
        "spec.clusterIP",
        "None requires type ClusterIP",
    );
    let addresses: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.address()).collect();
    let families: Vec<IpFamily> = addresses.iter().copied().map(IpFamily::of).collect();
    let different = |families: &[IpFamily]| match families {
        [] | [_] => true,
        [a, b] => a != b,
        _ => false,
    };
    problems.want(different(&families), "spec.clusterIPs", "at most one IPv4 and one IPv6 address");
    problems.want(different(&spec.ip_families), "spec.ipFamilies", "at most IPv4 and IPv6, each once");
    if !spec.ip_families.is_empty() && different(&spec.ip_families) {
        let alike = families.iter().zip(&spec.ip_families).all(|(a, b)| a == b);
        problems.want(
            alike && families.len() <= spec.ip_families.len(),
            "spec.clusterIPs",
            "are not of the ipFamilies, in their order",
        );
    }
    let both = families.len() > 1 || spec.ip_families.len() > 1;
    problems.want(
        !(both && spec.ip_family_policy == Some(IpFamilyPolicy::SingleStack)),
        "spec.ipFamilyPolicy",
        "SingleStack allows only one family",
    );
    for (n, address) in addresses.iter().enumerate() {
        problems.want(is_usable(*address), format!("spec.clusterIPs[{n}]"), USABLE);
    }
    problems.want(spec.external_ips.len() <= 64, "spec.externalIPs", "exceed the limit of 64");
    for (n, address) in spec.external_ips.iter().enumerate() {
        problems.want(is_usable(*address), format!("spec.externalIPs[{n}]"), USABLE);
    }
    let balanced = spec.kind == ServiceType::LoadBalancer;
    let reason = "requires type LoadBalancer";
    problems.want(balanced || spec.load_balancer_ip.is_none(), "spec.loadBalancerIP", reason);
    problems.want(balanced || spec.load_balancer_class.is_none(), "spec.loadBalancerClass", reason);
    problems.want(
        spec.load_balancer_class.as_ref().is_none_or(|class| is_label_key(class)),
        "spec.loadBalancerClass",
        LABEL_KEY,
    );
    let field = "spec.loadBalancerSourceRanges";
    problems.want(balanced || spec.load_balancer_source_ranges.is_empty(), field, reason);
    let most = format!("exceed the limit of {MAX_SOURCE_RANGES}");
    problems.want(spec.load_balancer_source_ranges.len() <= MAX_SOURCE_RANGES, field, most);
    problems.want(
        balanced || spec.allocate_load_balancer_node_ports.is_none(),
        "spec.allocateLoadBalancerNodePorts",
        reason,
    );
}

/// Validates a ServiceCIDR.
pub(super) fn check_cidr(cidr: &ServiceCidr, problems: &mut FieldProblems) {
    let ranges = &cidr.spec.cidrs;
    let families: BTreeSet<bool> = ranges.iter().map(|range| range.addr().is_ipv4()).collect();
    problems.want(
        (1..=2).contains(&ranges.len()) && families.len() == ranges.len(),
        "spec.cidrs",
        "must be one range, or one of each address family",
    );
}

fn check_policies(service: &Service, problems: &mut FieldProblems) {
    let spec = &service.spec;
    problems.want(
        service.is_reached_from_outside() || spec.external_traffic_policy == TrafficPolicy::Cluster,
        "spec.externalTrafficPolicy",
        "requires type NodePort or LoadBalancer, or with externalIPs",
    );
    let Some(config) = spec.session_affinity_config else { return };
    problems.want(
        spec.session_affinity == SessionAffinity::ClientIP,
        "spec.sessionAffinityConfig",
        "requires sessionAffinity ClientIP",
    );
    if let Some(seconds) = config.client_ip.and_then(|config| config.timeout_seconds) {
        problems.want(
            (1..=MAX_AFFINITY_SECONDS).contains(&seconds),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("is not between 1 and {MAX_AFFINITY_SECONDS}"),
        );
    }
}
