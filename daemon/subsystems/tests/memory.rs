//! How much memory an endpoint costs on a host that does not build its network. It is the memory that was allocated and
//! not given back, by an allocator that counts, so it depends neither on the machine nor on other tests.
#![cfg(test)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ovl_proto::id::EndpointId;
use ovl_proto::record::Signature;
use ovl_proto::resource::Labels;
use ovl_proto::table::{Endpoint, Entry, PodIdentity};
use ovl_subsystems::local::Local;
use ovl_subsystems::names::{Place, Sources};
use ovl_subsystems::{Change, Subsystems, plan, resync};

mod host;
#[path = "../../cluster/tests/world/mod.rs"]
mod world;

use host::{cluster, settings};
use world::{World, endpoint, id};

/// Counts the bytes that are in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn in_use() -> isize {
    isize::try_from(IN_USE.load(Ordering::Relaxed)).unwrap()
}

/// How many endpoints there are.
const COUNT: u32 = 1_024;

/// The memory of each stage for one endpoint, in bytes. What a stage gives back of an earlier one counts as less than
/// nothing: changes are first noted, and then carried out.
#[derive(Debug)]
struct Costs {
    table: isize,
    selectables: isize,
    subsystems: isize,
    names: isize,
}

/// Measures endpoints of another host that arrive in its owner table: with the labels of a Deployment or without labels, of
/// pods or not.
fn measure(labels: bool, pods: bool) -> Costs {
    let mut world = World::new();
    // Room for all of them.
    let wide = ovl_cluster::addresses::new_subnet(world::net("10.9.0.0/16")).unwrap();
    world.view.networks.get_mut(&world::NET).unwrap().network.subnets = vec![wide];
    world.view.alloc.blocks.clear();
    let block = ovl_proto::alloc::Block { network: world::NET, prefix: world::net("10.9.0.0/16") };
    world.view.alloc.blocks.insert(block, id(2));
    let local = Local::default();
    let mut subsystems = Subsystems::new(settings());
    let deployment = [("app", "web"), ("pod-template-hash", "7d4b9c6f5")];
    let deployment = Labels::from(deployment.map(|(key, value)| (key.to_owned(), value.to_owned())));
    let entry = |number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        let Entry::Endpoint(bare) = endpoint(1, &format!("10.9.{b}.{c}/16")) else { panic!() };
        let name = format!("web-7d4b9c6f5-{number:05}");
        Entry::Endpoint(Endpoint {
            id: EndpointId([0, 0, a, b, c]),
            name: if pods { format!("{name}-5b8a") } else { name.clone() },
            labels: if labels { deployment.clone() } else { Labels::new() },
            pod: pods.then(|| {
                Box::new(PodIdentity { name, uid: format!("{number:036}"), created: 1_700_000_000_000 })
            }),
            ..bare
        })
    };
    // The full pass of a daemon that starts, before the first change.
    resync(&mut subsystems.all(), &cluster(&world.view, &local, &world.backends));
    let place: &dyn Fn(EndpointId) -> Option<Place> = &|_| None;
    drop(subsystems.names.refresh_all(Sources { view: &world.view, backends: &world.backends, place }));
    let mut costs = Costs { table: 0, selectables: 0, subsystems: 0, names: 0 };
    for number in 1..=COUNT {
        let [_, a, b, c] = number.to_be_bytes();
        let new = entry(number);
        let before = in_use();
        // As it arrives: a decoded update.
        let owner = world.view.nodes.get_mut(&id(2)).unwrap();
        let update = {
            let mut at_home = owner.table.clone();
            at_home.write(1, vec![new.clone()], vec![], |_| Signature([0; 64]))
        };
        let bytes = ovl_proto::wire::encode_body(&update).unwrap();
        owner.table.apply(ovl_proto::wire::decode_body(&bytes).unwrap()).unwrap();
        drop((update, bytes));
        let there = in_use();
        costs.table += there - before;
        world.backends.touch_endpoint(&world.view, id(2), EndpointId([0, 0, a, b, c]));
        let settled = world.settle();
        let now = cluster(&world.view, &local, &world.backends);
        for change in [Change::Entry { host: id(2), entry: &new }, Change::Backends(&settled)] {
            subsystems.all().iter_mut().for_each(|subsystem| subsystem.changed(&change, &now));
        }
        drop(settled);
        let noted = in_use();
        costs.selectables += noted - there;
        plan(&mut subsystems.all(), &now);
        let planned = in_use();
        costs.subsystems += planned - noted;
        let sources = Sources { view: &world.view, backends: &world.backends, place };
        drop(subsystems.names.refresh(sources));
        costs.names += in_use() - planned;
    }
    let each = |bytes: isize| bytes / COUNT as isize;
    Costs {
        table: each(costs.table),
        selectables: each(costs.selectables),
        subsystems: each(costs.subsystems),
        names: each(costs.names),
    }
}

#[test]
fn endpoint_of_a_network_that_is_not_built_here_costs_at_most_2_kib() {
    for (labels, pods) in [(false, false), (true, false), (true, true)] {
        let costs = measure(labels, pods);
        let sum = costs.table + costs.selectables + costs.subsystems + costs.names;
        println!("{sum} bytes for each endpoint (labels: {labels}, pods: {pods}): {costs:?}");
        assert!(sum <= 2048, "{sum} bytes: {costs:?}");
    }
}
