//! What an FDB entry, a neighbour or an address says, in the model's terms.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::state::{Dataplane, Hop, Link, METRIC, PROTOCOL, Remote};
use ovl_proto::id::Mac;

use super::attribute::{attributes, ip, u8_at, u32_at};
use super::link::Neighbour;

const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
const NTF_SELF: u8 = 2;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;

/// Where in the model something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Remote(Device, Mac),
    Flood(Device, Remote),
    Port(Device, Mac),
    Neighbour(Device, IpAddr),
    Address(Device, IpNet),
    Route(IpNet),
}

/// What stands there; none if it is something that is not for the model, such as an entry that
/// expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Remote(Remote),
    Mac(Mac),
    Hop(Hop),
    There,
    None,
}

/// Reads an FDB entry or a neighbour of a device of ours; nothing if the model has no place for it.
pub(super) fn of_neighbour(entry: &Neighbour, device: Device, link: Option<&Link>) -> Option<(Place, Value)> {
    let role = device.role()?;
    let fixed = entry.state & (NUD_NOARP | NUD_PERMANENT) != 0;
    if entry.family != AF_BRIDGE {
        // Multicast addresses have entries that are NOARP; ours are permanent.
        let value = entry.mac.filter(|_| entry.state == NUD_PERMANENT).map_or(Value::None, Value::Mac);
        return Some((Place::Neighbour(device, entry.address?), value));
    }
    let mac = entry.mac?;
    if entry.flags & NTF_SELF == 0 {
        // Permanent ones are the addresses of the ports themselves.
        if matches!(role, Role::Bridge(_)) || entry.vlan.is_some() || entry.state & NUD_PERMANENT != 0 {
            return None;
        }
        return Some((Place::Port(device, mac), if fixed { Value::There } else { Value::None }));
    }
    let Role::Vxlan(_) = role else { return None };
    let own_port = match link {
        Some(Link::Vxlan { port, .. }) => *port,
        // What it says of itself are multicast addresses that it listens to: where frames go, who serves it knows.
        Some(Link::Tap { .. }) => return None,
        _ => ovl_proto::DEFAULT_VXLAN_PORT,
    };
    // An entry with another VNI or a device of its own is none that we make: with this VTEP it
    // differs from all that we want, and is replaced.
    let vtep = entry.address.filter(|_| !entry.odd).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let remote = Remote { vtep, port: entry.port.unwrap_or(own_port) };
    if mac == Mac::default() {
        return (!entry.odd).then_some((Place::Flood(device, remote), Value::There));
    }
    Some((Place::Remote(device, mac), if fixed { Value::Remote(remote) } else { Value::None }))
}

/// Whether addresses on a device of ours are ours too.
pub(super) fn has_addresses(device: Device) -> bool {
    matches!(device.role(), Some(Role::Bridge(_) | Role::Tunnel(_) | Role::Endpoint(_)))
}

/// An address of any device: the device's index, and the address with its prefix.
pub(super) fn address(payload: &[u8]) -> Option<(u32, IpNet)> {
    let (mut local, mut peer) = (None, None);
    for (kind, value) in attributes(payload, 8) {
        match kind {
            1 => peer = ip(value),
            2 => local = ip(value),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(peer)?, u8_at(payload, 1)?).ok()?;
    Some((u32_at(payload, 4)?, net))
}

/// Whether an address is one that we announce for a LoadBalancer: it says who put it there.
pub(super) fn is_announced(payload: &[u8]) -> bool {
    const IFA_PROTO: u16 = 11;
    attributes(payload, 8).any(|(kind, value)| kind == IFA_PROTO && value == [PROTOCOL])
}

/// A route of ours, in the main table; nothing if it is somebody else's.
pub(super) fn route(payload: &[u8], ours: &HashMap<u32, Device>) -> Option<(IpNet, Hop)> {
    const MAIN: u32 = 254;
    const UNICAST: u8 = 1;
    const UNREACHABLE: u8 = 7;
    if u8_at(payload, 5)? != PROTOCOL {
        return None;
    }
    let mut table = u32::from(u8_at(payload, 4)?);
    let (mut to, mut metric, mut device) = (None, 0, None);
    let mut hop = Hop::UNREACHABLE;
    for (kind, value) in attributes(payload, 12) {
        match kind {
            1 => to = ip(value),
            4 => device = u32_at(value, 0),
            5 => hop.gateway = ip(value),
            6 => metric = u32_at(value, 0)?,
            7 => hop.source = ip(value),
            8 => {
                let mtu = attributes(value, 0).find(|(kind, _)| *kind == 2).and_then(|(_, v)| u32_at(v, 0));
                hop.mtu = mtu.map(|mtu| mtu.try_into().unwrap_or(u16::MAX));
            }
            15 => table = u32_at(value, 0)?,
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
        UNICAST => hop.device = device.and_then(|index| ours.get(&index).copied()),
        UNREACHABLE => hop = Hop::UNREACHABLE,
        // None that we make: it differs from all that we want, and is replaced.
        _ => hop.mtu = Some(0),
    }
    if hop == Hop::UNREACHABLE && u8_at(payload, 7) == Some(UNICAST) {
        hop.mtu = Some(0);
    }
    Some((to, hop))
}

/// Writes into the model; gives whether that changed it.
pub(super) fn set(kernel: &mut Dataplane, place: Place, value: Value) -> bool {
    match (place, value) {
        (_, Value::None) => unset(kernel, place),
        (Place::Remote(device, mac), Value::Remote(remote)) => {
            kernel.remotes.insert((device, mac), remote) != Some(remote)
        }
        (Place::Neighbour(device, address), Value::Mac(mac)) => {
            kernel.neighbours.insert((device, address), mac) != Some(mac)
        }
        (Place::Route(to), Value::Hop(hop)) => kernel.routes.insert(to, hop) != Some(hop),
        (Place::Flood(device, remote), _) => kernel.floods.insert((device, remote)),
        (Place::Port(device, mac), _) => kernel.ports.insert((device, mac)),
        (Place::Address(device, net), _) => kernel.addresses.insert((device, net)),
        (Place::Remote(..) | Place::Neighbour(..) | Place::Route(_), _) => false,
    }
}

/// Takes out of the model; gives whether it was there.
pub(super) fn unset(kernel: &mut Dataplane, place: Place) -> bool {
    match place {
        Place::Remote(device, mac) => kernel.remotes.remove(&(device, mac)).is_some(),
        Place::Flood(device, remote) => kernel.floods.remove(&(device, remote)),
        Place::Port(device, mac) => kernel.ports.remove(&(device, mac)),
        Place::Neighbour(device, address) => kernel.neighbours.remove(&(device, address)).is_some(),
        Place::Address(device, net) => kernel.addresses.remove(&(device, net)),
        Place::Route(to) => kernel.routes.remove(&to).is_some(),
    }
}
