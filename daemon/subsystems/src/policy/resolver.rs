//! Whether the egress rules of policies allow an endpoint to query the resolver of its host.
//!
//! The resolver is no endpoint, and queries to it do not pass the tables of policies. For selectors it counts as the pod
//! of the cluster DNS, as manifests for Kubernetes expect: with the label `k8s-app: kube-dns` in the namespace
//! `kube-system`. For blocks it counts by the addresses at which endpoints query it.

use std::net::IpAddr;

use ovl_cluster::resources::Resources;
use ovl_proto::resource::{Labels, Protocol};

use super::{Direction, Policies, Rule, RulePeer, RulePort, in_block};

/// The namespace of the cluster DNS in Kubernetes.
const NAMESPACE: &str = "kube-system";
/// The label of the pods of the cluster DNS in Kubernetes.
const LABEL: (&str, &str) = ("k8s-app", "kube-dns");
/// The names of the ports of the cluster DNS in Kubernetes.
const PORT_NAMES: [&str; 2] = ["dns", "dns-tcp"];
const PORT: u16 = 53;

/// The resolver as policies see it.
#[derive(Debug)]
pub struct ResolverPeer {
    namespace_labels: Labels,
    labels: Labels,
    addresses: Vec<IpAddr>,
}

impl ResolverPeer {
    /// Describes the resolver. `addresses` are those at which endpoints query it.
    pub fn new(resources: &Resources, addresses: Vec<IpAddr>) -> Self {
        Self {
            namespace_labels: resources.namespace_labels(NAMESPACE),
            labels: Labels::from([(LABEL.0.to_owned(), LABEL.1.to_owned())]),
            addresses,
        }
    }
}

impl Policies {
    /// Whether an endpoint with these labels may query the resolver: no policy isolates it for egress, or a rule allows
    /// port 53 of UDP or TCP to the resolver. `None`: the labels are not known, so it may not while there is a policy that
    /// might isolate it.
    pub fn allow_resolver(&self, namespace: &str, labels: Option<&Labels>, resolver: &ResolverPeer) -> bool {
        if labels.is_none() && !self.undecided(namespace, Direction::Egress).is_empty() {
            return false;
        }
        let selecting = self.selecting(namespace, labels);
        let mut isolating = selecting.iter().filter_map(|policy| policy.rules(Direction::Egress)).peekable();
        isolating.peek().is_none()
            || isolating.flatten().any(|rule| self.rule_allows_resolver(rule, resolver))
    }

    fn rule_allows_resolver(&self, rule: &Rule, resolver: &ResolverPeer) -> bool {
        let peer = |peer: &RulePeer| match peer {
            RulePeer::Pods(place) => self.pods(*place).is_some_and(|pods| {
                pods.matches(NAMESPACE, &resolver.namespace_labels, Some(&resolver.labels))
            }),
            RulePeer::Block { cidr, except } => {
                resolver.addresses.iter().any(|address| in_block(*address, *cidr, except))
            }
        };
        let is_dns = |protocol: Protocol| matches!(protocol, Protocol::Udp | Protocol::Tcp);
        let port = |port: &RulePort| match port {
            RulePort::All(protocol) => is_dns(*protocol),
            RulePort::Range(protocol, first, last) => is_dns(*protocol) && (*first..=*last).contains(&PORT),
            RulePort::Named(place) => self
                .port(*place)
                .is_some_and(|(name, protocol)| is_dns(protocol) && PORT_NAMES.contains(&name)),
        };
        (rule.peers.is_empty() || rule.peers.iter().any(peer))
            && (rule.ports.is_empty() || rule.ports.iter().any(port))
    }
}
