//! The UDP socket of gossip. Its datagrams are never fragmented.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::{setsockopt_impl, sockopt_impl};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

/// The mark (`SO_MARK`) of packets that this host sends to peers. Rules of ovl that translate addresses pass over them.
pub const SOCKET_MARK: u32 = 0x400;

/// The size of the socket buffers in bytes: all hosts of a cluster may reply at once.
const BUFFER: usize = 4 << 20;

// Sets DF and ignores the path MTU cache of the kernel: ICMP errors are not authenticated, and gossip measures the path
// MTU itself.
sockopt_impl!(MtuDiscover4, SetOnly, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::c_int);
sockopt_impl!(MtuDiscover6, SetOnly, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::c_int);

/// Opens the socket on an address.
pub(crate) fn open(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    match listen {
        SocketAddr::V4(_) => setsockopt(&socket, MtuDiscover4, &libc::IP_PMTUDISC_PROBE)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            setsockopt(&socket, MtuDiscover6, &libc::IPV6_PMTUDISC_PROBE)?;
        }
    }
    // Beyond the limit of the system if the process has CAP_NET_ADMIN, otherwise up to it.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
        socket.set_send_buffer_size(BUFFER)?;
    }
    mark(&socket);
    socket.bind(&listen.into())?;
    UdpSocket::from_std(socket.into())
}

/// Sets [`SOCKET_MARK`] on a socket. Without CAP_NET_ADMIN, which ovld has, it stays as it is.
pub(crate) fn mark(socket: &impl AsFd) {
    let _ = setsockopt(socket, sockopt::Mark, &SOCKET_MARK);
}

/// The length in bytes of the IP and UDP headers of a datagram to an address.
pub(crate) fn header_len(to: IpAddr) -> usize {
    match to {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_of_both_families_share_a_port() {
        let four = open(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let Ok(six) = open(SocketAddr::new("::1".parse().unwrap(), four.local_addr().unwrap().port())) else {
            // No IPv6 here.
            return;
        };
        six.send_to(b"x", six.local_addr().unwrap()).await.unwrap();
        assert_eq!(six.recv(&mut [0; 10]).await.unwrap(), 1);
    }
}
