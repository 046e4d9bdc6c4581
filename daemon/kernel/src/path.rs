//! A packet socket for path probes: frames that enter a VXLAN device of this host and leave that of another one.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

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

/// Sends and receives frames with the EtherType [`PROBE_ETHERTYPE`] in the network namespace of the thread that opened
/// it.
#[derive(Debug)]
pub struct PathSocket(UdpSocket);

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
            UdpSocket::from_std(socket.into()).map(Self)
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
        sys::send_frame(self.0.as_fd(), index, frame)
    }

    /// Receives the next frame with its Ethernet header, and returns its length. `None` if it did not arrive by a bridge or
    /// VXLAN device of ovl: other machines on a link can send such frames as well.
    ///
    /// # Errors
    ///
    /// recvfrom(2) fails.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let descriptor = self.0.as_raw_fd();
        let receive = || recvfrom::<LinkAddr>(descriptor, buffer).map_err(io::Error::from);
        let (length, from) = self.0.async_io(Interest::READABLE, receive).await?;
        Ok(from.is_some_and(|from| is_own(from.ifindex())).then_some(length))
    }
}

/// Whether a device is a bridge or a VXLAN device of ovl, by its name.
fn is_own(index: usize) -> bool {
    let Ok(name) = nix::net::if_::if_indextoname(u32::try_from(index).unwrap_or_default()) else {
        return false;
    };
    let device = name.to_str().ok().and_then(Device::new);
    matches!(device.and_then(|device| device.role()), Some(Role::Bridge(_) | Role::Vxlan(_)))
}
