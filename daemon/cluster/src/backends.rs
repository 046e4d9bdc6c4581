//! What stands behind each Service: out of its selector, endpoints and Pods, EndpointSlices, and the liveness of
//! hosts. Kept up change by change: one endpoint that comes or goes costs a look at the Services that
//! select it, however many others there are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::resource::{
    EndpointSlice, IntOrString, Kind, Labels, Name, ResourceKey, SERVICE_NAME_LABEL, Service, ServicePort,
    SliceEndpoint, has_all,
};

use crate::members::{Member, MemberChange, Members, pair, take};
use crate::resources::named_port;
use crate::view::View;

/// How far a backend takes connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readiness {
    /// New ones too.
    Ready,
    /// It is on its way out and still serves: it gets new ones only where nobody is ready.
    Draining,
    /// None. It is listed for those who ask.
    NotReady,
}

/// What stands behind a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// One for each address family that it has.
    pub addresses: Vec<IpAddr>,
    /// The port for each of the Service's ports, in their order; nothing where it has none of that name.
    pub ports: Vec<Option<u16>>,
    /// Its host, where that is known.
    pub host: Option<NodeId>,
    /// See [`Readiness`]; `Ready` whatever it says itself where the Service publishes addresses that are not.
    pub readiness: Readiness,
    /// The name of its own record in DNS, under the Service's; empty: none was given.
    pub hostname: String,
    /// The endpoint or Pod, for people; empty where an EndpointSlice lists an address.
    pub name: String,
}

/// A backend for one port and address family of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Where it listens.
    pub address: IpAddr,
    /// Where it listens.
    pub port: u16,
    /// Its host, where that is known.
    pub host: Option<NodeId>,
}

/// The backends of one port, for the addresses of one family: the ready ones, or where there are none those
/// that drain. With `on`, those of that host alone are looked at: the traffic policy Local. In order, each once.
pub fn targets(backends: &[Backend], port: usize, ipv4: bool, on: Option<NodeId>) -> Vec<Target> {
    let all = |readiness| {
        let fitting = backends
            .iter()
            .filter(move |backend| backend.readiness == readiness && (on.is_none() || backend.host == on));
        let targets = fitting.filter_map(|backend| {
            let address = *backend.addresses.iter().find(|address| address.is_ipv4() == ipv4)?;
            Some(Target { address, port: (*backend.ports.get(port)?)?, host: backend.host })
        });
        let mut targets: Vec<Target> = targets.collect();
        targets.sort_unstable();
        targets.dedup_by_key(|target| (target.address, target.port));
        targets
    };
    let ready = all(Readiness::Ready);
    if ready.is_empty() { all(Readiness::Draining) } else { ready }
}

/// What stands behind all Services.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    members: Members,
    of: BTreeMap<Name, Vec<Backend>>,
    /// Services with a selector, each under one of its labels.
    selectors: BTreeMap<(String, String, String), BTreeSet<Name>>,
    /// Under which label and with which selector each is listed.
    listed: BTreeMap<Name, ((String, String, String), Labels)>,
    /// The Service of each slice, and the slices of each Service.
    slice_of: BTreeMap<Name, Name>,
    slices: BTreeMap<Name, BTreeSet<Name>>,
    /// To be looked at by the next [`Self::settle`], and whether the Service itself changed.
    dirty: BTreeMap<Name, bool>,
    changes: Vec<MemberChange>,
}

/// What a [`Backends::settle`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    /// Services that came, went or changed, or whose backends did.
    pub services: BTreeSet<Name>,
    /// Workloads that came, went or changed, in the order in which they did.
    pub members: Vec<MemberChange>,
}

impl Backends {
    /// Who can be selected.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// What stands behind a Service as of the last [`Self::settle`], whether ready or not, in order.
    pub fn of(&self, service: &Name) -> &[Backend] {
        self.of.get(service).map_or(&[], Vec::as_slice)
    }

    /// An endpoint came, went or changed.
    pub fn touch_endpoint(&mut self, view: &View, host: NodeId, id: EndpointId) {
        let changes = self.members.touch_endpoint(view, host, id);
        self.note(changes);
    }

    /// Whether a network's endpoints count may have changed: a host died or came back, or blocks moved.
    pub fn touch_network(&mut self, view: &View, network: NetworkId) {
        let changes = self.members.touch_network(view, network);
        self.note(changes);
    }

    /// The liveness of a host has changed: slices name hosts too.
    pub fn touch_host(&mut self, view: &View, host: NodeId) {
        let Some(node) = view.nodes.get(&host) else { return };
        let name = &node.record.name;
        for (slice, service) in &self.slice_of {
            let on_it = |slice: &EndpointSlice| slice.endpoints.iter().any(|it| it.node_name == *name);
            if view.resources.slices().get(slice).is_some_and(on_it) {
                self.dirty.entry(service.clone()).or_default();
            }
        }
    }

    /// An object came, went or changed.
    pub fn touch_resource(&mut self, view: &View, key: &ResourceKey) {
        match key.kind {
            Kind::Service => self.touch_service(view, &key.name),
            Kind::EndpointSlice => self.touch_slice(view, &key.name),
            Kind::Pod => {
                let changes = self.members.touch_pod(view, &key.name);
                self.note(changes);
                // Its named ports may be others while its labels are the same.
                let named: Vec<Member> =
                    self.members.named(&key.name).map(|(_, member)| member.clone()).collect();
                named.iter().for_each(|member| self.select(member));
            }
            Kind::Namespace | Kind::NetworkPolicy => {}
        }
    }

    fn touch_service(&mut self, view: &View, name: &Name) {
        let selector = view.resources.services().get(name).map(|service| &service.spec.selector);
        let selector = selector.filter(|selector| !selector.is_empty());
        if self.listed.get(name).map(|(_, listed)| listed) != selector {
            if let Some((label, _)) = self.listed.remove(name) {
                take(&mut self.selectors, &label, name);
            }
            // Where the fewest others are, so that a label that all have is no burden.
            let labels = selector.into_iter().flatten().map(|label| pair(&name.namespace, label));
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

    fn note(&mut self, changes: Vec<MemberChange>) {
        for change in changes {
            for member in change.before.iter().chain(&change.after) {
                self.select(member);
            }
            self.changes.push(change);
        }
    }

    /// Marks the Services that select a member.
    fn select(&mut self, member: &Member) {
        let labels = member.labels.iter().map(|label| pair(&member.name.namespace, label));
        let candidates = labels.filter_map(|label| self.selectors.get(&label)).flatten();
        let selecting = candidates
            .filter(|name| self.listed.get(*name).is_some_and(|(_, wants)| has_all(&member.labels, wants)));
        for name in selecting {
            self.dirty.entry(name.clone()).or_default();
        }
    }

    /// Works out the backends of what was touched.
    pub fn settle(&mut self, view: &View) -> Settled {
        let mut settled = Settled { members: std::mem::take(&mut self.changes), ..Settled::default() };
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
        let selected = self.members.with_labels(&name.namespace, &service.spec.selector);
        let mut backends: Vec<Backend> =
            selected.map(|(_, member)| of_member(view, service, member)).collect();
        for slice in self.slices.get(name).into_iter().flatten() {
            if let Some(slice) = view.resources.slices().get(slice) {
                let counted = slice.endpoints.iter().filter_map(|it| of_slice(view, service, slice, it));
                backends.extend(counted);
            }
        }
        backends.sort_unstable();
        backends.dedup();
        backends
    }
}

fn of_member(view: &View, service: &Service, member: &Member) -> Backend {
    let pod = view.resources.pods().get(&member.name);
    let port = |port: &ServicePort| match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => named_port(pod?, name, port.protocol),
    };
    // As in Kubernetes, a pod's host name is one under the Service that its subdomain names.
    let named = pod.filter(|pod| pod.spec.subdomain == service.metadata.name);
    let ready = member.ready || service.spec.publish_not_ready_addresses;
    Backend {
        addresses: member.addresses.clone(),
        ports: service.spec.ports.iter().map(port).collect(),
        host: member.host,
        readiness: if ready { Readiness::Ready } else { Readiness::NotReady },
        hostname: named.map(|pod| pod.spec.hostname.clone()).unwrap_or_default(),
        name: member.name.name.clone(),
    }
}

/// Nothing where its host is known and does not count.
fn of_slice(
    view: &View,
    service: &Service,
    slice: &EndpointSlice,
    endpoint: &SliceEndpoint,
) -> Option<Backend> {
    let node = view.nodes.values().find(|node| node.record.name == endpoint.node_name);
    if node.is_some_and(|node| !view.counts(node)) {
        return None;
    }
    let port = |wanted: &ServicePort| {
        let fits = |port: &&ovl_proto::resource::SlicePort| {
            (&port.name, port.protocol) == (&wanted.name, wanted.protocol)
        };
        slice.ports.iter().find(fits).and_then(|port| port.port)
    };
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
        ports: service.spec.ports.iter().map(port).collect(),
        host: node.map(|node| node.record.id),
        readiness,
        hostname: endpoint.hostname.clone(),
        name: String::new(),
    })
}
