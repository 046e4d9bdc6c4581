//! Relays connections and datagrams of this host itself to an endpoint. The endpoint sees its gateway as
//! their source.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Time limit for an endpoint to accept a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after an error that persists for a while, such as no memory or too many open files.
const PAUSE: Duration = Duration::from_millis(200);
/// Time without an answer after which a UDP client is forgotten.
const IDLE: Duration = Duration::from_secs(60);
/// Maximum number of UDP clients of a port.
const MOST_CLIENTS: usize = 512;
/// Maximum number of connections to a port that are relayed at a time. Further clients wait.
const MOST_CONNECTIONS: usize = 4_096;
/// Maximum size of a datagram in bytes.
const DATAGRAM: usize = 65_535;

/// Returns the endpoint's address of the client's family, or its first address if it has none of that family.
fn target(targets: &[IpAddr], client: IpAddr) -> Option<IpAddr> {
    let same = targets.iter().find(|target| target.is_ipv4() == client.to_canonical().is_ipv4());
    same.or_else(|| targets.first()).copied()
}

/// Whether a client is of this host: its address is a loopback address, or it has asked `::1`, for which the kernel takes
/// packets from no other device. For 127.0.0.1 it does, with `route_localnet`.
fn is_of_this_host(client: SocketAddr, asked: io::Result<SocketAddr>) -> bool {
    client.ip().to_canonical().is_loopback() || asked.is_ok_and(|asked| asked.ip() == Ipv6Addr::LOCALHOST)
}

/// Relays TCP connections forever.
pub(super) async fn tcp(listener: std::net::TcpListener, port: u16, targets: Vec<IpAddr>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, port, "cannot serve a published port"),
    };
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MOST_CONNECTIONS {
            connections.join_next().await;
        }
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, port, "no connection to a published port can be taken");
                sleep(PAUSE).await;
                continue;
            }
        };
        match target(&targets, client.ip()) {
            Some(target) if is_of_this_host(client, stream.local_addr()) => {
                connections.spawn_local(connect(stream, SocketAddr::new(target, port)));
            }
            Some(_) | None => refuse(stream),
        }
    }
}

async fn connect(mut client: TcpStream, target: SocketAddr) {
    match timeout(PATIENCE, TcpStream::connect(target)).await {
        Ok(Ok(mut server)) => {
            let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
        Ok(Err(_)) | Err(_) => refuse(client),
    }
}

/// Closes a connection with a reset, as if no program listened.
fn refuse(stream: TcpStream) {
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}

/// UDP clients of a port, each with the socket that is connected to the endpoint on its behalf.
type Clients = Rc<RefCell<HashMap<SocketAddr, Rc<UdpSocket>>>>;

/// Relays datagrams and their answers forever.
pub(super) async fn udp(socket: std::net::UdpSocket, port: u16, targets: Vec<IpAddr>) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Rc::new(socket),
        Err(error) => return tracing::error!(%error, port, "cannot serve a published port"),
    };
    let clients = Clients::default();
    let mut answers = JoinSet::new();
    loop {
        let (datagram, client) = match receive(&socket, UdpSocket::try_recv_from).await {
            Ok(received) => received,
            // An answer that was sent to a closed port comes back as an error of the socket.
            Err(error) => {
                tracing::debug!(%error, port, "no datagram");
                continue;
            }
        };
        while answers.try_join_next().is_some() {}
        let Some(target) = target(&targets, client.ip()) else { continue };
        if !is_of_this_host(client, socket.local_addr()) {
            continue;
        }
        let known = clients.borrow().get(&client).cloned();
        let server = match known {
            Some(server) => server,
            None if clients.borrow().len() >= MOST_CLIENTS => continue,
            None => match connected(SocketAddr::new(target, port)).await {
                Ok(server) => {
                    let server = Rc::new(server);
                    clients.borrow_mut().insert(client, Rc::clone(&server));
                    let (socket, clients, server_side) =
                        (Rc::clone(&socket), Rc::clone(&clients), Rc::clone(&server));
                    answers.spawn_local(async move {
                        answer(&socket, client, &server_side).await;
                        clients.borrow_mut().remove(&client);
                    });
                    server
                }
                Err(error) => {
                    tracing::debug!(%error, port, "cannot pass a datagram on");
                    continue;
                }
            },
        };
        let _ = server.send(&datagram).await;
    }
}

thread_local! {
    /// The buffer for datagrams of all ports of the thread: one for each would be a gigabyte for 16,384 ports.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; DATAGRAM]);
}

/// Receives a datagram, with what `receive` says of it besides its length.
async fn receive<T>(
    socket: &UdpSocket,
    receive: impl Fn(&UdpSocket, &mut [u8]) -> io::Result<(usize, T)>,
) -> io::Result<(Vec<u8>, T)> {
    loop {
        socket.readable().await?;
        let received: io::Result<_> = BUFFER.with_borrow_mut(|buffer| {
            let (length, from) = receive(socket, buffer)?;
            Ok((buffer.get(..length).unwrap_or_default().to_vec(), from))
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

async fn connected(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

/// Relays the endpoint's datagrams to a client until there are none for [`IDLE`].
async fn answer(socket: &UdpSocket, client: SocketAddr, server: &UdpSocket) {
    let from_server = |server: &UdpSocket, buffer: &mut [u8]| Ok((server.try_recv(buffer)?, ()));
    while let Ok(Ok((datagram, ()))) = timeout(IDLE, receive(server, from_server)).await {
        let _ = socket.send_to(&datagram, client).await;
    }
}
