//! Ports of this host that are published: held, so that nobody else gets them, and answered at `[::1]`, where the
//! kernel would not forward. Whatever comes from another host never gets here, as long as the packet filter stands; if
//! it does not, it is refused: it would pass by the host's firewall.
//!
//! A thread of its own passes on; who only wants to know whether a port is free has the answer at once.

mod health;
mod holder;
mod relay;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::rc::Rc;
use std::thread;

use ovl_proto::id::EndpointId;
use ovl_proto::publish::{Published, Transport};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};

pub(crate) use health::Answer;

/// Connections that wait to be passed on.
const BACKLOG: i32 = 128;

/// A port of this host that is ours.
#[derive(Debug)]
pub(crate) enum Held {
    Tcp(TcpListener, u16),
    Udp(UdpSocket, u16),
}

/// Why a port could not be had.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Somebody else has it.
    Taken {
        /// The port.
        port: u16,
        /// Who, as far as it can be found out.
        holder: Option<String>,
    },
    /// The address is not one of this host's.
    NoAddress(IpAddr),
    /// Something else.
    Other(io::Error),
}

enum Order {
    Serve(EndpointId, Vec<Held>, Vec<IpAddr>),
    Release(EndpointId),
    Answer(BTreeMap<u16, Answer>, Vec<(u16, TcpListener)>),
}

/// The way to the thread; it ends with this.
pub(crate) struct Ports(mpsc::UnboundedSender<Order>);

impl Ports {
    /// Starts the thread, in the network namespace of the calling one.
    pub(crate) fn start() -> io::Result<Self> {
        let (orders, inbox) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("ports".to_owned())
            .spawn(move || LocalSet::new().block_on(&runtime, obey(inbox)))?;
        Ok(Self(orders))
    }

    /// Keeps ports for an endpoint, and passes on to its addresses what comes from this host itself. Until
    /// [`Self::release`].
    pub(crate) fn serve(&self, endpoint: EndpointId, held: Vec<Held>, targets: Vec<IpAddr>) {
        // The thread ends with the daemon alone.
        let _ = self.0.send(Order::Serve(endpoint, held, targets));
    }

    /// Answers health checks at these ports from now on, and at no others. Each either was among them the last
    /// time, or has its listener among `new`.
    pub(crate) fn answer(&self, answers: BTreeMap<u16, Answer>, new: Vec<(u16, TcpListener)>) {
        let _ = self.0.send(Order::Answer(answers, new));
    }

    /// Lets go of all ports of an endpoint.
    pub(crate) fn release(&self, endpoint: EndpointId) {
        let _ = self.0.send(Order::Release(endpoint));
    }
}

/// Runs until nobody can send orders any more.
async fn obey(mut inbox: mpsc::UnboundedReceiver<Order>) {
    let mut served: HashMap<EndpointId, JoinSet<()>> = HashMap::new();
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
            // With the tasks go their sockets, and with these what was passed on.
            Order::Release(endpoint) => drop(served.remove(&endpoint)),
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

/// Takes all ports of a range, or none. SCTP's are not held: a kernel may have no such sockets, and few programs do.
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

/// A port of TCP at all addresses of this host; else why it cannot be had, as the end of a sentence.
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

/// At that address; nothing: at all of both families, as far as the kernel has them.
fn socket(address: Option<IpAddr>, port: u16, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let inet6 = ovl_kernel::has_inet6();
    let any = if inet6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let at = SocketAddr::new(address.unwrap_or(any), port);
    let socket = Socket::new(Domain::for_address(at), kind, Some(protocol))?;
    if at.is_ipv6() {
        socket.set_only_v6(address.is_some())?;
    }
    if kind == Type::STREAM {
        // Connections of the last run may linger. It opens the port to nobody: this one listens.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    Ok(socket)
}
