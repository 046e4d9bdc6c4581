//! The networks that this host does not build, because their subnets cover addresses that the host itself needs.
//!
//! [`RefusedNetworks`] owns the result of [`crate::networks::ranges`], and [`super::Local::is_built`] follows it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;

/// What a subnet would cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Needed {
    /// The underlay address of a member.
    Member {
        /// The address.
        address: IpAddr,
        /// The name of the host.
        host: String,
    },
    /// A prefix in which this host has an address.
    Connected {
        /// The prefix.
        prefix: IpNet,
        /// The device with the address.
        device: String,
    },
    /// The gateway of a default route of this host.
    Gateway(IpAddr),
    /// A resolver of this host.
    Resolver(IpAddr),
    /// The range of the hosts' addresses in the tunnel.
    Tunnel(IpNet),
    /// A `service_range`.
    Services(IpNet),
    /// A subnet of another network, on which this host has endpoints.
    Network {
        /// The subnet.
        prefix: IpNet,
        /// The name of the network.
        name: String,
    },
}

impl fmt::Display for Needed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member { address, host } => {
                write!(f, "contains {address}, the underlay address of host {host}")
            }
            Self::Connected { prefix, device } => {
                write!(f, "overlaps {prefix}, to which this host is connected by {device}")
            }
            Self::Gateway(address) => write!(f, "contains {address}, the default gateway of this host"),
            Self::Resolver(address) => write!(f, "contains {address}, a resolver of this host"),
            Self::Tunnel(prefix) => {
                write!(f, "overlaps {prefix}, where the hosts' addresses in the tunnel are")
            }
            Self::Services(range) => write!(f, "overlaps the service_range {range}"),
            Self::Network { prefix, name } => {
                write!(f, "overlaps {prefix} of network {name}, on which this host has endpoints")
            }
        }
    }
}

/// Why this host does not build a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The subnet of the network.
    pub subnet: IpNet,
    /// What it would cover.
    pub needed: Needed,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its subnet {} {}", self.subnet, self.needed)
    }
}

/// The networks that this host does not build, each with the reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RefusedNetworks(BTreeMap<NetworkId, Conflict>);

impl RefusedNetworks {
    /// Replaces all of them. Returns the networks that were added or removed.
    pub fn replace(&mut self, networks: BTreeMap<NetworkId, Conflict>) -> BTreeSet<NetworkId> {
        let before = std::mem::replace(&mut self.0, networks);
        let added = self.0.keys().filter(|id| !before.contains_key(id));
        added.chain(before.keys().filter(|id| !self.0.contains_key(id))).copied().collect()
    }

    /// Returns why a network is not built. `None` if it may be.
    pub fn get(&self, network: NetworkId) -> Option<&Conflict> {
        self.0.get(&network)
    }

    /// Whether a network is not built.
    pub fn contains(&self, network: NetworkId) -> bool {
        self.0.contains_key(&network)
    }

    /// Returns all of them.
    pub fn iter(&self) -> impl Iterator<Item = (NetworkId, &Conflict)> {
        self.0.iter().map(|(id, conflict)| (*id, conflict))
    }
}
