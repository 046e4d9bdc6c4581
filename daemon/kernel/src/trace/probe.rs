//! Sends the probe of a trace, from the namespace of a workload or from that of the host.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use etherparse::{IcmpEchoHeader, TcpHeader};
use ovl_dataplane::passage::ProbeKind;
use socket2::{Domain, Protocol, Socket, Type};

use super::inside::enter;
use crate::echo;
use crate::error::Result;
use crate::netns::Netns;

/// What a datagram and an echo request have after the cookie, for those who see it.
const TEXT: &[u8] = b" probe of ovlctl trace";
/// The port for which a source address is looked up if there is none.
const DISCARD: u16 = 9;

/// A probe that can be sent, several times.
#[derive(Debug)]
pub struct TraceProbe {
    /// The address that it is sent from.
    pub source: IpAddr,
    socket: Socket,
    to: SocketAddr,
    packet: Vec<u8>,
    /// Holds the source port, so that no connection gets the answer.
    _port: Option<Socket>,
}

impl TraceProbe {
    /// Prepares a probe, in the namespace of a workload or, without one, of this host. It blocks.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered. The inner error: there is no route to the destination, or a raw socket cannot be
    /// opened.
    pub fn open(netns: Option<Netns>, cookie: u32, to: IpAddr, kind: ProbeKind) -> Result<io::Result<Self>> {
        match netns {
            Some(netns) => enter(netns, move || Self::open_here(cookie, to, kind)),
            None => Ok(Self::open_here(cookie, to, kind)),
        }
    }

    fn open_here(cookie: u32, to: IpAddr, kind: ProbeKind) -> io::Result<Self> {
        let port = match kind {
            ProbeKind::Echo => DISCARD,
            ProbeKind::Tcp(port) | ProbeKind::Udp(port) => port,
        };
        let domain = Domain::for_address(SocketAddr::new(to, port));
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let connected = UdpSocket::bind((any, 0))?;
        connected.connect((to, port))?;
        let source = connected.local_addr()?.ip();
        let payload = [&cookie.to_be_bytes()[..], TEXT].concat();
        let raw = |protocol| Socket::new(domain, Type::RAW, Some(protocol));
        let (socket, packet, to, held) = match kind {
            ProbeKind::Udp(_) => {
                let to = connected.peer_addr()?;
                (connected.into(), payload, to, None)
            }
            ProbeKind::Echo => {
                let protocol = if to.is_ipv4() { Protocol::ICMPV4 } else { Protocol::ICMPV6 };
                let header = IcmpEchoHeader { id: (cookie >> 16) as u16, seq: cookie as u16 };
                (raw(protocol)?, echo::request(to, header, &payload)?, SocketAddr::new(to, 0), None)
            }
            ProbeKind::Tcp(port) => {
                let held = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
                held.bind(&SocketAddr::new(source, 0).into())?;
                let own = held.local_addr()?.as_socket().map_or(0, |address| address.port());
                let packet = syn((source, own), (to, port), cookie)?;
                (raw(Protocol::TCP)?, packet, SocketAddr::new(to, 0), Some(held))
            }
        };
        socket.set_nonblocking(true)?;
        Ok(Self { source, socket, to, packet, _port: held })
    }

    /// Sends the probe.
    ///
    /// # Errors
    ///
    /// The kernel refuses it: a packet filter of the namespace drops it, the route is gone, or a device is down.
    pub fn send(&self) -> io::Result<()> {
        self.socket.send_to(&self.packet, &self.to.into()).map(drop)
    }
}

/// Returns a TCP segment with SYN, without its IP header.
fn syn(from: (IpAddr, u16), to: (IpAddr, u16), sequence: u32) -> io::Result<Vec<u8>> {
    const WINDOW: u16 = 1024;
    let mut header = TcpHeader::new(from.1, to.1, sequence, WINDOW);
    header.syn = true;
    let checksum = match (from.0, to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => header.calc_checksum_ipv4_raw(from.octets(), to.octets(), &[]),
        (IpAddr::V6(from), IpAddr::V6(to)) => header.calc_checksum_ipv6_raw(from.octets(), to.octets(), &[]),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    header.checksum = checksum.map_err(io::Error::other)?;
    let mut packet = Vec::new();
    header.write(&mut packet)?;
    Ok(packet)
}
