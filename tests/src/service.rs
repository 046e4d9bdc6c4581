//! Servers behind Services that return their own name and the client's address, and their clients.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, uninterrupted, wait_until};

use crate::SOON;

/// How long a client waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a server checks whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A Service `shop` with port 8000, of the endpoints with the label `app: web`, which listen on port 80.
pub const SHOP: &str = "apiVersion: v1
kind: Service
metadata:
  name: shop
spec:
  selector:
    app: web
  ports:
  - port: 8000
    targetPort: 80
";

/// A TCP and UDP server on one port, which answers with its name and the client's address. It is stopped when
/// dropped.
#[derive(Debug)]
pub struct NamedServer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl NamedServer {
    /// Starts a server in a namespace.
    pub fn start(netns: &Netns, name: &str, port: u16) -> Result<Self> {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let (tcp, udp) =
            netns.run(|| Ok::<_, io::Error>((TcpListener::bind(at)?, UdpSocket::bind(at)?)))??;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(POLL_INTERVAL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (named, ended) = (name.to_owned(), Arc::clone(&stop));
        let of_tcp = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((stream, from)) => answer(stream, &named, from),
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        let (named, ended) = (name.to_owned(), Arc::clone(&stop));
        let of_udp = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok((_, from)) = udp.recv_from(&mut [0; 64]) {
                    let _ = udp.send_to(line(&named, from).as_bytes(), from);
                }
            }
        });
        Ok(Self { stop, threads: vec![of_tcp, of_udp] })
    }
}

impl Drop for NamedServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn line(name: &str, from: SocketAddr) -> String {
    format!("{name} {}", from.ip().to_canonical())
}

/// Answers a connection in a thread of its own: once on connect, and once more for each byte received.
fn answer(mut stream: TcpStream, name: &str, from: SocketAddr) {
    let line = format!("{:<63}\n", line(name, from));
    thread::spawn(move || {
        let _ = stream.set_nonblocking(false);
        let mut byte = [0];
        while stream.write_all(line.as_bytes()).is_ok() && matches!(stream.read(&mut byte), Ok(1)) {}
    });
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// The server's name.
    pub name: String,
    /// The client's address, as the server saw it.
    pub seen: IpAddr,
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (name, seen) = text.trim().split_once(' ').with_context(|| format!("{text:?}"))?;
    Ok(Answer { name: name.to_owned(), seen: seen.trim().parse()? })
}

/// A TCP connection that stays open.
#[derive(Debug)]
pub struct Connection(TcpStream);

impl Connection {
    /// Connects. The inner error is the system's, so that tests can check its kind.
    pub fn open(from: &Netns, to: SocketAddr) -> Result<io::Result<Self>> {
        from.run(|| {
            let stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            Ok(Self(stream))
        })
    }

    /// Reads the next answer.
    pub fn read_answer(&mut self) -> Result<Answer> {
        let mut line = [0; 64];
        self.0.read_exact(&mut line)?;
        parse(&line)
    }

    /// Sends a byte and reads one more answer.
    pub fn ask(&mut self) -> Result<Answer> {
        self.0.write_all(b"?")?;
        self.read_answer()
    }
}

/// Asks once, over a new connection.
pub fn ask(from: &Netns, to: SocketAddr) -> Result<Answer> {
    Connection::open(from, to)??.read_answer()
}

/// Waits until exactly these servers answer a series of new connections.
pub fn wait_answers(from: &Netns, to: SocketAddr, names: &[&str]) -> Result<()> {
    wait_until(SOON, &format!("exactly {names:?} to answer at {to}"), || {
        let mut seen: Vec<String> = Vec::new();
        for _ in 0..names.len() * 16 {
            seen.push(ask(from, to)?.name);
        }
        seen.sort();
        seen.dedup();
        ensure!(seen == names, "{seen:?}");
        Ok(())
    })
}

/// A connected UDP socket, which keeps its source port.
#[derive(Debug)]
pub struct UdpClient(UdpSocket);

impl UdpClient {
    /// Opens a socket to a destination.
    pub fn open(from: &Netns, to: SocketAddr) -> Result<Self> {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
        let socket = from.run(|| {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok::<_, io::Error>(socket)
        })??;
        Ok(Self(socket))
    }

    /// Sends a datagram and waits for the answer.
    pub fn ask(&self) -> io::Result<Answer> {
        let mut buffer = [0; 64];
        self.0.send(b"?")?;
        let length = uninterrupted(|| self.0.recv(&mut buffer))?;
        parse(buffer.get(..length).unwrap_or_default()).map_err(io::Error::other)
    }
}

/// Applies a manifest on a host.
pub fn apply(lab: &Lab, host: &Host, manifest: &str) -> Result<String> {
    let path = lab.dir().join("manifest.yaml");
    std::fs::write(&path, manifest)?;
    host.ctl_ok(&["apply", "-f", &path.display().to_string()])
}
