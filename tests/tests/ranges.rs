//! Networks over addresses that a host itself needs: its LAN, its router, its resolver, the other hosts.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Workload, wait_until};
use ovl_mesh::keys::{ClusterKey, Identity, Keyring};
use ovl_mesh::streams::{StreamEvent, Streams, StreamsConfig};
use ovl_mesh::transport::HostTransport;
use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Backend, Body, Driver, Mode, Network, Object, SignedObject, Subnet};
use ovl_proto::record::{ClusterKeys, Domain, NodeRecord, Presence, WireVersions};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use ovl_proto::wire::fields::Unknown;
use ovl_tests::resolver::config;
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ctl_error, endpoints, peer, ping_all_pairs, problems,
    start_lab, start_lab_with, text, wait_clean, wait_network, wait_problem,
};
use tokio::sync::mpsc;

/// The port of streams.
const PORT: u16 = 7940;

/// Connects a host to a LAN, by the device `lan0`. Returns the only other machine there.
fn on_lan(host: &Host, addresses: &[&str], others: &[&str]) -> Workload {
    let machine = host.workload("machine").unwrap();
    let pair =
        ["ip", "link", "add", "lan0", "type", "veth", "peer", "name", "eth0", "netns", machine.netns_name()];
    host.exec_ok(pair).unwrap();
    host.exec_ok(["ip", "link", "set", "lan0", "up"]).unwrap();
    machine.exec_ok(["ip", "link", "set", "eth0", "up"]).unwrap();
    for address in addresses {
        add_address(host, address);
    }
    for address in others {
        machine.exec_ok(["ip", "addr", "add", address, "dev", "eth0"]).unwrap();
    }
    machine
}

fn add_address(host: &Host, address: &str) {
    let nodad = if address.contains(':') { &["nodad"][..] } else { &[] };
    host.exec_ok([&["ip", "addr", "add", address, "dev", "lan0"], nodad].concat()).unwrap();
}

fn id(host: &Host) -> Result<NodeId> {
    Ok(text(&host.ctl_json(&["status"])?["id"]).parse()?)
}

/// A routed network with one subnet, as its writer would sign it.
fn routed(name: &str, number: u8, subnet: &str, gateway: &str) -> Network {
    let prefix: ipnet::IpNet = subnet.parse().unwrap();
    Network {
        id: NetworkId([0xb0 | number; 5]),
        name: name.to_owned(),
        // Older than any other.
        created: Stamp::default(),
        driver: Driver::Overlay,
        mode: Mode::L3,
        vni: 7000 + u32::from(number),
        subnets: vec![Subnet {
            prefix,
            gateway: gateway.parse().unwrap(),
            block_length: prefix.prefix_len() + 3,
            routed: true,
        }],
        mtu: None,
        encrypted: false,
        auto_encrypt: false,
        internal: false,
        backend: Backend::Auto,
        names: true,
        on_demand: false,
        external_names: false,
        unknown: Unknown::default(),
    }
}

/// Sends networks to hosts in the name of a member whose daemon is stopped, without any check.
fn write_unchecked(lab: &Lab, writer: &Host, to: &[&Host], networks: Vec<Network>) -> Result<()> {
    let key = ClusterKey::read(&lab.dir().join("cluster.key"))?;
    let identity = Arc::new(Identity::load_or_create(&writer.state_dir().join("identity"))?);
    let listen = SocketAddr::new(writer.address()?, PORT);
    let hosts = to.iter().map(|host| Ok((id(host)?, SocketAddr::new(host.address()?, PORT))));
    let hosts: BTreeMap<NodeId, SocketAddr> = hosts.collect::<Result<_>>()?;
    let wall_ms = u64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis())?;
    let sign = |(count, network): (usize, Network)| -> Result<SignedObject> {
        let stamp = Stamp { wall_ms, count: count.try_into()?, node: identity.id() };
        let object = Object { stamp, deleted: false, body: Body::Network(network) };
        let body = wire::encode_body(&object)?;
        let signature = identity.sign(Domain::Object, &body);
        Ok(SignedObject { signature, writer_key: *identity.public_key(), body })
    };
    let objects = networks.into_iter().enumerate().map(sign).collect::<Result<Vec<_>>>()?;
    let record = identity.sign_record(&NodeRecord {
        id: identity.id(),
        public_key: *identity.public_key(),
        name: writer.name().to_owned(),
        generation: 1,
        revision: 1,
        cluster: 0,
        address: listen,
        vtep: listen.ip(),
        vxlan_port: 4789,
        link_mtu: 1500,
        tunnel: None,
        keys: ClusterKeys { seals: key.id(), opens: Vec::new() },
        presence: Presence::Running,
        version: "0".to_owned(),
        wire: WireVersions::own(),
        probes: 0,
        not_built: Vec::new(),
        probe_kinds: 0,
        metrics_port: 0,
        zone: String::new(),
        mirrors: false,
        is_node: false,
        relay_port: 0,
        relays: false,
        further: Vec::new(),
        unknown: Unknown::default(),
    })?;
    writer.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (tell, mut events) = mpsc::channel(1024);
            let keyring = Arc::new(Keyring::new(key, Vec::new()));
            let transport = Arc::new(HostTransport::default());
            let config = StreamsConfig {
                listen,
                listen_also: None,
                identity,
                keyring,
                record,
                transport,
                behind_nat: false,
            };
            let streams = Streams::start(config, tell).await?;
            streams.set_peers(hosts.clone());
            let mut up = 0;
            while up < hosts.len() {
                let event = tokio::time::timeout(SOON, events.recv()).await?.context("streams ended")?;
                if let StreamEvent::Up(host) = event {
                    ensure!(streams.send(host, &Message::Objects(objects.clone())), "no stream to {host}");
                    up += 1;
                }
            }
            streams.shutdown().await;
            Ok(())
        })
    })?
}

/// Fails if a route of ovl on a host leads to a subnet.
fn ensure_no_route(host: &Host, subnet: &str) -> Result<()> {
    for family in ["-4", "-6"] {
        let routes = host.exec_ok(["ip", family, "route", "show", "root", subnet, "proto", "79"]);
        // The subnet is of the other family.
        let Ok(routes) = routes else { continue };
        ensure!(routes.trim().is_empty(), "{}: {routes}", host.name());
    }
    Ok(())
}

#[test]
fn hostile_networks_cut_off_no_host() {
    let (config, _file) = config(3, &["203.0.113.53"], "").unwrap();
    let lab = start_lab_with(config).unwrap();
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|name| &lab[name]);
    let machine = on_lan(h2, &["10.50.0.17/24", "fd50::17/64"], &["10.50.0.254/24"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/16"]).unwrap();
    let mut all = vec![attach(h1, "a", "blue", &[]).unwrap(), attach(h2, "b", "blue", &[]).unwrap()];
    ping_all_pairs(&all, SOON).unwrap();
    let hostile = [
        ("underlay", "192.168.77.0/24", "192.168.77.1", "192.168.77.1"),
        ("eighth", "192.0.0.0/3", "192.0.0.1", "192.168.77.1"),
        ("resolvers", "203.0.113.0/24", "203.0.113.1", "203.0.113.53"),
        ("within", "10.1.0.0/24", "10.1.0.1", "10.1.0.0/16 of network blue"),
    ];
    let lan = routed("lan", 9, "10.50.0.0/16", "10.50.0.1");
    let lan6 = routed("lan6", 10, "fd50::/48", "fd50::1");
    let networks = hostile.iter().zip(1..);
    let networks = networks.map(|((name, subnet, gateway, _), number)| routed(name, number, subnet, gateway));
    h3.stop().unwrap();
    write_unchecked(&lab, h3, &[h1, h2], networks.chain([lan, lan6]).collect()).unwrap();
    for host in [h1, h2] {
        for (name, subnet, _, reason) in hostile {
            wait_network(host, name).unwrap();
            let start = format!("network {name} is not built on this host: its subnet {subnet}");
            wait_problem(host, &[&start, reason], SOON).unwrap();
        }
    }
    wait_problem(h2, &["network lan is not built", "10.50.0.0/24", "lan0"], SOON).unwrap();
    wait_problem(h2, &["network lan6 is not built", "fd50::/64", "lan0"], SOON).unwrap();
    assert!(!problems(h1).unwrap().iter().any(|problem| problem.contains("network lan")));

    // The member itself comes back, and is told of its networks.
    h3.start().unwrap();
    lab.wait_all_alive(SOON).unwrap();
    wait_problem(h3, &["network underlay is not built"], SOON).unwrap();
    all.push(attach(h3, "c", "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();

    // The LAN of h2 is its own, also after the link was down.
    h2.exec_ok(["ip", "link", "set", "lan0", "down"]).unwrap();
    h2.exec_ok(["ip", "link", "set", "lan0", "up"]).unwrap();
    h2.ping_until("10.50.0.254", SOON).unwrap();
    assert_contains(&h2.exec_ok(["ip", "route", "get", "10.50.0.254"]).unwrap(), &["dev lan0"]);
    drop(machine);

    // The network is refused where it would hurt, and works elsewhere.
    let workload = h2.workload("x").unwrap();
    let args = ["attach", "x", "--network", "lan", "--netns", workload.path_str()];
    let refusal = ctl_error(h2, &args).unwrap();
    assert_contains(&refusal, &["network lan is not built on this host", "10.50.0.0/24", "lan0", "subnet"]);
    let on_lan = [attach(h1, "d", "lan", &[]).unwrap(), attach(h3, "e", "lan", &[]).unwrap()];
    ping_all_pairs(&on_lan, SOON).unwrap();

    // Longer than it takes to suspect a host that cannot be heard.
    std::thread::sleep(Duration::from_secs(6));
    for (host, other) in [(h1, "h2"), (h1, "h3"), (h2, "h1"), (h2, "h3"), (h3, "h1"), (h3, "h2")] {
        assert_eq!(peer(host, other).unwrap()["state"], "alive", "{other} on {}", host.name());
    }
    for host in lab.hosts() {
        for (_, subnet, ..) in hostile.iter().filter(|(name, ..)| *name != "within") {
            ensure_no_route(host, subnet).unwrap();
        }
    }
    ensure_no_route(h2, "10.50.0.0/16").unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn host_gives_up_a_network_that_its_lan_comes_to_cover() {
    let lab = start_lab(2).unwrap();
    let [h1, h2] = ["h1", "h2"].map(|name| &lab[name]);
    let subnets = ["--subnet", "10.60.0.0/24", "--subnet", "fd60::/64"];
    create_network(&lab, "office", &subnets).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/16"]).unwrap();
    let office = [attach(h1, "w1", "office", &[]).unwrap(), attach(h2, "w2", "office", &[]).unwrap()];
    let blue = [attach(h1, "a", "blue", &[]).unwrap(), attach(h2, "b", "blue", &[]).unwrap()];
    ping_all_pairs(&office, SOON).unwrap();
    let machine = on_lan(h2, &[], &["10.60.0.254/24", "fd60::fe/64"]);
    let endpoint = |host: &Host| -> Result<String> {
        let all = host.ctl_json(&["endpoints"])?;
        let all = all.as_array().context("no array")?;
        Ok(text(&all.iter().find(|row| row["name"] == "w2").context("no w2")?["state"]))
    };
    for (address, there) in [("10.60.0.17/24", "10.60.0.254"), ("fd60::17/64", "fd60::fe")] {
        add_address(h2, address);
        wait_problem(h2, &["network office is not built", "lan0", "cut off"], SOON).unwrap();
        h2.ping_until(there, SOON).unwrap();
        assert_contains(&h2.exec_ok(["ip", "route", "get", there]).unwrap(), &["dev lan0"]);
        assert_eq!(endpoint(h2).unwrap(), "isolated");
        assert!(problems(h1).unwrap().is_empty());
        // Nothing that passes through the network says anything of the path to the other host.
        wait_until(SOON, "the path to be probed on the other network", || -> Result<()> {
            let paths = peer(h1, "h2")?["paths"].clone();
            let probed: Vec<String> =
                paths.as_array().into_iter().flatten().map(|path| text(&path["network"])).collect();
            ensure!(probed == ["blue"], "{paths}");
            Ok(())
        })
        .unwrap();
        ping_all_pairs(&blue, SOON).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        h2.exec_ok(["ip", "addr", "del", address, "dev", "lan0"]).unwrap();
        ping_all_pairs(&office, SOON).unwrap();
        wait_until(SOON, "no problem", || -> Result<bool> { Ok(problems(h2)?.is_empty()) }).unwrap();
        assert_eq!(endpoint(h2).unwrap(), "ready");
    }
    // A default gateway need not be in a prefix of the host.
    create_network(&lab, "far", &["--mode", "l3", "--subnet", "100.64.9.0/24"]).unwrap();
    let gateway = ["ip", "route", "add", "default", "via", "100.64.9.1", "dev", "lan0", "onlink"];
    let other =
        ["ip", "route", "add", "default", "via", "100.64.20.1", "dev", "lan0", "onlink", "metric", "7"];
    h2.exec_ok(other).unwrap();
    h2.exec_ok(gateway).unwrap();
    wait_problem(h2, &["network far is not built", "100.64.9.1", "default gateway"], SOON).unwrap();
    wait_until(SOON, "no route of ovl", || ensure_no_route(h2, "100.64.9.0/24")).unwrap();
    let more = ["network", "create", "more", "--subnet", "100.64.20.0/24"];
    assert_contains(&ctl_error(h2, &more).unwrap(), &["100.64.20.1", "default gateway", "--subnet"]);
    drop(machine);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn pool_over_an_existing_network_is_reported() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "blue", &["--subnet", "10.60.0.0/16"]).unwrap();
    attach(host, "web", "blue", &[]).unwrap();
    host.stop().unwrap();
    host.set_config("load_balancer_pool = [\"10.60.9.0/28\"]\nexternal_ranges = [\"10.61.0.0/24\"]").unwrap();
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
    let parts = ["10.60.0.0/16 overlaps the load_balancer_pool 10.60.9.0/28", "ovld.toml"];
    wait_problem(host, &parts, SOON).unwrap();
    assert_contains(&host.ctl_ok(&["status"]).unwrap(), &["OVL-E065", "blue"]);
    // The network works as before, and another one cannot be created over a range.
    assert_eq!(endpoints(host).unwrap(), ["web on h1 is ready"]);
    for (subnet, name) in [("10.60.9.0/24", "load_balancer_pool"), ("10.61.0.0/16", "external_ranges")] {
        let refused = ctl_error(host, &["network", "create", "red", "--subnet", subnet]).unwrap();
        assert!(refused.contains(name) || refused.contains("blue"), "{refused}");
    }
}
