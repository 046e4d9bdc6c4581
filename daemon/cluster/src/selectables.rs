//! What label selectors match: used endpoints with their effective labels, and Pods that are not endpoints of ovl and
//! list their own addresses. Indexed by label, so that the cost of a change does not depend on their number.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::resource::{Labels, Name, Pod, has_all};

use crate::labels::SharedLabels;
use crate::view::{Placed, View};

/// The key of a selectable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SelectableId {
    /// An endpoint of a host.
    Endpoint(NodeId, EndpointId),
    /// A Pod of which no host has an endpoint. Boxed, because almost all others are endpoints.
    Pod(Box<Name>),
}

/// A workload that selectors can match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selectable {
    /// The Kubernetes namespace and name: that of its pod, or its own if another endpoint stands for the pod.
    pub name: Arc<Name>,
    /// Whether a v1 Pod describes it: that of its name.
    pub has_pod: bool,
    /// The network that it is attached to. `None` for a Pod that is not an endpoint.
    pub network: Option<NetworkId>,
    /// The host, if known.
    pub host: Option<NodeId>,
    /// The addresses, one for each address family.
    pub addresses: Vec<IpAddr>,
    /// The effective labels: its own, overlaid by its Pod's. Selectables with the same labels share them.
    pub labels: Labels,
    /// Whether Services send it connections: neither its endpoint nor its Pod is marked as not ready.
    pub ready: bool,
}

/// A label in a namespace: namespace, key and value.
type LabelKey = (String, String, String);

/// All selectables.
#[derive(Debug, Clone, Default)]
pub struct Selectables {
    all: BTreeMap<SelectableId, Box<Selectable>>,
    /// The labels that selectables have.
    labels: SharedLabels,
    by_label: BTreeMap<LabelKey, BTreeSet<SelectableId>>,
    by_pod: BTreeMap<Arc<Name>, BTreeSet<SelectableId>>,
    /// Every endpoint, whether it is used or not, with its network and its pod. It shares the name with its selectable.
    endpoints: BTreeMap<(NodeId, EndpointId), (NetworkId, Arc<Name>)>,
    by_network: BTreeMap<NetworkId, BTreeSet<(NodeId, EndpointId)>>,
}

/// A selectable before and after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectableChange {
    /// The key.
    pub id: SelectableId,
    /// The selectable before the change. `None` if it is new.
    pub before: Option<Selectable>,
    /// The selectable after the change. `None` if it was removed.
    pub after: Option<Selectable>,
}

impl Selectables {
    /// Returns a selectable.
    pub fn get(&self, id: &SelectableId) -> Option<&Selectable> {
        self.all.get(id).map(|selectable| &**selectable)
    }

    /// Returns all selectables by key.
    pub fn iter(&self) -> impl Iterator<Item = (&SelectableId, &Selectable)> {
        self.all.iter().map(|(id, selectable)| (id, &**selectable))
    }

    /// Returns the selectables that a v1 Pod describes: one for each network that it is attached to.
    pub fn of_pod(&self, pod: &Name) -> impl Iterator<Item = (&SelectableId, &Selectable)> {
        self.these(self.by_pod.get(pod))
    }

    /// Returns the selectables in a namespace that have all required labels. Empty if no label is required, as for a
    /// Service without a selector.
    pub fn with_labels<'a>(
        &'a self,
        namespace: &'a str,
        required: &'a Labels,
    ) -> impl Iterator<Item = (&'a SelectableId, &'a Selectable)> {
        // Start from the rarest label.
        let ids = required
            .iter()
            .map(|label| self.by_label.get(&label_key(namespace, label)))
            .min_by_key(|ids| ids.map_or(0, BTreeSet::len))
            .flatten();
        self.these(ids).filter(|(_, selectable)| has_all(&selectable.labels, required))
    }

    fn these<'a>(
        &'a self,
        ids: Option<&'a BTreeSet<SelectableId>>,
    ) -> impl Iterator<Item = (&'a SelectableId, &'a Selectable)> {
        ids.into_iter()
            .flatten()
            .filter_map(|id| self.all.get_key_value(id))
            .map(|(id, selectable)| (id, &**selectable))
    }

    /// Updates an endpoint that was added, changed or removed, and the other endpoints of its pod, of which another one
    /// may be meant now.
    pub fn touch_endpoint(&mut self, view: &View, host: NodeId, id: EndpointId) -> Vec<SelectableChange> {
        let found = find(view, host, id);
        let was = self.endpoints.remove(&(host, id));
        if let Some((network, _)) = &was {
            take(&mut self.by_network, network, &(host, id));
        }
        let is = found.map(|Placed { endpoint, .. }| (endpoint.network, Arc::new(endpoint.pod_name())));
        // An unchanged selectable goes on to share the name.
        let is = if was == is { was.clone() } else { is };
        if let Some((network, name)) = &is {
            self.endpoints.insert((host, id), (*network, Arc::clone(name)));
            self.by_network.entry(*network).or_default().insert((host, id));
        }
        let mut changes: Vec<_> = self.refresh(view, host, id).into_iter().collect();
        let names = was.into_iter().chain(is).map(|(_, name)| name);
        for name in BTreeSet::from_iter(names) {
            changes.extend(self.refresh_pod(view, &name, Some((host, id))));
        }
        changes
    }

    /// Updates the endpoints of a pod except one, and the Pod itself: one with an endpoint is not a selectable of its
    /// own.
    fn refresh_pod(
        &mut self,
        view: &View,
        pod: &Name,
        except: Option<(NodeId, EndpointId)>,
    ) -> Vec<SelectableChange> {
        let all = view.all_of_pod(pod).map(|placed| (placed.node.record.id, placed.endpoint.id));
        let others = all.filter(|id| Some(*id) != except);
        let mut changes: Vec<_> = others.filter_map(|(host, id)| self.refresh(view, host, id)).collect();
        changes.extend(self.touch_bare_pod(view, pod));
        changes
    }

    /// Updates one endpoint.
    fn refresh(&mut self, view: &View, host: NodeId, id: EndpointId) -> Option<SelectableChange> {
        let counted = find(view, host, id).filter(|placed| view.is_counted(placed));
        self.set(SelectableId::Endpoint(host, id), counted.map(|placed| of_endpoint(view, placed)))
    }

    /// Updates all endpoints of a network, because the set of those that are used may have changed.
    pub fn touch_network(&mut self, view: &View, network: NetworkId) -> Vec<SelectableChange> {
        let known = self.by_network.get(&network).into_iter().flatten().copied();
        let listed = view.all_endpoints_on(network);
        let listed = listed.map(|placed| (placed.node.record.id, placed.endpoint.id));
        let all: BTreeSet<(NodeId, EndpointId)> = known.chain(listed).collect();
        all.into_iter().flat_map(|(host, id)| self.touch_endpoint(view, host, id)).collect()
    }

    /// Updates a Pod that was added, changed or removed, and its endpoints.
    pub fn touch_pod(&mut self, view: &View, name: &Name) -> Vec<SelectableChange> {
        self.refresh_pod(view, name, None)
    }

    /// Updates the selectable of a Pod, which exists while the Pod describes no endpoint of any host.
    fn touch_bare_pod(&mut self, view: &View, name: &Name) -> Option<SelectableChange> {
        let describes = |placed: Placed<'_>| view.pod_of(placed.node.record.id, placed.endpoint).is_some();
        let owned = || view.all_of_pod(name).any(describes);
        let pod = view.resources.pods().get(name);
        // The addresses of a finished pod may be those of another one by now.
        let pod = pod.filter(|pod| !pod.status.pod_ips.is_empty() && !pod.is_finished());
        let after = pod.filter(|_| !owned()).map(|pod| Selectable {
            name: Arc::new(name.clone()),
            has_pod: true,
            network: None,
            host: None,
            addresses: pod.status.pod_ips.iter().map(|pod_ip| pod_ip.ip).collect(),
            labels: pod.metadata.labels.clone(),
            ready: pod.is_ready(),
        });
        self.set(SelectableId::Pod(Box::new(name.clone())), after)
    }

    fn set(&mut self, id: SelectableId, mut after: Option<Selectable>) -> Option<SelectableChange> {
        if self.get(&id) == after.as_ref() {
            return None;
        }
        let before = self.all.remove(&id).map(|selectable| *selectable);
        if let Some(selectable) = &before {
            self.unlist(&id, selectable);
            self.labels.release(&selectable.labels);
        }
        if let Some(selectable) = &mut after {
            self.labels.share(&mut selectable.labels);
            if let SelectableId::Endpoint(host, endpoint) = id
                && let Some((_, name)) = self.endpoints.get(&(host, endpoint))
                && *name == selectable.name
            {
                selectable.name = Arc::clone(name);
            }
            self.list(&id, selectable);
            self.all.insert(id.clone(), Box::new(selectable.clone()));
        }
        Some(SelectableChange { id, before, after })
    }

    fn list(&mut self, id: &SelectableId, selectable: &Selectable) {
        for label in &selectable.labels {
            self.by_label.entry(label_key(&selectable.name.namespace, label)).or_default().insert(id.clone());
        }
        if selectable.has_pod {
            self.by_pod.entry(Arc::clone(&selectable.name)).or_default().insert(id.clone());
        }
    }

    fn unlist(&mut self, id: &SelectableId, selectable: &Selectable) {
        for label in &selectable.labels {
            take(&mut self.by_label, &label_key(&selectable.name.namespace, label), id);
        }
        if selectable.has_pod {
            take(&mut self.by_pod, &selectable.name, id);
        }
    }
}

fn find(view: &View, host: NodeId, id: EndpointId) -> Option<Placed<'_>> {
    let node = view.nodes.get(&host)?;
    Some(Placed { node, endpoint: node.table.endpoint(id)? })
}

fn of_endpoint(view: &View, placed: Placed<'_>) -> Selectable {
    let (host, endpoint) = (placed.node.record.id, placed.endpoint);
    let pod = view.pod_of(host, endpoint);
    let name = match view.is_named_as_pod(host, endpoint) {
        true => endpoint.pod_name(),
        false => Name::new(&endpoint.namespace, &endpoint.name),
    };
    Selectable {
        // The endpoint that a Pod describes has the Pod's name.
        has_pod: pod.is_some(),
        name: Arc::new(name),
        network: Some(endpoint.network),
        host: Some(host),
        addresses: endpoint.addresses.iter().map(|net| net.addr()).collect(),
        labels: view.labels(host, endpoint).into_owned(),
        ready: endpoint.ready && pod.is_none_or(Pod::is_ready),
    }
}

/// Returns the key of a label in an index.
pub(crate) fn label_key(namespace: &str, (key, value): (&String, &String)) -> LabelKey {
    (namespace.to_owned(), key.clone(), value.clone())
}

/// Removes a value from a set, and the set itself when it becomes empty.
pub(crate) fn take<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}
