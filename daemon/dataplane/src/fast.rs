//! The fast path: what the programs in the kernel know of this host, its endpoints and other hosts' blocks.
//!
//! Packets that the programs do not know take the host's IP stack, so an entry that is missing costs time and no packet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ovl_proto::id::{Mac, NetworkId};

use crate::device::Device;

/// The part of the data plane that the programs of the fast path have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fast {
    /// This host. `None` if the programs are not loaded.
    pub host: Option<FastHost>,
    /// The endpoints of this host on routed and switched networks, by address.
    pub pods: BTreeMap<IpAddr, FastPod>,
    /// The blocks of other hosts on routed networks, and the addresses of their endpoints on switched ones.
    pub paths: BTreeMap<IpNet, FastRoute>,
    /// The devices to which programs are attached.
    pub hooks: BTreeSet<Device>,
}

/// This host, as the programs know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastHost {
    /// Whether the programs do anything. They are left in place where packets are to be seen in the stack for a while.
    pub on: bool,
    /// The device of the underlay.
    pub underlay: Device,
    /// The address that VXLAN is sent from. `None` if VXLAN is left to the kernel's devices.
    pub vtep: Option<Ipv4Addr>,
    /// The UDP port of VXLAN.
    pub port: u16,
}

/// An endpoint of this host, by one of its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastPod {
    /// The host's interface.
    pub device: Device,
    /// A number that differs between endpoints that have an address one after another.
    pub epoch: u32,
    /// The network.
    pub network: NetworkId,
    /// The MAC address of the interface inside the namespace.
    pub mac: Mac,
    /// The MTU of both interfaces, in bytes.
    pub mtu: u16,
    /// Whether the network is switched.
    pub switched: bool,
    /// Whether the fast path is for this endpoint. Otherwise the entry says that the address is here, and not in the block
    /// of another host.
    pub fast: bool,
    /// Whether a network policy selects the endpoint: the stack judges its flows before they take the fast path.
    pub selected: bool,
}

/// How packets to a block or to an endpoint of another host are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastRoute {
    /// The network.
    pub network: NetworkId,
    /// The length of the longest packet inside, in bytes.
    pub mtu: u16,
    /// In VXLAN. `None` if packets are sent as they are, by the host's routes.
    pub vxlan: Option<FastVxlan>,
}

/// VXLAN to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastVxlan {
    /// The address of the other host.
    pub vtep: Ipv4Addr,
    /// Its UDP port.
    pub port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The MAC address that frames inside are for: of its VXLAN device, or of the endpoint on a switched network.
    pub mac: Mac,
    /// The MAC address of this host's VXLAN device. `None` on a switched network, where frames come from the endpoint's.
    pub own_mac: Option<Mac>,
}

impl Fast {
    /// Takes all of `other` in.
    pub fn merge(&mut self, other: Self) {
        let Self { host, pods, paths, hooks } = other;
        self.host = host.or(self.host);
        self.pods.extend(pods);
        self.paths.extend(paths);
        self.hooks.extend(hooks);
    }

    /// Forgets a device, as the kernel does when one is deleted: its programs go with it. Entries stay.
    pub fn forget_device(&mut self, device: Device) {
        self.hooks.remove(&device);
    }
}
