//! Helpers for tests of the fast path.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, wait_until};

use crate::routed::{create_routed_network, ensure_sees_own_address};
use crate::service::{NamedServer, ask};
use crate::{Attached, SOON, attach, create_network, ping_all_pairs, problems, wait_clean};

/// The setting that turns the fast path on.
pub const ON: &str = "fast_path = \"on\"";
/// Subnets of both address families, for a routed network.
pub const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
/// The same for a switched one.
pub const BOTH_SWITCHED: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
/// The port of the servers.
pub const PORT: u16 = 80;
/// In place of the backend of a routed network.
pub const SWITCHED: &str = "switched";

/// A lab of this number of hosts with the fast path.
pub fn lab(hosts: usize) -> LabConfig {
    LabConfig::hosts(hosts).config(ON)
}

/// The packets that took the fast path (or were left to the stack: `slow`) on a host, by their way or the reason.
pub fn counted(host: &Host, kind: &str) -> BTreeMap<String, u64> {
    let status = host.ctl_json(&["status"]).unwrap();
    let counters = status["fast_path"][kind].as_object().cloned().unwrap_or_default();
    counters.into_iter().map(|(name, value)| (name, value.as_u64().unwrap())).collect()
}

/// Waits until packets of these ways take the fast path on a host while `work` is done again and again.
pub fn wait_fast(host: &Host, ways: &[&str], mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let name = format!("{ways:?} by the fast path on {}", host.name());
    wait_until(SOON, &name, || {
        let before = counted(host, "fast");
        work()?;
        let after = counted(host, "fast");
        for way in ways {
            let [before, after] = [&before, &after].map(|all| all.get(*way).copied().unwrap_or_default());
            // Most of a handshake and an answer.
            ensure!(
                after >= before + 2,
                "{way}: {before} and then {after}; left: {:?}",
                counted(host, "slow")
            );
        }
        Ok(())
    })
}

/// Returns the address of a port.
pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Asks over TCP and UDP at each address of an endpoint, which must see the client's own.
pub fn talk(from: &Attached, to: &Attached) -> Result<()> {
    for (to, own) in to.addresses().iter().zip(from.addresses()) {
        ensure!(ask(&from.workload, at(to, PORT))?.seen == own.parse::<IpAddr>()?, "at {to}");
        ask_udp(&from.workload, at(to, PORT), 3)?;
    }
    Ok(())
}

/// Asks several times over UDP, from one port.
pub fn ask_udp(from: &Netns, to: SocketAddr, times: usize) -> Result<()> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = from.run(|| UdpSocket::bind(any))??;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect(to)?;
    for _ in 0..times {
        socket.send(b"?")?;
        socket.recv(&mut [0; 64])?;
    }
    Ok(())
}

/// Sends bytes over TCP, in both directions at once, and checks that they arrive as they were.
pub fn transfer(from: &Netns, to: &Netns, address: IpAddr) -> Result<()> {
    const LENGTH: usize = 4 << 20;
    let bytes = |seed: u8| -> Vec<u8> { (0..LENGTH).map(|n| (n * 7 + n / 256) as u8 ^ seed).collect() };
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0)))??;
    let port = listener.local_addr()?.port();
    let client = from.run(|| TcpStream::connect_timeout(&SocketAddr::new(address, port), SOON))??;
    let (server, _) = listener.accept()?;
    let swap = |stream: TcpStream, seed: u8, wanted: u8| -> Result<()> {
        stream.set_read_timeout(Some(SOON))?;
        let mut writer = stream.try_clone()?;
        let sent = thread::spawn(move || writer.write_all(&bytes(seed)));
        let mut received = vec![0; LENGTH];
        (&stream).read_exact(&mut received)?;
        ensure!(received == bytes(wanted), "other bytes arrived");
        Ok(sent.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??)
    };
    thread::scope(|scope| {
        let serving = scope.spawn(|| swap(server, 1, 2));
        swap(client, 2, 1)?;
        serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
    })
}

/// Endpoints on two hosts, each with a server.
#[derive(Debug)]
pub struct Pods {
    /// The lab.
    pub lab: Lab,
    /// On the first host.
    pub a: Attached,
    /// On the first host, too.
    pub b: Attached,
    /// On the second one.
    pub c: Attached,
    /// Their servers.
    pub servers: Vec<NamedServer>,
}

impl Pods {
    /// Creates the network `pods` (of a routed backend, or [`SWITCHED`]) and attaches endpoints with the label `app=web`.
    pub fn start(lab: Lab, backend: &str, subnets: &[&str]) -> Result<Self> {
        match backend {
            SWITCHED => create_network(&lab, "pods", subnets)?,
            _ => create_routed_network(&lab, "pods", &[&["--backend", backend], subnets].concat())?,
        }
        let attach = |host: &str, name: &str| attach(&lab[host], name, "pods", &["--label", "app=web"]);
        let (a, b, c) = (attach("h1", "a")?, attach("h1", "b")?, attach("h2", "c")?);
        let serve = |each: &Attached| NamedServer::start(&each.workload, &each.name, PORT);
        let servers = vec![serve(&a)?, serve(&b)?, serve(&c)?];
        ping_all_pairs(&[&a, &b, &c].map(Clone::clone), SOON)?;
        Ok(Self { lab, a, b, c, servers })
    }

    /// Waits until traffic between all takes the fast path, to the other host by the way `out` and from it by `into`.
    pub fn wait_fast(&self, [out, into]: [&str; 2]) -> Result<()> {
        let Self { lab, a, b, c, .. } = self;
        wait_fast(&lab["h1"], &["local"], || talk(a, b).and_then(|()| talk(b, a)))?;
        wait_fast(&lab["h1"], &[out, into], || talk(a, c))?;
        wait_fast(&lab["h2"], &[out, into], || talk(c, b))
    }

    /// Fails if much does not arrive as it was sent, or servers do not see who asks.
    pub fn ensure_transferred(&self) -> Result<()> {
        let Self { a, b, c, .. } = self;
        for (from, to) in [(a, b), (a, c), (c, a)] {
            ensure_sees_own_address(from, to)?;
            for address in to.addresses() {
                transfer(&from.workload, &to.workload, address.parse()?)?;
            }
        }
        Ok(())
    }

    /// Fails if something is left to be done on a host, or it has a problem.
    pub fn ensure_well(&self) -> Result<()> {
        wait_clean(self.lab.hosts(), SOON)?;
        for host in self.lab.hosts() {
            let problems = problems(host)?;
            ensure!(problems.is_empty(), "on {}: {problems:?}", host.name());
        }
        Ok(())
    }
}
