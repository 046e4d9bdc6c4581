//! Values of configurations, and the errors about them.

use ovl_control::CniError;
use serde_json::{Map, Value};

use super::{code, error};

/// Returns a list; absent and null values are an empty list.
pub(super) fn list<'a>(name: &str, value: Option<&'a Value>) -> Result<&'a [Value], CniError> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(values)) => Ok(values),
        Some(_) => Err(wrong(name, "a list")),
    }
}

/// Returns a member of an object. containerd writes the names of `portMappings` and `bandwidth` as `HostPort`: Go, in
/// which the reference plugins are written, reads names in any case.
pub(super) fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// Creates the error for a configuration value of the wrong type.
pub(super) fn wrong(name: &str, wanted: &str) -> CniError {
    error(code::CONFIG, "invalid network configuration", format!("{name} must be {wanted}"))
}

/// Creates the error for an invalid environment variable.
pub(super) fn environment(details: String) -> CniError {
    error(code::ENVIRONMENT, "invalid environment variable", details)
}

/// Creates the error for an invalid value.
pub(super) fn invalid(place: &str, details: String) -> CniError {
    if place.starts_with("CNI_ARGS") {
        environment(details)
    } else {
        error(code::CONFIG, "invalid network configuration", details)
    }
}
