//! Fields of the Kubernetes API that ovl does not have: which of them it ignores, and which it must refuse.

use ovl_proto::resource::Kind;
use serde_json::Value;

/// How ovl treats a field that its types do not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Treatment {
    /// The API has no such field: a typing error, or a field of another release.
    Unknown,
    /// The field only informs, or a server writes it.
    Informative,
    /// The field does not change what ovl does. The reason says what ovl does not do.
    Ignored(&'static str),
    /// The field would change what ovl does.
    Effective(&'static str),
    /// Without the field, the object would allow what it forbids.
    Protective(&'static str),
}

const NO_CONTAINERS: &str = "ovl runs no containers";
const NO_PORTS: &str =
    "ovl publishes ports only for `attach --publish`, `sandbox create --publish` and container runtimes";
const NO_GARBAGE: &str = "ovl does not delete an object with its owner";
const NO_FINALIZERS: &str = "ovl deletes an object at once";

/// Fields of the metadata of all kinds.
const METADATA: &[(&str, Treatment)] = &[
    ("deletionGracePeriodSeconds", Treatment::Informative),
    ("finalizers", Treatment::Ignored(NO_FINALIZERS)),
    // A name is required, so none is generated.
    ("generateName", Treatment::Informative),
    ("ownerReferences", Treatment::Ignored(NO_GARBAGE)),
];

const NAMESPACE: &[(&str, Treatment)] = &[("spec", Treatment::Ignored(NO_FINALIZERS))];

const SERVICE_CIDR: &[(&str, Treatment)] = &[("status", Treatment::Informative)];

const SLICE: &[(&str, Treatment)] = &[
    ("endpoints[].deprecatedTopology", Treatment::Informative),
    ("endpoints[].targetRef", Treatment::Informative),
    ("endpoints[].zone", Treatment::Informative),
];

/// Fields of a Pod's `spec`.
const POD_SPEC: &[&str] = &[
    "activeDeadlineSeconds",
    "affinity",
    "automountServiceAccountToken",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "ephemeralContainers",
    "hostAliases",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "hostUsers",
    "hostnameOverride",
    "imagePullSecrets",
    "initContainers",
    "nodeName",
    "nodeSelector",
    "os",
    "overhead",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "readinessGates",
    "resourceClaims",
    "resources",
    "restartPolicy",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "securityContext",
    "serviceAccount",
    "serviceAccountName",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
    "workloadRef",
];

/// Fields of a container.
const CONTAINER: &[&str] = &[
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "livenessProbe",
    "readinessProbe",
    "resizePolicy",
    "resources",
    "restartPolicy",
    "restartPolicyRules",
    "securityContext",
    "startupProbe",
    "stdin",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeDevices",
    "volumeMounts",
    "workingDir",
];

/// Returns how a field is treated. `path` has no indices: `spec.ports[].port`.
pub(super) fn treatment(kind: Kind, path: &str, value: &Value) -> Treatment {
    let last = path.rsplit('.').next().unwrap_or(path);
    if last.starts_with('$') {
        return Treatment::Protective(
            "is a directive of a patch, which ovl does not carry out: remove it; `ovlctl delete` deletes objects",
        );
    }
    // ovl has all fields of a policy, so this one is misspelt.
    if kind.is_policy() && path.starts_with("spec.") {
        return Treatment::Protective(
            "is not a field of a policy of this kind, and without it the policy could allow more than it says: correct \
             or remove it",
        );
    }
    let found = match path.strip_prefix("metadata.") {
        Some(field) => listed(METADATA, field),
        None => of_kind(kind, path, value),
    };
    // A known field that counts as absent has no effect.
    if found != Treatment::Unknown && is_empty(value) { Treatment::Informative } else { found }
}

fn of_kind(kind: Kind, path: &str, value: &Value) -> Treatment {
    match kind {
        Kind::Namespace => listed(NAMESPACE, path),
        Kind::EndpointSlice => listed(SLICE, path),
        Kind::Pod => of_pod(path, value),
        Kind::ServiceCidr => listed(SERVICE_CIDR, path),
        Kind::Node => of_node(path),
        Kind::Service | Kind::NetworkPolicy | Kind::ClusterNetworkPolicy => Treatment::Unknown,
    }
}

fn of_node(path: &str) -> Treatment {
    match path.split('.').next() {
        Some("spec" | "status") => Treatment::Informative,
        Some(_) | None => Treatment::Unknown,
    }
}

fn of_pod(path: &str, value: &Value) -> Treatment {
    if path.starts_with("status.") {
        return Treatment::Informative;
    }
    if path == "spec.initContainers" && has_named_sidecar_port(value) {
        return Treatment::Effective(
            "is not supported with named ports of containers that go on running: list their ports in spec.containers",
        );
    }
    if matches!(path, "spec.containers[].ports[].hostPort" | "spec.containers[].ports[].hostIP") {
        return Treatment::Ignored(NO_PORTS);
    }
    let container = path.strip_prefix("spec.containers[].").is_some_and(|field| CONTAINER.contains(&field));
    if container || path.strip_prefix("spec.").is_some_and(|field| POD_SPEC.contains(&field)) {
        return Treatment::Ignored(NO_CONTAINERS);
    }
    Treatment::Unknown
}

/// Whether an init container that keeps running (`restartPolicy: Always`) has a port that Services can name.
fn has_named_sidecar_port(containers: &Value) -> bool {
    let all = containers.as_array().into_iter().flatten();
    all.filter(|container| container.get("restartPolicy").is_some_and(|policy| policy == "Always"))
        .filter_map(|container| container.get("ports").and_then(Value::as_array))
        .flatten()
        .any(|port| port.get("name").is_some_and(|name| !is_empty(name)))
}

fn listed(table: &[(&str, Treatment)], path: &str) -> Treatment {
    table.iter().find(|(field, _)| *field == path).map_or(Treatment::Unknown, |(_, treatment)| *treatment)
}

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
pub fn without_indices(path: &str) -> String {
    let mut within = false;
    let kept = |c: &char| {
        within = within && *c != ']';
        let keep = !within;
        within = within || *c == '[';
        keep
    };
    path.chars().filter(kept).collect()
}
