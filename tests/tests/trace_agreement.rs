//! What `ovlctl trace` says of random pairs, under random policies and Services, is what packets do.
//!
//! `OVL_TRACE_PAIRS=n` looks at more pairs, `OVL_TRACE_SEED=n` draws others.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{EchoServer, Host, Lab, Workload, wait_until};
use ovl_tests::random::Random;
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, SOON, attach, create_network, start_lab, text, wait_clean};
use serde_json::{Value, json};

/// The number of pairs if `OVL_TRACE_PAIRS` does not say it.
const PAIRS: usize = 60;
/// Pairs between two draws of policies and Services.
const PAIRS_A_ROUND: usize = 20;
/// Pairs that are looked at at the same time. A host takes part in eight traces.
const AT_ONCE: usize = 4;
/// How long a connection may take that is let through, and how long is waited for one that is not.
const TIMEOUT: Duration = Duration::from_millis(700);
/// Attempts at an address of a Service, of which one meets the backend that the trace met.
const ATTEMPTS: usize = 24;

const SUBNETS: [&[&str]; 2] = [
    &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"],
    &["--subnet", "10.61.0.0/16", "--subnet", "fd61::/48"],
];
const NETWORKS: [&str; 2] = ["flat", "pods"];
/// The networks of the backends of each Service.
const SERVICES: [&str; 3] = ["flat", "pods", "pods"];
const APPS: [&str; 3] = ["web", "api", "db"];

struct World {
    pods: Vec<(Attached, &'static str)>,
    _servers: Vec<EchoServer>,
    lab: Lab,
}

/// Three hosts, a switched and a routed network, and two pods of each on each host. All listen on TCP port 80 and UDP port
/// 53, and none on port 81.
fn world() -> Result<World> {
    let lab = start_lab(3)?;
    create_network(&lab, NETWORKS[0], SUBNETS[0])?;
    create_routed_network(&lab, NETWORKS[1], SUBNETS[1])?;
    let (mut pods, mut servers) = (Vec::new(), Vec::new());
    for (n, host) in lab.hosts().iter().enumerate() {
        for (m, network) in NETWORKS.iter().enumerate() {
            for k in 0..2 {
                let app = APPS[(n + m + k) % APPS.len()];
                let name = format!("{network}{n}{k}");
                let labels = ["--label", &format!("app={app}"), "--label", &format!("net={network}")];
                let pod = attach(host, &name, network, &labels)?;
                servers.extend([pod.workload.tcp_echo(80)?, pod.workload.udp_echo(53)?]);
                pods.push((pod, *network));
            }
        }
    }
    wait_clean(lab.hosts(), SOON)?;
    Ok(World { pods, _servers: servers, lab })
}

/// Draws policies and Services, applies them, and deletes those of the last round.
fn redraw(world: &World, random: &mut Random) -> Result<()> {
    let mut objects: Vec<Value> = Vec::new();
    for n in 0..random.below(4) {
        let ports = |random: &mut Random| match random.below(3) {
            0 => json!([]),
            1 => json!([{"protocol": "TCP", "port": 80}]),
            _ => json!([{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 81}]),
        };
        let peers = |random: &mut Random| match random.below(3) {
            0 => json!([]),
            1 => json!([{"podSelector": {"matchLabels": {"app": random.pick(&APPS)}}}]),
            _ => json!([{"ipBlock": {"cidr": random.pick(&["10.60.0.0/16", "10.61.0.0/16", "fd60::/64"])}}]),
        };
        let selector = match random.chance(4) {
            true => json!({}),
            false => json!({"matchLabels": {"app": random.pick(&APPS)}}),
        };
        let rules: Vec<[Value; 2]> = (0..random.below(3)).map(|_| [peers(random), ports(random)]).collect();
        let rules = |key: &str| -> Vec<Value> {
            let all = rules.iter();
            all.map(|[peers, ports]| json!({key: peers, "ports": ports})).collect()
        };
        let spec = match random.chance(3) {
            true => json!({"podSelector": selector, "policyTypes": ["Egress"], "egress": rules("to")}),
            false => json!({"podSelector": selector, "policyTypes": ["Ingress"], "ingress": rules("from")}),
        };
        objects.push(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("p{n}")}, "spec": spec,
        }));
    }
    for (n, network) in SERVICES.iter().enumerate() {
        let app = if random.chance(5) { "none" } else { *random.pick(&APPS) };
        let target = if random.chance(5) { 81 } else { 80 };
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}")},
            "spec": {
                "selector": {"app": app, "net": network}, "ipFamilyPolicy": "PreferDualStack",
                "ports": [
                    {"name": "t", "port": 80, "targetPort": target},
                    {"name": "u", "port": 53, "protocol": "UDP", "targetPort": 53},
                ],
            },
        }));
    }
    let host = &world.lab.hosts()[0];
    for n in 0..4 {
        host.ctl_ok(&["delete", "networkpolicy", &format!("p{n}"), "--ignore-not-found"])?;
    }
    let texts: Vec<String> = objects.iter().map(Value::to_string).collect();
    let file = world.lab.dir().join("manifest.yaml");
    std::fs::write(&file, texts.join("\n---\n"))?;
    host.ctl_ok(&["apply", "-f", &file.to_string_lossy()])?;
    wait_same(world)?;
    wait_clean(world.lab.hosts(), SOON)
}

/// Waits until all hosts have the objects of the first one.
fn wait_same(world: &World) -> Result<()> {
    let listed = |host: &Host| host.ctl_ok(&["get", "svc,networkpolicy", "-A", "-o", "yaml"]);
    let expected = listed(&world.lab.hosts()[0])?;
    netns_lab::wait_until(SOON, "the same objects on all hosts", || -> Result<()> {
        for host in world.lab.hosts() {
            ensure!(listed(host)? == expected, "{} differs", host.name());
        }
        Ok(())
    })
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Echo,
    Tcp(u16),
    Udp(u16),
}

impl Kind {
    /// The destination as `ovlctl trace` takes it.
    fn to(self, address: IpAddr) -> String {
        match self {
            Self::Echo => address.to_string(),
            Self::Tcp(port) => SocketAddr::new(address, port).to_string(),
            Self::Udp(port) => format!("{}/udp", SocketAddr::new(address, port)),
        }
    }

    /// Whether a packet is answered.
    fn passes(self, from: &Workload, to: IpAddr) -> Result<bool> {
        match self {
            Self::Echo => Ok(from.ping(to, TIMEOUT)),
            Self::Tcp(port) => {
                from.run(|| TcpStream::connect_timeout(&SocketAddr::new(to, port), TIMEOUT).is_ok())
            }
            Self::Udp(port) => from.run(|| answers(SocketAddr::new(to, port)).unwrap_or(false)),
        }
    }
}

fn answers(to: SocketAddr) -> Result<bool> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send(b"?")?;
    Ok(socket.recv(&mut [0; 8]).is_ok())
}

/// What is asked of `ovlctl trace`, and tried.
#[derive(Clone, Copy)]
struct Pair<'a> {
    from: &'a Attached,
    to: IpAddr,
    kind: Kind,
    is_service: bool,
    /// The host on which `ovlctl` runs.
    asked: &'a Host,
}

/// Draws a pair.
fn draw<'a>(world: &'a World, random: &mut Random) -> Result<Pair<'a>> {
    let (from, network) = random.pick(&world.pods);
    let kind = *random.pick(&[Kind::Echo, Kind::Tcp(80), Kind::Tcp(80), Kind::Tcp(81), Kind::Udp(53)]);
    let (to, is_service) = match random.below(3) {
        0 => {
            // An endpoint of a switched network on another host has no way back to one of a routed network.
            let n = if *network == "flat" { random.below(SERVICES.len()) } else { 1 + random.below(2) };
            let service = format!("s{n}");
            let found = world.lab.hosts()[0].ctl_json(&["get", "svc", &service])?;
            let addresses = found["spec"]["clusterIPs"].as_array().context("no cluster IPs")?;
            (text(&addresses[random.below(addresses.len())]).parse::<IpAddr>()?, true)
        }
        // Pairs on one network, as a rule.
        _ => loop {
            let (to, other) = random.pick(&world.pods);
            if to.name != from.name && (network == other || random.chance(6)) {
                let addresses = to.addresses();
                break (random.pick(&addresses).parse::<IpAddr>()?, false);
            }
        },
    };
    Ok(Pair { from, to, kind, is_service, asked: random.pick(world.lab.hosts()) })
}

/// Traces a pair and tries it. Returns whether the trace says that it arrives, and what is wrong.
fn look(pair: Pair<'_>) -> Result<(bool, Option<String>)> {
    let Pair { from, to, kind, is_service, asked } = pair;
    let args = ["trace", "-o", "json", &from.name, &kind.to(to)];
    // On a machine that is busy with other tests, a trace may not end within its five seconds, and says to try again.
    let traced = wait_until(SOON, "a trace", || -> Result<Option<Value>> {
        let output = asked.ctl(&args)?;
        serde_json::from_str(&output.stdout).with_context(|| format!("{}{}", output.stdout, output.stderr))
    })?;
    let says = traced["arrived"] == true;
    // Of a Service, the trace is about the backend that it met. Another one may be out of reach, so the same result must come
    // once: each attempt meets any of the backends.
    let attempts = if is_service { ATTEMPTS } else { 1 };
    let mut same = false;
    for _ in 0..attempts {
        same = kind.passes(&from.workload, to)? == says;
        if same {
            break;
        }
    }
    let (model, agree) = (&traced["model"]["arrives"], traced["agree"] == true);
    if same && agree && !model.is_null() {
        return Ok((says, None));
    }
    let rules = asked.ctl_ok(&["policy", "ls", "-o", "wide"])?;
    let wrong = format!("{} to {}: same result: {same}\n{rules}\n{traced:#}", from.name, kind.to(to));
    Ok((says, Some(wrong)))
}

#[derive(Debug, Default)]
struct Tally {
    pairs: usize,
    arrived: usize,
    wrong: Vec<String>,
}

/// Looks at pairs, several at a time: traces do not disturb each other.
fn look_at_all(pairs: &[Pair<'_>], tally: &mut Tally) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Tally> {
        let mut tally = Tally::default();
        while let Some(pair) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (says, wrong) = look(*pair)?;
            tally.pairs += 1;
            tally.arrived += usize::from(says);
            tally.wrong.extend(wrong);
        }
        Ok(tally)
    };
    let tallies = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Result<Vec<_>>>()
    })?;
    for each in tallies {
        tally.pairs += each.pairs;
        tally.arrived += each.arrived;
        tally.wrong.extend(each.wrong);
    }
    Ok(())
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn traces_of_random_pairs_agree_with_packets() {
    let world = world().unwrap();
    let (pairs, seed) = (number("OVL_TRACE_PAIRS", PAIRS), number("OVL_TRACE_SEED", 1));
    let mut random = Random::new(seed as u64);
    let mut tally = Tally::default();
    while tally.pairs < pairs {
        redraw(&world, &mut random).unwrap();
        let count = PAIRS_A_ROUND.min(pairs - tally.pairs);
        let drawn = (0..count).map(|_| draw(&world, &mut random)).collect::<Result<Vec<_>>>().unwrap();
        look_at_all(&drawn, &mut tally).unwrap();
        let Tally { pairs, arrived, wrong } = &tally;
        eprintln!("{pairs} pairs, {arrived} arrived, {} disagreements", wrong.len());
    }
    assert!(
        tally.wrong.is_empty(),
        "seed {seed}: {} of {}:\n{}",
        tally.wrong.len(),
        tally.pairs,
        tally.wrong.join("\n")
    );
    // Both results were met.
    assert!(tally.arrived > 0 && tally.arrived < tally.pairs, "{tally:?}");
}
