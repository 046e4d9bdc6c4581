//! Devices, as the kernel describes them in dumps, answers and notifications.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ovl_dataplane::device::{ALIAS, Device, Role};
use ovl_dataplane::state::{Link, TunnelKind};
use ovl_proto::id::Mac;

use super::attribute::{attributes, ip, text, u8_at, u16_at, u16_be, u32_at};

const HEADER: usize = 16;
const IFF_UP: u32 = 1;
const AF_BRIDGE: u8 = 7;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// The group of the host's ends of endpoints that are gone and still to be deleted; "ovld". Groups with
/// the same upper half are for those that are being deleted.
pub(super) const DOOMED: u32 = 0x6f76_6c64;

/// What is needed of a device's description. What the message does not have is zero or empty.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkView<'a> {
    pub(super) index: u32,
    /// The message is about the device as a port of its bridge, and says little else.
    pub(super) is_port_message: bool,
    pub(super) up: bool,
    pub(super) name: &'a str,
    pub(super) alias: &'a str,
    pub(super) mtu: u32,
    pub(super) master: Option<u32>,
    pub(super) group: u32,
    /// Of a pair: the other end's index, and its namespace as seen from here.
    pub(super) peer: Option<u32>,
    pub(super) peer_netns: Option<i32>,
    pub(super) mac: Option<Mac>,
    kind: &'a str,
    data: &'a [u8],
    /// How it behaves as a port; in a port message the same under another name.
    port: Option<&'a [u8]>,
    /// How the kernel makes link-local addresses on it; none where IPv6 is off.
    address_mode: Option<u8>,
    /// Packets from 127.0.0.1 may leave by it.
    pub(super) localnet: bool,
}

impl<'a> LinkView<'a> {
    /// Of the payload of RTM_NEWLINK or RTM_DELLINK.
    pub(super) fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut view = Self {
            index: u32_at(payload, 4)?,
            is_port_message: u8_at(payload, 0)? == AF_BRIDGE,
            up: u32_at(payload, 8)? & IFF_UP != 0,
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
            localnet: false,
        };
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                1 => view.mac = value.try_into().ok().map(Mac),
                3 => view.name = text(value),
                4 => view.mtu = u32_at(value, 0)?,
                5 => view.peer = u32_at(value, 0),
                10 => view.master = u32_at(value, 0),
                12 if view.is_port_message => view.port = Some(value),
                18 => view.parse_info(value),
                20 => view.alias = text(value),
                26 if !view.is_port_message => {
                    view.address_mode = address_mode(value);
                    view.localnet = localnet(value);
                }
                27 => view.group = u32_at(value, 0)?,
                37 => view.peer_netns = u32_at(value, 0).map(|id| id as i32),
                _ => {}
            }
        }
        Some(view)
    }

    fn parse_info(&mut self, info: &'a [u8]) {
        for (kind, value) in attributes(info, 0) {
            match kind {
                1 => self.kind = text(value),
                2 => self.data = value,
                5 => self.port = Some(value),
                _ => {}
            }
        }
    }

    /// The name as ours, whether the device is or not.
    pub(super) fn device(&self) -> Option<Device> {
        Device::new(self.name)
    }

    /// The device, if it is ours: one of our names, our alias, and the kind that goes with them. One
    /// that is about to be deleted is not.
    pub(super) fn ours(&self) -> Option<Device> {
        self.made_by_us().filter(|_| !self.in_doomed_group())
    }

    /// Whether it is what is left of an endpoint that is gone.
    pub(super) fn is_doomed(&self) -> bool {
        self.in_doomed_group() && self.made_by_us().is_some()
    }

    fn in_doomed_group(&self) -> bool {
        self.group >> 16 == DOOMED >> 16
    }

    fn made_by_us(&self) -> Option<Device> {
        let device = self.device()?;
        let kinds: &[&str] = match device.role()? {
            Role::Bridge(_) => &["bridge"],
            Role::Vxlan(_) => &["vxlan", "tun"],
            Role::Endpoint(_) => &["veth"],
            Role::Tunnel(_) => &["wireguard", "tun"],
        };
        (kinds.contains(&self.kind) && self.alias.starts_with(ALIAS)).then_some(device)
    }

    /// A device of ours in the model's terms.
    pub(super) fn model(&self, names: &HashMap<u32, Device>) -> Option<Link> {
        let mtu = self.mtu.try_into().unwrap_or(u16::MAX);
        let up = self.up;
        // A master whose name is not known is some other's, which is all that matters.
        let unknown = Device::new("?");
        let master = self.master.and_then(|index| names.get(&index).copied().or(unknown));
        let quiet = self.address_mode.is_none_or(|mode| mode == 1);
        let data = || attributes(self.data, 0);
        Some(match self.made_by_us()?.role()? {
            Role::Bridge(_) => {
                Link::Bridge { mac: self.mac?, mtu, up, tuned: quiet && data().all(is_bridge_tuned) }
            }
            Role::Vxlan(_) if self.kind == "tun" => {
                let tuned = quiet && (master.is_none() || self.port_is_tuned(true) == Some(true));
                // Whoever serves it knows the network.
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
                        1 => vni = u32_at(value, 0)?,
                        4 | 17 => local = ip(value)?,
                        7 => learning = u8_at(value, 0)? != 0,
                        15 => port = u16_be(value)?,
                        19 => bare_out = u8_at(value, 0)? != 0,
                        20 => bare_in = u8_at(value, 0)? != 0,
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
                let hairpin = self.port_flag(4).is_some_and(|mode| mode != 0);
                Link::Endpoint { mtu, master, up, tuned, hairpin }
            }
        })
    }

    /// Whether it behaves as a port should; none if it is no port, or the message does not say.
    pub(super) fn port_is_tuned(&self, is_vxlan: bool) -> Option<bool> {
        let (learning, suppress) = (self.port_flag(8)?, self.port_flag(32)?);
        Some(learning == 0 && (suppress != 0 || !is_vxlan))
    }

    /// One of a port's settings, by its number; none if it is no port, or the message does not say.
    fn port_flag(&self, wanted: u16) -> Option<u8> {
        let (_, value) = attributes(self.port?, 0).find(|(kind, _)| *kind == wanted)?;
        u8_at(value, 0)
    }

    /// A VXLAN device's VNI and port, whoever it belongs to; the VNI is none if it takes them all.
    pub(super) fn vxlan(&self) -> Option<(Option<u32>, u16)> {
        if self.kind != "vxlan" {
            return None;
        }
        let find =
            |wanted| attributes(self.data, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let takes_all = find(25).and_then(|value| u8_at(value, 0)).is_some_and(|flag| flag != 0);
        let vni = find(1).and_then(|value| u32_at(value, 0));
        Some((vni.filter(|_| !takes_all), find(15).and_then(u16_be)?))
    }
}

/// Multicast snooping, spanning tree, and the calls into iptables are off.
fn is_bridge_tuned((kind, value): (u16, &[u8])) -> bool {
    match kind {
        5 => u32_at(value, 0) == Some(0),
        23 | 36..=38 => u8_at(value, 0) == Some(0),
        _ => true,
    }
}

fn address_mode(families: &[u8]) -> Option<u8> {
    let (_, inet6) = attributes(families, 0).find(|(family, _)| *family == AF_INET6)?;
    let (_, mode) = attributes(inet6, 0).find(|(kind, _)| *kind == 8)?;
    u8_at(mode, 0)
}

/// `route_localnet`, out of all settings of IPv4: numbers in the order of `IPV4_DEVCONF_*`, of which it is the 26th.
fn localnet(families: &[u8]) -> bool {
    const AT: usize = 25 * 4;
    let settings = attributes(families, 0)
        .find(|(family, _)| *family == AF_INET)
        .and_then(|(_, inet)| attributes(inet, 0).find(|(kind, _)| *kind == 1));
    settings.and_then(|(_, values)| u32_at(values, AT)).is_some_and(|value| value != 0)
}

/// An FDB entry or a neighbour.
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
    /// A VXLAN entry with a VNI, a device or a next hop of its own.
    pub(super) odd: bool,
}

impl Neighbour {
    /// Of the payload of RTM_NEWNEIGH or RTM_DELNEIGH.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
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
                1 => entry.address = ip(value),
                2 => entry.mac = value.try_into().ok().map(Mac),
                5 => entry.vlan = u16_at(value, 0),
                6 => entry.port = u16_be(value),
                7 | 8 | 13 => entry.odd = true,
                _ => {}
            }
        }
        Some(entry)
    }
}
