//! The thread that holds ports of this host: published ones, and those at which health checks are answered. Each
//! published port is bound, so that no other program gets it, and is served at `[::1]`, where the kernel would not
//! forward.
//!
//! Connections from other hosts never arrive here as long as the packet filter is in place. Without it they
//! are refused, because they would bypass the host's firewall.
//!
//! A thread of its own relays the data. Whether a port is free is answered at once, without that thread.

mod health;
mod holder;
mod relay;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use ovl_proto::id::EndpointId;
use ovl_proto::publish::{Published, Transport};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};

pub(crate) use health::Answer;

/// Listen backlog of a published port, in connections.
const BACKLOG: i32 = 128;

/// The number of ports of an endpoint from which on the memory for them is given back to the kernel when they are closed.
const MANY: usize = 1_024;
/// When it is given back: the rest of the daemon has detached the endpoint by then.
const TRIM_AFTER: Duration = Duration::from_secs(3);

/// A socket that is bound to a published port, with the container's port.
#[derive(Debug)]
pub(crate) enum Held {
    Tcp(TcpListener, u16),
    Udp(UdpSocket, u16),
}

/// Why a port cannot be bound.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Another program has bound the port.
    Taken {
        /// The port.
        port: u16,
        /// The process that has it. `None` if it cannot be determined.
        holder: Option<String>,
    },
    /// The address does not belong to this host.
    NoAddress(IpAddr),
    /// Another error.
    Other(io::Error),
}

enum Order {
    Serve(EndpointId, Vec<Held>, Vec<IpAddr>),
    Release(EndpointId),
    Answer(BTreeMap<u16, Answer>, Vec<(u16, TcpListener)>),
}

/// Handle of the thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub(crate) struct Ports(mpsc::UnboundedSender<Order>);

impl Ports {
    /// Starts the thread in the network namespace of the calling thread.
    pub(crate) fn start() -> io::Result<Self> {
        let (orders, inbox) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("ports".to_owned())
            .spawn(move || LocalSet::new().block_on(&runtime, obey(inbox)))?;
        Ok(Self(orders))
    }

    /// Keeps the ports of an endpoint and relays connections of this host itself to the endpoint's addresses,
    /// until [`Self::release`] is called.
    pub(crate) fn serve(&self, endpoint: EndpointId, held: Vec<Held>, targets: Vec<IpAddr>) {
        // The send cannot fail while the daemon runs: the thread ends only with it.
        let _ = self.0.send(Order::Serve(endpoint, held, targets));
    }

    /// Replaces the ports at which health checks are answered. Each port either was in the previous call, or
    /// has its listener in `new`.
    pub(crate) fn answer(&self, answers: BTreeMap<u16, Answer>, new: Vec<(u16, TcpListener)>) {
        let _ = self.0.send(Order::Answer(answers, new));
    }

    /// Closes all published ports of an endpoint.
    pub(crate) fn release(&self, endpoint: EndpointId) {
        let _ = self.0.send(Order::Release(endpoint));
    }
}

/// Handles orders until the sender is dropped.
async fn obey(mut inbox: mpsc::UnboundedReceiver<Order>) {
    let mut served: HashMap<EndpointId, JoinSet<()>> = HashMap::new();
    let mut trim = JoinSet::new();
    let mut answered: HashMap<u16, (Rc<RefCell<Answer>>, JoinSet<()>)> = HashMap::new();
    while let Some(order) = inbox.recv().await {
        match order {
            Order::Serve(endpoint, held, targets) => {
                let tasks = served.entry(endpoint).or_default();
                for held in held {
                    let targets = targets.clone();
                    match held {
                        Held::Tcp(listener, port) => tasks.spawn_local(relay::tcp(listener, port, targets)),
                        Held::Udp(socket, port) => tasks.spawn_local(relay::udp(socket, port, targets)),
                    };
                }
            }
            Order::Release(endpoint) => {
                // Dropping the tasks closes their sockets and the relayed connections.
                let count = served.remove(&endpoint).map_or(0, |tasks| tasks.len());
                if count >= MANY {
                    // The last release counts.
                    trim.shutdown().await;
                    trim.spawn_local(async {
                        tokio::time::sleep(TRIM_AFTER).await;
                        ovl_kernel::return_free_memory();
                    });
                }
            }
            Order::Answer(answers, new) => {
                answered.retain(|port, _| answers.contains_key(port));
                let mut new: HashMap<u16, TcpListener> = new.into_iter().collect();
                for (port, answer) in answers {
                    if let Some(listener) = new.remove(&port) {
                        let (shared, mut task) = (Rc::new(RefCell::new(answer)), JoinSet::new());
                        task.spawn_local(health::serve(listener, Rc::clone(&shared)));
                        answered.insert(port, (shared, task));
                    } else if let Some((shared, _)) = answered.get(&port) {
                        shared.replace(answer);
                    }
                }
            }
        }
    }
}

/// Binds all ports of a range, or none. SCTP ports are not bound: the kernel may not support such sockets,
/// and few programs use them.
pub(crate) fn hold(published: Published) -> Result<Vec<Held>, Refused> {
    published
        .pairs()
        .filter_map(|(host, container)| hold_one(published, host, container).transpose())
        .collect()
}

fn hold_one(published: Published, port: u16, container: u16) -> Result<Option<Held>, Refused> {
    let refused = |error: io::Error| match (error.raw_os_error(), published.address) {
        (Some(nix::libc::EADDRINUSE), _) => {
            Refused::Taken { port, holder: holder::of(published.transport, port) }
        }
        (Some(nix::libc::EADDRNOTAVAIL), Some(address)) => Refused::NoAddress(address),
        _ => Refused::Other(error),
    };
    match published.transport {
        Transport::Sctp => Ok(None),
        Transport::Tcp => {
            listen(published.address, port).map(|l| Some(Held::Tcp(l, container))).map_err(refused)
        }
        Transport::Udp => {
            bind(published.address, port).map(|s| Some(Held::Udp(s, container))).map_err(refused)
        }
    }
}

/// Listens on a TCP port at all addresses of this host.
///
/// # Errors
///
/// The reason why the port cannot be bound, as the end of a sentence.
pub(crate) fn listen_everywhere(port: u16) -> Result<TcpListener, String> {
    listen(None, port).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EADDRINUSE) => {
            let holder = holder::of(Transport::Tcp, port);
            format!("is in use by {}", holder.as_deref().unwrap_or("a program that cannot be seen from here"))
        }
        _ => format!("cannot be had: {error}"),
    })
}

fn listen(address: Option<IpAddr>, port: u16) -> io::Result<TcpListener> {
    let socket = socket(address, port, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn bind(address: Option<IpAddr>, port: u16) -> io::Result<UdpSocket> {
    socket(address, port, Type::DGRAM, Protocol::UDP).map(Into::into)
}

/// Binds a socket to an address and a port. `None` means all addresses of both families, as far as the kernel
/// supports them.
fn socket(address: Option<IpAddr>, port: u16, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let inet6 = ovl_kernel::has_inet6();
    let any = if inet6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let at = SocketAddr::new(address.unwrap_or(any), port);
    let socket = Socket::new(Domain::for_address(at), kind, Some(protocol))?;
    if at.is_ipv6() {
        socket.set_only_v6(address.is_some())?;
    }
    if kind == Type::STREAM {
        // Connections of the last run may linger. The option lets no other program have the port, because
        // this socket listens.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    Ok(socket)
}
