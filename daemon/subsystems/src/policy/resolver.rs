//! Whether the egress rules of policies allow an endpoint to query the resolver of its host.
//!
//! The resolver is no endpoint, and queries to it do not pass the tables of policies. For selectors it counts as the pod
//! of the cluster DNS, as manifests for Kubernetes expect: with the label `k8s-app: kube-dns` in the namespace
//! `kube-system`. For blocks it counts by the addresses at which endpoints query it.

use std::net::IpAddr;

use ovl_cluster::resources::Resources;
use ovl_proto::resource::{Labels, Protocol, RuleAction};

use super::{ClusterPolicy, Deciding, Direction, Policies, Rule, RulePeer, RulePort, in_block};

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
    /// Whether an endpoint with these labels may query the resolver, by UDP or TCP: what decides about its connections to
    /// port 53 allows it. `None`: the labels are not known, so it may not while there is a policy that might select it.
    pub fn allow_resolver(
        &self,
        resources: &Resources,
        namespace: &str,
        labels: Option<&Labels>,
        resolver: &ResolverPeer,
    ) -> bool {
        let deciding = self.deciding(resources, namespace, labels, Direction::Egress);
        [Protocol::Udp, Protocol::Tcp]
            .into_iter()
            .any(|protocol| self.allow_queries(&deciding, resolver, protocol))
    }

    fn allow_queries(&self, deciding: &Deciding<'_>, resolver: &ResolverPeer, protocol: Protocol) -> bool {
        let decision = |policies: &[&ClusterPolicy]| {
            let mut rules = policies.iter().flat_map(|policy| policy.rules(Direction::Egress));
            rules.find(|rule| self.rule_fits(&rule.rule, resolver, protocol)).map(|rule| rule.action)
        };
        if !deciding.undecided.is_empty() {
            return false;
        }
        match decision(&deciding.admin) {
            Some(RuleAction::Accept) => return true,
            Some(RuleAction::Deny) => return false,
            Some(RuleAction::Pass) | None => {}
        }
        let mut isolating = deciding.isolating.iter().flat_map(|(_, rules)| *rules);
        match deciding.isolating.is_empty() {
            true => decision(&deciding.baseline) != Some(RuleAction::Deny),
            false => isolating.any(|rule| self.rule_fits(rule, resolver, protocol)),
        }
    }

    fn rule_fits(&self, rule: &Rule, resolver: &ResolverPeer, protocol: Protocol) -> bool {
        let peer = |peer: &RulePeer| match peer {
            RulePeer::Pods(place) => self.pods(*place).is_some_and(|pods| {
                pods.matches(NAMESPACE, &resolver.namespace_labels, Some(&resolver.labels))
            }),
            // To admit a name admits no query for it.
            RulePeer::Name(_) => false,
            RulePeer::Block { cidr, except } => {
                resolver.addresses.iter().any(|address| in_block(*address, *cidr, except))
            }
        };
        let port = |port: &RulePort| match port {
            RulePort::All(of) => *of == protocol,
            RulePort::Range(of, first, last) => *of == protocol && (*first..=*last).contains(&PORT),
            RulePort::Named(place) => {
                self.port(*place).is_some_and(|(name, of)| of == protocol && PORT_NAMES.contains(&name))
            }
        };
        (rule.peers.is_empty() || rule.peers.iter().any(peer))
            && (rule.ports.is_empty() || rule.ports.iter().any(port))
    }
}
