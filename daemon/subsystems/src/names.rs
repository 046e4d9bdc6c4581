//! The subsystem of names: which DNS names exist, and which client sees which.
//!
//! [`Names`] owns the zone. A change only marks names ([`Subsystem::changed`]); [`Names::refresh`] looks all marked names
//! up again and returns the new zone, for the resolver to answer from. `delivery` owns what the kernel needs so that
//! endpoints reach the resolver. Begin to read at [`Names::refresh`].

mod ambiguous;
pub mod cluster_names;
mod delivery;
mod owners;
pub mod resolver;
mod zone;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ovl_cluster::backends::{Backends, Settled};
use ovl_cluster::resources::Resources;
use ovl_cluster::selectables::SelectableChange;
use ovl_cluster::view::View;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Network;
use ovl_proto::resource::{Kind, Name as ResourceName};
use ovl_proto::table::{Endpoint, Entry};
use ovl_zone::{Client, Name, Resolution, Zone};

use self::delivery::Delivery;
use self::owners::Owners;
use crate::policy::Policies;
use crate::policy::resolver::ResolverPeer;
use crate::subsystem::{Change, Cluster, Outcome, Part, Subsystem};

pub use self::ambiguous::{Ambiguous, Bearer, ambiguous};
pub use self::zone::Place;

/// Names that may have changed.
#[derive(Debug, Default)]
struct Marked {
    /// Single names and addresses, by network.
    single: BTreeMap<NetworkId, zone::Marks>,
    /// Networks whose names may all have changed.
    networks: BTreeSet<NetworkId>,
    /// Services whose names may have changed.
    services: BTreeSet<ResourceName>,
    /// Whether policies may have changed.
    policies: bool,
    /// Whether labels that policies select by may have changed.
    labels: bool,
    /// Changes of pods, in order: namespace, addresses, and whether the pod exists.
    pods: Vec<(String, Vec<IpAddr>, bool)>,
}

impl Marked {
    fn settled(&mut self, settled: &Settled) {
        self.services.extend(settled.services.iter().cloned());
        for SelectableChange { before, after, .. } in &settled.selectables {
            for (selectable, is_there) in [(before, false), (after, true)] {
                let pod =
                    selectable.as_ref().map(|it| (it.name.namespace.clone(), it.addresses.clone(), is_there));
                self.pods.extend(pod);
            }
        }
    }
}

/// What names are computed from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// Hosts, networks and Services.
    pub view: &'a View,
    /// The backends of each Service.
    pub backends: &'a Backends,
    /// Returns where an endpoint of this host is. `None` if that is unknown; its queries are then ignored.
    pub place: &'a dyn Fn(EndpointId) -> Option<Place>,
}

/// The names of endpoints, Services and pods.
#[derive(Debug)]
pub struct Names {
    marked: Marked,
    /// The policies as of the last refresh.
    policies: Policies,
    /// The addresses at which endpoints query the resolver.
    addresses: Vec<IpAddr>,
    zone: Zone,
    owners: Owners,
    delivery: Delivery,
    /// The domain below which names of endpoints are complete.
    own_domain: String,
    /// The cluster domain, which contains the names of Services and pods.
    cluster_domain: String,
}

impl Names {
    /// Creates a zone without names of endpoints, Services and pods. `own_domain` is the domain of the names of
    /// endpoints, `cluster_domain` that of Services and pods. If `walks` is set, a query that is the first step of a
    /// client's search list in the cluster domain gets the answer at which the search ends. `cluster_dns` are the
    /// addresses of the cluster DNS, at most one of each family. If `hands_over` is set, queries to those that a Service of
    /// an API server has go to its endpoints.
    pub fn new(
        own_domain: &str,
        cluster_domain: &str,
        walks: bool,
        cluster_dns: Vec<IpAddr>,
        hands_over: bool,
    ) -> Self {
        let cluster_domain = cluster_domain.trim_end_matches('.').to_ascii_lowercase();
        let mut zone = Zone::new(Name::parse(own_domain));
        owners::begin(&mut zone, &cluster_domain, walks);
        let own_domain = own_domain.to_owned();
        let own = resolver::HOST_ADDRESSES.into_iter().chain([resolver::LOOPBACK.into()]);
        let addresses = own.chain(cluster_dns.iter().copied()).collect();
        let delivery = Delivery::new(cluster_dns, hands_over);
        Self {
            marked: Marked::default(),
            policies: Policies::default(),
            addresses,
            zone,
            owners: Owners::default(),
            delivery,
            own_domain,
            cluster_domain,
        }
    }

    /// Returns the zone as of the last refresh. A copy of it is a snapshot.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Returns the cluster domain, in lower case and without a final dot.
    pub fn cluster_domain(&self) -> &str {
        &self.cluster_domain
    }

    /// Returns the addresses of the cluster DNS at which another program answers in place of ovl.
    pub fn handed_over(&self, resources: &Resources) -> BTreeSet<IpAddr> {
        self.delivery.elsewhere(resources)
    }

    /// Records that endpoints of this host on a network use the resolver. The next plan sends what they need.
    pub fn resolve(&mut self, network: NetworkId) {
        self.delivery.resolve(network);
    }

    /// Looks all marked names up again. Returns the new zone, or `None` if nothing was marked.
    pub fn refresh(&mut self, sources: Sources<'_>) -> Option<Zone> {
        let Marked { single, networks, services, pods, policies, labels } = std::mem::take(&mut self.marked);
        let in_cluster = self.refresh_cluster(sources, services, pods);
        if single.is_empty() && networks.is_empty() && !in_cluster && !policies && !labels {
            return None;
        }
        if policies {
            self.policies = Policies::new(&sources.view.resources);
        }
        self.refresh_networks(sources, &networks, single, policies || labels);
        Some(self.zone.clone())
    }

    /// Looks all names of all networks and all marked names up again. Returns the new zone.
    pub fn refresh_all(&mut self, sources: Sources<'_>) -> Zone {
        self.marked.networks.extend(sources.view.networks.keys());
        let Marked { single, networks, services, pods, .. } = std::mem::take(&mut self.marked);
        self.refresh_cluster(sources, services, pods);
        self.policies = Policies::new(&sources.view.resources);
        self.refresh_networks(sources, &networks, single, true);
        self.zone.clone()
    }

    /// Updates all names of the networks in `whole`, and the marked names of the others. `rights` says whether policies may
    /// allow other endpoints to ask than before.
    fn refresh_networks(
        &mut self,
        Sources { view, place, .. }: Sources<'_>,
        whole: &BTreeSet<NetworkId>,
        marks: BTreeMap<NetworkId, zone::Marks>,
        rights: bool,
    ) {
        let zone = &mut self.zone;
        // The clients depend on this host's endpoints, and on which other hosts have the same addresses.
        let is_own = |network: NetworkId, address: IpAddr| {
            let mut all = view.all_with_address(network, address);
            zone.has_client(address) || all.any(|placed| placed.node.record.id == view.me)
        };
        let asks = rights
            || !whole.is_empty()
            || marks.iter().any(|(network, marks)| marks.addresses().iter().any(|at| is_own(*network, *at)));
        if !whole.is_empty() || zone.networks() != view.networks.len() {
            let networks: HashSet<_> = view.networks.keys().map(|id| zone::key(*id)).collect();
            zone.retain_networks(|key| networks.contains(&key));
        }
        for network in whole {
            zone::set_network(zone, view, *network);
        }
        for (network, marks) in marks.into_iter().filter(|(network, _)| !whole.contains(network)) {
            zone::set(zone, view, network, &marks);
        }
        if asks {
            let peer = ResolverPeer::new(&view.resources, self.addresses.clone());
            let may_ask = |endpoint: &Endpoint| {
                let labels = view.known_labels(view.me, endpoint);
                self.policies.allow_resolver(&view.resources, &endpoint.namespace, labels.as_deref(), &peer)
            };
            let watched = |endpoint: &Endpoint| {
                let labels = view.known_labels(view.me, endpoint);
                self.policies.patterns_of(&view.resources, &endpoint.namespace, labels.as_deref())
            };
            zone::set_clients(zone, view, place, may_ask, watched);
        }
    }

    /// Updates the names of Services and pods. Returns whether any was marked.
    fn refresh_cluster(
        &mut self,
        sources: Sources<'_>,
        services: BTreeSet<ResourceName>,
        pods: Vec<(String, Vec<IpAddr>, bool)>,
    ) -> bool {
        if services.is_empty() && pods.is_empty() {
            return false;
        }
        if sources.view.has_services() {
            // From the first Service on, existing pods may ask for names of Services.
            let networks = sources.view.own().into_iter().flat_map(|own| own.table.networks());
            networks.for_each(|network| self.delivery.resolve(network));
        }
        let domain = &self.cluster_domain;
        for name in services {
            let service = sources.view.resources.services().get(&name);
            let names =
                service.map(|service| cluster_names::of_service(domain, service, sources.backends.of(&name)));
            self.owners.change(&mut self.zone, name, names);
        }
        for (namespace, addresses, is_there) in pods {
            self.owners.change_pod(&mut self.zone, domain, (&namespace, &addresses, is_there));
        }
        true
    }

    fn mark(&mut self, endpoint: &Endpoint) {
        self.marked.single.entry(endpoint.network).or_default().note(endpoint);
    }

    /// Marks the endpoints that may have the name of a pod. The name of an endpoint without a pod does not depend on
    /// others.
    fn mark_pod(&mut self, view: &View, pod: &ResourceName) {
        let all = view.all_of_pod(pod).map(|placed| placed.endpoint);
        all.filter(|endpoint| endpoint.pod.is_some()).for_each(|endpoint| self.mark(endpoint));
    }

    /// Explains the answer that the zone gives a client for a name, as the end of a sentence.
    pub fn explain(&self, view: &View, client: Client, name: &Name) -> String {
        match self.zone.find(client, name) {
            Resolution::Found(found, records) => {
                let mut networks = view.networks.values().map(|state| &state.network);
                let Some(network) = networks.find(|network| zone::key(network.id) == found) else {
                    return format!("of the cluster, under {}", self.cluster_domain);
                };
                let addresses = records.v4.iter().map(|at| IpAddr::from(*at));
                let addresses = addresses.chain(records.v6.iter().map(|at| IpAddr::from(*at)));
                let of = addresses.chain(name.reversed()).filter_map(|address| {
                    let placed = view.endpoint_by_address(network.id, address)?;
                    Some(format!("{} on {}", placed.endpoint.name, placed.node.record.name))
                });
                let of: BTreeSet<String> = of.collect();
                let of: Vec<String> = of.into_iter().collect();
                format!("on network {}: {}", network.name, of.join(", "))
            }
            Resolution::NotFound => "only ovl would know this name, and nothing is called so".to_owned(),
            Resolution::SearchPath(to) => format!("a search list is walked here, and ends at {to}"),
            Resolution::External if matches!(client, Client::Endpoint(_)) && !self.zone.allows_external(client) => {
                "not of the cluster, and the endpoint is on internal networks alone: `network create --internal \
                 --external-names` allows such names"
                    .to_owned()
            }
            Resolution::External => {
                format!("not under {}: the host asks its own resolvers for other names", self.own_domain)
            }
        }
    }
}

impl Subsystem for Names {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        self.delivery.changed(change, cluster);
        match *change {
            Change::Entry { entry: Entry::Endpoint(endpoint), .. } => {
                self.mark(endpoint);
                // Another endpoint of its pod may have, or no longer have, the pod's name.
                if endpoint.pod.is_some() {
                    self.mark_pod(cluster.view, &endpoint.pod_name());
                }
            }
            Change::Resources(keys) => {
                let pods = keys.iter().filter(|key| key.kind == Kind::Pod);
                pods.for_each(|key| self.mark_pod(cluster.view, &key.name));
                self.marked.policies |= keys.iter().any(|key| key.kind.is_policy());
                self.marked.labels |= keys.iter().any(|key| matches!(key.kind, Kind::Namespace | Kind::Pod));
            }
            Change::Rights(network) | Change::Network(network) => {
                self.marked.networks.insert(network);
            }
            Change::HostRights { host, network } => {
                let node = cluster.view.nodes.get(&host);
                for endpoint in node.into_iter().flat_map(|node| node.table.endpoints_on(network)) {
                    self.mark(endpoint);
                    if endpoint.pod.is_some() {
                        self.mark_pod(cluster.view, &endpoint.pod_name());
                    }
                }
            }
            Change::Backends(settled) => self.marked.settled(settled),
            Change::Entry { .. }
            | Change::Built(_)
            | Change::Host(_)
            // The rights of all networks come before it.
            | Change::ThisHost
            | Change::Tunnel
            | Change::Attaching(_)
            | Change::Groups(_)
            | Change::FastPath | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        self.delivery.desired(cluster)
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.delivery.resync(cluster)
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        self.delivery.plan(cluster)
    }

    fn sent(&self) -> Option<Dataplane> {
        self.delivery.sent()
    }

    fn prepare(&mut self, _: &Endpoint, network: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.delivery.prepare(network.id, cluster), wants: Dataplane::default() }
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        self.delivery.outcome(outcome);
    }

    fn withdraw(&mut self) {
        self.delivery.withdraw();
    }
}
