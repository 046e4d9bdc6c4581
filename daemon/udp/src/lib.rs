//! Batches of UDP datagrams: `recvmmsg(2)`, `sendmmsg(2)`, and the kernel's segmentation and coalescing of
//! datagrams (`UDP_SEGMENT` and `UDP_GRO`, `udp(7)`).
//!
//! A batch allocates its memory once; receiving and sending allocate nothing. No call blocks.
//!
//! [`trial`] judges whether such an offload damages packets.

mod open;
pub mod threads;
pub mod trial;

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::{Duration, SystemTime};

use nix::libc;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage, setsockopt, sockopt};

pub use open::{Sharing, open};

/// The largest datagram that the kernel delivers, coalesced or not, in bytes.
pub const MAX_COALESCED: usize = 65_536;

/// A buffer for control messages with an `int` and a `timespec`, aligned as `cmsg(3)` requires.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

const CONTROL: usize = 64;

/// Memory into which one call receives several datagrams.
pub struct ReceiveBatch {
    slot_size: usize,
    memory: Box<[u8]>,
    addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    pieces: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    received: usize,
}

// SAFETY: the pointers in the headers lead to boxes that the same value owns, and nothing else has them.
unsafe impl Send for ReceiveBatch {}

impl std::fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveBatch").field("received", &self.received).finish_non_exhaustive()
    }
}

/// A received datagram, or several of one sender that the kernel coalesced.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// The sender's address.
    pub from: SocketAddr,
    /// The payload.
    pub bytes: &'a [u8],
    /// The size of each coalesced datagram in bytes, at least 1; the last one may be shorter.
    pub segment_size: usize,
    /// The datagram was longer than the slot, and its end is missing.
    pub is_truncated: bool,
    /// When it arrived, by the wall clock. `None` unless [`stamp`] was called for the socket.
    pub arrived: Option<SystemTime>,
}

/// Has the kernel note when each datagram arrives (`SO_TIMESTAMPNS`).
///
/// # Errors
///
/// What `setsockopt(2)` reports.
pub fn stamp(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, sockopt::ReceiveTimestampns, &true).map_err(io::Error::from)
}

impl ReceiveBatch {
    /// Allocates a batch of `slots` datagrams of up to `slot_size` bytes.
    pub fn new(slots: usize, slot_size: usize) -> Self {
        // SAFETY: all zeroes are a valid value of each of these plain C structures.
        let (address, piece, header) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            slot_size,
            memory: vec![0; slots * slot_size].into(),
            addresses: vec![address; slots].into(),
            controls: vec![Control([0; CONTROL]); slots].into(),
            pieces: vec![piece; slots].into(),
            headers: vec![header; slots].into(),
            received: 0,
        }
    }

    /// Returns the number of slots.
    pub fn slots(&self) -> usize {
        self.headers.len()
    }

    /// Receives up to `at_most` datagrams that wait in the socket and returns their number.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if no datagram waits, and what `recvmmsg(2)` reports, such as the ICMP
    /// error of an earlier datagram.
    pub fn receive(&mut self, socket: &impl AsFd, at_most: usize) -> io::Result<usize> {
        self.received = 0;
        let slots = at_most.clamp(1, self.headers.len().max(1)).min(self.headers.len());
        // The kernel overwrites the lengths with those of the last call, so all of them are set anew.
        for (slot, memory) in self.memory.chunks_exact_mut(self.slot_size).take(slots).enumerate() {
            self.pieces[slot] = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: self.slot_size };
            let header = &mut self.headers[slot].msg_hdr;
            header.msg_name = (&raw mut self.addresses[slot]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.pieces[slot];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[slot]).cast();
            header.msg_controllen = mem::size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        // SAFETY: there are `slots` headers, and each points to memory of its own that outlives the call.
        let received = check(unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                slots as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })?;
        self.received = received.min(slots);
        Ok(self.received)
    }

    /// Returns a datagram of the last [`receive`](Self::receive). `None` if there are not so many, or if the
    /// sender's address is neither IPv4 nor IPv6.
    #[inline]
    pub fn get(&self, slot: usize) -> Option<Received<'_>> {
        let header = self.headers.get(slot).filter(|_| slot < self.received)?;
        let length = (header.msg_len as usize).min(self.slot_size);
        let start = slot * self.slot_size;
        let bytes = self.memory.get(start..start + length)?;
        let from = socket_address(self.addresses.get(slot)?, header.msg_hdr.msg_namelen)?;
        // SAFETY: `recvmmsg` filled in this header, and its control buffer is still there.
        let (segment_size, arrived) = unsafe { read_control(&header.msg_hdr) };
        let segment_size = segment_size.unwrap_or(length).max(1);
        let is_truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
        Some(Received { from, bytes, segment_size, is_truncated, arrived })
    }
}

/// Reads the size of the coalesced datagrams and the time of arrival from the control messages, as far as they are there.
///
/// # Safety
///
/// The header must be as `recvmmsg` left it, with its control buffer.
#[inline]
unsafe fn read_control(header: &libc::msghdr) -> (Option<usize>, Option<SystemTime>) {
    let (mut segment_size, mut arrived) = (None, None);
    // SAFETY: by the caller's promise, the kernel's messages lie within the buffer.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const *header);
        while !message.is_null() {
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let size = libc::CMSG_DATA(message).cast::<i32>().read_unaligned();
                    segment_size = usize::try_from(size).ok();
                }
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                    let at = libc::CMSG_DATA(message).cast::<libc::timespec>().read_unaligned();
                    arrived = since_epoch(at);
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&raw const *header, message);
        }
    }
    (segment_size, arrived)
}

fn since_epoch(at: libc::timespec) -> Option<SystemTime> {
    let (seconds, nanos) = (u64::try_from(at.tv_sec).ok()?, u32::try_from(at.tv_nsec).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

#[inline]
fn socket_address(storage: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<SocketAddr> {
    // SAFETY: the storage is large enough for every family, and the kernel wrote `length` bytes of it.
    let address = unsafe { SockaddrStorage::from_raw((&raw const *storage).cast(), Some(length)) }?;
    let v4 = || address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    let v6 = || address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()));
    v4().or_else(v6)
}

/// Datagrams that one call sends.
pub struct SendBatch {
    slot_size: usize,
    memory: Box<[u8]>,
    addresses: Box<[Option<SockaddrStorage>]>,
    pieces: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    queued: usize,
}

// SAFETY: as for `ReceiveBatch`.
unsafe impl Send for SendBatch {}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch").field("queued", &self.queued).finish_non_exhaustive()
    }
}

impl SendBatch {
    /// Allocates a batch of `slots` datagrams of up to `slot_size` bytes.
    pub fn new(slots: usize, slot_size: usize) -> Self {
        // SAFETY: all zeroes are a valid value of both of these plain C structures.
        let (piece, header) = unsafe { (mem::zeroed(), mem::zeroed()) };
        Self {
            slot_size,
            memory: vec![0; slots * slot_size].into(),
            addresses: vec![None; slots].into(),
            pieces: vec![piece; slots].into(),
            headers: vec![header; slots].into(),
            queued: 0,
        }
    }

    /// Returns the memory for the next datagram, to be written before [`push`](Self::push). `None` if the
    /// batch is full.
    #[inline]
    pub fn next_slot(&mut self) -> Option<&mut [u8]> {
        let start = self.queued * self.slot_size;
        self.memory.get_mut(start..start + self.slot_size)
    }

    /// Queues the first `length` bytes of [`next_slot`](Self::next_slot) for an address. Does nothing if the
    /// batch is full.
    #[inline]
    pub fn push(&mut self, to: SocketAddr, length: usize) {
        let slot = self.queued;
        let (Some(address), Some(piece)) = (self.addresses.get_mut(slot), self.pieces.get_mut(slot)) else {
            return;
        };
        *address = Some(SockaddrStorage::from(to));
        piece.iov_len = length.min(self.slot_size);
        self.queued += 1;
    }

    /// Sends all queued datagrams and empties the batch. A datagram that the socket refuses is lost, as on a
    /// network.
    pub fn flush(&mut self, socket: &impl AsFd) {
        let queued = mem::take(&mut self.queued);
        let slots = self.memory.chunks_exact_mut(self.slot_size).take(queued).enumerate();
        for (slot, memory) in slots {
            let Some(address) = &self.addresses[slot] else { return };
            self.pieces[slot].iov_base = memory.as_mut_ptr().cast();
            let header = &mut self.headers[slot].msg_hdr;
            header.msg_name = address.as_ptr().cast_mut().cast();
            header.msg_namelen = address.len();
            header.msg_iov = &raw mut self.pieces[slot];
            header.msg_iovlen = 1;
        }
        let mut sent = 0;
        while sent < queued {
            let Some(rest) = self.headers.get_mut(sent..queued) else { break };
            // SAFETY: there are as many headers as the call is told, and each points to an address and a
            // piece that outlive the call; the kernel only reads them.
            let result = check(unsafe {
                libc::sendmmsg(
                    socket.as_fd().as_raw_fd(),
                    rest.as_mut_ptr(),
                    rest.len() as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                )
            });
            // An error is about the first datagram alone: skip it.
            sent += result.unwrap_or(1).max(1);
        }
    }
}

/// Sends datagrams that lie one after the other: each is `segment_size` bytes long, and the last one may be
/// shorter. The kernel divides them (`UDP_SEGMENT`).
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] if the socket's buffer is full; `EIO` if the network device computes no
/// checksums and `bytes` are more than one datagram; and what else `sendmsg(2)` reports.
#[inline]
pub fn send(socket: &impl AsFd, to: SocketAddr, bytes: &[u8], segment_size: usize) -> io::Result<usize> {
    let address = SockaddrStorage::from(to);
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; CONTROL]);
    // SAFETY: all zeroes are an empty message.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if bytes.len() > segment_size {
        let segment_size = u16::try_from(segment_size).map_err(|_| io::ErrorKind::InvalidInput)?;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the macros compute from a number, and the buffer holds one message of two bytes.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(mem::size_of::<u16>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = libc::UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(mem::size_of::<u16>() as u32) as _;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment_size);
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: everything that the message points to outlives the call, and the kernel only reads it.
    let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Instant;

    use super::*;

    fn socket(address: &str) -> UdpSocket {
        UdpSocket::bind(address).unwrap()
    }

    /// Receives until `count` datagrams have arrived, as (sender, payload) pairs.
    fn receive(batch: &mut ReceiveBatch, socket: &UdpSocket, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let until = Instant::now() + Duration::from_secs(10);
        let mut all = Vec::new();
        while all.len() < count && Instant::now() < until {
            let received = batch.receive(socket, batch.slots()).unwrap_or(0);
            for slot in 0..received {
                let datagram = batch.get(slot).unwrap();
                all.extend(
                    datagram.bytes.chunks(datagram.segment_size).map(|part| (datagram.from, part.to_vec())),
                );
            }
        }
        all
    }

    #[test]
    fn an_empty_socket_would_block() {
        let mut batch = ReceiveBatch::new(2, 100);
        let error = batch.receive(&socket("127.0.0.1:0"), 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(batch.get(0).is_none());
    }

    #[test]
    fn a_batch_serves_sockets_of_both_families_in_turn() {
        let (mut received, mut sent) = (ReceiveBatch::new(4, 100), SendBatch::new(4, 100));
        for _ in 0..3 {
            for address in ["127.0.0.1:0", "[::1]:0"] {
                let (from, to) = (socket(address), socket(address));
                for n in 0..3 {
                    sent.next_slot().unwrap()[..2].copy_from_slice(&[n, n]);
                    sent.push(to.local_addr().unwrap(), 2);
                }
                sent.flush(&from);
                let from = from.local_addr().unwrap();
                let expected: Vec<_> = (0..3).map(|n| (from, vec![n, n])).collect();
                assert_eq!(receive(&mut received, &to, 3), expected);
            }
        }
    }

    #[test]
    fn a_full_batch_takes_no_more() {
        let mut sent = SendBatch::new(1, 4);
        let to = socket("127.0.0.1:0");
        sent.push(to.local_addr().unwrap(), 4);
        assert!(sent.next_slot().is_none());
        sent.push(to.local_addr().unwrap(), 4);
        sent.flush(&socket("127.0.0.1:0"));
        assert!(sent.next_slot().is_some());
        assert_eq!(receive(&mut ReceiveBatch::new(4, 100), &to, 1).len(), 1);
        assert_eq!(to.local_addr().map(|at| at.is_ipv4()).ok(), Some(true));
    }

    #[test]
    fn a_refused_datagram_does_not_stop_the_others() {
        let mut sent = SendBatch::new(3, 4);
        let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        // A socket of IPv4 takes no destination of IPv6.
        for address in ["[::1]:9".parse().unwrap(), to.local_addr().unwrap()] {
            sent.push(address, 1);
        }
        sent.flush(&from);
        assert_eq!(receive(&mut ReceiveBatch::new(4, 100), &to, 1).len(), 1);
    }

    #[test]
    fn a_long_datagram_is_marked_as_truncated() {
        let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        from.send_to(&[7; 11], to.local_addr().unwrap()).unwrap();
        let mut batch = ReceiveBatch::new(2, 10);
        while batch.receive(&to, 2).is_err() {}
        let datagram = batch.get(0).unwrap();
        assert!(datagram.is_truncated && datagram.bytes == [7; 10]);
    }

    #[test]
    fn arrival_of_coalesced_datagrams_is_stamped_if_that_is_wanted() {
        let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        setsockopt(&to, sockopt::UdpGroSegment, &true).unwrap();
        let mut batch = ReceiveBatch::new(1, MAX_COALESCED);
        for is_stamped in [false, true] {
            if is_stamped {
                stamp(&to).unwrap();
            }
            let before = SystemTime::now();
            send(&from, to.local_addr().unwrap(), &[7; 2500], 1000).unwrap();
            while batch.receive(&to, 1).is_err() {}
            let received = batch.get(0).unwrap();
            assert_eq!((received.segment_size, received.arrived.is_some()), (1000, is_stamped));
            let tolerance = Duration::from_millis(20);
            assert!(received.arrived.is_none_or(|at| at + tolerance >= before && at <= SystemTime::now()));
        }
    }

    #[test]
    fn segments_are_divided_and_coalesced_again() {
        let (from, to) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        setsockopt(&to, sockopt::UdpGroSegment, &true).unwrap();
        let payload: Vec<u8> = (0..2500_u32).map(|n| n as u8).collect();
        let mut batch = ReceiveBatch::new(4, MAX_COALESCED);
        // An uncoalesced datagram in between: a slot must not keep the control length of an earlier call.
        for bytes in [&payload[..], &payload[..5], &payload, &payload[..1000], &payload] {
            send(&from, to.local_addr().unwrap(), bytes, 1000).unwrap();
            let parts: Vec<Vec<u8>> = bytes.chunks(1000).map(<[u8]>::to_vec).collect();
            let received: Vec<_> =
                receive(&mut batch, &to, parts.len()).into_iter().map(|(_, part)| part).collect();
            assert_eq!(received, parts);
        }
    }
}
