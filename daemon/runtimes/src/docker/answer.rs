//! Responses to an Engine, as JSON.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Call, Pool, SPACE, same_family};

/// Returns the response to a call if it does not depend on the cluster; `None` otherwise.
pub fn always(call: &Call) -> Option<Value> {
    Some(match call {
        Call::Activate => json!({ "Implements": ["NetworkDriver", "IpamDriver"] }),
        // `local`: without Swarm, an Engine does not keep global networks, and ovl itself distributes networks to
        // hosts.
        Call::DriverCapabilities => json!({ "Scope": "local", "ConnectivityScope": "global" }),
        // A MAC address with each request distinguishes endpoints from auxiliary addresses. No replay is needed
        // after a restart of the Engine, because ovld stores its state.
        Call::IpamCapabilities => json!({ "RequiresMACAddress": true, "RequiresRequestReplay": false }),
        Call::AddressSpaces => {
            json!({ "LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE })
        }
        Call::Describe(_) => described(),
        Call::Nothing => nothing(),
        _ => return None,
    })
}

/// Returns the response with a pool.
pub fn pool(pool: Pool) -> Value {
    json!({ "PoolID": pool.to_string(), "Pool": pool.prefix.to_string(), "Data": {} })
}

/// Returns the response with an address and its prefix length.
pub fn address(net: IpNet) -> Value {
    json!({ "Address": net.to_string(), "Data": {} })
}

/// Returns the response for an endpoint whose interface is as the Engine requested.
pub fn endpoint() -> Value {
    json!({ "Interface": {} })
}

/// Returns an empty description: the Engine shows no further data of endpoints.
fn described() -> Value {
    json!({ "Value": {} })
}

/// Returns the response for success without data.
pub fn nothing() -> Value {
    json!({})
}

/// Returns the response for an error. The driver and IPAM protocols use different keys for it.
pub fn failed(why: &str) -> Value {
    let why = format!("ovl: {why}");
    json!({ "Err": why, "Error": why })
}

/// What an Engine configures in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// The name of the interface in the host's namespace, which the Engine moves.
    pub device: String,
    /// The gateways, one for each address.
    pub gateways: Vec<IpAddr>,
    /// The subnets behind the gateways, on a routed network, where the addresses' own prefixes do not cover them.
    pub ranges: Vec<IpNet>,
}

/// Returns the response to a join.
///
/// The Engine names the interface `eth0` or the next free name. Without a gateway it would also attach the
/// container to its own bridge, unless `DisableGatewayService` is set.
pub fn joined(joined: &Joined, internal: bool) -> Value {
    let mut routes = Vec::new();
    for gateway in &joined.gateways {
        let behind: Vec<&IpNet> =
            joined.ranges.iter().filter(|range| same_family(range.addr(), *gateway)).collect();
        if behind.is_empty() {
            continue;
        }
        // The addresses have full-length prefixes, so the gateway needs a route of its own.
        routes.push(json!({ "Destination": IpNet::from(*gateway).to_string(), "RouteType": 1 }));
        routes.extend(behind.iter().map(|range| {
            json!({ "Destination": range.to_string(), "RouteType": 0, "NextHop": gateway.to_string() })
        }));
    }
    let gateway = |v4: bool| {
        let found = joined.gateways.iter().find(|gateway| gateway.is_ipv4() == v4 && !internal);
        found.map(ToString::to_string).unwrap_or_default()
    };
    json!({
        "InterfaceName": { "SrcName": joined.device, "DstPrefix": "eth" },
        "Gateway": gateway(true),
        "GatewayIPv6": gateway(false),
        "StaticRoutes": routes,
        "DisableGatewayService": internal,
    })
}
