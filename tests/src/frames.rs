//! Ethernet frames made by hand, and a socket that sends them as they are.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::Netns;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// A MAC address.
pub type Bytes = [u8; 6];

/// The broadcast address.
pub const EVERYONE: Bytes = [0xff; 6];
/// All nodes, `ff02::1`, as an Ethernet address.
const ALL_NODES: Bytes = [0x33, 0x33, 0, 0, 0, 1];
/// Number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// Number of TCP.
const TCP: u8 = 6;
/// Number of UDP.
const UDP: u8 = 17;

pub use crate::inject::mac_bytes as mac;

/// The link-local address that is derived from a MAC address.
pub fn link_local([a, b, c, d, e, f]: Bytes) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// A frame.
pub fn ethernet(to: Bytes, from: Bytes, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// Puts VLAN tags (802.1Q) of VLAN 0 into a frame.
pub fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 0].repeat(tags), &frame[12..]].concat()
}

/// A broadcast ARP message; `operation` is 1 for a request and 2 for a reply.
pub fn arp(from: Bytes, operation: u8, sender: (Bytes, Ipv4Addr), target: Ipv4Addr, text: &str) -> Vec<u8> {
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, operation];
    message.extend(sender.0);
    message.extend(sender.1.octets());
    message.extend([0; 6]);
    message.extend(target.octets());
    message.extend(text.as_bytes());
    ethernet(EVERYONE, from, 0x0806, &message)
}

/// A UDP datagram, without a checksum.
fn udp(ports: (u16, u16), text: &str) -> Vec<u8> {
    let length = u16::try_from(8 + text.len()).unwrap().to_be_bytes();
    [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &length, &[0, 0], text.as_bytes()].concat()
}

/// A broadcast frame with a UDP datagram over IPv4, or to all nodes over IPv6.
pub fn datagram(from: Bytes, source: IpAddr, ports: (u16, u16), text: &str) -> Vec<u8> {
    match source {
        IpAddr::V4(source) => ipv4((EVERYONE, from), (source, Ipv4Addr::BROADCAST), ports, text),
        IpAddr::V6(source) => ipv6(from, source, UDP, &udp(ports, text)),
    }
}

/// A frame with a UDP datagram over IPv4. The MAC addresses are in the order of the frame, destination first; the IP
/// addresses and ports have the source first.
pub fn ipv4(
    (to, from): (Bytes, Bytes),
    (source, destination): (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    text: &str,
) -> Vec<u8> {
    packet4((to, from), (source, destination), UDP, &udp(ports, text))
}

/// A frame with a TCP segment over IPv4 that opens a connection, with the arguments of [`ipv4`].
pub fn syn(
    (to, from): (Bytes, Bytes),
    (source, destination): (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
) -> Vec<u8> {
    let mut segment = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&source.octets()[..], &destination.octets(), &[0, TCP, 0, 20]].concat();
    let sum = checksum(&[&pseudo[..], &segment].concat());
    segment[16..18].copy_from_slice(&sum);
    packet4((to, from), (source, destination), TCP, &segment)
}

/// A frame with an IPv4 packet.
fn packet4(
    (to, from): (Bytes, Bytes),
    (source, destination): (Ipv4Addr, Ipv4Addr),
    protocol: u8,
    body: &[u8],
) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(u16::try_from(20 + body.len()).unwrap().to_be_bytes());
    header.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    ethernet(to, from, 0x0800, &[&header[..], body].concat())
}

/// The checksum of bytes of an even number (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!sum as u16).to_be_bytes()
}

/// A frame with an IPv6 packet to all nodes, with a hop limit of 255.
pub fn ipv6(from: Bytes, source: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.octets());
    packet.extend(Ipv6Addr::from_bits(0xff02 << 112 | 1).octets());
    packet.extend(payload);
    ethernet(ALL_NODES, from, 0x86dd, &packet)
}

/// A neighbour discovery message (RFC 4861) of this type with a target and an unknown option that holds a text.
pub fn discovery(kind: u8, target: Ipv6Addr, text: &str) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x60, 0, 0, 0];
    message.extend(target.octets());
    option(&mut message, text);
    message
}

/// An unsolicited neighbour advertisement (RFC 4861, section 7.2.6) of an address and the MAC address behind it, with a
/// valid checksum for a packet from the address to all nodes.
pub fn unsolicited_advertisement(address: Ipv6Addr, at: Bytes) -> Vec<u8> {
    // The override flag: it replaces existing entries.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(at);
    let all_nodes = Ipv6Addr::from_bits(0xff02 << 112 | 1).octets();
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let pseudo = [&address.octets()[..], &all_nodes, &length, &[0, ICMPV6]].concat();
    let sum = checksum(&[&pseudo[..], &message].concat());
    message[2..4].copy_from_slice(&sum);
    message
}

/// A router advertisement (RFC 4861, section 4.2) with an unknown option that holds a text.
pub fn advertisement(text: &str) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    option(&mut message, text);
    message
}

fn option(message: &mut Vec<u8>, text: &str) {
    let length = (2 + text.len()).next_multiple_of(8);
    message.extend([253, u8::try_from(length / 8).unwrap()]);
    message.extend(text.as_bytes());
    message.resize(message.len() + length - 2 - text.len(), 0);
}

/// A socket that receives the ARP replies for one address on one interface of a namespace.
#[derive(Debug)]
pub struct ArpReplies {
    fd: OwnedFd,
    address: Ipv4Addr,
}

impl ArpReplies {
    /// Opens the socket.
    pub fn listen(at: &Netns, address: Ipv4Addr) -> Result<Self> {
        let fd = at.run(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })??;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
        Ok(Self { fd, address })
    }

    /// Waits for a reply, and returns the MAC address in it. `None` if there is none within a time.
    pub fn wait(&self, time: Duration) -> Option<Bytes> {
        let end = Instant::now() + time;
        let mut frame = [0; 2048];
        while Instant::now() < end {
            let Ok(length) = recv(self.fd.as_raw_fd(), &mut frame, MsgFlags::empty()) else { continue };
            let reply = frame.get(..length)?;
            let is_reply = reply.get(12..22) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
            if is_reply && reply.get(28..32) == Some(&self.address.octets()) {
                return reply.get(22..28).and_then(|mac| mac.try_into().ok());
            }
        }
        None
    }
}

/// A socket that sends frames by one interface of a namespace.
#[derive(Debug)]
pub struct FrameSocket {
    fd: OwnedFd,
    index: i32,
}

impl FrameSocket {
    /// Opens the socket.
    pub fn open(at: &Netns, ifname: &str) -> Result<Self> {
        let links = at.ip_json(&["link", "show", "dev", ifname])?;
        let index = links[0]["ifindex"].as_i64().context("no index")?;
        let fd = at.run(|| socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None))??;
        Ok(Self { fd, index: i32::try_from(index)? })
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: all zeros are a valid value of this plain structure.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET)?;
        to.sll_ifindex = self.index;
        // SAFETY: the pointers are valid for these lengths.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                u32::try_from(size_of::<libc::sockaddr_ll>())?,
            )
        };
        ensure!(sent >= 0, "{}", std::io::Error::last_os_error());
        Ok(())
    }
}
