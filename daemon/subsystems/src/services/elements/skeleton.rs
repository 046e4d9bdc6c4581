//! The table `inet ovl-services`. The cost of a connection does not depend on how many Services there are: the
//! first packet looks up how many backends are behind its destination, then one of them; the rest is
//! connection tracking's.
//!
//! Numbers go through the packet's priority: from a map to the chain for so many backends, and from a random number
//! to a backend. A map of verdicts would be simpler, but the kernel walks through all of one with each change.

use std::collections::BTreeSet;

use ovl_dataplane::nft::{Chain, Data, Object, Set, Shape, Skeleton, Table, Type};

const fn set(name: &'static str, key: &'static [Type], data: Data, ranges: bool) -> Set {
    Set::new(Table::Services, name, Shape { key, data, ranges })
}

const COUNT: Data = Data::Fields(&[Type::Priority]);
const PORT4: &[Type] = &[Type::Ipv4, Type::Protocol, Type::Port];
const PORT6: &[Type] = &[Type::Ipv6, Type::Protocol, Type::Port];
const TARGET4: Data = Data::Fields(&[Type::Ipv4, Type::Port]);
const TARGET6: Data = Data::Fields(&[Type::Ipv6, Type::Port]);

/// How many backends a port at an address has for endpoints.
pub(super) static INSIDE: [Set; 2] =
    [set("inside4", PORT4, COUNT, false), set("inside6", PORT6, COUNT, false)];
/// The same for everybody else, where that is another number, or they are others.
pub(super) static OUTSIDE: [Set; 2] =
    [set("outside4", PORT4, COUNT, false), set("outside6", PORT6, COUNT, false)];
/// A port at an address, and the number of the backend.
pub(super) static BACKENDS: [Set; 2] = [
    set("backends4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("backends6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// How many backends a node port has.
pub(super) static PORTS: [Set; 2] = [
    set("ports4", &[Type::Protocol, Type::Port], COUNT, false),
    set("ports6", &[Type::Protocol, Type::Port], COUNT, false),
];
/// How many of a node port's backends are on switched networks of this host: what other hosts pass on is for them.
pub(super) static RELAYED: [Set; 2] = [
    set("relayed4", &[Type::Protocol, Type::Port], COUNT, false),
    set("relayed6", &[Type::Protocol, Type::Port], COUNT, false),
];
/// The other hosts.
pub(super) static HOSTS: [Set; 2] =
    [set("hosts4", &[Type::Ipv4], Data::None, false), set("hosts6", &[Type::Ipv6], Data::None, false)];
/// A node port, and the number of the backend.
pub(super) static NODES: [Set; 2] = [
    set("nodes4", &[Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("nodes6", &[Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// Backends of this host that reach themselves.
pub(super) static HAIRPIN: [Set; 2] = [
    set("hairpin4", &[Type::Ipv4, Type::Ipv4], Data::None, false),
    set("hairpin6", &[Type::Ipv6, Type::Ipv6], Data::None, false),
];
/// The own address of this host on each network.
pub(super) static GATEWAYS: [Set; 2] = [
    set("gateways4", &[Type::Ipv4], Data::Fields(&[Type::Ipv4]), true),
    set("gateways6", &[Type::Ipv6], Data::Fields(&[Type::Ipv6]), true),
];
/// The same of routed networks, whose endpoints on other hosts answer to it; and of other hosts that connections are
/// passed on to.
pub(super) static ROUTED: [Set; 2] = [
    set("routed4", &[Type::Ipv4], Data::Fields(&[Type::Ipv4]), true),
    set("routed6", &[Type::Ipv6], Data::Fields(&[Type::Ipv6]), true),
];
/// All networks.
pub(super) static OURS: [Set; 2] =
    [set("ours4", &[Type::Ipv4], Data::None, true), set("ours6", &[Type::Ipv6], Data::None, true)];

/// A port at an address with affinity, and the number of the backend: its identity, which stays.
pub(super) static IDS: [Set; 2] = [
    set("ids4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], COUNT, false),
    set("ids6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], COUNT, false),
];
/// The backend of an identity.
pub(super) static STAY: [Set; 2] = [
    set("stay4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("stay6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// The same of node ports.
pub(super) static NODE_IDS: [Set; 2] = [
    set("node_ids4", &[Type::Protocol, Type::Port, Type::Priority], COUNT, false),
    set("node_ids6", &[Type::Protocol, Type::Port, Type::Priority], COUNT, false),
];
pub(super) static NODE_STAY: [Set; 2] = [
    set("node_stay4", &[Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("node_stay6", &[Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];

/// So many clients are remembered for each family, at addresses and at node ports.
const CLIENTS: u32 = 1 << 20;

/// Ports with affinity: how long clients stay, whose backends they are, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sticky {
    pub(super) seconds: u32,
    pub(super) kind: BackendKind,
    pub(super) count: u32,
}

/// Whose backends are numbered, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum BackendKind {
    /// Endpoints', at an address.
    Of,
    /// All others', at an address: numbered from [`APART`].
    Others,
    /// At a node port.
    Nodes,
    /// At a node port, for what other hosts pass on: numbered from [`APART`].
    Relayed,
}

/// All of them.
const KINDS: [BackendKind; 4] =
    [BackendKind::Of, BackendKind::Others, BackendKind::Nodes, BackendKind::Relayed];

impl BackendKind {
    fn name(self) -> &'static str {
        match self {
            Self::Of => "of",
            Self::Others => "others",
            Self::Nodes => "nodes",
            Self::Relayed => "relayed",
        }
    }

    /// Whether it is about node ports.
    pub(super) fn is_node(self) -> bool {
        matches!(self, Self::Nodes | Self::Relayed)
    }

    /// The number of the first backend.
    pub(super) fn first(self) -> u32 {
        match self {
            Self::Of | Self::Nodes => 0,
            Self::Others | Self::Relayed => APART,
        }
    }

    /// The same in a rule.
    fn offset(self) -> String {
        if self.first() == 0 { String::new() } else { format!(" offset {}", self.first()) }
    }
}

/// The most backends that a port with affinity has.
pub(super) const MOST_STICKY: usize = 0xfff;

impl Sticky {
    /// As it stands in maps.
    pub(super) fn number(self) -> u32 {
        1 << 31 | (self.seconds & 0x1_ffff) << 14 | (self.kind as u32) << 12 | self.count
    }

    fn chain(self) -> String {
        format!("stay_{}_{}_{}", self.seconds, self.kind.name(), self.count)
    }
}

/// The number of backends without affinity, as it stands in maps.
pub(super) fn number(kind: BackendKind, count: u32) -> u32 {
    (kind as u32) << 16 | count
}

fn family(n: usize) -> u8 {
    if n == 0 { 4 } else { 6 }
}

/// There are no backends: refused at once.
pub(super) const REFUSE: u32 = 0x10 << 16;
/// There are some, and none here: dropped, so that a load balancer goes elsewhere.
pub(super) const DROP: u32 = 0x20 << 16;
/// Where the numbers of backends for others begin.
pub(super) const APART: u32 = 1 << 16;

/// So many backends have chains whether there are Services that have so many or not.
pub(super) const ALWAYS: u32 = 16;

const OUR_DEVICES: &str = "{ \"ovb-*\", \"ove-*\", \"ovx-*\", \"ovt-*\" }";

/// With chains for these numbers of backends, and these ports with affinity.
pub(super) fn skeleton(counts: &BTreeSet<u32>, sticky: &BTreeSet<Sticky>) -> Skeleton {
    let counts: Vec<u32> =
        (1..=ALWAYS).chain(counts.iter().copied().filter(|count| *count > ALWAYS)).collect();
    let mut sets: Vec<Set> = Vec::new();
    for pair in
        [&INSIDE, &OUTSIDE, &BACKENDS, &PORTS, &NODES, &RELAYED, &HOSTS, &HAIRPIN, &GATEWAYS, &ROUTED, &OURS]
    {
        sets.extend_from_slice(pair);
    }
    let mut chains =
        vec![chain("refuse", vec!["meta l4proto tcp reject with tcp reset".to_owned(), "reject".to_owned()])];
    let mut objects = Vec::new();
    if !sticky.is_empty() {
        for pair in [&IDS, &STAY, &NODE_IDS, &NODE_STAY] {
            sets.extend_from_slice(pair);
        }
        objects.extend(each(clients));
        chains.extend(sticky.iter().flat_map(|sticky| staying(*sticky)));
    }
    chains.extend(counts.iter().flat_map(|count| of_count(*count)));
    chains.push(pick(&counts, sticky));
    let look = |sets: &'static [Set; 2]| {
        each(move |ip, n| {
            let set = &sets[n].name;
            vec![format!("meta priority set {ip} daddr . meta l4proto . th dport map @{set} goto pick")]
        })
    };
    chains.push(chain(
        "nodes",
        each(|ip, n| {
            let loopback = if n == 0 { "127.0.0.0/8" } else { "::1" };
            let [ports, relayed, hosts] = [&PORTS, &RELAYED, &HOSTS].map(|sets| &sets[n].name);
            let to = format!("{ip} daddr != {loopback} fib daddr type local");
            let look = "meta priority set meta l4proto . th dport map";
            vec![
                format!("{ip} saddr @{hosts} {to} {look} @{relayed} goto pick"),
                format!("{to} {look} @{ports} goto pick"),
            ]
        }),
    ));
    let then = |mut rules: Vec<String>, last: &str| {
        rules.push(last.to_owned());
        rules
    };
    chains.push(chain("inside", then(look(&INSIDE), "goto nodes")));
    chains.push(chain("outside", then([look(&OUTSIDE), look(&INSIDE)].concat(), "goto nodes")));
    // Before others' translations at the usual priority.
    let hooked = |name: &str, hook: &str, rules| Chain {
        hook: Some(format!("{hook}; policy accept;")),
        ..chain(name, rules)
    };
    chains.push(hooked(
        "prerouting",
        "type nat hook prerouting priority dstnat - 5",
        vec![format!("iifname {OUR_DEVICES} goto inside"), "goto outside".to_owned()],
    ));
    chains.push(hooked("output", "type nat hook output priority -105", vec!["goto outside".to_owned()]));
    // Who has passed something on by the way that it came would tell its sender of a shorter one.
    chains.push(hooked(
        "redirects",
        "type filter hook output priority filter",
        vec!["icmp type redirect ct status dnat drop".to_owned()],
    ));
    chains.push(hooked("postrouting", "type nat hook postrouting priority srcnat - 5", postrouting()));
    Skeleton { sets, objects, chains }
}

fn chain(name: &str, rules: Vec<String>) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules }
}

fn each<T>(rules: impl Fn(&str, usize) -> Vec<T>) -> Vec<T> {
    [("ip", 0), ("ip6", 1)].into_iter().flat_map(|(ip, n)| rules(ip, n)).collect()
}

/// Each of so many backends as often as the others.
fn of_count(count: u32) -> [Chain; 4] {
    KINDS.map(|kind| {
        let rules = each(|ip, n| {
            let (sets, at) =
                if kind.is_node() { (&NODES, String::new()) } else { (&BACKENDS, format!("{ip} daddr . ")) };
            let (set, protocol, offset) =
                (&sets[n].name, if n == 0 { "ipv4" } else { "ipv6" }, kind.offset());
            vec![format!(
                "meta nfproto {protocol} meta priority set numgen random mod {count}{offset} \
                 dnat {ip} to {at}meta l4proto . th dport . meta priority map @{set}"
            )]
        });
        chain(&format!("{}_{count}", kind.name()), rules)
    })
}

/// From a number to its chain.
fn pick(counts: &[u32], sticky: &BTreeSet<Sticky>) -> Chain {
    let show = |number: u32| format!("{:x}:{:x}", number >> 16, number & 0xffff);
    let mut map = vec![format!("{} : goto refuse", show(REFUSE)), format!("{} : drop", show(DROP))];
    for count in counts {
        for kind in KINDS {
            map.push(format!("{} : goto {}_{count}", show(number(kind, *count)), kind.name()));
        }
    }
    map.extend(sticky.iter().map(|sticky| format!("{} : goto {}", show(sticky.number()), sticky.chain())));
    chain("pick", vec![format!("meta priority vmap {{ {} }}", map.join(", "))])
}

/// What a client and where it goes are remembered by, at an address or at a node port. `nft` has room for 16 bytes: of
/// IPv6 the lower 96 bits of the client's address, and the lower 32 of the Service's, or the port.
fn client(n: usize, node: bool) -> &'static str {
    match (n, node) {
        (0, false) => "ip saddr . ip daddr",
        (0, true) => "ip saddr . meta l4proto . th dport",
        (_, false) => "@nh,96,96 . @nh,288,32",
        (_, true) => "@nh,96,96 . th dport",
    }
}

/// Clients that have been here, and the identities of their backends. Packets fill them.
fn clients(_: &str, n: usize) -> Vec<Object> {
    let map = |name: &str, node| Object {
        kind: "map",
        name: format!("{name}{}", family(n)),
        body: format!(
            "typeof {} : meta priority\n\t\tsize {CLIENTS}\n\t\tflags dynamic,timeout",
            client(n, node)
        ),
    };
    vec![map("clients", false), map("node_clients", true)]
}

/// A client that has been here before goes where it went, as long as that is a backend; else it is remembered where
/// it goes. An update leaves what is there and renews its time, so what leads nowhere is deleted first.
fn staying(sticky: Sticky) -> [Chain; 2] {
    let Sticky { seconds, kind, count } = sticky;
    let offset = kind.offset();
    let parts = |ip: &str, n: usize| {
        let node = kind.is_node();
        let client = client(n, node);
        let (prefix, at) = if node { ("node_", String::new()) } else { ("", format!("{ip} daddr . ")) };
        let family = family(n);
        let clients = format!("{prefix}clients{family}");
        let update = format!("update @{clients} {{ {client} timeout {seconds}s : meta priority }}");
        let delete = format!("delete @{clients} {{ {client} : meta priority }}");
        let nfproto = if n == 0 { "meta nfproto ipv4" } else { "meta nfproto ipv6" };
        let known = format!("{nfproto} meta priority set {client} map @{clients}");
        let fresh = format!(
            "{nfproto} meta priority set numgen random mod {count}{offset} \
             meta priority set {at}meta l4proto . th dport . meta priority map @{prefix}ids{family}"
        );
        let go =
            format!("dnat {ip} to {at}meta l4proto . th dport . meta priority map @{prefix}stay{family}");
        (known, fresh, update, delete, go, nfproto)
    };
    let name = sticky.chain();
    let follow = format!("{name}_follow");
    let jump = follow.clone();
    [
        chain(
            &follow,
            each(|ip, n| {
                let (_, _, update, delete, go, nfproto) = parts(ip, n);
                vec![format!("{nfproto} {update}"), format!("{nfproto} {go}"), format!("{nfproto} {delete}")]
            }),
        ),
        chain(
            &name,
            each(|ip, n| {
                let (known, fresh, update, _, go, _) = parts(ip, n);
                vec![format!("{known} jump {jump}"), format!("{fresh} {update} {go}")]
            }),
        ),
    ]
}

/// Sources are kept but for a backend that reaches itself, and for what comes from outside, or from this host,
/// for a backend on another host, which would answer by another way.
fn postrouting() -> Vec<String> {
    each(|ip, n| {
        let [hairpin, gateways, routed, ours] =
            [&HAIRPIN, &GATEWAYS, &ROUTED, &OURS].map(|sets| sets[n].name.clone());
        vec![
            format!(
                "ct status dnat {ip} saddr . {ip} daddr @{hairpin} snat {ip} to {ip} daddr map @{gateways}"
            ),
            format!(
                "ct status dnat oifname != \"ove-*\" {ip} saddr != @{ours} snat {ip} to {ip} daddr map @{routed}"
            ),
        ]
    })
}
