//! Opens sockets.

use std::io;
use std::mem;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

/// A socket buffer in bytes: a burst that a cipher needs a few milliseconds for.
const BUFFER: usize = 4 << 20;

/// Whether several sockets have one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// One socket alone.
    Alone,
    /// Several, among which the kernel divides the senders (`SO_REUSEPORT`).
    Port,
}

/// Opens a socket that does not block and coalesces received datagrams (`UDP_GRO`). What it sends may be fragmented.
///
/// # Errors
///
/// [`io::ErrorKind::AddrInUse`] if another program has the port, and what else the kernel reports.
pub fn open(listen: SocketAddr, sharing: Sharing) -> io::Result<UdpSocket> {
    let family = if listen.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Datagram, flags, None)?;
    // The routes know the path's MTU, and a forged ICMP message must not lower it. Datagrams may be fragmented: where IPv6
    // needs more than the path carries with its encapsulation (RFC 8200, section 5), nothing else helps.
    match listen {
        SocketAddr::V4(_) => {
            set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT)?;
        }
        SocketAddr::V6(_) => {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_OMIT)?;
        }
    }
    setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
    if sharing == Sharing::Port {
        setsockopt(&socket, sockopt::ReusePort, &true)?;
    }
    // More than `rmem_max` takes CAP_NET_ADMIN; a smaller buffer works too.
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &BUFFER))?;
    setsockopt(&socket, sockopt::SndBufForce, &BUFFER)
        .or_else(|_| setsockopt(&socket, sockopt::SndBuf, &BUFFER))?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(listen))?;
    Ok(socket.into())
}

/// Sets a socket option that is an `int`, for options that nix does not have.
fn set_option(socket: &impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = mem::size_of::<i32>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value is an int and outlives the call.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) };
    nix::errno::Errno::result(result).map(drop).map_err(io::Error::from)
}
