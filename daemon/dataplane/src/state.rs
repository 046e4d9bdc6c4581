//! The data plane that is, or should be, in the kernel: the one shape that subsystems compute, the dump of the
//! kernel is read into, and [`crate::diff`] compares.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::{Mac, TunnelKey};

use crate::device::{Device, Role};
use crate::fast::Fast;
use crate::nft::{Elements, Skeleton, Table};

/// Our part of the kernel's state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataplane {
    /// Bridges, VXLAN devices and the host's ends of endpoints.
    pub links: BTreeMap<Device, Link>,
    /// Addresses of our bridges; on a routed network the bridge has no ports and carries the
    /// gateways' addresses. Also of the ends of the tunnel, and on a routed network those of IPv6 on the
    /// device of an endpoint whose other end a Docker Engine sets up.
    pub addresses: BTreeSet<(Device, IpNet)>,
    /// Where a VXLAN device sends frames for a MAC address (`bridge fdb ... self`).
    pub remotes: BTreeMap<(Device, Mac), Remote>,
    /// Where a VXLAN device sends broadcast, unknown unicast, and the multicast that is not in [`Self::groups`]: the
    /// entries of the all-zero MAC.
    pub floods: BTreeSet<(Device, Remote)>,
    /// Where a VXLAN device sends frames for the MAC address of a multicast group, which are several hosts.
    pub groups: BTreeSet<(Device, Mac, Remote)>,
    /// Behind which port of its bridge a MAC address is (`bridge fdb ... master`).
    pub ports: BTreeSet<(Device, Mac)>,
    /// Permanent neighbours: on bridges the endpoints of switched networks, on VXLAN devices the
    /// other hosts of a routed one, on an endpoint's device the endpoint.
    pub neighbours: BTreeMap<(Device, IpAddr), Mac>,
    /// Routes of our protocol and metric ([`PROTOCOL`], [`METRIC`]) in the main table.
    pub routes: BTreeMap<IpNet, Hop>,
    /// Ends of the tunnel, beside their links.
    pub tunnels: BTreeMap<Device, Tunnel>,
    /// Who is at the other end of each of these.
    pub tunnel_peers: BTreeMap<(Device, TunnelKey), TunnelPeer>,
    /// On an encrypted switched network, by its `ovx-` device: what another host may send from. Frames with
    /// other source addresses are dropped, whoever sealed them.
    pub sources: BTreeMap<(Device, Mac), Source>,
    /// Devices to which packets from 127.0.0.1 may be translated (`route_localnet`).
    pub localnets: BTreeSet<Device>,
    /// Addresses of LoadBalancers that this host answers for, on a device that is not ours: they carry [`PROTOCOL`].
    pub announced: BTreeSet<(Device, IpAddr)>,
    /// Settings under `net.`, by their names with dots.
    pub sysctls: BTreeMap<String, String>,
    /// Our nftables table, as the text that makes it; [`crate::nft::BASE_TABLE`] is its name.
    pub filter: Option<String>,
    /// Our other nftables tables.
    pub tables: BTreeMap<Table, Arc<Skeleton>>,
    /// What is in their sets and maps.
    pub elements: Elements,
    /// What the programs of the fast path know.
    pub fast: Fast,
}

/// A device of ovl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A network's bridge.
    Bridge {
        /// The gateway's address.
        mac: Mac,
        /// In bytes.
        mtu: u16,
        /// Administratively up.
        up: bool,
        /// Spanning tree and calls into the host's iptables are off, and the kernel makes no link-local address (it
        /// would be the same on every host). The bridge follows which port has joined which multicast group, and asks
        /// for that ([`crate::op::SNOOPING`]).
        tuned: bool,
    },
    /// A network's VXLAN device, a port of its bridge.
    Vxlan {
        /// VXLAN network identifier.
        vni: u32,
        /// The underlay address that it sends from.
        local: IpAddr,
        /// The UDP port.
        port: u16,
        /// In bytes.
        mtu: u16,
        /// The bridge.
        master: Option<Device>,
        /// What frames from other hosts are addressed to, on a routed network.
        mac: Mac,
        /// Administratively up.
        up: bool,
        /// Learning is off; on a port also there, neighbour suppression is off, all multicast goes there, and what comes
        /// from another VXLAN device does not.
        tuned: bool,
        /// Its packets are inside the tunnel, which vouches for them: they have no UDP checksums, and
        /// need none.
        sealed: bool,
    },
    /// The same as [`Link::Vxlan`] for an encrypted network where the tunnel is in this process: a TAP
    /// device, to which the process writes what came out of VXLAN.
    Tap {
        /// VXLAN network identifier; 0 in a dump where no thread serves the device.
        vni: u32,
        /// In bytes.
        mtu: u16,
        /// The bridge.
        master: Option<Device>,
        /// Administratively up.
        up: bool,
        /// As [`Link::Vxlan::tuned`].
        tuned: bool,
    },
    /// An end of the tunnel.
    Tunnel {
        /// Whose.
        kind: TunnelKind,
        /// In bytes.
        mtu: u16,
        /// Administratively up.
        up: bool,
    },
    /// The host's end of an endpoint. Made by an attach, never by the loop: when it is gone, the
    /// namespace is.
    Endpoint {
        /// In bytes; both ends get it.
        mtu: u16,
        /// The bridge; none on a routed network, and while the endpoint is isolated.
        master: Option<Device>,
        /// Administratively up.
        up: bool,
        /// A port whose learning is off: the one MAC address behind it is in [`Dataplane::ports`]. All multicast goes
        /// there, and the kernel follows a limited number of groups behind it.
        tuned: bool,
        /// A port by which frames may leave that came in by it, for endpoints with published ports or behind a Service.
        hairpin: bool,
    },
}

/// A VTEP and the port of its VXLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Remote {
    /// Underlay address.
    pub vtep: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// Who does the work of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelKind {
    /// The kernel's WireGuard device.
    Kernel,
    /// This process, behind a TUN device.
    Userspace,
}

/// An end of the tunnel, beside its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tunnel {
    /// The public key that belongs to its private key. The private key itself is never in the model.
    pub key: TunnelKey,
    /// The UDP port.
    pub port: u16,
    /// The address of its socket; none: all that the host has, as with the kernel's device.
    pub local: Option<IpAddr>,
}

/// The other end of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelPeer {
    /// Where its record says that it is.
    pub endpoint: SocketAddr,
    /// What it may send from, and what goes to it.
    pub allowed: BTreeSet<IpNet>,
}

/// Who may use a MAC address as source on a switched network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The tunnel addresses of the hosts that may send from it: one, unless endpoints share a virtual MAC address.
    pub from: BTreeSet<IpAddr>,
    /// The addresses that the endpoints may send from.
    pub addresses: BTreeSet<IpAddr>,
}

/// Who made a route, as `ip route` shows it (`proto 79`). Others' routes are never touched: in
/// `/etc/iproute2/rt_protos` the number belongs to nobody.
pub const PROTOCOL: u8 = 79;

/// Beside a route of somebody else's to the same destination, which then is preferred as a rule.
pub const METRIC: u32 = 79;

/// Where a route of ovl leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// A device of ovl; none: the one through which the next hop is reached.
    pub device: Option<Device>,
    /// The next hop; none: the destination is behind the device itself.
    pub gateway: Option<IpAddr>,
    /// What this host sends from, when it is the sender.
    pub source: Option<IpAddr>,
    /// Where the path carries less than the device, in bytes.
    pub mtu: Option<u16>,
}

impl Hop {
    /// Nobody has such an address: it is said at once, and nothing wanders off to a default route.
    pub const UNREACHABLE: Self = Self { device: None, gateway: None, source: None, mtu: None };
}

impl Dataplane {
    /// Takes all of `other` in. The two have no device in common.
    pub fn merge(&mut self, other: Self) {
        let Self {
            links,
            addresses,
            remotes,
            floods,
            groups,
            ports,
            neighbours,
            routes,
            tunnels,
            tunnel_peers,
            sources,
            localnets,
            announced,
            sysctls,
            filter,
            tables,
            elements,
            fast,
        } = other;
        self.links.extend(links);
        self.addresses.extend(addresses);
        self.remotes.extend(remotes);
        self.floods.extend(floods);
        self.groups.extend(groups);
        self.ports.extend(ports);
        self.neighbours.extend(neighbours);
        self.routes.extend(routes);
        self.tunnels.extend(tunnels);
        self.tunnel_peers.extend(tunnel_peers);
        self.sources.extend(sources);
        self.localnets.extend(localnets);
        self.announced.extend(announced);
        self.sysctls.extend(sysctls);
        self.filter = filter.or_else(|| self.filter.take());
        self.tables.extend(tables);
        self.elements.merge(elements);
        self.fast.merge(fast);
    }

    /// Forgets a device and all that hangs on it, as the kernel does when one is deleted.
    pub fn forget_device(&mut self, device: Device) {
        self.links.remove(&device);
        self.localnets.remove(&device);
        self.fast.forget_device(device);
        let (first, last) = ((device, Mac([0; 6])), (device, Mac([u8::MAX; 6])));
        let ports: Vec<_> = self.ports.range(first..=last).copied().collect();
        for port in ports {
            self.ports.remove(&port);
        }
        self.routes.retain(|_, hop| hop.device != Some(device));
        let (first, last) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::from_bits(u128::MAX).into());
        let neighbours: Vec<_> =
            self.neighbours.range((device, first)..=(device, last)).map(|(key, _)| *key).collect();
        for neighbour in neighbours {
            self.neighbours.remove(&neighbour);
        }
        if let Some(Role::Endpoint(_)) = device.role() {
            // Only bridges and VXLAN devices have more, and theirs may be thousands.
            return;
        }
        self.addresses.retain(|(on, _)| *on != device);
        self.remotes.retain(|(on, _), _| *on != device);
        self.floods.retain(|(on, _)| *on != device);
        self.groups.retain(|(on, _, _)| *on != device);
        self.tunnels.remove(&device);
        self.tunnel_peers.retain(|(on, _), _| *on != device);
        self.sources.retain(|(on, _), _| *on != device);
        for link in self.links.values_mut() {
            match link {
                Link::Vxlan { master, .. } | Link::Tap { master, .. } | Link::Endpoint { master, .. }
                    if *master == Some(device) =>
                {
                    *master = None;
                }
                Link::Bridge { .. }
                | Link::Vxlan { .. }
                | Link::Tap { .. }
                | Link::Tunnel { .. }
                | Link::Endpoint { .. } => {}
            }
        }
    }
}
