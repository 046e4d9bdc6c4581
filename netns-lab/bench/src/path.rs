//! `path`: the way of a packet from pod to pod: raw veth, bridge and VXLAN by hand, ovl's kernel path and its fast path.
//!
//! All stand side by side in labs of their own. A round takes each of them once, every second round backwards, and all
//! ratios are of one round: other work on the machine then affects both sides alike.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Lab, Workload, wait_until};
use serde_json::json;

use super::Bench;
use super::by_hand;
use super::client::{self, Client};
use super::cluster::address_of;
use super::cni::ground::{create_network, network};
use super::report::{Bar, Figure, Row};
use super::stats::Samples;
use super::tunnel::processes::pin_this_thread;

const HOSTS: usize = 2;
/// Bytes of a datagram's payload.
const SMALL: usize = 64;
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of one write to a stream.
const CHUNK: usize = 64 << 10;

/// One way from one workload to another.
struct Way {
    name: String,
    from: Workload,
    to: Workload,
    target: IpAddr,
}

/// What one turn measured.
struct Turn {
    /// Round trip of a datagram, p50, in microseconds.
    round_trip: f64,
    /// Datagrams a second, in thousands.
    packets: f64,
    /// One TCP stream, in Gbit/s.
    stream: f64,
}

impl Way {
    /// Takes a turn. Sender, receiver and all of the kernel's work for the packets share one core, except for the stream.
    fn turn(&self, time: Duration) -> Result<Turn> {
        let bind = |workload: &Workload| -> Result<UdpSocket> {
            let any: SocketAddr = "0.0.0.0:0".parse()?;
            let socket = workload.run(|| UdpSocket::bind(any))??;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            Ok(socket)
        };
        let (client, server) = (bind(&self.from)?, bind(&self.to)?);
        client.connect((self.target, server.local_addr()?.port()))?;
        let round_trip = round_trips(&client, &server, time)?;
        let packets = packets(&client, time)?;
        let stream = self.stream(time)?;
        Ok(Turn { round_trip, packets, stream })
    }

    fn stream(&self, time: Duration) -> Result<f64> {
        let at = SocketAddr::new(self.target, 0);
        let listener = self.to.run(|| TcpListener::bind(at))??;
        let port = listener.local_addr()?.port();
        let client = self.from.run(|| TcpStream::connect((self.target, port)))??;
        let (mut server, _) = listener.accept()?;
        thread::scope(|scope| {
            let receiving = scope.spawn(move || -> Result<f64> {
                let (mut buffer, mut bytes) = (vec![0; CHUNK], 0_u64);
                let start = Instant::now();
                loop {
                    match server.read(&mut buffer)? {
                        0 => return Ok(bytes as f64 * 8.0 / 1e9 / start.elapsed().as_secs_f64()),
                        length => bytes += length as u64,
                    }
                }
            });
            let sending = scope.spawn(move || -> Result<()> {
                let mut client = client;
                let (buffer, start) = (vec![0; CHUNK], Instant::now());
                while start.elapsed() < time {
                    client.write_all(&buffer)?;
                }
                Ok(())
            });
            sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?
        })
    }
}

/// Returns the median round trip of a small datagram, in microseconds.
fn round_trips(client: &UdpSocket, server: &UdpSocket, time: Duration) -> Result<f64> {
    let echo = server.try_clone()?;
    thread::scope(|scope| {
        let echoing = scope.spawn(move || -> Result<()> {
            pin_this_thread()?;
            let mut buffer = [0; SMALL];
            // The last one is shorter.
            loop {
                let (length, from) = echo.recv_from(&mut buffer)?;
                echo.send_to(&buffer[..length], from)?;
                if length < SMALL {
                    return Ok(());
                }
            }
        });
        let asking = scope.spawn(move || -> Result<f64> {
            pin_this_thread()?;
            let (mut times, start) = (Vec::new(), Instant::now());
            let mut buffer = [0; SMALL];
            while start.elapsed() < time {
                let sent = Instant::now();
                client.send(&buffer)?;
                client.recv(&mut buffer)?;
                times.push(sent.elapsed().as_secs_f64() * 1e6);
            }
            client.send(&[0])?;
            client.recv(&mut buffer)?;
            Ok(Samples::new(times).median())
        });
        let median = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        echoing.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        Ok(median)
    })
}

/// Returns how many small datagrams a second pass, in thousands. They end at a full socket that is not read; the whole path
/// runs in the sender's system call, so its rate is that of the path.
fn packets(client: &UdpSocket, time: Duration) -> Result<f64> {
    thread::scope(|scope| {
        let sending = scope.spawn(move || -> Result<f64> {
            pin_this_thread()?;
            let (mut sent, start) = (0_u32, Instant::now());
            while start.elapsed() < time {
                for _ in 0..64 {
                    client.send(&[0; SMALL])?;
                }
                sent += 64;
            }
            Ok(f64::from(sent) / 1000.0 / start.elapsed().as_secs_f64())
        });
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?
    })
}

/// A veth pair between two namespaces, and nothing else.
fn raw(host: &Host) -> Result<Way> {
    let [from, to] = ["raw-a", "raw-b"].map(|name| host.workload(name));
    let (from, to) = (from?, to?);
    host.exec_ok([
        "ip",
        "link",
        "add",
        "eth0",
        "netns",
        from.netns_name(),
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        to.netns_name(),
    ])?;
    for (workload, address) in [(&from, "10.97.0.1/24"), (&to, "10.97.0.2/24")] {
        workload.exec_ok(["ip", "addr", "add", address, "dev", "eth0"])?;
        workload.exec_ok(["ip", "link", "set", "eth0", "up"])?;
    }
    Ok(Way { name: "raw".to_owned(), from, to, target: IpAddr::from([10, 97, 0, 2]) })
}

/// Returns the ways of a lab with daemons: on one host, and between two by either backend.
fn overlay(lab: &Lab, kind: &str) -> Result<Vec<Way>> {
    lab.start_all()?;
    let mut ways = Vec::new();
    for (number, backend) in ["direct", "vxlan", "switched"].into_iter().enumerate() {
        let subnet = format!("10.{}.0.0/16", 80 + number);
        match backend {
            "switched" => create_network(lab, backend, &["--subnet", &subnet])?,
            _ => network(lab, backend, &["--subnet", &subnet, "--backend", backend])?,
        }
        let attach = |index: usize, name: &str| -> Result<(Workload, IpAddr)> {
            let host = lab.hosts().get(index).context("no such host")?;
            let name = format!("{name}-{backend}");
            let workload = host.workload(&name)?;
            let request = client::attach(&name, backend, workload.path(), None);
            let address = address_of(&Client::connect(&host.socket())?.ask(&request)?)?;
            Ok((workload, address))
        };
        let (from, _) = attach(0, "from")?;
        let (near, near_at) = attach(0, "near")?;
        let (far, far_at) = attach(1, "far")?;
        for target in [near_at, far_at] {
            from.ping_until(target, PATIENCE)?;
        }
        if backend != "vxlan" {
            let how = if backend == "switched" { ", switched" } else { "" };
            ways.push(Way {
                name: format!("{kind}, one host{how}"),
                from: from.clone(),
                to: near,
                target: near_at,
            });
        }
        ways.push(Way { name: format!("{kind}, {backend}"), from, to: far, target: far_at });
    }
    Ok(ways)
}

/// Fails unless packets of a lab take the fast path, or none do.
fn check(lab: &Lab, is_fast: bool) -> Result<()> {
    for host in lab.hosts() {
        let status = host.ctl_json(&["status"])?;
        let counted: u64 = status["fast_path"]["fast"]
            .as_object()
            .map(|all| all.values().filter_map(serde_json::Value::as_u64).sum())
            .unwrap_or_default();
        ensure!((counted > 10_000) == is_fast, "{}: {counted} packets took the fast path", host.name());
    }
    Ok(())
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let by_hand_lab = bench.lab(HOSTS)?;
    let slow = bench.lab(HOSTS)?;
    let fast = bench.lab(HOSTS)?;
    for host in fast.hosts() {
        host.set_config("fast_path = \"on\"")?;
    }
    let mut ways = vec![raw(by_hand_lab.hosts().first().context("no host")?)?];
    let [(from, _), (to, target)] = by_hand::build(&by_hand_lab, 1450)?;
    ways.push(Way { name: "by hand, bridge and VXLAN".to_owned(), from, to, target });
    ways.extend(overlay(&slow, "kernel path")?);
    ways.extend(overlay(&fast, "fast path")?);
    for host in fast.hosts() {
        wait_until(PATIENCE, "the fast path", || -> Result<()> {
            ensure!(host.ctl_json(&["status"])?["fast_path"]["in_use"] == true, "{}", host.name());
            Ok(())
        })?;
    }
    let rounds = bench.plan.path_rounds;
    let mut turns: Vec<Vec<Turn>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..ways.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            if let (Some(way), Some(taken)) = (ways.get(index), turns.get_mut(index)) {
                taken.push(way.turn(bench.plan.path_turn).with_context(|| way.name.clone())?);
            }
        }
    }
    check(&fast, true)?;
    check(&slow, false)?;
    Ok(figure(&ways, &turns, rounds, bench.plan.path_turn))
}

fn figure(ways: &[Way], turns: &[Vec<Turn>], rounds: usize, turn: Duration) -> Figure {
    let (mut rows, mut details) = (Vec::new(), serde_json::Map::new());
    let raw = turns.first().map(Vec::as_slice).unwrap_or_default();
    for (way, taken) in ways.iter().zip(turns) {
        let of = |value: fn(&Turn) -> f64| Samples::new(taken.iter().map(value).collect());
        let ratio = |value: fn(&Turn) -> f64| {
            Samples::new(taken.iter().zip(raw).map(|(turn, raw)| value(turn) / value(raw)).collect())
        };
        let name = &way.name;
        let bars = match name.as_str() {
            "fast path, one host" | "fast path, one host, switched" => [Some(1.10), Some(0.85)],
            "fast path, direct" => [Some(1.20), Some(0.70)],
            "fast path, vxlan" | "fast path, switched" => [Some(1.30), Some(0.60)],
            _ => [None, None],
        };
        let row = |what: String, value: f64, bar: Option<Bar>| match bar {
            Some(bar) => Row::with_bar(&what, value, "of raw", bar),
            None => Row::context(&what, value, "of raw"),
        };
        rows.push(row(
            format!("{name}: round trip"),
            ratio(|turn| turn.round_trip).median(),
            bars[0].map(Bar::AtMost),
        ));
        rows.push(row(
            format!("{name}: 64-byte packets a second"),
            ratio(|turn| turn.packets).median(),
            bars[1].map(Bar::AtLeast),
        ));
        rows.push(row(format!("{name}: one TCP stream"), ratio(|turn| turn.stream).median(), None));
        details.insert(
            name.clone(),
            json!({
                "round_trip_us": of(|turn| turn.round_trip).to_json(),
                "kpps": of(|turn| turn.packets).to_json(),
                "gbit_s": of(|turn| turn.stream).to_json(),
                "round_trip_of_raw": ratio(|turn| turn.round_trip).to_json(),
                "kpps_of_raw": ratio(|turn| turn.packets).to_json(),
                "gbit_s_of_raw": ratio(|turn| turn.stream).to_json(),
            }),
        );
    }
    Figure {
        setup: format!(
            "Hosts are network namespaces of this machine. {rounds} rounds of {} ways, each a turn of {} s for round trips of 64 \
             bytes (UDP, both ends and the kernel on one core), as long for 64-byte datagrams to a full socket, and as long for one \
             TCP stream; every second round backwards. Medians of the ratios to the raw veth pair of the same round",
            ways.len(),
            turn.as_secs_f64()
        ),
        rows,
        notes: Vec::new(),
        details: details.into(),
    }
}
