//! The short way and the long one lead to the same: what [`ovl_core::touched`] makes of single changes
//! is what looking at the whole network gives, and a table's index finds what a search finds.
#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet};

use ovl_core::desired::network_part;
use ovl_core::ipam;
use ovl_core::kernel::Kernel;
use ovl_core::table::Table;
use ovl_core::touched::{Touched, plan};
use ovl_core::view::{Local, NetworkState, Node, View};
use ovl_proto::alloc::{AllocMap, Block};
use ovl_proto::clock::Stamp;
use ovl_proto::control::PeerState;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::{Backend, Driver, Mode, Network};
use ovl_proto::record::{NodeRecord, Presence, Signature};
use ovl_proto::table::{Endpoint, Entry, Key};
use proptest::prelude::*;

const NET: NetworkId = NetworkId([0; 5]);

fn id(n: u8) -> NodeId {
    NodeId([n; 10])
}

fn node(n: u8) -> Node {
    Node {
        record: NodeRecord {
            id: id(n),
            public_key: [n; 32],
            name: format!("h{n}"),
            generation: 1,
            revision: 1,
            cluster: 1,
            address: ([192, 168, 77, n], 7940).into(),
            vtep: [192, 168, 77, n].into(),
            vxlan_port: 4789,
            link_mtu: 1500,
            presence: Presence::Running,
            version: "0".to_owned(),
        },
        state: PeerState::Alive,
        table: Table::new(id(n)),
    }
}

/// Hosts h1 to h3, of which h1 looks; one network of which host n holds the block 10.9.0.8n/29.
fn view() -> View {
    let subnet = ipam::new_subnet("10.9.0.0/24".parse().unwrap()).unwrap();
    let network = Network {
        id: NET,
        name: "blue".to_owned(),
        created: Stamp::default(),
        driver: Driver::Overlay,
        mode: Mode::L2,
        vni: 5000,
        subnets: vec![subnet],
        mtu: None,
        encrypted: false,
        internal: false,
        backend: Backend::Vxlan,
    };
    let block = |n: u8| Block { network: NET, prefix: format!("10.9.0.{}/29", 8 * n).parse().unwrap() };
    View {
        me: id(1),
        nodes: (1..=3).map(|n| (id(n), node(n))).collect(),
        networks: BTreeMap::from([(NET, NetworkState { network, removing: false })]),
        alloc: AllocMap {
            cluster: 1,
            version: 1,
            members: (1..=3).map(id).collect(),
            previous_members: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            blocks: (1..=3).map(|n| (block(n), id(n))).collect(),
        },
    }
}

/// One endpoint of a host comes, changes or goes; of few, so that they meet.
#[derive(Debug, Clone)]
struct Step {
    host: u8,
    endpoint: u8,
    /// The last byte of its address; nothing if it goes.
    address: Option<u8>,
    second: Option<u8>,
    /// Another MAC address than the one that follows from the address.
    mac: Option<u8>,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop::option::weighted(0.7, 6..34_u8);
    let second = prop::option::weighted(0.1, 6..34_u8);
    (1..=3_u8, 0..6_u8, address, second, prop::option::weighted(0.4, 0..3_u8))
        .prop_map(|(host, endpoint, address, second, mac)| Step { host, endpoint, address, second, mac })
}

fn entry(step: &Step, address: u8) -> Endpoint {
    let net = |last| format!("10.9.0.{last}/24").parse().unwrap();
    let first: ipnet::IpNet = net(address);
    Endpoint {
        id: EndpointId([step.endpoint; 5]),
        name: format!("e{}", step.endpoint % 3),
        namespace: "default".to_owned(),
        network: NET,
        mac: step.mac.map_or_else(|| ipam::mac_of(NET, first.addr()), |last| Mac([2, 0, 0, 0, 0, last])),
        addresses: [address].into_iter().chain(step.second).map(net).collect(),
        aliases: Vec::new(),
        labels: BTreeMap::new(),
    }
}

/// Writes the entry and gives what that touched.
fn write(view: &mut View, step: &Step) -> Touched {
    let mut touched = Touched::default();
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
        for at in endpoint.addresses.iter().map(ipnet::IpNet::addr) {
            assert_eq!(
                table.with_address(NET, at).collect::<Vec<_>>(),
                with(&|other| other.addresses.iter().any(|net| net.addr() == at))
            );
        }
    }
    let ranges: BTreeSet<_> =
        all.iter().flat_map(|endpoint| &endpoint.addresses).map(ipnet::IpNet::trunc).collect();
    assert_eq!(table.ranges(NET).collect::<BTreeSet<_>>(), ranges);
}

proptest! {
    #[test]
    fn single_changes_lead_to_what_the_whole_network_needs(
        steps in prop::collection::vec((step(), 1..4_usize), 1..40),
        isolated in prop::collection::btree_set(0..6_u8, 0..2),
    ) {
        let mut view = view();
        let isolated = isolated.into_iter().map(|n| (EndpointId([n; 5]), String::new())).collect();
        let local = Local { isolated, wanted: BTreeMap::from([(NET, 1)]), ..Local::default() };
        let mut applied = Kernel::default();
        let mut left = Touched::default();
        for (step, together) in steps {
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
                    let all = ovl_core::diff::diff(&before, &whole, true);
                    let text = |ops: &[ovl_core::op::Op]| ops.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
                    assert_eq!(text(&ops), text(&all));
                }
                // Only the devices, which never change here, need the long way.
                None => {
                    assert_eq!(before, Kernel::default());
                    applied = whole.clone();
                }
            }
            assert_eq!(applied, whole);
        }
    }
}
