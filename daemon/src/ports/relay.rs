//! What comes from this host itself is passed on to an endpoint, which sees it come from its gateway.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long an endpoint may take to take a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// After an error that will not go away at once: no memory, too many files.
const PAUSE: Duration = Duration::from_millis(200);
/// A client of UDP that says nothing for so long is forgotten.
const IDLE: Duration = Duration::from_secs(60);
/// So many clients of UDP are remembered for a port.
const MOST_CLIENTS: usize = 512;
/// So many connections to a port are passed on at once; more have to wait.
const MOST_CONNECTIONS: usize = 4_096;
/// The largest datagram.
const DATAGRAM: usize = 65_535;

/// The endpoint's address: of the client's family, if it has such a one.
fn target(targets: &[IpAddr], client: IpAddr) -> Option<IpAddr> {
    let same = targets.iter().find(|target| target.is_ipv4() == client.to_canonical().is_ipv4());
    same.or_else(|| targets.first()).copied()
}

/// Passes connections on, for ever.
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
            Some(target) if client.ip().to_canonical().is_loopback() => {
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

/// As if nobody listened: with a reset.
fn refuse(stream: TcpStream) {
    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}

/// Clients of a port, each with the socket by which the endpoint knows it.
type Clients = Rc<RefCell<HashMap<SocketAddr, Rc<UdpSocket>>>>;

/// Passes datagrams on, and answers back, for ever.
pub(super) async fn udp(socket: std::net::UdpSocket, port: u16, targets: Vec<IpAddr>) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Rc::new(socket),
        Err(error) => return tracing::error!(%error, port, "cannot serve a published port"),
    };
    let clients = Clients::default();
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An answer that met nobody comes back as an error of the socket.
            Err(error) => {
                tracing::debug!(%error, port, "no datagram");
                continue;
            }
        };
        while answers.try_join_next().is_some() {}
        let Some(target) = target(&targets, client.ip()) else { continue };
        if !client.ip().to_canonical().is_loopback() {
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
        let _ = server.send(buffer.get(..length).unwrap_or_default()).await;
    }
}

async fn connected(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

/// Brings a client what the endpoint says, until that is silent.
async fn answer(socket: &UdpSocket, client: SocketAddr, server: &UdpSocket) {
    let mut buffer = vec![0; DATAGRAM];
    while let Ok(Ok(length)) = timeout(IDLE, server.recv(&mut buffer)).await {
        let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), client).await;
    }
}
