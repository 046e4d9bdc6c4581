//! The policy ledger: the network policies that were last sent to the kernel, and the plan of a change.
//!
//! [`PolicyLedger`] owns the policies, the memberships of each address, the sent data plane and the generation of
//! connection marks. A change that could tighten policies begins a new generation, so that open connections are judged
//! again. Begin to read at [`PolicyLedger::plan`]; [`PolicyLedger::plan_touched`] does the same for single addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::resource::Labels;
use ovl_proto::table::Endpoint;

use super::members::{self, Membership};
use super::slots::{Slots, slots_of};
use super::{Direction, Policies, frames, rules};
use crate::local::Local;
use ovl_cluster::view::{Placed, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::nft::{CURRENT_MARK, Element, Set, Table};
use ovl_dataplane::op::{NftOp, Op};
use ovl_dataplane::state::Dataplane;

/// The number of policies that can select one endpoint in one direction before the table must be rewritten.
const SLOTS: usize = 4;

/// An address on a network.
type Address = (NetworkId, IpAddr);

/// The network policies that were last sent to the kernel, and their input.
#[derive(Debug, Clone, Default)]
pub struct PolicyLedger {
    policies: Arc<Policies>,
    kinds: BuiltModes,
    slots: Slots,
    addresses: BTreeMap<Address, Vec<Membership>>,
    applied: Dataplane,
    /// The current generation. Connections with the mark of an earlier one are judged again.
    generation: u32,
}

impl PolicyLedger {
    /// Creates an empty ledger. The generation should differ from that of an earlier run, whose marks connections may
    /// still have.
    pub fn new(generation: u32) -> Self {
        Self { generation, ..Self::default() }
    }

    /// Returns the policies that were last sent.
    pub fn policies(&self) -> &Arc<Policies> {
        &self.policies
    }

    /// Returns the current generation.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Returns the data plane that was last sent.
    pub fn sent(&self) -> &Dataplane {
        &self.applied
    }

    /// Returns the desired data plane and records it as sent, for a full pass. Without `prune`, it includes what was
    /// sent before.
    pub fn resync(&mut self, view: &View, local: &Local, prune: bool) -> Dataplane {
        self.plan(view, local, prune);
        self.applied.clone()
    }

    /// Returns the operations for any change, and records them as applied. Without `prune`, nothing is deleted.
    pub fn plan(&mut self, view: &View, local: &Local, prune: bool) -> Vec<Op> {
        let mut next = PolicyParts::of(view, local);
        next.add_generation(self.generation);
        let mut ops = diff(&self.applied, &next.dataplane, prune);
        if ops.iter().any(|op| !is_addition(&next.policies, op)) {
            let later = self.generation + 1;
            next.remove_generation(self.generation);
            next.add_generation(later);
            self.generation = later;
            ops = diff(&self.applied, &next.dataplane, prune);
        }
        if !prune {
            let mut kept = self.applied.clone();
            kept.merge(next.dataplane);
            next.dataplane = kept;
        }
        self.take(next);
        ops
    }

    /// Returns the operations for a change of these addresses only, and records them as applied. `None` if everything
    /// must be compared.
    pub fn plan_touched(
        &mut self,
        view: &View,
        local: &Local,
        touched: &BTreeSet<Address>,
    ) -> Option<Vec<Op>> {
        if BuiltModes::of(view, local) != self.kinds {
            return None;
        }
        if self.policies.is_empty() || self.kinds == BuiltModes::default() {
            return Some(Vec::new());
        }
        let policies = Arc::clone(&self.policies);
        let mut changes = Vec::new();
        for address in touched {
            let is = members_at(&policies, view, local, *address);
            if !self.slots.have(slots_of(&is)) {
                return None;
            }
            changes.push((*address, is));
        }
        let (mut ops, mut tightened) = (Vec::new(), false);
        for (address, is) in changes {
            let was = self.addresses.get(&address).map_or(&[][..], Vec::as_slice);
            let (was_in, is_in) = (elements(&policies, address, was), elements(&policies, address, &is));
            tightened |= is_tighter(&policies, was, &is) && !is_new(local, address);
            for (key, element) in &was_in {
                if !is_in.contains_key(key) {
                    self.applied.elements.remove(&element.set, &element.key);
                    ops.push(Op::Nft(NftOp::DeleteElement(element.set.clone(), element.key.clone())));
                }
            }
            for (key, element) in is_in {
                if was_in.get(&key) != Some(&element) {
                    self.applied.elements.insert(&element.set, element.key.clone(), element.value.clone());
                    ops.push(Op::Nft(NftOp::SetElement(element)));
                }
            }
            if is.is_empty() {
                self.addresses.remove(&address);
            } else {
                self.addresses.insert(address, is);
            }
        }
        if tightened {
            ops.extend(self.next_generation());
        }
        Some(ops)
    }

    /// Begins the next generation and returns its operations.
    fn next_generation(&mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        for element in members::generation(self.generation) {
            // Elements of the map are replaced, so only those of the set are deleted.
            if element.set == CURRENT_MARK {
                self.applied.elements.remove(&element.set, &element.key);
                ops.push(Op::Nft(NftOp::DeleteElement(element.set, element.key)));
            }
        }
        self.generation += 1;
        for element in members::generation(self.generation) {
            self.applied.elements.insert(&element.set, element.key.clone(), element.value.clone());
            ops.push(Op::Nft(NftOp::SetElement(element)));
        }
        ops
    }

    fn take(&mut self, PolicyParts { policies, kinds, slots, addresses, dataplane }: PolicyParts) {
        self.policies = policies;
        self.kinds = kinds;
        self.slots = slots;
        self.addresses = addresses;
        self.applied = dataplane;
    }
}

/// Returns the desired data plane of network policies, and records nothing.
pub fn part(view: &View, local: &Local, generation: u32) -> Dataplane {
    let mut parts = PolicyParts::of(view, local);
    parts.add_generation(generation);
    parts.dataplane
}

/// Whether an operation can only allow more connections: it adds an address to a selector or to a named port of rules that
/// allow.
fn is_addition(policies: &Policies, op: &Op) -> bool {
    let Op::Nft(NftOp::SetElement(Element { set, .. })) = op else { return false };
    let refuses =
        |sets: [Option<Set>; 2]| sets.into_iter().flatten().any(|refusing| refusing.name == set.name);
    (set.name.starts_with("pods.") || set.name.starts_with("port."))
        && !policies
            .refusing
            .iter()
            .any(|place| refuses([true, false].map(|v4| members::pods(policies, *place, v4))))
        && !policies
            .refusing_ports
            .iter()
            .any(|place| refuses([true, false].map(|v4| members::port(policies, *place, v4))))
}

/// Whether the new memberships of an address may allow fewer connections.
fn is_tighter(policies: &Policies, was: &[Membership], is: &[Membership]) -> bool {
    let isolates = |member: &Membership| match member {
        Membership::Slot(..) | Membership::Admin(..) => true,
        Membership::Pods(place) => policies.refusing.contains(place),
        Membership::Port(place, _) => policies.refusing_ports.contains(place),
        Membership::Itself | Membership::Diverted(..) | Membership::Closed(..) => false,
    };
    was.iter().any(|member| !is.contains(member))
        || is.iter().any(|member| isolates(member) && !was.contains(member))
}

/// Whether an address is that of an endpoint whose attach is in flight: it has no connections yet.
fn is_new(local: &Local, (network, address): Address) -> bool {
    local.attaches.endpoints().any(|endpoint| {
        endpoint.network == network && endpoint.addresses.iter().any(|net| net.addr() == address)
    })
}

type ByKey = BTreeMap<(String, ovl_dataplane::nft::Key), Element>;

fn elements(policies: &Policies, (_, address): Address, members: &[Membership]) -> ByKey {
    let all = members.iter().flat_map(|member| member.elements(policies, address));
    all.map(|element| ((element.set.path(), element.key.clone()), element)).collect()
}

/// The modes of the networks that have devices on this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct BuiltModes {
    routed: bool,
    switched: bool,
}

impl BuiltModes {
    fn of(view: &View, local: &Local) -> Self {
        let built = view.networks.values().map(|state| &state.network);
        let built = built.filter(|network| local.is_built(view, network.id));
        built.fold(Self::default(), |kinds, network| Self {
            routed: kinds.routed || network.mode == Mode::L3,
            switched: kinds.switched || network.mode == Mode::L2,
        })
    }
}

/// The policies, memberships and data plane that follow from a view.
struct PolicyParts {
    policies: Arc<Policies>,
    kinds: BuiltModes,
    slots: Slots,
    addresses: BTreeMap<Address, Vec<Membership>>,
    dataplane: Dataplane,
}

impl PolicyParts {
    fn of(view: &View, local: &Local) -> Self {
        let policies = Arc::new(Policies::new(&view.resources));
        let mut parts = Self {
            policies: Arc::clone(&policies),
            kinds: BuiltModes::of(view, local),
            slots: Slots {
                admin: Direction::ALL
                    .map(|it| policies.admin_count(it))
                    .into_iter()
                    .max()
                    .unwrap_or(0)
                    .min(SLOTS),
                others: SLOTS,
            },
            addresses: BTreeMap::new(),
            dataplane: Dataplane::default(),
        };
        if policies.is_empty() || parts.kinds == BuiltModes::default() {
            return parts;
        }
        let attaching = local.attaches.endpoints().map(|endpoint| (view.me, endpoint));
        for (node, endpoint) in
            view.all_endpoints().map(|placed| (placed.node.record.id, placed.endpoint)).chain(attaching)
        {
            let members = members_of(&policies, view, local, node, endpoint);
            parts.slots = parts.slots.max(slots_of(&members));
            if members.is_empty() {
                continue;
            }
            for address in endpoint.addresses.iter().map(|net| net.addr()) {
                for Element { set, key, value } in
                    members.iter().flat_map(|member| member.elements(&policies, address))
                {
                    parts.dataplane.elements.insert(&set, key, value);
                }
                parts.addresses.entry((endpoint.network, address)).or_default().extend(&members);
            }
        }
        let switched = parts.kinds.switched;
        let skeleton = rules::skeleton(&policies, parts.slots, switched);
        parts.dataplane.tables.insert(Table::Policy, Arc::new(skeleton));
        if switched {
            parts.dataplane.tables.insert(Table::PolicyFrames, Arc::new(frames::skeleton()));
        }
        parts
    }

    fn add_generation(&mut self, generation: u32) {
        if self.dataplane.tables.contains_key(&Table::Policy) {
            for Element { set, key, value } in members::generation(generation) {
                self.dataplane.elements.insert(&set, key, value);
            }
        }
    }

    fn remove_generation(&mut self, generation: u32) {
        for Element { set, key, .. } in members::generation(generation) {
            self.dataplane.elements.remove(&set, &key);
        }
    }
}

/// Returns the memberships of an address, of all endpoints that have it.
fn members_at(
    policies: &Policies,
    view: &View,
    local: &Local,
    (network, address): Address,
) -> Vec<Membership> {
    let placed = view.all_with_address(network, address);
    let attached = placed.map(|placed| (placed.node.record.id, placed.endpoint));
    let attaching = local.attaches.endpoints().filter(|endpoint| {
        endpoint.network == network && endpoint.addresses.iter().any(|net| net.addr() == address)
    });
    attached
        .chain(attaching.map(|endpoint| (view.me, endpoint)))
        .flat_map(|(node, endpoint)| members_of(policies, view, local, node, endpoint))
        .collect()
}

/// Returns the memberships of an endpoint's addresses. Selectors match it on any host while its address is valid; it is
/// isolated on its own host in any case.
fn members_of(
    policies: &Policies,
    view: &View,
    local: &Local,
    node: NodeId,
    endpoint: &Endpoint,
) -> Vec<Membership> {
    let Some(network) = view.networks.get(&endpoint.network).map(|state| &state.network) else {
        return Vec::new();
    };
    let known = view.known_labels(node, endpoint);
    let labels = known.as_deref();
    let own = node == view.me;
    let mut members = Vec::new();
    let counts = view.nodes.get(&node).is_some_and(|node| view.is_counted(&Placed { node, endpoint }));
    if counts || local.attaches.get(endpoint.id).is_some() {
        let namespace = view.resources.namespace_labels(&endpoint.namespace);
        members.extend(
            policies.pods_matching(&endpoint.namespace, &namespace, labels).into_iter().map(Membership::Pods),
        );
        for (place, (name, protocol)) in policies.ports.iter().enumerate() {
            let number = view.named_port(node, endpoint, name, *protocol);
            members.extend(number.map(|number| Membership::Port(place, number)));
        }
    }
    if own {
        isolation(&mut members, policies, view, network, endpoint, labels);
    }
    members
}

/// Adds the memberships of a local endpoint that policies select, or may select as soon as its labels are known.
fn isolation(
    members: &mut Vec<Membership>,
    policies: &Policies,
    view: &View,
    network: &Network,
    endpoint: &Endpoint,
    labels: Option<&Labels>,
) {
    let device = Device::endpoint(endpoint.id);
    let switched = network.mode == Mode::L2;
    let mut isolated = false;
    for direction in Direction::ALL {
        let deciding = policies.deciding(&view.resources, &endpoint.namespace, labels, direction);
        let admin = deciding.admin_numbers().enumerate();
        members.extend(admin.map(|(place, number)| Membership::Admin(direction, place + 1, number)));
        let numbers = deciding.numbers();
        let slots = numbers.iter().enumerate();
        members.extend(slots.map(|(place, number)| Membership::Slot(direction, place + 1, *number)));
        isolated |= !numbers.is_empty();
        if switched && !numbers.is_empty() && !deciding.is_open(direction) {
            members.push(Membership::Closed(direction, device));
        }
    }
    if isolated {
        members.push(Membership::Itself);
        if switched {
            members.push(Membership::Diverted(Mac::of_gateway(network.id), endpoint.mac));
        }
    }
}
