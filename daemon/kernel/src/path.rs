//! Sockets for path probes: frames that enter a VXLAN device of this host and leave that of another one, and echo requests
//! by the routes of workloads' packets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, Ipv4HeaderSlice};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{LinkAddr, recvfrom};
use ovl_dataplane::device::{Device, Role};
use ovl_proto::PROBE_ETHERTYPE;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::error::{KernelError, Result};
use super::sys;

/// The receive buffer, in bytes: a flood of frames costs no more memory.
const RECEIVE_BUFFER: usize = 256 * 1024;

/// The identifier of echo requests that are probes, which has no meaning.
const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 0x6f76, seq: 0 };

/// Sends and receives frames with the EtherType [`PROBE_ETHERTYPE`] in the network namespace of the thread that opened
/// it.
#[derive(Debug)]
pub struct PathSocket {
    frames: UdpSocket,
    echo_v4: UdpSocket,
    /// `None` on a kernel without IPv6.
    echo_v6: Option<UdpSocket>,
}

impl PathSocket {
    /// Opens the socket. Its packets have a mark, which the kernel copies to the VXLAN packets around them. It must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// A packet socket needs CAP_NET_RAW, and the mark CAP_NET_ADMIN.
    pub fn open(mark: u32) -> Result<Self> {
        let open = || {
            let protocol = Protocol::from(i32::from(PROBE_ETHERTYPE.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
            socket.set_mark(mark)?;
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
            socket.set_nonblocking(true)?;
            // It is a packet socket, but is waited for like a UDP socket.
            let frames = UdpSocket::from_std(socket.into())?;
            let echo_v4 = echo_socket(Domain::IPV4, Protocol::ICMPV4)?;
            Ok(Self { frames, echo_v4, echo_v6: echo_socket(Domain::IPV6, Protocol::ICMPV6).ok() })
        };
        open().map_err(|error| KernelError::io("cannot open a packet socket for path probes", &error))
    }

    /// Sends a frame, with its Ethernet header, by a device.
    ///
    /// # Errors
    ///
    /// The device does not exist or is down, or the frame is longer than its MTU.
    pub fn send(&self, device: Device, frame: &[u8]) -> io::Result<()> {
        let index = if_nametoindex(device.as_str())?;
        sys::send_frame(self.frames.as_fd(), index, frame)
    }

    /// Receives the next frame with its Ethernet header, and returns its length. `None` if it did not arrive by a bridge or
    /// VXLAN device of ovl: other machines on a link can send such frames as well.
    ///
    /// # Errors
    ///
    /// recvfrom(2) fails.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let descriptor = self.frames.as_raw_fd();
        let receive = || recvfrom::<LinkAddr>(descriptor, buffer).map_err(io::Error::from);
        let (length, from) = self.frames.async_io(Interest::READABLE, receive).await?;
        Ok(from.is_some_and(|from| is_own(from.ifindex())).then_some(length))
    }

    /// Sends an echo request to an address, from the source address of the route to it. It does not wait.
    ///
    /// # Errors
    ///
    /// There is no route, or a packet filter of this host refuses it.
    pub fn send_echo(&self, to: IpAddr, payload: &[u8]) -> io::Result<()> {
        let mut packet = Vec::with_capacity(8 + payload.len());
        let socket = match to {
            IpAddr::V4(_) => {
                Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(ECHO), payload).write(&mut packet)?;
                &self.echo_v4
            }
            // The kernel computes this checksum: it needs the source address.
            IpAddr::V6(_) => {
                Icmpv6Header::new(Icmpv6Type::EchoRequest(ECHO)).write(&mut packet)?;
                self.echo_v6.as_ref().ok_or(io::ErrorKind::Unsupported)?
            }
        };
        packet.extend_from_slice(payload);
        socket.try_send_to(&packet, SocketAddr::new(to, 0)).map(drop)
    }

    /// Receives the next echo request that the host gets, from whomever, and returns where its payload is in the buffer. `None`
    /// if it has no header.
    ///
    /// # Errors
    ///
    /// recvfrom(2) fails, or there is an error of a packet that was sent.
    pub async fn receive_echo(&self, buffer: &mut [u8]) -> io::Result<Option<Range<usize>>> {
        let v6_readable = async {
            match &self.echo_v6 {
                Some(socket) => socket.readable().await.map(|()| socket),
                None => std::future::pending().await,
            }
        };
        let v4_readable = async { self.echo_v4.readable().await.map(|()| &self.echo_v4) };
        let socket = tokio::select! {
            socket = v4_readable => socket?,
            socket = v6_readable => socket?,
        };
        let (length, from) = match socket.try_recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            received => received?,
        };
        let packet = buffer.get(..length).unwrap_or_default();
        let header = match from.ip() {
            IpAddr::V4(_) => Ipv4HeaderSlice::from_slice(packet).ok().map(|header| header.slice().len()),
            IpAddr::V6(_) => Some(0),
        };
        Ok(header.map(|header| header + ECHO_HEADER..length).filter(|payload| payload.start <= payload.end))
    }
}

/// The length of an ICMP echo header, in bytes.
const ECHO_HEADER: usize = 8;

/// Opens a socket that receives the echo requests of a family and nothing else.
fn echo_socket(domain: Domain, protocol: Protocol) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    sys::receive_echo_requests(socket.as_fd(), domain == Domain::IPV4)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.set_nonblocking(true)?;
    // It is a raw socket, but is read and written like a UDP socket.
    UdpSocket::from_std(socket.into())
}

/// Whether a device is a bridge or a VXLAN device of ovl, by its name.
fn is_own(index: usize) -> bool {
    let Ok(name) = nix::net::if_::if_indextoname(u32::try_from(index).unwrap_or_default()) else {
        return false;
    };
    let device = name.to_str().ok().and_then(Device::new);
    matches!(device.and_then(|device| device.role()), Some(Role::Bridge(_) | Role::Vxlan(_)))
}
