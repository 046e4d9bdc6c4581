//! Receives from packet sockets: the bytes of a packet, and what the kernel says of it.

use std::io::IoSliceMut;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{ControlMessageOwned, LinkAddr, MsgFlags, recvmsg};
use nix::sys::time::TimeSpec;
use socket2::Socket;

use super::sys::PacketInfo;

/// What the kernel says of a packet that was received.
#[derive(Debug)]
pub(super) struct Received {
    /// The number of bytes that are in the buffer.
    pub(super) length: usize,
    /// The index of the device. 0 if the kernel does not say it.
    pub(super) index: u32,
    /// Whether the packet leaves the device.
    pub(super) outgoing: bool,
    /// When it passed, in nanoseconds since 1970. `None` if the socket does not ask for it.
    pub(super) at_ns: Option<u64>,
    /// `None` if the socket does not ask for it.
    pub(super) info: Option<PacketInfo>,
}

/// Receives a packet.
///
/// # Errors
///
/// `EAGAIN` if none waits, or the device is down or gone.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> nix::Result<Received> {
    /// `PACKET_OUTGOING` of `linux/if_packet.h`.
    const OUTGOING: u8 = 4;
    let mut part = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!(TimeSpec, [u8; PacketInfo::LENGTH]);
    let received = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut part, Some(&mut space), MsgFlags::empty())?;
    let (mut at_ns, mut info) = (None, None);
    for message in received.cmsgs()? {
        match message {
            ControlMessageOwned::ScmTimestampns(time) => {
                at_ns = u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_nsec()).ok();
            }
            ControlMessageOwned::Unknown(message) => info = PacketInfo::read(&message.data_bytes).or(info),
            _ => {}
        }
    }
    let from = received.address;
    Ok(Received {
        length: received.bytes,
        index: from.map_or(0, |from| u32::try_from(from.ifindex()).unwrap_or_default()),
        outgoing: from.is_some_and(|from| from.pkttype() == OUTGOING),
        at_ns,
        info,
    })
}
