//! Answers of other servers: checked, measured, and made ready to be kept.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::answer::Target;
use crate::name::Name;
use crate::wire::{HEADER, IN, Kind, QR, Query, Rcode, TC, skip_name, u16_at, u32_at};

/// More records than that no answer has.
const MAX_RECORDS: usize = 4096;

/// What is known of another server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) rcode: Rcode,
    pub(crate) truncated: bool,
    /// Where the records' times to live are.
    pub(crate) ttls: Vec<u16>,
    /// For how many seconds it may be kept; nothing: not at all.
    pub(crate) ttl: Option<u32>,
    /// Where it ends without its OPT record and what follows that.
    pub(crate) end: usize,
    /// The additional records that are left then.
    pub(crate) additional: u16,
}

/// Whether a message answers this question of ours.
pub(crate) fn is_answer(message: &[u8], id: u16, name: &Name, kind: Kind) -> bool {
    let word = |at| u16_at(message, at);
    let is_ours = word(0) == Some(id) && word(2).is_some_and(|flags| flags & QR != 0);
    let repeated = || {
        let (read, at) = Name::read(message, HEADER)?;
        Some(read == *name && word(at)? == kind.0 && word(at + 2)? == IN)
    };
    let questions = word(4);
    let refused = || word(2).is_some_and(|flags| flags & 15 == Rcode::FORMAT.0 || flags & 15 == 4);
    match questions {
        // Some that do not understand a question do not repeat it.
        Some(0) => is_ours && message.len() == HEADER && refused(),
        Some(1) => is_ours && repeated() == Some(true),
        _ => false,
    }
}

/// Reads an answer; nothing if its parts do not fit together.
pub(crate) fn read(message: &[u8]) -> Option<Parts> {
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
            let kind = Kind(u16_at(message, named)?);
            // With its upper bit set it counts as none (RFC 2181, section 8).
            let ttl = u32_at(message, named + 4).map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl })?;
            let data = named + 10;
            at = data + usize::from(u16_at(message, named + 8)?);
            let data = message.get(data..at)?;
            if kind == Kind::OPT {
                cut = cut.or(Some(start));
                continue;
            }
            if cut.is_some() {
                continue;
            }
            parts.additional += u16::from(section == 2);
            parts.ttls.push(u16::try_from(named + 4).ok()?);
            least = least.min(ttl);
            if section == 1 && kind == Kind::SOA {
                let minimum = data.len().checked_sub(4).and_then(|at| u32_at(data, at))?;
                denied = Some(ttl.min(minimum));
            }
        }
    }
    parts.end = cut.unwrap_or(at);
    message.get(..parts.end)?;
    let answered = parts.rcode == Rcode::NO_ERROR && counts[0] > 0;
    let nothing = matches!(parts.rcode, Rcode::NO_ERROR | Rcode::NO_NAME) && !answered;
    // That there is nothing is kept for as long as its authority says (RFC 2308, section 5), and where a chain of
    // names ends in nothing, both count.
    parts.ttl = match denied {
        _ if parts.truncated => None,
        Some(denied) if parts.rcode == Rcode::NO_NAME => Some(denied.min(least)),
        Some(denied) if nothing => Some(denied),
        None if answered => Some(least),
        Some(_) if answered => Some(least),
        _ => None,
    };
    Some(parts)
}

/// A record of an answer, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// In seconds.
    pub ttl: u32,
    /// What it says.
    pub data: Data,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// An address.
    Address(IpAddr),
    /// A name.
    Name(String),
    /// Priority, weight, port and name.
    Service(u16, u16, u16, String),
    /// So many bytes of something else.
    Other(usize),
}

impl std::fmt::Display for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name) => f.write_str(name),
            Self::Service(priority, weight, port, name) => write!(f, "{priority} {weight} {port} {name}"),
            Self::Other(length) => write!(f, "{length} bytes"),
        }
    }
}

/// How an answer ended, and the records of its answer section; nothing if it cannot be read.
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
        let kind = Kind(u16_at(message, fixed)?);
        let ttl = u32_at(message, fixed + 4)?;
        let start = fixed + 10;
        at = start + usize::from(u16_at(message, fixed + 8)?);
        let bytes = message.get(start..at)?;
        let data = match kind {
            Kind::A => Data::Address(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
            Kind::AAAA => Data::Address(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
            Kind::CNAME | Kind::PTR => Data::Name(expand(message, start)?.to_string()),
            Kind::SRV => {
                let word = |i| u16_at(bytes, i);
                Data::Service(word(0)?, word(2)?, word(4)?, expand(message, start + 6)?.to_string())
            }
            _ => Data::Other(bytes.len()),
        };
        records.push(Record { name, kind, ttl, data });
    }
    Some((rcode, records))
}

/// Another server's answer about a name as one to this query, which that name stands for: the alias first, then its
/// records, with all names written out, for pointers would lead elsewhere. Where there is nothing, a client that walks
/// its search list is told so about the name that it asked for, and goes on.
pub(crate) fn under(message: &[u8], query: &Query, target: &Target, answer: &[u8]) -> Option<Vec<u8>> {
    let Target { name, walk } = target;
    let rcode = Rcode(u16_at(answer, 2)? & 15);
    let count = u16_at(answer, 6)?;
    if rcode != Rcode::NO_ERROR && rcode != Rcode::NO_NAME {
        return Some(crate::answer::bare(message, query, rcode));
    }
    if let Some(apex) = walk.filter(|_| count == 0) {
        return Some(crate::answer::denial(message, query, rcode, &apex));
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
    let written = |name: &Name| [name.as_bytes(), &[0]].concat();
    let fixed = [&[0, Kind::CNAME.0 as u8, 0, IN as u8][..], &crate::answer::TTL.to_be_bytes()].concat();
    put(&mut whole, &query.name, &fixed, &written(name))?;
    for _ in 0..count {
        let owner = expand(answer, at)?;
        let named = skip_name(answer, at)?;
        let kind = Kind(u16_at(answer, named)?);
        let start = named + 10;
        at = start + usize::from(u16_at(answer, named + 8)?);
        let bytes = answer.get(start..at)?;
        let fixed = answer.get(named..named + 8)?;
        // Of the types of RFC 1035 that are asked for, these have names in them; and others are never compressed
        // (RFC 3597, section 4).
        let data = match kind {
            Kind::CNAME | Kind::PTR | Kind::NS => written(&expand(answer, start)?),
            Kind::MX => [bytes.get(..2)?, &*written(&expand(answer, start + 2)?)].concat(),
            Kind::SRV => [bytes.get(..6)?, &*written(&expand(answer, start + 6)?)].concat(),
            Kind::SOA => return None,
            _ => bytes.to_vec(),
        };
        put(&mut whole, &owner, fixed, &data)?;
    }
    Some(whole)
}

/// A name that may be compressed. Each pointer leads further back, so there is an end.
fn expand(message: &[u8], mut at: usize) -> Option<Name> {
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
