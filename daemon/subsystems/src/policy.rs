//! The subsystem of network policies: which endpoints may connect, enforced by address on the hosts of both ends.
//!
//! [`Policies`] is the compiled form of the cluster's NetworkPolicy and ClusterNetworkPolicy objects ([`tiers`]). The nftables table (`rules`), the set
//! elements of each address ([`members`]) and the explanation of a verdict ([`explain`]) all follow from it.
//! [`Enforcement`] owns the state: its [`PolicyLedger`] is what was last sent to the kernel. Begin to read at
//! [`Policies::new`], and then at [`PolicyLedger::plan`].

pub mod admitted;
mod enforcement;
pub mod explain;
mod frames;
mod index;
mod ledger;
pub mod members;
mod merged;
pub mod names;
pub mod refused;
pub mod resolver;
mod rules;
mod slots;
mod tiers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::resource::{
    EgressRule, IngressRule, IntOrString, IpBlock, LabelSelector, Labels, Name, NetworkPolicy, NodeObject,
    PolicyPeer, PolicyPort, PolicyType, Protocol, RuleAction,
};

use self::index::Index;
use self::names::NameKey;
use ovl_cluster::digest::hash;
use ovl_cluster::resources::Resources;
use ovl_zone::NamePattern;

pub use enforcement::Enforcement;
pub use ledger::{PolicyLedger, part};
pub use tiers::{ClusterPolicy, ClusterRule, Deciding};

/// A direction, as seen by the isolated endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// Returns `ingress` or `egress`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    fn of(kind: PolicyType) -> Self {
        match kind {
            PolicyType::Ingress => Self::Ingress,
            PolicyType::Egress => Self::Egress,
        }
    }
}

/// The number in place of a policy's for an endpoint of which it is not known which policies select it. No policy has it,
/// so nothing is allowed.
const UNDECIDED: u32 = 0;
/// The number in place of a policy's after which everything is allowed.
const DEFAULT: u32 = 1;
/// The number that a rule leaves behind which passes the decision to the next tier.
const PASSED: u32 = 2;

/// All network policies of the cluster, compiled for lookups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    /// The policies, ordered by name.
    list: Vec<Policy>,
    /// The ClusterNetworkPolicies, in the order in which they decide.
    cluster: Vec<ClusterPolicy>,
    /// Indexes into `pods` of selectors whose endpoints a rule may refuse.
    refusing: BTreeSet<usize>,
    /// Indexes into `ports` of named ports that a rule may refuse.
    refusing_ports: BTreeSet<usize>,
    /// The selectors of the policies, by namespace.
    selecting: BTreeMap<String, Index>,
    /// The distinct selectors of all rules.
    pods: Vec<Pods>,
    /// The key of each selector, which is part of the name of its set.
    keys: Vec<String>,
    /// Indexes into `pods` of selectors for one namespace.
    in_namespace: BTreeMap<String, Index>,
    /// Indexes into `pods` of selectors for any namespace.
    anywhere: Index,
    /// The distinct named ports of all rules.
    ports: Vec<(String, Protocol)>,
    /// The distinct patterns of domain names of all rules.
    names: Vec<(NamePattern, NameKey)>,
}

/// A compiled network policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The namespace and name.
    pub name: Name,
    /// The number of the policy in nftables maps.
    pub number: u32,
    /// The selector of the endpoints that it isolates, in its namespace.
    pub selector: LabelSelector,
    /// The ingress rules. `None` if it does not isolate in that direction.
    pub ingress: Option<Vec<Rule>>,
    /// The egress rules. `None` if it does not isolate in that direction.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// Returns the rules for a direction. `None` if it does not isolate in that direction.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// An allow rule: connections from or to any of the peers, at any of the ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The allowed peers. Empty: all.
    pub peers: Vec<RulePeer>,
    /// The allowed ports. Empty: all ports and protocols.
    pub ports: Vec<RulePort>,
}

impl Rule {
    /// Whether the rule allows everything.
    fn is_open(&self) -> bool {
        self.peers.is_empty() && self.ports.is_empty()
    }
}

/// A peer of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulePeer {
    /// Endpoints: the index of their selector in [`Policies::pods`].
    Pods(usize),
    /// A range of addresses.
    Block {
        /// The prefix of the range.
        cidr: IpNet,
        /// The prefixes that are excluded from it. They do not overlap.
        except: Vec<IpNet>,
    },
    /// The addresses that the workloads were told for the domain names that match a pattern: its index in `Policies::names`.
    Name(usize),
}

/// A port of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulePort {
    /// All ports of a protocol.
    All(Protocol),
    /// The ports from the first to the last.
    Range(Protocol, u16, u16),
    /// The port with this name on the receiving endpoint: the index in `Policies::ports`.
    Named(usize),
}

/// A selector of endpoints in a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pods {
    /// The namespaces of the endpoints.
    pub namespaces: Namespaces,
    /// The labels of the endpoints.
    pub labels: LabelSelector,
    /// In place of endpoints with these labels, those whose labels are not known.
    pub unknown: bool,
}

/// The namespaces of a selector.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Namespaces {
    /// One namespace.
    One(String),
    /// The namespaces with these labels.
    Selected(LabelSelector),
}

impl Pods {
    /// Whether the selector matches an endpoint with these labels. `None`: they are not known, so only a selector
    /// without requirements matches.
    pub fn matches(&self, namespace: &str, namespace_labels: &Labels, labels: Option<&Labels>) -> bool {
        let fits = if self.unknown { labels.is_none() } else { matches(&self.labels, labels) };
        fits && self.is_of(namespace, namespace_labels)
    }

    /// Whether the selector is about endpoints of a namespace.
    fn is_of(&self, namespace: &str, namespace_labels: &Labels) -> bool {
        match &self.namespaces {
            Namespaces::One(name) => name == namespace,
            Namespaces::Selected(selector) => selector.matches(namespace_labels),
        }
    }

    /// Returns the key of the selector: the same on every host and after every start.
    fn key(&self) -> String {
        let mut bytes = match &self.namespaces {
            Namespaces::One(name) => format!("one {name}"),
            Namespaces::Selected(selector) => format!("selected {selector:?}"),
        };
        bytes += &format!(" {:?}", self.labels);
        if self.unknown {
            bytes += " unknown";
        }
        hex(&hash(bytes.as_bytes()), 6)
    }
}

/// Whether a selector matches in any case: labels, or whatever labels may become known.
fn matches(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    match labels {
        Some(labels) => selector.matches(labels),
        None => *selector == LabelSelector::default(),
    }
}

fn hex(bytes: &[u8], count: usize) -> String {
    bytes.iter().take(count).map(|byte| format!("{byte:02x}")).collect()
}

impl Policies {
    /// Compiles the NetworkPolicy and ClusterNetworkPolicy objects of the cluster.
    pub fn new(resources: &Resources) -> Self {
        let mut all = Self::default();
        let mut builder = Builder { nodes: resources.nodes().collect(), ..Builder::default() };
        let mut numbers = BTreeSet::from([UNDECIDED, DEFAULT, PASSED]);
        for (name, policy) in resources.policies() {
            let number = free_number(name, &mut numbers);
            let place = all.list.len();
            let selecting = all.selecting.entry(name.namespace.clone()).or_default();
            selecting.insert(place, &policy.spec.pod_selector);
            all.list.push(builder.policy(name, number, policy));
        }
        for (name, policy) in resources.cluster_policies() {
            let name = Name::new("", name);
            let number = free_number(&name, &mut numbers);
            all.cluster.push(builder.cluster_policy(&name, number, policy));
        }
        all.cluster.sort_by(|a, b| (a.tier, a.priority, &a.name).cmp(&(b.tier, b.priority, &b.name)));
        all.note_refusing();
        for (place, pods) in builder.pods.iter().enumerate() {
            match &pods.namespaces {
                Namespaces::One(name) => {
                    all.in_namespace.entry(name.clone()).or_default().insert(place, &pods.labels);
                }
                Namespaces::Selected(_) => all.anywhere.insert(place, &pods.labels),
            }
        }
        all.keys = builder.pods.iter().map(Pods::key).collect();
        all.pods = builder.pods;
        all.ports = builder.ports;
        all.names = builder.names;
        all
    }

    /// Records the selectors and named ports of rules that may refuse: what becomes known of an endpoint can then close it.
    fn note_refusing(&mut self) {
        let rules = self.cluster.iter().flat_map(|policy| policy.ingress.iter().chain(&policy.egress));
        for ClusterRule { rule, .. } in rules.filter(|rule| rule.action != RuleAction::Accept) {
            self.refusing.extend(rule.peers.iter().filter_map(|peer| match peer {
                RulePeer::Pods(place) => Some(*place),
                RulePeer::Block { .. } | RulePeer::Name(_) => None,
            }));
            self.refusing_ports.extend(rule.ports.iter().filter_map(|port| match port {
                RulePort::Named(place) => Some(*place),
                RulePort::All(_) | RulePort::Range(..) => None,
            }));
        }
    }

    /// Whether there are no policies.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty() && self.cluster.is_empty()
    }

    /// Returns all NetworkPolicies, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.list.iter()
    }

    /// Returns the policy with a name. `None` if there is none.
    pub fn get(&self, name: &Name) -> Option<&Policy> {
        let place = self.list.binary_search_by(|policy| policy.name.cmp(name)).ok()?;
        self.list.get(place)
    }

    /// Returns the policies that select an endpoint with these labels, ordered by name. `None`: the labels are not
    /// known, so these are the policies that select all endpoints of the namespace.
    pub fn selecting(&self, namespace: &str, labels: Option<&Labels>) -> Vec<&Policy> {
        let Some(index) = self.selecting.get(namespace) else { return Vec::new() };
        let candidates = candidates(index, labels).into_iter().filter_map(|place| self.list.get(place));
        candidates.filter(|policy| matches(&policy.selector, labels)).collect()
    }

    /// Returns the policies of a namespace that would isolate an endpoint in a direction if it had certain labels,
    /// ordered by name. Empty if a policy isolates all endpoints of the namespace: the others could only allow more.
    ///
    /// An endpoint whose labels are not known is isolated while there is such a policy.
    pub fn undecided(&self, namespace: &str, direction: Direction) -> Vec<&Policy> {
        let first = self.list.partition_point(|policy| *policy.name.namespace < *namespace);
        let here = self.list.iter().skip(first).take_while(|policy| policy.name.namespace == namespace);
        let (sure, unsure): (Vec<&Policy>, Vec<&Policy>) = here
            .filter(|policy| policy.rules(direction).is_some())
            .partition(|policy| matches(&policy.selector, None));
        if sure.is_empty() { unsure } else { Vec::new() }
    }

    /// Returns the selectors of rules that match an endpoint with these labels, as indexes into [`Self::pods`]. `None`:
    /// the labels are not known.
    fn pods_matching(
        &self,
        namespace: &str,
        namespace_labels: &Labels,
        labels: Option<&Labels>,
    ) -> Vec<usize> {
        let here = self.in_namespace.get(namespace).map(|index| candidates(index, labels));
        let mut places = here.unwrap_or_default();
        places.extend(candidates(&self.anywhere, labels));
        places.retain(|place| {
            self.pods.get(*place).is_some_and(|pods| pods.matches(namespace, namespace_labels, labels))
        });
        places
    }

    /// Returns the selector at an index. `None` if the index is out of range.
    pub fn pods(&self, place: usize) -> Option<&Pods> {
        self.pods.get(place)
    }

    /// Returns the name and the protocol of the named port at an index. `None` if the index is out of range.
    pub fn port(&self, place: usize) -> Option<(&str, Protocol)> {
        self.ports.get(place).map(|(name, protocol)| (name.as_str(), *protocol))
    }
}

/// Returns the positions of all selectors that match these labels, and of few others.
fn candidates(index: &Index, labels: Option<&Labels>) -> Vec<usize> {
    index.candidates(labels.unwrap_or(&Labels::new()))
}

/// Returns the number of a policy: a hash of its name, the same on every host and after every start unless two policies
/// collide.
fn free_number(name: &Name, taken: &mut BTreeSet<u32>) -> u32 {
    let mut text = name.to_string();
    loop {
        let [a, b, c, d, ..] = hash(text.as_bytes());
        let number = u32::from_be_bytes([a, b, c, d]);
        if taken.insert(number) {
            return number;
        }
        text.push('+');
    }
}

/// Collects selectors and named ports, each once. `nodes` are all there are.
#[derive(Default)]
struct Builder<'a> {
    nodes: Vec<&'a NodeObject>,
    pods: Vec<Pods>,
    places: BTreeMap<Pods, usize>,
    ports: Vec<(String, Protocol)>,
    names: Vec<(NamePattern, NameKey)>,
}

impl Builder<'_> {
    fn policy(&mut self, name: &Name, number: u32, policy: &NetworkPolicy) -> Policy {
        let spec = &policy.spec;
        let isolates = |direction| spec.policy_types.iter().any(|kind| Direction::of(*kind) == direction);
        let ingress = spec.ingress.iter().map(|IngressRule { ports, from, .. }| (from, ports));
        let egress = spec.egress.iter().map(|EgressRule { ports, to, .. }| (to, ports));
        let ingress = ingress.map(|(peers, ports)| self.rule(name, peers, ports)).collect();
        let egress = egress.map(|(peers, ports)| self.rule(name, peers, ports)).collect();
        Policy {
            name: name.clone(),
            number,
            selector: spec.pod_selector.clone(),
            ingress: isolates(Direction::Ingress).then_some(ingress),
            egress: isolates(Direction::Egress).then_some(egress),
        }
    }

    fn rule(&mut self, of: &Name, peers: &[PolicyPeer], ports: &[PolicyPort]) -> Rule {
        Rule {
            peers: peers.iter().map(|peer| self.peer(of, peer)).collect(),
            ports: ports.iter().map(|port| self.port(port)).collect(),
        }
    }

    fn peer(&mut self, of: &Name, peer: &PolicyPeer) -> RulePeer {
        if let Some(IpBlock { cidr, except }) = &peer.ip_block {
            return RulePeer::Block { cidr: cidr.trunc(), except: IpNet::aggregate(except) };
        }
        let namespaces = match &peer.namespace_selector {
            Some(selector) => Namespaces::Selected(selector.clone()),
            None => Namespaces::One(of.namespace.clone()),
        };
        let labels = peer.pod_selector.clone().unwrap_or_default();
        self.pods_peer(Pods { namespaces, labels, unknown: false })
    }

    fn pods_peer(&mut self, pods: Pods) -> RulePeer {
        let next = self.pods.len();
        let place = *self.places.entry(pods.clone()).or_insert(next);
        if place == next {
            self.pods.push(pods);
        }
        RulePeer::Pods(place)
    }

    fn name_peer(&mut self, pattern: NamePattern) -> RulePeer {
        let known = self.names.iter().position(|(known, _)| *known == pattern);
        RulePeer::Name(known.unwrap_or_else(|| {
            let key = NameKey::of(&pattern);
            self.names.push((pattern, key));
            self.names.len() - 1
        }))
    }

    fn port(&mut self, PolicyPort { protocol, port, end_port, .. }: &PolicyPort) -> RulePort {
        match port {
            None => RulePort::All(*protocol),
            Some(IntOrString::Int(first)) => RulePort::Range(*protocol, *first, end_port.unwrap_or(*first)),
            Some(IntOrString::String(name)) => self.named_port(name, *protocol),
        }
    }

    fn named_port(&mut self, name: &str, protocol: Protocol) -> RulePort {
        let wanted = (name.to_owned(), protocol);
        let place = self.ports.iter().position(|port| *port == wanted).unwrap_or_else(|| {
            self.ports.push(wanted);
            self.ports.len() - 1
        });
        RulePort::Named(place)
    }
}

/// Returns the IP protocol number.
pub fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// Returns the protocol with an IP protocol number. `None` if no policy can name it.
pub fn protocol_of(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|known| protocol_number(*known) == number)
}

/// Returns the protocol's name in nft.
fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// Whether an address is in a range of addresses.
fn in_block(address: IpAddr, cidr: IpNet, except: &[IpNet]) -> bool {
    cidr.contains(&address) && !except.iter().any(|net| net.contains(&address))
}
