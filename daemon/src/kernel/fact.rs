//! What an FDB entry, a neighbour or an address says, in the model's terms.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ovl_core::device::{Device, Role};
use ovl_core::kernel::{Kernel, Link, Remote};
use ovl_proto::id::Mac;

use super::attribute::{attributes, ip, u8_at, u32_at};
use super::link::Neighbour;

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
}

/// What stands there; none if it is something that is not for the model, such as an entry that
/// expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Remote(Remote),
    Mac(Mac),
    There,
    None,
}

/// Reads an FDB entry or a neighbour of a device of ours; nothing if the model has no place for it.
pub(super) fn of_neighbour(entry: &Neighbour, device: Device, link: Option<&Link>) -> Option<(Place, Value)> {
    let role = device.role()?;
    let fixed = entry.state & (NUD_NOARP | NUD_PERMANENT) != 0;
    if entry.family != AF_BRIDGE {
        let Role::Bridge(_) = role else { return None };
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

/// Writes into the model; gives whether that changed it.
pub(super) fn set(kernel: &mut Kernel, place: Place, value: Value) -> bool {
    match (place, value) {
        (_, Value::None) => unset(kernel, place),
        (Place::Remote(device, mac), Value::Remote(remote)) => {
            kernel.remotes.insert((device, mac), remote) != Some(remote)
        }
        (Place::Neighbour(device, address), Value::Mac(mac)) => {
            kernel.neighbours.insert((device, address), mac) != Some(mac)
        }
        (Place::Flood(device, remote), _) => kernel.floods.insert((device, remote)),
        (Place::Port(device, mac), _) => kernel.ports.insert((device, mac)),
        (Place::Address(device, net), _) => kernel.addresses.insert((device, net)),
        (Place::Remote(..) | Place::Neighbour(..), _) => false,
    }
}

/// Takes out of the model; gives whether it was there.
pub(super) fn unset(kernel: &mut Kernel, place: Place) -> bool {
    match place {
        Place::Remote(device, mac) => kernel.remotes.remove(&(device, mac)).is_some(),
        Place::Flood(device, remote) => kernel.floods.remove(&(device, remote)),
        Place::Port(device, mac) => kernel.ports.remove(&(device, mac)),
        Place::Neighbour(device, address) => kernel.neighbours.remove(&(device, address)).is_some(),
        Place::Address(device, net) => kernel.addresses.remove(&(device, net)),
    }
}
