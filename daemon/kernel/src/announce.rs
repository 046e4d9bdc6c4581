//! Announces the MAC address of an address: of a new neighbour to the endpoints on this host, and of an announced
//! address to the underlay.
//!
//! A kernel whose neighbour resolution failed retries a second later, and one with an old entry sends to the
//! old MAC address for half a minute. So when a neighbour is set on a bridge, its ports receive an ARP announcement
//! (RFC 5227) or an unsolicited neighbour advertisement (RFC 4861, section 7.2.6). A kernel updates an existing entry
//! by either, and adds no new entry. The frames stay on this host: the table `bridge ovl-guard` drops them at the VXLAN
//! port, and every host sends its own.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};

use etherparse::{Icmpv6Type, PacketBuilder};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{AnnouncedOp, NeighbourOp, Op};
use ovl_proto::id::Mac;

use super::error::{KernelError, Result};
use super::link::LinkView;
use super::socket::{Batch, Route};
use super::{Outcome, message, sys};

/// The maximum number of neighbours per batch that are announced. In a larger batch no workload waits for a single
/// one, and each announcement would be a frame for every port.
const MAX_ANNOUNCED: usize = 16;

const BROADCAST: [u8; 6] = [0xff; 6];
/// The MAC address of all nodes on a link, ff02::1 (RFC 2464).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES_ADDRESS: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// The override flag of a neighbour advertisement: it replaces an existing entry.
const OVERRIDE: [u8; 4] = [0x20, 0, 0, 0];

/// A packet socket that sends announcements.
#[derive(Debug)]
pub(super) struct Announcer {
    socket: OwnedFd,
}

impl Announcer {
    /// Opens the socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // A packet socket without a protocol receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(|error| KernelError::io("cannot open a packet socket", &error.into()))?;
        Ok(Self { socket })
    }

    /// Announces addresses of this host on the links of their devices.
    pub(super) fn announce_at(&self, route: &mut Route, addresses: &[(Device, IpAddr)]) {
        let devices: BTreeSet<Device> = addresses.iter().map(|(device, _)| *device).collect();
        for device in devices {
            let mut batch = Batch::default();
            batch.push(message::get_link(device), 0);
            let answer = route.execute(batch).ok().and_then(|(_, mut answers)| answers.pop());
            let link = answer.as_ref().and_then(|answer| LinkView::parse(&answer.payload));
            // A device without a MAC address has no neighbour resolution.
            let Some((index, mac)) = link.and_then(|link| Some((link.index, link.mac?))) else { continue };
            for (_, address) in addresses.iter().filter(|(on, _)| *on == device) {
                self.send(device, index, *address, mac);
            }
        }
    }

    /// Sends one announcement. A failure is only logged: neighbour resolution works without it.
    fn send(&self, device: Device, index: u32, address: IpAddr, mac: Mac) {
        if let Some(frame) = frame(address, mac)
            && let Err(error) = sys::send_frame(self.socket.as_fd(), index, 0, &frame)
        {
            tracing::debug!(%device, %address, %error, "cannot announce an address");
        }
    }

    /// Asks the endpoint behind a port of a bridge which IPv6 multicast groups it has joined. The bridge itself does not
    /// see the query, and so does not wait for the sender to ask again. A failure is only logged: members also report
    /// without a query.
    pub(super) fn ask_for_members(&self, port: u32) {
        if let Some(frame) = query()
            && let Err(error) = sys::send_frame(self.socket.as_fd(), port, 0, &frame)
        {
            tracing::debug!(port, %error, "cannot ask for the members of IPv6 groups");
        }
    }

    /// Announces the neighbours and announced addresses that operations have set.
    pub(super) fn announce(&self, route: &mut Route, outcomes: &[Outcome]) {
        let added = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let added: Vec<(Device, IpAddr)> = added
            .filter_map(|outcome| match outcome.op {
                Op::Announced(AnnouncedOp::Add(device, address)) => Some((device, address)),
                _ => None,
            })
            .collect();
        self.announce_at(route, &added);
        let set = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let set: Vec<(Device, IpAddr, Mac)> = set.filter_map(|outcome| on_bridge(&outcome.op)).collect();
        if set.len() > MAX_ANNOUNCED {
            return;
        }
        for (bridge, address, mac) in set {
            let Ok(index) = if_nametoindex(bridge.as_str()) else { continue };
            self.send(bridge, index, address, mac);
        }
    }
}

/// A general query for the members of all IPv6 groups, version 2 (RFC 3810, section 5.1). Its receivers answer within a
/// second. The source is a link-local address of no host: the receivers want it to be link-local, and answer to a group.
fn query() -> Option<Vec<u8>> {
    const SOURCE: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x08, 0, 0, 0xff, 0xfe, 0, 0, 0];
    const SOURCE_MAC: [u8; 6] = [0x0a, 0, 0, 0, 0, 0];
    const QUERY: u8 = 130;
    const ROUTER_ALERT: [u8; 6] = [5, 2, 0, 0, 1, 0];
    const RESPONSE_MS: [u8; 2] = 1_000_u16.to_be_bytes();
    /// The robustness variable, and the interval of queries in seconds.
    const TIMERS: [u8; 2] = [2, 125];
    // The maximum time of an answer, reserved bytes, no group, the timers, and no source.
    let code = [RESPONSE_MS[0], RESPONSE_MS[1], 0, 0];
    let mut body = vec![0; 16];
    body.extend(TIMERS);
    body.extend([0, 0]);
    let checksum = Icmpv6Type::Unknown { type_u8: QUERY, code_u8: 0, bytes5to8: code }
        .calc_checksum(SOURCE, ALL_NODES_ADDRESS, &body)
        .ok()?;
    let mut frame = Vec::with_capacity(14 + 40 + 8 + 28);
    frame.extend(ALL_NODES);
    frame.extend(SOURCE_MAC);
    // EtherType IPv6; version, traffic class and flow; the length, hop-by-hop options, and a hop limit of 1.
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 36, 0, 1]);
    frame.extend(SOURCE);
    frame.extend(ALL_NODES_ADDRESS);
    // The options: ICMPv6 follows, eight bytes, router alert, padding.
    frame.extend([58, 0]);
    frame.extend(ROUTER_ALERT);
    frame.extend([QUERY, 0]);
    frame.extend(checksum.to_be_bytes());
    frame.extend(code);
    frame.extend(body);
    Some(frame)
}

fn on_bridge(op: &Op) -> Option<(Device, IpAddr, Mac)> {
    match op {
        Op::Neighbour(NeighbourOp::Set(device, address, mac))
            if matches!(device.role(), Some(Role::Bridge(_))) =>
        {
            Some((*device, *address, *mac))
        }
        _ => None,
    }
}

/// Returns an ARP request to all machines of a link. An announcement has one address as both sender and target; a probe has
/// 0.0.0.0 as its sender (RFC 5227).
pub(super) fn arp_request(mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac.0);
    // EtherType ARP; hardware type Ethernet, protocol IPv4, their address lengths; operation request.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac.0);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

fn frame(address: IpAddr, mac: Mac) -> Option<Vec<u8>> {
    match address {
        IpAddr::V4(address) => Some(arp_request(mac, address, address)),
        IpAddr::V6(address) => {
            let builder = PacketBuilder::ethernet2(mac.0, ALL_NODES)
                .ipv6(address.octets(), ALL_NODES_ADDRESS, 255)
                .icmpv6_raw(NEIGHBOUR_ADVERTISEMENT, 0, OVERRIDE);
            // The target address, and the option with its link-layer address.
            let mut payload = address.octets().to_vec();
            payload.extend([2, 1]);
            payload.extend(mac.0);
            let mut frame = Vec::with_capacity(builder.size(payload.len()));
            builder.write(&mut frame, &payload).ok()?;
            Some(frame)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

    #[test]
    fn arp_announcement_has_the_address_as_sender_and_target() {
        let frame = frame("10.1.0.9".parse().unwrap(), MAC).unwrap();
        assert_eq!(frame.len(), 42);
        assert_eq!((&frame[..6], &frame[6..12]), (&BROADCAST[..], &MAC.0[..]));
        assert_eq!(&frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&frame[22..28], &frame[28..32]), (&MAC.0[..], &[10, 1, 0, 9][..]));
        assert_eq!(&frame[38..], [10, 1, 0, 9]);
    }

    #[test]
    fn query_for_members_is_one_of_mld_version_2() {
        let frame = query().unwrap();
        let packet = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
        let Some(etherparse::NetHeaders::Ipv6(ip, extensions)) = packet.net else { panic!() };
        assert_eq!((ip.hop_limit, usize::from(ip.payload_length)), (1, frame.len() - 54));
        assert!(extensions.hop_by_hop_options.is_some());
        let Some(etherparse::TransportHeader::Icmpv6(icmp)) = packet.transport else { panic!() };
        assert_eq!(icmp.icmp_type.type_u8(), 130);
        let mut sum = icmp.clone();
        sum.update_checksum(ip.source, ip.destination, &frame[frame.len() - 20..]).unwrap();
        assert_eq!(sum.checksum, icmp.checksum);
        // Version 2: 28 bytes of ICMPv6.
        assert_eq!(frame.len(), 14 + 40 + 8 + 28);
    }

    #[test]
    fn neighbour_advertisement_goes_to_all_nodes_with_the_override_flag() {
        let address: IpAddr = "fd00::9".parse().unwrap();
        let frame = frame(address, MAC).unwrap();
        let packet = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
        let Some(etherparse::TransportHeader::Icmpv6(icmp)) = packet.transport else { panic!() };
        let Some(etherparse::NetHeaders::Ipv6(ip, _)) = packet.net else { panic!() };
        assert_eq!(
            (ip.hop_limit, ip.source),
            (255, "fd00::9".parse::<std::net::Ipv6Addr>().unwrap().octets())
        );
        assert!(icmp.icmp_type.type_u8() == NEIGHBOUR_ADVERTISEMENT);
        assert_eq!(&frame[frame.len() - 8..], [2, 1, 2, 0, 0, 0, 0, 7]);
        assert_eq!(frame[58..62], OVERRIDE);
    }
}
