//! The sets and chains of the table `inet ovl-services`.
//!
//! The cost of a connection does not depend on the number of Services: its first packet looks up the number of backends
//! of its destination, and then one of them; connection tracking translates the rest.
//!
//! Numbers are passed on in the packet's priority: from a map to the chain for a number of backends, and from a random
//! number to a backend. A map of verdicts would be simpler, but the kernel walks through all of it at each change.
//!
//! The module owns no state. Begin to read at [`skeleton`].

use std::collections::BTreeSet;

use ovl_dataplane::nft::{Chain, Data, Object, Set, Shape, Skeleton, Table, Type};

use crate::marks::{FROM_HOST, OWN_SOCKET};

const fn set(name: &'static str, key: &'static [Type], data: Data, ranges: bool) -> Set {
    Set::new(Table::Services, name, Shape { key, data, ranges })
}

const COUNT: Data = Data::Fields(&[Type::Priority]);
const PORT4: &[Type] = &[Type::Ipv4, Type::Protocol, Type::Port];
const PORT6: &[Type] = &[Type::Ipv6, Type::Protocol, Type::Port];
const TARGET4: Data = Data::Fields(&[Type::Ipv4, Type::Port]);
const TARGET6: Data = Data::Fields(&[Type::Ipv6, Type::Port]);

/// Maps a port at an address to its number of backends, for clients that are endpoints.
pub(super) static INSIDE: [Set; 2] =
    [set("inside4", PORT4, COUNT, false), set("inside6", PORT6, COUNT, false)];
/// Maps a port at an address to its number of backends for all other clients, if their backends differ.
pub(super) static OUTSIDE: [Set; 2] =
    [set("outside4", PORT4, COUNT, false), set("outside6", PORT6, COUNT, false)];
/// Maps a port at an address and the number of a backend to the backend.
pub(super) static BACKENDS: [Set; 2] = [
    set("backends4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("backends6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// Maps a node port to its number of backends.
pub(super) static PORTS: [Set; 2] = [
    set("ports4", &[Type::Protocol, Type::Port], COUNT, false),
    set("ports6", &[Type::Protocol, Type::Port], COUNT, false),
];
/// Maps a port at an external address to its number of backends for programs of this host, if it has the policy `Local`
/// and their backends differ.
pub(super) static OWN: [Set; 2] = [set("own4", PORT4, COUNT, false), set("own6", PORT6, COUNT, false)];
/// Maps a node port with the policy `Local` to its number of backends for endpoints and programs of this host, if their
/// backends differ.
pub(super) static OWN_PORTS: [Set; 2] = [
    set("own_ports4", &[Type::Protocol, Type::Port], COUNT, false),
    set("own_ports6", &[Type::Protocol, Type::Port], COUNT, false),
];
/// Maps a node port to its number of backends on switched networks of this host. Remote hosts relay connections to
/// them.
pub(super) static RELAYED: [Set; 2] = [
    set("relayed4", &[Type::Protocol, Type::Port], COUNT, false),
    set("relayed6", &[Type::Protocol, Type::Port], COUNT, false),
];
/// Addresses of LoadBalancers. The host that announces one has it on a device.
pub(super) static BALANCERS: [Set; 2] = [
    set("balancers4", &[Type::Ipv4], Data::None, false),
    set("balancers6", &[Type::Ipv6], Data::None, false),
];
/// Ports at addresses of LoadBalancers that let only some sources in.
pub(super) static GUARDED: [Set; 2] =
    [set("guarded4", PORT4, Data::None, false), set("guarded6", PORT6, Data::None, false)];
/// The sources that these let in.
pub(super) static SOURCES: [Set; 2] = [
    set("sources4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Ipv4], Data::None, true),
    set("sources6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Ipv6], Data::None, true),
];
/// The underlay addresses of remote hosts.
pub(super) static HOSTS: [Set; 2] =
    [set("hosts4", &[Type::Ipv4], Data::None, false), set("hosts6", &[Type::Ipv6], Data::None, false)];
/// Maps a node port and the number of a backend to the backend.
pub(super) static NODES: [Set; 2] = [
    set("nodes4", &[Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("nodes6", &[Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// Local backends, each with itself: hairpin traffic.
pub(super) static HAIRPIN: [Set; 2] = [
    set("hairpin4", &[Type::Ipv4, Type::Ipv4], Data::None, false),
    set("hairpin6", &[Type::Ipv6, Type::Ipv6], Data::None, false),
];
/// Maps each subnet to the local host's address on it.
pub(super) static GATEWAYS: [Set; 2] = [
    set("gateways4", &[Type::Ipv4], Data::Fields(&[Type::Ipv4]), true),
    set("gateways6", &[Type::Ipv6], Data::Fields(&[Type::Ipv6]), true),
];
/// Maps each subnet of a routed network, and each remote host that connections are relayed to, to the local host's
/// address that answers are sent to.
pub(super) static ROUTED: [Set; 2] = [
    set("routed4", &[Type::Ipv4], Data::Fields(&[Type::Ipv4]), true),
    set("routed6", &[Type::Ipv6], Data::Fields(&[Type::Ipv6]), true),
];
/// Backends that are on no network: a host's address, or one outside of the cluster.
pub(super) static ELSEWHERE: [Set; 2] =
    [set("elsewhere4", PORT4, Data::None, false), set("elsewhere6", PORT6, Data::None, false)];
/// The prefixes of all networks.
pub(super) static OURS: [Set; 2] =
    [set("ours4", &[Type::Ipv4], Data::None, true), set("ours6", &[Type::Ipv6], Data::None, true)];

/// The ranges of cluster addresses.
pub(super) static RANGES: [Set; 2] =
    [set("ranges4", &[Type::Ipv4], Data::None, true), set("ranges6", &[Type::Ipv6], Data::None, true)];

/// Maps a port at an address with affinity and the number of a backend to the backend's identity, which is stable.
pub(super) static IDS: [Set; 2] = [
    set("ids4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], COUNT, false),
    set("ids6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], COUNT, false),
];
/// Maps a port at an address with affinity and an identity to the backend.
pub(super) static STAY: [Set; 2] = [
    set("stay4", &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("stay6", &[Type::Ipv6, Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];
/// Maps a node port with affinity and the number of a backend to the backend's identity.
pub(super) static NODE_IDS: [Set; 2] = [
    set("node_ids4", &[Type::Protocol, Type::Port, Type::Priority], COUNT, false),
    set("node_ids6", &[Type::Protocol, Type::Port, Type::Priority], COUNT, false),
];
/// Maps a node port with affinity and an identity to the backend.
pub(super) static NODE_STAY: [Set; 2] = [
    set("node_stay4", &[Type::Protocol, Type::Port, Type::Priority], TARGET4, false),
    set("node_stay6", &[Type::Protocol, Type::Port, Type::Priority], TARGET6, false),
];

/// The maximum number of clients with affinity, for each address family, at addresses and at node ports.
const CLIENTS: u32 = 1 << 20;

/// A kind of affinity: its timeout in seconds, the kind of backends, and their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sticky {
    pub(super) seconds: u32,
    pub(super) kind: BackendKind,
    pub(super) count: u32,
}

/// The clients and the kind of port for which backends are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum BackendKind {
    /// Clients that are endpoints, at an address.
    Inside,
    /// All other clients, at an address. Numbers begin at [`SECOND_RANGE`].
    Outside,
    /// Clients at a node port.
    NodePort,
    /// Connections at a node port whose backends differ: those that remote hosts relay, or with the policy `Local` those
    /// of endpoints and programs of this host. Numbers begin at [`SECOND_RANGE`].
    Apart,
    /// Programs of this host, at an external address with the policy `Local`. Numbers begin at [`THIRD_RANGE`].
    Own,
}

/// All kinds.
const KINDS: [BackendKind; 5] =
    [BackendKind::Inside, BackendKind::Outside, BackendKind::NodePort, BackendKind::Apart, BackendKind::Own];

impl BackendKind {
    fn name(self) -> &'static str {
        match self {
            Self::Inside => "of",
            Self::Outside => "others",
            Self::NodePort => "nodes",
            Self::Apart => "apart",
            Self::Own => "own",
        }
    }

    /// Whether the kind is for node ports.
    pub(super) fn is_node(self) -> bool {
        matches!(self, Self::NodePort | Self::Apart)
    }

    /// Returns the number of the first backend.
    pub(super) fn first(self) -> u32 {
        match self {
            Self::Inside | Self::NodePort => 0,
            Self::Outside | Self::Apart => SECOND_RANGE,
            Self::Own => THIRD_RANGE,
        }
    }

    /// Returns the offset of the first backend, as part of a rule.
    fn offset(self) -> String {
        if self.first() == 0 { String::new() } else { format!(" offset {}", self.first()) }
    }
}

/// The maximum number of backends of a port with affinity.
pub(super) const MAX_STICKY: usize = 0xfff;

impl Sticky {
    /// Returns the number that selects the chain in maps. It is larger than all that select another chain.
    pub(super) fn number(self) -> u32 {
        (self.kind as u32 + 1) << 29 | (self.seconds & 0x1_ffff) << 12 | self.count
    }

    fn chain(self) -> String {
        format!("stay_{}_{}_{}", self.seconds, self.kind.name(), self.count)
    }
}

/// Returns the number that selects the chain for a number of backends without affinity in maps.
pub(super) fn number(kind: BackendKind, count: u32) -> u32 {
    (kind as u32) << 16 | count
}

/// Returns the kind, the number of backends, and whether there is affinity, of a number that [`number`] or
/// [`Sticky::number`] returned. `None` if it is neither.
pub(super) fn kind_and_count(number: u32) -> Option<(BackendKind, u32, bool)> {
    match number >> 29 {
        0 => Some((*KINDS.get((number >> 16) as usize)?, number & 0xffff, false)),
        kind => Some((*KINDS.get(kind as usize - 1)?, number & MAX_STICKY as u32, true)),
    }
}

/// The number for a port without backends: the connection is refused.
pub(super) const REFUSE: u32 = 0x10 << 16;
/// The number for a port with backends on other hosts only: the packet is dropped, so that a load balancer tries
/// another host.
pub(super) const DROP: u32 = 0x20 << 16;
/// The first number of backends of the second kind that shares a map.
pub(super) const SECOND_RANGE: u32 = 1 << 16;
/// The first number of backends of the third kind that shares a map.
pub(super) const THIRD_RANGE: u32 = 2 << 16;

/// Chains for up to this number of backends always exist.
pub(super) const ALWAYS: u32 = 16;

/// Devices of ovld from which packets arrive.
const OUR_DEVICES: &str = "{ \"ovb-*\", \"ove-*\", \"ovx-*\", \"ovt-*\" }";

/// Returns the table without elements, with chains for these numbers of backends and these kinds of affinity. `guarded`:
/// there are ports that let only some sources in.
pub(super) fn skeleton(counts: &BTreeSet<u32>, sticky: &BTreeSet<Sticky>, guarded: bool) -> Skeleton {
    let counts: Vec<u32> =
        (1..=ALWAYS).chain(counts.iter().copied().filter(|count| *count > ALWAYS)).collect();
    let mut sets: Vec<Set> = Vec::new();
    for pair in [
        &INSIDE, &OUTSIDE, &BACKENDS, &PORTS, &NODES, &OWN, &OWN_PORTS, &RELAYED, &BALANCERS, &HOSTS,
        &HAIRPIN, &GATEWAYS, &ROUTED, &ELSEWHERE, &OURS, &RANGES, &GUARDED, &SOURCES,
    ] {
        sets.extend_from_slice(pair);
    }
    let mut chains =
        vec![chain("refuse", vec!["meta l4proto tcp reject with tcp reset".to_owned(), "reject".to_owned()])];
    let mut objects = Vec::new();
    if !sticky.is_empty() {
        for pair in [&IDS, &STAY, &NODE_IDS, &NODE_STAY] {
            sets.extend_from_slice(pair);
        }
        objects.extend(clients());
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
    let local = |ip: &str, n: usize| {
        let loopback = if n == 0 { "127.0.0.0/8" } else { "::1" };
        format!("{ip} daddr != {loopback} fib daddr type local")
    };
    let port = "meta priority set meta l4proto . th dport map";
    chains.push(chain(
        "nodes",
        each(|ip, n| {
            let [ports, relayed, hosts] = [&PORTS, &RELAYED, &HOSTS].map(|sets| &sets[n].name);
            let to = local(ip, n);
            vec![
                format!("{ip} saddr @{hosts} {to} {port} @{relayed} goto pick"),
                format!("{to} {port} @{ports} goto pick"),
            ]
        }),
    ));
    // What comes from this host gets through its node ports in any case, as in Kubernetes.
    let mut nearby = each(|ip, n| vec![format!("{} {port} @{} goto pick", local(ip, n), OWN_PORTS[n].name)]);
    nearby.push("goto nodes".to_owned());
    chains.push(chain("nearby", nearby));
    // At the host's own addresses there are only node ports. Those of LoadBalancers that it announces are the exception.
    let first = |nodes: &str, sets: &[&'static [Set; 2]]| {
        let mut rules = each(|ip, n| {
            let balancers = &BALANCERS[n].name;
            vec![format!("{ip} daddr != @{balancers} fib daddr type local goto {nodes}")]
        });
        rules.extend(sets.iter().copied().flat_map(look));
        rules.push(format!("goto {nodes}"));
        rules
    };
    chains.push(chain("inside", first("nearby", &[&INSIDE])));
    chains.push(chain("outside", first("nodes", &[&OUTSIDE, &INSIDE])));
    chains.push(chain("own", first("nearby", &[&OWN, &OUTSIDE, &INSIDE])));
    let guards = |rules: Vec<String>| {
        let guard = |ip: &str, n: usize| {
            let at = format!("{ip} daddr . meta l4proto . th dport");
            vec![format!("{at} @{} {at} . {ip} saddr != @{} drop", GUARDED[n].name, SOURCES[n].name)]
        };
        let guards = if guarded { each(guard) } else { Vec::new() };
        guards.into_iter().chain(rules).collect::<Vec<_>>()
    };
    // Before address translation of other programs at the usual priority.
    let hooked = |name: &str, hook: &str, rules| Chain {
        hook: Some(format!("{hook}; policy accept;")),
        ..chain(name, rules)
    };
    chains.push(hooked(
        "prerouting",
        "type nat hook prerouting priority dstnat - 5",
        guards(vec![format!("iifname {OUR_DEVICES} goto inside"), "goto outside".to_owned()]),
    ));
    chains.push(hooked(
        "output",
        "type nat hook output priority -105",
        guards(vec![format!("meta mark & {OWN_SOCKET:#x} != 0 return"), "goto own".to_owned()]),
    ));
    // After address translation of other programs: what none of them has translated is refused, rather than sent by the
    // default route. An address of this host is another program's, such as that of kube-proxy in IPVS mode.
    let unused =
        each(|ip, n| vec![format!("{ip} daddr @{} fib daddr type != local goto refuse", RANGES[n].name)]);
    let mut unused_own = unused.clone();
    unused_own.insert(0, format!("meta mark & {OWN_SOCKET:#x} != 0 return"));
    chains.push(hooked("unused", "type nat hook prerouting priority dstnat + 10", unused));
    chains.push(hooked("unused_own", "type nat hook output priority -90", unused_own));
    // A host that relays a packet back by its input interface sends a redirect. The sender must not get it. The mark
    // is for packets whose output interface was not yet an overlay network's when they passed the base table.
    chains.push(hooked(
        "translated",
        "type filter hook output priority filter",
        vec![
            "icmp type redirect ct status dnat drop".to_owned(),
            format!("ct status dnat meta skuid >= 0 meta mark set meta mark | {FROM_HOST:#x}"),
        ],
    ));
    chains.push(hooked("postrouting", "type nat hook postrouting priority srcnat - 5", postrouting()));
    Skeleton { sets, objects, chains }
}

fn chain(name: &str, rules: Vec<String>) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules }
}

/// Returns the rules for both address families.
fn each<T>(rules: impl Fn(&str, usize) -> Vec<T>) -> Vec<T> {
    [("ip", 0), ("ip6", 1)].into_iter().flat_map(|(ip, n)| rules(ip, n)).collect()
}

/// Returns the chains that choose one of `count` backends with equal probability.
fn of_count(count: u32) -> [Chain; KINDS.len()] {
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

/// Returns the chain that goes from a number to the chain that it selects.
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

/// Packets whose clients are in one map: the map's suffix, a match, and the keys of a client and its destination at an
/// address and at a node port.
#[derive(Debug, Clone, Copy)]
struct Clients {
    ip: &'static str,
    family: u8,
    suffix: &'static str,
    of: &'static str,
    at_address: &'static str,
    at_node: &'static str,
}

/// The keys have the port, because Services can share an address: one of them must not replace what another one recorded.
/// `nft` limits a key to 16 bytes. So for IPv6 there is a map for each protocol, and a key has only the lower 32 bits of the
/// Service's address and the bits 48 to 79 and 96 to 127 of the client's (at a node port, 32 to 127).
const CLIENTS_OF: [Clients; 4] = {
    const V6: Clients = Clients {
        ip: "ip6",
        family: 6,
        suffix: "",
        of: "",
        at_address: "@nh,112,32 . @nh,160,32 . @nh,288,32 . th dport",
        at_node: "@nh,96,96 . th dport",
    };
    [
        Clients {
            ip: "ip",
            family: 4,
            suffix: "",
            of: "meta nfproto ipv4",
            at_address: "ip saddr . ip daddr . meta l4proto . th dport",
            at_node: "ip saddr . meta l4proto . th dport",
        },
        Clients { suffix: "_tcp", of: "meta nfproto ipv6 meta l4proto tcp", ..V6 },
        Clients { suffix: "_udp", of: "meta nfproto ipv6 meta l4proto udp", ..V6 },
        Clients { suffix: "_sctp", of: "meta nfproto ipv6 meta l4proto sctp", ..V6 },
    ]
};

impl Clients {
    /// Returns the name of the map from clients to the identities of their backends.
    fn map(&self, node: bool) -> String {
        let prefix = if node { "node_" } else { "" };
        format!("{prefix}clients{}{}", self.family, self.suffix)
    }

    fn key(&self, node: bool) -> &'static str {
        if node { self.at_node } else { self.at_address }
    }
}

/// Returns the maps from clients to the identities of their backends. Packets fill them.
fn clients() -> Vec<Object> {
    let map = |clients: &Clients, node| Object {
        kind: "map",
        name: clients.map(node),
        body: format!(
            "typeof {} : meta priority\n\t\tsize {CLIENTS}\n\t\tflags dynamic,timeout",
            clients.key(node)
        ),
    };
    CLIENTS_OF.iter().flat_map(|clients| [map(clients, false), map(clients, true)]).collect()
}

/// Returns the chains of a kind of affinity. A known client goes to its earlier backend while that exists; otherwise a
/// backend is chosen and recorded. An update renews the timeout of an entry but keeps its value, so an entry whose
/// backend no longer exists is deleted first.
fn staying(sticky: Sticky) -> [Chain; 2] {
    let Sticky { seconds, kind, count } = sticky;
    let (node, offset) = (kind.is_node(), kind.offset());
    let name = sticky.chain();
    let follow = format!("{name}_follow");
    let (mut following, mut choosing) = (Vec::new(), Vec::new());
    for of in &CLIENTS_OF {
        let Clients { ip, family, of: packets, .. } = *of;
        let (map, client) = (of.map(node), of.key(node));
        let (prefix, at) = if node { ("node_", String::new()) } else { ("", format!("{ip} daddr . ")) };
        let backend = format!("{at}meta l4proto . th dport . meta priority map");
        let update = format!("update @{map} {{ {client} timeout {seconds}s : meta priority }}");
        let go = format!("dnat {ip} to {backend} @{prefix}stay{family}");
        following.extend([
            format!("{packets} {update}"),
            format!("{packets} {go}"),
            format!("{packets} delete @{map} {{ {client} : meta priority }}"),
        ]);
        choosing.extend([
            format!("{packets} meta priority set {client} map @{map} jump {follow}"),
            format!(
                "{packets} meta priority set numgen random mod {count}{offset} \
                 meta priority set {backend} @{prefix}ids{family} {update} {go}"
            ),
        ]);
    }
    [chain(&follow, following), chain(&name, choosing)]
}

/// Returns the rules for source addresses. They are kept, with two exceptions: a backend that reaches itself, and a
/// connection from outside or from this host to a backend that is not on this host, which would answer by another path.
fn postrouting() -> Vec<String> {
    each(|ip, n| {
        let [hairpin, gateways, routed, ours, elsewhere] =
            [&HAIRPIN, &GATEWAYS, &ROUTED, &OURS, &ELSEWHERE].map(|sets| sets[n].name.clone());
        vec![
            format!(
                "ct status dnat {ip} saddr . {ip} daddr @{hairpin} snat {ip} to {ip} daddr map @{gateways}"
            ),
            format!(
                "ct status dnat oifname != \"ove-*\" {ip} saddr != @{ours} snat {ip} to {ip} daddr map @{routed}"
            ),
            // Endpoints' connections that leave the cluster are masqueraded by the base table, if at all.
            format!(
                "ct status dnat oifname != \"lo\" {ip} saddr != @{ours} \
                 {ip} daddr . meta l4proto . th dport @{elsewhere} masquerade"
            ),
        ]
    })
}
