//! What is answered, as JSON.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Call, Pool, SPACE, same_family};

/// What is always answered in the same way, whatever the cluster is like.
pub fn always(call: &Call) -> Option<Value> {
    Some(match call {
        Call::Activate => json!({ "Implements": ["NetworkDriver", "IpamDriver"] }),
        // `local`: without Swarm an Engine takes back networks that are global, and it is ovl that
        // tells the hosts.
        Call::DriverCapabilities => json!({ "Scope": "local", "ConnectivityScope": "global" }),
        // A MAC address with each request tells endpoints from auxiliary addresses. Nothing is to be
        // repeated after a restart of the Engine: what it knows of us, we know too.
        Call::IpamCapabilities => json!({ "RequiresMACAddress": true, "RequiresRequestReplay": false }),
        Call::AddressSpaces => {
            json!({ "LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE })
        }
        Call::Describe(_) => described(),
        Call::Nothing => nothing(),
        _ => return None,
    })
}

/// A range.
pub fn pool(pool: Pool) -> Value {
    json!({ "PoolID": pool.to_string(), "Pool": pool.prefix.to_string(), "Data": {} })
}

/// An address with its length.
pub fn address(net: IpNet) -> Value {
    json!({ "Address": net.to_string(), "Data": {} })
}

/// An endpoint that has what the Engine gave it.
pub fn endpoint() -> Value {
    json!({ "Interface": {} })
}

/// There is nothing to say about endpoints that the Engine would show.
fn described() -> Value {
    json!({ "Value": {} })
}

/// It was done.
pub fn nothing() -> Value {
    json!({})
}

/// It was not. The two protocols have another name for that.
pub fn failed(why: &str) -> Value {
    let why = format!("ovl: {why}");
    json!({ "Err": why, "Error": why })
}

/// What an Engine is to put into a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// The interface's name in the host's namespace.
    pub device: String,
    /// One for each address.
    pub gateways: Vec<IpAddr>,
    /// What is behind the gateways, if the addresses' own ranges do not say so: of a routed network.
    pub ranges: Vec<IpNet>,
}

/// The Engine names the interface `eth0` or the next one. Without a gateway it would put a bridge of
/// its own beside, unless it is told not to.
pub fn joined(joined: &Joined, internal: bool) -> Value {
    let mut routes = Vec::new();
    for gateway in &joined.gateways {
        let behind: Vec<&IpNet> =
            joined.ranges.iter().filter(|range| same_family(range.addr(), *gateway)).collect();
        if behind.is_empty() {
            continue;
        }
        // The addresses have no range of their own to find the gateway in.
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
