//! Values that the Kubernetes API server takes for fields that are not given.
//!
//! The server decodes these fields into types whose zero value means "not given", and fills in the default. Charts and
//! exports write them. Fields that are pointers in the API are not listed: there, the server refuses the zero value.

use ovl_proto::resource::Kind;
use serde_json::Value;

/// The zero value of a field.
#[derive(Debug, Clone, Copy)]
enum Zero {
    Text,
    Number,
    Either,
}

/// The fields of each kind. A part `[]` stands for the items of a list.
fn fields(kind: Kind) -> &'static [(&'static [&'static str], Zero)] {
    match kind {
        Kind::Service => &[
            (&["spec", "type"], Zero::Text),
            (&["spec", "sessionAffinity"], Zero::Text),
            (&["spec", "externalTrafficPolicy"], Zero::Text),
            (&["spec", "loadBalancerIP"], Zero::Text),
            (&["spec", "loadBalancerClass"], Zero::Text),
            (&["spec", "healthCheckNodePort"], Zero::Number),
            (&["spec", "ports", "[]", "protocol"], Zero::Text),
            (&["spec", "ports", "[]", "nodePort"], Zero::Number),
            (&["spec", "ports", "[]", "targetPort"], Zero::Either),
        ],
        Kind::Pod => &[
            (&["spec", "containers", "[]", "ports", "[]", "protocol"], Zero::Text),
            (&["status", "phase"], Zero::Text),
            (&["status", "podIP"], Zero::Text),
        ],
        Kind::Namespace
        | Kind::EndpointSlice
        | Kind::NetworkPolicy
        | Kind::ServiceCidr
        | Kind::ClusterNetworkPolicy
        | Kind::Node => &[],
    }
}

/// Removes the fields of a manifest that count as not given.
pub(super) fn remove(kind: Kind, manifest: &mut Value) {
    for (path, zero) in fields(kind) {
        remove_at(manifest, path, *zero);
    }
}

fn remove_at(value: &mut Value, path: &[&str], zero: Zero) {
    match (path, value) {
        (["[]", rest @ ..], Value::Array(items)) => {
            items.iter_mut().for_each(|item| remove_at(item, rest, zero));
        }
        ([field], Value::Object(fields)) if fields.get(*field).is_some_and(|value| is_zero(value, zero)) => {
            fields.remove(*field);
        }
        ([field, rest @ ..], Value::Object(fields)) => {
            if let Some(value) = fields.get_mut(*field) {
                remove_at(value, rest, zero);
            }
        }
        _ => {}
    }
}

fn is_zero(value: &Value, zero: Zero) -> bool {
    match zero {
        Zero::Text => value == "",
        Zero::Number => value == 0,
        Zero::Either => value == "" || value == 0,
    }
}
