//! Tests of the choice of the host that announces a LoadBalancer address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::op::{AnnouncedOp, Op};
use ovl_proto::id::NodeId;
use ovl_proto::object::Mode;
use ovl_proto::record::PeerState;
use ovl_proto::record::Signature;
use ovl_proto::resource::{Kind, Name};
use ovl_proto::table::{Entry, Key};
use ovl_subsystems::local::Local;
use ovl_subsystems::services::Announcements;
use ovl_subsystems::services::allocation::Ranges;
use ovl_subsystems::services::ingress::Ingress;
use ovl_subsystems::{Change, Subsystem};
use serde_json::{Value, json};

use super::host::{cluster, ranges};
use super::world::{NET, id};
use super::world::{World, read};

const WEB: &[(&str, &str)] = &[("app", "web")];

/// Three hosts with the same view, each with its own plan.
struct Cluster {
    world: World,
    hosts: BTreeMap<NodeId, Ingress>,
}

impl Cluster {
    fn new(mode: Mode) -> Self {
        let mut world = World::new();
        world.view.networks.get_mut(&NET).unwrap().network.mode = mode;
        Self { world, hosts: (1..=3).map(|n| (id(n), Ingress::new(ranges()))).collect() }
    }

    fn service(&mut self, name: &str, address: &str, more: Value) {
        let mut spec = json!({
            "type": "LoadBalancer",
            "selector": { "app": "web" },
            "ports": [{ "port": 80, "targetPort": 8080 }],
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let status = json!({ "loadBalancer": { "ingress": [{ "ip": address }] } });
        let manifest =
            json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec, "status": status });
        self.world.put(read(Kind::Service, manifest));
    }

    fn view_of(&self, host: NodeId) -> View {
        let mut view = self.world.view.clone();
        view.me = host;
        view.nodes.get_mut(&host).unwrap().state = PeerState::Alive;
        view
    }

    /// Lets one host plan, apply its operations and update its owner table.
    fn turn(&mut self, host: u8) {
        self.world.settle();
        let view = self.view_of(id(host));
        let ingress = self.hosts.get_mut(&id(host)).unwrap();
        let ops = ingress.plan(&view, &self.world.backends, std::iter::empty(), true, Device::new("eth0"));
        for op in ops {
            let (set, unset) = match op {
                Op::Announced(AnnouncedOp::Add(_, address)) => (vec![Entry::Announced(address)], vec![]),
                Op::Announced(AnnouncedOp::Delete(_, address)) => (vec![], vec![Key::Announced(address)]),
                other => panic!("{other}"),
            };
            let table = &mut self.world.view.nodes.get_mut(&id(host)).unwrap().table;
            table.write(1, set, unset, |_| Signature([0; 64]));
        }
    }

    /// Lets all live hosts plan twice: a host withdraws an address for one that planned before it.
    fn settle(&mut self) {
        for host in [1, 2, 3, 1, 2, 3] {
            if self.world.view.nodes[&id(host)].state == PeerState::Alive {
                self.turn(host);
            }
        }
    }

    /// Returns the hosts that are not dead and whose owner tables name an address as announced.
    fn holders(&self, address: &str) -> Vec<u8> {
        let address: IpAddr = address.parse().unwrap();
        let nodes = self.world.view.nodes.values();
        let there = nodes.filter(|node| node.state != PeerState::Dead && node.table.announces(address));
        there.map(|node| node.record.id.0[0]).collect()
    }
}

fn addresses() -> Vec<String> {
    (1..60).map(|n| format!("192.0.2.{n}")).collect()
}

/// The recovered cluster announces the address from one of its hosts. The host that was left out still has the old view,
/// in which it is a member and the only one that lives.
#[test]
fn host_that_was_left_out_of_a_recovery_announces_nothing_until_it_rejects_the_recovery() {
    for address in ["192.0.2.1", "2001:db8::1"] {
        let mut all = Cluster::new(Mode::L3);
        all.world.attach(1, 1, WEB, true);
        all.service("s", address, json!({}));
        all.world.host(2, PeerState::Dead);
        all.world.host(3, PeerState::Dead);
        all.world.settle();
        let (local, address) = (Local::default(), address.parse().unwrap());
        let mut subsystem = Announcements::new(Ranges {
            load_balancers: ["192.0.2.0/24", "2001:db8::/64"].map(|range| range.parse().unwrap()).into(),
            ..ranges()
        });
        let device = Device::new("eth0").unwrap();
        subsystem.set_uplink(Some(device));
        let mut plan = |is_left_out| {
            let now = cluster(&all.world.view, &local, &all.world.backends);
            if subsystem.set_left_out(is_left_out) {
                subsystem.changed(&Change::Uplink, &now);
            }
            let ops = subsystem.plan(&now);
            assert_eq!(subsystem.desired(&now), subsystem.sent().unwrap());
            assert_eq!(subsystem.claimed().contains(&address), !is_left_out);
            ops
        };
        plan(true);
        assert_eq!(plan(false), [Op::Announced(AnnouncedOp::Add(device, address))]);
        assert_eq!(plan(true), [Op::Announced(AnnouncedOp::Delete(device, address))]);
        assert_eq!(plan(true), []);
        assert_eq!(plan(false), [Op::Announced(AnnouncedOp::Add(device, address))]);
    }
}

#[test]
fn addresses_are_spread_and_only_those_of_a_lost_host_move() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.world.attach(1, 1, WEB, true);
    for (n, address) in addresses().iter().enumerate() {
        cluster.service(&format!("s{n}"), address, json!({}));
    }
    cluster.settle();
    let before: Vec<Vec<u8>> = addresses().iter().map(|address| cluster.holders(address)).collect();
    assert!(before.iter().all(|holders| holders.len() == 1), "{before:?}");
    let used: BTreeSet<u8> = before.iter().flatten().copied().collect();
    assert_eq!(used, [1, 2, 3].into());

    cluster.world.host(3, PeerState::Dead);
    cluster.settle();
    for (address, before) in addresses().iter().zip(&before) {
        let now = cluster.holders(address);
        assert_eq!(now.len(), 1);
        assert!(now == *before || *before == [3], "{address} went from {before:?} to {now:?}");
    }
    // The host is back with an empty table, and gets its addresses again.
    let lost = &mut cluster.world.view.nodes.get_mut(&id(3)).unwrap().table;
    let keys: Vec<Key> = lost.announced().map(Key::Announced).collect();
    lost.write(1, vec![], keys, |_| Signature([0; 64]));
    cluster.hosts.insert(id(3), Ingress::new(ranges()));
    cluster.world.host(3, PeerState::Alive);
    cluster.settle();
    let after: Vec<Vec<u8>> = addresses().iter().map(|address| cluster.holders(address)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_host_withdraws_an_address_only_when_the_next_one_announces_it() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [first] = cluster.holders("192.0.2.1")[..] else { panic!() };
    cluster.world.host(first, PeerState::Dead);
    cluster.settle();
    let [second] = cluster.holders("192.0.2.1")[..] else { panic!() };
    let lost = &mut cluster.world.view.nodes.get_mut(&id(first)).unwrap().table;
    lost.write(1, vec![], vec![Key::Announced([192, 0, 2, 1].into())], |_| Signature([0; 64]));
    cluster.hosts.insert(id(first), Ingress::new(ranges()));
    cluster.world.host(first, PeerState::Alive);
    cluster.turn(second);
    assert_eq!(cluster.holders("192.0.2.1"), [second], "no host announces it");
    cluster.turn(first);
    cluster.turn(second);
    assert_eq!(cluster.holders("192.0.2.1"), [first]);
}

#[test]
fn a_silent_host_keeps_its_addresses_and_gets_no_new_ones() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [holder] = cluster.holders("192.0.2.1")[..] else { panic!() };
    cluster.world.host(holder, PeerState::Suspect);
    cluster.settle();
    assert_eq!(cluster.holders("192.0.2.1"), [holder]);
    // Addresses that it would get go to other hosts.
    for (n, address) in addresses().iter().enumerate().skip(1) {
        cluster.service(&format!("s{n}"), address, json!({}));
    }
    cluster.settle();
    for address in addresses().iter().skip(1) {
        let holders = cluster.holders(address);
        assert!(holders.len() == 1 && holders != [holder], "{address}: {holders:?}");
    }
}

#[test]
fn an_address_is_announced_where_backends_can_be_reached() {
    for (mode, policy) in [(Mode::L3, "Local"), (Mode::L2, "Local"), (Mode::L2, "Cluster")] {
        let mut cluster = Cluster::new(mode);
        let more = json!({ "externalTrafficPolicy": policy, "healthCheckNodePort": 32000 });
        cluster.service("web", "192.0.2.1", more);
        cluster.settle();
        // Without backends, one host must refuse connections.
        assert_eq!(cluster.holders("192.0.2.1").len(), 1);
        for n in [2, 3, 1] {
            cluster.world.attach(n, n, WEB, true);
            cluster.settle();
            assert_eq!(cluster.holders("192.0.2.1"), [n], "{mode:?} {policy}");
            let health = |host: u8| {
                let name = Name::new("default", "web");
                cluster.hosts[&id(host)].health().find(|(of, _)| **of == name).map(|(_, health)| health.local)
            };
            for host in 1..=3 {
                assert_eq!(health(host), Some(usize::from(host == n)));
            }
            cluster.world.detach(n, n);
        }
    }
}

/// As with kube-proxy, so that load balancers turn to other hosts while the last backends here shut down.
#[test]
fn draining_backends_are_not_healthy() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service(
        "web",
        "192.0.2.1",
        json!({ "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000 }),
    );
    let health = |cluster: &mut Cluster, conditions: Value| {
        let slice = json!({
            "metadata": { "name": "web-1", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4",
            "ports": [{ "port": 8080 }],
            "endpoints": [{ "addresses": ["198.51.100.1"], "nodeName": "h1", "conditions": conditions }],
        });
        cluster.world.put(read(Kind::EndpointSlice, slice));
        cluster.settle();
        cluster.hosts[&id(1)].health().map(|(_, health)| health.local).collect::<Vec<_>>()
    };
    assert_eq!(health(&mut cluster, json!({ "ready": true })), [1]);
    let draining = json!({ "ready": false, "serving": true, "terminating": true });
    assert_eq!(health(&mut cluster, draining), [0]);
    // Connections that arrive all the same reach it.
    let targets = ovl_cluster::backends::targets(
        cluster.world.backends.of(&Name::new("default", "web")),
        0,
        true,
        Some(id(1)),
    );
    assert_eq!(targets.len(), 1);
    assert_eq!(health(&mut cluster, json!({ "ready": false })), [0]);
}

#[test]
fn services_of_other_proxies_are_not_announced() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.world.attach(1, 1, WEB, true);
    let more = json!({ "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000 });
    cluster.service("web", "192.0.2.1", more);
    cluster.settle();
    assert_eq!(cluster.holders("192.0.2.1").len(), 1);
    let key = ovl_proto::resource::ResourceKey { kind: Kind::Service, name: Name::new("default", "web") };
    let mut service = cluster.world.view.resources.get(&key).unwrap();
    service.meta_mut().labels =
        [("service.kubernetes.io/service-proxy-name".to_owned(), "x".to_owned())].into();
    cluster.world.put(service);
    cluster.settle();
    assert_eq!(cluster.holders("192.0.2.1"), [0; 0]);
    assert!(cluster.hosts.values().all(|ingress| ingress.health().next().is_none()));
}

#[test]
fn an_address_that_the_kernel_rejects_is_not_claimed() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [holder] = cluster.holders("192.0.2.1")[..] else { panic!() };
    let ingress = cluster.hosts.get_mut(&id(holder)).unwrap();
    let address: IpAddr = [192, 0, 2, 1].into();
    assert_eq!(ingress.claimed(), [address].into());
    ingress.record_outcome(address, false);
    assert!(ingress.claimed().is_empty());
    // The address is announced three times, and no more.
    assert_eq!((0..5).map(|_| ingress.again(8).len()).collect::<Vec<_>>(), [1, 1, 1, 0, 0]);
}

#[test]
fn services_that_share_an_address_have_one_announcer_which_serves_all_of_them() {
    const OTHER: &[(&str, &str)] = &[("app", "other")];
    let mut cluster = Cluster::new(Mode::L2);
    for (on, n, labels) in [(1, 1, WEB), (2, 2, WEB), (2, 3, OTHER), (3, 4, OTHER)] {
        cluster.world.attach(on, n, labels, true);
    }
    for (n, address) in addresses().iter().enumerate() {
        cluster.service(&format!("a{n}"), address, json!({}));
        let other = json!({ "selector": { "app": "other" }, "ports": [{ "port": 81, "targetPort": 8080 }] });
        cluster.service(&format!("b{n}"), address, other);
    }
    cluster.settle();
    for address in addresses() {
        assert_eq!(cluster.holders(&address), [2], "{address}");
    }
    // If no host has backends of both, the older one decides, or the one with the smaller name.
    cluster.world.host(2, PeerState::Dead);
    cluster.settle();
    for address in addresses() {
        assert_eq!(cluster.holders(&address), [1], "{address}");
    }
}
