//! What stands for a policy of an API server that cannot be read: a policy that allows nothing which the other might forbid.
//!
//! The module owns no state. Begin to read at [`stand_in`].

use ovl_manifest::object as manifest;
use ovl_proto::resource::{
    ClusterEgressRule, ClusterIngressRule, ClusterNetworkPolicy, ClusterPolicySpec, Kind, LabelSelector,
    Meta, Name, NetworkPolicy, PolicyType, Resource, ResourceKey, RuleAction, Validation,
};
use serde_json::{Value, json};

/// Returns the policy that stands for one that cannot be read, and what it does, in a sentence. `None` if it is no policy.
pub(crate) fn stand_in(key: &ResourceKey, document: &Value) -> Option<(Resource, &'static str)> {
    match key.kind {
        Kind::NetworkPolicy => Some((
            Resource::NetworkPolicy(closed(&key.name, document)),
            "Until ovl can read it, the pods that it selects are isolated",
        )),
        Kind::ClusterNetworkPolicy => Some((
            Resource::ClusterNetworkPolicy(closed_cluster(&key.name, document)),
            "Until ovl can read it, those of its rules that it cannot read accept nothing, or deny everything",
        )),
        Kind::Namespace
        | Kind::Pod
        | Kind::Service
        | Kind::EndpointSlice
        | Kind::ServiceCidr
        | Kind::Node => None,
    }
}

/// Returns a policy that isolates the pods that the policy selects, or all of the namespace if that is not readable
/// either, in the directions that are named, or in both. Nothing is allowed that the policy might forbid.
fn closed(name: &Name, document: &Value) -> NetworkPolicy {
    let selector = document.pointer("/spec/podSelector").cloned();
    let selector = selector.and_then(|selector| serde_json::from_value::<LabelSelector>(selector).ok());
    let types = document.pointer("/spec/policyTypes").cloned();
    let types = types.and_then(|types| serde_json::from_value::<Vec<PolicyType>>(types).ok());
    let mut policy = NetworkPolicy {
        metadata: Meta { name: name.name.clone(), namespace: name.namespace.clone(), ..Meta::default() },
        ..NetworkPolicy::default()
    };
    policy.spec.pod_selector = selector.unwrap_or_default();
    policy.spec.policy_types = types
        .filter(|types| !types.is_empty())
        .unwrap_or_else(|| vec![PolicyType::Ingress, PolicyType::Egress]);
    policy.spec.policy_types.sort_unstable();
    policy.spec.policy_types.dedup();
    policy
}

/// Returns a policy with the rules that can be read. Of the others, those that accept are left out, and the rest deny
/// everything, as the API demands of a rule whose peers are not known. A subject that cannot be read is all pods. Without a
/// readable tier or priority, the policy decides before all others.
fn closed_cluster(name: &Name, document: &Value) -> ClusterNetworkPolicy {
    let spec = document.get("spec").unwrap_or(&Value::Null);
    let part = |field: &str| spec.get(field).unwrap_or(&Value::Null);
    let everybody = json!({ "namespaces": {} });
    let (tier, priority, subject) = (part("tier"), part("priority"), part("subject"));
    let heads = [
        json!({ "tier": tier, "priority": priority, "subject": subject }),
        json!({ "tier": tier, "priority": priority, "subject": everybody }),
        json!({ "tier": "Admin", "priority": 0, "subject": subject }),
        json!({ "tier": "Admin", "priority": 0, "subject": everybody }),
    ];
    let mut policy = ClusterNetworkPolicy {
        metadata: Meta { name: name.name.clone(), ..Meta::default() },
        spec: heads.into_iter().find_map(read).unwrap_or_default(),
        ..ClusterNetworkPolicy::default()
    };
    for direction in ["ingress", "egress"] {
        for rule in part(direction).as_array().into_iter().flatten() {
            let alone = json!({ "tier": "Admin", "priority": 0, "subject": everybody, direction: [rule] });
            match read(alone) {
                Some(ClusterPolicySpec { ingress, egress, .. }) => {
                    policy.spec.ingress.extend(ingress);
                    policy.spec.egress.extend(egress);
                }
                None if rule.get("action").is_some_and(|action| action == "Accept") => {}
                None => deny_everything(&mut policy.spec, direction),
            }
        }
        // Neither rules nor none.
        if !part(direction).is_array() && !part(direction).is_null() {
            deny_everything(&mut policy.spec, direction);
        }
    }
    policy
}

/// Adds a rule that denies everything: it has no peers.
fn deny_everything(spec: &mut ClusterPolicySpec, direction: &str) {
    let action = Some(RuleAction::Deny);
    match direction {
        "ingress" => spec.ingress.push(ClusterIngressRule { action, ..ClusterIngressRule::default() }),
        _ => spec.egress.push(ClusterEgressRule { action, ..ClusterEgressRule::default() }),
    }
}

/// Reads the specification of a ClusterNetworkPolicy.
fn read(spec: Value) -> Option<ClusterPolicySpec> {
    let document = json!({
        "apiVersion": Kind::ClusterNetworkPolicy.api_version(), "kind": Kind::ClusterNetworkPolicy.name(),
        "metadata": { "name": "part" }, "spec": spec,
    });
    match manifest::read(document, None, Validation::Ignore).ok()?.resource {
        Resource::ClusterNetworkPolicy(policy) => Some(policy.spec),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_policy_that_cannot_be_read_isolates() {
        let name = Name::new("shop", "db");
        let spec = json!({ "spec": {
            "podSelector": { "matchLabels": { "app": "db" } }, "policyTypes": ["Ingress"], "ingress": [{ "new": {} }],
        } });
        let policy = closed(&name, &spec);
        assert_eq!(policy.spec.pod_selector.match_labels.get("app").map(String::as_str), Some("db"));
        assert_eq!(policy.spec.policy_types, [PolicyType::Ingress]);
        assert!(policy.spec.ingress.is_empty() && policy.spec.egress.is_empty());
        // Nothing of it is readable.
        for document in [json!({}), json!({ "spec": { "podSelector": 7, "policyTypes": ["Sideways"] } })] {
            let policy = closed(&name, &document);
            assert_eq!(policy.spec.pod_selector, LabelSelector::default());
            assert_eq!(policy.spec.policy_types, [PolicyType::Ingress, PolicyType::Egress]);
        }
    }

    #[test]
    fn rules_that_cannot_be_read_accept_nothing_or_deny_everything() {
        let readable = json!({ "action": "Accept", "from": [{ "namespaces": {} }] });
        let peer = |action: &str| json!({ "action": action, "from": [{ "somethingNew": {} }] });
        let document = json!({ "spec": {
            "tier": "Baseline", "priority": 7, "subject": { "namespaces": { "matchLabels": { "team": "a" } } },
            "ingress": [readable, peer("Accept"), peer("Pass"), { "action": "Later", "from": [] }],
            "egress": [{ "action": "Deny", "to": [{ "namespaces": {} }], "protocols": [{ "quic": {} }] }],
        } });
        let spec = closed_cluster(&Name::new("", "p"), &document).spec;
        let actions: Vec<_> =
            spec.ingress.iter().map(|rule| (rule.action.unwrap(), rule.from.len())).collect();
        let (accept, deny) = (RuleAction::Accept, RuleAction::Deny);
        assert_eq!(actions, [(accept, 1), (deny, 0), (deny, 0)]);
        assert_eq!((spec.egress.len(), spec.egress[0].action, spec.egress[0].to.len()), (1, Some(deny), 0));
        assert_eq!((spec.priority, spec.subject.namespaces.unwrap().match_labels.len()), (Some(7), 1));
    }

    #[test]
    fn a_subject_that_cannot_be_read_is_all_pods() {
        let document =
            json!({ "spec": { "tier": "Later", "priority": 9, "subject": { "groups": [] }, "ingress": {} } });
        let policy = closed_cluster(&Name::new("", "p"), &document);
        assert!(manifest::check(&Resource::ClusterNetworkPolicy(policy.clone())).is_ok());
        assert_eq!((policy.spec.priority, policy.spec.ingress.len()), (Some(0), 1));
        assert_eq!(policy.spec.subject.namespaces, Some(LabelSelector::default()));
    }
}
