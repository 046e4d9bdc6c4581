//! The subsystem of the fast path: which endpoints, blocks of other hosts and devices the programs in the kernel know.
//!
//! Only unencrypted routed networks, and no endpoint that a network policy selects. What the programs do not know takes
//! the host's IP stack, so what is missing here is slower and nothing else: entries of an endpoint come after its attach
//! was answered. docs/fast-path.md says what the programs do.
//!
//! [`FastPath`] owns what was last sent, and what may have changed since. Begin to read at [`entries::part`].

mod entries;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::fast_changes;
use ovl_dataplane::fast::Fast;
use ovl_dataplane::op::{LinkOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Encrypt;
use ovl_proto::resource::Kind;
use ovl_proto::table::{Endpoint, Entry};

use self::entries::{Context, of_endpoint, part};
use crate::policy::Policies;
use crate::rejected::Rejected;
use crate::services::allocation::Ranges;
use crate::subsystem::{Change, Cluster, Outcome, Subsystem};

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
    /// The addresses of each endpoint in `sent`.
    addresses: BTreeMap<EndpointId, Vec<IpAddr>>,
    all_changed: bool,
    /// Endpoints that may have changed.
    touched: BTreeSet<EndpointId>,
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
            addresses: BTreeMap::new(),
            all_changed: true,
            touched: BTreeSet::new(),
            refused: Rejected::default(),
        }
    }

    fn wanted(&self, cluster: &Cluster<'_>, policies: &Policies) -> Fast {
        part(cluster, Context { policies, services: &self.services })
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
            let own = cluster.view.own().into_iter().flat_map(|own| own.table.endpoints());
            for endpoint in own {
                self.note_addresses(endpoint);
            }
        }
        self.all_changed = false;
        self.touched.clear();
    }

    fn touch_pod(&mut self, cluster: &Cluster<'_>, endpoint: &Endpoint) {
        let pod = endpoint.pod_name();
        let placed = cluster.view.all_of_pod(&pod);
        self.touched.extend(placed.map(|placed| placed.endpoint.id));
    }

    fn send_nothing(&mut self) {
        self.sent = Fast::default();
        self.addresses.clear();
        self.touched.clear();
        self.all_changed = true;
    }

    fn note_addresses(&mut self, endpoint: &Endpoint) {
        let device = Device::endpoint(endpoint.id);
        let all = endpoint.addresses.iter().map(IpNet::addr);
        let sent = all.filter(|at| self.sent.pods.get(at).is_some_and(|pod| pod.device == device));
        let sent: Vec<IpAddr> = sent.collect();
        if sent.is_empty() {
            self.addresses.remove(&endpoint.id);
        } else {
            self.addresses.insert(endpoint.id, sent);
        }
    }

    /// Returns the operations for the endpoints that are marked.
    fn plan_touched(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let mut ops = Vec::new();
        for id in std::mem::take(&mut self.touched) {
            let device = Device::endpoint(id);
            let mut before = Fast { host: self.sent.host, ..Fast::default() };
            for at in self.addresses.remove(&id).unwrap_or_default() {
                before.pods.extend(self.sent.pods.remove(&at).map(|pod| (at, pod)));
            }
            before.hooks.extend(self.sent.hooks.take(&device));
            let endpoint = cluster.view.own().and_then(|own| own.table.endpoint(id));
            let context = Context { policies: &self.policies, services: &self.services };
            let mut after = endpoint.map(|it| of_endpoint(cluster, context, it)).unwrap_or_default();
            after.host = before.host;
            let (first, last) = fast_changes(&before, &after, true);
            ops.extend(first.into_iter().chain(last));
            self.sent.merge(after);
            if let Some(endpoint) = endpoint {
                self.note_addresses(endpoint);
            }
        }
        ops
    }
}

impl Subsystem for FastPath {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } => {
                if host == cluster.view.me {
                    self.touched.insert(endpoint.id);
                }
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
                            self.touched.extend(placed.map(|placed| placed.endpoint.id));
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
        let fast = self.wanted(cluster, &self.compiled(cluster));
        Dataplane { fast, ..Dataplane::default() }
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.policies_changed = true;
        self.refresh_policies(cluster);
        let wanted = self.wanted(cluster, &Arc::clone(&self.policies));
        self.send(cluster, wanted);
        Dataplane { fast: self.sent.clone(), ..Dataplane::default() }
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
        first.into_iter().chain(last).collect()
    }

    fn sent(&self) -> Option<Dataplane> {
        let fast = self.sent.clone();
        self.refused.reason().is_none().then(|| Dataplane { fast, ..Dataplane::default() })
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
