//! The few system calls that no crate of ours wraps: TUN and TAP devices with offload, and datagrams many
//! at a time.

use std::fs::File;
use std::io;
use std::mem;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::libc;

/// Length of the header before each packet of a device (`struct virtio_net_hdr`).
pub(crate) const VNET_HEADER: usize = 10;

const IFF_TUN: i32 = 0x0001;
const IFF_TAP: i32 = 0x0002;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// Checksums, and segmentation of TCP over IPv4 and IPv6, are left to us.
const OFFLOAD_TCP: libc::c_ulong = 0x01 | 0x02 | 0x04;
/// That of UDP too (Linux 6.2).
const OFFLOAD_UDP: libc::c_ulong = 0x20 | 0x40;

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: i32,
    rest: [u8; 20],
}

impl Request {
    fn new(name: &str, value: i32) -> io::Result<Self> {
        let mut request = Self { name: [0; 16], value, rest: [0; 20] };
        // One byte stays zero.
        let place = request.name.get_mut(..name.len().max(1)).filter(|_| name.len() < 16);
        let Some(place) = place.filter(|_| !name.is_empty()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a device name"));
        };
        place.copy_from_slice(name.as_bytes());
        Ok(request)
    }
}

/// Which kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// IP packets.
    Tun,
    /// Ethernet frames.
    Tap,
}

/// Makes a device with so many queues, administratively down, that ends with its last descriptor. The kernel
/// keeps the packets of a connection on one queue.
pub(crate) fn open_device(name: &str, kind: Kind, queues: usize) -> io::Result<Vec<File>> {
    (0..queues).map(|_| open_queue(name, kind)).collect()
}

fn open_queue(name: &str, kind: Kind) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mode = if kind == Kind::Tun { IFF_TUN } else { IFF_TAP };
    let request = Request::new(name, mode | IFF_MULTI_QUEUE | IFF_NO_PI | IFF_VNET_HDR)?;
    // SAFETY: the request is a whole `struct ifreq` and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) })?;
    // SAFETY: the argument is a number.
    let set = |flags: libc::c_ulong| check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, flags) });
    set(OFFLOAD_TCP | OFFLOAD_UDP).or_else(|_| set(OFFLOAD_TCP))?;
    Ok(file)
}

/// A device's MTU, in bytes.
pub(crate) fn mtu(name: &str, socket: &UdpSocket) -> io::Result<usize> {
    let mut request = Request::new(name, 0)?;
    // SAFETY: as above; the kernel writes into it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
    usize::try_from(request.value).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads one packet of a device.
pub(crate) fn read(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as we say.
    check_length(unsafe { libc::read(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// Writes one packet in pieces.
pub(crate) fn write(file: &File, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: `IoSlice` is an `iovec`, by its documentation; no packet has more than `i32::MAX` pieces.
    let result =
        unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr().cast(), pieces.len() as libc::c_int) };
    check_length(result)
}

/// Sockets of one address and port: the kernel keeps the datagrams of a sender on one of them.
pub(crate) fn open_sockets(listen: SocketAddr, count: usize) -> io::Result<Vec<Arc<UdpSocket>>> {
    (0..count).map(|_| open_socket(listen).map(Arc::new)).collect()
}

/// A socket for tunnels: whole datagrams, never cut by the network, and several at a time.
fn open_socket(listen: SocketAddr) -> io::Result<UdpSocket> {
    /// A burst of what the cipher needs a few milliseconds for.
    const BUFFER: i32 = 4 << 20;
    let family = if listen.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just opened and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let set = |level, name, value: i32| option(socket.as_raw_fd(), level, name, value);
    // Probing, not discovery: the size is ours to know, and no forged message may lower it.
    match listen {
        SocketAddr::V4(_) => {
            set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        }
        SocketAddr::V6(_) => {
            set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
            set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        }
    }
    set(libc::SOL_UDP, libc::UDP_GRO, 1)?;
    set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    // Beyond `rmem_max` only with the right to; a small buffer works too.
    for (forced, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        set(libc::SOL_SOCKET, forced, BUFFER).or_else(|_| set(libc::SOL_SOCKET, plain, BUFFER))?;
    }
    let (address, length) = to_c(listen);
    // SAFETY: a whole address of that length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket.into())
}

fn option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = mem::size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value is an int and outlives the call.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) }).map(drop)
}

fn to_c(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all zeroes are a valid address of no family.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let place = &raw mut storage;
    let length = match address {
        SocketAddr::V4(v4) => {
            // SAFETY: the storage is large enough and aligned for all families.
            let to = unsafe { &mut *place.cast::<libc::sockaddr_in>() };
            to.sin_family = libc::AF_INET as libc::sa_family_t;
            to.sin_port = v4.port().to_be();
            to.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            mem::size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            // SAFETY: as above.
            let to = unsafe { &mut *place.cast::<libc::sockaddr_in6>() };
            to.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            to.sin6_port = v6.port().to_be();
            to.sin6_addr.s6_addr = v6.ip().octets();
            to.sin6_scope_id = v6.scope_id();
            mem::size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

fn from_c(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let place = &raw const *storage;
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what it is.
            let from = unsafe { &*place.cast::<libc::sockaddr_in>() };
            let ip = from.sin_addr.s_addr.to_ne_bytes().into();
            Some(SocketAddrV4::new(ip, u16::from_be(from.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let from = unsafe { &*place.cast::<libc::sockaddr_in6>() };
            let ip = from.sin6_addr.s6_addr.into();
            Some(SocketAddrV6::new(ip, u16::from_be(from.sin6_port), 0, from.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// Room for one control message with an int, aligned.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 32]);

/// Sends datagrams that lie one after the other: each `size` bytes long, the last one may be shorter. The
/// kernel cuts them (`UDP_SEGMENT`, udp(7)).
pub(crate) fn send(socket: &UdpSocket, to: SocketAddr, bytes: &[u8], size: usize) -> io::Result<usize> {
    let (mut address, length) = to_c(to);
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 32]);
    // SAFETY: all zeroes are an empty message.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = length;
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if bytes.len() > size {
        let segment = size as u16;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the macros compute from a number; the buffer holds one message of two bytes.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(mem::size_of::<u16>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = libc::UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(mem::size_of::<u16>() as u32) as _;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment);
        }
    }
    // SAFETY: all that the message points to outlives the call; the kernel only reads.
    check_length(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
}

/// The largest that the kernel hands over at once.
const SLOT: usize = 65_536;

/// Receives many datagrams at a time, each of which may be several that the kernel joined (`UDP_GRO`).
pub(crate) struct Receiver {
    memory: Box<[u8]>,
    addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    pieces: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    /// So many are asked for next: where one comes at a time, to ask for more costs as much again.
    wanted: usize,
}

// SAFETY: the pointers inside lead to boxes that belong to the same value, and nobody else has them.
unsafe impl Send for Receiver {}

/// Some datagrams of one sender, joined.
pub(crate) struct Received<'a> {
    pub(crate) from: SocketAddr,
    pub(crate) bytes: &'a mut [u8],
    /// Of each datagram; the last one may be shorter.
    pub(crate) size: usize,
}

impl Receiver {
    /// For up to `slots` at a time.
    pub(crate) fn new(slots: usize) -> Self {
        // SAFETY: all zeroes are a valid value of each of these.
        let (address, piece, header) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            memory: vec![0; slots * SLOT].into_boxed_slice(),
            addresses: vec![address; slots].into_boxed_slice(),
            controls: vec![Control([0; 32]); slots].into_boxed_slice(),
            pieces: vec![piece; slots].into_boxed_slice(),
            headers: vec![header; slots].into_boxed_slice(),
            wanted: 1,
        }
    }

    /// Waits for the first, and takes what is there with it.
    pub(crate) fn receive(
        &mut self,
        socket: &UdpSocket,
        mut each: impl FnMut(Received<'_>),
    ) -> io::Result<()> {
        let slots = self.wanted.clamp(1, self.headers.len());
        for (slot, memory) in self.memory.chunks_exact_mut(SLOT).take(slots).enumerate() {
            self.pieces[slot] = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: SLOT };
            let header = &mut self.headers[slot].msg_hdr;
            header.msg_name = (&raw mut self.addresses[slot]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.pieces[slot];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[slot]).cast();
            header.msg_controllen = mem::size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        // SAFETY: `slots` headers, each pointing to memory of its own that outlives the call.
        let count = check(unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                slots as libc::c_uint,
                libc::MSG_WAITFORONE as _,
                std::ptr::null_mut(),
            )
        })?;
        let count = usize::try_from(count).unwrap_or(0).min(slots);
        self.wanted = if count == slots { slots * 2 } else { count };
        for slot in 0..count {
            let length = (self.headers[slot].msg_len as usize).min(SLOT);
            // SAFETY: the kernel has filled this header in.
            let size = unsafe { segment_size(&self.headers[slot].msg_hdr) }.unwrap_or(length);
            let Some(from) = from_c(&self.addresses[slot]) else { continue };
            let start = slot * SLOT;
            let Some(bytes) = self.memory.get_mut(start..start + length) else { continue };
            each(Received { from, bytes, size: size.max(1) });
        }
        Ok(())
    }
}

/// The size of each of the datagrams that were joined.
///
/// # Safety
///
/// The header must be as `recvmmsg` left it, with its control buffer.
unsafe fn segment_size(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: by the caller's promise; the kernel's messages lie within the buffer.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const *header);
        while !message.is_null() {
            if ((*message).cmsg_level, (*message).cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                let size = libc::CMSG_DATA(message).cast::<i32>().read_unaligned();
                return usize::try_from(size).ok();
            }
            message = libc::CMSG_NXTHDR(&raw const *header, message);
        }
    }
    None
}

/// Lets a thread's blocking call return with `EINTR`.
pub(crate) mod interrupt {
    use std::os::unix::thread::JoinHandleExt;
    use std::sync::Once;
    use std::thread::JoinHandle;
    use std::time::Duration;

    use nix::libc;

    extern "C" fn nothing(_: libc::c_int) {}

    fn signal() -> libc::c_int {
        // Used by nobody: the first ones belong to the C library.
        libc::SIGRTMIN() + 3
    }

    /// Interrupts the call that a thread waits in, if it waits in one.
    pub(crate) fn wake(thread: &JoinHandle<()>) {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: all zeroes are a valid action, the handler does nothing, and without SA_RESTART the
            // calls that it interrupts return.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
                libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
            }
        });
        if !thread.is_finished() {
            // SAFETY: the thread was not joined yet.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        }
    }

    /// Ends a thread that stops when it is told to, and was told.
    pub(crate) fn join(thread: JoinHandle<()>) {
        // It may be just before its blocking call: so more than once.
        while !thread.is_finished() {
            wake(&thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        // One that panicked has ended too.
        let _ = thread.join();
    }
}
