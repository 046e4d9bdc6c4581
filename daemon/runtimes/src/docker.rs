//! Calls of a Docker Engine to its network and IPAM plugin (libnetwork's remote driver and IPAM
//! protocols): what they mean, what is decided for them, and what is answered. Tested against the
//! recorded calls of two Engines.
//!
//! An Engine tells its plugin neither the name of a network nor of a container, and asks for a range
//! of addresses before it tells which network that is for. So a network is known by its range, or by
//! an option that names it.

mod answer;
mod call;
mod decide;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use serde::{Deserialize, Serialize};

pub use answer::{Joined, address, always, endpoint, failed, joined, nothing, pool};
pub use call::{AddressWish, Call, EndpointWish, Later, MAX_NAME, NetworkWish, PoolWish, later, parse};
pub use decide::{Choice, Plan, choose_pool, network_id, plan_network, subnet_of, wanted_gateway};

/// What our IPAM calls its pools' space; one that comes with another name is not ours.
pub const SPACE: &str = "ovl";

/// A network of an Engine, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineNetwork {
    /// The network of the cluster.
    pub network: NetworkId,
    /// Pools that were handed out before it was known what for.
    pub pools: Vec<Pool>,
}

/// An endpoint of an Engine, by the Engine's own ids.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EngineEndpoint {
    /// The network's id.
    pub network: String,
    /// The endpoint's id.
    pub endpoint: String,
}

/// A pool of addresses, as the Engine knows it: `10.77.0.0/16` is the range of whichever network has
/// it; `10.128.0.0/20#0badcafe` was chosen by us for a network that the Engine was still to name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// The range.
    pub prefix: IpNet,
    /// Tells those that we chose apart.
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
        let wrong = || format!("{text:?} is no pool of ovl");
        let (prefix, chosen) = match text.split_once('#') {
            Some((prefix, number)) => (prefix, Some(u32::from_str_radix(number, 16).map_err(|_| wrong())?)),
            None => (text, None),
        };
        Ok(Self { prefix: prefix.parse().map_err(|_| wrong())?, chosen })
    }
}

/// The name that a container's interface has until the Engine fetches it, by the host's end of the
/// pair. It is none of our devices' names: where it goes is the Engine's.
pub fn waiting_name(host_end: &str) -> String {
    host_end.replacen("ove-", "ovc-", 1)
}

/// Whether two addresses are of one family.
fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}
