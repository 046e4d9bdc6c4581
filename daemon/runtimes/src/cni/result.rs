//! The result of an `ADD`, in the form of each version.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::Mac;
use serde_json::{Map, Value, json};

use ovl_dataplane::observed::Inside;

use super::{Add, Version};

/// A created attachment.
#[derive(Debug)]
pub struct Made<'a> {
    /// The devices on the host: name and MAC address, outermost first.
    pub host: Vec<(String, Mac)>,
    /// The interface in the container.
    pub inside: &'a Inside,
    /// Each address with the prefix length of its subnet, and the gateway there.
    pub addresses: Vec<(IpNet, Option<IpAddr>)>,
}

/// Returns the result: that of the plugins earlier in the chain, followed by that of ovl.
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
    // The DNS configuration given to ovl takes precedence over that of an earlier plugin.
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
