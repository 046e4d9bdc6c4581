//! The Kubernetes objects of the cluster, without tombstones.

use std::collections::BTreeMap;

use ipnet::IpNet;
use ovl_proto::resource::{
    ClusterNetworkPolicy, EndpointSlice, Kind, Labels, Meta, Name, Namespace, NetworkPolicy, NodeObject, Pod,
    Protocol, Resource, ResourceKey, Service, ServiceCidr,
};

use crate::claims::Claims;

/// The label that every namespace has, with the namespace's name as its value.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// All Kubernetes objects, by kind and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    namespaces: BTreeMap<String, Namespace>,
    pods: BTreeMap<Name, Pod>,
    services: BTreeMap<Name, Service>,
    slices: BTreeMap<Name, EndpointSlice>,
    policies: BTreeMap<Name, NetworkPolicy>,
    cidrs: BTreeMap<String, ServiceCidr>,
    cluster_policies: BTreeMap<String, ClusterNetworkPolicy>,
    nodes: BTreeMap<String, NodeObject>,
    claims: Claims,
}

impl Resources {
    /// Pods, with or without an endpoint.
    pub fn pods(&self) -> &BTreeMap<Name, Pod> {
        &self.pods
    }

    /// Services with what was allocated, except what an older Service holds.
    pub fn services(&self) -> &BTreeMap<Name, Service> {
        &self.services
    }

    /// EndpointSlices, with or without a Service.
    pub fn slices(&self) -> &BTreeMap<Name, EndpointSlice> {
        &self.slices
    }

    /// Network policies.
    pub fn policies(&self) -> &BTreeMap<Name, NetworkPolicy> {
        &self.policies
    }

    /// Whether there are policies of any kind.
    pub fn has_policies(&self) -> bool {
        !self.policies.is_empty() || !self.cluster_policies.is_empty()
    }

    /// Cluster network policies, by name.
    pub fn cluster_policies(&self) -> &BTreeMap<String, ClusterNetworkPolicy> {
        &self.cluster_policies
    }

    /// Nodes, whether or not they are members.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeObject> {
        self.nodes.values()
    }

    /// The ranges of the ServiceCIDRs, in the order of their names.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> {
        self.cidrs.values().flat_map(|it| &it.spec.cidrs).copied()
    }

    /// The claims of Services on addresses and node ports.
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Adds or replaces an object. Returns the objects that this changes: itself, and Services that lose or regain a
    /// claim.
    pub fn insert(&mut self, resource: Resource) -> Vec<ResourceKey> {
        let key = resource.key();
        let name = key.name.clone();
        match resource {
            Resource::Namespace(it) => drop(self.namespaces.insert(name.name, it)),
            Resource::Pod(it) => drop(self.pods.insert(name, it)),
            Resource::Service(it) => return self.claims.put(&mut self.services, name, Some(*it)),
            Resource::EndpointSlice(it) => drop(self.slices.insert(name, it)),
            Resource::NetworkPolicy(it) => drop(self.policies.insert(name, it)),
            Resource::ServiceCidr(it) => drop(self.cidrs.insert(name.name, it)),
            Resource::ClusterNetworkPolicy(it) => drop(self.cluster_policies.insert(name.name, it)),
            Resource::Node(it) => drop(self.nodes.insert(name.name, it)),
        }
        vec![key]
    }

    /// Removes an object if it exists. Returns the objects that this changes.
    pub fn remove(&mut self, key: &ResourceKey) -> Vec<ResourceKey> {
        match key.kind {
            Kind::Namespace => drop(self.namespaces.remove(&key.name.name)),
            Kind::Pod => drop(self.pods.remove(&key.name)),
            Kind::Service => return self.claims.put(&mut self.services, key.name.clone(), None),
            Kind::EndpointSlice => drop(self.slices.remove(&key.name)),
            Kind::NetworkPolicy => drop(self.policies.remove(&key.name)),
            Kind::ServiceCidr => drop(self.cidrs.remove(&key.name.name)),
            Kind::ClusterNetworkPolicy => drop(self.cluster_policies.remove(&key.name.name)),
            Kind::Node => drop(self.nodes.remove(&key.name.name)),
        }
        vec![key.clone()]
    }

    /// Returns an object.
    pub fn get(&self, key: &ResourceKey) -> Option<Resource> {
        match key.kind {
            Kind::Namespace => self.namespaces.get(&key.name.name).cloned().map(Resource::Namespace),
            Kind::Pod => self.pods.get(&key.name).cloned().map(Resource::Pod),
            Kind::Service => self.services.get(&key.name).cloned().map(Box::new).map(Resource::Service),
            Kind::EndpointSlice => self.slices.get(&key.name).cloned().map(Resource::EndpointSlice),
            Kind::NetworkPolicy => self.policies.get(&key.name).cloned().map(Resource::NetworkPolicy),
            Kind::ServiceCidr => self.cidrs.get(&key.name.name).cloned().map(Resource::ServiceCidr),
            Kind::ClusterNetworkPolicy => {
                self.cluster_policies.get(&key.name.name).cloned().map(Resource::ClusterNetworkPolicy)
            }
            Kind::Node => self.nodes.get(&key.name.name).cloned().map(Resource::Node),
        }
    }

    /// Returns the metadata of an object.
    pub fn meta(&self, key: &ResourceKey) -> Option<&Meta> {
        let name = &key.name;
        match key.kind {
            Kind::Namespace => self.namespaces.get(&name.name).map(|it| &it.metadata),
            Kind::Pod => self.pods.get(name).map(|it| &it.metadata),
            Kind::Service => self.services.get(name).map(|it| &it.metadata),
            Kind::EndpointSlice => self.slices.get(name).map(|it| &it.metadata),
            Kind::NetworkPolicy => self.policies.get(name).map(|it| &it.metadata),
            Kind::ServiceCidr => self.cidrs.get(&name.name).map(|it| &it.metadata),
            Kind::ClusterNetworkPolicy => self.cluster_policies.get(&name.name).map(|it| &it.metadata),
            Kind::Node => self.nodes.get(&name.name).map(|it| &it.metadata),
        }
    }

    /// Returns the names of all objects of a kind, in order.
    pub fn names(&self, kind: Kind) -> Vec<Name> {
        match kind {
            Kind::Namespace => self.namespaces.keys().map(|name| Name::new("", name)).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::NetworkPolicy => self.policies.keys().cloned().collect(),
            Kind::ServiceCidr => self.cidrs.keys().map(|name| Name::new("", name)).collect(),
            Kind::ClusterNetworkPolicy => {
                self.cluster_policies.keys().map(|name| Name::new("", name)).collect()
            }
            Kind::Node => self.nodes.keys().map(|name| Name::new("", name)).collect(),
        }
    }

    /// Returns the labels of a namespace: those of its object, if there is one, and [`NAMESPACE_NAME_LABEL`].
    pub fn namespace_labels(&self, namespace: &str) -> Labels {
        let named = Labels::from([(NAMESPACE_NAME_LABEL.to_owned(), namespace.to_owned())]);
        match self.namespaces.get(namespace) {
            Some(object) => object.metadata.labels.overlaid(&named),
            None => named,
        }
    }
}

/// Returns the port that a pod has under a name: the first one of that protocol, as in Kubernetes.
pub fn named_port(pod: &Pod, name: &str, protocol: Protocol) -> Option<u16> {
    let ports = pod.spec.containers.iter().flat_map(|container| &container.ports);
    let mut fitting = ports.filter(|port| port.name == name && port.protocol == protocol);
    fitting.next().map(|port| port.container_port)
}

#[cfg(test)]
mod tests {
    use ovl_proto::resource::Meta;
    use ovl_proto::wire::fields::Unknown;

    use super::*;

    fn labels(all: &[(&str, &str)]) -> Labels {
        all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_namespace_has_its_name_label() {
        let mut resources = Resources::default();
        assert_eq!(resources.namespace_labels("shop"), labels(&[(NAMESPACE_NAME_LABEL, "shop")]));
        resources.insert(Resource::Namespace(Namespace {
            metadata: Meta {
                name: "shop".to_owned(),
                labels: labels(&[("team", "a"), (NAMESPACE_NAME_LABEL, "forged")]),
                ..Meta::default()
            },
            unknown: Unknown::default(),
        }));
        assert_eq!(
            resources.namespace_labels("shop"),
            labels(&[(NAMESPACE_NAME_LABEL, "shop"), ("team", "a")])
        );
    }
}
