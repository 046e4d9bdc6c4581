//! ICMP echo requests by raw sockets.

use std::io;
use std::net::IpAddr;

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

/// Opens a raw ICMP socket of a family. It must be called within a tokio runtime.
///
/// # Errors
///
/// A raw socket needs CAP_NET_RAW, and the kernel may have no IPv6.
pub(super) fn socket(domain: Domain) -> io::Result<UdpSocket> {
    let protocol = if domain == Domain::IPV4 { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_nonblocking(true)?;
    // It is a raw socket, but is read and written like a UDP socket.
    UdpSocket::from_std(socket.into())
}

/// Returns an echo request to an address, without its IP header.
///
/// # Errors
///
/// The payload is too long.
pub(super) fn request(to: IpAddr, echo: IcmpEchoHeader, payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut packet = Vec::with_capacity(8 + payload.len());
    match to {
        IpAddr::V4(_) => {
            Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), payload).write(&mut packet)?;
        }
        // The kernel computes this checksum: it needs the source address.
        IpAddr::V6(_) => Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).write(&mut packet)?,
    }
    packet.extend_from_slice(payload);
    Ok(packet)
}
