//! Network policies: who may connect to whom, by the addresses that endpoints really have, at both ends.
//!
//! [`Policies`] is what the cluster's objects say, made ready to be asked. From it follow the tables
//! ([`rules`]), what an address is in them ([`members`]), and the answer to why something passes or does
//! not ([`explain`]).

mod enforcement;
pub mod explain;
mod frames;
mod index;
mod ledger;
pub mod members;
pub mod refused;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::resource::{
    EgressRule, IngressRule, IntOrString, IpBlock, LabelSelector, Labels, Name, NetworkPolicy, PolicyPeer,
    PolicyPort, PolicyType, Protocol,
};

use self::index::Index;
use ovl_cluster::digest::hash;
use ovl_cluster::resources::Resources;

pub use enforcement::Enforcement;
pub use ledger::{PolicyLedger, part};

/// A direction, as the isolated endpoint sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To it.
    Ingress,
    /// From it.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// `ingress` or `egress`.
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

/// All policies of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    /// In the order of their names.
    list: Vec<Policy>,
    /// Whom they select, by namespace.
    selecting: BTreeMap<String, Index>,
    /// What their rules look for: each selector once, whoever uses it.
    pods: Vec<Pods>,
    /// What tells the set of each from others.
    keys: Vec<String>,
    /// Places in `pods`, for endpoints of one namespace.
    in_namespace: BTreeMap<String, Index>,
    /// The same for endpoints of whichever namespace.
    anywhere: Index,
    /// Names of ports that rules use.
    ports: Vec<(String, Protocol)>,
}

/// A policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Its namespace and name.
    pub name: Name,
    /// Stands for it in maps.
    pub number: u32,
    /// Whom it selects, in its namespace.
    pub selector: LabelSelector,
    /// What it lets in; nothing if it does not isolate in that direction.
    pub ingress: Option<Vec<Rule>>,
    /// What it lets out.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// Its rules for a direction, if it isolates in that.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// What passes: from, or to, any of the peers, at any of the ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Empty: everybody.
    pub peers: Vec<RulePeer>,
    /// Empty: all, whatever the protocol.
    pub ports: Vec<RulePort>,
}

impl Rule {
    /// Whether everything passes.
    fn is_open(&self) -> bool {
        self.peers.is_empty() && self.ports.is_empty()
    }
}

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulePeer {
    /// Endpoints: the place of their selector among [`Policies::pods`].
    Pods(usize),
    /// Addresses.
    Block {
        /// The range.
        cidr: IpNet,
        /// Within it, and not meant. None overlaps another.
        except: Vec<IpNet>,
    },
}

/// At which port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulePort {
    /// All of a protocol.
    All(Protocol),
    /// From the first to the last.
    Range(Protocol, u16, u16),
    /// The one to which the receiving endpoint gives this name: its place among [`Policies::ports`].
    Named(usize),
}

/// Endpoints that a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pods {
    /// Of which namespaces.
    pub namespaces: Namespaces,
    /// With which labels.
    pub labels: LabelSelector,
}

/// Of which namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Namespaces {
    /// This one.
    One(String),
    /// Those with such labels.
    Selected(LabelSelector),
}

impl Pods {
    /// Whether an endpoint with these labels is meant.
    pub fn matches(&self, namespace: &str, namespace_labels: &Labels, labels: &Labels) -> bool {
        let here = match &self.namespaces {
            Namespaces::One(name) => name == namespace,
            Namespaces::Selected(selector) => selector.matches(namespace_labels),
        };
        here && self.labels.matches(labels)
    }

    /// What tells its set from others: the same on every host, and at every start.
    fn key(&self) -> String {
        let mut bytes = match &self.namespaces {
            Namespaces::One(name) => format!("one {name}"),
            Namespaces::Selected(selector) => format!("selected {selector:?}"),
        };
        bytes += &format!(" {:?}", self.labels);
        hex(&hash(bytes.as_bytes()), 6)
    }
}

fn hex(bytes: &[u8], count: usize) -> String {
    bytes.iter().take(count).map(|byte| format!("{byte:02x}")).collect()
}

impl Policies {
    /// Made ready from the cluster's objects.
    pub fn new(resources: &Resources) -> Self {
        let mut all = Self::default();
        let mut builder = Builder::default();
        let mut numbers = BTreeSet::new();
        for (name, policy) in &resources.policies {
            let number = free_number(name, &mut numbers);
            let place = all.list.len();
            let selecting = all.selecting.entry(name.namespace.clone()).or_default();
            selecting.insert(place, &policy.spec.pod_selector);
            all.list.push(builder.policy(name, number, policy));
        }
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
        all
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.list.iter()
    }

    /// One by its name.
    pub fn get(&self, name: &Name) -> Option<&Policy> {
        let place = self.list.binary_search_by(|policy| policy.name.cmp(name)).ok()?;
        self.list.get(place)
    }

    /// Those that select an endpoint with these labels, in the order of their names.
    pub fn selecting(&self, namespace: &str, labels: &Labels) -> Vec<&Policy> {
        let Some(index) = self.selecting.get(namespace) else { return Vec::new() };
        let candidates = index.candidates(labels).into_iter().filter_map(|place| self.list.get(place));
        candidates.filter(|policy| policy.selector.matches(labels)).collect()
    }

    /// The selectors of rules that an endpoint with these labels is meant by, as places in [`Self::pods`].
    fn meaning(&self, namespace: &str, namespace_labels: &Labels, labels: &Labels) -> Vec<usize> {
        let here = self.in_namespace.get(namespace).map(|index| index.candidates(labels));
        let mut places = here.unwrap_or_default();
        places.extend(self.anywhere.candidates(labels));
        places.retain(|place| {
            self.pods.get(*place).is_some_and(|pods| pods.matches(namespace, namespace_labels, labels))
        });
        places
    }

    /// The selector at that place.
    pub fn pods(&self, place: usize) -> Option<&Pods> {
        self.pods.get(place)
    }

    /// The name and the protocol at that place.
    pub fn port(&self, place: usize) -> Option<(&str, Protocol)> {
        self.ports.get(place).map(|(name, protocol)| (name.as_str(), *protocol))
    }
}

/// The same for a policy on every host and at every start, as long as no two share one.
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

/// Finds what is used twice.
#[derive(Default)]
struct Builder {
    pods: Vec<Pods>,
    places: BTreeMap<Pods, usize>,
    ports: Vec<(String, Protocol)>,
}

impl Builder {
    fn policy(&mut self, name: &Name, number: u32, policy: &NetworkPolicy) -> Policy {
        let spec = &policy.spec;
        let isolates = |direction| spec.policy_types.iter().any(|kind| Direction::of(*kind) == direction);
        let ingress = spec.ingress.iter().map(|IngressRule { ports, from }| (from, ports));
        let egress = spec.egress.iter().map(|EgressRule { ports, to }| (to, ports));
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
        let pods = Pods { namespaces, labels: peer.pod_selector.clone().unwrap_or_default() };
        let next = self.pods.len();
        let place = *self.places.entry(pods.clone()).or_insert(next);
        if place == next {
            self.pods.push(pods);
        }
        RulePeer::Pods(place)
    }

    fn port(&mut self, PolicyPort { protocol, port, end_port }: &PolicyPort) -> RulePort {
        match port {
            None => RulePort::All(*protocol),
            Some(IntOrString::Int(first)) => RulePort::Range(*protocol, *first, end_port.unwrap_or(*first)),
            Some(IntOrString::String(name)) => {
                let wanted = (name.clone(), *protocol);
                let place = self.ports.iter().position(|port| *port == wanted).unwrap_or_else(|| {
                    self.ports.push(wanted);
                    self.ports.len() - 1
                });
                RulePort::Named(place)
            }
        }
    }
}

/// The number of a protocol in IP packets.
pub fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// As nft, and people, write it.
fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// Whether an address is in a block.
fn in_block(address: IpAddr, cidr: IpNet, except: &[IpNet]) -> bool {
    cidr.contains(&address) && !except.iter().any(|net| net.contains(&address))
}
