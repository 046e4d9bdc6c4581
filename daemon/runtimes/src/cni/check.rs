//! The `CHECK` of an attachment.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_control::CniError;
use ovl_proto::id::Mac;
use ovl_proto::table::Endpoint;
use serde_json::Value;

use ovl_dataplane::observed::Inside;

use super::{Check, code, error};

/// Compares the attachment in ovl's state, in the runtime's result and in the kernel. What other plugins of the chain
/// created is ignored.
///
/// # Errors
///
/// Names the first difference.
pub fn check(call: &Check, endpoint: &Endpoint, found: Option<&Inside>) -> Result<(), CniError> {
    let ifname = &call.attachment.ifname;
    let Some(found) = found else {
        return difference(format!("no interface {ifname} in {}", call.netns.display()));
    };
    if !found.up {
        return difference(format!("{ifname} is down"));
    }
    if found.mac != endpoint.mac {
        return difference(format!("{ifname} has the MAC address {} instead of {}", found.mac, endpoint.mac));
    }
    for net in &endpoint.addresses {
        if !found.addresses.contains(net) {
            return difference(format!(
                "{ifname} does not have the address {net}, but {}",
                shown(&found.addresses)
            ));
        }
    }
    check_previous(call, endpoint, found)
}

/// Compares the runtime's result with the interface.
fn check_previous(call: &Check, endpoint: &Endpoint, found: &Inside) -> Result<(), CniError> {
    let ifname = &call.attachment.ifname;
    let all = |key: &str| call.previous.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let is_own = |interface: &Value| {
        interface["name"] == ifname.as_str()
            && interface["sandbox"].as_str().is_some_and(|path| !path.is_empty())
    };
    let Some(at) = all("interfaces").iter().position(is_own) else {
        return difference(format!("prevResult has no interface {ifname} in a sandbox"));
    };
    let reported =
        all("interfaces").get(at).and_then(|interface| interface["mac"].as_str()).unwrap_or_default();
    if reported.parse::<Mac>() != Ok(found.mac) {
        return difference(format!(
            "prevResult has {ifname} with the MAC address {reported:?} instead of {}",
            found.mac
        ));
    }
    let ips: Vec<&Value> = all("ips")
        .iter()
        .filter(|ip| ip["interface"].as_u64().is_some_and(|index| index == at as u64))
        .collect();
    let own: Vec<&str> = ips.iter().filter_map(|ip| ip["address"].as_str()).collect();
    for net in &endpoint.addresses {
        if !own.iter().any(|reported| reported.parse::<IpNet>() == Ok(*net)) {
            return difference(format!("prevResult does not have the address {net} of {ifname}"));
        }
    }
    for reported in &own {
        if !reported.parse::<IpNet>().is_ok_and(|net| found.addresses.contains(&net)) {
            return difference(format!(
                "prevResult has the address {reported}, and {ifname} has {}",
                shown(&found.addresses)
            ));
        }
    }
    for route in all("routes") {
        let default = matches!(route["dst"].as_str(), Some("0.0.0.0/0" | "::/0"));
        // Routes via other gateways belong to other plugins.
        let own = ips.iter().any(|ip| ip["gateway"].is_string() && ip["gateway"] == route["gw"]);
        let gateway = route["gw"].as_str().and_then(|gateway| gateway.parse::<IpAddr>().ok());
        if let Some(gateway) = gateway.filter(|gateway| default && own && !found.gateways.contains(gateway)) {
            return difference(format!(
                "the default route via {gateway} is missing in {}",
                call.netns.display()
            ));
        }
    }
    Ok(())
}

fn shown(addresses: &[IpNet]) -> String {
    match addresses {
        [] => "none".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn difference(details: String) -> Result<(), CniError> {
    Err(error(code::DIFFERENCE, "the container's attachment differs from the one that was created", details))
}
