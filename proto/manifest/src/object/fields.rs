//! Fields that are refused even where unsupported fields are only warnings, because a manifest without them would allow
//! what it forbids.

use ovl_proto::resource::Kind;
use serde_json::Value;

/// Returns why ovl cannot act on an object without this unsupported field; `None` if it can. `path` has no indices:
/// `spec.ports[].port`.
pub(super) fn refusal(kind: Kind, path: &str, value: &Value) -> Option<&'static str> {
    let last = path.rsplit('.').next().unwrap_or(path);
    if last.starts_with('$') {
        return Some(
            "is a directive of a patch, which ovl does not carry out: remove it; `ovlctl delete` deletes objects",
        );
    }
    match (kind, path) {
        (Kind::Service, "spec.loadBalancerSourceRanges") if !is_empty(value) => Some(SOURCE_RANGES),
        (Kind::NetworkPolicy, path) if path.starts_with("spec.") => Some(
            "is not a field of a NetworkPolicy, and without it the policy could allow more than it says: correct or \
             remove it",
        ),
        _ => None,
    }
}

/// Why source ranges are refused.
pub(super) const SOURCE_RANGES: &str = "is not implemented, and without it every source could connect: remove it, and \
     restrict the sources by a NetworkPolicy with ipBlock";

/// The annotation by which a load balancer takes source ranges.
pub(super) const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";

/// Whether the API server takes a value for one that is not given.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Removes the indices from the path of a field: `spec.ports[0].port` becomes `spec.ports[].port`.
pub(super) fn without_indices(path: &str) -> String {
    let mut within = false;
    let kept = |c: &char| {
        within = within && *c != ']';
        let keep = !within;
        within = within || *c == '[';
        keep
    };
    path.chars().filter(kept).collect()
}
