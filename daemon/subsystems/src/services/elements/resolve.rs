//! Computes the set elements of one Service from its ports and backends.
//!
//! [`Slots`] owns the numbers of backends, so that a backend that stays keeps its number; the rest is computed anew.
//! Begin to read at [`resolve`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::resource::{IpFamily, Name, Protocol, Service, ServicePort, TrafficPolicy};

use super::context::{At, NetworkContext, of_family};
use super::skeleton::{
    self, BACKENDS, BALANCERS, BackendKind, DROP, ELSEWHERE, GUARDED, HAIRPIN, IDS, INSIDE, MAX_STICKY,
    NODE_IDS, NODE_STAY, NODES, OUTSIDE, OWN, OWN_PORTS, PORTS, REFUSE, RELAYED, ROUTED, SOURCES, STAY,
    Sticky,
};
use crate::services::divert;
use ovl_cluster::backends::{Backend, Target, targets, targets_for};
use ovl_cluster::claims::Claims;
use ovl_dataplane::ledger::Entries;
use ovl_dataplane::nft::{Field, Key, Set, Value};

/// The maximum number of backends: numbers in a map have 16 bits, the others say what kind of number it is.
const MAX_BACKENDS: usize = 0xffff;

/// UDP ports (with `true` for IPv4) and the backends of each.
pub(super) type UdpPorts = BTreeMap<(At, bool), BTreeSet<(IpAddr, u16)>>;

/// The elements of one Service, and the chains that they need.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) entries: Entries,
    /// The numbers of backends for which there must be chains.
    pub(super) counts: BTreeSet<u32>,
    /// The kinds of affinity for which there must be chains.
    pub(super) sticky: BTreeSet<Sticky>,
    /// The backends of its UDP ports.
    pub(super) flows: UdpPorts,
    /// The address families (`true` for IPv4) in which connections from outside are forwarded to remote hosts or out of the
    /// cluster again.
    pub(super) forwards: BTreeSet<bool>,
    /// Whether it has ports that let only some sources in.
    pub(super) guards: bool,
}

/// The numbers of backends, by Service. A backend that stays keeps its number.
#[derive(Debug, Clone, Default)]
pub(super) struct Slots(BTreeMap<Name, Numbers>);

/// The backends of one Service in the order of their numbers, by port, address family (`true` for IPv4) and kind.
type Numbers = BTreeMap<(At, bool, BackendKind), Vec<Backing>>;

type Backing = (IpAddr, u16);

impl Slots {
    /// Drops the numbers of a deleted Service.
    pub(super) fn forget(&mut self, name: &Name) {
        self.0.remove(name);
    }
}

/// Numbers the backends in `now`. Backends that are in `before` keep their numbers where those are still in range; the
/// others fill the gaps. A host to which connections are relayed occurs once for each of its backends.
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

/// Returns the elements of a Service with these backends.
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
    let balancer: Vec<IpAddr> = service
        .load_balancer_addresses()
        .filter(|address| context.permits.load_balancer(*address).is_none())
        .collect();
    for address in &balancer {
        out.put(of_family(&BALANCERS, address.is_ipv4()), &[Field::Ip(*address)], Value::None);
    }
    for address in &balancer {
        guard(&mut out, service, *address);
    }
    for (i, port) in service.spec.ports.iter().enumerate() {
        let given = service.spec.external_ips.iter().copied();
        let given = given.filter(|address| claims.has_external(name, *address, port.protocol, port.port));
        let given = given.filter(|address| context.permits.external_ip(*address).is_none());
        let external: BTreeSet<IpAddr> = given.chain(balancer.iter().copied()).collect();
        for ipv4 in [true, false] {
            resolve_port(&mut out, context, service, (i, port), &external, backends, ipv4);
        }
    }
    if !out.after.is_empty() {
        slots.0.insert(name.clone(), out.after);
    }
    out.resolved
}

/// Adds the sources that the ports at an address of a LoadBalancer let in, unless these are all.
fn guard(out: &mut ElementWriter, service: &Service, address: IpAddr) {
    let ranges = &service.spec.load_balancer_source_ranges;
    if ranges.is_empty() {
        return;
    }
    out.resolved.guards = true;
    let ipv4 = address.is_ipv4();
    let of_family_of = |range: &IpNet| range.addr().is_ipv4() == ipv4;
    // The host that announces the address asks from it. The kernel takes no ranges that overlap.
    let sources: Vec<IpNet> =
        ranges.iter().copied().filter(of_family_of).chain([IpNet::from(address)]).collect();
    for source in IpNet::aggregate(&sources) {
        for port in &service.spec.ports {
            let at = [Field::Ip(address), Field::Protocol(number_of(port.protocol)), Field::Port(port.port)];
            out.put(of_family(&GUARDED, ipv4), &at, Value::None);
            let [address, protocol, port] = at;
            out.put(of_family(&SOURCES, ipv4), &[address, protocol, port, Field::Net(source)], Value::None);
        }
    }
}

/// Adds the elements of one port for one address family.
fn resolve_port(
    out: &mut ElementWriter,
    context: &NetworkContext,
    service: &Service,
    (i, port): (usize, &ServicePort),
    external: &BTreeSet<IpAddr>,
    backends: &[Backend],
    ipv4: bool,
) {
    let of_this = |address: &IpAddr| address.is_ipv4() == ipv4;
    let permits = &context.permits;
    let cluster = service.cluster_addresses().filter(of_this);
    let cluster: Vec<IpAddr> = cluster.filter(|address| permits.cluster_ip(*address).is_none()).collect();
    let external: BTreeSet<IpAddr> = external.iter().copied().filter(of_this).collect();
    let family = if ipv4 { IpFamily::IPv4 } else { IpFamily::IPv6 };
    let node_port = port.node_port.filter(|node_port| {
        service.spec.ip_families.contains(&family) && permits.node_port(port.protocol, *node_port).is_none()
    });
    if cluster.is_empty() && external.is_empty() && node_port.is_none() {
        return;
    }
    let all = targets_for(backends, i, ipv4, context.position());
    let local = targets(backends, i, ipv4, context.me);
    // An endpoint of a switched network cannot answer through another host, so connections go through its own host.
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
    let is_exposed = !external.is_empty() || node_port.is_some();
    let is_local = service.spec.external_traffic_policy == TrafficPolicy::Local;
    let outside = if is_local { &local } else { &reached };
    let no_backend = if is_local && !all.is_empty() { DROP } else { REFUSE };
    // The policy `Local` is about clients outside: what comes from this host reaches all backends, as in Kubernetes.
    let own_differ = is_local && local != reached;
    for address in external {
        let at = (Some(address), protocol, port.port);
        out.address(at, ipv4, &all, outside, no_backend);
        if own_differ {
            out.own(at, ipv4, &all, &reached);
        }
    }
    if let Some(node_port) = node_port {
        let at = (None, protocol, node_port);
        out.node_port(at, ipv4, outside, no_backend);
        if own_differ {
            out.apart(&OWN_PORTS, at, ipv4, &reached);
        }
        if !is_local {
            let relayed = local.iter().filter(|target| context.is_relayed(target.address)).copied();
            out.apart(&RELAYED, at, ipv4, &relayed.collect::<Vec<_>>());
        }
    }
    let relays_to = |target: &&Target| context.hosts.values().any(|host| *host == target.address);
    let used = if own_differ { &reached } else { outside };
    for host in used.iter().filter(relays_to) {
        if let Some(own) = context.vtep {
            let to = IpNet::from(host.address);
            out.put(of_family(&ROUTED, ipv4), &[Field::Net(to)], Value::of(&[Field::Ip(own)]));
            out.resolved.forwards.insert(ipv4);
        }
    }
    // These answer to the source address by a path of their own, so that has to be the address of this host.
    for target in all.iter().filter(|target| context.is_elsewhere(target.address)) {
        let key = [Field::Ip(target.address), Field::Protocol(protocol), Field::Port(target.port)];
        out.put(of_family(&ELSEWHERE, ipv4), &key, Value::None);
        if is_exposed && !is_local && target.host != context.me {
            out.resolved.forwards.insert(ipv4);
        }
    }
    // Also for backends that are not ready: open connections continue.
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

/// Returns the IP protocol number.
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

    /// Adds a port at an address, with the backends for endpoints and those for all other clients.
    fn address(&mut self, at: At, ipv4: bool, inside: &[Target], outside: &[Target], no_backend: u32) {
        let (Some(address), protocol, port) = at else { return };
        let key = [Field::Ip(address), Field::Protocol(protocol), Field::Port(port)];
        let count = self.backends(at, ipv4, BackendKind::Inside, inside, REFUSE);
        self.put(of_family(&INSIDE, ipv4), &key, Value::of(&[Field::Number(count)]));
        if inside != outside || (outside.is_empty() && no_backend != REFUSE) {
            let count = self.backends(at, ipv4, BackendKind::Outside, outside, no_backend);
            self.put(of_family(&OUTSIDE, ipv4), &key, Value::of(&[Field::Number(count)]));
        }
        self.flows(at, ipv4, &[inside, outside]);
    }

    /// Adds a node port.
    fn node_port(&mut self, at: At, ipv4: bool, outside: &[Target], no_backend: u32) {
        let (_, protocol, port) = at;
        let key = [Field::Protocol(protocol), Field::Port(port)];
        let count = self.backends(at, ipv4, BackendKind::NodePort, outside, no_backend);
        self.put(of_family(&PORTS, ipv4), &key, Value::of(&[Field::Number(count)]));
        self.flows(at, ipv4, &[outside]);
    }

    /// Adds a node port for connections whose backends differ, to the map of these connections. A Service has one of the
    /// two kinds.
    fn apart(&mut self, map: &[Set; 2], at: At, ipv4: bool, targets: &[Target]) {
        let (_, protocol, port) = at;
        if targets.is_empty() {
            return;
        }
        let count = self.backends(at, ipv4, BackendKind::Apart, targets, REFUSE);
        let key = [Field::Protocol(protocol), Field::Port(port)];
        self.put(of_family(map, ipv4), &key, Value::of(&[Field::Number(count)]));
        self.flows(at, ipv4, &[targets]);
    }

    /// Adds a port at an external address for programs of this host. `inside` are the backends for endpoints.
    fn own(&mut self, at: At, ipv4: bool, inside: &[Target], reached: &[Target]) {
        let (Some(address), protocol, port) = at else { return };
        let kind = if inside == reached { BackendKind::Inside } else { BackendKind::Own };
        let count = self.backends(at, ipv4, kind, reached, REFUSE);
        let key = [Field::Ip(address), Field::Protocol(protocol), Field::Port(port)];
        self.put(of_family(&OWN, ipv4), &key, Value::of(&[Field::Number(count)]));
        self.flows(at, ipv4, &[reached]);
    }

    /// Adds numbered backends, and returns the number that selects their chain.
    fn backends(
        &mut self,
        at: At,
        ipv4: bool,
        kind: BackendKind,
        targets: &[Target],
        no_backend: u32,
    ) -> u32 {
        let max = if self.affinity.is_some() { MAX_STICKY } else { MAX_BACKENDS };
        let now: Vec<Backing> =
            targets.iter().take(max).map(|target| (target.address, target.port)).collect();
        if now.is_empty() {
            return no_backend;
        }
        let before = self.before.remove(&(at, ipv4, kind)).or_else(|| self.after.remove(&(at, ipv4, kind)));
        let numbered = number(&before.unwrap_or_default(), &now);
        let identities = if self.affinity.is_some() { identities(&now) } else { BTreeMap::new() };
        let first = kind.first();
        let by_number = of_family(if kind.is_node() { &NODES } else { &BACKENDS }, ipv4).clone();
        let [ids, stay] = if kind.is_node() { [&NODE_IDS, &NODE_STAY] } else { [&IDS, &STAY] }
            .map(|sets| of_family(sets, ipv4).clone());
        for (slot, (to, to_port)) in (first..).zip(&numbered) {
            let value = Value::of(&[Field::Ip(*to), Field::Port(*to_port)]);
            if let Some(&id) = identities.get(&(*to, *to_port)) {
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

    /// Adds an element for a port and a number.
    fn put_at(&mut self, set: &Set, (address, protocol, port): At, number: u32, value: Value) {
        let mut key: Vec<Field<'_>> = address.map(Field::Ip).into_iter().collect();
        key.extend([Field::Protocol(protocol), Field::Port(port), Field::Number(number)]);
        self.put(set, &key, value);
    }

    /// Records the backends to which UDP flows may continue. UDP has no end of a connection, so flows to other backends
    /// must be ended.
    fn flows(&mut self, at: At, ipv4: bool, targets: &[&[Target]]) {
        let (_, protocol, _) = at;
        if protocol == number_of(Protocol::Udp) {
            let all = targets.iter().copied().flatten().map(|target| (target.address, target.port));
            self.resolved.flows.entry((at, ipv4)).or_default().extend(all);
        }
    }
}

/// Returns the identities of backends for affinity: a hash of the address, the same in every run, so that clients keep
/// their backends while ovld restarts. Of several backends at one address, in the order of their ports, the later ones
/// have the next free numbers.
fn identities(backends: &[Backing]) -> BTreeMap<Backing, u32> {
    let mut taken = BTreeSet::new();
    let mut all = BTreeMap::new();
    for backing in backends.iter().collect::<BTreeSet<_>>() {
        let mut id = hash(backing.0);
        while !taken.insert(id) {
            id = id.wrapping_add(1);
        }
        all.insert(*backing, id);
    }
    all
}

/// FNV-1a over an address.
fn hash(address: IpAddr) -> u32 {
    let of = |octets: &[u8]| {
        octets
            .iter()
            .fold(0x811c_9dc5_u32, |hash, octet| (hash ^ u32::from(*octet)).wrapping_mul(0x0100_0193))
    };
    match address {
        IpAddr::V4(address) => of(&address.octets()),
        IpAddr::V6(address) => of(&address.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(address: &str, port: u16) -> Backing {
        (address.parse().unwrap(), port)
    }

    #[test]
    fn backends_at_one_address_have_identities_of_their_own() {
        let (a, b, c) = (backing("10.9.0.9", 8081), backing("10.9.0.9", 8082), backing("10.9.0.8", 8081));
        let all = identities(&[b, a, c, a]);
        assert_eq!(all.len(), 3);
        assert_eq!(all.values().collect::<BTreeSet<_>>().len(), 3);
        // A single one has the identity that follows from its address, at whichever port.
        assert_eq!(identities(&[a])[&a], identities(&[b])[&b]);
        assert_eq!((all[&a], all[&c]), (identities(&[a])[&a], identities(&[c])[&c]));
    }
}
