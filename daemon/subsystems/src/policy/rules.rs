//! The chains of the table `inet ovl-policy`, as text.
//!
//! A connection is judged by its original source (`ct original saddr`) and by its final destination (`ct reply saddr`,
//! `proto-src`), not by the addresses of the current packet. So packets of both directions get the same verdict, and a
//! connection that was accepted under other policies can be judged again. An allowed connection is marked with the
//! current generation, and from then on costs one lookup.
//!
//! The policies of an isolated endpoint are found in maps, one for each *slot*: the first policy's number in the first
//! map, and so on. The number is passed on in the packet's priority, which is cleared afterwards and which ovld does
//! not use otherwise. A map of numbers is cheap to change; a change of a map of verdicts makes the kernel check the
//! whole table for loops.
//!
//! The module owns no state. Begin to read at [`skeleton`].

use ovl_proto::resource::{Protocol, RuleAction, Tier};

use super::members::{self, GENERATION, MARK, MARK_MASK, family, short};
use super::merged::{Peers, Ports, merge};
use super::slots::Slots;
use super::{ClusterPolicy, DEFAULT, Direction, PASSED, Policies, Policy, protocol_name};
use ovl_dataplane::nft::{CURRENT_MARK, Chain, Object, Set, Skeleton};

/// The size and timeout of the sets of refused connections.
const REMEMBERED: &str = "size 4096; flags dynamic,timeout; timeout 10m; counter";
/// The size of the sets that count refused packets by endpoint.
const COUNTED: &str = "size 65535; flags dynamic; counter";

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Returns the name of the set that counts refused packets to, or from, an endpoint's address.
pub(crate) fn counted(direction: Direction, v4: bool) -> String {
    format!("refused.{}.{}", short(direction), family(v4))
}

/// Returns the name of the set of recently refused connections in a direction: source, destination, protocol, port.
pub(crate) fn remembered(direction: Direction, v4: bool) -> String {
    format!("recent.{}.{}", short(direction), family(v4))
}

fn ip(v4: bool) -> &'static str {
    if v4 { "ip" } else { "ip6" }
}

/// Returns the expression for the original source of a connection.
fn source(v4: bool) -> String {
    format!("ct original {} saddr", ip(v4))
}

/// Returns the expression for the final destination of a connection.
fn target(v4: bool) -> String {
    format!("ct reply {} saddr", ip(v4))
}

/// Returns the expression for the isolated end.
fn own_end(direction: Direction, v4: bool) -> String {
    match direction {
        Direction::Ingress => target(v4),
        Direction::Egress => source(v4),
    }
}

/// Returns the expression for the end that is not the isolated one.
fn other_end(direction: Direction, v4: bool) -> String {
    match direction {
        Direction::Ingress => source(v4),
        Direction::Egress => target(v4),
    }
}

/// Returns the name of the chain of a policy's rules for a direction.
fn chain_of(policy: &Policy, direction: Direction) -> String {
    chain_named(&policy.name.to_string(), policy.number, direction)
}

/// Returns the name of the chain of a ClusterNetworkPolicy's rules for a direction. No namespace has a dot in its name.
fn cluster_chain_of(policy: &ClusterPolicy, direction: Direction) -> String {
    let tier = policy.tier.to_string().to_ascii_lowercase();
    chain_named(&format!("{tier}.{}", policy.name), policy.number, direction)
}

fn chain_named(name: &str, number: u32, direction: Direction) -> String {
    let text = format!("{name}/{}", direction.name());
    // The kernel limits the length of a name, and nft reads only names that begin with a letter.
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic());
    if text.len() <= 200 && begins { text } else { format!("policy-{number:08x}/{}", direction.name()) }
}

/// Returns the table without elements. `slots` is the number of policies that can select one endpoint in one direction;
/// `switched` says whether there are switched networks.
pub(super) fn skeleton(policies: &Policies, slots: Slots, switched: bool) -> Skeleton {
    // Marks bridged frames that were translated, so that the bridge table knows that they were judged.
    let mark_seen = format!(
        "iifname \"ovb-*\" oifname \"ovb-*\" ct status dnat meta mark set meta mark | {:#x}",
        crate::marks::SEEN
    );
    let judged = [
        "ct state established,related ct mark @current accept".to_owned(),
        "ct state invalid,untracked goto stateless".to_owned(),
        "ct state new tcp flags & (fin | syn | rst | ack) != syn goto midstream".to_owned(),
        "goto from".to_owned(),
    ];
    // Never routed, since it must come with the largest hop limit. Connection tracking does not follow it.
    let discovery =
        "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept".to_owned();
    let bridged = [mark_seen, discovery].into_iter().filter(|_| switched);
    let forward: Vec<String> = bridged.chain(judged).collect();
    let mut chains = vec![
        chain("forward", Some("filter hook forward priority filter - 5"), &forward),
        chain("from", None, &look_up(Direction::Egress, "goto to")),
        chain("to", None, &look_up(Direction::Ingress, "return")),
        // What the policies of one end allow is then judged by those of the other end.
        chain("pass.eg", None, &look_up(Direction::Ingress, "goto pass.in")),
        chain("pass.in", None, &approve()),
        chain("midstream", None, &midstream()),
        chain("stateless", None, &stateless()),
        chain(
            "refuse",
            None,
            &["tcp flags & (syn | rst) == 0 reject with tcp reset".to_owned(), "drop".to_owned()],
        ),
    ];
    for direction in Direction::ALL {
        let has_admin = policies.admin_count(direction) > 0;
        chains.extend([true, false].map(|v4| judge(direction, v4, slots.others, has_admin)));
        if has_admin {
            chains.extend([true, false].map(|v4| admin(direction, v4, slots.admin)));
        }
        let cluster = policies.cluster().iter().filter(|policy| !policy.rules(direction).is_empty());
        chains.extend(cluster.map(|policy| cluster_chain(policies, policy, direction)));
        chains.extend([true, false].map(|v4| refuse(direction, v4)));
        chains.extend(policies.iter().filter_map(|policy| policy_chain(policies, policy, direction)));
        chains.push(dispatch(policies, direction));
    }
    if switched {
        // The host must not tell senders of diverted frames that there is a shorter path.
        chains.push(chain(
            "output",
            Some("filter hook output priority filter"),
            &[
                "oifname \"ovb-*\" icmp type redirect drop".to_owned(),
                "oifname \"ovb-*\" icmpv6 type nd-redirect drop".to_owned(),
            ],
        ));
    }
    let names = policies.names.iter().flat_map(|(_, key)| key.objects());
    Skeleton { sets: sets(policies, slots), objects: objects().into_iter().chain(names).collect(), chains }
}

fn sets(policies: &Policies, slots: Slots) -> Vec<Set> {
    let mut sets = vec![GENERATION, CURRENT_MARK];
    for v4 in [true, false] {
        for direction in Direction::ALL {
            sets.extend((1..=slots.others).map(|slot| members::slot(direction, v4, slot)));
            sets.extend((1..=slots.admin).map(|slot| members::admin_slot(direction, v4, slot)));
        }
        sets.push(members::itself(v4));
        sets.extend((0..policies.pods.len()).filter_map(|place| members::pods(policies, place, v4)));
        sets.extend((0..policies.ports.len()).filter_map(|place| members::port(policies, place, v4)));
    }
    sets
}

fn objects() -> Vec<Object> {
    let mut objects = Vec::new();
    for v4 in [true, false] {
        let address = if v4 { "ipv4_addr" } else { "ipv6_addr" };
        for direction in Direction::ALL {
            objects.push(Object {
                kind: "set",
                name: counted(direction, v4),
                body: format!("type {address}; {COUNTED}"),
            });
            objects.push(Object {
                kind: "set",
                name: remembered(direction, v4),
                body: format!("type {address} . {address} . inet_proto . inet_service; {REMEMBERED}"),
            });
        }
    }
    objects
}

fn chain(name: &str, hook: Option<&str>, rules: &[String]) -> Chain {
    let hook = hook.map(|hook| format!("type {hook}; policy accept;"));
    Chain { name: name.to_owned(), hook, rules: rules.to_vec() }
}

/// Returns the rules that go to the policies of an isolated endpoint, with the number of the first one, and else to
/// `otherwise`.
fn look_up(direction: Direction, otherwise: &str) -> Vec<String> {
    let mut rules: Vec<String> = [true, false]
        .map(|v4| {
            let first = members::slot(direction, v4, 1).name;
            let judge = judge_name(direction, v4);
            format!("meta priority set {} map @{first} goto {judge}", own_end(direction, v4))
        })
        .into();
    rules.push(otherwise.to_owned());
    rules
}

fn judge_name(direction: Direction, v4: bool) -> String {
    format!("{}.{}", direction.name(), family(v4))
}

/// Returns the chain that tries the policies of an isolated endpoint in turn, and refuses what none of them allows. An
/// endpoint may always reach itself, which it does through a Service.
fn judge(direction: Direction, v4: bool, slots: usize, has_admin: bool) -> Chain {
    let policies = format!("policies.{}", short(direction));
    let itself = members::itself(v4).name;
    let mut rules = vec![format!("{} . {} @{itself} goto pass.{}", source(v4), target(v4), short(direction))];
    if has_admin {
        rules.push(format!("jump {}", admin_name(direction, v4)));
    } else {
        // The number of the first policy was looked up on the way here.
        rules.push(format!("jump {policies}"));
    }
    let first = if has_admin { 1 } else { 2 };
    rules.extend((first..=slots).map(|slot| {
        let map = members::slot(direction, v4, slot).name;
        format!("meta priority set {} map @{map} jump {policies}", own_end(direction, v4))
    }));
    rules.push(format!("goto refuse.{}.{}", short(direction), family(v4)));
    chain(&judge_name(direction, v4), None, &rules)
}

fn admin_name(direction: Direction, v4: bool) -> String {
    format!("admin.{}.{}", short(direction), family(v4))
}

/// Returns the chain that tries the policies of the tier Admin in turn, until one of them decides or passes the decision on.
fn admin(direction: Direction, v4: bool, slots: usize) -> Chain {
    let mut rules = Vec::new();
    for slot in 1..=slots {
        let map = members::admin_slot(direction, v4, slot).name;
        let own = own_end(direction, v4);
        rules.push(format!("meta priority set {own} map @{map} jump policies.{}", short(direction)));
        rules.push(format!("meta priority {} return", handle(PASSED)));
    }
    chain(&admin_name(direction, v4), None, &rules)
}

/// Returns the chain that jumps to a policy by its number.
fn dispatch(policies: &Policies, direction: Direction) -> Chain {
    let mut elements: Vec<String> = policies
        .iter()
        .filter(|policy| policy.rules(direction).is_some())
        .map(|policy| format!("{} : jump {}", handle(policy.number), chain_of(policy, direction)))
        .collect();
    let cluster = policies.cluster().iter().filter(|policy| !policy.rules(direction).is_empty());
    elements.extend(
        cluster.map(|policy| {
            format!("{} : jump {}", handle(policy.number), cluster_chain_of(policy, direction))
        }),
    );
    if !policies.cluster().is_empty() {
        elements.push(format!("{} : goto pass.{}", handle(DEFAULT), short(direction)));
    }
    let rules = match elements.is_empty() {
        true => Vec::new(),
        false => vec![format!("meta priority vmap {{ {} }}", elements.join(", "))],
    };
    chain(&format!("policies.{}", short(direction)), None, &rules)
}

/// Formats a number as nft writes priorities.
fn handle(number: u32) -> String {
    format!("{:x}:{:x}", number >> 16, number & 0xffff)
}

fn policy_chain(policies: &Policies, policy: &Policy, direction: Direction) -> Option<Chain> {
    let merged = merge(policy.rules(direction)?);
    let rules = merged
        .iter()
        .flat_map(|(ports, peers)| conditions(policies, peers, ports, direction))
        .map(|(_, condition)| format!("{condition}goto pass.{}", short(direction)))
        .collect::<Vec<_>>();
    Some(chain(&chain_of(policy, direction), None, &rules))
}

/// Returns the chain of a ClusterNetworkPolicy, whose rules decide in their order.
fn cluster_chain(policies: &Policies, policy: &ClusterPolicy, direction: Direction) -> Chain {
    let mut rules = Vec::new();
    for found in policy.rules(direction) {
        for (ports, peers) in merge(std::slice::from_ref(&found.rule)) {
            for (fits, condition) in conditions(policies, &peers, &ports, direction) {
                rules.extend(verdicts(found.action, policy.tier, direction, fits, &condition));
            }
            // Rules about domain names only accept.
            rules.extend(admitted_by_name(policies, &peers, &ports, direction));
        }
    }
    chain(&cluster_chain_of(policy, direction), None, &rules)
}

/// Returns the rules for what an action does with packets that fit a condition of an address family.
fn verdicts(
    action: RuleAction,
    tier: Tier,
    direction: Direction,
    fits: Option<bool>,
    condition: &str,
) -> Vec<String> {
    let way = short(direction);
    match (action, tier) {
        // After the last tier, everything is allowed.
        (RuleAction::Accept, _) | (RuleAction::Pass, Tier::Baseline) => {
            vec![format!("{condition}goto pass.{way}")]
        }
        (RuleAction::Pass, Tier::Admin) => {
            vec![format!("{condition}meta priority set {} return", handle(PASSED))]
        }
        (RuleAction::Deny, _) => {
            let families = [true, false].into_iter().filter(|v4| fits.is_none_or(|fits| fits == *v4));
            let refuse = |v4: bool| match fits {
                Some(_) => format!("{condition}goto refuse.{way}.{}", family(v4)),
                None => format!("meta nfproto {} {condition}goto refuse.{way}.{}", nfproto(v4), family(v4)),
            };
            families.map(refuse).collect()
        }
    }
}

fn nfproto(v4: bool) -> &'static str {
    if v4 { "ipv4" } else { "ipv6" }
}

/// A part of a rule: the address family, `None` for both, and the text.
type Match = (Option<bool>, String);

/// Returns the conditions, one of which a packet has to fit.
fn conditions(policies: &Policies, peers: &Peers, ports: &Ports, direction: Direction) -> Vec<Match> {
    let peers = peer_matches(policies, peers, direction);
    let ports = port_matches(policies, ports);
    let mut found = Vec::new();
    for (peers_family, peer) in &peers {
        for (ports_family, port) in &ports {
            if peers_family.is_none() || ports_family.is_none() || peers_family == ports_family {
                found.push((peers_family.or(*ports_family), format!("{peer}{port}")));
            }
        }
    }
    found
}

/// Returns the rules that accept connections to what workloads were told for domain names, and those that were accepted so
/// before.
fn admitted_by_name(policies: &Policies, peers: &Peers, ports: &Ports, direction: Direction) -> Vec<String> {
    let mut rules = Vec::new();
    for (_, key) in peers.names.iter().filter_map(|place| policies.pattern(*place)) {
        for (family, port) in port_matches(policies, ports) {
            for v4 in [true, false].into_iter().filter(|v4| family.is_none_or(|family| family == *v4)) {
                let (pass, kept) = (format!("goto pass.{}", short(direction)), key.kept(v4));
                let ends = format!("{} . {}", source(v4), target(v4));
                let fits = format!("{} @{} {port}", other_end(direction, v4), key.set(v4));
                // A full set ends the rule, and not the connection.
                rules.push(format!("{fits}update @{kept} {{ {ends} }}"));
                rules.push(format!("{fits}{pass}"));
                rules.push(format!("ct state established,related {ends} @{kept} {port}{pass}"));
            }
        }
    }
    rules
}

/// Returns one of several values as nft writes it: a set if there are more than one.
fn one_of(values: &[String]) -> String {
    match values {
        [value] => value.clone(),
        values => format!("{{ {} }}", values.join(", ")),
    }
}

fn peer_matches(policies: &Policies, peers: &Peers, direction: Direction) -> Vec<Match> {
    if peers.everybody {
        return vec![(None, String::new())];
    }
    let mut matches = Vec::new();
    for place in &peers.pods {
        for v4 in [true, false] {
            if let Some(Set { name, .. }) = members::pods(policies, *place, v4) {
                matches.push((Some(v4), format!("{} @{name} ", other_end(direction, v4))));
            }
        }
    }
    for (v4, ranges) in [(true, &peers.v4), (false, &peers.v6)] {
        if ranges.is_whole(v4) {
            // nft takes no prefix of length 0.
            matches.push((Some(v4), format!("meta nfproto {} ", nfproto(v4))));
        } else if !ranges.is_empty() {
            let addresses = one_of(&ranges.addresses(v4));
            matches.push((Some(v4), format!("{} {addresses} ", other_end(direction, v4))));
        }
    }
    matches
}

fn port_matches(policies: &Policies, ports: &Ports) -> Vec<Match> {
    if ports.any {
        return vec![(None, String::new())];
    }
    let mut matches = Vec::new();
    for protocol in &ports.protocols {
        matches.push((None, format!("meta l4proto {} ", protocol_name(*protocol))));
    }
    for (protocol, numbers) in &ports.numbers {
        let (protocol, numbers) = (protocol_name(*protocol), one_of(&numbers.ports()));
        matches.push((None, format!("meta l4proto {protocol} ct reply proto-src {numbers} ")));
    }
    for place in &ports.named {
        for v4 in [true, false] {
            let set = members::port(policies, *place, v4).zip(policies.port(*place));
            if let Some((Set { name, .. }, (_, protocol))) = set {
                let protocol = protocol_name(protocol);
                let text = format!("meta l4proto {protocol} {} . ct reply proto-src @{name} ", target(v4));
                matches.push((Some(v4), text));
            }
        }
    }
    matches
}

/// Returns the rules that accept a connection and mark it, so that its later packets are accepted too. A mark of
/// another program is kept; then each packet is judged.
fn approve() -> Vec<String> {
    let set = format!("ct mark set meta nfproto map @{}", GENERATION.name);
    vec![
        "meta priority set 0".to_owned(),
        format!("ct mark & {MARK_MASK:#x} == {MARK:#x} {set} accept"),
        format!("ct mark 0 {set}"),
        "accept".to_owned(),
    ]
}

/// Returns the rules for a TCP connection that was not tracked from its beginning. It is unknown which end opened it,
/// so a possible answer of an isolated endpoint must not count as a new connection: it is rejected with a TCP reset.
/// The other end then learns that the connection is closed, or sends a packet itself, which is judged.
fn midstream() -> Vec<String> {
    let mut rules = Vec::new();
    for (direction, end) in [(Direction::Ingress, "saddr"), (Direction::Egress, "daddr")] {
        for v4 in [true, false] {
            let first = members::slot(direction, v4, 1).name;
            rules.push(format!("meta priority set {} {end} map @{first} reject with tcp reset", ip(v4)));
        }
    }
    rules.push("goto from".to_owned());
    rules
}

/// Returns the rules for packets that belong to no tracked connection: those of isolated endpoints are counted and
/// dropped.
fn stateless() -> Vec<String> {
    let mut rules = Vec::new();
    for (direction, end) in [(Direction::Ingress, "daddr"), (Direction::Egress, "saddr")] {
        for v4 in [true, false] {
            let first = members::slot(direction, v4, 1).name;
            let (end, counted) = (format!("{} {end}", ip(v4)), counted(direction, v4));
            rules.push(format!("meta priority set {end} map @{first} update @{counted} {{ {end} }} drop"));
        }
    }
    rules
}

/// Returns the chain that counts, records and refuses a packet.
fn refuse(direction: Direction, v4: bool) -> Chain {
    let counted = counted(direction, v4);
    let remembered = remembered(direction, v4);
    let ends = format!("{} . {} . meta l4proto", source(v4), target(v4));
    let mut rules = vec![format!("update @{counted} {{ {} }}", own_end(direction, v4))];
    rules.extend(PROTOCOLS.map(|protocol| {
        let protocol = protocol_name(protocol);
        format!("meta l4proto {protocol} update @{remembered} {{ {ends} . ct reply proto-src }}")
    }));
    let all = PROTOCOLS.map(protocol_name).join(", ");
    rules.push(format!("meta l4proto != {{ {all} }} update @{remembered} {{ {ends} . 0 }}"));
    rules.push("goto refuse".to_owned());
    chain(&format!("refuse.{}.{}", short(direction), family(v4)), None, &rules)
}
