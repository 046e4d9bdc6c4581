//! One Service's elements, out of its ports and backends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::resource::{IpFamily, Name, Protocol, Service, ServicePort, TrafficPolicy};

use super::skeleton::{
    self, BACKENDS, BackendKind, DROP, HAIRPIN, IDS, INSIDE, MOST_STICKY, NODE_IDS, NODE_STAY, NODES,
    OUTSIDE, PORTS, REFUSE, RELAYED, ROUTED, STAY, Sticky,
};
use super::{At, NetworkContext, of_family};
use crate::services::divert;
use ovl_cluster::backends::{Backend, Target, targets};
use ovl_cluster::claims::Claims;
use ovl_dataplane::ledger::Entries;
use ovl_dataplane::nft::{Field, Key, Set, Value};

/// Numbers in a map are 16 bits beside what they are.
const MOST: usize = 0xffff;

/// UDP ports, with whether it is IPv4, and the backends of each.
pub(super) type UdpPorts = BTreeMap<(At, bool), BTreeSet<(IpAddr, u16)>>;

/// What one Service comes to.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) entries: Entries,
    /// Numbers of backends that there must be chains for.
    pub(super) counts: BTreeSet<u32>,
    /// Ports with affinity that there must be chains for.
    pub(super) sticky: BTreeSet<Sticky>,
    /// Where its UDP ports lead.
    pub(super) flows: UdpPorts,
    /// Connections are passed on to other hosts.
    pub(super) relays: bool,
}

/// Which backend has which number: one that stays keeps its own.
#[derive(Debug, Clone, Default)]
pub(super) struct Slots(BTreeMap<Name, Numbers>);

/// Of one Service, by port, whether it is IPv4, and whose backends they are.
type Numbers = BTreeMap<(At, bool, BackendKind), Vec<Backing>>;

type Backing = (IpAddr, u16);

impl Slots {
    pub(super) fn forget(&mut self, name: &Name) {
        self.0.remove(name);
    }
}

/// Those that are there keep their numbers as far as there are so many; others fill the holes. A host that
/// connections are passed on to is there once for each of its backends.
fn number(before: &[Backing], now: &[Backing]) -> Vec<Backing> {
    let mut left: BTreeMap<Backing, usize> = BTreeMap::new();
    for backing in now {
        *left.entry(*backing).or_default() += 1;
    }
    let mut slots: Vec<Option<Backing>> = before.iter().take(now.len()).copied().map(Some).collect();
    slots.resize(now.len(), None);
    for slot in &mut slots {
        *slot = slot.filter(|backing| match left.get_mut(backing) {
            Some(more) if *more > 0 => {
                *more -= 1;
                true
            }
            Some(_) | None => false,
        });
    }
    let mut others = left.into_iter().flat_map(|(backing, more)| std::iter::repeat_n(backing, more));
    slots.into_iter().filter_map(|slot| slot.or_else(|| others.next())).collect()
}

pub(super) fn resolve(
    context: &NetworkContext,
    claims: &Claims,
    (name, service): (&Name, &Service),
    backends: &[Backend],
    slots: &mut Slots,
) -> Resolved {
    let mut out = ElementWriter {
        resolved: Resolved::default(),
        before: slots.0.remove(name).unwrap_or_default(),
        after: BTreeMap::new(),
        affinity: service.affinity_seconds(),
    };
    for (i, port) in service.spec.ports.iter().enumerate() {
        let given = service.spec.external_ips.iter().copied();
        let given = given.filter(|address| claims.has_external(name, *address, port.protocol, port.port));
        let external: BTreeSet<IpAddr> = given.chain(service.load_balancer_addresses()).collect();
        for ipv4 in [true, false] {
            one(&mut out, context, service, (i, port), &external, backends, ipv4);
        }
    }
    if !out.after.is_empty() {
        slots.0.insert(name.clone(), out.after);
    }
    out.resolved
}

/// One port for the addresses of one family.
fn one(
    out: &mut ElementWriter,
    context: &NetworkContext,
    service: &Service,
    (i, port): (usize, &ServicePort),
    external: &BTreeSet<IpAddr>,
    backends: &[Backend],
    ipv4: bool,
) {
    let of_this = |address: &IpAddr| address.is_ipv4() == ipv4;
    let cluster: Vec<IpAddr> = service.cluster_addresses().filter(of_this).collect();
    let external: BTreeSet<IpAddr> = external.iter().copied().filter(of_this).collect();
    let family = if ipv4 { IpFamily::IPv4 } else { IpFamily::IPv6 };
    let node_port = port.node_port.filter(|_| service.spec.ip_families.contains(&family));
    if cluster.is_empty() && external.is_empty() && node_port.is_none() {
        return;
    }
    let all = targets(backends, i, ipv4, None);
    let local = targets(backends, i, ipv4, context.me);
    // Endpoints of switched networks have no way to answer to another host: theirs has.
    let by_host = |target: &Target| {
        let (address, port) = (context.relay(target)?, node_port?);
        Some(Target { address, port, host: target.host })
    };
    let reached = all.iter().filter_map(|target| {
        match target.host == context.me || !context.is_switched(target.address) {
            true => Some(*target),
            false => by_host(target),
        }
    });
    let mut reached: Vec<Target> = reached.collect();
    reached.sort_unstable();
    let protocol = number_of(port.protocol);
    for address in cluster {
        let is_local = service.spec.internal_traffic_policy == TrafficPolicy::Local;
        let (inside, outside) = if is_local { (&local, &local) } else { (&all, &reached) };
        out.address((Some(address), protocol, port.port), ipv4, inside, outside, REFUSE);
    }
    let is_local = service.spec.external_traffic_policy == TrafficPolicy::Local;
    let outside = if is_local { &local } else { &reached };
    let nobody = if is_local && !all.is_empty() { DROP } else { REFUSE };
    for address in external {
        out.address((Some(address), protocol, port.port), ipv4, &all, outside, nobody);
    }
    if let Some(node_port) = node_port {
        out.node_port((None, protocol, node_port), ipv4, outside, nobody);
        let passed_on =
            local.iter().filter(|target| !is_local && context.is_relayed(target.address)).copied();
        out.relayed((None, protocol, node_port), ipv4, &passed_on.collect::<Vec<_>>());
    }
    for host in outside.iter().filter(|target| context.hosts.values().any(|host| *host == target.address)) {
        if let Some(own) = context.vtep {
            let to = IpNet::from(host.address);
            out.put(of_family(&ROUTED, ipv4), &[Field::Net(to)], Value::of(&[Field::Ip(own)]));
            out.resolved.relays = true;
        }
    }
    // Ready or not: connections that are open go on.
    for backend in backends {
        let address = backend.addresses.iter().copied().find(of_this);
        let Some((address, port)) = address.zip(backend.ports.get(i).copied().flatten()) else { continue };
        if backend.host == context.me {
            out.put(of_family(&HAIRPIN, ipv4), &[Field::Ip(address); 2], Value::None);
        }
        if context.is_switched(address) {
            let key = [Field::Ip(address), Field::Protocol(protocol), Field::Port(port)];
            out.put(of_family(&divert::BACKENDS, ipv4), &key, Value::None);
        }
    }
}

/// IANA's number of a protocol.
fn number_of(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

struct ElementWriter {
    resolved: Resolved,
    before: Numbers,
    after: Numbers,
    affinity: Option<u32>,
}

impl ElementWriter {
    fn put(&mut self, set: &Set, key: &[Field<'_>], value: Value) {
        self.resolved.entries.insert((set.clone(), Key::of(key)), value);
    }

    /// A port at an address: backends for endpoints, and for all others.
    fn address(&mut self, at: At, ipv4: bool, inside: &[Target], outside: &[Target], nobody: u32) {
        let (Some(address), protocol, port) = at else { return };
        let key = [Field::Ip(address), Field::Protocol(protocol), Field::Port(port)];
        let count = self.backends(at, ipv4, BackendKind::Of, inside, REFUSE);
        self.put(of_family(&INSIDE, ipv4), &key, Value::of(&[Field::Number(count)]));
        if inside != outside || (outside.is_empty() && nobody != REFUSE) {
            let count = self.backends(at, ipv4, BackendKind::Others, outside, nobody);
            self.put(of_family(&OUTSIDE, ipv4), &key, Value::of(&[Field::Number(count)]));
        }
        self.flows(at, ipv4, &[inside, outside]);
    }

    fn node_port(&mut self, at: At, ipv4: bool, outside: &[Target], nobody: u32) {
        let (_, protocol, port) = at;
        let key = [Field::Protocol(protocol), Field::Port(port)];
        let count = self.backends(at, ipv4, BackendKind::Nodes, outside, nobody);
        self.put(of_family(&PORTS, ipv4), &key, Value::of(&[Field::Number(count)]));
        self.flows(at, ipv4, &[outside]);
    }

    /// What other hosts pass on to the node port.
    fn relayed(&mut self, at: At, ipv4: bool, here: &[Target]) {
        let (_, protocol, port) = at;
        if here.is_empty() {
            return;
        }
        let count = self.backends(at, ipv4, BackendKind::Relayed, here, REFUSE);
        let key = [Field::Protocol(protocol), Field::Port(port)];
        self.put(of_family(&RELAYED, ipv4), &key, Value::of(&[Field::Number(count)]));
        self.flows(at, ipv4, &[here]);
    }

    /// Numbers backends; gives what leads to them.
    fn backends(&mut self, at: At, ipv4: bool, kind: BackendKind, targets: &[Target], nobody: u32) -> u32 {
        let most = if self.affinity.is_some() { MOST_STICKY } else { MOST };
        let now: Vec<Backing> =
            targets.iter().take(most).map(|target| (target.address, target.port)).collect();
        if now.is_empty() {
            return nobody;
        }
        let before = self.before.remove(&(at, ipv4, kind)).unwrap_or_default();
        let numbered = number(&before, &now);
        let first = kind.first();
        let by_number = of_family(if kind.is_node() { &NODES } else { &BACKENDS }, ipv4).clone();
        let [ids, stay] = if kind.is_node() { [&NODE_IDS, &NODE_STAY] } else { [&IDS, &STAY] }
            .map(|sets| of_family(sets, ipv4).clone());
        for (slot, (to, to_port)) in (first..).zip(&numbered) {
            let value = Value::of(&[Field::Ip(*to), Field::Port(*to_port)]);
            if self.affinity.is_some() {
                let id = identity(*to);
                self.put_at(&ids, at, slot, Value::of(&[Field::Number(id)]));
                self.put_at(&stay, at, id, value);
            } else {
                self.put_at(&by_number, at, slot, value);
            }
        }
        let count = numbered.len() as u32;
        self.after.insert((at, ipv4, kind), numbered);
        if let Some(seconds) = self.affinity {
            let sticky = Sticky { seconds, kind, count };
            self.resolved.sticky.insert(sticky);
            return sticky.number();
        }
        self.resolved.counts.insert(count);
        skeleton::number(kind, count)
    }

    /// Puts in what hangs on a port and a number.
    fn put_at(&mut self, set: &Set, (address, protocol, port): At, number: u32, value: Value) {
        let mut key: Vec<Field<'_>> = address.map(Field::Ip).into_iter().collect();
        key.extend([Field::Protocol(protocol), Field::Port(port), Field::Number(number)]);
        self.put(set, &key, value);
    }

    /// Remembers where packets of UDP may go on to: it has no connections that end.
    fn flows(&mut self, at: At, ipv4: bool, targets: &[&[Target]]) {
        let (_, protocol, _) = at;
        if protocol == number_of(Protocol::Udp) {
            let all = targets.iter().copied().flatten().map(|target| (target.address, target.port));
            self.resolved.flows.entry((at, ipv4)).or_default().extend(all);
        }
    }
}

/// The same in every run, so that clients stay while ovld is away: FNV-1a over the address.
fn identity(address: IpAddr) -> u32 {
    let hash = |octets: &[u8]| {
        octets
            .iter()
            .fold(0x811c_9dc5_u32, |hash, octet| (hash ^ u32::from(*octet)).wrapping_mul(0x0100_0193))
    };
    match address {
        IpAddr::V4(address) => hash(&address.octets()),
        IpAddr::V6(address) => hash(&address.octets()),
    }
}
