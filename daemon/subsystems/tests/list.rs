//! The list of subsystems: a toy goes through plan, verify, attach and teardown without any other file knowing it, and
//! quick plans of the real ones lead to what a full one wants.
#![cfg(test)]

use std::collections::BTreeMap;

use ovl_cluster::backends::Backends;
use ovl_cluster::view::View;
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::EndpointId;
use ovl_proto::object::Network;
use ovl_proto::record::{PeerState, Signature};
use ovl_proto::resource::Kind;
use ovl_proto::table::{Endpoint, Entry, Key};
use ovl_subsystems::guard::Guard;
use ovl_subsystems::local::Local;
use ovl_subsystems::names::NameTracker;
use ovl_subsystems::networks::Networks;
use ovl_subsystems::policy::Enforcement;
use ovl_subsystems::services::{Announcements, Translation};
use ovl_subsystems::{Change, Cluster, Part, Subsystem, Subsystems, desired, plan, prepare, resync};
use proptest::prelude::*;
use serde_json::json;

#[path = "../../cluster/tests/world/mod.rs"]
mod world;

use world::{NET, World, endpoint, give, id, net, read};

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
        endpoints.unwrap_or(0) + cluster.local.attaching.len() > 0
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
    Subsystems {
        guard: Guard::default(),
        policy: Enforcement::new(7),
        names: NameTracker::default(),
        networks: Networks::default(),
        services: Translation::default(),
        announcements: Announcements::default(),
    }
}

fn seen<'a>(view: &'a View, local: &'a Local, backends: &'a Backends) -> Cluster<'a> {
    Cluster { view, backends, local, caught_up: true }
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
    let [a, b, c, d, e, f] = real.all();
    let mut all: [&mut dyn Subsystem; 7] = [a, b, c, d, e, f, &mut toy];
    let network = world.view.networks[&NET].network.clone();
    let Entry::Endpoint(new) = endpoint(1, "10.9.0.9/24") else { panic!() };

    let backends = Backends::default();

    // Verify: nothing is wanted yet.
    assert!(!desired(&all, &seen(&world.view, &local, &backends)).sysctls.contains_key(SYSCTL));

    // Attach: its part comes before the endpoint's interfaces.
    local.attaching.insert(new.id, new.clone());
    local.wanted.insert(NET, 1);
    let now = seen(&world.view, &local, &backends);
    for change in [Change::Built(NET), Change::Attaching(&new)] {
        all.iter_mut().for_each(|subsystem| subsystem.changed(&change, &now));
    }
    let part = prepare(&mut all, &new, &network, &now);
    assert!(texts(&part.before).contains(&sysctl), "{:?}", part.before);

    // The endpoint is there: a quick plan has nothing more to do for it, and verify finds it.
    local.attaching.clear();
    local.wanted.clear();
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
    assert_eq!(all[6].sent(), Some(Dataplane::default()));
}

/// Something that happens to the cluster.
#[derive(Debug, Clone)]
enum Event {
    /// An endpoint is attached, changed or detached.
    Endpoint { host: u8, endpoint: u8, there: bool, label: bool },
    /// A host dies or comes back.
    Host { host: u8, alive: bool },
    /// A policy is applied or deleted.
    Policy(bool),
    /// A Service is applied or deleted.
    Service(bool),
    /// A full pass.
    Full,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (1..=3_u8, 0..4_u8, any::<bool>(), any::<bool>())
            .prop_map(|(host, endpoint, there, label)| Event::Endpoint { host, endpoint, there, label }),
        2 => (2..=3_u8, any::<bool>()).prop_map(|(host, alive)| Event::Host { host, alive }),
        1 => any::<bool>().prop_map(Event::Policy),
        1 => any::<bool>().prop_map(Event::Service),
        1 => Just(Event::Full),
    ]
}

fn tell(all: &mut [&mut dyn Subsystem], change: Change<'_>, world: &World, local: &Local) {
    let cluster = seen(&world.view, local, &world.backends);
    all.iter_mut().for_each(|subsystem| subsystem.changed(&change, &cluster));
}

/// Carries out an event and tells what changed, as the daemon does.
fn happen(event: &Event, world: &mut World, local: &mut Local, all: &mut [&mut dyn Subsystem]) {
    match *event {
        Event::Endpoint { host, endpoint: n, there, label } => {
            let address = format!("10.9.0.{}/24", 8 * host + n + 1);
            let Entry::Endpoint(bare) = endpoint(10 * host + n, &address) else { panic!() };
            let labels = if label { BTreeMap::from([("app".into(), "web".into())]) } else { BTreeMap::new() };
            let allowed = if label { vec![net("10.9.0.200/32")] } else { vec![] };
            let new = Entry::Endpoint(Endpoint { labels, allowed, ..bare });
            let key = EndpointId([10 * host + n; 5]);
            let table = &mut world.view.nodes.get_mut(&id(host)).unwrap().table;
            let old = table.endpoint(key).cloned().map(Entry::Endpoint);
            if old.is_none() && !there {
                return;
            }
            let (set, unset) =
                if there { (vec![new.clone()], vec![]) } else { (vec![], vec![Key::Endpoint(key)]) };
            table.write(1, set, unset, |_| Signature([0; 64]));
            world.backends.touch_endpoint(&world.view, id(host), key);
            if host == 1 {
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
                world.service("web", json!({ "app": "web" }));
            } else {
                world.drop(Kind::Service, "web");
            }
        }
        Event::Full => {}
    }
    let settled = world.settle();
    if world.view.has_services() && !local.served {
        local.served = true;
        tell(all, Change::Built(NET), world, local);
    }
    tell(all, Change::Backends(&settled), world, local);
}

proptest! {
    #[test]
    fn quick_plans_lead_to_what_a_full_one_wants(events in prop::collection::vec(event(), 1..30)) {
        let mut world = World::new();
        let mut local = Local::default();
        let mut real = subsystems();
        let mut all = real.all();
        for event in events {
            happen(&event, &mut world, &mut local, &mut all);
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
