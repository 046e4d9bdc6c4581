//! Converts messages about FDB entries, neighbours, addresses and routes to entries of the data plane.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nix::libc::{self, NTF_SELF, NUD_NOARP, NUD_PERMANENT};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::state::{Dataplane, Hop, Link, METRIC, PROTOCOL, Remote};
use ovl_proto::id::Mac;

use super::attribute::{attributes, ip, u8_at, u32_at};
use super::link::Neighbour;

const AF_INET: u8 = libc::AF_INET as u8;
const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;

/// The key of an entry in the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKey {
    Remote(Device, Mac),
    Flood(Device, Remote),
    Group(Device, Mac, Remote),
    Port(Device, Mac),
    Neighbour(Device, IpAddr),
    Address(Device, IpNet),
    Route(IpNet),
}

/// The value of an entry in the data plane. [`Self::None`] for an entry that is not part of it, such as one that
/// expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryValue {
    Remote(Remote),
    Mac(Mac),
    Hop(Hop),
    /// The key is the whole entry.
    Present,
    None,
}

/// Converts an FDB entry or a neighbour of a device of ovl. `None` if the data plane has no such entries.
pub(super) fn of_neighbour(
    entry: &Neighbour,
    device: Device,
    link: Option<&Link>,
) -> Option<(EntryKey, EntryValue)> {
    let role = device.role()?;
    let fixed = entry.state & (NUD_NOARP | NUD_PERMANENT) != 0;
    if entry.family != AF_BRIDGE {
        // The kernel adds NOARP entries for multicast addresses. Entries of ovl are permanent.
        let value =
            entry.mac.filter(|_| entry.state == NUD_PERMANENT).map_or(EntryValue::None, EntryValue::Mac);
        return Some((EntryKey::Neighbour(device, entry.address?), value));
    }
    let mac = entry.mac?;
    if entry.flags & NTF_SELF == 0 {
        // Permanent entries are the MAC addresses of the ports themselves.
        if matches!(role, Role::Bridge(_)) || entry.vlan.is_some() || entry.state & NUD_PERMANENT != 0 {
            return None;
        }
        return Some((
            EntryKey::Port(device, mac),
            if fixed { EntryValue::Present } else { EntryValue::None },
        ));
    }
    let Role::Vxlan(_) = role else { return None };
    let own_port = match link {
        Some(Link::Vxlan { port, .. }) => *port,
        // These are the multicast addresses that the device receives. The remote entries are in the tunnel engine.
        Some(Link::Tap { .. }) => return None,
        _ => ovl_proto::DEFAULT_VXLAN_PORT,
    };
    // ovl never adds an entry with another VNI or an output interface. The unspecified VTEP differs from every
    // desired entry, so that it is replaced.
    let vtep = entry.address.filter(|_| !entry.odd).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let remote = Remote { vtep, port: entry.port.unwrap_or(own_port) };
    if mac == Mac::default() {
        return (!entry.odd).then_some((EntryKey::Flood(device, remote), EntryValue::Present));
    }
    if mac.0[0] & 1 != 0 {
        return (!entry.odd).then_some((EntryKey::Group(device, mac, remote), EntryValue::Present));
    }
    Some((EntryKey::Remote(device, mac), if fixed { EntryValue::Remote(remote) } else { EntryValue::None }))
}

/// Whether ovl owns the addresses of a device of ovl.
pub(super) fn has_addresses(device: Device) -> bool {
    matches!(device.role(), Some(Role::Bridge(_) | Role::Tunnel(_) | Role::Endpoint(_)))
}

/// Parses the prefixes to which an address message connects its device: the prefix of the address and, on a
/// point-to-point device, the address itself. Also returns the index of the device.
pub(super) fn connected(payload: &[u8]) -> Option<(u32, Vec<IpNet>)> {
    let (index, local) = address(payload)?;
    let peer = attributes(payload, 8).find(|(kind, _)| *kind == libc::IFA_ADDRESS);
    let peer = peer.and_then(|(_, value)| IpNet::new(ip(value)?, local.prefix_len()).ok());
    let all = match peer.filter(|peer| peer.addr() != local.addr()) {
        Some(peer) => vec![IpNet::from(local.addr()), peer.trunc()],
        None => vec![local.trunc()],
    };
    Some((index, all))
}

/// Parses an address message: the index of its device, and the address with its prefix length.
pub(super) fn address(payload: &[u8]) -> Option<(u32, IpNet)> {
    let (mut local, mut peer) = (None, None);
    for (kind, value) in attributes(payload, 8) {
        match kind {
            libc::IFA_ADDRESS => peer = ip(value),
            libc::IFA_LOCAL => local = ip(value),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(peer)?, u8_at(payload, 1)?).ok()?;
    Some((u32_at(payload, 4)?, net))
}

/// Whether an address is an announced address: its protocol is that of ovl.
pub(super) fn is_announced(payload: &[u8]) -> bool {
    /// Not defined by `libc`.
    const IFA_PROTO: u16 = 11;
    attributes(payload, 8).any(|(kind, value)| kind == IFA_PROTO && value == [PROTOCOL])
}

/// Parses a route message. `None` if ovl does not own the route: another protocol, table or metric.
pub(super) fn route(payload: &[u8], ours: &HashMap<u32, Device>) -> Option<(IpNet, Hop)> {
    /// Not defined by `libc`.
    const RTAX_MTU: u16 = 2;
    const MAIN: u32 = libc::RT_TABLE_MAIN as u32;
    if u8_at(payload, 5)? != PROTOCOL {
        return None;
    }
    let mut table = u32::from(u8_at(payload, 4)?);
    let (mut to, mut metric, mut device) = (None, 0, None);
    let mut hop = Hop::UNREACHABLE;
    for (kind, value) in attributes(payload, 12) {
        match kind {
            libc::RTA_DST => to = ip(value),
            libc::RTA_OIF => device = u32_at(value, 0),
            libc::RTA_GATEWAY => hop.gateway = ip(value),
            libc::RTA_PRIORITY => metric = u32_at(value, 0)?,
            libc::RTA_PREFSRC => hop.source = ip(value),
            libc::RTA_METRICS => {
                let mtu = attributes(value, 0).find(|(kind, _)| *kind == RTAX_MTU);
                let mtu = mtu.and_then(|(_, value)| u32_at(value, 0));
                hop.mtu = mtu.map(|mtu| mtu.try_into().unwrap_or(u16::MAX));
            }
            libc::RTA_TABLE => table = u32_at(value, 0)?,
            _ => {}
        }
    }
    if table != MAIN || metric != METRIC {
        return None;
    }
    let everywhere = if u8_at(payload, 0)? == AF_INET {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let to = IpNet::new(to.unwrap_or(everywhere), u8_at(payload, 1)?).ok()?;
    match u8_at(payload, 7)? {
        libc::RTN_UNICAST => hop.device = device.and_then(|index| ours.get(&index).copied()),
        libc::RTN_UNREACHABLE => hop = Hop::UNREACHABLE,
        // ovl never adds another type. An MTU of 0 differs from every desired route, so that it is replaced.
        _ => hop.mtu = Some(0),
    }
    if hop == Hop::UNREACHABLE && u8_at(payload, 7) == Some(libc::RTN_UNICAST) {
        hop.mtu = Some(0);
    }
    Some((to, hop))
}

/// Whether a route message is about a default route of another program.
pub(super) fn is_default_route(payload: &[u8]) -> bool {
    u8_at(payload, 1) == Some(0)
        && u8_at(payload, 7) == Some(libc::RTN_UNICAST)
        && u8_at(payload, 5) != Some(PROTOCOL)
}

/// Returns the gateways of a route message: one, or one for each path of a multipath route.
pub(super) fn gateways(payload: &[u8]) -> Vec<IpAddr> {
    /// The length of `struct rtnexthop`, which is followed by the attributes of its path.
    const NEXT_HOP: usize = 8;
    let mut found = Vec::new();
    for (kind, value) in attributes(payload, 12) {
        match kind {
            libc::RTA_GATEWAY | libc::RTA_VIA => found.extend(gateway(kind, value)),
            libc::RTA_MULTIPATH => {
                let mut rest = value;
                while let Some(length) = rest.first_chunk().map(|two| usize::from(u16::from_ne_bytes(*two)))
                    && let Some(path) = rest.get(..length).filter(|path| path.len() >= NEXT_HOP)
                {
                    found.extend(attributes(path, NEXT_HOP).find_map(|(kind, value)| gateway(kind, value)));
                    rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    found
}

/// Parses the gateway in an attribute of a route or of one of its paths. `None` if it is another attribute.
fn gateway(kind: u16, value: &[u8]) -> Option<IpAddr> {
    match kind {
        libc::RTA_GATEWAY => ip(value),
        // `struct rtvia`: the address family, then the address.
        libc::RTA_VIA => ip(value.get(2..)?),
        _ => None,
    }
}

/// Sets an entry of the data plane. Returns whether that changed it.
pub(super) fn set(kernel: &mut Dataplane, key: EntryKey, value: EntryValue) -> bool {
    match (key, value) {
        (_, EntryValue::None) => unset(kernel, key),
        (EntryKey::Remote(device, mac), EntryValue::Remote(remote)) => {
            kernel.remotes.insert((device, mac), remote) != Some(remote)
        }
        (EntryKey::Neighbour(device, address), EntryValue::Mac(mac)) => {
            kernel.neighbours.insert((device, address), mac) != Some(mac)
        }
        (EntryKey::Route(to), EntryValue::Hop(hop)) => kernel.routes.insert(to, hop) != Some(hop),
        (EntryKey::Flood(device, remote), _) => kernel.floods.insert((device, remote)),
        (EntryKey::Group(device, mac, remote), _) => kernel.groups.insert((device, mac, remote)),
        (EntryKey::Port(device, mac), _) => kernel.ports.insert((device, mac)),
        (EntryKey::Address(device, net), _) => kernel.addresses.insert((device, net)),
        (EntryKey::Remote(..) | EntryKey::Neighbour(..) | EntryKey::Route(_), _) => false,
    }
}

/// Deletes an entry of the data plane. Returns whether it was present.
pub(super) fn unset(kernel: &mut Dataplane, key: EntryKey) -> bool {
    match key {
        EntryKey::Remote(device, mac) => kernel.remotes.remove(&(device, mac)).is_some(),
        EntryKey::Flood(device, remote) => kernel.floods.remove(&(device, remote)),
        EntryKey::Group(device, mac, remote) => kernel.groups.remove(&(device, mac, remote)),
        EntryKey::Port(device, mac) => kernel.ports.remove(&(device, mac)),
        EntryKey::Neighbour(device, address) => kernel.neighbours.remove(&(device, address)).is_some(),
        EntryKey::Address(device, net) => kernel.addresses.remove(&(device, net)),
        EntryKey::Route(to) => kernel.routes.remove(&to).is_some(),
    }
}
