//! System calls that neither `nix` nor `socket2` wraps.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The index of the loopback device, in every namespace.
pub(super) const LOOPBACK: u32 = 1;

/// The ioctl `NS_GET_NSTYPE` of `linux/nsfs.h`, which `libc` does not define.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// Lists all addresses of this host, each with the name of its device.
///
/// # Errors
///
/// getifaddrs(3) fails.
pub fn own_addresses() -> io::Result<impl Iterator<Item = (String, IpAddr)>> {
    let all = nix::ifaddrs::getifaddrs()?;
    Ok(all.filter_map(|entry| {
        let address = entry.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = || address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        Some((entry.interface_name, v4.or_else(v6)?))
    }))
}

/// Whether a device has Ethernet headers.
pub fn is_ethernet(device: &str) -> bool {
    let mut all = nix::ifaddrs::getifaddrs().into_iter().flatten().filter(|it| it.interface_name == device);
    all.any(|it| {
        it.address
            .as_ref()
            .and_then(|it| it.as_link_addr())
            .is_some_and(|it| it.hatype() == libc::ARPHRD_ETHER)
    })
}

/// Gives the free memory of this process back to the kernel. glibc keeps what was freed below an allocation that is
/// still in use; of hundreds of megabytes that is almost all.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Waits until a descriptor is readable or closed by its peer. Returns the state of each; none is ready after a
/// timeout or a signal.
pub(super) fn poll<const N: usize>(
    fds: [Option<RawFd>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    // The kernel skips negative descriptors.
    let mut entries = fds.map(|fd| readable(fd.unwrap_or(-1)));
    poll_entries(&mut entries, timeout)?;
    Ok(entries.map(|entry| entry.revents != 0))
}

/// Waits until one of several descriptors is readable or closed by its peer, or for a time, or for a signal.
pub(super) fn poll_any(fds: &[RawFd], timeout: Duration) -> io::Result<()> {
    let mut entries: Vec<libc::pollfd> = fds.iter().copied().map(readable).collect();
    poll_entries(&mut entries, Some(timeout))
}

fn readable(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Waits as `poll` does. A signal ends it with no descriptor ready.
fn poll_entries(entries: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout =
        timeout.map_or(-1, |time| libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX));
    // SAFETY: the pointer and the count describe `entries`.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout) };
    match io::Error::last_os_error() {
        error if ready < 0 && error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// What the kernel says of a packet beside its bytes (`struct tpacket_auxdata` of `linux/if_packet.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PacketInfo {
    /// The length of the packet before a filter cut it, in bytes.
    pub(super) length: u32,
    /// The VLAN tag that the kernel has taken out of the frame: EtherType and TCI.
    pub(super) vlan: Option<[u8; 4]>,
}

impl PacketInfo {
    /// The length of the structure.
    pub(super) const LENGTH: usize = 20;

    /// Reads the structure. `None` if it is not one.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        /// `TP_STATUS_VLAN_VALID`.
        const HAS_VLAN: u32 = 1 << 4;
        let bytes: &[u8; Self::LENGTH] = bytes.get(..Self::LENGTH)?.try_into().ok()?;
        let [s0, s1, s2, s3, l0, l1, l2, l3, _, _, _, _, _, _, _, _, t0, t1, p0, p1] = *bytes;
        let status = u32::from_ne_bytes([s0, s1, s2, s3]);
        let [tci, protocol] = [[t0, t1], [p0, p1]].map(|pair| u16::from_ne_bytes(pair).to_be_bytes());
        let vlan = [protocol[0], protocol[1], tci[0], tci[1]];
        let length = u32::from_ne_bytes([l0, l1, l2, l3]);
        Some(Self { length, vlan: (status & HAS_VLAN != 0).then_some(vlan) })
    }
}

/// Lets a packet socket describe each packet: [`PacketInfo`].
pub(super) fn describe_packets(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the value is an int and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_AUXDATA,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns the device to which a packet socket is bound: its index, -1 if it was deleted, and its type (`ARPHRD_...`).
pub(super) fn bound_device(socket: BorrowedFd<'_>) -> io::Result<(i32, u16)> {
    // SAFETY: all zeros are a valid address.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointers are to an address of that length and to the length.
    let done = unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut at).cast(), &raw mut length) };
    if done == 0 { Ok((at.sll_ifindex, at.sll_hatype)) } else { Err(io::Error::last_os_error()) }
}

/// Returns the number of packets that a packet socket had no room for since the last call.
pub(super) fn packets_lost(socket: BorrowedFd<'_>) -> u32 {
    // `struct tpacket_stats` of `linux/if_packet.h`: packets, and those that were dropped.
    let mut counts = [0u32; 2];
    let mut length = size_of_val(&counts) as libc::socklen_t;
    // SAFETY: the pointers are to values of that length and to the length.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            counts.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done == 0 { counts[1] } else { 0 }
}

/// Receives a datagram from a netlink socket that listens to all namespaces, without waiting for one. Returns its length,
/// and the id of the namespace that it is about; `None` for the namespace of the socket.
pub(super) fn receive_with_namespace(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<i32>)> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Room for two control messages, aligned as their headers are.
    let mut control = [0u64; 8];
    // SAFETY: all zeros are a valid header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header describes a buffer and room for control messages that outlive the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    let Ok(length) = usize::try_from(length) else { return Err(io::Error::last_os_error()) };
    let mut namespace = None;
    // SAFETY: the kernel has written valid control messages into the room, and its length into the header.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: a pointer from CMSG_FIRSTHDR or CMSG_NXTHDR is null or to a whole header in the room.
    while let Some(message) = unsafe { next.as_ref() } {
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID) {
            // SAFETY: this message has an `int`, which need not be aligned.
            namespace = Some(unsafe { libc::CMSG_DATA(next).cast::<i32>().read_unaligned() });
        }
        // SAFETY: both pointers are valid, as above.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok((length.min(buffer.len()), namespace))
}

/// Sends an Ethernet frame through a device, with a packet socket. `protocol` is the EtherType of the frame; 0: that of the
/// socket.
pub(super) fn send_frame(socket: BorrowedFd<'_>, index: u32, protocol: u16, frame: &[u8]) -> io::Result<()> {
    // SAFETY: all zeros are a valid address.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol.to_be();
    to.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    // SAFETY: the pointers are to a frame and an address of these lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a packet socket receive the frames with an EtherType that arrive by a device; 0: by any of its network namespace.
pub(super) fn bind_packet(socket: BorrowedFd<'_>, index: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: all zeros are a valid address.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = protocol.to_be();
    at.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    // SAFETY: the pointer is to an address of this length.
    let bound = unsafe {
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        libc::bind(socket.as_raw_fd(), (&raw const at).cast(), length)
    };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a packet socket expect a `struct virtio_net_hdr` before each frame that it sends (packet(7)).
pub(super) fn expect_offload_headers(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the value is an int and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a device leave the checksums of packets to what is below it, or compute them itself (`ETHTOOL_STXCSUM`).
pub(super) fn set_checksum_offload(socket: BorrowedFd<'_>, device: &str, on: bool) -> io::Result<()> {
    /// `struct ethtool_value` of `linux/ethtool.h`.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let mut value = Value { command: ETHTOOL_STXCSUM, data: on.into() };
    // SAFETY: all zeroes are a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points to are whole and outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a raw ICMP socket receive echo requests and nothing else (raw(7), RFC 3542).
pub(super) fn receive_echo_requests(socket: BorrowedFd<'_>, is_v4: bool) -> io::Result<()> {
    /// `ICMP_FILTER` of `linux/icmp.h`, at the level of raw sockets: a bit for each type below 32 that is dropped.
    const ICMP_FILTER: libc::c_int = 1;
    /// `ICMPV6_FILTER` of `linux/icmpv6.h`: a bit for each type that is dropped.
    const ICMPV6_FILTER: libc::c_int = 1;
    /// `SOL_RAW` of `linux/socket.h`.
    const SOL_RAW: libc::c_int = 255;
    const REQUEST_V4: u32 = 8;
    const REQUEST_V6: usize = 128;
    let mut filter = [u32::MAX; 8];
    let (level, name, length) = if is_v4 {
        filter[0] = !(1 << REQUEST_V4);
        (SOL_RAW, ICMP_FILTER, size_of::<u32>())
    } else {
        filter[REQUEST_V6 / 32] = !(1 << (REQUEST_V6 % 32));
        (libc::IPPROTO_ICMPV6, ICMPV6_FILTER, size_of_val(&filter))
    };
    // SAFETY: the filter outlives the call and is at least as long as the call is told.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, filter.as_ptr().cast(), length as libc::socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The type of the namespace behind a descriptor of nsfs: a `CLONE_NEW...` constant.
pub(super) fn namespace_type(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}

/// The cookie of the network namespace of the calling thread, which is unique until the next boot.
pub(super) fn netns_cookie() -> io::Result<u64> {
    // A socket of any family belongs to the namespace.
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers are to a value of that length and to the length.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The monotonic clock, in microseconds.
pub(super) fn monotonic_us() -> Option<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a value of this type that outlives the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let us = now.tv_sec.checked_mul(1_000_000)?.checked_add(now.tv_nsec / 1000)?;
    u64::try_from(us).ok().filter(|_| result == 0)
}
