//! The capability `bandwidth`: limits of a container's traffic (CNI conventions, "Dynamic Plugin specific Fields").

use ovl_control::CniError;
use ovl_proto::bandwidth::{Bandwidth, Rate};
use serde_json::{Map, Value};

use super::value::{field, invalid, wrong};

/// The key in `runtimeConfig`.
const KEY: &str = "runtimeConfig.bandwidth";

/// Returns the limits. A rate of 0 is none.
///
/// # Errors
///
/// The capability is not of the form of the conventions, or has a rate without a burst.
pub(super) fn limits(bandwidth: Option<&Value>) -> Result<Bandwidth, CniError> {
    match bandwidth {
        None | Some(Value::Null) => Ok(Bandwidth::default()),
        Some(Value::Object(bandwidth)) => Ok(Bandwidth {
            ingress: rate(bandwidth, "ingressRate", "ingressBurst")?,
            egress: rate(bandwidth, "egressRate", "egressBurst")?,
        }),
        Some(_) => Err(wrong(KEY, "an object")),
    }
}

fn rate(bandwidth: &Map<String, Value>, rate: &str, burst: &str) -> Result<Option<Rate>, CniError> {
    let number = |name: &str| match field(bandwidth, name) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value.as_u64().ok_or_else(|| wrong(&format!("{KEY}.{name}"), "a number of bits")),
    };
    let limit = Rate { rate: number(rate)?, burst: number(burst)? };
    if limit.rate > 0 && limit.burst == 0 {
        return Err(invalid(
            KEY,
            format!("{KEY}: {rate} needs {burst}, the number of bits that may pass at once"),
        ));
    }
    Ok((limit.rate > 0).then_some(limit))
}
