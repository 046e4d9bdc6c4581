//! Packets that nobody should send: VXLAN made by hand, and packets with the address of another host.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Netns, uninterrupted};
use nix::libc;

use crate::Attached;

/// UDP port of [`listener`].
pub const PORT: u16 = 5000;

/// Opens a UDP socket that sends from an address that its host does not have.
pub fn spoofing_socket(at: &Netns, source: IpAddr) -> UdpSocket {
    at.run(|| -> Result<UdpSocket> {
        let (level, option) = match source {
            IpAddr::V4(_) => (libc::SOL_IP, libc::IP_TRANSPARENT),
            IpAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
        };
        let domain = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // SAFETY: the arguments are plain numbers, and the returned descriptor is owned here.
        let fd = unsafe { libc::socket(domain, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        ensure!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: as above.
        let socket = unsafe { <UdpSocket as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        // SAFETY: the pointer is valid for a value of this length.
        let done = unsafe {
            let length = size_of::<libc::c_int>() as libc::socklen_t;
            libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length)
        };
        ensure!(done == 0, "{}", std::io::Error::last_os_error());
        let address = SocketAddr::new(source, 0);
        let (v4, v6);
        let (pointer, length): (*const libc::sockaddr, usize) = match address {
            SocketAddr::V4(at) => {
                v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: 0,
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(at.ip().octets()) },
                    sin_zero: [0; 8],
                };
                ((&raw const v4).cast(), size_of::<libc::sockaddr_in>())
            }
            SocketAddr::V6(at) => {
                v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: 0,
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: at.ip().octets() },
                    sin6_scope_id: 0,
                };
                ((&raw const v6).cast(), size_of::<libc::sockaddr_in6>())
            }
        };
        // SAFETY: the pointer is valid for an address of this length.
        let done = unsafe { libc::bind(socket.as_raw_fd(), pointer, length as libc::socklen_t) };
        ensure!(done == 0, "{}", std::io::Error::last_os_error());
        Ok(socket)
    })
    .unwrap()
    .unwrap()
}

/// The bytes of a MAC address.
pub fn mac_bytes(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// Builds a VXLAN packet with an IPv4 datagram from one endpoint to [`PORT`] of another.
pub fn vxlan(vni: u64, from: &Attached, to: &Attached, text: &str) -> Vec<u8> {
    let mut packet = vec![8, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes()[4..].iter());
    packet.extend(mac_bytes(&to.mac()));
    packet.extend(mac_bytes(&from.mac()));
    packet.extend([8, 0]);
    let ip = |each: &Attached| each.address().parse::<std::net::Ipv4Addr>().unwrap().octets();
    let udp_length = u16::try_from(8 + text.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend((20 + udp_length).to_be_bytes());
    header.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    header.extend(ip(from));
    header.extend(ip(to));
    let sum: u32 = header.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(header);
    packet.extend(4444_u16.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend(udp_length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(text.as_bytes());
    packet
}

/// The VNI of a network.
pub fn vni_of(host: &Host, network: &str) -> u64 {
    host.ctl_json(&["network", "inspect", network]).unwrap()["vni"].as_u64().unwrap()
}

/// Binds a UDP socket to [`PORT`] in a workload. Its reads time out after `within`.
pub fn listener(at: &Attached, address: &str, within: Duration) -> UdpSocket {
    let address = SocketAddr::new(address.parse().unwrap(), PORT);
    let socket = at.workload.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(within)).unwrap();
    socket
}

/// Receives one datagram as text. `None` after the timeout.
pub fn receive(socket: &UdpSocket) -> Option<String> {
    let mut buffer = [0; 2048];
    let (length, _) = uninterrupted(|| socket.recv_from(&mut buffer)).ok()?;
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
