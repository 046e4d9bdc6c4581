//! What selectors select: endpoints that count, with the labels that they have in effect, and Pods that
//! are no endpoint of ours and say their own addresses. Indexed by label, so that a change of one costs what it
//! concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::resource::{Labels, Name, has_all};

use crate::view::{Placed, View};

/// Which member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberId {
    /// An endpoint of a host.
    Endpoint(NodeId, EndpointId),
    /// A Pod of which no host has an endpoint.
    Pod(Name),
}

/// A workload that can be selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its Kubernetes namespace and name: those of its Pod, if there is one.
    pub name: Name,
    /// What it is attached to; nothing for what is no endpoint of ours.
    pub network: Option<NetworkId>,
    /// Its host, where that is known.
    pub host: Option<NodeId>,
    /// One for each address family that it has.
    pub addresses: Vec<IpAddr>,
    /// In effect: its own, overlaid by its Pod's.
    pub labels: Labels,
    /// Services send it connections.
    pub ready: bool,
}

/// A label with its value, in a namespace.
type Pair = (String, String, String);

/// All members.
#[derive(Debug, Clone, Default)]
pub struct Members {
    all: BTreeMap<MemberId, Member>,
    by_label: BTreeMap<Pair, BTreeSet<MemberId>>,
    by_name: BTreeMap<Name, BTreeSet<MemberId>>,
    /// Every endpoint, whether it counts or not.
    endpoints: BTreeMap<(NodeId, EndpointId), (NetworkId, Name)>,
    by_network: BTreeMap<NetworkId, BTreeSet<(NodeId, EndpointId)>>,
}

/// A member before and after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberChange {
    /// Which one.
    pub id: MemberId,
    /// As it was; nothing for a new one.
    pub before: Option<Member>,
    /// As it is; nothing for one that is gone.
    pub after: Option<Member>,
}

impl Members {
    /// One of them.
    pub fn get(&self, id: &MemberId) -> Option<&Member> {
        self.all.get(id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&MemberId, &Member)> {
        self.all.iter()
    }

    /// Those of a Kubernetes namespace and name: one for each network that it is attached to.
    pub fn named(&self, name: &Name) -> impl Iterator<Item = (&MemberId, &Member)> {
        self.these(self.by_name.get(name))
    }

    /// Those in a namespace that have all of these labels; none where no label is required, as with a Service
    /// that has no selector.
    pub fn with_labels<'a>(
        &'a self,
        namespace: &'a str,
        required: &'a Labels,
    ) -> impl Iterator<Item = (&'a MemberId, &'a Member)> {
        // The label that the fewest have; one that nobody has ends it at once.
        let ids = required
            .iter()
            .map(|label| self.by_label.get(&pair(namespace, label)))
            .min_by_key(|ids| ids.map_or(0, BTreeSet::len))
            .flatten();
        self.these(ids).filter(|(_, member)| has_all(&member.labels, required))
    }

    fn these<'a>(
        &'a self,
        ids: Option<&'a BTreeSet<MemberId>>,
    ) -> impl Iterator<Item = (&'a MemberId, &'a Member)> {
        ids.into_iter().flatten().filter_map(|id| self.all.get_key_value(id))
    }

    /// Looks at an endpoint anew: it came, went or changed.
    pub fn touch_endpoint(&mut self, view: &View, host: NodeId, id: EndpointId) -> Vec<MemberChange> {
        let key = MemberId::Endpoint(host, id);
        let found = view.nodes.get(&host).and_then(|node| {
            let endpoint = node.table.endpoint(id)?;
            Some(Placed { node, endpoint })
        });
        let was = self.endpoints.remove(&(host, id));
        if let Some((network, _)) = &was {
            take(&mut self.by_network, network, &(host, id));
        }
        let is = found.map(|Placed { endpoint, .. }| {
            (endpoint.network, Name::new(&endpoint.namespace, &endpoint.name))
        });
        if let Some((network, name)) = &is {
            self.endpoints.insert((host, id), (*network, name.clone()));
            self.by_network.entry(*network).or_default().insert((host, id));
        }
        let after = found.filter(|placed| view.is_counted(placed)).map(|placed| of_endpoint(view, placed));
        let mut changes: Vec<_> = self.set(key, after).into_iter().collect();
        // Its Pod is known by the endpoint now, or by itself again.
        let names = was.into_iter().chain(is).map(|(_, name)| name);
        for name in BTreeSet::from_iter(names) {
            changes.extend(self.touch_bare_pod(view, name));
        }
        changes
    }

    /// Looks at all endpoints of a network anew: whether they count may have changed.
    pub fn touch_network(&mut self, view: &View, network: NetworkId) -> Vec<MemberChange> {
        let known = self.by_network.get(&network).into_iter().flatten().copied();
        let listed = view.all_endpoints_on(network);
        let listed = listed.map(|placed| (placed.node.record.id, placed.endpoint.id));
        let all: BTreeSet<(NodeId, EndpointId)> = known.chain(listed).collect();
        all.into_iter().flat_map(|(host, id)| self.touch_endpoint(view, host, id)).collect()
    }

    /// Looks at the endpoints of a Pod anew, and at the Pod itself: it came, went or changed.
    pub fn touch_pod(&mut self, view: &View, name: &Name) -> Vec<MemberChange> {
        let endpoints =
            view.all_named(&name.name).filter(|placed| placed.endpoint.namespace == name.namespace);
        let endpoints: Vec<_> = endpoints.map(|placed| (placed.node.record.id, placed.endpoint.id)).collect();
        let mut changes: Vec<_> =
            endpoints.into_iter().flat_map(|(host, id)| self.touch_endpoint(view, host, id)).collect();
        changes.extend(self.touch_bare_pod(view, name.clone()));
        changes
    }

    /// A Pod counts by itself while no host has an endpoint of it.
    fn touch_bare_pod(&mut self, view: &View, name: Name) -> Option<MemberChange> {
        let owned = || view.all_named(&name.name).any(|placed| placed.endpoint.namespace == name.namespace);
        let pod = view.resources.pods().get(&name).filter(|pod| !pod.status.pod_ips.is_empty());
        let after = pod.filter(|_| !owned()).map(|pod| Member {
            name: name.clone(),
            network: None,
            host: None,
            addresses: pod.status.pod_ips.iter().map(|pod_ip| pod_ip.ip).collect(),
            labels: pod.metadata.labels.clone(),
            ready: true,
        });
        self.set(MemberId::Pod(name), after)
    }

    fn set(&mut self, id: MemberId, after: Option<Member>) -> Option<MemberChange> {
        if self.all.get(&id) == after.as_ref() {
            return None;
        }
        let before = self.all.remove(&id);
        if let Some(member) = &before {
            self.unlist(&id, member);
        }
        if let Some(member) = &after {
            self.list(&id, member);
            self.all.insert(id.clone(), member.clone());
        }
        Some(MemberChange { id, before, after })
    }

    fn list(&mut self, id: &MemberId, member: &Member) {
        for label in &member.labels {
            self.by_label.entry(pair(&member.name.namespace, label)).or_default().insert(id.clone());
        }
        self.by_name.entry(member.name.clone()).or_default().insert(id.clone());
    }

    fn unlist(&mut self, id: &MemberId, member: &Member) {
        for label in &member.labels {
            take(&mut self.by_label, &pair(&member.name.namespace, label), id);
        }
        take(&mut self.by_name, &member.name, id);
    }
}

fn of_endpoint(view: &View, placed: Placed<'_>) -> Member {
    let endpoint = placed.endpoint;
    Member {
        name: Name::new(&endpoint.namespace, &endpoint.name),
        network: Some(endpoint.network),
        host: Some(placed.node.record.id),
        addresses: endpoint.addresses.iter().map(|net| net.addr()).collect(),
        labels: view.resources.labels(endpoint).into_owned(),
        ready: endpoint.ready,
    }
}

/// The key of a label in an index.
pub(crate) fn pair(namespace: &str, (key, value): (&String, &String)) -> Pair {
    (namespace.to_owned(), key.clone(), value.clone())
}

/// Takes one out of a set, and the set with the last one.
pub(crate) fn take<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}
