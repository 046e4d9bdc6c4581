//! A query and the zone give an answer, or the word that somebody else must be asked. Pure, and without an
//! allocation for what is asked most.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::name::Name;
use crate::wire::{Bad, HEADER, Kind, QR, Query, RA, Rcode, Writer};
use crate::zone::{NetworkKey, Place, Records, Zone};

/// For how long an answer may be kept, in seconds: endpoints come and go.
pub(crate) const TTL: u32 = 5;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// The host itself, which sees all networks and asks by full names.
    Host,
    /// Whoever has this address.
    At(IpAddr),
}

/// How a query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Long answers are cut.
    Udp,
    /// They are not.
    Tcp,
}

/// What is to be done about a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Send so many bytes of the buffer.
    Answer(usize),
    /// Others may know.
    Forward,
    /// It is another name, which [`target`] tells and others may know.
    Alias,
    /// Nothing.
    Ignore,
}

/// What others are to be asked in place of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The name.
    pub name: Name,
    /// If a client's walk through its search list ends there: the domain of ours in which it began. Where others know
    /// nothing, the walk goes on.
    pub walk: Option<Name>,
}

/// Answers a message into `buffer`. `turn` says with which of several addresses the answer begins.
#[inline]
pub fn answer(
    zone: &Zone,
    asker: Asker,
    transport: Transport,
    message: &[u8],
    buffer: &mut [u8],
    turn: usize,
) -> Outcome {
    if !zone.knows(asker) {
        // It may not be who it seems to be: so it hears nothing.
        return Outcome::Ignore;
    }
    let query = match Query::read(message) {
        Ok(query) => query,
        Err(Bad::Ignore) => return Outcome::Ignore,
        Err(Bad::Refuse(rcode)) => return refuse(message, rcode, buffer),
    };
    let limit = match transport {
        Transport::Udp => query.udp_limit(),
        Transport::Tcp => usize::from(u16::MAX),
    };
    let written = respond(zone, asker, limit, message, &query, buffer, turn);
    written.unwrap_or(Outcome::Ignore)
}

#[inline]
fn respond(
    zone: &Zone,
    asker: Asker,
    limit: usize,
    message: &[u8],
    query: &Query,
    buffer: &mut [u8],
    turn: usize,
) -> Option<Outcome> {
    let bare = |buffer, rcode, authoritative| {
        let writer = Writer::answer(buffer, limit, message, query, rcode, authoritative)?;
        Some(Outcome::Answer(writer.finish(query, rcode)))
    };
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return bare(buffer, Rcode::BAD_VERSION, false);
    }
    if !query.is_internet() {
        return bare(buffer, Rcode::REFUSED, false);
    }
    match zone.find(asker, &query.name) {
        Place::Here(_, Records { alias: Some(target), .. }) if query.kind != Kind::CNAME => {
            aliased(zone, asker, limit, message, query, buffer, turn, target)
        }
        Place::Walked(target) => aliased(zone, asker, limit, message, query, buffer, turn, &target),
        Place::Here(network, records) => {
            let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NO_ERROR, true)?;
            match write(&mut writer, None, zone, asker, query.kind, network, records, turn) {
                (0, true) => {
                    let apex = zone.apex(&query.name);
                    let written = u16::from(authority(&mut writer, &apex));
                    let is_asked = query.kind == Kind::SOA && query.name == apex;
                    let (answers, authority) = if is_asked { (written, 0) } else { (0, written) };
                    writer.count(answers, authority, 0, false);
                }
                (count, whole) => writer.count(count, 0, 0, !whole),
            }
            Some(Outcome::Answer(writer.finish(query, Rcode::NO_ERROR)))
        }
        Place::Nowhere => no_name(zone, limit, message, query, buffer),
        // Only names under its domain are asked of us by the host: who else it asks, it knows itself.
        Place::Elsewhere if asker == Asker::Host => bare(buffer, Rcode::REFUSED, false),
        Place::Elsewhere => Some(Outcome::Forward),
    }
}

/// An answer under another name, as far as that is here.
#[expect(clippy::too_many_arguments, reason = "an answer's circumstances")]
fn aliased(
    zone: &Zone,
    asker: Asker,
    limit: usize,
    message: &[u8],
    query: &Query,
    buffer: &mut [u8],
    turn: usize,
    target: &Name,
) -> Option<Outcome> {
    match zone.find(asker, target) {
        Place::Here(network, records) if records.alias.is_none() => {
            let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NO_ERROR, true)?;
            let named = writer.record(None, Kind::CNAME, TTL, &[target.as_bytes(), &[0]]);
            let (count, whole) =
                write(&mut writer, Some(target), zone, asker, query.kind, network, records, turn);
            let denied = count == 0 && whole && authority(&mut writer, &zone.apex(target));
            writer.count(count + u16::from(named), u16::from(denied), 0, !(whole && named));
            Some(Outcome::Answer(writer.finish(query, Rcode::NO_ERROR)))
        }
        Place::Nowhere => no_name(zone, limit, message, query, buffer),
        Place::Here(..) | Place::Elsewhere | Place::Walked(_) => Some(Outcome::Alias),
    }
}

fn no_name(zone: &Zone, limit: usize, message: &[u8], query: &Query, buffer: &mut [u8]) -> Option<Outcome> {
    let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NO_NAME, true)?;
    let denied = authority(&mut writer, &zone.apex(&query.name));
    writer.count(0, u16::from(denied), 0, false);
    Some(Outcome::Answer(writer.finish(query, Rcode::NO_NAME)))
}

/// The start of authority, with which a denial may be kept for a while (RFC 2308, section 3). Without room for it, it is
/// left out.
fn authority(writer: &mut Writer<'_>, apex: &Name) -> bool {
    // Nobody's mailbox; serial, refresh, retry, expire, and for how long there is nothing.
    let numbers = [1, 7200, 1800, 86_400, TTL].map(u32::to_be_bytes);
    writer.record(Some(apex), Kind::SOA, TTL, &[apex.as_bytes(), &[0, 0], numbers.as_flattened()])
}

/// Under which name others are to be asked, after [`Outcome::Alias`].
pub fn target(zone: &Zone, asker: Asker, message: &[u8]) -> Option<Target> {
    let query = Query::read(message).ok()?;
    let mut name = query.name;
    let mut walk = None;
    // An external Service may stand for another, but not for ever.
    for _ in 0..8 {
        match zone.find(asker, &name) {
            Place::Here(_, Records { alias: Some(alias), .. }) => name = *alias,
            Place::Walked(to) => {
                walk = Some(zone.apex(&query.name));
                name = *to;
            }
            Place::Elsewhere => return Some(Target { name, walk }),
            Place::Here(..) | Place::Nowhere => return None,
        }
    }
    None
}

/// Gives the number of records, and whether these are all.
#[inline]
#[expect(clippy::too_many_arguments, reason = "an answer's circumstances")]
fn write(
    writer: &mut Writer<'_>,
    owner: Option<&Name>,
    zone: &Zone,
    asker: Asker,
    kind: Kind,
    network: NetworkKey,
    records: &Records,
    turn: usize,
) -> (u16, bool) {
    let Records { v4, v6, names, services, alias, text, above: _, unready: _ } = records;
    let (mut count, mut whole) = (0, true);
    let mut note = |fits: bool| {
        count += u16::from(fits);
        whole &= fits;
    };
    if kind == Kind::A || kind == Kind::ANY {
        for address in rotated(v4, turn) {
            note(writer.record(owner, Kind::A, TTL, &[&Ipv4Addr::octets(address)]));
        }
    }
    if kind == Kind::AAAA || kind == Kind::ANY {
        for address in rotated(v6, turn) {
            note(writer.record(owner, Kind::AAAA, TTL, &[&Ipv6Addr::octets(address)]));
        }
    }
    if kind == Kind::PTR || kind == Kind::ANY {
        for name in names.iter().filter_map(|name| zone.full(asker, network, name)) {
            note(writer.record(owner, Kind::PTR, TTL, &[name.as_bytes(), &[0]]));
        }
    }
    if kind == Kind::SRV || kind == Kind::ANY {
        // Equal ones share the load (RFC 2782).
        for (port, target) in rotated(services, turn) {
            let [high, low] = port.to_be_bytes();
            note(writer.record(owner, Kind::SRV, TTL, &[&[0, 0, 0, 1, high, low], target.as_bytes(), &[0]]));
        }
    }
    if kind == Kind::CNAME
        && let Some(alias) = alias
    {
        note(writer.record(owner, Kind::CNAME, TTL, &[alias.as_bytes(), &[0]]));
    }
    if kind == Kind::TXT
        && let Some(text) = text
    {
        note(writer.record(owner, Kind::TXT, TTL, &[&[text.len() as u8], text.as_bytes()]));
    }
    (count, whole)
}

fn rotated<T>(all: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let at = if all.len() > 1 { turn % all.len() } else { 0 };
    let (before, after) = all.split_at_checked(at).unwrap_or((all, &[]));
    after.iter().chain(before)
}

/// A header alone: the question may be what was not understood.
fn refuse(message: &[u8], rcode: Rcode, buffer: &mut [u8]) -> Outcome {
    let (Some(room), Some(head)) = (buffer.get_mut(..HEADER), message.get(..4)) else {
        return Outcome::Ignore;
    };
    room.fill(0);
    room[..2].copy_from_slice(&head[..2]);
    // What the query was, and whether recursion was asked for, is repeated.
    let asked = u16::from_be_bytes([head[2], head[3]]) & 0x7900;
    room[2..4].copy_from_slice(&(QR | asked | RA | rcode.0).to_be_bytes());
    Outcome::Answer(HEADER)
}

/// An answer that says only how it went.
pub(crate) fn bare(message: &[u8], query: &Query, rcode: Rcode) -> Vec<u8> {
    made(message, query, rcode, None)
}

/// The same with our word that there is nothing.
pub(crate) fn denial(message: &[u8], query: &Query, rcode: Rcode, apex: &Name) -> Vec<u8> {
    made(message, query, rcode, Some(apex))
}

fn made(message: &[u8], query: &Query, rcode: Rcode, apex: Option<&Name>) -> Vec<u8> {
    let mut buffer = [0; crate::wire::MAX_UDP];
    let Some(mut writer) = Writer::answer(&mut buffer, usize::MAX, message, query, rcode, false) else {
        return Vec::new();
    };
    let denied = apex.is_some_and(|apex| authority(&mut writer, apex));
    writer.count(0, u16::from(denied), 0, false);
    let length = writer.finish(query, rcode);
    buffer.get(..length).unwrap_or_default().to_vec()
}
