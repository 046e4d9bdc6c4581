//! The subsystem of the fast path: which endpoints, blocks of other hosts and devices the programs in the kernel know.
//!
//! Only unencrypted networks between hosts, and no endpoint that a network policy may select as soon as its labels are known.
//! What the programs do not know takes the host's IP stack, so what is missing here is slower and nothing else: entries of an
//! endpoint come after its attach was answered. docs/fast-path.md says what the programs do.
//!
//! [`FastPath`] owns what was last sent, and what may have changed since. Begin to read at [`entries::part`].

mod entries;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_cluster::view::Placed;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::fast_changes;
use ovl_dataplane::fast::Fast;
use ovl_dataplane::op::{LinkOp, Op, SysctlOp};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::object::{Encrypt, Mode};
use ovl_proto::resource::Kind;
use ovl_proto::table::{Endpoint, Entry};

use self::entries::{Context, of_endpoint, part};
use crate::policy::Policies;
use crate::rejected::Rejected;
use crate::services::allocation::Ranges;
use crate::subsystem::{Change, Cluster, Outcome, Subsystem};

/// Makes connection tracking take a TCP segment outside of the window that it knows of. It does not see what takes the fast
/// path, so it would call a connection invalid that it has followed before, as soon as a policy or a pause brings it back.
const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";

/// An endpoint, by its host.
type Holder = (NodeId, EndpointId);

/// What the programs were last told, and what may have changed since.
#[derive(Debug)]
pub struct FastPath {
    /// The ranges of Service addresses, of whatever kind.
    services: Vec<IpNet>,
    /// Whether this host enforces network policies.
    enforces: bool,
    policies: Arc<Policies>,
    policies_changed: bool,
    sent: Fast,
    /// Whether [`LIBERAL`] was set. It stays.
    liberal: bool,
    /// The addresses of each endpoint in `sent`: of this host's as endpoints, of other hosts' as paths.
    addresses: BTreeMap<Holder, Vec<IpAddr>>,
    all_changed: bool,
    /// Endpoints that may have changed.
    touched: BTreeSet<Holder>,
    /// The first reason since the last full pass why the programs may not know what they were told.
    refused: Rejected,
}

impl FastPath {
    /// Of a host with these ranges of Service addresses. `enforces`: whether it enforces network policies.
    pub fn new(ranges: &Ranges, enforces: bool) -> Self {
        let all = [&ranges.services, &ranges.load_balancers, &ranges.external];
        Self {
            services: all.into_iter().flatten().copied().collect(),
            enforces,
            policies: Arc::default(),
            policies_changed: true,
            sent: Fast::default(),
            liberal: false,
            addresses: BTreeMap::new(),
            all_changed: true,
            touched: BTreeSet::new(),
            refused: Rejected::default(),
        }
    }

    fn wanted(&self, cluster: &Cluster<'_>, policies: &Policies) -> Fast {
        part(cluster, Context { policies, services: &self.services })
    }

    /// Returns the data plane with these programs.
    fn dataplane(&self, fast: Fast) -> Dataplane {
        let liberal = self.liberal || !fast.pods.is_empty();
        let sysctls = liberal.then(|| (LIBERAL.to_owned(), "1".to_owned())).into_iter().collect();
        Dataplane { fast, sysctls, ..Dataplane::default() }
    }

    /// Returns operations with those before them that the first endpoint needs.
    fn with_settings(&mut self, ops: impl Iterator<Item = Op>) -> Vec<Op> {
        let is_new = !self.liberal && !self.sent.pods.is_empty();
        self.liberal |= is_new;
        let set = SysctlOp::Set { name: LIBERAL.to_owned(), value: "1".to_owned() };
        is_new.then_some(Op::Sysctl(set)).into_iter().chain(ops).collect()
    }

    fn compiled(&self, cluster: &Cluster<'_>) -> Policies {
        if self.enforces { Policies::new(&cluster.view.resources) } else { Policies::default() }
    }

    fn refresh_policies(&mut self, cluster: &Cluster<'_>) {
        // Policies are compiled only where something depends on them.
        if cluster.local.fast.underlay().is_some() && std::mem::take(&mut self.policies_changed) {
            self.policies = Arc::new(self.compiled(cluster));
        }
    }

    /// Records everything as sent.
    fn send(&mut self, cluster: &Cluster<'_>, wanted: Fast) {
        self.sent = wanted;
        self.addresses.clear();
        if self.sent.host.is_some() {
            let view = cluster.view;
            let own = view
                .own()
                .into_iter()
                .flat_map(|node| node.table.endpoints().map(move |endpoint| Placed { node, endpoint }));
            let others = view.switched().flat_map(|network| view.endpoints(network.id));
            for placed in own.chain(others.filter(|placed| placed.node.record.id != view.me)) {
                self.note_addresses(view.me, placed);
            }
        }
        self.all_changed = false;
        self.touched.clear();
    }

    fn touch_pod(&mut self, cluster: &Cluster<'_>, endpoint: &Endpoint) {
        let pod = endpoint.pod_name();
        let placed = cluster.view.all_of_pod(&pod);
        self.touched.extend(placed.map(|placed| holder(&placed)));
    }

    /// Marks an endpoint of a switched network, and those whose frames may be for it or its for them.
    fn touch_switched(&mut self, cluster: &Cluster<'_>, host: NodeId, endpoint: &Endpoint) {
        let (view, network) = (cluster.view, endpoint.network);
        let is_switched = view.networks.get(&network).is_some_and(|state| state.network.mode == Mode::L2);
        if !is_switched || self.sent.host.is_none() {
            return;
        }
        let node = view.nodes.get(&host);
        if node.is_none_or(|node| node.table.endpoints_on(network).nth(1).is_none()) {
            // Another host on a network may mean another MTU for all of it.
            self.all_changed = true;
            return;
        }
        self.touched.insert((host, endpoint.id));
        let macs = endpoint.allowed_macs.iter().chain([&endpoint.mac]);
        let others = macs.flat_map(|mac| view.all_with_mac(network, *mac));
        self.touched.extend(others.map(|placed| holder(&placed)));
        let addresses = endpoint.addresses.iter().map(IpNet::addr);
        let others = addresses.flat_map(|address| view.all_with_address(network, address));
        self.touched.extend(others.map(|placed| holder(&placed)));
    }

    fn send_nothing(&mut self) {
        self.sent = Fast::default();
        self.addresses.clear();
        self.touched.clear();
        self.all_changed = true;
    }

    fn note_addresses(&mut self, me: NodeId, placed: Placed<'_>) {
        let Placed { node, endpoint } = placed;
        let device = Device::endpoint(endpoint.id);
        let is_sent = |at: &IpAddr| match node.record.id == me {
            true => self.sent.pods.get(at).is_some_and(|pod| pod.device == device),
            false => {
                let path = self.sent.paths.get(&IpNet::from(*at)).and_then(|path| path.vxlan);
                path.is_some_and(|vxlan| vxlan.own_mac.is_none() && vxlan.mac == endpoint.mac)
            }
        };
        let sent: Vec<IpAddr> = endpoint.addresses.iter().map(IpNet::addr).filter(is_sent).collect();
        if sent.is_empty() {
            self.addresses.remove(&holder(&placed));
        } else {
            self.addresses.insert(holder(&placed), sent);
        }
    }

    /// Returns the operations for the endpoints that are marked.
    fn plan_touched(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let view = cluster.view;
        let nothing = Fast { host: self.sent.host, ..Fast::default() };
        let (mut before, mut after) = (nothing.clone(), nothing);
        let touched = std::mem::take(&mut self.touched);
        for (host, id) in &touched {
            let device = Device::endpoint(*id);
            for at in self.addresses.remove(&(*host, *id)).unwrap_or_default() {
                if *host == view.me {
                    before.pods.extend(self.sent.pods.remove(&at).map(|pod| (at, pod)));
                } else {
                    let to = IpNet::from(at);
                    before.paths.extend(self.sent.paths.remove(&to).map(|path| (to, path)));
                }
            }
            if *host == view.me {
                before.hooks.extend(self.sent.hooks.take(&device));
            }
            if let Some(placed) = find(cluster, *host, *id) {
                let context = Context { policies: &self.policies, services: &self.services };
                after.merge(of_endpoint(cluster, context, placed));
            }
        }
        let (first, last) = fast_changes(&before, &after, true);
        self.sent.merge(after);
        for placed in touched.iter().filter_map(|(host, id)| find(cluster, *host, *id)) {
            self.note_addresses(view.me, placed);
        }
        self.with_settings(first.into_iter().chain(last))
    }
}

fn holder(placed: &Placed<'_>) -> Holder {
    (placed.node.record.id, placed.endpoint.id)
}

fn find<'a>(cluster: &Cluster<'a>, host: NodeId, id: EndpointId) -> Option<Placed<'a>> {
    let node = cluster.view.nodes.get(&host)?;
    Some(Placed { node, endpoint: node.table.endpoint(id)? })
}

impl Subsystem for FastPath {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } => {
                if host == cluster.view.me {
                    self.touched.insert((host, endpoint.id));
                }
                self.touch_switched(cluster, host, endpoint);
                // Another endpoint may stand for a pod, and so for the labels of this host's.
                if endpoint.pod.is_some() && !self.policies.is_empty() {
                    self.touch_pod(cluster, endpoint);
                }
            }
            Change::Entry { entry: Entry::PathMtu { .. }, .. }
            | Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Network(_)
            | Change::Built(_)
            | Change::Host(_)
            | Change::ThisHost
            | Change::FastPath => self.all_changed = true,
            // Whether packets of a network to a host are sealed, where that depends on the path.
            Change::Tunnel => {
                let mut networks = cluster.view.networks.values();
                self.all_changed |= networks.any(|found| found.network.encrypt() == Encrypt::Auto);
            }
            Change::Resources(keys) => {
                for key in keys {
                    match key.kind {
                        Kind::NetworkPolicy | Kind::ClusterNetworkPolicy | Kind::Namespace | Kind::Node => {
                            self.policies_changed = true;
                            self.all_changed = true;
                        }
                        Kind::Pod => {
                            let placed = cluster.view.all_of_pod(&key.name);
                            self.touched.extend(placed.map(|placed| holder(&placed)));
                        }
                        Kind::Service | Kind::EndpointSlice | Kind::ServiceCidr => {}
                    }
                }
            }
            Change::Entry { .. }
            | Change::Attaching(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        self.dataplane(self.wanted(cluster, &self.compiled(cluster)))
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.policies_changed = true;
        self.refresh_policies(cluster);
        let wanted = self.wanted(cluster, &Arc::clone(&self.policies));
        self.send(cluster, wanted);
        self.liberal |= !self.sent.pods.is_empty();
        self.dataplane(self.sent.clone())
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        self.refresh_policies(cluster);
        if !self.all_changed {
            if self.sent.host.is_none() {
                self.touched.clear();
            }
            return self.plan_touched(cluster);
        }
        let wanted = self.wanted(cluster, &Arc::clone(&self.policies));
        let (first, last) = fast_changes(&self.sent, &wanted, cluster.caught_up);
        self.send(cluster, wanted);
        self.with_settings(first.into_iter().chain(last))
    }

    fn sent(&self) -> Option<Dataplane> {
        self.refused.reason().is_none().then(|| self.dataplane(self.sent.clone()))
    }

    fn detached(&mut self, _: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        if self.all_changed || self.sent.host.is_none() { Vec::new() } else { self.plan_touched(cluster) }
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        if let (Op::Link(LinkOp::Delete(device)), None) = (outcome.op, outcome.refusal)
            && self.sent.hooks.remove(device)
        {
            // The programs went with it. It may be there again.
            self.all_changed = true;
        }
        if let (Op::Fast(_), Some(reason)) = (outcome.op, outcome.refusal) {
            self.refused.note(reason);
        }
    }

    fn batch_done(&mut self, full: bool) {
        self.refused.batch_done(full);
    }

    fn withdraw(&mut self) {
        self.send_nothing();
    }
}
