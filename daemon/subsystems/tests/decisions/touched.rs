//! Tests that [`ovl_subsystems::networks::touched`] plans single changes as a comparison of the whole network does, and
//! that the index of an owner table finds what a search finds.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_cluster::addresses;
use ovl_cluster::table::Table;
use ovl_cluster::view::View;
use ovl_dataplane::nft;
use ovl_dataplane::op::{LinkOp, NftOp, Op};
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::{Backend, Mode};
use ovl_proto::publish::{Published, Transport};
use ovl_proto::record::Signature;
use ovl_proto::resource::{Kind, Labels};
use ovl_proto::table::{Endpoint, Entry, Key};
use ovl_proto::wire::fields::Unknown;
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::desired::network_part;
use ovl_subsystems::networks::touched::{TouchedEndpoints, plan};
use proptest::prelude::*;
use serde_json::json;

use super::host::isolation;
use super::world::{NET, encrypt, encrypt_if_needed, id, net, read, switched, view_of};

/// One endpoint of a host is added, changed or removed. There are few of them, so that they collide.
#[derive(Debug, Clone)]
struct Step {
    host: u8,
    endpoint: u8,
    /// The last byte of its address. `None` if it is removed.
    address: Option<u8>,
    second: Option<u8>,
    /// A MAC address that is not derived from the address.
    mac: Option<u8>,
    /// The transport of a published port, which no other endpoint has.
    publishes: Option<Transport>,
    /// The last byte of an address that it is allowed beside its own.
    allowed: Option<u8>,
    /// A MAC address that it is allowed, of those that endpoints have or share.
    allowed_mac: Option<u8>,
    /// The last bytes of the multicast groups that it has joined, of either family. `None` if they are not followed.
    groups: Option<BTreeSet<u8>>,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop::option::weighted(0.7, 6..34_u8);
    let second = prop::option::weighted(0.1, 6..34_u8);
    let publishes = prop::option::weighted(0.4, prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)]);
    let mac = prop::option::weighted(0.4, 0..3_u8);
    let allowed = (prop::option::weighted(0.3, 6..34_u8), prop::option::weighted(0.3, 0..6_u8));
    let groups = prop::option::weighted(0.8, prop::collection::btree_set(0..4_u8, 0..3));
    (1..=3_u8, 0..6_u8, address, second, mac, publishes, (allowed, groups)).prop_map(
        |(host, endpoint, address, second, mac, publishes, ((allowed, allowed_mac), groups))| Step {
            host,
            endpoint,
            address,
            second,
            mac,
            publishes,
            allowed,
            allowed_mac,
            groups,
        },
    )
}

/// Groups of both families, and one whose MAC address belongs to a group that is not followed.
fn group(last: u8) -> IpAddr {
    match last {
        0 => [239, 0, 0, 18].into(),
        1 => [239, 1, 2, 3].into(),
        _ => [0xff15, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
    }
}

fn entry(step: &Step, address: u8) -> Endpoint {
    let net = |last| net(&format!("10.9.0.{last}/24"));
    let first = net(address);
    Endpoint {
        id: EndpointId([step.endpoint; 5]),
        name: format!("e{}", step.endpoint % 3),
        namespace: "default".to_owned(),
        network: NET,
        mac: step.mac.map_or_else(|| addresses::mac_of(NET, first.addr()), |last| Mac([2, 0, 0, 0, 0, last])),
        addresses: [address].into_iter().chain(step.second).map(net).collect(),
        aliases: Vec::new(),
        labels: Labels::new(),
        ready: true,
        publish: step.publishes.map_or_else(Vec::new, |transport| {
            let host = 8000 + u16::from(step.endpoint);
            vec![Published { transport, address: None, host, container: 80, count: 1 }]
        }),
        allowed: step.allowed.map(|last| net(last).addr().into()).into_iter().collect(),
        allowed_macs: step.allowed_mac.map(|last| Mac([2, 0, 0, 0, 0, last])).into_iter().collect(),
        groups: step.groups.as_ref().map(|groups| groups.iter().map(|last| group(*last)).collect()),
        pod: None,
        described: None,
        unknown: Unknown::default(),
    }
}

/// Writes the entry and returns the touched endpoints.
fn write(view: &mut View, step: &Step) -> TouchedEndpoints {
    let mut touched = TouchedEndpoints::default();
    let (me, host) = (view.me, id(step.host));
    let table = &mut view.nodes.get_mut(&host).unwrap().table;
    let endpoint = EndpointId([step.endpoint; 5]);
    if let Some(old) = table.endpoint(endpoint) {
        touched.note(me, host, old);
    }
    let new = step.address.map(|address| entry(step, address));
    if let Some(new) = &new {
        touched.note(me, host, new);
    }
    let unset = if new.is_some() { Vec::new() } else { vec![Key::Endpoint(endpoint)] };
    table.write(1, new.into_iter().map(Entry::Endpoint).collect(), unset, |_| Signature([0; 64]));
    touched
}

fn check_index(table: &Table) {
    let all: Vec<&Endpoint> = table.endpoints().collect();
    assert_eq!(table.endpoints_on(NET).collect::<Vec<_>>(), all);
    assert_eq!(table.networks().collect::<Vec<_>>(), if all.is_empty() { vec![] } else { vec![NET] });
    for endpoint in &all {
        let with = |fits: &dyn Fn(&Endpoint) -> bool| -> Vec<&Endpoint> {
            all.iter().copied().filter(|other| fits(other)).collect()
        };
        assert_eq!(
            table.with_mac(NET, endpoint.mac).collect::<Vec<_>>(),
            with(&|other| other.mac == endpoint.mac)
        );
        assert_eq!(
            table.named(&endpoint.name).collect::<Vec<_>>(),
            with(&|other| other.name == endpoint.name)
        );
        for mac in &endpoint.allowed_macs {
            assert_eq!(
                table.allowing_mac(NET, *mac).collect::<Vec<_>>(),
                with(&|other| other.allowed_macs.contains(mac))
            );
        }
        for at in endpoint.allowed_addresses() {
            assert_eq!(
                table.allowing_address(NET, at).collect::<Vec<_>>(),
                with(&|other| other.allowed_addresses().any(|allowed| allowed == at))
            );
        }
        for at in endpoint.addresses.iter().map(ipnet::IpNet::addr) {
            assert_eq!(
                table.with_address(NET, at).collect::<Vec<_>>(),
                with(&|other| other.addresses.iter().any(|net| net.addr() == at))
            );
        }
    }
    let groups: BTreeSet<IpAddr> =
        all.iter().flat_map(|endpoint| &endpoint.groups).flatten().copied().collect();
    assert_eq!(table.groups(NET).collect::<Vec<_>>(), groups.into_iter().collect::<Vec<_>>());
    assert_eq!(table.follows_groups(NET), all.iter().all(|endpoint| endpoint.groups.is_some()));
    let ranges: BTreeSet<_> =
        all.iter().flat_map(|endpoint| &endpoint.addresses).map(ipnet::IpNet::trunc).collect();
    assert_eq!(table.ranges(NET).collect::<BTreeSet<_>>(), ranges);
}

/// Returns a routed network with the blocks of the switched one.
fn small_blocks() -> View {
    let subnet = addresses::new_routed_subnet(net("10.9.0.0/24"), Some(29)).unwrap();
    view_of(Mode::L3, Backend::Vxlan, subnet, |n| net(&format!("10.9.0.{}/29", 8 * n)))
}

fn is_taken(view: &View, step: &Step) -> bool {
    let Some(new) = step.address.map(|address| entry(step, address)) else { return false };
    let table = &view.nodes[&id(step.host)].table;
    let mut others = new.addresses.iter().flat_map(|net| table.with_address(NET, net.addr()));
    others.any(|other| other.id != new.id)
}

/// Checks that each bridge port with hairpin mode has a guard, and no other port has.
fn check_guarded(dataplane: &Dataplane) {
    let guards: usize = dataplane
        .elements
        .sets()
        .filter(|(set, _)| set.table == nft::Table::PublishFrames)
        .map(|(_, held)| held.len())
        .sum();
    let has_hairpin = |link: &&Link| matches!(link, Link::Endpoint { hairpin: true, .. });
    assert_eq!(guards, dataplane.links.values().filter(has_hairpin).count());
}

/// Checks that a guard is added before its port gets hairpin mode, and deleted after it loses it.
fn check_guards(ops: &[Op]) {
    let mut unguarded = false;
    let mut enabled = false;
    for op in ops {
        match op {
            Op::Nft(NftOp::DeleteElement(set, _)) if set.table == nft::Table::PublishFrames => {
                unguarded = true
            }
            Op::Nft(NftOp::SetElement(element)) if element.set.table == nft::Table::PublishFrames => {
                assert!(!enabled, "{ops:?}");
            }
            Op::Link(LinkOp::Set(
                _,
                Link::Endpoint { hairpin: was, .. },
                Link::Endpoint { hairpin: is, .. },
            )) => {
                assert!(is >= was || !unguarded, "{ops:?}");
                enabled |= is > was;
            }
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn plans_of_single_changes_equal_a_comparison_of_the_whole_network(
        steps in prop::collection::vec((step(), 1..4_usize), 1..40),
        isolated in prop::collection::btree_set(0..6_u8, 0..2),
        routed: bool,
        // `Some` for an encrypted network: whether its tunnel is in the kernel, and whether only packets to hosts without a path in
        // plain text go through it.
        encrypted: Option<(bool, bool)>,
        // A host without a path in plain text.
        far in prop::option::of(2..=3_u8),
        // Whether there are Services.
        served: bool,
        // A host without a tunnel.
        deaf in prop::option::weighted(0.2, 1..=3_u8),
    ) {
        let mut view = if routed { small_blocks() } else { switched() };
        match encrypted {
            Some((kernel, true)) => encrypt_if_needed(&mut view, kernel),
            Some((kernel, false)) => encrypt(&mut view, kernel),
            None => {}
        }
        if let Some(deaf) = deaf {
            view.nodes.get_mut(&id(deaf)).unwrap().record.tunnel = None;
        }
        let isolated = isolated.into_iter().map(|n| EndpointId([n; 5]));
        if served {
            let service = json!({ "metadata": { "name": "web", "namespace": "default" }, "spec": {} });
            view.resources.insert(read(Kind::Service, service));
        }
        let mut local = Local { isolation: isolation(isolated), ..Local::default() };
        local.attaches.want(NET);
        if let Some(far) = far {
            local.detours.replace([((id(far), false), ([192, 0, 2, 1], 1).into())].into());
        }
        let mut applied = Dataplane::default();
        let mut left = TouchedEndpoints::default();
        for (step, together) in steps {
            // No host allocates an address to two of its endpoints.
            if routed && is_taken(&view, &step) {
                continue;
            }
            let touched = write(&mut view, &step);
            check_index(&view.nodes[&id(step.host)].table);
            left.merge(touched);
            if together > 1 {
                continue;
            }
            let before = applied.clone();
            let whole = network_part(&view, &local, NET);
            match plan(&view, &local, NET, std::mem::take(&mut left), &mut applied, true) {
                Some(ops) => {
                    let all = ovl_dataplane::diff::diff(&before, &whole, true);
                    let text = |ops: &[Op]| ops.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
                    assert_eq!(text(&ops), text(&all));
                    for ops in [&ops, &all] {
                        check_guards(ops);
                    }
                }
                // Only the first plan, which creates the devices, compares the whole network.
                None => {
                    assert_eq!(before, Dataplane::default());
                    applied = whole.clone();
                }
            }
            assert_eq!(applied, whole);
            check_guarded(&whole);
        }
    }
}
