//! The kernel's part of names: the tables and addresses by which queries of endpoints reach the resolver.
//!
//! [`Delivery`] owns which networks use the resolver, and what was last sent for them. What it sends is computed in
//! [`super::resolver`]. Begin to read at [`Delivery::plan`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_cluster::resources::Resources;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::nft::{Skeleton, Table};
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::resource::Kind;
use ovl_proto::table::Entry;

use super::resolver;
use crate::services::cluster_dns::handed_over;
use crate::subsystem::{Change, Cluster, Outcome};

/// The resolver's addresses on the bridge of one network.
type Addresses = BTreeSet<(Device, IpNet)>;

/// The networks whose endpoints use the resolver, and what was last sent for them.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    /// Addresses of the cluster DNS, at most one of each family.
    cluster_dns: Vec<IpAddr>,
    /// Whether a Service of an API server gets the queries to those that it has.
    hands_over: bool,
    /// Those for which the tables and addresses were last sent: at which ovl answers.
    answered: Vec<IpAddr>,
    /// Whether Services have changed since.
    recheck: bool,
    /// Networks with endpoints of this host that use the resolver.
    resolved: BTreeSet<NetworkId>,
    /// The addresses that were last sent. The tables are sent while there are any.
    sent: BTreeMap<NetworkId, Addresses>,
    /// Whether the tables are also sent for programs of the host itself: while the cluster has Services.
    for_host: bool,
    /// Networks that may have changed since.
    changed: BTreeSet<NetworkId>,
    /// Networks that the kernel could not set up: what was sent for them is not there.
    refused: BTreeSet<NetworkId>,
}

impl Delivery {
    /// Begins without networks.
    pub(super) fn new(cluster_dns: Vec<IpAddr>, hands_over: bool) -> Self {
        let answered = cluster_dns.clone();
        Self { cluster_dns, hands_over, answered, recheck: hands_over, ..Self::default() }
    }

    /// Returns the addresses of the cluster DNS at which ovl answers.
    fn answered(&self, cluster: &Cluster<'_>) -> Vec<IpAddr> {
        let mut answered = self.cluster_dns.clone();
        let elsewhere = self.elsewhere(&cluster.view.resources);
        answered.retain(|address| !elsewhere.contains(address));
        answered
    }

    /// Returns the addresses of the cluster DNS at which another program answers.
    pub(super) fn elsewhere(&self, resources: &Resources) -> BTreeSet<IpAddr> {
        match self.hands_over {
            true => handed_over(resources, self.cluster_dns.iter().copied()),
            false => BTreeSet::new(),
        }
    }

    /// Records that endpoints of this host on a network use the resolver.
    pub(super) fn resolve(&mut self, network: NetworkId) {
        if self.resolved.insert(network) {
            self.changed.insert(network);
        }
    }

    /// Records a change, at the cost of that change.
    pub(super) fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } if host == cluster.view.me => {
                self.mark(endpoint.network);
            }
            Change::Rights(network)
            | Change::HostRights { network, .. }
            | Change::Network(network)
            | Change::Built(network) => self.mark(network),
            Change::Resources(keys) => {
                let about = |kind| matches!(kind, Kind::Service | Kind::EndpointSlice);
                self.recheck |= self.hands_over && keys.iter().any(|key| about(key.kind));
            }
            // The rights of all networks come before `ThisHost`.
            Change::Entry { .. }
            | Change::ThisHost
            | Change::Host(_)
            | Change::Tunnel
            | Change::Attaching(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    fn mark(&mut self, network: NetworkId) {
        if self.resolved.contains(&network) {
            self.changed.insert(network);
        }
    }

    /// Returns what is wanted for one network: nothing if this host does not have its bridge.
    fn wanted(&self, network: NetworkId, cluster: &Cluster<'_>, answered: &[IpAddr]) -> Addresses {
        let known = cluster.view.networks.get(&network).map(|state| &state.network);
        let known = known.filter(|network| {
            self.resolved.contains(&network.id) && cluster.local.is_built(cluster.view, network.id)
        });
        known.map(|network| resolver::on_bridge(network, answered)).unwrap_or_default()
    }

    fn part(addresses: Addresses, for_host: bool, answered: &[IpAddr]) -> Dataplane {
        let tables = Self::tables((!addresses.is_empty(), for_host), answered);
        Dataplane { tables, addresses, ..Dataplane::default() }
    }

    fn tables(
        (for_endpoints, for_host): (bool, bool),
        answered: &[IpAddr],
    ) -> BTreeMap<Table, Arc<Skeleton>> {
        match for_endpoints || for_host {
            true => resolver::tables(answered, for_endpoints),
            false => BTreeMap::new(),
        }
    }

    /// Returns the desired data plane.
    pub(super) fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        let answered = self.answered(cluster);
        let all =
            self.resolved.iter().flat_map(|network| self.wanted(*network, cluster, &answered)).collect();
        Self::part(all, cluster.view.has_services(), &answered)
    }

    /// Returns what was last sent. `None` while a refused network has not been sent again.
    pub(super) fn sent(&self) -> Option<Dataplane> {
        self.refused.is_empty().then(|| self.all_sent())
    }

    fn all_sent(&self) -> Dataplane {
        Self::part(self.sent.values().flatten().copied().collect(), self.for_host, &self.answered)
    }

    /// Returns the desired data plane and records it as sent.
    pub(super) fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.changed.clear();
        self.refused.clear();
        self.for_host = cluster.view.has_services();
        self.recheck = false;
        self.answered = self.answered(cluster);
        let all =
            self.resolved.iter().map(|network| (*network, self.wanted(*network, cluster, &self.answered)));
        self.sent = all.filter(|(_, addresses)| !addresses.is_empty()).collect();
        self.all_sent()
    }

    /// Returns the operations for the networks that changed. The tables come before the first address.
    pub(super) fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let before = self.answered.clone();
        if std::mem::take(&mut self.recheck) {
            self.answered = self.answered(cluster);
            if self.answered != before {
                self.changed.extend(&self.resolved);
            }
        }
        let changed = std::mem::take(&mut self.changed);
        let for_host = cluster.view.has_services();
        let answers_elsewhere = self.answered != before;
        if changed.is_empty() && for_host == self.for_host && !answers_elsewhere {
            return Vec::new();
        }
        let (mut was, mut is) = (Dataplane::default(), Dataplane::default());
        let had = (!self.sent.is_empty(), self.for_host);
        self.for_host = for_host;
        for network in changed {
            self.refused.remove(&network);
            let had = self.sent.remove(&network).unwrap_or_default();
            let mut now = self.wanted(network, cluster, &self.answered);
            if !cluster.may_prune(network) {
                now.extend(&had);
            }
            was.addresses.extend(had);
            is.addresses.extend(&now);
            if !now.is_empty() {
                self.sent.insert(network, now);
            }
        }
        let has = (!self.sent.is_empty(), for_host);
        // Most changes leave the tables as they are.
        if had != has || answers_elsewhere {
            was.tables = Self::tables(had, &before);
            is.tables = Self::tables(has, &self.answered);
        }
        diff(&was, &is, true)
    }

    /// Returns the operations before an endpoint is created on a network, which it tries again if it was refused.
    pub(super) fn prepare(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        self.changed.extend(self.refused.get(&network));
        self.plan(cluster)
    }

    /// Records the kernel's answer to an operation. Without its bridge, a network has none of these addresses.
    pub(super) fn outcome(&mut self, outcome: Outcome<'_>) {
        let network = outcome.refusal.and_then(|_| outcome.op.breaks_network());
        if let Some(network) = network.filter(|network| self.resolved.contains(network)) {
            self.sent.remove(&network);
            self.refused.insert(network);
        }
    }

    /// Drops all wishes, at teardown.
    pub(super) fn withdraw(&mut self) {
        *self = Self::new(std::mem::take(&mut self.cluster_dns), self.hands_over);
    }
}
