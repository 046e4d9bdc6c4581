//! Which endpoint is meant by a pod's name, and what the v1 Pod adds to it: labels, named ports and readiness.
//!
//! A v1 Pod is a cluster object, or what the endpoint's own host knows of it from a Kubernetes API server
//! ([`Endpoint::described`]), which comes first.
//!
//! A pod can come again under its name while its old sandbox is still known: it was forced off a lost host, or the old
//! sandbox is not detached yet. Then one endpoint of each network stands for the pod: one with the uid that the v1 Pod
//! has, if it has one; else the one that was attached last. The others have their own labels only.

use std::borrow::Cow;

use ovl_proto::id::NodeId;
use ovl_proto::resource::{Labels, Name, Pod, Protocol};
use ovl_proto::table::{Endpoint, PodIdentity};

use crate::resources::named_port;
use crate::table::Table;
use crate::view::{Placed, View};

/// The order of the endpoints of one pod on a network: whether it has the v1 Pod's uid, when its sandbox was attached,
/// its host. The largest one stands for the pod.
type Rank = (bool, u64, NodeId);

impl View {
    /// Returns all endpoints of a pod on any network, whether they are used or not. An endpoint whose runtime named no
    /// pod counts as one of the pod of its own name.
    pub fn all_of_pod<'a>(&'a self, pod: &'a Name) -> impl Iterator<Item = Placed<'a>> {
        self.placed(|table: &Table| table.of_pod(&pod.name))
            .filter(|placed| placed.endpoint.namespace == pod.namespace)
    }

    /// Returns the rank of an endpoint among those of its pod.
    fn rank(&self, host: NodeId, pod: &Name, identity: &PodIdentity) -> Rank {
        let wanted = self.resources.pods().get(pod).map(|pod| pod.metadata.uid.as_str());
        (is_same(wanted.unwrap_or_default(), &identity.uid), identity.created, host)
    }

    /// Whether an endpoint of a host has the name of its pod: no used endpoint of the network fits the v1 Pod better,
    /// or was attached later.
    pub fn is_named_as_pod(&self, host: NodeId, endpoint: &Endpoint) -> bool {
        let Some(identity) = &endpoint.pod else { return true };
        let name = endpoint.pod_name();
        let rank = self.rank(host, &name, identity);
        // All endpoints of a sandbox have the same rank.
        let is_behind = |other: &Placed<'_>| {
            let of_other = |identity| self.rank(other.node.record.id, &name, identity) > rank;
            other.endpoint.network == endpoint.network
                && other.endpoint.pod.as_deref().is_some_and(of_other)
                && self.is_counted(other)
        };
        !self.all_of_pod(&name).any(|other| is_behind(&other))
    }

    /// Returns the v1 Pod that describes an endpoint of a host. `None` if there is none, or if another endpoint or
    /// another pod of the same name is meant.
    pub fn pod_of<'a>(&'a self, host: NodeId, endpoint: &'a Endpoint) -> Option<&'a Pod> {
        let pod = endpoint.described.as_deref();
        let pod = pod.or_else(|| self.resources.pods().get(&endpoint.pod_name()))?;
        let uid = endpoint.pod.as_ref().map_or("", |identity| &identity.uid);
        (is_same(&pod.metadata.uid, uid) && self.is_named_as_pod(host, endpoint)).then_some(pod)
    }

    /// Returns the effective labels of an endpoint of a host: its own, overlaid by those of its v1 Pod. `None` if they
    /// are not known: it belongs to a pod, no v1 Pod describes it, and it has no labels of its own.
    pub fn known_labels<'a>(&'a self, host: NodeId, endpoint: &'a Endpoint) -> Option<Cow<'a, Labels>> {
        match self.pod_of(host, endpoint) {
            None if endpoint.pod.is_some() && endpoint.labels.is_empty() => None,
            None => Some(Cow::Borrowed(&endpoint.labels)),
            Some(pod) if endpoint.labels.is_empty() => Some(Cow::Borrowed(&pod.metadata.labels)),
            Some(pod) => Some(Cow::Owned(endpoint.labels.overlaid(&pod.metadata.labels))),
        }
    }

    /// Returns the effective labels of an endpoint of a host, none if they are not known.
    pub fn labels<'a>(&'a self, host: NodeId, endpoint: &'a Endpoint) -> Cow<'a, Labels> {
        self.known_labels(host, endpoint).unwrap_or(Cow::Borrowed(&endpoint.labels))
    }

    /// Returns the port that an endpoint of a host has under a name.
    pub fn named_port(
        &self,
        host: NodeId,
        endpoint: &Endpoint,
        name: &str,
        protocol: Protocol,
    ) -> Option<u16> {
        named_port(self.pod_of(host, endpoint)?, name, protocol)
    }
}

/// Whether two uids can be those of one pod. An empty one is not known.
fn is_same(one: &str, other: &str) -> bool {
    one.is_empty() || other.is_empty() || one == other
}
