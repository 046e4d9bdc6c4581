//! A fake DNS resolver with a chosen behaviour, and wrappers for dnsmasq and dig.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, LabConfig, Netns, Spawned, wait_until};

/// How a [`FakeResolver`] answers UDP queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers 192.0.2.7 with a TTL of 60 s.
    Answers,
    /// Answers NXDOMAIN with a negative TTL of 60 s.
    NxDomain,
    /// Answers after this time.
    Delayed(Duration),
    /// Never answers.
    Silent,
    /// Sends answers with a wrong ID, about another name, and from another port, and then the right one.
    Spoofed,
    /// Truncates its UDP answer, and answers over TCP.
    Truncated,
    /// Answers SERVFAIL.
    ServFail,
}

/// A resolver on port 53 of a host's address. It is stopped when dropped.
#[derive(Debug)]
pub struct FakeResolver {
    asked: Arc<AtomicUsize>,
    streams: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl FakeResolver {
    /// Starts a resolver.
    pub fn start(host: &Host, address: Ipv4Addr, behaviour: Behaviour) -> Result<Self> {
        let sockets = host.run(move || -> std::io::Result<_> {
            let udp = UdpSocket::bind((address, 53))?;
            Ok((udp, UdpSocket::bind((address, 0))?, TcpListener::bind((address, 53))?))
        })?;
        let (udp, other, tcp) = sockets.context("binding port 53")?;
        udp.set_read_timeout(Some(POLL_INTERVAL))?;
        tcp.set_nonblocking(true)?;
        let (asked, streams, ending) = (Arc::default(), Arc::default(), Arc::new(AtomicBool::new(false)));
        let datagrams = {
            let (asked, ending) = (Arc::clone(&asked), Arc::clone(&ending));
            thread::spawn(move || by_udp(&udp, &other, behaviour, &asked, &ending))
        };
        let connections = {
            let (streams, ending) = (Arc::clone(&streams), Arc::clone(&ending));
            thread::spawn(move || by_tcp(&tcp, &streams, &ending))
        };
        Ok(Self { asked, streams, ending, threads: vec![datagrams, connections] })
    }

    /// Number of UDP queries so far.
    pub fn udp_queries(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Number of TCP connections so far.
    pub fn tcp_connections(&self) -> usize {
        self.streams.load(Ordering::SeqCst)
    }
}

impl Drop for FakeResolver {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn by_udp(
    socket: &UdpSocket,
    other: &UdpSocket,
    behaviour: Behaviour,
    asked: &AtomicUsize,
    ending: &AtomicBool,
) {
    let mut buffer = [0; 2048];
    while !ending.load(Ordering::SeqCst) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        asked.fetch_add(1, Ordering::SeqCst);
        let query = &buffer[..length];
        let send = |message: &[u8]| drop(socket.send_to(message, from));
        match behaviour {
            Behaviour::Answers => send(&answer(query, [192, 0, 2, 7])),
            Behaviour::NxDomain => send(&denial(query)),
            Behaviour::Delayed(time) => {
                let (late, socket) = (answer(query, [192, 0, 2, 7]), socket.try_clone());
                thread::spawn(move || {
                    thread::sleep(time);
                    socket.map(|socket| socket.send_to(&late, from)).ok()
                });
            }
            Behaviour::Silent => {}
            Behaviour::Spoofed => {
                let lie = answer(query, [198, 51, 100, 66]);
                let mut wrong_id = lie.clone();
                wrong_id[0] ^= 0xff;
                send(&wrong_id);
                let mut wrong_name = lie.clone();
                wrong_name[13] ^= 1;
                send(&wrong_name);
                let _ = other.send_to(&lie, from);
                send(&answer(query, [192, 0, 2, 7]));
            }
            Behaviour::Truncated => {
                let mut cut = head(query, 0x8380, 0);
                cut.extend_from_slice(question(query));
                send(&cut);
            }
            Behaviour::ServFail => {
                let mut failed = head(query, 0x8182, 0);
                failed.extend_from_slice(question(query));
                send(&failed);
            }
        }
    }
}

fn by_tcp(listener: &TcpListener, streams: &AtomicUsize, ending: &AtomicBool) {
    while !ending.load(Ordering::SeqCst) {
        let Ok((mut stream, _)) = listener.accept() else {
            thread::sleep(POLL_INTERVAL);
            continue;
        };
        streams.fetch_add(1, Ordering::SeqCst);
        let mut work = || -> std::io::Result<()> {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut query)?;
            let answer = answer(&query, [192, 0, 2, 7]);
            stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())
        };
        let _ = work();
    }
}

fn head(query: &[u8], flags: u16, answers: u8) -> Vec<u8> {
    let mut head = query[..2].to_vec();
    head.extend_from_slice(&flags.to_be_bytes());
    head.extend_from_slice(&[0, 1, 0, answers, 0, 0, 0, 0]);
    head
}

fn question(query: &[u8]) -> &[u8] {
    let mut at = 12;
    while query[at] != 0 {
        at += 1 + usize::from(query[at]);
    }
    &query[12..at + 5]
}

/// Answers an A query for any name with one address, and other types with no record.
fn answer(query: &[u8], address: [u8; 4]) -> Vec<u8> {
    let question = question(query);
    let is_a = question[question.len() - 4..] == [0, 1, 0, 1];
    let mut answer = head(query, 0x8180, u8::from(is_a));
    answer.extend_from_slice(question);
    if is_a {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend_from_slice(&address);
    }
    answer
}

/// Answers NXDOMAIN with a SOA record of the root, whose minimum is 60 s.
fn denial(query: &[u8]) -> Vec<u8> {
    let mut denial = head(query, 0x8183, 0);
    denial[9] = 1;
    denial.extend_from_slice(question(query));
    denial.extend_from_slice(&[0, 0, 6, 0, 1, 0, 0, 0, 60, 0, 22, 0, 0]);
    for number in [1u32, 60, 60, 60, 60] {
        denial.extend_from_slice(&number.to_be_bytes());
    }
    denial
}

/// Returns the configuration of a lab whose hosts forward external names to these servers, with further lines of
/// configuration.
pub fn config(hosts: usize, servers: &[&str], more: &str) -> Result<(LabConfig, ResolvConf)> {
    let file = ResolvConf::new(servers)?;
    let config = LabConfig::hosts(hosts).config(&format!("resolv_conf = \"{}\"\n{more}", file.path()));
    Ok((config, file))
}

/// A resolv.conf of one test. It is removed when dropped.
#[derive(Debug)]
pub struct ResolvConf(std::path::PathBuf);

impl ResolvConf {
    fn new(servers: &[&str]) -> Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("ovl-resolv-{}-{number}.conf", std::process::id());
        let file = Self(std::env::temp_dir().join(name));
        file.set(servers)?;
        Ok(file)
    }

    /// Replaces the servers.
    pub fn set(&self, servers: &[&str]) -> Result<()> {
        let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        std::fs::write(&self.0, lines).context("writing a resolv.conf")
    }

    /// Replaces the content.
    pub fn write(&self, content: &[u8]) -> Result<()> {
        std::fs::write(&self.0, content).context("writing a resolv.conf")
    }

    /// Removes the file.
    pub fn remove(&self) -> Result<()> {
        std::fs::remove_file(&self.0).context("removing a resolv.conf")
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for ResolvConf {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Starts dnsmasq on an address and port of a host, with only these records, and waits until it answers. It is
/// stopped when dropped.
pub fn dnsmasq(host: &Host, address: &str, port: u16, names: &[&str]) -> Result<Spawned> {
    let (listen, at) = (format!("--listen-address={address}"), format!("--port={port}"));
    let mut command = vec!["dnsmasq", "-k", "--bind-interfaces", "--no-resolv", "--no-hosts", "--pid-file="];
    command.extend(["--conf-file=/dev/null", "--host-record=is-up.test,192.0.2.1", &listen, &at]);
    command.extend(names);
    let server = host.spawn(command)?;
    wait_until(crate::SOON, "dnsmasq to answer", || {
        let found = dig(host, address, &["-p", &port.to_string(), "is-up.test"])?;
        ensure!(found == ["192.0.2.1"], "{found:?}");
        Ok(())
    })?;
    Ok(server)
}

/// Output lines of `dig +short` from a namespace, sorted.
pub fn dig(from: &Netns, server: &str, question: &[&str]) -> Result<Vec<String>> {
    let at = format!("@{server}");
    let args = [&["dig", "+short", "+time=5", "+tries=1", &at], question].concat();
    let output = from.exec(args.iter().copied())?;
    ensure!(output.success(), "`{}`: {}{}", args.join(" "), output.stdout, output.stderr);
    let mut lines: Vec<String> = output.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// Response code of a query: `NOERROR`, `NXDOMAIN` and so on.
pub fn status(from: &Netns, server: &str, question: &[&str]) -> Result<String> {
    let at = format!("@{server}");
    let args = [&["dig", "+time=5", "+tries=1", &at], question].concat();
    let output = from.exec(args.iter().copied())?;
    let (_, rest) = output.stdout.split_once("status: ").with_context(|| output.stdout.clone())?;
    Ok(rest.split(',').next().unwrap_or_default().to_owned())
}
