//! TCP and UDP echo servers and clients in a namespace.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;
use crate::wait::uninterrupted;
use crate::without_prefix_length;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
const UDP_TIMEOUT: Duration = Duration::from_secs(1);

/// A running echo server. It stops and closes its connections on drop.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    /// Dropping this half of a socket pair stops the server thread.
    alive: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Returns the port, also if port 0 was requested.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    fn start(address: SocketAddr, serve: impl FnOnce(&UnixStream) + Send + 'static) -> Result<Self> {
        let (alive, stop) = UnixStream::pair()?;
        let thread = thread::Builder::new().name(format!("echo {address}")).spawn(move || serve(&stop))?;
        Ok(EchoServer { address, alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl Netns {
    /// Starts a TCP echo server on all addresses of the namespace, IPv4 and IPv6. Port 0 selects a free port.
    pub fn tcp_echo(&self, port: u16) -> Result<EchoServer> {
        self.tcp_echo_on((Ipv6Addr::UNSPECIFIED, port).into())
    }

    /// Starts a TCP echo server on one address.
    pub fn tcp_echo_on(&self, address: SocketAddr) -> Result<EchoServer> {
        let listener =
            self.run(|| TcpListener::bind(address))?.with_context(|| self.cannot_listen("TCP", address))?;
        // A connection that poll reported may be closed before accept: accept must not block.
        listener.set_nonblocking(true)?;
        EchoServer::start(listener.local_addr()?, move |stop| serve_tcp(&listener, stop))
    }

    /// Starts a UDP echo server on all addresses of the namespace, IPv4 and IPv6. Port 0 selects a free port.
    ///
    /// If an interface has several addresses, the reply may come from another address than the request went
    /// to: use [`udp_echo_on`](Self::udp_echo_on).
    pub fn udp_echo(&self, port: u16) -> Result<EchoServer> {
        self.udp_echo_on((Ipv6Addr::UNSPECIFIED, port).into())
    }

    /// Starts a UDP echo server on one address.
    pub fn udp_echo_on(&self, address: SocketAddr) -> Result<EchoServer> {
        let socket =
            self.run(|| UdpSocket::bind(address))?.with_context(|| self.cannot_listen("UDP", address))?;
        socket.set_nonblocking(true)?;
        EchoServer::start(socket.local_addr()?, move |stop| serve_udp(&socket, stop))
    }

    /// Sends the payload to a TCP echo server and returns the reply.
    pub fn tcp_roundtrip(&self, address: impl Display, port: u16, payload: &[u8]) -> Result<Vec<u8>> {
        let server = socket_address(address, port)?;
        self.run(|| tcp_exchange(server, payload))?
            .with_context(|| format!("TCP from {} to {server}", self.netns_name()))
    }

    /// Sends one datagram to a UDP echo server and returns the reply. The timeout is one second.
    pub fn udp_roundtrip(&self, address: impl Display, port: u16, payload: &[u8]) -> Result<Vec<u8>> {
        let server = socket_address(address, port)?;
        self.run(|| udp_exchange(server, payload))?
            .with_context(|| format!("UDP from {} to {server}", self.netns_name()))
    }

    fn cannot_listen(&self, protocol: &str, address: SocketAddr) -> String {
        format!("cannot listen on {protocol} {address} in {}", self.netns_name())
    }
}

fn socket_address(address: impl Display, port: u16) -> Result<SocketAddr> {
    let text = address.to_string();
    let ip: IpAddr =
        without_prefix_length(&text).parse().with_context(|| format!("invalid IP address {text:?}"))?;
    Ok(SocketAddr::new(ip, port))
}

/// Waits until the socket is readable. Returns false if the server is to stop.
fn readable(socket: &impl AsFd, stop: &UnixStream) -> bool {
    let mut fds =
        [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return fds[1].revents().is_none_or(|events| events.is_empty()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn serve_tcp(listener: &TcpListener, stop: &UnixStream) {
    let open: Mutex<HashMap<u64, TcpStream>> = Mutex::default();
    let open = &open;
    thread::scope(|scope| {
        for number in 0.. {
            if !readable(listener, stop) {
                break;
            }
            // The client may have closed the connection before it was accepted.
            let Ok((connection, _)) = listener.accept() else { continue };
            let Ok(copy) = connection.try_clone() else { continue };
            locked(open).insert(number, copy);
            scope.spawn(move || {
                echo_stream(connection);
                locked(open).remove(&number);
            });
        }
        // Shutting the connections down ends the reads of the threads above, for which the scope waits.
        for connection in locked(open).values() {
            connection.shutdown(Shutdown::Both).ok();
        }
    });
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Echoes a connection until it ends. Errors end the echo; the client sees them too.
fn echo_stream(mut connection: TcpStream) {
    let mut buffer = vec![0; 65536];
    while let Ok(read @ 1..) = connection.read(&mut buffer) {
        if connection.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
}

fn serve_udp(socket: &UdpSocket, stop: &UnixStream) {
    let mut buffer = vec![0; 65536];
    while readable(socket, stop) {
        // Errors are ICMP messages about earlier replies.
        if let Ok((read, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..read], from).ok();
        }
    }
}

fn tcp_exchange(server: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    let mut connection = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT).context("cannot connect")?;
    connection.set_read_timeout(Some(TCP_TIMEOUT))?;
    connection.set_write_timeout(Some(TCP_TIMEOUT))?;
    let mut writer = connection.try_clone()?;
    let mut answer = Vec::with_capacity(payload.len());
    thread::scope(|scope| {
        // Write and read concurrently: a large payload fills the buffers of both directions.
        let writing = scope.spawn(move || -> io::Result<()> {
            writer.write_all(payload)?;
            writer.shutdown(Shutdown::Write)
        });
        connection
            .read_to_end(&mut answer)
            .with_context(|| format!("no answer in {TCP_TIMEOUT:?} (read fails)"))?;
        match writing.join() {
            Ok(written) => written.context("cannot send"),
            Err(payload) => std::panic::resume_unwind(payload),
        }
    })?;
    Ok(answer)
}

fn udp_exchange(server: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    let own: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((own, 0))?;
    socket.connect(server).context("no route")?;
    socket.set_read_timeout(Some(UDP_TIMEOUT))?;
    socket.send(payload).context("cannot send")?;
    let mut buffer = vec![0; 65536];
    let read = uninterrupted(|| socket.recv(&mut buffer))
        .with_context(|| format!("no answer in {UDP_TIMEOUT:?}"))?;
    buffer.truncate(read);
    Ok(buffer)
}
