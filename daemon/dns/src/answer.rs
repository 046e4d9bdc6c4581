//! Answers queries from the zone, or decides that they are forwarded. Pure functions, which allocate nothing
//! for the usual record types.

use ovl_zone::{Client, Name, NetworkKey, OtherRecords, Records, Resolution, Zone};
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::wire::{HEADER, QR, Query, QueryError, RA, Rcode, RecordType, Writer};

/// The time to live of answers from the zone, in seconds. Short, because endpoints come and go.
pub(crate) const TTL: u32 = 5;

/// The transport of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Long answers are truncated.
    Udp,
    /// Answers have up to 65,535 bytes.
    Tcp,
}

/// What to do with a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Send this number of bytes of the buffer.
    Answer(usize),
    /// Forward the query to the upstream servers.
    Forward,
    /// Forward a query for another name, to which the zone's names lead.
    Alias(Box<Target>),
    /// Drop the query.
    Ignore,
}

impl Outcome {
    /// Returns the name to forward in place of the one in the query. `None` if it is not another one.
    pub fn alias(self) -> Option<Target> {
        match self {
            Self::Alias(target) => Some(*target),
            Self::Answer(_) | Self::Forward | Self::Ignore => None,
        }
    }
}

/// The name to ask the upstream servers for in place of the one in the query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The name to ask for.
    pub name: Name,
    /// The local domain in which a client began to try its search list. If the upstream servers have no
    /// records, the client must try its next name. `None` if the query is not part of a search list.
    pub walk: Option<Name>,
}

/// Writes the answer to a message into `buffer`. `turn` rotates the order of several addresses.
#[inline]
pub fn answer(
    zone: &Zone,
    client: Client,
    transport: Transport,
    message: &[u8],
    buffer: &mut [u8],
    turn: usize,
) -> Outcome {
    if !zone.knows(client) {
        // The source address may be forged, so not even an error is sent.
        return Outcome::Ignore;
    }
    let query = match Query::read(message) {
        Ok(query) => query,
        Err(QueryError::Ignore) => return Outcome::Ignore,
        Err(QueryError::Refuse(rcode)) => return answer_error(message, rcode, buffer),
    };
    let limit = match transport {
        Transport::Udp => query.udp_limit(),
        Transport::Tcp => usize::from(u16::MAX),
    };
    let written = answer_query(zone, client, limit, message, &query, buffer, turn);
    written.unwrap_or(Outcome::Ignore)
}

#[inline]
fn answer_query(
    zone: &Zone,
    client: Client,
    limit: usize,
    message: &[u8],
    query: &Query,
    buffer: &mut [u8],
    turn: usize,
) -> Option<Outcome> {
    let empty_response = |buffer, rcode, authoritative| {
        let writer = Writer::answer(buffer, limit, message, query, rcode, authoritative)?;
        Some(Outcome::Answer(writer.finish(query, rcode)))
    };
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return empty_response(buffer, Rcode::BAD_VERSION, false);
    }
    if !query.is_internet() {
        return empty_response(buffer, Rcode::REFUSED, false);
    }
    match zone.find(client, &query.name) {
        Resolution::SearchPath(target) => {
            let chain = Chain::follow(zone, client, query.kind, *target);
            answer_chain(zone, client, limit, message, query, buffer, turn, &chain, true)
        }
        Resolution::Found(network, records) => {
            if let Some(target) = records.alias().filter(|_| query.kind != RecordType::CNAME) {
                let chain = Chain::follow(zone, client, query.kind, target.name());
                return answer_chain(zone, client, limit, message, query, buffer, turn, &chain, false);
            }
            let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NO_ERROR, true)?;
            match write_records(&mut writer, None, zone, client, query.kind, network, records, turn) {
                (0, true) => {
                    let apex = zone.apex(&query.name);
                    let written = u16::from(write_soa(&mut writer, &apex));
                    let is_asked = query.kind == RecordType::SOA && query.name == apex;
                    let (answers, authority) = if is_asked { (written, 0) } else { (0, written) };
                    writer.count(answers, authority, 0, false);
                }
                (count, whole) => writer.count(count, 0, 0, !whole),
            }
            Some(Outcome::Answer(writer.finish(query, Rcode::NO_ERROR)))
        }
        Resolution::NotFound => name_error(zone, limit, message, query, buffer),
        // The host sends only queries for names under ovl's domain here, and has its own resolver for all
        // others. From internal networks, data could leave in the names of queries.
        Resolution::External if !zone.allows_external(client) => {
            empty_response(buffer, Rcode::REFUSED, false)
        }
        Resolution::External => Some(Outcome::Forward),
    }
}

/// The maximum number of names in a row of which each is an alias of the next one. An external Service may be an alias of
/// another one, and the limit ends loops.
const MAX_ALIASES: usize = 8;

/// The names that the zone's aliases lead to, and where they end.
struct Chain<'a> {
    /// The targets; those after the first `length` are not used.
    names: [Name; MAX_ALIASES],
    length: usize,
    end: End<'a>,
}

/// Where a chain of aliases ends.
#[derive(Clone, Copy)]
enum End<'a> {
    /// At a name of the zone with these records.
    Found(NetworkKey, &'a Records),
    /// At a name that does not exist.
    NotFound,
    /// At a name of no local domain.
    External,
    /// Nowhere: the aliases form a loop, or there are too many.
    Endless,
}

impl<'a> Chain<'a> {
    /// Follows aliases from the first target on.
    fn follow(zone: &'a Zone, client: Client, kind: RecordType, first: Name) -> Self {
        let mut chain = Self { names: [Name::ROOT; MAX_ALIASES], length: 0, end: End::Endless };
        let mut next = Some(first);
        for (slot, length) in chain.names.iter_mut().zip(1..) {
            let Some(name) = next.take() else { break };
            (*slot, chain.length) = (name, length);
            chain.end = match zone.find(client, &name) {
                Resolution::Found(network, records) => {
                    next =
                        records.alias().filter(|_| kind != RecordType::CNAME).map(ovl_zone::KeptName::name);
                    if next.is_some() { End::Endless } else { End::Found(network, records) }
                }
                // Only the queried name itself is a step of a search list.
                Resolution::NotFound | Resolution::SearchPath(_) => End::NotFound,
                Resolution::External => End::External,
            };
        }
        chain
    }

    fn names(&self) -> &[Name] {
        self.names.get(..self.length).unwrap_or_default()
    }
}

/// Answers with the CNAME records of a chain, and with the records of its last name if they are in the zone. `walked`: the
/// query is the first step of a search list, and the chain begins at the name that the list ends at.
#[expect(clippy::too_many_arguments, reason = "all of them are inputs of an answer")]
fn answer_chain(
    zone: &Zone,
    client: Client,
    limit: usize,
    message: &[u8],
    query: &Query,
    buffer: &mut [u8],
    turn: usize,
    chain: &Chain<'_>,
    walked: bool,
) -> Option<Outcome> {
    let last = chain.names().last()?;
    let empty_response = |buffer, rcode| {
        let writer = Writer::answer(buffer, limit, message, query, rcode, false)?;
        Some(Outcome::Answer(writer.finish(query, rcode)))
    };
    match chain.end {
        End::Found(network, records) => {
            let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NO_ERROR, true)?;
            let (mut owner, mut aliases, mut whole) = (None, 0, true);
            for target in chain.names() {
                let fits = writer.record(owner, RecordType::CNAME, TTL, &[target.as_bytes(), &[0]]);
                aliases += u16::from(fits);
                whole &= fits;
                owner = Some(target);
            }
            let (count, all) =
                write_records(&mut writer, owner, zone, client, query.kind, network, records, turn);
            let has_soa = count == 0 && all && write_soa(&mut writer, &zone.apex(last));
            writer.count(count + aliases, u16::from(has_soa), 0, !(all && whole));
            Some(Outcome::Answer(writer.finish(query, Rcode::NO_ERROR)))
        }
        End::NotFound => name_error(zone, limit, message, query, buffer),
        End::External if zone.allows_external(client) => {
            let walk = walked.then(|| zone.apex(&query.name));
            Some(Outcome::Alias(Box::new(Target { name: *last, walk })))
        }
        // The walk of a search list goes on after NXDOMAIN.
        End::External if walked => name_error(zone, limit, message, query, buffer),
        End::External => empty_response(buffer, Rcode::REFUSED),
        End::Endless => empty_response(buffer, Rcode::SERVER_FAILURE),
    }
}

fn name_error(
    zone: &Zone,
    limit: usize,
    message: &[u8],
    query: &Query,
    buffer: &mut [u8],
) -> Option<Outcome> {
    let mut writer = Writer::answer(buffer, limit, message, query, Rcode::NAME_ERROR, true)?;
    let has_soa = write_soa(&mut writer, &zone.apex(&query.name));
    writer.count(0, u16::from(has_soa), 0, false);
    Some(Outcome::Answer(writer.finish(query, Rcode::NAME_ERROR)))
}

/// Writes the SOA record that lets clients cache a negative answer (RFC 2308, section 3). Returns false if it
/// does not fit.
fn write_soa(writer: &mut Writer<'_>, apex: &Name) -> bool {
    // No mailbox; then serial, refresh, retry, expire, and the TTL of negative answers.
    let numbers = [1, 7200, 1800, 86_400, TTL].map(u32::to_be_bytes);
    writer.record(Some(apex), RecordType::SOA, TTL, &[apex.as_bytes(), &[0, 0], numbers.as_flattened()])
}

/// Writes the records of a type. Returns their number, and whether all of them fit.
#[inline]
#[expect(clippy::too_many_arguments, reason = "all of them are inputs of an answer")]
fn write_records(
    writer: &mut Writer<'_>,
    owner: Option<&Name>,
    zone: &Zone,
    client: Client,
    kind: RecordType,
    network: NetworkKey,
    records: &Records,
    turn: usize,
) -> (u16, bool) {
    let Records { v4, v6, names, others, above: _, unready: _ } = records;
    let (mut count, mut whole) = (0, true);
    let mut note = |fits: bool| {
        count += u16::from(fits);
        whole &= fits;
    };
    if kind == RecordType::A || kind == RecordType::ANY {
        for address in rotated(v4, turn) {
            note(writer.record(owner, RecordType::A, TTL, &[&Ipv4Addr::octets(address)]));
        }
    }
    if kind == RecordType::AAAA || kind == RecordType::ANY {
        for address in rotated(v6, turn) {
            note(writer.record(owner, RecordType::AAAA, TTL, &[&Ipv6Addr::octets(address)]));
        }
    }
    if kind == RecordType::PTR || kind == RecordType::ANY {
        for name in names.iter().filter_map(|name| zone.full(client, network, &name.name())) {
            note(writer.record(owner, RecordType::PTR, TTL, &[name.as_bytes(), &[0]]));
        }
    }
    let Some(OtherRecords { services, alias, text }) = others.as_deref() else { return (count, whole) };
    if kind == RecordType::SRV || kind == RecordType::ANY {
        // Records of equal priority and weight share the load (RFC 2782).
        for (port, target) in rotated(services, turn) {
            let [high, low] = port.to_be_bytes();
            note(writer.record(
                owner,
                RecordType::SRV,
                TTL,
                &[&[0, 0, 0, 1, high, low], target.as_bytes(), &[0]],
            ));
        }
    }
    if kind == RecordType::CNAME
        && let Some(alias) = alias
    {
        note(writer.record(owner, RecordType::CNAME, TTL, &[alias.as_bytes(), &[0]]));
    }
    if kind == RecordType::TXT
        && let Some(text) = text
    {
        note(writer.record(owner, RecordType::TXT, TTL, &[&[text.len() as u8], text.as_bytes()]));
    }
    (count, whole)
}

fn rotated<T>(all: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let at = if all.len() > 1 { turn % all.len() } else { 0 };
    let (before, after) = all.split_at_checked(at).unwrap_or((all, &[]));
    after.iter().chain(before)
}

/// Writes an error response without question, because the question may be malformed.
fn answer_error(message: &[u8], rcode: Rcode, buffer: &mut [u8]) -> Outcome {
    let (Some(room), Some(head)) = (buffer.get_mut(..HEADER), message.get(..4)) else {
        return Outcome::Ignore;
    };
    room.fill(0);
    room[..2].copy_from_slice(&head[..2]);
    // The opcode and RD are repeated.
    let asked = u16::from_be_bytes([head[2], head[3]]) & 0x7900;
    room[2..4].copy_from_slice(&(QR | asked | RA | rcode.0).to_be_bytes());
    Outcome::Answer(HEADER)
}

/// Builds a response with an rcode and no records.
pub(crate) fn empty_response(message: &[u8], query: &Query, rcode: Rcode) -> Vec<u8> {
    build(message, query, rcode, None)
}

/// Builds a negative response with an SOA record of the local domain.
pub(crate) fn negative_response(message: &[u8], query: &Query, rcode: Rcode, apex: &Name) -> Vec<u8> {
    build(message, query, rcode, Some(apex))
}

fn build(message: &[u8], query: &Query, rcode: Rcode, apex: Option<&Name>) -> Vec<u8> {
    let mut buffer = [0; crate::wire::MAX_UDP];
    let Some(mut writer) = Writer::answer(&mut buffer, usize::MAX, message, query, rcode, false) else {
        return Vec::new();
    };
    let has_soa = apex.is_some_and(|apex| write_soa(&mut writer, apex));
    writer.count(0, u16::from(has_soa), 0, false);
    let length = writer.finish(query, rcode);
    buffer.get(..length).unwrap_or_default().to_vec()
}
