//! Sockets for path probes: frames that enter a VXLAN device of this host and leave that of another one, UDP datagrams on the
//! same way whose checksums are left to offloads, and echo requests by the routes of workloads' packets.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use etherparse::{IcmpEchoHeader, Ipv4HeaderSlice};
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{LinkAddr, recvfrom};
use ovl_dataplane::device::{Device, Role};
use ovl_proto::PROBE_ETHERTYPE;
use ovl_proto::id::Mac;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::error::{KernelError, Result};
use super::{echo, sys};

/// The receive buffer, in bytes: a flood of frames costs no more memory.
const RECEIVE_BUFFER: usize = 256 * 1024;
/// The maximum number of devices whose indices are kept.
const MAX_INDICES: usize = 4096;

/// The identifier of echo requests that are probes, which has no meaning.
const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 0x6f76, seq: 0 };

/// Sends and receives frames with the EtherType [`PROBE_ETHERTYPE`] in the network namespace of the thread that opened
/// it.
#[derive(Debug)]
pub struct PathSocket {
    frames: UdpSocket,
    /// The indices of devices of ovl, as last looked up: the look-up opens a socket each time.
    indices: Mutex<HashMap<Device, u32>>,
    offload: Option<OffloadSockets>,
    echo_v4: UdpSocket,
    /// `None` on a kernel without IPv6.
    echo_v6: Option<UdpSocket>,
}

/// The sockets of probes of the offload of checksums.
#[derive(Debug)]
struct OffloadSockets {
    /// Sends frames, each behind a `struct virtio_net_hdr`, as a virtual machine does.
    frames: Socket,
    /// Receives what is sent to all hosts of a link: the other host knows no address of this one in a switched network.
    datagrams: UdpSocket,
}

impl PathSocket {
    /// Opens the sockets. Packets through VXLAN devices have a mark, which the kernel copies to the VXLAN packets around them.
    /// `port` is the UDP port for probes of the offload of checksums. It must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// A packet socket needs CAP_NET_RAW, and the mark CAP_NET_ADMIN.
    pub fn open(mark: u32, port: u16) -> Result<Self> {
        let open = || {
            let protocol = Protocol::from(i32::from(PROBE_ETHERTYPE.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
            socket.set_mark(mark)?;
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
            socket.set_nonblocking(true)?;
            // It is a packet socket, but is waited for like a UDP socket.
            let frames = UdpSocket::from_std(socket.into())?;
            let echo_v4 = echo_socket(Domain::IPV4)?;
            let offload = OffloadSockets::open(mark, port).inspect_err(|error| {
                tracing::warn!(%error, port, "the offload of checksums in VXLAN is not probed");
            });
            let offload = offload.ok();
            let (indices, echo_v6) = (Mutex::default(), echo_socket(Domain::IPV6).ok());
            Ok(Self { frames, indices, offload, echo_v4, echo_v6 })
        };
        open().map_err(|error| KernelError::io("cannot open a packet socket for path probes", &error))
    }

    /// Sends a frame, with its Ethernet header, by a device.
    ///
    /// # Errors
    ///
    /// The device does not exist or is down, or the frame is longer than its MTU.
    pub fn send(&self, device: Device, frame: &[u8]) -> io::Result<()> {
        self.by_index(device, |index| sys::send_frame(self.frames.as_fd(), index, 0, frame))
    }

    /// Calls `send` with the index of a device. If the device was made again, it is called with the new index.
    fn by_index(&self, device: Device, send: impl Fn(u32) -> io::Result<()>) -> io::Result<()> {
        let known = self.lock().get(&device).copied();
        if let Some(index) = known {
            match send(index) {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                sent => return sent,
            }
        }
        let index = if_nametoindex(device.as_str())?;
        let mut indices = self.lock();
        if indices.len() >= MAX_INDICES {
            indices.clear();
        }
        indices.insert(device, index);
        drop(indices);
        send(index)
    }

    /// Whether a device is a bridge or a VXLAN device of ovl.
    fn is_own(&self, index: usize) -> bool {
        let Ok(index) = u32::try_from(index) else { return false };
        if self.lock().values().any(|known| *known == index) {
            return true;
        }
        let name = nix::net::if_::if_indextoname(index);
        let device = name.ok().and_then(|name| name.to_str().ok().and_then(Device::new));
        let device = device.filter(|device| matches!(device.role(), Some(Role::Bridge(_) | Role::Vxlan(_))));
        let is_own = device.is_some();
        let mut indices = self.lock();
        if indices.len() < MAX_INDICES {
            indices.extend(device.map(|device| (device, index)));
        }
        is_own
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Device, u32>> {
        self.indices.lock().unwrap_or_else(PoisonError::into_inner)
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
        Ok(from.is_some_and(|from| self.is_own(from.ifindex())).then_some(length))
    }

    /// Whether probes of the offload of checksums can be sent and received.
    pub fn has_offload(&self) -> bool {
        self.offload.is_some()
    }

    /// Sends a UDP datagram by a VXLAN device, in a frame with these source and destination addresses, to `port` of the host
    /// that gets it. Unless it `is_complete`, its checksum is left to the device and to what is below, as by most workloads.
    ///
    /// # Errors
    ///
    /// The device does not exist or is down, or the datagram is too long.
    pub fn send_datagram(
        &self,
        device: Device,
        [source, destination]: [Mac; 2],
        port: u16,
        payload: &[u8],
        is_complete: bool,
    ) -> io::Result<()> {
        let sockets = self.offload.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let frame = datagram_frame([source, destination], port, payload, is_complete)?;
        self.by_index(device, |index| sys::send_frame(sockets.frames.as_fd(), index, ETHERTYPE_IPV4, &frame))
    }

    /// Receives the next UDP datagram to all hosts of a link, from any host, and returns its length.
    ///
    /// # Errors
    ///
    /// recvfrom(2) fails.
    pub async fn receive_datagram(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.offload {
            Some(sockets) => sockets.datagrams.recv(buffer).await,
            None => std::future::pending().await,
        }
    }

    /// Lets a device leave checksums to what is below it, or compute them itself: `ethtool -K DEVICE tx on|off`.
    ///
    /// # Errors
    ///
    /// The device does not exist.
    pub fn set_checksum_offload(&self, device: Device, on: bool) -> io::Result<()> {
        sys::set_checksum_offload(self.frames.as_fd(), device.as_str(), on)
    }

    /// Sends an echo request to an address, from the source address of the route to it. It does not wait.
    ///
    /// # Errors
    ///
    /// There is no route, or a packet filter of this host refuses it.
    pub fn send_echo(&self, to: IpAddr, payload: &[u8]) -> io::Result<()> {
        let socket = match to {
            IpAddr::V4(_) => &self.echo_v4,
            IpAddr::V6(_) => self.echo_v6.as_ref().ok_or(io::ErrorKind::Unsupported)?,
        };
        socket.try_send_to(&echo::request(to, ECHO, payload)?, SocketAddr::new(to, 0)).map(drop)
    }

    /// Receives the next echo request that the host gets, from any host, and returns where its payload is in the buffer. `None`
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

impl OffloadSockets {
    fn open(mark: u32, port: u16) -> io::Result<Self> {
        // Without a protocol it receives nothing.
        let frames = Socket::new(Domain::PACKET, Type::RAW, None)?;
        frames.set_mark(mark)?;
        frames.set_nonblocking(true)?;
        sys::expect_offload_headers(frames.as_fd())?;
        let datagrams = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        datagrams.set_recv_buffer_size(RECEIVE_BUFFER)?;
        datagrams.set_nonblocking(true)?;
        datagrams.bind(&SocketAddr::from((Ipv4Addr::BROADCAST, port)).into())?;
        Ok(Self { frames, datagrams: UdpSocket::from_std(datagrams.into())? })
    }
}

const ETHERTYPE_IPV4: u16 = 0x0800;
/// Lengths of headers, in bytes.
const IPV4_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const ETHERNET_HEADER: usize = 14;
/// The length of a `struct virtio_net_hdr` (`linux/virtio_net.h`), in bytes.
const OFFLOAD_HEADER: usize = 10;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CHECKSUM: u8 = 1;

/// Builds a frame with a UDP datagram, behind the header that says whether its checksum is still to be computed.
fn datagram_frame(
    [source, destination]: [Mac; 2],
    port: u16,
    payload: &[u8],
    is_complete: bool,
) -> io::Result<Vec<u8>> {
    let packet = etherparse::PacketBuilder::ethernet2(source.0, destination.0)
        .ipv4(Ipv4Addr::UNSPECIFIED.octets(), Ipv4Addr::BROADCAST.octets(), 1)
        .udp(port, port);
    let mut frame = vec![0; OFFLOAD_HEADER];
    packet.write(&mut frame, payload).map_err(io::Error::other)?;
    if !is_complete {
        let udp = ETHERNET_HEADER + IPV4_HEADER;
        let [start, length] = [udp, UDP_HEADER + payload.len()].map(|number| number as u16);
        frame[0] = NEEDS_CHECKSUM;
        for (at, value) in [(2, start + UDP_HEADER as u16), (6, start), (8, UDP_CHECKSUM)] {
            frame[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
        // The sum of the pseudo-header (RFC 768): the addresses are 0 and ones.
        let sum = u32::from(PROTOCOL_UDP) + u32::from(length);
        let at = OFFLOAD_HEADER + udp + usize::from(UDP_CHECKSUM);
        frame[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    }
    Ok(frame)
}

/// The offset of the checksum in a UDP header.
const UDP_CHECKSUM: u16 = 6;
const PROTOCOL_UDP: u8 = 17;

/// The length of an ICMP echo header, in bytes.
const ECHO_HEADER: usize = 8;

/// Opens a socket that receives the echo requests of a family and nothing else.
fn echo_socket(domain: Domain) -> io::Result<UdpSocket> {
    let socket = echo::socket(domain)?;
    sys::receive_echo_requests(socket.as_fd(), domain == Domain::IPV4)?;
    SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offload_completes_a_partial_datagram_to_the_complete_one() {
        for payload in [&b"even"[..], b"uneven.", &[0xff; 1000]] {
            let macs = [Mac([2; 6]), Mac([6; 6])];
            let complete = datagram_frame(macs, 7940, payload, true).unwrap();
            let mut partial = datagram_frame(macs, 7940, payload, false).unwrap();
            assert!(complete.starts_with(&[0; OFFLOAD_HEADER]));
            // As an offload does: the sum from the start to the end, put at the offset (`linux/virtio_net.h`).
            let half = |at: usize| usize::from(u16::from_ne_bytes([partial[at], partial[at + 1]]));
            let (start, offset) = (OFFLOAD_HEADER + half(6), half(8));
            let words = partial[start..].chunks(2);
            let mut sum: u32 = words
                .map(|pair| u32::from(pair[0]) * 256 + u32::from(pair.get(1).copied().unwrap_or(0)))
                .sum();
            while sum > 0xffff {
                sum = sum % 0x1_0000 + sum / 0x1_0000;
            }
            partial[start + offset..start + offset + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
            assert_eq!(partial[OFFLOAD_HEADER..], complete[OFFLOAD_HEADER..]);
        }
    }
}
