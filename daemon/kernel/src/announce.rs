//! Tells the endpoints on this host where an address is now; and the underlay, where this host has taken an address of
//! a LoadBalancer.
//!
//! Whoever asks for an address that nobody has asks again a second later; whoever knew it at another
//! MAC address goes on sending there for half a minute. So when a neighbour is set on a bridge, the
//! bridge's ports are sent an ARP announcement (RFC 5227) or an unsolicited neighbour advertisement
//! (RFC 4861, 7.2.6): a kernel takes both in for an entry that it has, and makes none for them. They
//! stay on this host: the VXLAN port suppresses what asks for neighbours, and every host sends its own.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use etherparse::PacketBuilder;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{AnnouncedOp, NeighbourOp, Op};
use ovl_proto::id::Mac;

use super::error::{KernelError, Result};
use super::link::LinkView;
use super::socket::{Batch, Route};
use super::{Outcome, message, sys};

/// Where more come at once nobody waits for one of them, and each would be a frame for every port.
const MOST: usize = 16;

const BROADCAST: [u8; 6] = [0xff; 6];
/// The MAC address of all nodes on a link, ff02::1 (RFC 2464).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Of an advertisement: it takes the place of what was known.
const OVERRIDE: [u8; 4] = [0x20, 0, 0, 0];

/// Sends announcements.
#[derive(Debug)]
pub(super) struct Announcer {
    socket: OwnedFd,
}

impl Announcer {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Without a protocol it receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(|error| KernelError::io("cannot open a packet socket", &error.into()))?;
        Ok(Self { socket })
    }

    /// Tells the underlay that this host has these addresses.
    pub(super) fn announce_at(&self, route: &mut Route, addresses: &[(Device, IpAddr)]) {
        let devices: BTreeSet<Device> = addresses.iter().map(|(device, _)| *device).collect();
        for device in devices {
            let mut batch = Batch::default();
            batch.push(message::get_link(device), 0);
            let answer = route.execute(batch).ok().and_then(|(_, mut answers)| answers.pop());
            let link = answer.as_ref().and_then(|answer| LinkView::parse(&answer.payload));
            // A device without one has no link where addresses are asked for.
            let Some((index, mac)) = link.and_then(|link| Some((link.index, link.mac?))) else { continue };
            for (_, address) in addresses.iter().filter(|(on, _)| *on == device) {
                self.tell(device, index, *address, mac);
            }
        }
    }

    /// Whom it does not reach finds out as ever, so a device that is gone again is fine.
    fn tell(&self, device: Device, index: u32, address: IpAddr, mac: Mac) {
        if let Some(frame) = frame(address, mac)
            && let Err(error) = sys::send_frame(self.socket.as_fd(), index, &frame)
        {
            tracing::debug!(%device, %address, %error, "cannot announce an address");
        }
    }

    /// Tells of the neighbours that were set, and of addresses that were taken.
    pub(super) fn announce(&self, route: &mut Route, outcomes: &[Outcome]) {
        let taken = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let taken: Vec<(Device, IpAddr)> = taken
            .filter_map(|outcome| match outcome.op {
                Op::Announced(AnnouncedOp::Add(device, address)) => Some((device, address)),
                _ => None,
            })
            .collect();
        self.announce_at(route, &taken);
        let set = outcomes.iter().filter(|outcome| outcome.result.is_ok());
        let set: Vec<(Device, IpAddr, Mac)> = set.filter_map(|outcome| on_bridge(&outcome.op)).collect();
        if set.len() > MOST {
            return;
        }
        for (bridge, address, mac) in set {
            let Ok(index) = if_nametoindex(bridge.as_str()) else { continue };
            self.tell(bridge, index, address, mac);
        }
    }
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

fn frame(address: IpAddr, mac: Mac) -> Option<Vec<u8>> {
    match address {
        IpAddr::V4(address) => {
            let mut frame = Vec::with_capacity(42);
            frame.extend(BROADCAST);
            frame.extend(mac.0);
            // ARP; Ethernet, IPv4, their lengths; a request.
            frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
            frame.extend(mac.0);
            frame.extend(address.octets());
            frame.extend([0; 6]);
            frame.extend(address.octets());
            Some(frame)
        }
        IpAddr::V6(address) => {
            let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
            let builder = PacketBuilder::ethernet2(mac.0, ALL_NODES)
                .ipv6(address.octets(), all_nodes, 255)
                .icmpv6_raw(NEIGHBOUR_ADVERTISEMENT, 0, OVERRIDE);
            // The target, and the option with its link-layer address.
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
    fn an_arp_announcement_names_the_address_as_sender_and_target() {
        let frame = frame("10.1.0.9".parse().unwrap(), MAC).unwrap();
        assert_eq!(frame.len(), 42);
        assert_eq!((&frame[..6], &frame[6..12]), (&BROADCAST[..], &MAC.0[..]));
        assert_eq!(&frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&frame[22..28], &frame[28..32]), (&MAC.0[..], &[10, 1, 0, 9][..]));
        assert_eq!(&frame[38..], [10, 1, 0, 9]);
    }

    #[test]
    fn an_advertisement_is_to_all_nodes_and_overrides() {
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
