//! Parses the answers of upstream servers and prepares them for the cache.

use ovl_zone::Name;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::answer::Target;
use crate::wire::{HEADER, IN, QR, Query, Rcode, RecordType, TC, skip_name, u16_at, u32_at};

/// The limit of records in an answer.
const MAX_RECORDS: usize = 4096;

/// The properties of an upstream answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) rcode: Rcode,
    pub(crate) truncated: bool,
    /// The offsets of the records' times to live.
    pub(crate) ttls: Vec<u16>,
    /// How long the answer may be cached, in seconds. `None` if it may not be cached.
    pub(crate) ttl: Option<u32>,
    /// The end of the message without its OPT record and what follows.
    pub(crate) end: usize,
    /// The number of additional records before that end.
    pub(crate) additional: u16,
}

/// Returns whether a message is a response to this question.
pub(crate) fn is_answer(message: &[u8], id: u16, name: &Name, kind: RecordType) -> bool {
    let word = |at| u16_at(message, at);
    let is_response = word(0) == Some(id) && word(2).is_some_and(|flags| flags & QR != 0);
    let repeated = || {
        let (read, at) = Name::read(message, HEADER)?;
        Some(read == *name && word(at)? == kind.0 && word(at + 2)? == IN)
    };
    let questions = word(4);
    let refused = || word(2).is_some_and(|flags| flags & 15 == Rcode::FORMAT_ERROR.0 || flags & 15 == 4);
    match questions {
        // Some servers do not repeat a question that they do not understand.
        Some(0) => is_response && message.len() == HEADER && refused(),
        Some(1) => is_response && repeated() == Some(true),
        _ => false,
    }
}

/// Parses an answer. `None` if it is malformed.
pub(crate) fn parse_answer(message: &[u8]) -> Option<Parts> {
    let flags = u16_at(message, 2)?;
    let questions = u16_at(message, 4)?;
    let mut at = HEADER;
    for _ in 0..questions {
        at = skip_name(message, at)? + 4;
    }
    let counts = [u16_at(message, 6)?, u16_at(message, 8)?, u16_at(message, 10)?];
    if counts.iter().map(|count| usize::from(*count)).sum::<usize>() > MAX_RECORDS {
        return None;
    }
    let mut parts = Parts {
        rcode: Rcode(flags & 15),
        truncated: flags & TC != 0,
        ttls: Vec::new(),
        ttl: None,
        end: 0,
        additional: 0,
    };
    let (mut least, mut denied, mut cut) = (u32::MAX, None, None);
    for (section, count) in counts.into_iter().enumerate() {
        for _ in 0..count {
            let start = at;
            let named = skip_name(message, at)?;
            let kind = RecordType(u16_at(message, named)?);
            // A TTL with the upper bit set counts as zero (RFC 2181, section 8).
            let ttl = u32_at(message, named + 4).map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl })?;
            let data = named + 10;
            at = data + usize::from(u16_at(message, named + 8)?);
            let data = message.get(data..at)?;
            if kind == RecordType::OPT {
                cut = cut.or(Some(start));
                continue;
            }
            if cut.is_some() {
                continue;
            }
            parts.additional += u16::from(section == 2);
            parts.ttls.push(u16::try_from(named + 4).ok()?);
            least = least.min(ttl);
            if section == 1 && kind == RecordType::SOA {
                let minimum = data.len().checked_sub(4).and_then(|at| u32_at(data, at))?;
                denied = Some(ttl.min(minimum));
            }
        }
    }
    parts.end = cut.unwrap_or(at);
    message.get(..parts.end)?;
    let answered = parts.rcode == Rcode::NO_ERROR && counts[0] > 0;
    let nothing = matches!(parts.rcode, Rcode::NO_ERROR | Rcode::NAME_ERROR) && !answered;
    // The SOA record gives the TTL of a negative answer (RFC 2308, section 5). If a CNAME chain ends in one,
    // the TTLs of the CNAME records count too.
    parts.ttl = match denied {
        _ if parts.truncated => None,
        Some(denied) if parts.rcode == Rcode::NAME_ERROR => Some(denied.min(least)),
        Some(denied) if nothing => Some(denied),
        None if answered => Some(least),
        Some(_) if answered => Some(least),
        _ => None,
    };
    Some(parts)
}

/// The records of a message that fit into a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fitting {
    /// The end of the last of them.
    pub(crate) end: usize,
    /// Their number in each section: answer, authority and additional.
    pub(crate) counts: [u16; 3],
    /// A record of the answer or of the authority section is left out. Additional records may be left out without
    /// notice (RFC 2181, section 9).
    pub(crate) truncated: bool,
}

/// Returns the records of a message up to the first one that does not fit into `limit` bytes. An OPT record counts as one
/// that does not fit. A name never points to a later one, so the rest of the message is not needed. `None` if the message
/// is malformed, or if not even its question fits.
pub(crate) fn fitting(message: &[u8], limit: usize) -> Option<Fitting> {
    let mut at = HEADER;
    for _ in 0..u16_at(message, 4)? {
        at = skip_name(message, at)?.checked_add(4)?;
    }
    message.get(..at)?;
    if at > limit {
        return None;
    }
    let mut fitting = Fitting { end: at, counts: [0; 3], truncated: false };
    for (section, count) in fitting.counts.iter_mut().enumerate() {
        for _ in 0..u16_at(message, 6 + 2 * section)? {
            let named = skip_name(message, fitting.end)?;
            let end = named.checked_add(10)?.checked_add(usize::from(u16_at(message, named + 8)?))?;
            message.get(..end)?;
            if end > limit || u16_at(message, named)? == RecordType::OPT.0 {
                fitting.truncated = section < 2;
                return Some(fitting);
            }
            *count += 1;
            fitting.end = end;
        }
    }
    Some(fitting)
}

/// A resource record in text form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The owner name.
    pub name: String,
    /// The type.
    pub kind: RecordType,
    /// The time to live, in seconds.
    pub ttl: u32,
    /// The data.
    pub data: RecordData,
}

/// The data of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordData {
    /// An A or AAAA record.
    Address(IpAddr),
    /// A CNAME or PTR record.
    Name(String),
    /// An SRV record: priority, weight, port and target.
    Service(u16, u16, u16, String),
    /// A record of another type, by its length in bytes.
    Other(usize),
}

impl std::fmt::Display for RecordData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name) => f.write_str(name),
            Self::Service(priority, weight, port, name) => write!(f, "{priority} {weight} {port} {name}"),
            Self::Other(length) => write!(f, "{length} bytes"),
        }
    }
}

/// A record as it is in a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawRecord<'a> {
    /// Where its owner's name begins.
    pub(crate) owner: usize,
    pub(crate) kind: RecordType,
    pub(crate) class: u16,
    /// In seconds. One with the upper bit set counts as zero (RFC 2181, section 8).
    pub(crate) ttl: u32,
    /// Where its data begins.
    pub(crate) start: usize,
    pub(crate) data: &'a [u8],
}

/// Iterates over the records of a message's answer section; `None` in place of one that is malformed, and after it.
pub(crate) fn answers(message: &[u8]) -> Option<impl Iterator<Item = Option<RawRecord<'_>>>> {
    let mut at = HEADER;
    for _ in 0..u16_at(message, 4)? {
        at = skip_name(message, at)?.checked_add(4)?;
    }
    let mut next = move || {
        let owner = at;
        let fixed = skip_name(message, at)?;
        let start = fixed.checked_add(10)?;
        at = start.checked_add(usize::from(u16_at(message, fixed + 8)?))?;
        let ttl = u32_at(message, fixed + 4)?;
        Some(RawRecord {
            owner,
            kind: RecordType(u16_at(message, fixed)?),
            class: u16_at(message, fixed + 2)?,
            ttl: if ttl > i32::MAX as u32 { 0 } else { ttl },
            start,
            data: message.get(start..at)?,
        })
    };
    Some((0..u16_at(message, 6)?).map(move |_| next()))
}

/// Parses the rcode and the answer section of a message. `None` if it is malformed.
pub fn records(message: &[u8]) -> Option<(Rcode, Vec<Record>)> {
    let rcode = Rcode(u16_at(message, 2)? & 15);
    let mut at = HEADER;
    for _ in 0..u16_at(message, 4)? {
        at = skip_name(message, at)? + 4;
    }
    let mut records = Vec::new();
    for _ in 0..u16_at(message, 6)? {
        let name = expand(message, at)?.to_string();
        let fixed = skip_name(message, at)?;
        let kind = RecordType(u16_at(message, fixed)?);
        let ttl = u32_at(message, fixed + 4)?;
        let start = fixed + 10;
        at = start + usize::from(u16_at(message, fixed + 8)?);
        let bytes = message.get(start..at)?;
        let data = match kind {
            RecordType::A => RecordData::Address(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
            RecordType::AAAA => RecordData::Address(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
            RecordType::CNAME | RecordType::PTR => RecordData::Name(expand(message, start)?.to_string()),
            RecordType::SRV => {
                let word = |i| u16_at(bytes, i);
                RecordData::Service(word(0)?, word(2)?, word(4)?, expand(message, start + 6)?.to_string())
            }
            _ => RecordData::Other(bytes.len()),
        };
        records.push(Record { name, kind, ttl, data });
    }
    Some((rcode, records))
}

/// Turns an upstream answer about `target` into an answer to the query: a CNAME record to the target, then
/// its records. All names are decompressed, because their pointers would be wrong. If the upstream server has
/// no records and the client tries its search list, the answer is negative, so that the client tries its next
/// name. `None` if the answer is malformed.
pub(crate) fn compose_alias_answer(
    message: &[u8],
    query: &Query,
    target: &Target,
    answer: &[u8],
) -> Option<Vec<u8>> {
    let Target { name, walk } = target;
    let rcode = Rcode(u16_at(answer, 2)? & 15);
    let count = u16_at(answer, 6)?;
    if rcode != Rcode::NO_ERROR && rcode != Rcode::NAME_ERROR {
        return Some(crate::answer::empty_response(message, query, rcode));
    }
    if let Some(apex) = walk.filter(|_| count == 0) {
        return Some(crate::answer::negative_response(message, query, rcode, &apex));
    }
    let mut at = HEADER;
    for _ in 0..u16_at(answer, 4)? {
        at = skip_name(answer, at)? + 4;
    }
    let mut whole = message.get(..query.end)?.to_vec();
    let flags = QR | query.flags & 0x0110 | 0x0080 | rcode.0;
    whole.get_mut(2..4)?.copy_from_slice(&flags.to_be_bytes());
    let answers = count.checked_add(1)?.to_be_bytes();
    whole.get_mut(6..HEADER)?.copy_from_slice(&[answers[0], answers[1], 0, 0, 0, 0]);
    let put = |whole: &mut Vec<u8>, owner: &Name, fixed: &[u8], data: &[u8]| {
        whole.extend_from_slice(owner.as_bytes());
        whole.push(0);
        whole.extend_from_slice(fixed);
        let length = u16::try_from(data.len()).ok()?;
        whole.extend_from_slice(&length.to_be_bytes());
        whole.extend_from_slice(data);
        Some(())
    };
    let encoded = |name: &Name| [name.as_bytes(), &[0]].concat();
    let fixed =
        [&[0, RecordType::CNAME.0 as u8, 0, IN as u8][..], &crate::answer::TTL.to_be_bytes()].concat();
    put(&mut whole, &query.name, &fixed, &encoded(name))?;
    for _ in 0..count {
        let owner = expand(answer, at)?;
        let named = skip_name(answer, at)?;
        let kind = RecordType(u16_at(answer, named)?);
        let start = named + 10;
        at = start + usize::from(u16_at(answer, named + 8)?);
        let bytes = answer.get(start..at)?;
        let fixed = answer.get(named..named + 8)?;
        // Only types of RFC 1035 may have compressed names (RFC 3597, section 4), and SRV does in practice.
        let data = match kind {
            RecordType::CNAME | RecordType::PTR | RecordType::NS => encoded(&expand(answer, start)?),
            RecordType::MX => [bytes.get(..2)?, &*encoded(&expand(answer, start + 2)?)].concat(),
            RecordType::SRV => [bytes.get(..6)?, &*encoded(&expand(answer, start + 6)?)].concat(),
            RecordType::SOA => return None,
            _ => bytes.to_vec(),
        };
        put(&mut whole, &owner, fixed, &data)?;
    }
    Some(whole)
}

/// Reads a name that may be compressed. Each pointer must lead further back, so there is no loop.
pub(crate) fn expand(message: &[u8], mut at: usize) -> Option<Name> {
    let mut name = Name::ROOT;
    let mut before = at;
    loop {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => return Some(name),
            1..=63 => {
                name.push(message.get(at + 1..at + 1 + length)?)?;
                at += 1 + length;
            }
            192.. => {
                let to = usize::from(u16_at(message, at)? & 0x3fff);
                if to >= before {
                    return None;
                }
                (at, before) = (to, to);
            }
            _ => return None,
        }
    }
}
