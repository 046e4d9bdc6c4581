//! Validation of ClusterNetworkPolicy: the rules of the API's definition.

use ovl_proto::resource::{
    ClusterNetworkPolicy, ClusterPeer, ClusterPorts, ClusterProtocol, PolicySubject, RuleAction,
};

use crate::problem::FieldProblems;

use super::names;
use super::policy::check_selector;

/// The maximum number of rules in a direction, of peers or protocols of a rule, and of networks or names of a peer.
const MAX: usize = 25;
/// The highest priority number.
const MAX_PRIORITY: u16 = 1000;
/// The maximum length of the name of a rule.
const MAX_NAME: usize = 100;

const ONE: &str = "exactly one of its fields is needed";

pub(super) fn check(policy: &ClusterNetworkPolicy, problems: &mut FieldProblems) {
    let spec = &policy.spec;
    problems.want(spec.tier.is_some(), "spec.tier", "is missing: Admin or Baseline");
    let is_right = spec.priority.is_some_and(|priority| priority <= MAX_PRIORITY);
    problems.want(is_right, "spec.priority", "must be a number from 0 to 1000");
    check_subject(&spec.subject, problems);
    for (n, rule) in spec.ingress.iter().enumerate() {
        let path = format!("spec.ingress[{n}]");
        check_rule(&path, (&rule.name, rule.action), "from", &rule.from, &rule.protocols, problems);
        for (n, peer) in rule.from.iter().enumerate() {
            let is_outside =
                !peer.networks.is_empty() || peer.nodes.is_some() || !peer.domain_names.is_empty();
            let reason = "networks, nodes and domainNames are for egress rules only";
            problems.want(!is_outside, format!("{path}.from[{n}]"), reason);
        }
    }
    for (n, rule) in spec.egress.iter().enumerate() {
        let path = format!("spec.egress[{n}]");
        check_rule(&path, (&rule.name, rule.action), "to", &rule.to, &rule.protocols, problems);
    }
    for (direction, rules) in [("ingress", spec.ingress.len()), ("egress", spec.egress.len())] {
        check_count(&format!("spec.{direction}"), rules, problems);
    }
}

fn check_count(path: &str, count: usize, problems: &mut FieldProblems) {
    problems.want(count <= MAX, path, format!("exceeds the limit of {MAX}"));
}

fn check_subject(subject: &PolicySubject, problems: &mut FieldProblems) {
    let PolicySubject { namespaces, pods, .. } = subject;
    problems.want(namespaces.is_some() != pods.is_some(), "spec.subject", ONE);
    check_pods(
        "spec.subject",
        &ClusterPeer { namespaces: namespaces.clone(), pods: pods.clone(), ..ClusterPeer::default() },
        problems,
    );
}

fn check_pods(path: &str, peer: &ClusterPeer, problems: &mut FieldProblems) {
    if let Some(selector) = &peer.namespaces {
        check_selector(&format!("{path}.namespaces"), selector, problems);
    }
    if let Some(pods) = &peer.pods {
        check_selector(&format!("{path}.pods.namespaceSelector"), &pods.namespace_selector, problems);
        check_selector(&format!("{path}.pods.podSelector"), &pods.pod_selector, problems);
    }
}

fn check_rule(
    path: &str,
    (name, action): (&str, Option<RuleAction>),
    side: &str,
    peers: &[ClusterPeer],
    protocols: &[ClusterProtocol],
    problems: &mut FieldProblems,
) {
    problems.want(action.is_some(), format!("{path}.action"), "is missing: Accept, Deny or Pass");
    problems.want(name.chars().count() <= MAX_NAME, format!("{path}.name"), "is longer than 100 characters");
    // One that denies then denies everything, as it does if its peers are not known.
    let has_peers = !peers.is_empty() || action == Some(RuleAction::Deny);
    problems.want(has_peers, format!("{path}.{side}"), "needs at least one peer");
    check_count(&format!("{path}.{side}"), peers.len(), problems);
    check_count(&format!("{path}.protocols"), protocols.len(), problems);
    for (n, peer) in peers.iter().enumerate() {
        let path = format!("{path}.{side}[{n}]");
        let ClusterPeer { namespaces, pods, networks, nodes, domain_names, .. } = peer;
        let given = [
            namespaces.is_some(),
            pods.is_some(),
            !networks.is_empty(),
            nodes.is_some(),
            !domain_names.is_empty(),
        ];
        problems.want(given.into_iter().filter(|given| *given).count() == 1, &path, ONE);
        check_pods(&path, peer, problems);
        if let Some(selector) = nodes {
            check_selector(&format!("{path}.nodes"), selector, problems);
        }
        check_count(&format!("{path}.networks"), networks.len(), problems);
        check_count(&format!("{path}.domainNames"), domain_names.len(), problems);
        for (n, name) in domain_names.iter().enumerate() {
            let is_name = names::is_domain_name(name);
            problems.want(is_name, format!("{path}.domainNames[{n}]"), names::DOMAIN_NAME);
        }
        let is_allowlist = domain_names.is_empty() || action == Some(RuleAction::Accept);
        problems.want(
            is_allowlist,
            format!("{path}.domainNames"),
            "is for rules with the action Accept only",
        );
    }
    let has_named = protocols.iter().any(|protocol| !protocol.destination_named_port.is_empty());
    let has_outside = peers
        .iter()
        .any(|peer| !peer.networks.is_empty() || peer.nodes.is_some() || !peer.domain_names.is_empty());
    let reason = "has a named port, and networks, nodes and domainNames have none";
    problems.want(!(has_named && has_outside), format!("{path}.protocols"), reason);
    for (n, protocol) in protocols.iter().enumerate() {
        check_protocol(&format!("{path}.protocols[{n}]"), protocol, problems);
    }
}

fn check_protocol(path: &str, protocol: &ClusterProtocol, problems: &mut FieldProblems) {
    let ClusterProtocol { tcp, udp, sctp, destination_named_port: named, .. } = protocol;
    let given = [tcp.is_some(), udp.is_some(), sctp.is_some(), !named.is_empty()];
    problems.want(given.into_iter().filter(|given| *given).count() == 1, path, ONE);
    let is_name = named.is_empty() || names::is_port_name(named);
    problems.want(is_name, format!("{path}.destinationNamedPort"), names::PORT_NAME);
    for (name, ports) in [("tcp", tcp), ("udp", udp), ("sctp", sctp)] {
        let Some(ClusterPorts { destination_port, .. }) = ports else { continue };
        let path = format!("{path}.{name}.destinationPort");
        match destination_port {
            None => problems.want(false, path, "is missing"),
            Some(port) => match port.range {
                None => problems.want(port.number != 0, path, ONE),
                Some(range) => {
                    problems.want(port.number == 0, &path, ONE);
                    let reason = "start must be a port, and less than end";
                    problems.want(
                        0 < range.start && range.start < range.end,
                        format!("{path}.range"),
                        reason,
                    );
                }
            },
        }
    }
}
