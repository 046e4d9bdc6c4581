//! Which endpoints, blocks and devices the programs of the fast path know, and that quick plans lead to what a full one
//! wants.
#![cfg(test)]

use std::net::IpAddr;

use ovl_cluster::addresses;
use ovl_dataplane::device::Device;
use ovl_dataplane::fast::Fast;
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::{Backend, Mode};
use ovl_proto::record::{PeerState, Signature};
use ovl_proto::resource::{Kind, Labels};
use ovl_proto::table::{Endpoint, Entry, Key, PodIdentity};
use ovl_subsystems::fastpath::FastPath;
use ovl_subsystems::local::{Local, Obstacle};
use ovl_subsystems::{Change, Subsystem};
use proptest::prelude::*;
use serde_json::json;

mod host;
#[path = "../../cluster/tests/world/mod.rs"]
mod world;

use host::{cluster as seen, isolation, ranges, underlay};
use world::{NET, World, encrypt, encrypt_if_needed, endpoint, id, net, read, view_of};

fn routed(backend: Backend) -> World {
    let subnet = addresses::new_routed_subnet(net("10.60.0.0/16"), None).unwrap();
    let mut world = World::new();
    world.view = view_of(Mode::L3, backend, subnet, |n| net(&format!("10.60.{n}.0/24")));
    world
}

fn switched() -> World {
    let subnet = addresses::new_subnet(net("10.60.0.0/16")).unwrap();
    let mut world = World::new();
    world.view = view_of(Mode::L2, Backend::Vxlan, subnet, |n| net(&format!("10.60.{n}.0/24")));
    world
}

/// A host on which nothing stands in the way.
fn usable() -> Local {
    let mut local = Local { underlay: underlay(net("192.168.77.0/24")), ..Local::default() };
    local.fast.set_obstacle(Obstacle::Configured, None);
    local.fast.set_underlay(Device::new("eth0"));
    local
}

fn fast_path() -> FastPath {
    FastPath::new(&host::ranges(), true)
}

fn desired(world: &World, local: &Local) -> Fast {
    fast_path().desired(&seen(&world.view, local, &world.backends)).fast
}

/// Adds an endpoint of a host, or changes it, or removes it. Returns the entries to tell.
fn set_endpoint(world: &mut World, host: u8, n: u8, there: bool, label: bool) -> Vec<Entry> {
    set_sharing(world, host, n, there, label, None)
}

/// The same for an endpoint that may send from the MAC address of another one.
fn set_sharing(
    world: &mut World,
    host: u8,
    n: u8,
    there: bool,
    label: bool,
    shared: Option<Mac>,
) -> Vec<Entry> {
    let Entry::Endpoint(bare) = endpoint(10 * host + n, &format!("10.60.{host}.{}/32", n + 2)) else {
        panic!()
    };
    let labels = if label { Labels::from([("app".into(), "web".into())]) } else { Labels::new() };
    let allowed_macs = shared.into_iter().collect();
    let new = Entry::Endpoint(Endpoint { labels, allowed_macs, ..bare });
    let key = EndpointId([10 * host + n; 5]);
    let table = &mut world.view.nodes.get_mut(&id(host)).unwrap().table;
    let old = table.endpoint(key).cloned().map(Entry::Endpoint);
    let (set, unset) = if there { (vec![new.clone()], vec![]) } else { (vec![], vec![Key::Endpoint(key)]) };
    if old.is_some() || there {
        table.write(1, set, unset, |_| Signature([0; 64]));
    }
    old.into_iter().chain(there.then_some(new)).collect()
}

fn set_policy(world: &mut World, there: bool) -> ovl_proto::resource::ResourceKey {
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
    key
}

fn at(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn endpoints_blocks_and_devices_are_known() {
    let mut world = routed(Backend::Vxlan);
    set_endpoint(&mut world, 1, 1, true, false);
    set_endpoint(&mut world, 2, 1, true, false);
    let Fast { host, pods, paths, hooks } = desired(&world, &usable());
    let host = host.unwrap();
    assert!(host.on);
    assert_eq!((host.vtep.map(IpAddr::V4), host.port), (Some(at("192.168.77.1")), 4789));
    // Endpoints of other hosts are in their blocks.
    assert_eq!(pods.keys().copied().collect::<Vec<_>>(), [at("10.60.1.3")]);
    let pod = pods[&at("10.60.1.3")];
    assert!(pod.fast);
    let own = Device::endpoint(EndpointId([11; 5]));
    assert_eq!(pod.device, own);
    assert_eq!(paths.keys().copied().collect::<Vec<_>>(), [net("10.60.2.0/24"), net("10.60.3.0/24")]);
    let vxlan = paths[&net("10.60.2.0/24")].vxlan.unwrap();
    assert_eq!(IpAddr::V4(vxlan.vtep), at("192.168.77.2"));
    assert_eq!(vxlan.mac, addresses::mac_of_host(NET, id(2)));
    assert_eq!(vxlan.own_mac, Some(addresses::mac_of_host(NET, id(1))));
    for device in [own, Device::vxlan(NET), Device::new("eth0").unwrap()] {
        assert!(hooks.contains(&device), "{hooks:?}");
    }
    assert_eq!(hooks.len(), 3, "{hooks:?}");
}

#[test]
fn endpoints_of_switched_networks_are_known_one_by_one() {
    let mut world = switched();
    let local = usable();
    set_endpoint(&mut world, 2, 1, true, false);
    // Without an endpoint of its own, the host has no part of the network.
    assert!(desired(&world, &local).paths.is_empty());
    set_endpoint(&mut world, 1, 1, true, false);
    let Fast { pods, paths, hooks, .. } = desired(&world, &local);
    let pod = pods[&at("10.60.1.3")];
    assert!(pod.fast && pod.switched);
    assert_eq!(pods.len(), 1);
    assert_eq!(paths.keys().copied().collect::<Vec<_>>(), [net("10.60.2.3/32")]);
    let vxlan = paths[&net("10.60.2.3/32")].vxlan.unwrap();
    assert_eq!(IpAddr::V4(vxlan.vtep), at("192.168.77.2"));
    assert_eq!((vxlan.mac, vxlan.own_mac), (addresses::mac_of(NET, at("10.60.2.3")), None));
    assert!(hooks.contains(&Device::vxlan(NET)) && hooks.contains(&Device::endpoint(EndpointId([11; 5]))));
    // Another endpoint may send from its MAC address: frames for it are flooded.
    let mac = addresses::mac_of(NET, at("10.60.2.3"));
    set_sharing(&mut world, 3, 1, true, false, Some(mac));
    let paths = desired(&world, &local).paths;
    assert_eq!(paths.keys().copied().collect::<Vec<_>>(), [net("10.60.3.3/32")]);
}

#[test]
fn direct_routes_are_those_of_the_host() {
    let world = routed(Backend::Direct);
    let fast = desired(&world, &usable());
    assert_eq!(fast.paths.len(), 2);
    assert!(fast.paths.values().all(|path| path.vxlan.is_none()));
    assert!(!fast.hooks.contains(&Device::vxlan(NET)));
}

#[test]
fn what_is_not_for_it_takes_the_stack() {
    let mut world = routed(Backend::Vxlan);
    set_endpoint(&mut world, 1, 1, true, true);
    set_endpoint(&mut world, 1, 2, true, false);
    let local = usable();
    assert!(desired(&world, &local).pods.values().all(|pod| pod.fast));
    // A dead host's block has no path.
    world.host(2, PeerState::Dead);
    assert_eq!(desired(&world, &local).paths.len(), 1);
    // The network is encrypted.
    encrypt(&mut world.view, false);
    let fast = desired(&world, &local);
    assert!(fast.paths.is_empty() && fast.pods.values().all(|pod| !pod.fast));
    assert_eq!(fast.hooks.len(), 1, "{:?}", fast.hooks);
}

#[test]
fn flows_of_endpoints_that_policies_select_are_judged() {
    let mut world = routed(Backend::Vxlan);
    set_endpoint(&mut world, 1, 1, true, true);
    set_endpoint(&mut world, 1, 2, true, false);
    let local = usable();
    let how = |world: &World| {
        let pods = desired(world, &local).pods;
        ["10.60.1.3", "10.60.1.4"].map(|text| (pods[&at(text)].fast, pods[&at(text)].selected))
    };
    assert_eq!(how(&world), [(true, false), (true, false)]);
    set_policy(&mut world, true);
    assert_eq!(how(&world), [(true, true), (true, false)]);
    // The second one may be selected as well: its labels are not known.
    let Entry::Endpoint(second) = endpoint(12, "10.60.1.4/32") else { panic!() };
    let pod = PodIdentity { name: "second".to_owned(), uid: String::new(), created: 1 };
    let unknown = Endpoint { pod: Some(Box::new(pod)), ..second };
    let table = &mut world.view.nodes.get_mut(&id(1)).unwrap().table;
    table.write(1, vec![Entry::Endpoint(unknown)], vec![], |_| Signature([0; 64]));
    assert_eq!(how(&world), [(true, true), (false, false)]);
    set_policy(&mut world, false);
    assert_eq!(how(&world), [(true, false), (true, false)]);
    // A host that does not enforce policies.
    set_policy(&mut world, true);
    let fast = FastPath::new(&ranges(), false).desired(&seen(&world.view, &local, &world.backends)).fast;
    assert!(fast.pods.values().all(|pod| pod.fast && !pod.selected));
}

#[test]
fn nothing_is_known_where_something_stands_in_the_way() {
    let mut world = routed(Backend::Vxlan);
    set_endpoint(&mut world, 1, 1, true, false);
    assert_eq!(desired(&world, &Local::default()), Fast::default());
    let mut local = usable();
    local.fast.set_obstacle(Obstacle::Rules, Some("ufw".to_owned()));
    assert_eq!(desired(&world, &local), Fast::default());
    local.fast.set_obstacle(Obstacle::Rules, None);
    local.fast.set_paused(true);
    let paused = desired(&world, &local);
    assert!(!paused.host.unwrap().on && !paused.pods.is_empty());
}

#[test]
fn a_network_with_addresses_of_services_takes_the_stack() {
    let mut world = routed(Backend::Vxlan);
    set_endpoint(&mut world, 1, 1, true, false);
    let mut wide = ranges();
    wide.external = vec![net("10.60.1.0/30")];
    let local = usable();
    let fast = FastPath::new(&wide, true).desired(&seen(&world.view, &local, &world.backends)).fast;
    assert!(fast.pods.values().all(|pod| !pod.fast));
}

/// Something that happens to the host.
#[derive(Debug, Clone)]
enum Event {
    Endpoint { host: u8, n: u8, there: bool, label: bool, shared: Option<u8> },
    Host { host: u8, alive: bool },
    Policy(bool),
    Isolated(bool),
    Obstacle(bool),
    Paused(bool),
    Detour { host: u8, there: bool },
    Full,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (1..=3_u8, 0..4_u8, any::<bool>(), any::<bool>(), prop::option::weighted(0.2, 1..=3_u8))
            .prop_map(|(host, n, there, label, shared)| Event::Endpoint { host, n, there, label, shared }),
        2 => (2..=3_u8, any::<bool>()).prop_map(|(host, alive)| Event::Host { host, alive }),
        2 => any::<bool>().prop_map(Event::Policy),
        1 => any::<bool>().prop_map(Event::Isolated),
        1 => any::<bool>().prop_map(Event::Obstacle),
        1 => any::<bool>().prop_map(Event::Paused),
        1 => (2..=3_u8, any::<bool>()).prop_map(|(host, there)| Event::Detour { host, there }),
        1 => Just(Event::Full),
    ]
}

proptest! {
    #[test]
    fn quick_plans_lead_to_what_a_full_one_wants(
        is_switched: bool,
        events in prop::collection::vec(event(), 1..40),
        // Whether packets are sealed to hosts without a path in plain text.
        auto: bool,
    ) {
        let (mut local, mut real) = (usable(), fast_path());
        let mut world = if is_switched { switched() } else { routed(Backend::Vxlan) };
        if auto {
            encrypt_if_needed(&mut world.view, false);
        }
        let mut kernel = real.resync(&seen(&world.view, &local, &world.backends));
        for event in events {
            let mut told: Vec<Entry> = Vec::new();
            let (mut keys, mut changes) = (Vec::new(), Vec::new());
            match event {
                Event::Endpoint { host, n, there, label, shared } => {
                    let shared = shared.map(|host| addresses::mac_of(NET, at(&format!("10.60.{host}.3"))));
                    told = set_sharing(&mut world, host, n, there, label, shared);
                    let all = told.iter().map(|entry| Change::Entry { host: id(host), entry });
                    let cluster = seen(&world.view, &local, &world.backends);
                    all.for_each(|change| real.changed(&change, &cluster));
                }
                Event::Host { host, alive } => {
                    world.host(host, if alive { PeerState::Alive } else { PeerState::Dead });
                    changes.push(Change::Host(id(host)));
                }
                Event::Policy(there) => keys.push(set_policy(&mut world, there)),
                Event::Isolated(cut_off) => {
                    let own: Vec<_> = world.view.own().unwrap().table.endpoints().map(|it| it.id).collect();
                    local.isolation = isolation(own.into_iter().filter(|_| cut_off));
                    changes.push(Change::Rights(NET));
                }
                Event::Obstacle(there) => {
                    local.fast.set_obstacle(Obstacle::Kernel, there.then(|| "no".to_owned()));
                    changes.push(Change::FastPath);
                }
                Event::Paused(paused) => {
                    local.fast.set_paused(paused);
                    changes.push(Change::FastPath);
                }
                Event::Detour { host, there } => {
                    let open = there.then_some(((id(host), false), ([192, 0, 2, 1], 1).into()));
                    local.detours.replace(open.into_iter().collect());
                    changes.push(Change::Tunnel);
                }
                Event::Full => {}
            }
            let cluster = seen(&world.view, &local, &world.backends);
            if !keys.is_empty() {
                changes.push(Change::Resources(&keys));
            }
            changes.iter().for_each(|change| real.changed(change, &cluster));
            if matches!(event, Event::Full) {
                kernel = real.resync(&cluster);
            } else {
                real.plan(&cluster).iter().for_each(|op| op.apply_to(&mut kernel));
            }
            prop_assert_eq!(&real.sent().unwrap(), &real.desired(&cluster), "{:?}", told);
            // The operations do what the record says.
            prop_assert_eq!(&kernel, &real.sent().unwrap(), "{:?}", told);
        }
    }
}
