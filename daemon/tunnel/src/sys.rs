//! The Linux kernel's TUN and TAP devices and UDP sockets.

use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::mem;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::libc;
use ovl_udp::{MAX_COALESCED, ReceiveBatch, Received, Sharing};

use crate::backend::{Backend, Device, DeviceKind, Socket};

/// The length of the header before each packet of a device (`struct virtio_net_hdr`), in bytes.
pub(crate) const VNET_HEADER: usize = 10;

/// Datagrams that are received at once, each of which may be coalesced from several.
const RECEIVE_SLOTS: usize = 64;

/// TCP segmentation and checksums that the engine does in place of the kernel.
const OFFLOAD_TCP: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// UDP segmentation, since Linux 6.2.
const OFFLOAD_UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

nix::ioctl_write_ptr_bad!(tun_set_interface, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_read_bad!(get_interface_mtu, libc::SIOCGIFMTU, libc::ifreq);

/// The Linux kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

/// A queue of a TUN or TAP device.
#[derive(Debug)]
pub struct TunQueue(File);

/// A UDP socket that coalesces received datagrams (`UDP_GRO`).
#[derive(Debug)]
pub struct UdpGroSocket(UdpSocket);

impl Backend for Linux {
    type Device = TunQueue;
    type Socket = UdpGroSocket;

    fn open_device(&self, name: &str, kind: DeviceKind, queues: usize) -> io::Result<Vec<TunQueue>> {
        // The kernel keeps the packets of a connection on one queue.
        (0..queues).map(|_| open_queue(name, kind)).collect()
    }

    fn open_sockets(&self, listen: SocketAddr, count: usize) -> io::Result<Vec<UdpGroSocket>> {
        let open = || ovl_udp::open(listen, Sharing::Port).map(UdpGroSocket);
        (0..count).map(|_| open()).collect()
    }
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes are a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The name ends with a zero byte.
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        let error = format!("device name '{name}': must have 1 to {} bytes", libc::IFNAMSIZ - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

fn open_queue(name: &str, kind: DeviceKind) -> io::Result<TunQueue> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mode = match kind {
        DeviceKind::Tun => libc::IFF_TUN,
        DeviceKind::Tap => libc::IFF_TAP,
    };
    let mut request = interface_request(name)?;
    let flags = mode | libc::IFF_MULTI_QUEUE | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is a whole `struct ifreq` and outlives the call.
    unsafe { tun_set_interface(file.as_raw_fd(), &raw const request) }?;
    // SAFETY: the argument is a number.
    let set = |offload: libc::c_uint| unsafe { tun_set_offload(file.as_raw_fd(), offload as libc::c_int) };
    set(OFFLOAD_TCP | OFFLOAD_UDP).or_else(|_| set(OFFLOAD_TCP))?;
    Ok(TunQueue(file))
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Device for TunQueue {
    #[inline]
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }

    #[inline]
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.0).write_vectored(pieces).map(drop)
    }
}

impl AsFd for UdpGroSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Memory for received datagrams.
#[derive(Debug)]
pub struct GroBatch {
    batch: ReceiveBatch,
    /// The number of datagrams to ask for. It follows the load, because preparing slots takes time.
    wanted: usize,
}

impl Socket for UdpGroSocket {
    type Batch = GroBatch;

    fn new_batch() -> GroBatch {
        GroBatch { batch: ReceiveBatch::new(RECEIVE_SLOTS, MAX_COALESCED), wanted: 2 }
    }

    #[inline]
    fn receive(&self, batch: &mut GroBatch, mut each: impl FnMut(Received<'_>)) -> io::Result<bool> {
        let GroBatch { batch, wanted } = batch;
        let received = batch.receive(&self.0, *wanted)?;
        for slot in 0..received {
            if let Some(datagrams) = batch.get(slot) {
                each(datagrams);
            }
        }
        let is_drained = received < *wanted;
        // At least one more than arrives: then the call itself finds that the socket is empty.
        *wanted = if is_drained { received + 1 } else { *wanted * 2 }.clamp(2, RECEIVE_SLOTS);
        Ok(is_drained)
    }

    #[inline]
    fn send(&self, to: SocketAddr, bytes: &[u8], segment_size: usize) -> io::Result<()> {
        let send = |bytes| ovl_udp::send(&self.0, to, bytes, segment_size).map(drop);
        match send(bytes) {
            // The kernel divides into segments only what it need not fragment as well.
            Err(error)
                if bytes.len() > segment_size
                    && matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL)) =>
            {
                bytes.chunks(segment_size).try_for_each(send)
            }
            result => result,
        }
    }

    fn device_mtu(&self, device: &str) -> io::Result<usize> {
        let mut request = interface_request(device)?;
        // SAFETY: the request is a whole `struct ifreq` and outlives the call, which writes into it.
        unsafe { get_interface_mtu(self.0.as_raw_fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFMTU sets this field.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        usize::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_has_1_to_15_bytes() {
        assert!(interface_request("ovt-0").is_ok() && interface_request("fifteen-letters").is_ok());
        for name in ["", "sixteen-letters-"] {
            let error = interface_request(name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
