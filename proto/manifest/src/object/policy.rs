//! Validation of v1 NetworkPolicy.

use ovl_proto::resource::{
    IntOrString, IpBlock, LabelSelector, NetworkPolicy, Operator, PolicyPeer, PolicyPort,
};

use crate::problem::FieldProblems;

use super::names::{LABEL_KEY, LABEL_VALUE, is_label_key, is_label_value};
use super::{check_labels, check_port};

/// The maximum number of rules of a policy in each direction.
const MAX_RULES: usize = 1000;

pub(super) fn check(policy: &NetworkPolicy, problems: &mut FieldProblems) {
    let spec = &policy.spec;
    check_selector("spec.podSelector", &spec.pod_selector, problems);
    let mut types = spec.policy_types.clone();
    types.dedup();
    problems.want(types.len() == spec.policy_types.len(), "spec.policyTypes", "names a direction twice");
    problems.want(!types.is_empty(), "spec.policyTypes", "is empty");
    for (direction, rules) in [("ingress", spec.ingress.len()), ("egress", spec.egress.len())] {
        problems.want(
            rules <= MAX_RULES,
            format!("spec.{direction}"),
            format!("exceeds the limit of {MAX_RULES}"),
        );
    }
    for (n, rule) in spec.ingress.iter().enumerate() {
        check_rule(&format!("spec.ingress[{n}]"), &rule.ports, "from", &rule.from, problems);
    }
    for (n, rule) in spec.egress.iter().enumerate() {
        check_rule(&format!("spec.egress[{n}]"), &rule.ports, "to", &rule.to, problems);
    }
}

fn check_rule(
    path: &str,
    ports: &[PolicyPort],
    side: &str,
    peers: &[PolicyPeer],
    problems: &mut FieldProblems,
) {
    for (n, port) in ports.iter().enumerate() {
        let path = format!("{path}.ports[{n}]");
        if let Some(port) = &port.port {
            check_port(&format!("{path}.port"), port, problems);
        }
        if let Some(end) = port.end_port {
            let reason = "endPort requires a port that is a number and not larger";
            let fits = matches!(port.port, Some(IntOrString::Int(first)) if first <= end);
            problems.want(fits, format!("{path}.endPort"), reason);
        }
    }
    for (n, peer) in peers.iter().enumerate() {
        let path = format!("{path}.{side}[{n}]");
        let selectors =
            [("podSelector", &peer.pod_selector), ("namespaceSelector", &peer.namespace_selector)];
        let any = selectors.iter().any(|(_, selector)| selector.is_some());
        problems.want(
            any || peer.ip_block.is_some(),
            &path,
            "selects nothing: it needs a podSelector, namespaceSelector or ipBlock",
        );
        problems.want(
            !(any && peer.ip_block.is_some()),
            format!("{path}.ipBlock"),
            "excludes a selector: use two peers",
        );
        for (name, selector) in selectors {
            if let Some(selector) = selector {
                check_selector(&format!("{path}.{name}"), selector, problems);
            }
        }
        if let Some(IpBlock { cidr, except }) = &peer.ip_block {
            for (n, net) in except.iter().enumerate() {
                let within = cidr.contains(net) && cidr != net;
                problems.want(
                    within,
                    format!("{path}.ipBlock.except[{n}]"),
                    format!("{net} is not a part of {cidr}"),
                );
            }
        }
    }
}

pub(super) fn check_selector(path: &str, selector: &LabelSelector, problems: &mut FieldProblems) {
    check_labels(&format!("{path}.matchLabels"), &selector.match_labels, problems);
    for (n, requirement) in selector.match_expressions.iter().enumerate() {
        let path = format!("{path}.matchExpressions[{n}]");
        problems.want(is_label_key(&requirement.key), format!("{path}.key"), LABEL_KEY);
        let (wants_values, reason) = match requirement.operator {
            Operator::In | Operator::NotIn => (true, "In and NotIn require at least one value"),
            Operator::Exists | Operator::DoesNotExist => (false, "Exists and DoesNotExist allow no values"),
        };
        problems.want(requirement.values.is_empty() != wants_values, format!("{path}.values"), reason);
        problems.want(
            requirement.values.iter().all(|value| is_label_value(value)),
            format!("{path}.values"),
            LABEL_VALUE,
        );
    }
}
