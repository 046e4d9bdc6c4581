//! Listening sockets, which may be bound before the host has their address.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

/// The size of socket buffers in bytes, for bursts that come while the thread does not run.
const SOCKET_BUFFER: usize = 4 << 20;

fn socket(listen: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(listen), kind, Some(protocol))?;
    if listen.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    Ok(socket)
}

/// Opens one of several sockets that share an address. The kernel distributes the clients over them.
pub(crate) fn open_udp(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(listen, Type::DGRAM, Protocol::UDP)?;
    socket.set_reuse_port(true)?;
    // Smaller buffers work too.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    Ok(socket.into())
}

/// Opens a listening TCP socket.
pub(crate) fn open_tcp(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(listen, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// Waits until one of the sockets is readable, but not longer than `timeout`.
pub(crate) fn wait_readable(sockets: &[&UdpSocket], timeout: Duration) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> =
        sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
