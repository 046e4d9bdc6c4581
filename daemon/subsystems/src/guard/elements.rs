//! The elements of an endpoint in the sets of the guard tables.
//!
//! The module owns no state. Begin to read at [`of`].

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_dataplane::ledger::Entries;
use ovl_dataplane::nft::{Data, Field, Key, Set, Shape, Table, Type, Value};
use ovl_proto::id::Mac;
use ovl_proto::object::Mode;
use ovl_proto::table::Endpoint;

const fn set(table: Table, name: &'static str, key: &'static [Type]) -> Set {
    Set::new(table, name, Shape { key, data: Data::None, ranges: false })
}

const fn ranges(table: Table, name: &'static str, key: &'static [Type]) -> Set {
    Set::new(table, name, Shape { key, data: Data::None, ranges: true })
}

/// An IPv6 address of a bridged frame: its source, or the target of a neighbour advertisement. nft 1.0.6 has no name
/// for the latter, and looks up only expressions of one type in a set.
const IN_FRAME: Type = Type::Expression("@nh,64,128", 16);

/// MAC addresses that may send by a bridge port.
pub(super) static MACS: Set = set(Table::GuardFrames, "macs", &[Type::Device, Type::Mac]);
/// The MAC address of an endpoint with each of its IP addresses: one lookup decides about most frames.
pub(super) static OWN4: Set = set(Table::GuardFrames, "own4", &[Type::Device, Type::Mac, Type::Ipv4]);
/// See [`OWN4`].
pub(super) static OWN6: Set = set(Table::GuardFrames, "own6", &[Type::Device, Type::Mac, IN_FRAME]);
/// Source addresses of frames from a bridge port.
pub(super) static FRAMES4: Set = set(Table::GuardFrames, "addresses4", &[Type::Device, Type::Ipv4]);
/// See [`FRAMES4`].
pub(super) static FRAMES6: Set = set(Table::GuardFrames, "addresses6", &[Type::Device, IN_FRAME]);
/// Further source addresses that are allowed, by prefix.
pub(super) static FRAME_RANGES4: Set = ranges(Table::GuardFrames, "allowed4", &[Type::Device, Type::Ipv4]);
/// See [`FRAME_RANGES4`].
pub(super) static FRAME_RANGES6: Set = ranges(Table::GuardFrames, "allowed6", &[Type::Device, IN_FRAME]);
/// Source addresses of packets from the interface of a routed endpoint.
pub(super) static PACKETS4: Set = set(Table::Guard, "addresses4", &[Type::Device, Type::Ipv4]);
/// See [`PACKETS4`].
pub(super) static PACKETS6: Set = set(Table::Guard, "addresses6", &[Type::Device, Type::Ipv6]);

/// Further source addresses that are allowed, by prefix.
pub(super) static PACKET_RANGES4: Set = ranges(Table::Guard, "allowed4", &[Type::Device, Type::Ipv4]);
/// See [`PACKET_RANGES4`].
pub(super) static PACKET_RANGES6: Set = ranges(Table::Guard, "allowed6", &[Type::Device, Type::Ipv6]);

const fn source_of(table: Table) -> Set {
    let shape = Shape { key: &[Type::Device], data: Data::Fields(&[Type::Ipv4]), ranges: false };
    Set::new(table, "sources4", shape)
}

/// The IPv4 address of the endpoint behind a bridge port, from which it queries the resolver if it does so from 127.0.0.1.
pub(super) static FRAME_SOURCES4: Set = source_of(Table::GuardFrames);
/// The same for the interface of a routed endpoint.
pub(super) static PACKET_SOURCES4: Set = source_of(Table::Guard);

/// Returns the elements of an endpoint on a network of this mode.
pub(super) fn of(mode: Mode, endpoint: &Endpoint) -> Entries {
    let name = Device::endpoint(endpoint.id).to_string();
    let device = Field::Device(&name);
    let mut entries = Entries::new();
    let source = endpoint.addresses.iter().map(IpNet::addr).find(IpAddr::is_ipv4);
    let sources = match mode {
        Mode::L2 => &FRAME_SOURCES4,
        Mode::L3 => &PACKET_SOURCES4,
    };
    entries.extend(source.map(|at| ((sources.clone(), Key::of(&[device])), Value::of(&[Field::Ip(at)]))));
    let mut add = |set: &Set, key: &[Field<'_>]| {
        entries.insert((set.clone(), Key::of(key)), Value::None);
    };
    let addresses = endpoint.addresses.iter().map(IpNet::addr);
    match mode {
        Mode::L2 => {
            for address in addresses {
                let (own, plain) = if address.is_ipv4() { (&OWN4, &FRAMES4) } else { (&OWN6, &FRAMES6) };
                add(own, &[device, Field::Mac(endpoint.mac), Field::Ip(address)]);
                add(plain, &[device, Field::Ip(address)]);
            }
            for mac in endpoint.allowed_macs.iter().chain([&endpoint.mac]) {
                add(&MACS, &[device, Field::Mac(*mac)]);
                add(&FRAMES6, &[device, Field::Ip(link_local(*mac))]);
            }
        }
        Mode::L3 => {
            for address in addresses {
                add(if address.is_ipv4() { &PACKETS4 } else { &PACKETS6 }, &[device, Field::Ip(address)]);
            }
        }
    }
    // The kernel rejects ranges that overlap.
    for prefix in IpNet::aggregate(&endpoint.allowed) {
        let set = match (mode, prefix) {
            (Mode::L2, IpNet::V4(_)) => &FRAME_RANGES4,
            (Mode::L2, IpNet::V6(_)) => &FRAME_RANGES6,
            (Mode::L3, IpNet::V4(_)) => &PACKET_RANGES4,
            (Mode::L3, IpNet::V6(_)) => &PACKET_RANGES6,
        };
        add(set, &[device, Field::Net(prefix)]);
    }
    entries
}

/// Returns the link-local address that is derived from a MAC address (RFC 4291, appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    let mut octets = [0; 16];
    for (at, byte) in octets.iter_mut().zip([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    {
        *at = byte;
    }
    Ipv6Addr::from(octets).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_address_follows_from_the_mac_address() {
        let mac = Mac([0x02, 0x42, 0x0a, 0x01, 0x00, 0x05]);
        assert_eq!(link_local(mac), "fe80::42:aff:fe01:5".parse::<IpAddr>().unwrap());
    }
}
