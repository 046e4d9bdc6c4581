//! Parses queries and writes answers without allocation (RFC 1035, RFC 6891).

use ovl_zone::Name;

/// The length of a message header, in bytes.
pub(crate) const HEADER: usize = 12;
/// The largest datagram that is sent, in bytes: it passes every path unfragmented (DNS flag day 2020).
pub(crate) const MAX_UDP: usize = 1232;
/// The largest datagram for a client without EDNS, in bytes (RFC 1035, section 4.2.1).
pub(crate) const PLAIN_UDP: usize = 512;
/// The length of the OPT record that is sent, in bytes.
pub(crate) const OPT: usize = 11;

pub(crate) const QR: u16 = 0x8000;
pub(crate) const OPCODE: u16 = 0x7800;
pub(crate) const AA: u16 = 0x0400;
pub(crate) const TC: u16 = 0x0200;
pub(crate) const RD: u16 = 0x0100;
pub(crate) const RA: u16 = 0x0080;
pub(crate) const AD: u16 = 0x0020;
pub(crate) const CD: u16 = 0x0010;
/// The class IN.
pub(crate) const IN: u16 = 1;
const ANY_CLASS: u16 = 255;
const DNSSEC_OK: u32 = 0x8000;
/// The limit of additional records in a query.
const MAX_ADDITIONAL: u16 = 8;

/// The type of a resource record, by its IANA number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordType(pub u16);

impl RecordType {
    /// An IPv4 address.
    pub const A: Self = Self(1);
    /// A name server.
    pub(crate) const NS: Self = Self(2);
    /// A mail exchange.
    pub(crate) const MX: Self = Self(15);
    /// A canonical name.
    pub const CNAME: Self = Self(5);
    /// The start of a zone of authority.
    pub const SOA: Self = Self(6);
    /// A pointer to another name, such as the name of an address.
    pub const PTR: Self = Self(12);
    /// Text.
    pub const TXT: Self = Self(16);
    /// An IPv6 address.
    pub const AAAA: Self = Self(28);
    /// The location of a service (RFC 2782).
    pub const SRV: Self = Self(33);
    /// The pseudo-record of EDNS (RFC 6891).
    pub const OPT: Self = Self(41);
    /// All types, in queries.
    pub const ANY: Self = Self(255);
    const NAMES: [(Self, &'static str); 8] = [
        (Self::A, "A"),
        (Self::CNAME, "CNAME"),
        (Self::SOA, "SOA"),
        (Self::PTR, "PTR"),
        (Self::TXT, "TXT"),
        (Self::AAAA, "AAAA"),
        (Self::SRV, "SRV"),
        (Self::ANY, "ANY"),
    ];

    /// Parses `A` or `TYPE1` (RFC 3597, section 5). `None` if the text is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let upper = text.to_ascii_uppercase();
        let known = Self::NAMES.iter().find(|(_, name)| *name == upper).map(|(kind, _)| *kind);
        known.or_else(|| upper.strip_prefix("TYPE")?.parse().ok().map(Self))
    }
}

impl std::fmt::Display for RecordType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Self::NAMES.iter().find(|(kind, _)| kind == self) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "TYPE{}", self.0),
        }
    }
}

/// A response code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rcode(pub u16);

impl Rcode {
    /// No error; the answer may be empty.
    pub const NO_ERROR: Self = Self(0);
    /// Format error: the query is malformed.
    pub const FORMAT_ERROR: Self = Self(1);
    /// Server failure: no server answered.
    pub const SERVER_FAILURE: Self = Self(2);
    /// Name error: the name does not exist.
    pub const NAME_ERROR: Self = Self(3);
    /// The server does not support the kind of query.
    pub const NOT_IMPLEMENTED: Self = Self(4);
    /// The server refuses to answer.
    pub const REFUSED: Self = Self(5);
    /// An unsupported version of EDNS (RFC 6891, section 9).
    pub(crate) const BAD_VERSION: Self = Self(16);
}

impl std::fmt::Display for Rcode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::NO_ERROR => f.write_str("NOERROR"),
            Self::FORMAT_ERROR => f.write_str("FORMERR"),
            Self::SERVER_FAILURE => f.write_str("SERVFAIL"),
            Self::NAME_ERROR => f.write_str("NXDOMAIN"),
            Self::NOT_IMPLEMENTED => f.write_str("NOTIMP"),
            Self::REFUSED => f.write_str("REFUSED"),
            Self(code) => write!(f, "RCODE{code}"),
        }
    }
}

/// The OPT record of a query (RFC 6891).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edns {
    /// The largest datagram that the client accepts, in bytes.
    pub(crate) payload: u16,
    /// The DO bit: the client wants DNSSEC records.
    pub(crate) dnssec: bool,
    /// The version of EDNS.
    pub(crate) version: u8,
}

/// A parsed query.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// The id, which the answer repeats.
    pub(crate) id: u16,
    /// The flags of the header.
    pub(crate) flags: u16,
    /// The name in the question.
    pub name: Name,
    /// The type in the question.
    pub kind: RecordType,
    /// The class in the question.
    pub(crate) class: u16,
    /// The end of the question in the message.
    pub(crate) end: usize,
    /// The OPT record. `None` if the query has none.
    pub(crate) edns: Option<Edns>,
}

/// Why a message is not answered as a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueryError {
    /// The message is dropped: it is too short, or a response.
    Ignore,
    /// The message is answered with this response code.
    Refuse(Rcode),
}

#[inline]
pub(crate) fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

#[inline]
pub(crate) fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

impl Query {
    /// Parses a message.
    ///
    /// # Errors
    ///
    /// What to do with a message that is not a valid query.
    #[inline]
    pub(crate) fn read(message: &[u8]) -> Result<Self, QueryError> {
        let header = message.get(..HEADER).ok_or(QueryError::Ignore)?;
        let word = |i: usize| u16_at(header, i).unwrap_or_default();
        let (id, flags) = (word(0), word(2));
        if flags & QR != 0 {
            return Err(QueryError::Ignore);
        }
        if flags & OPCODE != 0 {
            return Err(QueryError::Refuse(Rcode::NOT_IMPLEMENTED));
        }
        let additional = word(10);
        if word(4) != 1 || word(6) != 0 || word(8) != 0 || additional > MAX_ADDITIONAL {
            return Err(QueryError::Refuse(Rcode::FORMAT_ERROR));
        }
        let format = || QueryError::Refuse(Rcode::FORMAT_ERROR);
        let (name, at) = Name::read(message, HEADER).ok_or_else(format)?;
        let kind = RecordType(u16_at(message, at).ok_or_else(format)?);
        let class = u16_at(message, at + 2).ok_or_else(format)?;
        let end = at + 4;
        let edns = if additional == 0 { None } else { edns(message, end, additional).ok_or_else(format)? };
        Ok(Self { id, flags, name, kind, class, end, edns })
    }

    /// Returns whether the class is IN or ANY.
    pub(crate) fn is_internet(&self) -> bool {
        self.class == IN || self.class == ANY_CLASS
    }

    /// Returns the largest answer over UDP, in bytes.
    pub(crate) fn udp_limit(&self) -> usize {
        self.edns.map_or(PLAIN_UDP, |edns| usize::from(edns.payload).clamp(PLAIN_UDP, MAX_UDP))
    }

    /// Returns whether the client wants DNSSEC records.
    pub(crate) fn wants_dnssec(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec)
    }
}

/// Finds the OPT record among the additional records. The outer `None` means that they are malformed.
fn edns(message: &[u8], mut at: usize, count: u16) -> Option<Option<Edns>> {
    let mut found = None;
    for _ in 0..count {
        let start = at;
        at = skip_name(message, at)?;
        let kind = RecordType(u16_at(message, at)?);
        let (class, ttl) = (u16_at(message, at + 2)?, u32_at(message, at + 4)?);
        at += 10 + usize::from(u16_at(message, at + 8)?);
        if at > message.len() {
            return None;
        }
        if kind == RecordType::OPT {
            // There is at most one, and its owner is the root (RFC 6891, section 6.1).
            if found.is_some() || message.get(start) != Some(&0) {
                return None;
            }
            let version = (ttl >> 16) as u8;
            found = Some(Edns { payload: class, dnssec: ttl & DNSSEC_OK != 0, version });
        }
    }
    Some(found)
}

/// Returns the end of a name that may be compressed. `None` if it is malformed.
pub(crate) fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = *message.get(at)?;
        match length {
            0 => return Some(at + 1),
            1..=63 => at += 1 + usize::from(length),
            192..=255 => {
                message.get(at + 1)?;
                return Some(at + 2);
            }
            _ => return None,
        }
    }
}

/// Writes a message. A record that does not fit is left out, and [`Self::record`] returns false.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    buffer: &'a mut [u8],
    at: usize,
    limit: usize,
}

impl<'a> Writer<'a> {
    /// Begins the answer to a query with its header and question. `limit` is the largest message in bytes.
    /// `None` if not even these fit.
    #[inline]
    pub(crate) fn answer(
        buffer: &'a mut [u8],
        limit: usize,
        message: &[u8],
        query: &Query,
        rcode: Rcode,
        authoritative: bool,
    ) -> Option<Self> {
        let room = if query.edns.is_some() { OPT } else { 0 };
        let limit = limit.min(buffer.len()).checked_sub(room)?;
        let aa = if authoritative { AA } else { 0 };
        let flags = QR | aa | query.flags & (RD | CD) | RA | rcode.0 & 15;
        let mut writer = Self { buffer, at: 0, limit };
        let question = message.get(HEADER..query.end)?;
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&query.id.to_be_bytes());
        header[2..4].copy_from_slice(&flags.to_be_bytes());
        header[5] = 1;
        (writer.put(&header) && writer.put(question)).then_some(writer)
    }

    /// Writes bytes, unless they exceed the limit. Returns whether they fit.
    #[inline]
    pub(crate) fn put(&mut self, bytes: &[u8]) -> bool {
        let end = self.at + bytes.len();
        if end > self.limit {
            return false;
        }
        let Some(room) = self.buffer.get_mut(self.at..end) else { return false };
        room.copy_from_slice(bytes);
        self.at = end;
        true
    }

    /// Writes a record with its data in pieces. The owner is the name in the question if `owner` is `None`.
    /// Returns whether the record fits.
    #[inline]
    pub(crate) fn record(
        &mut self,
        owner: Option<&Name>,
        kind: RecordType,
        ttl: u32,
        data: &[&[u8]],
    ) -> bool {
        let start = self.at;
        let mut fixed = [0; 10];
        fixed[..2].copy_from_slice(&kind.0.to_be_bytes());
        fixed[3] = IN as u8;
        fixed[4..8].copy_from_slice(&ttl.to_be_bytes());
        let length = data.iter().map(|piece| piece.len()).sum::<usize>();
        let Ok(length) = u16::try_from(length) else { return false };
        fixed[8..].copy_from_slice(&length.to_be_bytes());
        let named = match owner {
            None => self.put(&[0xc0, HEADER as u8]),
            Some(name) => self.put(name.as_bytes()) && self.put(&[0]),
        };
        let fits = named && self.put(&fixed) && data.iter().all(|piece| self.put(piece));
        if !fits {
            self.at = start;
        }
        fits
    }

    /// Sets the number of records of each section, and whether the answer is truncated.
    #[inline]
    pub(crate) fn count(&mut self, answers: u16, authority: u16, additional: u16, truncated: bool) {
        let counts = [(6, answers), (8, authority), (10, additional)];
        for (at, count) in counts {
            if let Some(room) = self.buffer.get_mut(at..at + 2) {
                room.copy_from_slice(&count.to_be_bytes());
            }
        }
        if truncated && let Some(flags) = self.buffer.get_mut(2) {
            *flags |= (TC >> 8) as u8;
        }
    }

    /// Ends the message, with an OPT record if the query has one, and returns its length.
    #[inline]
    pub(crate) fn finish(mut self, query: &Query, rcode: Rcode) -> usize {
        if query.edns.is_some() {
            self.limit = self.buffer.len();
            if self.put(&opt(rcode, false))
                && let Some(count) = self.buffer.get_mut(11)
            {
                *count += 1;
            }
        }
        self.at
    }
}

/// Builds an OPT record, which carries the upper bits of the rcode.
pub(crate) fn opt(rcode: Rcode, dnssec: bool) -> [u8; OPT] {
    let payload = (MAX_UDP as u16).to_be_bytes();
    let flags = if dnssec { 0x80 } else { 0 };
    [0, 0, RecordType::OPT.0 as u8, payload[0], payload[1], (rcode.0 >> 4) as u8, 0, flags, 0, 0, 0]
}

/// Builds a query. `edns` is the DO bit of its OPT record; without it, the query has no OPT record.
pub fn question(id: u16, name: &Name, kind: RecordType, flags: u16, edns: Option<bool>) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + 255 + 4 + OPT);
    message.extend_from_slice(&id.to_be_bytes());
    message.extend_from_slice(&(RD | flags).to_be_bytes());
    message.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    message.extend_from_slice(name.as_bytes());
    message.push(0);
    message.extend_from_slice(&kind.0.to_be_bytes());
    message.extend_from_slice(&IN.to_be_bytes());
    if let Some(dnssec) = edns {
        message.extend_from_slice(&opt(Rcode::NO_ERROR, dnssec));
    }
    message
}
