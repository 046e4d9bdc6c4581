//! What leads queries to the resolver: tables and addresses on bridges.

use ovl_cluster::backends::Backends;
use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::Table;
use ovl_dataplane::op::{AddressOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::EndpointId;
use ovl_proto::record::Signature;
use ovl_proto::table::{Entry, Key};
use ovl_subsystems::local::Local;
use ovl_subsystems::names::Names;
use ovl_subsystems::{Change, Outcome, Subsystem};
use serde_json::json;

use super::host::cluster;
use super::world::{NET, World, endpoint, give, id, net, switched};

fn texts(ops: &[Op]) -> Vec<String> {
    ops.iter().map(ToString::to_string).collect()
}

fn own_endpoint() -> (View, Entry) {
    let mut view = switched();
    let entry = endpoint(1, "10.9.0.9/24");
    give(&mut view, 1, vec![entry.clone()]);
    (view, entry)
}

#[test]
fn the_first_network_brings_the_tables_and_the_last_one_takes_them() {
    let (mut view, entry) = own_endpoint();
    let (local, backends) = (Local::default(), Backends::default());
    let mut names = Names::new("ovl.internal", "cluster.local", true, vec![[10, 96, 0, 10].into()], false);
    assert_eq!(names.plan(&cluster(&view, &local, &backends)), []);
    names.resolve(NET);
    let ops = texts(&names.plan(&cluster(&view, &local, &backends)));
    assert_eq!(
        ops,
        [
            "nft -f - # table inet ovl-resolver",
            "nft -f - # table ip ovl-resolver",
            "nft -f - # table ip6 ovl-resolver",
            "ip addr replace 169.254.79.10/32 dev ovb-00000000",
            "ip addr replace 169.254.79.53/32 dev ovb-00000000",
        ]
    );
    let queries = &names.sent().unwrap().tables[&Table::Resolver];
    let rules: Vec<&String> = queries.chains.iter().flat_map(|chain| &chain.rules).collect();
    let to_cluster =
        "ip daddr 10.96.0.10 iifname != \"lo\" udp dport 53 ip daddr set 169.254.79.10 udp dport set 7953";
    assert!(rules.iter().any(|rule| rule.starts_with(to_cluster)), "{rules:?}");
    // Every packet of the host passes the chains at hooks: one look-up for each address family.
    for chain in queries.chains.iter().filter(|chain| chain.hook.is_some()) {
        let families: Vec<&str> = chain.rules.iter().filter_map(|rule| rule.split(' ').next()).collect();
        assert_eq!(families, ["ip", "ip6"], "{chain:?}");
    }

    // The last endpoint goes, and with it the bridge.
    let table = &mut view.nodes.get_mut(&id(1)).unwrap().table;
    table.write(1, vec![], vec![Key::Endpoint(EndpointId([1; 5]))], |_| Signature([0; 64]));
    let gone = cluster(&view, &local, &backends);
    names.changed(&Change::Entry { host: id(1), entry: &entry }, &gone);
    let ops = texts(&names.plan(&gone));
    assert_eq!(ops.iter().filter(|op| op.starts_with("nft delete table")).count(), 3, "{ops:?}");
    assert_eq!(ops.iter().filter(|op| op.starts_with("ip addr del")).count(), 2, "{ops:?}");
    assert_eq!(names.sent(), Some(Dataplane::default()));
}

/// Programs of the host ask the cluster DNS too, whether or not the host has a network.
#[test]
fn the_host_is_led_to_the_resolver_while_there_are_services() {
    let mut world = World::new();
    world.attach(1, 1, &[], true);
    let (local, backends) = (Local::default(), Backends::default());
    let mut names = Names::new("ovl.internal", "cluster.local", true, vec![[10, 96, 0, 10].into()], false);
    assert_eq!(names.plan(&cluster(&world.view, &local, &backends)), []);
    world.service("web", json!({}));
    let now = cluster(&world.view, &local, &backends);
    assert_eq!(texts(&names.plan(&now)), ["nft -f - # table inet ovl-resolver"]);
    assert_eq!(names.sent(), Some(names.desired(&now)));
    let table = &names.sent().unwrap().tables[&Table::Resolver];
    let chain = table.chains.iter().find(|chain| chain.name == "host").unwrap();
    let hook = table.chains.iter().find(|chain| chain.name == "host-hook").unwrap();
    assert!(hook.hook.as_ref().unwrap().starts_with("type nat hook output"), "{hook:?}");
    let to_cluster = "ip daddr 10.96.0.10 meta l4proto { tcp, udp } th dport 53 dnat ip to 127.0.0.1:7955";
    assert!(chain.rules.contains(&to_cluster.to_owned()), "{chain:?}");
    // Endpoints need the tables past firewalls too.
    names.resolve(NET);
    let ops = texts(&names.plan(&now));
    assert!(ops.contains(&"nft -f - # table ip ovl-resolver".to_owned()), "{ops:?}");
    assert!(!ops.contains(&"nft -f - # table inet ovl-resolver".to_owned()), "{ops:?}");
    assert_eq!(names.sent(), Some(names.desired(&now)));
}

#[test]
fn a_network_that_was_refused_is_sent_again_with_the_next_endpoint_only() {
    let (view, entry) = own_endpoint();
    let (local, backends) = (Local::default(), Backends::default());
    let now = cluster(&view, &local, &backends);
    let mut names = Names::new("ovl.internal", "cluster.local", true, Vec::new(), false);
    names.resolve(NET);
    let ops = names.plan(&now);
    let op = Op::Address(AddressOp::Add(Device::bridge(NET), net("169.254.79.53/32")));
    assert!(ops.contains(&op), "{ops:?}");
    names.outcome(Outcome { op: &op, refusal: Some("no such device") });
    assert_eq!(names.sent(), None);
    assert_eq!(names.plan(&now), []);
    let Entry::Endpoint(next) = entry else { panic!() };
    let network = &view.networks[&NET].network;
    assert!(names.prepare(&next, network, &now).before.contains(&op));
    assert_eq!(names.sent(), Some(names.desired(&now)));
}
