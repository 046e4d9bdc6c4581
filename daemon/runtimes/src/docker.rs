//! Calls of a Docker Engine to its network and IPAM plugin (the protocols of libnetwork's remote driver and IPAM):
//! parsing, decisions and responses. The tests replay recorded calls of two Engines.
//!
//! An Engine sends its plugin neither the name of a network nor that of a container, and requests a pool before it
//! sends the network that the pool is for. So ovl identifies a network by its subnet, or by an option with its name.

mod answer;
mod call;
mod decide;
mod foreign;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use serde::{Deserialize, Serialize};

pub use answer::{Joined, address, always, endpoint, failed, joined, nothing, pool};
pub use call::{AddressWish, Call, EndpointWish, Later, MAX_NAME, NetworkWish, PoolWish, later, parse};
pub use decide::{Choice, Plan, choose_pool, network_id, plan_network, subnet_of, wanted_gateway};

/// The address space of ovl's IPAM. A pool of another address space belongs to another IPAM driver.
pub const SPACE: &str = "ovl";

/// A network of a Docker Engine, as stored on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineNetwork {
    /// The network of the cluster.
    pub network: NetworkId,
    /// Pools that were assigned before the Engine sent the network that they are for.
    pub pools: Vec<Pool>,
}

/// An endpoint of a Docker Engine, by the Engine's ids.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EngineEndpoint {
    /// The network's id.
    pub network: String,
    /// The endpoint's id.
    pub endpoint: String,
}

/// An address pool, by the id that the Engine uses.
///
/// `10.77.0.0/16` is the subnet of the network that has it. `10.128.0.0/20#0badcafe` was chosen by ovl for a network
/// that the Engine had yet to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// The prefix.
    pub prefix: IpNet,
    /// The number that distinguishes pools chosen by ovl. `None`: the user or a network gave the prefix.
    pub chosen: Option<u32>,
}

impl std::fmt::Display for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.chosen {
            Some(number) => write!(f, "{}#{number:08x}", self.prefix),
            None => write!(f, "{}", self.prefix),
        }
    }
}

impl std::str::FromStr for Pool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("invalid pool {text:?}: it is no pool of ovl");
        let (prefix, chosen) = match text.split_once('#') {
            Some((prefix, number)) => (prefix, Some(u32::from_str_radix(number, 16).map_err(|_| wrong())?)),
            None => (text, None),
        };
        Ok(Self { prefix: prefix.parse().map_err(|_| wrong())?, chosen })
    }
}

/// Returns the name that a container's interface has until the Engine moves it, by the name of the host's interface
/// of the pair. It is not the name of an ovl device, because the Engine owns it from then on.
pub fn waiting_name(host_end: &str) -> String {
    host_end.replacen("ove-", "ovc-", 1)
}

/// Whether two addresses have the same family.
fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}
