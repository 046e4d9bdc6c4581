//! Parses the link and neighbour messages of rtnetlink: dumps, replies and notifications.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use nix::libc;
use ovl_dataplane::device::{ALIAS, Device, Role};
use ovl_dataplane::op::PORT_GROUPS;
use ovl_dataplane::state::{Link, TunnelKind};
use ovl_proto::id::Mac;

use super::attribute::{attributes, ip, text, u8_at, u16_at, u16_be, u32_at};
use super::message::{MOST_GROUPS, QUERY_RESPONSE_INTERVAL};

/// The length of `ifinfomsg`.
const HEADER: usize = 16;
// Attributes of `linux/if_link.h` and `linux/if_bridge.h`, which `libc` does not define.
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BR_MCAST_ROUTER: u16 = 22;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BR_MCAST_QUERIER: u16 = 25;
const IFLA_BR_MCAST_HASH_MAX: u16 = 27;
const IFLA_BR_MCAST_QUERY_RESPONSE_INTVL: u16 = 34;
const IFLA_BR_NF_CALL_IPTABLES: u16 = 36;
const IFLA_BR_NF_CALL_ARPTABLES: u16 = 38;
const IFLA_BR_MCAST_IGMP_VERSION: u16 = 43;
const IFLA_BR_MCAST_MLD_VERSION: u16 = 44;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_MULTICAST_ROUTER: u16 = 25;
const IFLA_BRPORT_NEIGH_SUPPRESS: u16 = 32;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_BRPORT_MCAST_MAX_GROUPS: u16 = 42;
/// The value of `IFLA_BR_MCAST_ROUTER` and `IFLA_BRPORT_MULTICAST_ROUTER` with which all multicast goes there.
const MULTICAST_ROUTER: u8 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_UDP_ZERO_CSUM6_TX: u16 = 19;
const IFLA_VXLAN_UDP_ZERO_CSUM6_RX: u16 = 20;
const IFLA_VXLAN_COLLECT_METADATA: u16 = 25;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_CONF: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// The families of nested attributes, which are attribute types there.
const AF_INET: u16 = libc::AF_INET as u16;
const AF_INET6: u16 = libc::AF_INET6 as u16;

/// The link group of doomed devices: host interfaces of removed endpoints that are still to be deleted
/// ("ovld"). Groups with the same upper half are of devices that are being deleted.
pub(super) const DOOMED: u32 = 0x6f76_6c64;

/// What passed a host interface of an endpoint since it was created, as the workload sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that the endpoint sent.
    pub sent_bytes: u64,
    /// Packets that the endpoint sent.
    pub sent_packets: u64,
    /// Bytes that the endpoint received.
    pub received_bytes: u64,
    /// Packets that the endpoint received.
    pub received_packets: u64,
    /// Packets in either direction that the device dropped.
    pub dropped_packets: u64,
}

/// Parses the statistics of a host interface, `struct rtnl_link_stats64` of `linux/if_link.h`. What the host receives, the
/// endpoint has sent.
pub(super) fn traffic(payload: &[u8]) -> Option<Traffic> {
    let (_, stats) = attributes(payload, HEADER).find(|(kind, _)| *kind == libc::IFLA_STATS64)?;
    let at = |n: usize| stats.get(n * 8..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
    Some(Traffic {
        sent_packets: at(0)?,
        received_packets: at(1)?,
        sent_bytes: at(2)?,
        received_bytes: at(3)?,
        dropped_packets: at(6)?.saturating_add(at(7)?),
    })
}

/// The needed fields of a link message. A field that the message does not contain is zero or empty.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkView<'a> {
    pub(super) index: u32,
    /// Whether the message (`AF_BRIDGE`) describes the device as a port of its bridge. It contains little else.
    pub(super) is_port_message: bool,
    pub(super) up: bool,
    loopback: bool,
    pub(super) name: &'a str,
    pub(super) alias: &'a str,
    pub(super) mtu: u32,
    pub(super) master: Option<u32>,
    pub(super) group: u32,
    /// The index of the peer interface of a veth pair.
    pub(super) peer: Option<u32>,
    /// The id of the peer interface's namespace, in the namespace of the socket.
    pub(super) peer_netns: Option<i32>,
    pub(super) mac: Option<Mac>,
    kind: &'a str,
    data: &'a [u8],
    /// The bridge port attributes (`IFLA_INFO_SLAVE_DATA`, or `IFLA_PROTINFO` in a port message).
    port: Option<&'a [u8]>,
    /// The generation mode of IPv6 link-local addresses; `None` if IPv6 is off.
    address_mode: Option<u8>,
    /// Whether the host heeds router advertisements or redirects that arrive by the device.
    trusting: bool,
    /// The `route_localnet` setting: packets from 127.0.0.1 may be routed through the device.
    pub(super) localnet: bool,
    /// The root queueing discipline.
    pub(super) qdisc: &'a str,
}

impl<'a> LinkView<'a> {
    /// Parses the payload of RTM_NEWLINK or RTM_DELLINK.
    pub(super) fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut view = Self {
            index: u32_at(payload, 4)?,
            is_port_message: i32::from(u8_at(payload, 0)?) == libc::AF_BRIDGE,
            up: u32_at(payload, 8)? & libc::IFF_UP as u32 != 0,
            loopback: u32_at(payload, 8)? & libc::IFF_LOOPBACK as u32 != 0,
            name: "",
            alias: "",
            mtu: 0,
            master: None,
            group: 0,
            peer: None,
            peer_netns: None,
            mac: None,
            kind: "",
            data: &[],
            port: None,
            address_mode: None,
            trusting: false,
            localnet: false,
            qdisc: "",
        };
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                libc::IFLA_ADDRESS => view.mac = value.try_into().ok().map(Mac),
                libc::IFLA_IFNAME => view.name = text(value),
                libc::IFLA_MTU => view.mtu = u32_at(value, 0)?,
                libc::IFLA_LINK => view.peer = u32_at(value, 0),
                libc::IFLA_MASTER => view.master = u32_at(value, 0),
                libc::IFLA_PROTINFO if view.is_port_message => view.port = Some(value),
                libc::IFLA_LINKINFO => view.parse_info(value),
                libc::IFLA_IFALIAS => view.alias = text(value),
                libc::IFLA_AF_SPEC if !view.is_port_message => {
                    view.address_mode = address_mode(value);
                    view.trusting = trusting(value);
                    view.localnet = localnet(value);
                }
                libc::IFLA_QDISC => view.qdisc = text(value),
                libc::IFLA_GROUP => view.group = u32_at(value, 0)?,
                libc::IFLA_LINK_NETNSID => view.peer_netns = u32_at(value, 0).map(|id| id as i32),
                _ => {}
            }
        }
        Some(view)
    }

    fn parse_info(&mut self, info: &'a [u8]) {
        for (kind, value) in attributes(info, 0) {
            match kind {
                libc::IFLA_INFO_KIND => self.kind = text(value),
                libc::IFLA_INFO_DATA => self.data = value,
                libc::IFLA_INFO_SLAVE_DATA => self.port = Some(value),
                _ => {}
            }
        }
    }

    /// Whether the device only holds addresses: packets to other hosts leave by another one.
    pub(super) fn only_holds_addresses(&self) -> bool {
        self.loopback || self.kind == "dummy"
    }

    /// Whether it is one of the two interfaces of a veth pair.
    pub(super) fn is_veth(&self) -> bool {
        self.kind == "veth"
    }

    /// The name of the device, which need not be a device of ovl.
    pub(super) fn device(&self) -> Option<Device> {
        Device::new(self.name)
    }

    /// The device, if ovl owns it: it has a name and an alias of ovl, and the matching link kind. `None` for a
    /// doomed device.
    pub(super) fn ours(&self) -> Option<Device> {
        self.created_by_ovl().filter(|_| !self.is_in_doomed_group())
    }

    /// Whether it is the host interface of a removed endpoint, still to be deleted.
    pub(super) fn is_doomed(&self) -> bool {
        self.is_in_doomed_group() && self.created_by_ovl().is_some()
    }

    fn is_in_doomed_group(&self) -> bool {
        self.group >> 16 == DOOMED >> 16
    }

    fn created_by_ovl(&self) -> Option<Device> {
        let device = self.device()?;
        let kinds: &[&str] = match device.role()? {
            Role::Bridge(_) => &["bridge"],
            Role::Vxlan(_) => &["vxlan", "tun"],
            Role::Endpoint(_) => &["veth"],
            Role::Tunnel(_) => &["wireguard", "tun"],
        };
        (kinds.contains(&self.kind) && self.alias.starts_with(ALIAS)).then_some(device)
    }

    /// The link as part of the data plane. `None` if ovl does not own the device.
    pub(super) fn model(&self, names: &HashMap<u32, Device>) -> Option<Link> {
        let mtu = self.mtu.try_into().unwrap_or(u16::MAX);
        let up = self.up;
        // A master without a known name is not a device of ovl. Which one it is makes no difference.
        let unknown = Device::new("?");
        let master = self.master.and_then(|index| names.get(&index).copied().or(unknown));
        let quiet = self.address_mode.is_none_or(|mode| mode == IN6_ADDR_GEN_MODE_NONE) && !self.trusting;
        let data = || attributes(self.data, 0);
        Some(match self.created_by_ovl()?.role()? {
            Role::Bridge(_) => {
                Link::Bridge { mac: self.mac?, mtu, up, tuned: quiet && data().all(is_bridge_tuned) }
            }
            Role::Vxlan(_) if self.kind == "tun" => {
                let tuned = quiet && (master.is_none() || self.port_is_tuned(true) == Some(true));
                // Only the tunnel engine knows the VNI.
                Link::Tap { vni: 0, mtu, master, up, tuned }
            }
            Role::Tunnel(_) => {
                let kind = if self.kind == "tun" { TunnelKind::Userspace } else { TunnelKind::Kernel };
                Link::Tunnel { kind, mtu, up }
            }
            Role::Vxlan(_) => {
                let mut learning = false;
                let (mut vni, mut port) = (0, 0);
                let (mut bare_out, mut bare_in) = (false, false);
                let mut local = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
                for (kind, value) in data() {
                    match kind {
                        IFLA_VXLAN_ID => vni = u32_at(value, 0)?,
                        IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => local = ip(value)?,
                        IFLA_VXLAN_LEARNING => learning = u8_at(value, 0)? != 0,
                        IFLA_VXLAN_PORT => port = u16_be(value)?,
                        IFLA_VXLAN_UDP_ZERO_CSUM6_TX => bare_out = u8_at(value, 0)? != 0,
                        IFLA_VXLAN_UDP_ZERO_CSUM6_RX => bare_in = u8_at(value, 0)? != 0,
                        _ => {}
                    }
                }
                let sealed = bare_out && bare_in;
                let port_tuned = master.is_none() || self.port_is_tuned(true) == Some(true);
                let tuned = quiet && !learning && port_tuned;
                Link::Vxlan { vni, local, port, mtu, master, mac: self.mac?, up, tuned, sealed }
            }
            Role::Endpoint(_) => {
                let tuned = quiet && self.port_is_tuned(false) == Some(true);
                let hairpin = self.port_flag(IFLA_BRPORT_MODE).is_some_and(|mode| mode != 0);
                Link::Endpoint { mtu, master, up, tuned, hairpin }
            }
        })
    }

    /// Whether the bridge port has the settings of ovl. `None` if the device is not a port, or the message does not
    /// contain them.
    pub(super) fn port_is_tuned(&self, is_vxlan: bool) -> Option<bool> {
        let learning = self.port_flag(IFLA_BRPORT_LEARNING)?;
        let suppress = self.port_flag(IFLA_BRPORT_NEIGH_SUPPRESS)?;
        // A kernel without snooping has no such settings.
        let router = self.port_flag(IFLA_BRPORT_MULTICAST_ROUTER).unwrap_or(MULTICAST_ROUTER);
        let isolated = self.port_flag(IFLA_BRPORT_ISOLATED).is_none_or(|isolated| isolated == 1);
        let of_kind = if is_vxlan {
            suppress == 0 && isolated
        } else {
            self.most_groups().is_none_or(|most| most == PORT_GROUPS)
        };
        Some(learning == 0 && router == MULTICAST_ROUTER && of_kind)
    }

    /// The number of groups that the kernel follows at the port. `None` for a kernel without such a limit.
    fn most_groups(&self) -> Option<u32> {
        let (_, value) = attributes(self.port?, 0).find(|(kind, _)| *kind == IFLA_BRPORT_MCAST_MAX_GROUPS)?;
        u32_at(value, 0)
    }

    /// A setting of the bridge port, by its `IFLA_BRPORT_...` number. `None` if the device is not a port, or the
    /// message does not contain the setting.
    fn port_flag(&self, wanted: u16) -> Option<u8> {
        let (_, value) = attributes(self.port?, 0).find(|(kind, _)| *kind == wanted)?;
        u8_at(value, 0)
    }

    /// The VNI and UDP port of any VXLAN device. The VNI is `None` if the device accepts all VNIs. `None` if it is
    /// not a VXLAN device.
    pub(super) fn vxlan(&self) -> Option<(Option<u32>, u16)> {
        if self.kind != "vxlan" {
            return None;
        }
        let find =
            |wanted| attributes(self.data, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let accepts_all =
            find(IFLA_VXLAN_COLLECT_METADATA).and_then(|value| u8_at(value, 0)).is_some_and(|flag| flag != 0);
        let vni = find(IFLA_VXLAN_ID).and_then(|value| u32_at(value, 0));
        Some((vni.filter(|_| !accepts_all), find(IFLA_VXLAN_PORT).and_then(u16_be)?))
    }
}

/// Whether a bridge attribute has the value that ovl sets: see [`super::message::bridge_info`].
fn is_bridge_tuned((kind, value): (u16, &[u8])) -> bool {
    match kind {
        IFLA_BR_STP_STATE => u32_at(value, 0) == Some(0),
        IFLA_BR_NF_CALL_IPTABLES..=IFLA_BR_NF_CALL_ARPTABLES => u8_at(value, 0) == Some(0),
        IFLA_BR_MCAST_SNOOPING | IFLA_BR_MCAST_QUERIER => u8_at(value, 0) == Some(1),
        IFLA_BR_MCAST_ROUTER => u8_at(value, 0) == Some(MULTICAST_ROUTER),
        IFLA_BR_MCAST_IGMP_VERSION => u8_at(value, 0) == Some(3),
        IFLA_BR_MCAST_MLD_VERSION => u8_at(value, 0) == Some(2),
        IFLA_BR_MCAST_QUERY_RESPONSE_INTVL => value == u64::from(QUERY_RESPONSE_INTERVAL).to_ne_bytes(),
        IFLA_BR_MCAST_HASH_MAX => u32_at(value, 0) == Some(MOST_GROUPS),
        _ => true,
    }
}

fn address_mode(families: &[u8]) -> Option<u8> {
    u8_at(inet6(families, IFLA_INET6_ADDR_GEN_MODE)?, 0)
}

/// Whether the host heeds router advertisements or redirects that arrive by a device. The IPv6 settings of a device are
/// an array in the order of `DEVCONF_*` (`linux/ipv6.h`).
fn trusting(families: &[u8]) -> bool {
    const ACCEPT_RA: usize = 3;
    const ACCEPT_REDIRECTS: usize = 4;
    const DISABLE_IPV6: usize = 26;
    let settings = inet6(families, IFLA_INET6_CONF);
    let is_set = |at: usize| settings.and_then(|all| u32_at(all, at * 4)).is_some_and(|value| value != 0);
    !is_set(DISABLE_IPV6) && (is_set(ACCEPT_RA) || is_set(ACCEPT_REDIRECTS))
}

fn inet6(families: &[u8], wanted: u16) -> Option<&[u8]> {
    let (_, inet6) = attributes(families, 0).find(|(family, _)| *family == AF_INET6)?;
    attributes(inet6, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Reads `route_localnet` from the IPv4 settings of a device. They are an array in the order of `IPV4_DEVCONF_*`, of
/// which it is the 26th.
fn localnet(families: &[u8]) -> bool {
    const AT: usize = 25 * 4;
    let settings = attributes(families, 0)
        .find(|(family, _)| *family == AF_INET)
        .and_then(|(_, inet)| attributes(inet, 0).find(|(kind, _)| *kind == IFLA_INET_CONF));
    settings.and_then(|(_, values)| u32_at(values, AT)).is_some_and(|value| value != 0)
}

/// A neighbour message: an FDB entry or a neighbour.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neighbour {
    pub(super) family: u8,
    pub(super) index: u32,
    pub(super) state: u16,
    pub(super) flags: u8,
    pub(super) address: Option<IpAddr>,
    pub(super) mac: Option<Mac>,
    pub(super) port: Option<u16>,
    pub(super) vlan: Option<u16>,
    /// Whether it has an attribute that ovl never sets: a VNI, an output interface or a next hop of its own.
    pub(super) odd: bool,
}

impl Neighbour {
    /// Parses the payload of RTM_NEWNEIGH or RTM_DELNEIGH.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
        /// Not defined by `libc`.
        const NDA_NH_ID: u16 = 13;
        let mut entry = Self {
            family: u8_at(payload, 0)?,
            index: u32_at(payload, 4)?,
            state: u16_at(payload, 8)?,
            flags: u8_at(payload, 10)?,
            address: None,
            mac: None,
            port: None,
            vlan: None,
            odd: false,
        };
        for (kind, value) in attributes(payload, 12) {
            match kind {
                libc::NDA_DST => entry.address = ip(value),
                libc::NDA_LLADDR => entry.mac = value.try_into().ok().map(Mac),
                libc::NDA_VLAN => entry.vlan = u16_at(value, 0),
                libc::NDA_PORT => entry.port = u16_be(value),
                libc::NDA_VNI | libc::NDA_IFINDEX | NDA_NH_ID => entry.odd = true,
                _ => {}
            }
        }
        Some(entry)
    }
}
