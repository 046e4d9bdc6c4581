//! The capability `portMappings`: ports of the host that lead to the container (CNI conventions, "Dynamic Plugin specific
//! Fields").

use std::net::IpAddr;

use ovl_control::CniError;
use ovl_proto::publish::{Ports, Publish, Transport};
use serde_json::Value;

use super::value::{field, invalid, list, wrong};

/// The key in `runtimeConfig`.
const KEY: &str = "runtimeConfig.portMappings";

/// Returns the ports to publish.
///
/// Runtimes send one entry for each port, also for the ports of a range; consecutive entries become a range again. An
/// entry whose `hostPort` is 0 asks for no port of the host, as in Kubernetes.
///
/// # Errors
///
/// An entry is not of the form of the conventions.
pub(super) fn published(mappings: Option<&Value>) -> Result<Vec<Publish>, CniError> {
    let mut all: Vec<Publish> = Vec::new();
    for mapping in list(KEY, mappings)? {
        let Some(mapping) = one(mapping)? else { continue };
        match all.last_mut() {
            Some(last) if continues(*last, mapping) => {
                last.container.last = mapping.container.last;
                last.host = last.host.map(|host| Ports { last: host.last.saturating_add(1), ..host });
            }
            _ => all.push(mapping),
        }
    }
    Ok(all)
}

/// Returns the port of one entry. `None` if it asks for none.
fn one(mapping: &Value) -> Result<Option<Publish>, CniError> {
    let Value::Object(mapping) = mapping else {
        return Err(wrong(KEY, r#"a list of {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}"#));
    };
    let port = |name: &str| {
        let value = field(mapping, name).and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        value.ok_or_else(|| wrong(&format!("{KEY}.{name}"), "a port"))
    };
    let text = |name: &str| match field(mapping, name) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(_) => Err(wrong(&format!("{KEY}.{name}"), "text")),
    };
    let transport = match text("protocol")?.to_ascii_lowercase().as_str() {
        "" | "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        "sctp" => Transport::Sctp,
        _ => return Err(wrong(&format!("{KEY}.protocol"), "tcp, udp or sctp")),
    };
    let address = match text("hostIP")? {
        "" => None,
        text => Some(
            text.parse::<IpAddr>()
                .map_err(|_| invalid(KEY, format!("{KEY}.hostIP: {text:?} is not an address")))?,
        ),
    };
    let (host, container) = (port("hostPort")?, port("containerPort")?);
    if host == 0 {
        return Ok(None);
    }
    if container == 0 {
        return Err(wrong(&format!("{KEY}.containerPort"), "a port from 1 to 65535"));
    }
    Ok(Some(Publish { address, host: Some(Ports::one(host)), container: Ports::one(container), transport }))
}

/// Whether a port follows a range, on the host and in the container.
fn continues(range: Publish, next: Publish) -> bool {
    let follows = |range: Ports, next: Ports| range.last.checked_add(1) == Some(next.first);
    (range.address, range.transport) == (next.address, next.transport)
        && follows(range.container, next.container)
        && range.host.zip(next.host).is_some_and(|(range, next)| follows(range, next))
}
