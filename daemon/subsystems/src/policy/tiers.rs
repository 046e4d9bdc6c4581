//! ClusterNetworkPolicies: the tiers before and after the NetworkPolicies, and what decides about an endpoint.
//!
//! For an endpoint and a direction, the rules of the policies that select it are asked in this order: those of the tier
//! Admin, by priority; then the NetworkPolicies that isolate it, which decide in any case, or, if there are none, those of
//! the tier Baseline, by priority. What no rule decides is allowed. [`Deciding`] is that order. What ovl cannot read of a
//! rule fails closed, as the API demands: `Accept` fits nothing, another action denies everything.
//!
//! The module owns no state. Begin to read at [`Policies::deciding`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_cluster::resources::Resources;
use ovl_proto::resource::{
    ClusterEgressRule, ClusterIngressRule, ClusterNetworkPolicy, ClusterPeer, ClusterPort, ClusterPorts,
    ClusterProtocol, LabelSelector, Labels, Name, NamespacedPod, NodeAddress, PolicySubject, Protocol,
    RuleAction, Tier,
};
use ovl_zone::NamePattern;

use super::{
    Builder, DEFAULT, Direction, Namespaces, Pods, Policies, Policy, Rule, RulePeer, RulePort, UNDECIDED,
    matches,
};

/// A compiled ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterPolicy {
    /// The name, without a namespace.
    pub name: Name,
    /// The number of the policy in nftables maps.
    pub number: u32,
    /// The tier.
    pub tier: Tier,
    /// The precedence within the tier: the lowest number decides first.
    pub priority: u16,
    /// The endpoints that it is about.
    pub subject: Pods,
    /// The ingress rules in their order.
    pub ingress: Vec<ClusterRule>,
    /// The egress rules in their order.
    pub egress: Vec<ClusterRule>,
}

/// A rule of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRule {
    /// The number of the rule in its manifest, from 1.
    pub number: usize,
    /// The name of the rule in its manifest; may be empty.
    pub name: String,
    /// What it does with a connection that fits.
    pub action: RuleAction,
    /// Which connections fit.
    pub rule: Rule,
}

impl ClusterPolicy {
    /// Returns the rules for a direction. Without any, it decides nothing in that direction.
    pub fn rules(&self, direction: Direction) -> &[ClusterRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// Whether a rule has a domain name as a peer.
    pub fn has_patterns(&self) -> bool {
        let mut peers = self.egress.iter().flat_map(|rule| &rule.rule.peers);
        peers.any(|peer| matches!(peer, RulePeer::Name(_)))
    }

    fn denies(&self, direction: Direction) -> bool {
        self.rules(direction).iter().any(|rule| rule.action == RuleAction::Deny)
    }
}

/// What decides about the connections of an endpoint in one direction.
#[derive(Debug, Clone, Default)]
pub struct Deciding<'a> {
    /// The policies that may select the endpoint as soon as its labels are known. If there are any, nothing is allowed.
    pub undecided: Vec<&'a Name>,
    /// Those of the tier Admin.
    pub admin: Vec<&'a ClusterPolicy>,
    /// The NetworkPolicies that isolate it.
    pub isolating: Vec<(&'a Policy, &'a [Rule])>,
    /// Those of the tier Baseline. Empty if a NetworkPolicy isolates the endpoint.
    pub baseline: Vec<&'a ClusterPolicy>,
}

impl<'a> Deciding<'a> {
    /// Whether nothing decides, so everything is allowed.
    pub fn is_empty(&self) -> bool {
        let Self { undecided, admin, isolating, baseline } = self;
        undecided.is_empty() && admin.is_empty() && isolating.is_empty() && baseline.is_empty()
    }

    /// Returns the names of all policies that decide.
    pub fn names(&self) -> impl Iterator<Item = &'a Name> + '_ {
        let undecided = self.undecided.iter().copied();
        let isolating = self.isolating.iter().map(|(policy, _)| &policy.name);
        let cluster = self.admin.iter().chain(&self.baseline).map(|policy| &policy.name);
        undecided.chain(isolating).chain(cluster)
    }

    /// Returns the numbers of the policies of the tier Admin.
    pub(super) fn admin_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let asked = self.admin.iter().filter(|_| self.undecided.is_empty());
        asked.map(|policy| policy.number)
    }

    /// Returns the numbers of what is asked after the tier Admin. Empty if nothing decides.
    pub(super) fn numbers(&self) -> Vec<u32> {
        if self.is_empty() {
            Vec::new()
        } else if !self.undecided.is_empty() {
            vec![UNDECIDED]
        } else if self.isolating.is_empty() {
            self.baseline.iter().map(|policy| policy.number).chain([DEFAULT]).collect()
        } else {
            self.isolating.iter().map(|(policy, _)| policy.number).collect()
        }
    }

    /// Whether everything is allowed, so that also frames need no judgement.
    pub(super) fn is_open(&self, direction: Direction) -> bool {
        let mut cluster = self.admin.iter().chain(&self.baseline);
        let mut isolating = self.isolating.iter();
        self.undecided.is_empty()
            && !cluster.any(|policy| policy.denies(direction))
            && (self.isolating.is_empty() || isolating.any(|(_, rules)| rules.iter().any(Rule::is_open)))
    }
}

impl Policies {
    /// Returns what decides about the connections of an endpoint with these labels. `None`: the labels are not known.
    pub fn deciding<'a>(
        &'a self,
        resources: &Resources,
        namespace: &str,
        labels: Option<&Labels>,
        direction: Direction,
    ) -> Deciding<'a> {
        let isolating: Vec<(&Policy, &[Rule])> = self
            .selecting(namespace, labels)
            .into_iter()
            .filter_map(|policy| Some((policy, policy.rules(direction)?)))
            .collect();
        let mut deciding = Deciding { isolating, ..Deciding::default() };
        if labels.is_none() {
            deciding.undecided =
                self.undecided(namespace, direction).into_iter().map(|it| &it.name).collect();
        }
        if self.cluster.is_empty() {
            return deciding;
        }
        let namespace_labels = resources.namespace_labels(namespace);
        for policy in self.cluster.iter().filter(|policy| !policy.rules(direction).is_empty()) {
            let subject = &policy.subject;
            if !subject.is_of(namespace, &namespace_labels) {
                continue;
            }
            match (matches(&subject.labels, labels), policy.tier) {
                (true, Tier::Admin) => deciding.admin.push(policy),
                (true, Tier::Baseline) if deciding.isolating.is_empty() => deciding.baseline.push(policy),
                (true, Tier::Baseline) => {}
                (false, _) => deciding.undecided.extend(labels.is_none().then_some(&policy.name)),
            }
        }
        deciding
    }

    /// Returns the ClusterNetworkPolicies that select an endpoint in any direction. `None`: its labels are not known.
    pub fn about(
        &self,
        resources: &Resources,
        namespace: &str,
        labels: Option<&Labels>,
    ) -> Vec<&ClusterPolicy> {
        if self.cluster.is_empty() {
            return Vec::new();
        }
        let namespace_labels = resources.namespace_labels(namespace);
        let all = self.cluster.iter();
        all.filter(|policy| policy.subject.matches(namespace, &namespace_labels, labels)).collect()
    }

    /// Returns all ClusterNetworkPolicies in the order in which they decide.
    pub fn cluster(&self) -> &[ClusterPolicy] {
        &self.cluster
    }

    /// Whether a policy of the tier Admin decides anything in a direction.
    pub(super) fn admin_count(&self, direction: Direction) -> usize {
        let admin = self.cluster.iter().filter(|policy| policy.tier == Tier::Admin);
        admin.filter(|policy| !policy.rules(direction).is_empty()).count()
    }
}

fn selector_of(NamespacedPod { namespace_selector, pod_selector, .. }: &NamespacedPod) -> Pods {
    Pods {
        namespaces: Namespaces::Selected(namespace_selector.clone()),
        labels: pod_selector.clone(),
        unknown: false,
    }
}

fn subject(PolicySubject { namespaces, pods, .. }: &PolicySubject) -> Pods {
    match (namespaces, pods) {
        (_, Some(pods)) => selector_of(pods),
        (namespaces, None) => selector_of(&NamespacedPod {
            namespace_selector: namespaces.clone().unwrap_or_default(),
            ..NamespacedPod::default()
        }),
    }
}

impl Builder<'_> {
    /// Compiles a ClusterNetworkPolicy.
    pub(super) fn cluster_policy(
        &mut self,
        name: &Name,
        number: u32,
        policy: &ClusterNetworkPolicy,
    ) -> ClusterPolicy {
        let spec = &policy.spec;
        let ingress = spec.ingress.iter().map(|rule| {
            let ClusterIngressRule { name, action, from, protocols, .. } = rule;
            (name, *action, from, protocols)
        });
        let egress = spec.egress.iter().map(|rule| {
            let ClusterEgressRule { name, action, to, protocols, .. } = rule;
            (name, *action, to, protocols)
        });
        ClusterPolicy {
            name: name.clone(),
            number,
            tier: spec.tier.unwrap_or(Tier::Admin),
            priority: spec.priority.unwrap_or_default(),
            subject: subject(&spec.subject),
            ingress: self.cluster_rules(Direction::Ingress, ingress),
            egress: self.cluster_rules(Direction::Egress, egress),
        }
    }

    fn cluster_rules<'a>(
        &mut self,
        direction: Direction,
        rules: impl Iterator<
            Item = (&'a String, Option<RuleAction>, &'a Vec<ClusterPeer>, &'a Vec<ClusterProtocol>),
        >,
    ) -> Vec<ClusterRule> {
        let mut all = Vec::new();
        for (n, (name, action, peers, protocols)) in rules.enumerate() {
            let made = self.cluster_rule(direction, action.unwrap_or(RuleAction::Deny), peers, protocols);
            all.extend(made.into_iter().map(|(action, rule)| ClusterRule {
                number: n + 1,
                name: name.clone(),
                action,
                rule,
            }));
        }
        all
    }

    /// Compiles a rule: none if it fits nothing, and two if it is different for peers whose labels are not known.
    fn cluster_rule(
        &mut self,
        direction: Direction,
        action: RuleAction,
        peers: &[ClusterPeer],
        protocols: &[ClusterProtocol],
    ) -> Vec<(RuleAction, Rule)> {
        let found: Vec<Option<Vec<RulePeer>>> =
            peers.iter().map(|peer| self.cluster_peer(peer, direction, action)).collect();
        let ports: Vec<Option<Vec<RulePort>>> =
            protocols.iter().map(|protocol| self.cluster_ports(protocol)).collect();
        let is_whole =
            !found.is_empty() && found.iter().all(Option::is_some) && ports.iter().all(Option::is_some);
        if action != RuleAction::Accept && !is_whole {
            return vec![(RuleAction::Deny, Rule { peers: Vec::new(), ports: Vec::new() })];
        }
        let mut fitting: Vec<RulePeer> = found.into_iter().flatten().flatten().collect();
        let ports: Vec<RulePort> = ports.into_iter().flatten().flatten().collect();
        // An empty list would stand for all.
        if fitting.is_empty() || (ports.is_empty() && !protocols.is_empty()) {
            return Vec::new();
        }
        let unknown = match action {
            RuleAction::Accept => Vec::new(),
            RuleAction::Deny | RuleAction::Pass => self.unknown_of(&fitting),
        };
        match action {
            RuleAction::Pass if !unknown.is_empty() => vec![
                (RuleAction::Pass, Rule { peers: fitting, ports: ports.clone() }),
                (RuleAction::Deny, Rule { peers: unknown, ports }),
            ],
            RuleAction::Accept | RuleAction::Deny | RuleAction::Pass => {
                fitting.extend(unknown);
                vec![(action, Rule { peers: fitting, ports })]
            }
        }
    }

    /// Returns the peer's endpoints or addresses. `None` if ovl does not act on it.
    fn cluster_peer(
        &mut self,
        peer: &ClusterPeer,
        direction: Direction,
        action: RuleAction,
    ) -> Option<Vec<RulePeer>> {
        let ClusterPeer { namespaces, pods, networks, nodes, domain_names, .. } = peer;
        if !domain_names.is_empty() {
            // Only what a workload may do depends on what it was told, and only if it is allowed: some addresses may be unknown.
            let patterns = domain_names.iter().filter_map(|text| NamePattern::parse(text));
            return ((direction, action) == (Direction::Egress, RuleAction::Accept))
                .then(|| patterns.map(|pattern| self.name_peer(pattern)).collect());
        }
        if let Some(selector) = nodes {
            return self.node_peers(selector);
        }
        let mut found: Vec<RulePeer> =
            networks.iter().map(|net| RulePeer::Block { cidr: net.trunc(), except: Vec::new() }).collect();
        if let Some(namespace_selector) = namespaces.clone() {
            let all = NamespacedPod { namespace_selector, ..NamespacedPod::default() };
            found.push(self.pods_peer(selector_of(&all)));
        }
        if let Some(pods) = pods {
            found.push(self.pods_peer(selector_of(pods)));
        }
        Some(found).filter(|found| !found.is_empty())
    }

    /// Returns the addresses of the Nodes with these labels. `None` if no Node is known: what has none to name, as a host
    /// to which nothing was mirrored yet, must not take a rule that denies for one about nothing.
    fn node_peers(&self, selector: &LabelSelector) -> Option<Vec<RulePeer>> {
        let selected = self.nodes.iter().filter(|node| selector.matches(&node.metadata.labels));
        let addresses: BTreeSet<IpAddr> =
            selected.flat_map(|node| &node.status.addresses).filter_map(NodeAddress::ip).collect();
        let block = |address: IpAddr| RulePeer::Block { cidr: address.into(), except: Vec::new() };
        (!self.nodes.is_empty()).then(|| addresses.into_iter().map(block).collect())
    }

    /// Returns the endpoints that may be among these peers as soon as their labels are known.
    fn unknown_of(&mut self, peers: &[RulePeer]) -> Vec<RulePeer> {
        let mut found = Vec::new();
        for peer in peers {
            let RulePeer::Pods(place) = peer else { continue };
            let Some(pods) = self.pods.get(*place) else { continue };
            if !matches(&pods.labels, None) {
                let namespaces = pods.namespaces.clone();
                found.push(self.pods_peer(Pods { namespaces, unknown: true, labels: Default::default() }));
            }
        }
        found
    }

    /// Returns the ports. `None` if ovl does not know what they are.
    fn cluster_ports(&mut self, protocol: &ClusterProtocol) -> Option<Vec<RulePort>> {
        let ClusterProtocol { tcp, udp, sctp, destination_named_port, .. } = protocol;
        let mut ports = Vec::new();
        for (protocol, given) in [(Protocol::Tcp, tcp), (Protocol::Udp, udp), (Protocol::Sctp, sctp)] {
            if let Some(ClusterPorts { destination_port, .. }) = given {
                ports.push(match destination_port {
                    None => RulePort::All(protocol),
                    Some(ClusterPort { range: Some(range), .. }) => {
                        RulePort::Range(protocol, range.start, range.end)
                    }
                    Some(ClusterPort { number: 0, .. }) => return None,
                    Some(ClusterPort { number, .. }) => RulePort::Range(protocol, *number, *number),
                });
            }
            if !destination_named_port.is_empty() {
                ports.push(self.named_port(destination_named_port, protocol));
            }
        }
        Some(ports).filter(|ports| !ports.is_empty())
    }
}
