//! Explains why a connection is allowed or refused.
//!
//! It evaluates labels and addresses instead of nftables sets, so it is independent of the tables, and it names the
//! policy and the rule that decide. The module owns no state. Begin to read at [`explain`].

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::object::Mode;
use ovl_proto::resource::{LabelSelector, Name, Operator, Protocol, Requirement, RuleAction};

use super::admitted::AdmittedAt;
use super::{
    ClusterPolicy, ClusterRule, Direction, Namespaces, Policies, Rule, RulePeer, RulePort, in_block,
};
use ovl_cluster::view::{Placed, View};

/// The source or the destination of a connection.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionEnd<'a> {
    /// The address.
    pub address: IpAddr,
    /// The endpoint with that address. `None` for an address outside the cluster.
    pub endpoint: Option<Placed<'a>>,
}

impl<'a> ConnectionEnd<'a> {
    /// Finds the endpoint with an address.
    pub fn of(view: &'a View, address: IpAddr) -> Self {
        let mut found = view.networks.keys().filter_map(|id| view.endpoint_by_address(*id, address));
        Self { address, endpoint: found.next() }
    }

    /// Whether the end is an endpoint of a host.
    pub fn is_on(&self, host: NodeId) -> bool {
        self.endpoint.is_some_and(|placed| placed.node.record.id == host)
    }

    /// Whether the other end is the host of this endpoint.
    fn is_at_home(&self, view: &View, other: &Self) -> bool {
        let Some(Placed { node, endpoint }) = self.endpoint else { return false };
        let network = view.networks.get(&endpoint.network).map(|state| &state.network);
        let gateway = network.is_some_and(|network| match network.mode {
            // Each host has gateways of its own: the address of the first block, too, is that of another host elsewhere.
            Mode::L3 => view.gateways(network.id, node.record.id).any(|at| at == other.address),
            Mode::L2 => network.subnets.iter().any(|subnet| subnet.gateway == other.address),
        });
        other.endpoint.is_none() && (gateway || node.record.vtep == other.address)
    }
}

/// The verdict of the policies of one end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// The end is no endpoint, so no policy selects it.
    Outside,
    /// The other end is the endpoint's own host or the endpoint itself, which is always allowed.
    AtHome,
    /// No policy selects it for this direction.
    NotIsolated,
    /// A rule of a policy allows it.
    Passes {
        /// The policy.
        policy: Name,
        /// The number of the rule, from 1.
        rule: usize,
        /// The rule in words.
        says: String,
    },
    /// A rule of a ClusterNetworkPolicy refuses it.
    Denied {
        /// The policy.
        policy: Name,
        /// The number of the rule, from 1.
        rule: usize,
        /// The rule in words.
        says: String,
    },
    /// ClusterNetworkPolicies select the endpoint, and no rule decides about the connection.
    Default,
    /// These policies select the endpoint, and none of their rules allows the connection.
    Refused(Vec<Name>),
    /// The labels of the endpoint are not known, and these policies may select it. Until that is known, nothing is
    /// allowed.
    Undecided(Vec<Name>),
}

impl Side {
    /// Whether this end allows the connection.
    pub fn passes(&self) -> bool {
        !matches!(self, Self::Denied { .. } | Self::Refused(_) | Self::Undecided(_))
    }
}

/// The verdicts of the policies of both ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// The verdict of the source.
    pub egress: Side,
    /// The verdict of the destination.
    pub ingress: Side,
}

impl Judgement {
    /// Whether both ends allow the connection.
    pub fn passes(&self) -> bool {
        self.egress.passes() && self.ingress.passes()
    }
}

/// Returns the verdicts on a connection. Without `port`, the connection has a protocol without ports.
pub fn explain(
    view: &View,
    policies: &Policies,
    admitted: AdmittedAt<'_>,
    from: &ConnectionEnd<'_>,
    to: &ConnectionEnd<'_>,
    port: Option<(Protocol, u16)>,
) -> Judgement {
    let side = |own: &ConnectionEnd<'_>, other: &ConnectionEnd<'_>, direction| {
        let Some(Placed { node, endpoint }) = own.endpoint else { return Side::Outside };
        let labels = view.known_labels(node.record.id, endpoint);
        let deciding = policies.deciding(&view.resources, &endpoint.namespace, labels.as_deref(), direction);
        if deciding.is_empty() {
            return Side::NotIsolated;
        }
        if own.address == other.address || own.is_at_home(view, other) {
            return Side::AtHome;
        }
        if !deciding.undecided.is_empty() {
            return Side::Undecided(deciding.undecided.into_iter().cloned().collect());
        }
        let fits = |rule: &Rule| {
            peers_fit(view, policies, own, admitted, &rule.peers, other)
                && ports_fit(view, policies, &rule.ports, to, port)
        };
        let decision = |tier: &[&ClusterPolicy]| {
            let rules =
                tier.iter().flat_map(|policy| policy.rules(direction).iter().map(move |it| (policy, it)));
            let (policy, found) = rules.into_iter().find(|(_, found)| fits(&found.rule))?;
            let (policy, rule) = (policy.name.clone(), found.number);
            let mut says = describe_cluster(policies, found, direction);
            let mut names = found.rule.peers.iter();
            if let Some((name, left)) =
                names.find_map(|peer| told_for(view, policies, own, admitted, peer, other))
            {
                // A long one is not kept in the kernel, from which an earlier run's are known.
                let name = if name.is_empty() { "a name" } else { name };
                says +=
                    &format!(" ({} was answered for {name}; {} s are left)", other.address, left.as_secs());
            }
            match found.action {
                RuleAction::Accept => Some(Side::Passes { policy, rule, says }),
                RuleAction::Deny => Some(Side::Denied { policy, rule, says }),
                RuleAction::Pass => None,
            }
        };
        if let Some(decided) = decision(&deciding.admin) {
            return decided;
        }
        if deciding.isolating.is_empty() {
            return decision(&deciding.baseline).unwrap_or(Side::Default);
        }
        for (policy, rules) in &deciding.isolating {
            if let Some(place) = rules.iter().position(fits) {
                let says = rules.get(place).map(|rule| describe(policies, rule, direction));
                let (policy, rule) = (policy.name.clone(), place + 1);
                return Side::Passes { policy, rule, says: says.unwrap_or_default() };
            }
        }
        Side::Refused(deciding.isolating.into_iter().map(|(policy, _)| policy.name.clone()).collect())
    };
    Judgement { egress: side(from, to, Direction::Egress), ingress: side(to, from, Direction::Ingress) }
}

fn peers_fit(
    view: &View,
    policies: &Policies,
    own: &ConnectionEnd<'_>,
    admitted: AdmittedAt<'_>,
    peers: &[RulePeer],
    other: &ConnectionEnd<'_>,
) -> bool {
    let fits = |peer: &RulePeer| match peer {
        RulePeer::Block { cidr, except } => in_block(other.address, *cidr, except),
        RulePeer::Name(_) => told_for(view, policies, own, admitted, peer, other).is_some(),
        RulePeer::Pods(place) => policies.pods(*place).zip(other.endpoint).is_some_and(|(pods, placed)| {
            let endpoint = placed.endpoint;
            let namespace = view.resources.namespace_labels(&endpoint.namespace);
            let labels = view.known_labels(placed.node.record.id, endpoint);
            pods.matches(&endpoint.namespace, &namespace, labels.as_deref())
        }),
    };
    peers.is_empty() || peers.iter().any(fits)
}

/// Returns the name for which the workload was told the address of the other end, if the peer is a pattern that matches it, and
/// how long that still counts. `None` also if the workload is on another host: what its resolver answered is known there.
fn told_for<'a>(
    view: &View,
    policies: &Policies,
    own: &ConnectionEnd<'_>,
    admitted: AdmittedAt<'a>,
    peer: &RulePeer,
    other: &ConnectionEnd<'_>,
) -> Option<(&'a str, Duration)> {
    let RulePeer::Name(place) = peer else { return None };
    let (_, key) = policies.pattern(*place).filter(|_| own.is_on(view.me))?;
    admitted.find(key, other.address)
}

fn ports_fit(
    view: &View,
    policies: &Policies,
    ports: &[RulePort],
    to: &ConnectionEnd<'_>,
    wanted: Option<(Protocol, u16)>,
) -> bool {
    let fits = |port: &RulePort| {
        let Some((protocol, number)) = wanted else { return false };
        match port {
            RulePort::All(of) => *of == protocol,
            RulePort::Range(of, first, last) => *of == protocol && (*first..=*last).contains(&number),
            RulePort::Named(place) => policies.port(*place).is_some_and(|(name, of)| {
                let named =
                    |placed: Placed<'_>| view.named_port(placed.node.record.id, placed.endpoint, name, of);
                of == protocol && to.endpoint.and_then(named) == Some(number)
            }),
        }
    };
    ports.is_empty() || ports.iter().any(fits)
}

/// Describes a rule of a ClusterNetworkPolicy in words.
pub fn describe_cluster(policies: &Policies, found: &ClusterRule, direction: Direction) -> String {
    let name = if found.name.is_empty() { String::new() } else { format!("'{}': ", found.name) };
    format!("{name}{} {}", found.action, describe(policies, &found.rule, direction))
}

/// Describes a rule in words.
pub fn describe(policies: &Policies, rule: &Rule, direction: Direction) -> String {
    let word = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let any = |all: Vec<String>, none: &str| if all.is_empty() { none.to_owned() } else { all.join(", or ") };
    let peers = rule.peers.iter().map(|peer| describe_peer(policies, peer)).collect();
    let ports = rule.ports.iter().map(|port| describe_port(policies, port)).collect();
    format!("{word} {}, {}", any(peers, "everybody"), any(ports, "all ports"))
}

fn describe_peer(policies: &Policies, peer: &RulePeer) -> String {
    match peer {
        RulePeer::Block { cidr, except } if except.is_empty() => cidr.to_string(),
        RulePeer::Name(place) => {
            policies.pattern(*place).map_or_else(String::new, |(pattern, _)| pattern.to_string())
        }
        RulePeer::Block { cidr, except } => {
            let except: Vec<String> = except.iter().map(ToString::to_string).collect();
            format!("{cidr} except {}", except.join(" and "))
        }
        RulePeer::Pods(place) => policies.pods(*place).map_or_else(String::new, |pods| {
            let which = match &pods.namespaces {
                Namespaces::One(name) => format!("namespace {name}"),
                Namespaces::Selected(selector) => match Shown(selector).to_string() {
                    all if all.is_empty() => "all namespaces".to_owned(),
                    some => format!("namespaces with {some}"),
                },
            };
            match Shown(&pods.labels).to_string() {
                _ if pods.unknown => format!("pods of {which} whose labels are not known"),
                all if all.is_empty() => format!("all pods of {which}"),
                some => format!("pods with {some} of {which}"),
            }
        }),
    }
}

fn describe_port(policies: &Policies, port: &RulePort) -> String {
    match port {
        RulePort::All(protocol) => format!("all {protocol} ports"),
        RulePort::Range(protocol, first, last) if first == last => format!("{protocol} {first}"),
        RulePort::Range(protocol, first, last) => format!("{protocol} {first}-{last}"),
        RulePort::Named(place) => {
            policies.port(*place).map_or_else(String::new, |(name, protocol)| format!("{protocol} '{name}'"))
        }
    }
}

/// Displays a selector in the format of `kubectl -l`: empty if it selects everything.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a>(pub &'a LabelSelector);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equal = self.0.match_labels.iter().map(|(key, value)| format!("{key}={value}"));
        let more = self.0.match_expressions.iter().map(|Requirement { key, operator, values }| {
            let values = values.join(",");
            match operator {
                Operator::In => format!("{key} in ({values})"),
                Operator::NotIn => format!("{key} notin ({values})"),
                Operator::Exists => key.clone(),
                Operator::DoesNotExist => format!("!{key}"),
            }
        });
        let all: Vec<String> = equal.chain(more).collect();
        f.write_str(&all.join(","))
    }
}
