//! What the engine needs from an operating system: devices, sockets and their readiness.
//!
//! The engine is generic over a [`Backend`], so its data path calls the kernel without indirection, and the
//! tests run the same engine over queues in memory, without privileges.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd;

use ovl_udp::Received;

/// The kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A TUN device, which carries IP packets.
    Tun,
    /// A TAP device, which carries Ethernet frames.
    Tap,
}

/// Creates devices and sockets.
pub trait Backend: Send + Sync + 'static {
    /// One queue of a device.
    type Device: Device;
    /// A UDP socket.
    type Socket: Socket;

    /// Creates a device with this number of queues, administratively down. The device is deleted with the
    /// last of its queues.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the name is not a device name, and what the system reports.
    fn open_device(&self, name: &str, kind: DeviceKind, queues: usize) -> io::Result<Vec<Self::Device>>;

    /// Opens `count` sockets that share one address and port. All datagrams of a sender arrive at the same
    /// socket.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AddrInUse`] if another program has the port, and what the system reports.
    fn open_sockets(&self, listen: SocketAddr, count: usize) -> io::Result<Vec<Self::Socket>>;
}

/// A queue of a device. Each packet has a `struct virtio_net_hdr` in front of it.
///
/// The descriptor is readable while packets wait.
pub trait Device: AsFd + Send + Sync + 'static {
    /// Reads one packet and returns its length.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if no packet waits. Any other error means that the device is gone.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes one packet, which is given in pieces.
    ///
    /// # Errors
    ///
    /// What the system reports, for instance because the device is down.
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()>;
}

/// A UDP socket.
///
/// The descriptor is readable while datagrams wait, and writable while there is room to send.
pub trait Socket: AsFd + Send + Sync + 'static {
    /// Memory for received datagrams.
    type Batch;

    /// Allocates memory for received datagrams.
    fn new_batch() -> Self::Batch;

    /// Passes waiting datagrams to `each`, and returns whether the socket had no more.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if no datagram waits.
    fn receive(&self, batch: &mut Self::Batch, each: impl FnMut(Received<'_>)) -> io::Result<bool>;

    /// Sends datagrams of `segment_size` bytes that lie one after the other; the last one may be shorter.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if there is no room, and `EIO` if the network device cannot divide them.
    fn send(&self, to: SocketAddr, bytes: &[u8], segment_size: usize) -> io::Result<()>;

    /// Returns the MTU of a device in the network namespace of the socket, in bytes.
    ///
    /// # Errors
    ///
    /// What the system reports, for instance because there is no such device.
    fn device_mtu(&self, device: &str) -> io::Result<usize>;
}
