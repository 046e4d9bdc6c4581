//! Which host announces an address of a LoadBalancer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::op::Op;
use ovl_proto::id::NodeId;
use ovl_proto::object::Mode;
use ovl_proto::record::PeerState;
use ovl_proto::record::Signature;
use ovl_proto::resource::{Kind, Name};
use ovl_proto::table::{Entry, Key};
use ovl_subsystems::services::ingress::Ingress;
use serde_json::{Value, json};

use super::world::{NET, id};
use super::world::{World, read};

const WEB: &[(&str, &str)] = &[("app", "web")];

/// Three hosts that see the same, each with its own plan.
struct Cluster {
    world: World,
    hosts: BTreeMap<NodeId, Ingress>,
}

impl Cluster {
    fn new(mode: Mode) -> Self {
        let mut world = World::new();
        world.view.networks.get_mut(&NET).unwrap().network.mode = mode;
        Self { world, hosts: (1..=3).map(|n| (id(n), Ingress::default())).collect() }
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

    /// One host looks at everything, does what it planned, and says so.
    fn turn(&mut self, host: u8) {
        self.world.settle();
        let view = self.view_of(id(host));
        let ingress = self.hosts.get_mut(&id(host)).unwrap();
        let ops = ingress.plan(&view, &self.world.backends, std::iter::empty(), true, Device::new("eth0"));
        for op in ops {
            let (set, unset) = match op {
                Op::AddAnnounced(_, address) => (vec![Entry::Announced(address)], vec![]),
                Op::DelAnnounced(_, address) => (vec![], vec![Key::Announced(address)]),
                other => panic!("{other}"),
            };
            let table = &mut self.world.view.nodes.get_mut(&id(host)).unwrap().table;
            table.write(1, set, unset, |_| Signature([0; 64]));
        }
    }

    /// All that are alive, twice: whoever let go of something did so for one that came before it.
    fn settle(&mut self) {
        for host in [1, 2, 3, 1, 2, 3] {
            if self.world.view.nodes[&id(host)].state == PeerState::Alive {
                self.turn(host);
            }
        }
    }

    /// Who says that it announces an address, among those that are not dead.
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

#[test]
fn addresses_are_spread_and_only_a_lost_hosts_move() {
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
    // It is back, with an empty table, and has them again.
    let lost = &mut cluster.world.view.nodes.get_mut(&id(3)).unwrap().table;
    let keys: Vec<Key> = lost.announced().map(Key::Announced).collect();
    lost.write(1, vec![], keys, |_| Signature([0; 64]));
    cluster.hosts.insert(id(3), Ingress::default());
    cluster.world.host(3, PeerState::Alive);
    cluster.settle();
    let after: Vec<Vec<u8>> = addresses().iter().map(|address| cluster.holders(address)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_host_lets_go_when_the_next_one_has_it_and_not_before() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [first] = cluster.holders("192.0.2.1")[..] else { panic!() };
    cluster.world.host(first, PeerState::Dead);
    cluster.settle();
    let [second] = cluster.holders("192.0.2.1")[..] else { panic!() };
    let lost = &mut cluster.world.view.nodes.get_mut(&id(first)).unwrap().table;
    lost.write(1, vec![], vec![Key::Announced([192, 0, 2, 1].into())], |_| Signature([0; 64]));
    cluster.hosts.insert(id(first), Ingress::default());
    cluster.world.host(first, PeerState::Alive);
    cluster.turn(second);
    assert_eq!(cluster.holders("192.0.2.1"), [second], "nobody has it");
    cluster.turn(first);
    cluster.turn(second);
    assert_eq!(cluster.holders("192.0.2.1"), [first]);
}

#[test]
fn a_silent_daemon_keeps_what_its_kernel_has_and_takes_nothing() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [holder] = cluster.holders("192.0.2.1")[..] else { panic!() };
    cluster.world.host(holder, PeerState::Suspect);
    cluster.settle();
    assert_eq!(cluster.holders("192.0.2.1"), [holder]);
    // All that it would have got go to others.
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
fn an_address_is_where_backends_can_be_reached() {
    for (mode, policy) in [(Mode::L3, "Local"), (Mode::L2, "Local"), (Mode::L2, "Cluster")] {
        let mut cluster = Cluster::new(mode);
        let more = json!({ "externalTrafficPolicy": policy, "healthCheckNodePort": 32000 });
        cluster.service("web", "192.0.2.1", more);
        cluster.settle();
        // Without any somebody has to refuse.
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

#[test]
fn what_the_kernel_refused_is_not_said() {
    let mut cluster = Cluster::new(Mode::L3);
    cluster.service("web", "192.0.2.1", json!({}));
    cluster.settle();
    let [holder] = cluster.holders("192.0.2.1")[..] else { panic!() };
    let ingress = cluster.hosts.get_mut(&id(holder)).unwrap();
    let address: IpAddr = [192, 0, 2, 1].into();
    assert_eq!(ingress.claimed(), [address].into());
    ingress.record_outcome(address, false);
    assert!(ingress.claimed().is_empty());
    // Announced three times, and no more.
    assert_eq!((0..5).map(|_| ingress.again(8).len()).collect::<Vec<_>>(), [1, 1, 1, 0, 0]);
}
