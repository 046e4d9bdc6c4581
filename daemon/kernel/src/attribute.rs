//! Reads and writes netlink messages and attributes.
//!
//! The parser of `netlink-packet-route` decodes every attribute of every message and fails on the first one
//! that it does not know. That is too slow for ten thousand entries, and wrong for devices of other programs
//! that a newer kernel describes. Writing is for families that the `netlink-packet` crates do not support.

use netlink_packet_core::{NLA_F_NESTED, NLA_TYPE_MASK};

/// A netlink message in a buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) sender: u32,
    pub(super) payload: &'a [u8],
}

/// The length of a netlink message's header.
pub(super) const HEADER: usize = 16;

/// Iterates over the messages in a buffer.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let payload = bytes.get(HEADER..length)?;
        let message = Message {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            sender: u32_at(bytes, 12)?,
            payload,
        };
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some(message)
    })
}

/// Iterates over the attributes of a payload, each with its type and value. `fixed` is the length of the fixed
/// part before them.
pub(super) fn attributes(payload: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = payload.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A writer of attributes. The length of each attribute, nested ones included, must fit 16 bits: the caller
/// splits longer lists.
#[derive(Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// Starts with the fixed part of a message.
    pub(super) fn after(fixed: &[u8]) -> Self {
        Self(fixed.to_vec())
    }

    /// Appends an attribute.
    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        self.write(kind, |bytes| bytes.extend_from_slice(value));
    }

    /// Appends a text attribute, with its terminating zero byte.
    pub(super) fn put_text(&mut self, kind: u16, value: &str) {
        self.write(kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    /// Appends an attribute whose value is the attributes that `inner` writes.
    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        self.write(kind | NLA_F_NESTED, |bytes| {
            // The position is aligned, so the nested attributes can be written in place.
            let mut nested = Self(std::mem::take(bytes));
            inner(&mut nested);
            *bytes = nested.0;
        });
    }

    fn write(&mut self, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        value(&mut self.0);
        let length = self.0.len() - start;
        debug_assert!(length <= usize::from(u16::MAX), "an attribute of {length} bytes");
        for (byte, value) in self.0.iter_mut().skip(start).zip((length as u16).to_ne_bytes()) {
            *byte = value;
        }
        for (byte, value) in self.0.iter_mut().skip(start + 2).zip(kind.to_ne_bytes()) {
            *byte = value;
        }
        self.0.resize(start + length.next_multiple_of(4), 0);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The text before the first zero byte; empty if it is not UTF-8.
pub(super) fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    value.get(..end).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
}

pub(super) fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u16_be(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// An IPv4 or IPv6 address, by its length.
pub(super) fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

fn aligned(length: usize) -> usize {
    length.max(4).next_multiple_of(4)
}
