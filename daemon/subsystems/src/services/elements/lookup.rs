//! Looks up in the elements what the table does with a packet, as its chains do. So what a trace says of Services is what
//! the host's table has.
//!
//! The module owns no state. Begin to read at [`translate`].

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_dataplane::nft::{Elements, Field, Key, Set};

use super::context::of_family;
use super::skeleton::{
    BACKENDS, BALANCERS, BackendKind, DROP, GUARDED, HOSTS, IDS, INSIDE, NODE_IDS, NODE_STAY, NODES, OUTSIDE,
    OWN, OWN_PORTS, PORTS, REFUSE, RELAYED, SOURCES, STAY, kind_and_count,
};

/// Where a packet comes from that may be for a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// An endpoint of this host.
    Endpoint,
    /// A program of this host.
    Host,
    /// Another host, or outside of the cluster: its address.
    Remote(IpAddr),
}

/// What the table does with the first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Translated {
    /// It is sent to one of these backends: address and port.
    To(Vec<(IpAddr, u16)>),
    /// It is refused, because there is no backend.
    Refused,
    /// It is dropped, because there is no backend on this host.
    Dropped,
    /// It is dropped, because the port does not let this source in.
    NotLetIn,
}

/// Returns what the table with these elements does with the first packet of a connection to an address and port.
/// `from` is its source, and `is_own` says whether the address is one of this host. `None` if it is left as
/// it is.
pub fn translate(
    elements: &Elements,
    client: Client,
    from: IpAddr,
    (address, protocol, port): (IpAddr, u8, u16),
    is_own: bool,
) -> Option<Translated> {
    let ipv4 = address.is_ipv4();
    let at_address = [Field::Ip(address), Field::Protocol(protocol), Field::Port(port)];
    let at_node = [Field::Protocol(protocol), Field::Port(port)];
    let value = |sets: &[Set; 2], key: &[Field<'_>]| {
        elements.of(of_family(sets, ipv4))?.get(&Key::of(key))?.as_number()
    };
    let is_in = |sets: &[Set; 2], address| {
        elements
            .of(of_family(sets, ipv4))
            .is_some_and(|all| all.contains_key(&Key::of(&[Field::Ip(address)])))
    };
    let is_guarded =
        elements.of(of_family(&GUARDED, ipv4)).is_some_and(|all| all.contains_key(&Key::of(&at_address)));
    if is_guarded && !lets_in(elements, at_address, from) {
        return Some(Translated::NotLetIn);
    }
    let by_address = || match client {
        Client::Endpoint => value(&INSIDE, &at_address),
        Client::Host => [&OWN, &OUTSIDE, &INSIDE].into_iter().find_map(|sets| value(sets, &at_address)),
        Client::Remote(_) => [&OUTSIDE, &INSIDE].into_iter().find_map(|sets| value(sets, &at_address)),
    };
    let by_node = || match client {
        Client::Endpoint | Client::Host => value(&OWN_PORTS, &at_node).or_else(|| value(&PORTS, &at_node)),
        Client::Remote(from) => {
            value(&RELAYED, &at_node).filter(|_| is_in(&HOSTS, from)).or_else(|| value(&PORTS, &at_node))
        }
    };
    // At the host's own addresses there are only node ports, unless it announces the address of a LoadBalancer.
    let found = match is_own {
        true if is_in(&BALANCERS, address) => by_address().or_else(by_node),
        true => by_node(),
        false => by_address(),
    };
    let (kind, count, is_sticky) = match found? {
        REFUSE => return Some(Translated::Refused),
        DROP => return Some(Translated::Dropped),
        number => kind_and_count(number)?,
    };
    let key = |number| match kind.is_node() {
        true => Key::of(&[at_node[0], at_node[1], Field::Number(number)]),
        false => Key::of(&[at_address[0], at_address[1], at_address[2], Field::Number(number)]),
    };
    let get = |sets: &[Set; 2], number| elements.of(of_family(sets, ipv4))?.get(&key(number));
    let backend = |slot| match is_sticky {
        true => {
            let [ids, stay] = if kind.is_node() { [&NODE_IDS, &NODE_STAY] } else { [&IDS, &STAY] };
            get(stay, get(ids, slot)?.as_number()?)?.as_target()
        }
        false => get(if kind.is_node() { &NODES } else { &BACKENDS }, slot)?.as_target(),
    };
    let first = BackendKind::first(kind);
    Some(Translated::To((first..first.saturating_add(count)).filter_map(backend).collect()))
}

/// Whether a port at an address of a LoadBalancer that lets only some sources in lets this one in.
fn lets_in(elements: &Elements, [address, protocol, port]: [Field<'_>; 3], from: IpAddr) -> bool {
    let Some(sources) = elements.of(of_family(&SOURCES, from.is_ipv4())) else { return false };
    let bits = if from.is_ipv4() { 32 } else { 128 };
    let prefixes = (0..=bits).filter_map(|bits| IpNet::new(from, bits).ok());
    prefixes
        .map(|prefix| Key::of(&[address, protocol, port, Field::Net(prefix)]))
        .any(|key| sources.contains_key(&key))
}
