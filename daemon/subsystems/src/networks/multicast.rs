//! Which other hosts get the multicast of a switched network.
//!
//! Each host says in its owner table which groups its endpoints have joined. Frames for the MAC address of a group go to the
//! hosts that have joined one with that address ([`Dataplane::groups`]), and frames of groups that no other host has joined
//! do not leave ([`ovl_dataplane::multicast`]). A host that does not follow groups, such as one of an earlier release, gets
//! the frames of all groups. As long as there is one, frames of groups without members go to all hosts.
//!
//! The module owns no state. Begin to read at [`part`].

use std::collections::{BTreeMap, BTreeSet};

use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::multicast::{JOINED, OPEN, is_for_all};
use ovl_dataplane::nft::{Field, Key, Value};
use ovl_dataplane::state::{Dataplane, Remote};
use ovl_proto::id::Mac;
use ovl_proto::object::{Driver, Network};
use ovl_proto::table::{Endpoint, is_followed};

use crate::endpoints::switched::{Exit, FrameRoutes};

/// The maximum number of groups of one host on one network that another host follows. What is sent to the others does not
/// reach it.
pub const MOST_OF_HOST: usize = 8 * Endpoint::MAX_GROUPS;

/// Adds where multicast on a switched network goes. The cost depends on the numbers of hosts and groups.
pub(super) fn part(dataplane: &mut Dataplane, view: &View, network: &Network, routes: &FrameRoutes) {
    if network.driver == Driver::Bridge {
        return;
    }
    for device in routes.devices() {
        by_device(dataplane, view, network, routes, device);
    }
}

/// Adds where multicast goes that leaves by one of the network's devices.
fn by_device(
    dataplane: &mut Dataplane,
    view: &View,
    network: &Network,
    routes: &FrameRoutes,
    device: Device,
) {
    let (mut joined, mut all) = (BTreeMap::<Mac, BTreeSet<Remote>>::new(), BTreeSet::new());
    for node in view.nodes.values().filter(|node| node.record.id != view.me && view.counts(node)) {
        if node.table.endpoints_on(network.id).next().is_none() {
            continue;
        }
        let Some(Exit { remote, .. }) = routes.to(node).filter(|exit| exit.device == device) else {
            continue;
        };
        if !node.table.follows_groups(network.id) {
            all.insert(remote);
        }
        let groups = node.table.groups(network.id).filter(|group| is_followed(*group));
        for group in groups.take(MOST_OF_HOST) {
            joined.entry(Mac::of_group(group)).or_default().insert(remote);
        }
    }
    let leaves = Field::Device(device.as_str());
    if !all.is_empty() {
        dataplane.elements.insert(&OPEN, Key::of(&[leaves]), Value::None);
    }
    for (mac, remotes) in joined {
        dataplane.elements.insert(&JOINED, Key::of(&[leaves, Field::Mac(mac)]), Value::None);
        if !is_for_all(mac) {
            let remotes = remotes.union(&all).map(|remote| (device, mac, *remote));
            dataplane.groups.extend(remotes);
        }
    }
}

/// Copies what [`part`] added to a data plane that was sent for one network.
pub(super) fn sent(was: &mut Dataplane, applied: &Dataplane) {
    was.groups.clone_from(&applied.groups);
    for set in [&JOINED, &OPEN] {
        for (key, value) in applied.elements.of(set).into_iter().flatten() {
            was.elements.insert(set, key.clone(), value.clone());
        }
    }
}
