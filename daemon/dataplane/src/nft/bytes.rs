//! Keys and values as the kernel has them: of several fields each is filled up to a multiple of four bytes,
//! as in its registers; a single one is as long as it is.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ovl_proto::id::Mac;

use super::Type;

/// One field of a key or of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field<'a> {
    /// An address of either family.
    Ip(IpAddr),
    /// All addresses of a prefix.
    Net(IpNet),
    /// A transport protocol.
    Protocol(u8),
    /// A port.
    Port(u16),
    /// A first and a last one.
    Ports(u16, u16),
    /// A MAC address.
    Mac(Mac),
    /// A mark, a priority, or what `numgen` gives.
    Number(u32),
    /// A device's name.
    Device(&'a str),
    /// Others, as they are in a packet.
    Bytes(&'a [u8]),
}

impl Field<'_> {
    /// Appends the field, or the first and the last of its range.
    fn write(&self, first: &mut Vec<u8>, last: &mut Vec<u8>) {
        let mut put = |from: &[u8], to: &[u8]| {
            first.extend_from_slice(from);
            last.extend_from_slice(to);
        };
        match self {
            Self::Ip(IpAddr::V4(address)) => put(&address.octets(), &address.octets()),
            Self::Ip(IpAddr::V6(address)) => put(&address.octets(), &address.octets()),
            Self::Net(IpNet::V4(net)) => put(&net.network().octets(), &net.broadcast().octets()),
            Self::Net(IpNet::V6(net)) => put(&net.network().octets(), &net.broadcast().octets()),
            Self::Protocol(number) => put(&[*number], &[*number]),
            Self::Port(port) => put(&port.to_be_bytes(), &port.to_be_bytes()),
            Self::Ports(from, to) => put(&from.to_be_bytes(), &to.to_be_bytes()),
            Self::Mac(mac) => put(&mac.0, &mac.0),
            Self::Number(number) => put(&number.to_ne_bytes(), &number.to_ne_bytes()),
            Self::Device(name) => {
                let mut padded = [0; 16];
                for (byte, c) in padded.iter_mut().zip(name.bytes().take(15)) {
                    *byte = c;
                }
                put(&padded, &padded);
            }
            Self::Bytes(bytes) => put(bytes, bytes),
        }
    }
}

fn write(fields: &[Field<'_>]) -> (Box<[u8]>, Box<[u8]>) {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for field in fields {
        field.write(&mut first, &mut last);
        if fields.len() > 1 {
            first.resize(first.len().next_multiple_of(4), 0);
            last.resize(last.len().next_multiple_of(4), 0);
        }
    }
    (first.into(), last.into())
}

/// How many bytes fields take together.
pub fn length(fields: &[Type]) -> usize {
    match fields {
        [field] => field.size(),
        _ => fields.iter().map(|field| field.size().next_multiple_of(4)).sum(),
    }
}

/// What is looked up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    first: Box<[u8]>,
    /// Where a field is a range.
    last: Option<Box<[u8]>>,
}

impl Key {
    /// Of these fields.
    pub fn of(fields: &[Field<'_>]) -> Self {
        let (first, last) = write(fields);
        Self::from_bytes(first, Some(last))
    }

    /// Of a first and a last one, each as the kernel has it.
    pub fn from_bytes(first: Box<[u8]>, last: Option<Box<[u8]>>) -> Self {
        let last = last.filter(|last| *last != first);
        Self { first, last }
    }

    /// The key, or the first one of a range.
    pub fn first(&self) -> &[u8] {
        &self.first
    }

    /// The last one, if it is a range.
    pub fn last(&self) -> Option<&[u8]> {
        self.last.as_deref()
    }

    /// As `nft` writes it.
    pub(super) fn show(&self, fields: &[Type]) -> String {
        show(fields, &self.first, self.last())
    }
}

/// What is found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// That it is there.
    None,
    /// Fields, as the kernel has them.
    Data(Box<[u8]>),
    /// Where to go on.
    Verdict(Verdict),
}

impl Value {
    /// Of these fields.
    pub fn of(fields: &[Field<'_>]) -> Self {
        Self::Data(write(fields).0)
    }

    /// The number, if it is one: [`Field::Number`].
    pub fn as_number(&self) -> Option<u32> {
        match self {
            Self::Data(bytes) => Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)),
            Self::None | Self::Verdict(_) => None,
        }
    }

    /// The address and the port, if it is [`Field::Ip`] and [`Field::Port`].
    pub fn as_target(&self) -> Option<(IpAddr, u16)> {
        let Self::Data(bytes) = self else { return None };
        let (address, rest): (IpAddr, &[u8]) = match bytes.len() {
            8 => (<[u8; 4]>::try_from(bytes.get(..4)?).ok()?.into(), bytes.get(4..)?),
            20 => (<[u8; 16]>::try_from(bytes.get(..16)?).ok()?.into(), bytes.get(16..)?),
            _ => return None,
        };
        Some((address, u16::from_be_bytes(rest.get(..2)?.try_into().ok()?)))
    }
}

/// Where to go on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The packet has passed this hook.
    Accept,
    /// It is dropped.
    Drop,
    /// In the chain that jumped here.
    Return,
    /// With the next rule.
    Continue,
    /// In this chain, and then with the next rule.
    Jump(Cow<'static, str>),
    /// In this chain.
    Goto(Cow<'static, str>),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Continue => f.write_str("continue"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

/// Fields as `nft` writes them.
pub(super) fn show(fields: &[Type], mut first: &[u8], mut last: Option<&[u8]>) -> String {
    let mut text = String::new();
    for (i, field) in fields.iter().enumerate() {
        if i > 0 {
            text.push_str(" . ");
        }
        let size = field.size();
        let take = |bytes: &mut &[u8]| {
            let value = bytes.get(..size).unwrap_or_default().to_vec();
            *bytes = bytes.get(size.next_multiple_of(4)..).unwrap_or_default();
            value
        };
        let from = take(&mut first);
        let to = last.as_mut().map_or_else(|| from.clone(), take);
        show_range(&mut text, *field, &from, &to);
    }
    text
}

fn show_range(text: &mut String, field: Type, from: &[u8], to: &[u8]) {
    if from == to {
        show_one(text, field, from);
        return;
    }
    let prefix = match (field, address(from), address(to)) {
        (Type::Ipv4, Some(IpAddr::V4(from)), Some(IpAddr::V4(to))) => {
            let length = (from.to_bits() ^ to.to_bits()).leading_zeros() as u8;
            Ipv4Net::new(from, length)
                .ok()
                .filter(|net| net.network() == from && net.broadcast() == to)
                .map(IpNet::V4)
        }
        (Type::Ipv6, Some(IpAddr::V6(from)), Some(IpAddr::V6(to))) => {
            let length = (from.to_bits() ^ to.to_bits()).leading_zeros() as u8;
            Ipv6Net::new(from, length)
                .ok()
                .filter(|net| net.network() == from && net.broadcast() == to)
                .map(IpNet::V6)
        }
        _ => None,
    };
    match prefix {
        Some(net) => {
            let _ = write!(text, "{net}");
        }
        None => {
            show_one(text, field, from);
            text.push('-');
            show_one(text, field, to);
        }
    }
}

fn show_one(text: &mut String, field: Type, bytes: &[u8]) {
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let _ = match field {
        Type::Ipv4 | Type::Ipv6 => match address(bytes) {
            Some(address) => write!(text, "{address}"),
            None => write!(text, "?"),
        },
        Type::Mac => match <[u8; 6]>::try_from(bytes) {
            Ok(mac) => write!(text, "{}", Mac(mac)),
            Err(_) => write!(text, "?"),
        },
        Type::Protocol => match bytes {
            [6] => write!(text, "tcp"),
            [17] => write!(text, "udp"),
            [132] => write!(text, "sctp"),
            other => write!(text, "{}", number(other)),
        },
        Type::Port => write!(text, "{}", number(bytes)),
        Type::Mark => match <[u8; 4]>::try_from(bytes) {
            Ok(bytes) => write!(text, "{}", u32::from_ne_bytes(bytes)),
            Err(_) => write!(text, "?"),
        },
        Type::Priority => match <[u8; 4]>::try_from(bytes).map(u32::from_ne_bytes) {
            Ok(number) => write!(text, "{:x}:{:x}", number >> 16, number & 0xffff),
            Err(_) => write!(text, "?"),
        },
        Type::Device | Type::Leaves => {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            write!(text, "\"{}\"", String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()))
        }
        Type::Expression(..) => {
            text.push_str("0x");
            bytes.iter().try_for_each(|byte| write!(text, "{byte:02x}"))
        }
    };
}

/// An address of either family, as the kernel has it.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from).map(IpAddr::V4),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from).map(IpAddr::V6),
        _ => None,
    }
}
