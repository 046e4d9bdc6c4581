//! Servers that say who they are and whom they see, behind Services.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, wait_until};

use crate::SOON;

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a server looks whether it shall end.
const TURN: Duration = Duration::from_millis(50);

/// A server of TCP and UDP at one port, which answers with its name and the address that it sees. It ends when
/// this is dropped.
#[derive(Debug)]
pub struct Named {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Named {
    /// Starts one in a namespace.
    pub fn start(netns: &Netns, name: &str, port: u16) -> Result<Self> {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let (tcp, udp) =
            netns.run(|| Ok::<_, io::Error>((TcpListener::bind(at)?, UdpSocket::bind(at)?)))??;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(TURN))?;
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

impl Drop for Named {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn line(name: &str, from: SocketAddr) -> String {
    format!("{name} {}", from.ip().to_canonical())
}

/// Each connection has a thread that says who it is, and says it again for each byte that it gets.
fn answer(mut stream: TcpStream, name: &str, from: SocketAddr) {
    let line = format!("{:<63}\n", line(name, from));
    thread::spawn(move || {
        let _ = stream.set_nonblocking(false);
        let mut byte = [0];
        while stream.write_all(line.as_bytes()).is_ok() && matches!(stream.read(&mut byte), Ok(1)) {}
    });
}

/// Who answered, and from where it saw the question come.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// The server's name.
    pub name: String,
    /// The client, as the server sees it.
    pub seen: IpAddr,
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (name, seen) = text.trim().split_once(' ').with_context(|| format!("{text:?}"))?;
    Ok(Answer { name: name.to_owned(), seen: seen.trim().parse()? })
}

/// A connection that stays.
#[derive(Debug)]
pub struct Connection(TcpStream);

impl Connection {
    /// Opens one; an error is as the system gives it.
    pub fn open(from: &Netns, to: SocketAddr) -> Result<io::Result<Self>> {
        from.run(|| {
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(Self(stream))
        })
    }

    /// Reads the next answer.
    pub fn hear(&mut self) -> Result<Answer> {
        let mut line = [0; 64];
        self.0.read_exact(&mut line)?;
        parse(&line)
    }

    /// Asks for one more.
    pub fn ask(&mut self) -> Result<Answer> {
        self.0.write_all(b"?")?;
        self.hear()
    }
}

/// Asks once, over a new connection.
pub fn ask(from: &Netns, to: SocketAddr) -> Result<Answer> {
    Connection::open(from, to)??.hear()
}

/// Asks until exactly these have answered over a while.
pub fn wait_answers(from: &Netns, to: SocketAddr, names: &[&str]) -> Result<()> {
    wait_until(SOON, &format!("answers of {names:?} from {to}"), || {
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

/// A socket of UDP that keeps its port.
#[derive(Debug)]
pub struct Datagrams(UdpSocket);

impl Datagrams {
    /// One for a destination.
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

    /// Sends one and waits for the answer.
    pub fn ask(&self) -> io::Result<Answer> {
        let mut buffer = [0; 64];
        self.0.send(b"?")?;
        let length = self.0.recv(&mut buffer)?;
        parse(buffer.get(..length).unwrap_or_default()).map_err(io::Error::other)
    }
}

/// Applies a manifest on a host.
pub fn apply(lab: &Lab, host: &Host, manifest: &str) -> Result<String> {
    let path = lab.dir().join("manifest.yaml");
    std::fs::write(&path, manifest)?;
    host.ctl_ok(&["apply", "-f", &path.display().to_string()])
}
