//! The backends of each Service, from its selector, endpoints and Pods, EndpointSlices, and the liveness of hosts.
//! The index is updated incrementally: a change of an endpoint costs an update of only those Services that select
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::resource::{
    EndpointSlice, HintTarget, IntOrString, Kind, Labels, Name, Pod, Protocol, ResourceKey,
    SERVICE_NAME_LABEL, Service, ServicePort, SliceEndpoint, TrafficDistribution, has_all, is_for_names_only,
};

use crate::resources::named_port;
use crate::selectables::{Selectable, SelectableChange, SelectableId, Selectables, label_key, take};
use crate::view::View;

/// Whether a backend accepts connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readiness {
    /// It accepts new connections.
    Ready,
    /// It is shutting down and still serves. It receives new connections only if no backend is ready.
    Draining,
    /// It accepts no connections. It is listed for information.
    NotReady,
}

/// A backend of a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// The addresses, one for each address family.
    pub addresses: Vec<IpAddr>,
    /// The port for each port of the Service, in their order. `None` if the backend has no port of that name.
    pub ports: Vec<Option<u16>>,
    /// The host, if known.
    pub host: Option<NodeId>,
    /// The readiness; always `Ready` if the Service publishes addresses that are not ready.
    pub readiness: Readiness,
    /// The name of its own DNS record, under the Service's name. Empty: it has none.
    pub hostname: String,
    /// The name of the endpoint or Pod, for people. Empty for an address of an EndpointSlice.
    pub name: String,
    /// The clients that it is meant for. `None`: all.
    pub hints: Option<Box<Hints>>,
    /// Whether it is for DNS alone: no connection is translated to it.
    pub names_only: bool,
}

/// The clients that a backend is meant for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Hints {
    /// Those in these zones.
    pub zones: Vec<String>,
    /// Those on the hosts with these names.
    pub hosts: Vec<String>,
}

/// Where the clients of a host are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position<'a> {
    /// The zone. May be empty.
    pub zone: &'a str,
    /// The name of the host.
    pub host: &'a str,
}

/// A backend for one port and address family of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The address at which it listens.
    pub address: IpAddr,
    /// The port at which it listens.
    pub port: u16,
    /// The host, if known.
    pub host: Option<NodeId>,
}

/// Returns the backends of one port and address family: the ready ones, or if there are none, the draining ones. With
/// `on`, only those of that host (the traffic policy Local). They are sorted and unique.
pub fn targets(backends: &[Backend], port: usize, ipv4: bool, on: Option<NodeId>) -> Vec<Target> {
    let ready = ready_targets(backends, port, ipv4, on);
    if ready.is_empty() {
        unique(fitting(backends, Readiness::Draining, port, ipv4, on).map(|(_, target)| target))
    } else {
        ready
    }
}

/// As [`targets`] of all hosts, but only those that are meant for clients at a position, as kube-proxy chooses them: those for
/// its host, or else those for its zone. Hints count if all ready backends have some of their kind and one is for the
/// position; draining backends are chosen regardless of them.
pub fn targets_for(backends: &[Backend], port: usize, ipv4: bool, position: Position<'_>) -> Vec<Target> {
    let hosts: fn(&Hints) -> &[String] = |hints| &hints.hosts;
    let zones: fn(&Hints) -> &[String] = |hints| &hints.zones;
    for (kind, own) in [(hosts, position.host), (zones, position.zone)] {
        let ready = || {
            let all = fitting(backends, Readiness::Ready, port, ipv4, None);
            all.map(move |(backend, target)| (backend.hints.as_deref().map(kind).unwrap_or_default(), target))
        };
        if !own.is_empty() && ready().all(|(hints, _)| !hints.is_empty()) {
            let meant = ready().filter(|(hints, _)| hints.iter().any(|hint| hint == own));
            let meant = unique(meant.map(|(_, target)| target));
            if !meant.is_empty() {
                return meant;
            }
        }
    }
    targets(backends, port, ipv4, None)
}

/// As [`targets`], without the draining ones: those for which a load balancer should send connections to a host.
pub fn ready_targets(backends: &[Backend], port: usize, ipv4: bool, on: Option<NodeId>) -> Vec<Target> {
    unique(fitting(backends, Readiness::Ready, port, ipv4, on).map(|(_, target)| target))
}

/// Returns the backends with this readiness, on this host, that have an address of the family and the port.
fn fitting(
    backends: &[Backend],
    readiness: Readiness,
    port: usize,
    ipv4: bool,
    on: Option<NodeId>,
) -> impl Iterator<Item = (&Backend, Target)> {
    let all = backends.iter().filter(move |backend| backend.readiness == readiness && !backend.names_only);
    all.filter(move |backend| on.is_none() || backend.host == on).filter_map(move |backend| {
        let address = *backend.addresses.iter().find(|address| address.is_ipv4() == ipv4)?;
        Some((backend, Target { address, port: (*backend.ports.get(port)?)?, host: backend.host }))
    })
}

fn unique(targets: impl Iterator<Item = Target>) -> Vec<Target> {
    let mut targets: Vec<Target> = targets.collect();
    targets.sort_unstable();
    targets.dedup_by_key(|target| (target.address, target.port));
    targets
}

/// The backends of all Services.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    selectables: Selectables,
    of: BTreeMap<Name, Vec<Backend>>,
    /// Services with a selector, each under one of its labels.
    selectors: BTreeMap<(String, String, String), BTreeSet<Name>>,
    /// The label under which each Service is indexed, and its selector.
    listed: BTreeMap<Name, ((String, String, String), Labels)>,
    /// The Service of each slice, and the slices of each Service.
    slice_of: BTreeMap<Name, Name>,
    slices: BTreeMap<Name, BTreeSet<Name>>,
    /// The Services that the next [`Self::settle`] updates, and whether the Service itself changed.
    dirty: BTreeMap<Name, bool>,
    changes: Vec<SelectableChange>,
}

/// The changes of a [`Backends::settle`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    /// Services that were added, changed or removed, or whose backends changed.
    pub services: BTreeSet<Name>,
    /// Selectables that were added, changed or removed, in the order of the changes.
    pub selectables: Vec<SelectableChange>,
}

impl Backends {
    /// Returns the selectables.
    pub fn selectables(&self) -> &Selectables {
        &self.selectables
    }

    /// Returns the backends of a Service as of the last [`Self::settle`], ready or not, in order.
    pub fn of(&self, service: &Name) -> &[Backend] {
        self.of.get(service).map_or(&[], Vec::as_slice)
    }

    /// Records that an endpoint was added, changed or removed.
    pub fn touch_endpoint(&mut self, view: &View, host: NodeId, id: EndpointId) {
        let changes = self.selectables.touch_endpoint(view, host, id);
        self.note(changes);
    }

    /// Records that the set of a network's used endpoints may have changed: a host died or returned, or blocks moved.
    pub fn touch_network(&mut self, view: &View, network: NetworkId) {
        let changes = self.selectables.touch_network(view, network);
        self.note(changes);
    }

    /// Records that the liveness of a host has changed, which affects slices that name it.
    pub fn touch_host(&mut self, view: &View, host: NodeId) {
        let Some(node) = view.nodes.get(&host) else { return };
        let name = &node.record.name;
        for (slice, service) in &self.slice_of {
            let on_it = |slice: &EndpointSlice| slice.endpoints.iter().any(|it| it.node_name == *name);
            if view.resources.slices().get(slice).is_some_and(on_it) {
                self.dirty.entry(service.clone()).or_default();
            }
        }
        // Its zone may have changed.
        let distributed = view.resources.services().iter();
        for (name, _) in distributed.filter(|(_, service)| service.spec.traffic_distribution.is_some()) {
            self.dirty.entry(name.clone()).or_default();
        }
    }

    /// Records that a Kubernetes object was added, changed or removed.
    pub fn touch_resource(&mut self, view: &View, key: &ResourceKey) {
        match key.kind {
            Kind::Service => self.touch_service(view, &key.name),
            Kind::EndpointSlice => self.touch_slice(view, &key.name),
            Kind::Pod => {
                let changes = self.selectables.touch_pod(view, &key.name);
                self.note(changes);
                // Its named ports may have changed while its labels are the same.
                let named: Vec<Selectable> =
                    self.selectables.of_pod(&key.name).map(|(_, selectable)| selectable.clone()).collect();
                named.iter().for_each(|selectable| self.select(selectable));
            }
            Kind::Namespace
            | Kind::NetworkPolicy
            | Kind::ServiceCidr
            | Kind::ClusterNetworkPolicy
            | Kind::Node => {}
        }
    }

    fn touch_service(&mut self, view: &View, name: &Name) {
        let selector = view.resources.services().get(name).and_then(selector_of);
        if self.listed.get(name).map(|(_, listed)| listed) != selector {
            if let Some((label, _)) = self.listed.remove(name) {
                take(&mut self.selectors, &label, name);
            }
            // Index the Service under its rarest label, so that a label of all Services costs nothing.
            let labels = selector.into_iter().flatten().map(|label| label_key(&name.namespace, label));
            let label = labels.min_by_key(|label| self.selectors.get(label).map_or(0, BTreeSet::len));
            if let (Some(label), Some(selector)) = (label, selector) {
                self.selectors.entry(label.clone()).or_default().insert(name.clone());
                self.listed.insert(name.clone(), (label, selector.clone()));
            }
        }
        self.dirty.insert(name.clone(), true);
    }

    fn touch_slice(&mut self, view: &View, name: &Name) {
        let label = |slice: &EndpointSlice| slice.metadata.labels.get(SERVICE_NAME_LABEL).cloned();
        let service = view.resources.slices().get(name).and_then(label);
        let service = service.map(|service| Name::new(&name.namespace, service));
        if let Some(old) = self.slice_of.remove(name) {
            take(&mut self.slices, &old, name);
            self.dirty.entry(old).or_default();
        }
        if let Some(service) = service {
            self.slices.entry(service.clone()).or_default().insert(name.clone());
            self.slice_of.insert(name.clone(), service.clone());
            self.dirty.entry(service).or_default();
        }
    }

    fn note(&mut self, changes: Vec<SelectableChange>) {
        for change in changes {
            for selectable in change.before.iter().chain(&change.after) {
                self.select(selectable);
            }
            self.changes.push(change);
        }
    }

    /// Marks the Services that select a selectable as dirty.
    fn select(&mut self, selectable: &Selectable) {
        let labels = selectable.labels.iter().map(|label| label_key(&selectable.name.namespace, label));
        let candidates = labels.filter_map(|label| self.selectors.get(&label)).flatten();
        let selecting = candidates.filter(|name| {
            self.listed.get(*name).is_some_and(|(_, wants)| has_all(&selectable.labels, wants))
        });
        for name in selecting {
            self.dirty.entry(name.clone()).or_default();
        }
    }

    /// Updates the backends of all recorded changes.
    pub fn settle(&mut self, view: &View) -> Settled {
        let mut settled = Settled { selectables: std::mem::take(&mut self.changes), ..Settled::default() };
        for (name, changed) in std::mem::take(&mut self.dirty) {
            let was = self.of.remove(&name);
            let is = view.resources.services().get(&name).map(|service| self.backends(view, &name, service));
            if changed || was != is {
                settled.services.insert(name.clone());
            }
            if let Some(is) = is {
                self.of.insert(name, is);
            }
        }
        settled
    }

    fn backends(&self, view: &View, name: &Name, service: &Service) -> Vec<Backend> {
        // As in Kubernetes, a finished pod is no backend, even of a Service that publishes addresses that are not ready.
        let is_finished = |id: &SelectableId, selectable: &Selectable| {
            pod_of(view, id, selectable).is_some_and(Pod::is_finished)
        };
        let selected = selector_of(service);
        let selected = selected.map(|selector| self.selectables.with_labels(&name.namespace, selector));
        let selected = selected.into_iter().flatten().filter(|(id, selectable)| !is_finished(id, selectable));
        let mut backends: Vec<Backend> =
            selected.map(|(id, selectable)| backend_of_selectable(view, service, id, selectable)).collect();
        for slice in self.slices.get(name).into_iter().flatten() {
            if let Some(slice) = view.resources.slices().get(slice) {
                let ports = ports_of_slice(service, slice);
                let names_only = is_for_names_only(&slice.metadata.labels);
                let counted = slice.endpoints.iter().filter_map(|it| {
                    let backend = backend_of_slice(view, service, &ports, it)?;
                    Some(Backend { names_only, ..backend })
                });
                backends.extend(counted);
            }
        }
        backends.sort_unstable();
        backends.dedup();
        backends
    }
}

/// Returns the selector by which a Service chooses backends. `None` if it has none, or if it is mirrored: the controllers
/// of its API server evaluate the selector, and their EndpointSlices are mirrored beside it.
fn selector_of(service: &Service) -> Option<&Labels> {
    let selector = &service.spec.selector;
    (!selector.is_empty() && service.metadata.source.is_none()).then_some(selector)
}

/// Returns the v1 Pod that describes a selectable.
fn pod_of<'a>(view: &'a View, id: &SelectableId, selectable: &Selectable) -> Option<&'a Pod> {
    let described = match id {
        SelectableId::Endpoint(host, id) => {
            view.nodes.get(host).and_then(|node| node.table.endpoint(*id)?.described.as_deref())
        }
        SelectableId::Pod(_) => None,
    };
    described.or_else(|| view.resources.pods().get(&*selectable.name)).filter(|_| selectable.has_pod)
}

fn backend_of_selectable(
    view: &View,
    service: &Service,
    id: &SelectableId,
    selectable: &Selectable,
) -> Backend {
    let pod = pod_of(view, id, selectable);
    let port = |port: &ServicePort| match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => named_port(pod?, name, port.protocol),
    };
    // As in Kubernetes, a pod's host name applies to the Service that its subdomain names.
    let named = pod.filter(|pod| pod.spec.subdomain == service.metadata.name);
    let hints = selectable.host.and_then(|host| hints_on(view, service, host)).map(Box::new);
    let ready = selectable.ready || service.spec.publish_not_ready_addresses;
    Backend {
        addresses: selectable.addresses.clone(),
        ports: service.spec.ports.iter().map(port).collect(),
        host: selectable.host,
        readiness: if ready { Readiness::Ready } else { Readiness::NotReady },
        hostname: named.map(|pod| pod.spec.hostname.clone()).unwrap_or_default(),
        name: selectable.name.name.clone(),
        hints,
        names_only: false,
    }
}

/// Returns the hints of a backend on a host that the Service's selector selects, as the controller of Kubernetes writes them
/// into slices. `None` if the Service asks for none.
fn hints_on(view: &View, service: &Service, host: NodeId) -> Option<Hints> {
    let prefers = service.spec.traffic_distribution?;
    let record = &view.nodes.get(&host)?.record;
    let zones = Some(record.zone.clone()).filter(|zone| !zone.is_empty()).into_iter().collect();
    let hosts = match prefers {
        TrafficDistribution::PreferClose | TrafficDistribution::PreferSameZone => Vec::new(),
        TrafficDistribution::PreferSameNode => vec![record.name.clone()],
    };
    Some(Hints { zones, hosts })
}

/// Returns the hints of a slice's endpoint.
fn hints_of(endpoint: &SliceEndpoint) -> Option<Box<Hints>> {
    let names = |targets: &[HintTarget]| targets.iter().map(|target| target.name.clone()).collect();
    let hints = endpoint.hints.as_ref()?;
    Some(Box::new(Hints { zones: names(&hints.for_zones), hosts: names(&hints.for_nodes) }))
}

/// Returns the port of a slice for each port of its Service.
fn ports_of_slice(service: &Service, slice: &EndpointSlice) -> Vec<Option<u16>> {
    // A slice can have many ports, so each is looked at once. Of several alike the first one counts.
    let by_name: BTreeMap<(&str, Protocol), Option<u16>> =
        slice.ports.iter().rev().map(|port| ((port.name.as_str(), port.protocol), port.port)).collect();
    let wanted = service.spec.ports.iter().map(|port| (port.name.as_str(), port.protocol));
    wanted.map(|wanted| by_name.get(&wanted).copied().flatten()).collect()
}

/// Returns the backend of a slice's endpoint with these ports; `None` if its host is known and its entries are not used.
fn backend_of_slice(
    view: &View,
    service: &Service,
    ports: &[Option<u16>],
    endpoint: &SliceEndpoint,
) -> Option<Backend> {
    let node = view.nodes.values().find(|node| node.record.name == endpoint.node_name);
    if node.is_some_and(|node| !view.counts(node)) {
        return None;
    }
    let conditions = endpoint.conditions;
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let terminating = conditions.terminating.unwrap_or(false);
    let readiness = match (ready && !terminating, serving && terminating) {
        _ if service.spec.publish_not_ready_addresses => Readiness::Ready,
        (true, _) => Readiness::Ready,
        (false, true) => Readiness::Draining,
        (false, false) => Readiness::NotReady,
    };
    Some(Backend {
        addresses: endpoint.addresses.first().copied().into_iter().collect(),
        ports: ports.to_vec(),
        host: node.map(|node| node.record.id),
        readiness,
        hostname: endpoint.hostname.clone(),
        name: String::new(),
        hints: hints_of(endpoint),
        names_only: false,
    })
}
