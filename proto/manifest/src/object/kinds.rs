//! Which objects of a manifest ovl acts on: by their `apiVersion` and `kind`.

use ovl_proto::resource::Kind;

/// What ovl does with objects of an `apiVersion` and `kind`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Class {
    /// It acts on them.
    Known(Kind),
    /// It passes them over.
    Foreign,
    /// It does not act on them, and what they forbid would be allowed.
    ForeignPolicy,
    /// There is no such kind: which field is wrong, and why.
    Wrong(&'static str, String),
}

/// The kinds of the API groups to which ovl's kinds belong, other than those that ovl acts on. Any other kind of these
/// groups is a typing error.
const OTHERS: [(&str, &[&str]); 3] = [
    (
        "v1",
        &[
            "Binding",
            "ComponentStatus",
            "ConfigMap",
            "Endpoints",
            "Event",
            "LimitRange",
            "Node",
            "PersistentVolume",
            "PersistentVolumeClaim",
            "PodTemplate",
            "ReplicationController",
            "ResourceQuota",
            "Secret",
            "ServiceAccount",
        ],
    ),
    ("networking.k8s.io/v1", &["IPAddress", "Ingress", "IngressClass"]),
    ("discovery.k8s.io/v1", &[]),
];

/// Classifies objects by their `apiVersion` and `kind`.
pub(super) fn classify(version: &str, kind: &str) -> Class {
    if let Some(known) = known(version, kind) {
        return Class::Known(known);
    }
    let item = kind.strip_suffix("List").unwrap_or(kind);
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    let of_kubernetes = !group.contains('.') || group.ends_with(".k8s.io");
    let lower = item.to_ascii_lowercase();
    let meant = Kind::ALL.into_iter().find(|known| known.spellings().contains(&lower.as_str()));
    if let Some(meant) = meant.filter(|_| of_kubernetes) {
        let field = if meant.api_version() == version { "kind" } else { "apiVersion" };
        let reason = format!("{version} {kind} is not supported: use {} {meant}", meant.api_version());
        return Class::Wrong(field, reason);
    }
    if let Some((_, others)) = OTHERS.iter().find(|(other, _)| *other == version)
        && kind != "List"
        && !others.contains(&item)
    {
        return Class::Wrong("kind", format!("{version} has no kind {kind}"));
    }
    if item.ends_with("NetworkPolicy") { Class::ForeignPolicy } else { Class::Foreign }
}

fn known(version: &str, kind: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|known| known.name() == kind && known.api_version() == version)
}

/// A list of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ListOf {
    /// Of any kinds: `v1 List`.
    Any,
    /// Of one kind: `v1 ServiceList` and its like. The items need not name it.
    Kind(Kind),
}

/// Returns what a kind is a list of. `None` if it is not a list, or one of a kind that ovl does not act on.
pub(super) fn list_of(version: &str, kind: &str) -> Option<ListOf> {
    if (version, kind) == ("v1", "List") {
        return Some(ListOf::Any);
    }
    known(version, kind.strip_suffix("List")?).map(ListOf::Kind)
}
