//! The result of an `ADD`, in each version.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::Mac;
use serde_json::{Map, Value, json};

use ovl_dataplane::observed::Inside;

use super::{Add, Version};

/// An attachment that was made.
#[derive(Debug)]
pub struct Made<'a> {
    /// Devices on the host: name and MAC address, outermost first.
    pub host: Vec<(String, Mac)>,
    /// The interface in the container.
    pub inside: &'a Inside,
    /// Each address with the length of its subnet, and the gateway there.
    pub addresses: Vec<(IpNet, Option<IpAddr>)>,
}

/// What is printed: what plugins before us made, and then ours.
pub fn render(add: &Add, made: &Made<'_>) -> Value {
    let mut result = add.previous.clone().unwrap_or_default();
    result.insert("cniVersion".to_owned(), add.version.as_str().into());

    let mut interfaces: Vec<Value> =
        made.host.iter().map(|(name, mac)| json!({ "name": name, "mac": mac.to_string() })).collect();
    let mut inside = json!({
        "name": add.attachment.ifname,
        "mac": made.inside.mac.to_string(),
        "sandbox": add.netns.to_string_lossy(),
    });
    if add.version >= Version::V1_1_0 {
        inside["mtu"] = made.inside.mtu.into();
    }
    interfaces.push(inside);
    let before = length(&result, "interfaces");
    let index = before + interfaces.len() - 1;

    let ips = made.addresses.iter().map(|(net, gateway)| {
        let mut ip = json!({ "address": net.to_string(), "interface": index });
        if let Some(gateway) = gateway {
            ip["gateway"] = gateway.to_string().into();
        }
        if add.version < Version::V1_0_0 {
            ip["version"] = if net.addr().is_ipv4() { "4" } else { "6" }.into();
        }
        ip
    });
    let routes = made.inside.gateways.iter().map(|gateway| {
        let everywhere = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        json!({ "dst": everywhere, "gw": gateway.to_string() })
    });
    append(&mut result, "interfaces", interfaces);
    append(&mut result, "ips", ips.collect());
    append(&mut result, "routes", routes.collect());
    // Of two that say something about names, the one that was given to us wins.
    if !add.dns.is_empty() || !result.contains_key("dns") {
        result.insert("dns".to_owned(), Value::Object(add.dns.clone()));
    }
    Value::Object(result)
}

fn length(result: &Map<String, Value>, key: &str) -> usize {
    result.get(key).and_then(Value::as_array).map_or(0, Vec::len)
}

fn append(result: &mut Map<String, Value>, key: &str, more: Vec<Value>) {
    match result.get_mut(key) {
        Some(Value::Array(values)) => values.extend(more),
        _ if more.is_empty() => {}
        _ => {
            result.insert(key.to_owned(), more.into());
        }
    }
}
