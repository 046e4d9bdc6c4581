//! The list of subsystems: a toy goes through plan, verify, attach and teardown without any other file knowing it, and
//! quick plans of the real ones lead to what a full one wants.
#![cfg(test)]

use std::collections::BTreeSet;

use ovl_cluster::addresses;
use ovl_cluster::backends::Backends;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::EndpointId;
use ovl_proto::object::{Backend, Encrypt, Mode, Network};
use ovl_proto::publish::{Published, Transport};
use ovl_proto::record::{PeerState, Signature};
use ovl_proto::resource::{Kind, Labels, Name, ResourceKey};
use ovl_proto::table::{Endpoint, Entry, Key};
use ovl_subsystems::local::Local;
use ovl_subsystems::local::ranges::{Conflict, Needed};
use ovl_subsystems::{Change, Cluster, Part, Subsystem, Subsystems, desired, plan, prepare, resync};
use proptest::prelude::*;
use serde_json::json;

mod host;
#[path = "../../cluster/tests/world/mod.rs"]
mod world;

use host::{cluster as seen, isolation, settings};
use world::{NET, World, encrypt, endpoint, give, id, net, read, view_of};

const SYSCTL: &str = "net.ipv4.ip_default_ttl";

/// Wants one setting of the kernel while this host has endpoints.
#[derive(Default)]
struct Toy {
    sent: bool,
    changed: bool,
}

impl Toy {
    fn wants(cluster: &Cluster<'_>) -> bool {
        let endpoints = cluster.view.own().map(|own| own.table.endpoints().count());
        endpoints.unwrap_or(0) + cluster.local.attaches.endpoints().count() > 0
    }

    fn part(wanted: bool) -> Dataplane {
        let sysctls = wanted.then(|| (SYSCTL.to_owned(), "32".to_owned()));
        Dataplane { sysctls: sysctls.into_iter().collect(), ..Dataplane::default() }
    }
}

impl Subsystem for Toy {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        self.changed |= match change {
            Change::Entry { host, .. } => *host == cluster.view.me,
            Change::Attaching(_) => true,
            _ => false,
        };
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        Self::part(Self::wants(cluster))
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.plan(cluster);
        self.desired(cluster)
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        self.changed = false;
        let before = std::mem::replace(&mut self.sent, Self::wants(cluster));
        diff(&Self::part(before), &Self::part(self.sent), true)
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(Self::part(self.sent))
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn withdraw(&mut self) {
        self.sent = false;
    }
}

fn subsystems() -> Subsystems {
    let mut all = Subsystems::new(settings());
    all.announcements.set_uplink(Device::new("eth0"));
    all
}

fn texts(ops: &[Op]) -> Vec<String> {
    ops.iter().map(ToString::to_string).collect()
}

#[test]
fn toy_subsystem_goes_through_plan_verify_attach_and_teardown() {
    let sysctl = format!("sysctl -w {SYSCTL}=32");
    let mut world = World::new();
    let mut local = Local::default();
    let mut real = subsystems();
    let mut toy = Toy::default();
    let mut all: Vec<&mut dyn Subsystem> = real.all().into_iter().collect();
    all.push(&mut toy);
    let network = world.view.networks[&NET].network.clone();
    let Entry::Endpoint(new) = endpoint(1, "10.9.0.9/24") else { panic!() };

    let backends = Backends::default();

    // Verify: nothing is wanted yet.
    assert!(!desired(&all, &seen(&world.view, &local, &backends)).sysctls.contains_key(SYSCTL));

    // Attach: its part comes before the endpoint's interfaces.
    local.attaches.begin(new.clone());
    local.attaches.want(NET);
    let now = seen(&world.view, &local, &backends);
    for change in [Change::Built(NET), Change::Attaching(&new)] {
        all.iter_mut().for_each(|subsystem| subsystem.changed(&change, &now));
    }
    let part = prepare(&mut all, &new, &network, &now);
    assert!(texts(&part.before).contains(&sysctl), "{:?}", part.before);

    // The endpoint is there: a quick plan has nothing more to do for it, and verify finds it.
    local.attaches.end(new.id);
    local.attaches.unwant(NET);
    give(&mut world.view, 1, vec![Entry::Endpoint(new.clone())]);
    let entry = Entry::Endpoint(new.clone());
    let now = seen(&world.view, &local, &backends);
    all.iter_mut().for_each(|subsystem| subsystem.attached(&new, &part.wants));
    for change in [Change::Built(NET), Change::Entry { host: id(1), entry: &entry }] {
        all.iter_mut().for_each(|subsystem| subsystem.changed(&change, &now));
    }
    assert!(!texts(&plan(&mut all, &now)).contains(&sysctl));
    assert_eq!(desired(&all, &now).sysctls[SYSCTL], "32");
    assert_eq!(resync(&mut all, &now).sysctls[SYSCTL], "32");

    // Teardown: it wants nothing any more, and counts nothing as sent.
    all.iter_mut().for_each(|subsystem| subsystem.withdraw());
    assert!(all.iter().all(|subsystem| subsystem.sent() == Some(Dataplane::default())));
}

/// Something that happens to the cluster.
#[derive(Debug, Clone)]
enum Event {
    /// An endpoint is attached, changed or detached.
    Endpoint { host: u8, endpoint: u8, there: bool, label: bool, port: bool },
    /// A host dies or comes back.
    Host { host: u8, alive: bool },
    /// A policy is applied or deleted.
    Policy(bool),
    /// A Service is applied or deleted. It has the address of a load balancer.
    Service(bool),
    /// This host's endpoints are cut off, or are no longer.
    Isolated(bool),
    /// This host is connected to a prefix that the network covers, or is no longer.
    Refused(bool),
    /// An attach begins, or one that began fails.
    Attaching(bool),
    /// All networks become encrypted, always or only to hosts without a path in plain text, or are no longer.
    Encrypted(Encrypt),
    /// A host is reached by a detour, or is no longer.
    Detour { host: u8, there: bool },
    /// The network becomes internal, or is no longer.
    Internal(bool),
    /// Endpoints of the network use the resolver.
    Resolve,
    /// A full pass.
    Full,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (1..=3_u8, 0..4_u8, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(host, endpoint, there, label, port)| Event::Endpoint { host, endpoint, there, label, port }
        ),
        2 => (2..=3_u8, any::<bool>()).prop_map(|(host, alive)| Event::Host { host, alive }),
        1 => any::<bool>().prop_map(Event::Policy),
        2 => any::<bool>().prop_map(Event::Service),
        1 => any::<bool>().prop_map(Event::Isolated),
        1 => any::<bool>().prop_map(Event::Refused),
        1 => any::<bool>().prop_map(Event::Attaching),
        2 => prop_oneof![Just(Encrypt::No), Just(Encrypt::Yes), Just(Encrypt::Auto)].prop_map(Event::Encrypted),
        2 => (2..=3_u8, any::<bool>()).prop_map(|(host, there)| Event::Detour { host, there }),
        1 => any::<bool>().prop_map(Event::Internal),
        1 => Just(Event::Resolve),
        1 => Just(Event::Full),
    ]
}

fn published(host: u16) -> Published {
    Published { transport: Transport::Udp, address: None, host, container: 80, count: 1 }
}

fn balanced_service(world: &mut World) {
    world.put(read(
        Kind::Service,
        json!({
            "metadata": { "name": "web", "namespace": "default" },
            "spec": {
                "type": "LoadBalancer",
                "selector": { "app": "web" },
                "ports": [{ "port": 80, "targetPort": 8080 }],
            },
            "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.9" }] } },
        }),
    ));
}

fn tell(all: &mut [&mut dyn Subsystem], change: Change<'_>, world: &World, local: &Local) {
    let cluster = seen(&world.view, local, &world.backends);
    all.iter_mut().for_each(|subsystem| subsystem.changed(&change, &cluster));
}

/// Carries out an event and tells what changed, as the daemon does.
fn happen(event: &Event, world: &mut World, local: &mut Local, real: &mut Subsystems) {
    if matches!(event, Event::Resolve) {
        real.names.resolve(NET);
    }
    let all = &mut real.all()[..];
    match *event {
        Event::Endpoint { host, endpoint: n, there, label, port } => {
            let address = format!("10.9.0.{}/24", 8 * host + n + 1);
            let Entry::Endpoint(bare) = endpoint(10 * host + n, &address) else { panic!() };
            let labels = if label { Labels::from([("app".into(), "web".into())]) } else { Labels::new() };
            let publish = if port { vec![published(8000 + u16::from(n))] } else { Vec::new() };
            let allowed = if label { vec![net("10.9.0.200/32")] } else { vec![] };
            let new = Entry::Endpoint(Endpoint { labels, publish, allowed, ..bare });
            let key = EndpointId([10 * host + n; 5]);
            let was_built = local.is_built(&world.view, NET);
            let table = &mut world.view.nodes.get_mut(&id(host)).unwrap().table;
            let old = table.endpoint(key).cloned().map(Entry::Endpoint);
            if old.is_none() && !there {
                return;
            }
            let (set, unset) =
                if there { (vec![new.clone()], vec![]) } else { (vec![], vec![Key::Endpoint(key)]) };
            table.write(1, set, unset, |_| Signature([0; 64]));
            world.backends.touch_endpoint(&world.view, id(host), key);
            if local.is_built(&world.view, NET) != was_built {
                tell(all, Change::Built(NET), world, local);
            }
            for entry in old.iter().chain(there.then_some(&new)) {
                tell(all, Change::Entry { host: id(host), entry }, world, local);
            }
        }
        Event::Host { host, alive } => {
            world.host(host, if alive { PeerState::Alive } else { PeerState::Dead });
            tell(all, Change::Rights(NET), world, local);
            tell(all, Change::Host(id(host)), world, local);
        }
        Event::Policy(there) => {
            let policy = read(
                Kind::NetworkPolicy,
                json!({
                    "metadata": { "name": "web", "namespace": "default" },
                    "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"] },
                }),
            );
            let key = policy.key();
            if there {
                world.put(policy);
            } else {
                world.drop(Kind::NetworkPolicy, "web");
            }
            tell(all, Change::Resources(&[key]), world, local);
        }
        Event::Service(there) => {
            if there {
                balanced_service(world);
            } else {
                world.drop(Kind::Service, "web");
            }
            let key = ResourceKey { kind: Kind::Service, name: Name::new("default", "web") };
            tell(all, Change::Resources(&[key]), world, local);
        }
        Event::Isolated(cut_off) => {
            let own = world.view.own().unwrap().table.endpoints().map(|endpoint| endpoint.id);
            local.isolation = isolation(own.filter(|_| cut_off).collect::<BTreeSet<_>>());
            tell(all, Change::Rights(NET), world, local);
            tell(all, Change::ThisHost, world, local);
        }
        Event::Refused(covered) => {
            let subnet = net("10.9.0.0/24");
            let needed = Needed::Connected { prefix: subnet, device: "lan0".to_owned() };
            let conflict = covered.then_some((NET, Conflict { subnet, needed }));
            for network in local.refused.replace(conflict.into_iter().collect()) {
                tell(all, Change::Built(network), world, local);
                tell(all, Change::Rights(network), world, local);
                tell(all, Change::ThisHost, world, local);
            }
        }
        Event::Attaching(begins) => {
            let Entry::Endpoint(bare) = endpoint(99, "10.9.0.14/24") else { panic!() };
            let new = Endpoint { publish: vec![published(7000)], ..bare };
            let was_built = local.is_built(&world.view, NET);
            if begins && local.attaches.get(new.id).is_none() {
                local.attaches.want(NET);
                local.attaches.begin(new.clone());
            } else if !begins && local.attaches.end(new.id).is_some() {
                local.attaches.unwant(NET);
            }
            if local.is_built(&world.view, NET) != was_built {
                tell(all, Change::Built(NET), world, local);
            }
            tell(all, Change::Attaching(&new), world, local);
        }
        Event::Encrypted(when) => {
            encrypt(&mut world.view, false);
            let network = &mut world.view.networks.get_mut(&NET).unwrap().network;
            network.encrypted = when == Encrypt::Yes;
            network.auto_encrypt = when == Encrypt::Auto;
            tell(all, Change::Network(NET), world, local);
            tell(all, Change::Tunnel, world, local);
        }
        Event::Detour { host, there } => {
            let open = there.then_some(((id(host), false), ([192, 0, 2, 1], 1).into()));
            if !local.detours.replace(open.into_iter().collect()).is_empty() {
                tell(all, Change::Tunnel, world, local);
            }
        }
        Event::Internal(internal) => {
            world.view.networks.get_mut(&NET).unwrap().network.internal = internal;
            tell(all, Change::Network(NET), world, local);
        }
        Event::Resolve | Event::Full => {}
    }
    let settled = world.settle();
    tell(all, Change::Backends(&settled), world, local);
}

proptest! {
    #[test]
    fn quick_plans_lead_to_what_a_full_one_wants(events in prop::collection::vec(event(), 1..30)) {
        let mut world = World::new();
        let mut local = Local::default();
        let mut real = subsystems();
        // A daemon begins with a full pass.
        resync(&mut real.all(), &seen(&world.view, &local, &world.backends));
        for event in events {
            happen(&event, &mut world, &mut local, &mut real);
            let mut all = real.all();
            let cluster = seen(&world.view, &local, &world.backends);
            if matches!(event, Event::Full) {
                resync(&mut all, &cluster);
            } else {
                plan(&mut all, &cluster);
            }
            for (index, subsystem) in all.iter().enumerate() {
                prop_assert_eq!(subsystem.sent(), Some(subsystem.desired(&cluster)), "subsystem {}", index);
            }
        }
    }
}

/// A subsystem that was not told of a change says so: what it sent is not what it wants.
#[test]
fn a_change_that_was_not_told_is_found_by_the_comparison() {
    let mut world = World::new();
    let mut local = Local::default();
    let mut real = subsystems();
    resync(&mut real.all(), &seen(&world.view, &local, &world.backends));
    let there = Event::Endpoint { host: 1, endpoint: 1, there: true, label: true, port: true };
    for event in [there, Event::Resolve, Event::Service(true)] {
        happen(&event, &mut world, &mut local, &mut real);
    }
    let differing = |real: &mut Subsystems, world: &World, local: &Local| -> Vec<usize> {
        let cluster = seen(&world.view, local, &world.backends);
        let all = real.all().into_iter().enumerate();
        all.filter(|(_, it)| it.sent() != Some(it.desired(&cluster))).map(|(index, _)| index).collect()
    };
    plan(&mut real.all(), &seen(&world.view, &local, &world.backends));
    assert_eq!(differing(&mut real, &world, &local), Vec::<usize>::new());

    // The Service is gone: its address, its elements, and the hairpin mode of ports. The endpoint is gone: its port.
    world.drop(Kind::Service, "web");
    world.view.nodes.get_mut(&id(1)).unwrap().table.write(
        1,
        vec![],
        vec![Key::Endpoint(EndpointId([11; 5]))],
        |_| Signature([0; 64]),
    );
    world.settle();
    let [guard, base_filter, networks, publish, names, services, announcements] = [0, 2, 4, 5, 6, 7, 8];
    assert_eq!(
        differing(&mut real, &world, &local),
        [guard, base_filter, networks, publish, names, services, announcements]
    );
}

/// Packets to a routed network lead through the earlier tunnel interface until they lead through the later one.
#[test]
fn a_tunnel_interface_ends_after_the_routes_through_it() {
    let subnet = addresses::new_routed_subnet(net("10.60.0.0/16"), None).unwrap();
    let mut world = World::new();
    world.view = view_of(Mode::L3, Backend::Vxlan, subnet, |n| net(&format!("10.60.{n}.0/24")));
    encrypt(&mut world.view, false);
    let local = Local::default();
    let mut real = subsystems();
    let publish = |world: &mut World, n: u8, port: u16, rotating: bool| {
        let tunnel = world.view.nodes.get_mut(&id(n)).unwrap().record.tunnel.as_mut().unwrap();
        (tunnel.port, tunnel.epoch, tunnel.rotating) = (port, 1, rotating);
    };
    // This host has an interface of each epoch, the others are about to follow.
    publish(&mut world, 1, 51941, true);
    tell(&mut real.all(), Change::Network(NET), &world, &local);
    plan(&mut real.all(), &seen(&world.view, &local, &world.backends));
    // All have followed.
    publish(&mut world, 1, 51941, false);
    publish(&mut world, 2, 51941, false);
    publish(&mut world, 3, 51941, false);
    tell(&mut real.all(), Change::Tunnel, &world, &local);
    let ops = texts(&plan(&mut real.all(), &seen(&world.view, &local, &world.backends)));
    let place =
        |start: &str| ops.iter().position(|op| op.starts_with(start)).unwrap_or_else(|| panic!("{ops:?}"));
    assert!(place("ip route replace 10.60.2.0/24 dev ovt-1") < place("ip link del ovt-0"), "{ops:?}");
    assert_eq!(place("ip link del ovt-0"), ops.len() - 1, "{ops:?}");
}
