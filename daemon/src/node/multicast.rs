//! Follows which multicast groups the endpoints of this host have joined, and says so in the owner table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;

use ovl_cluster::view::View;
use ovl_control::GroupInfo;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{LinkOp, Op};
use ovl_dataplane::state::Link;
use ovl_kernel::Outcome;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::{Driver, Mode, Network};
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems::networks::MOST_OF_HOST;

use super::Node;
use super::state::State;
use crate::problems::Code;

/// Whether the groups of a network's endpoints are followed.
fn is_followed_on(network: &Network) -> bool {
    network.mode == Mode::L2 && network.driver == Driver::Overlay
}

/// Returns the groups that a new endpoint has joined: none, or all if they cannot be followed yet.
pub(super) fn at_attach(state: &State, network: &Network) -> Option<Vec<IpAddr>> {
    (is_followed_on(network) && state.multicast.is_settled(network.id)).then(Vec::new)
}

/// Returns the groups that endpoints on a network have joined, and the hosts that get the packets of all groups.
pub(super) fn groups_on(view: &View, network: &Network) -> (Vec<GroupInfo>, Vec<String>) {
    let (mut groups, mut all) = (BTreeMap::<IpAddr, Vec<String>>::new(), Vec::new());
    if is_followed_on(network) {
        for node in view.hosts_on(network.id) {
            let name = &node.record.name;
            if !node.table.follows_groups(network.id) {
                all.push(name.clone());
            }
            for group in node.table.groups(network.id) {
                groups.entry(group).or_default().push(name.clone());
            }
        }
    }
    let groups = groups.into_iter().map(|(group, mut nodes)| {
        nodes.sort();
        GroupInfo { group, nodes }
    });
    all.sort();
    (groups.collect(), all)
}

/// Records that bridges were not followed, which these operations have set right.
pub(super) fn note_outcomes(state: &mut State, outcomes: &[Outcome]) {
    for outcome in outcomes {
        if let Op::Link(LinkOp::Set(
            device,
            Link::Bridge { tuned: false, .. },
            Link::Bridge { tuned: true, .. },
        )) = &outcome.op
            && let Some(Role::Bridge(network)) = device.role()
        {
            state.multicast.unsettle(network, state.now());
        }
    }
}

impl Node {
    /// Reads the groups of all endpoints after one has joined or left a group.
    pub(super) fn read_groups(self: &Rc<Self>) {
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let Ok(groups) = node.kernel.groups().await else { return };
            let of_endpoint = |(device, groups): (Device, BTreeSet<IpAddr>)| match device.role()? {
                Role::Endpoint(id) => Some((id, groups)),
                Role::Bridge(_) | Role::Vxlan(_) | Role::Tunnel(_) => None,
            };
            let found: BTreeMap<EndpointId, BTreeSet<IpAddr>> =
                groups.into_iter().filter_map(of_endpoint).collect();
            let ask = {
                let mut state = node.state.borrow_mut();
                let now = state.now();
                state.multicast.report(&found, now)
            };
            node.tell_groups();
            if !ask.is_empty() {
                // Members also answer without a question, only later.
                let _ = node.kernel.ask_for_members(ask.into_iter().map(Device::endpoint).collect()).await;
            }
        });
    }

    /// Asks the endpoints for their groups from time to time.
    pub(super) fn ask_for_members(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let now = state.now();
        if !state.multicast.is_time_to_ask(now) {
            return;
        }
        let is_followed = |endpoint: &&Endpoint| {
            state.view.networks.get(&endpoint.network).is_some_and(|found| is_followed_on(&found.network))
        };
        let ports: Vec<Device> =
            state.own_endpoints().filter(is_followed).map(|endpoint| Device::endpoint(endpoint.id)).collect();
        drop(state);
        if !ports.is_empty() {
            let node = Rc::clone(self);
            tokio::task::spawn_local(async move { node.kernel.ask_for_members(ports).await });
        }
    }

    /// Updates the groups of this host's endpoints in the owner table.
    pub(super) fn tell_groups(&self) {
        let changed = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            if !state.multicast.is_time_to_tell(now) {
                return;
            }
            let (changed, problems) = groups_to_tell(state);
            state.problems.replace(Code::MulticastGroups, problems);
            changed
        };
        if !changed.is_empty() {
            self.write_table(changed, Vec::new());
        }
    }
}

/// Returns the entries of this host's endpoints that have joined other groups than the owner table says, and the problems
/// of those that have joined too many.
fn groups_to_tell(state: &State) -> (Vec<Entry>, Vec<(String, String)>) {
    let (mut changed, mut problems) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    let mut of_network: BTreeMap<NetworkId, BTreeSet<IpAddr>> = BTreeMap::new();
    for endpoint in state.own_endpoints() {
        let Some(network) = state.view.networks.get(&endpoint.network).map(|found| &found.network) else {
            continue;
        };
        if !is_followed_on(network) {
            continue;
        }
        let told = state.multicast.of(network.id, endpoint.id);
        if let Some((groups, more)) = &told {
            of_network.entry(network.id).or_default().extend(groups);
            if *more > 0 {
                problems.push((format!("endpoint {}", endpoint.name), too_many(&endpoint.name)));
            }
        }
        let groups = told.map(|(groups, _)| groups);
        if groups != endpoint.groups {
            bytes += groups.as_ref().map_or(0, Vec::len) * (size_of::<IpAddr>() + 1);
            changed.push(Entry::Endpoint(Endpoint { groups, ..endpoint.clone() }));
        }
    }
    for (network, groups) in of_network {
        if groups.len() > MOST_OF_HOST
            && let Some(found) = state.view.networks.get(&network)
        {
            let name = &found.network.name;
            problems.push((format!("network {name}"), too_many_on_host(name, groups.len())));
        }
    }
    let has_room = state.view.own().is_some_and(|own| own.table.has_room(0, bytes));
    if !has_room {
        changed.clear();
    }
    (changed, problems)
}

fn too_many(endpoint: &str) -> String {
    format!(
        "endpoint {endpoint} has joined more than {} multicast groups: what endpoints on other hosts send to the rest of \
         them does not reach it. Let it join fewer groups, or spread them over several endpoints",
        Endpoint::MAX_GROUPS
    )
}

fn too_many_on_host(network: &str, joined: usize) -> String {
    format!(
        "endpoints of this host have joined {joined} multicast groups on network {network}, and other hosts follow \
         {MOST_OF_HOST}: what is sent there to the rest of them does not arrive here. Let them join fewer groups, or attach \
         some on another host"
    )
}
