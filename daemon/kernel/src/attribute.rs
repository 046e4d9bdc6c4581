//! Reading of netlink attributes, as far as a dump and the monitor need it. The crate's own parser
//! decodes all of every message and fails on the first thing it does not know: neither is right
//! for ten thousand entries, and for devices of others that a newer kernel describes. And writing,
//! for families that the crate does not know.

/// A netlink message within a buffer: its header and what follows.
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

/// The messages in a buffer.
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

/// The attributes in a payload after its fixed part.
pub(super) fn attributes(payload: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = payload.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        // The two highest bits are flags.
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Attributes being written. The length of each, with all that is nested in it, has to fit 16 bits:
/// who writes many cuts them.
#[derive(Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// After the fixed part of a message.
    pub(super) fn after(fixed: &[u8]) -> Self {
        Self(fixed.to_vec())
    }

    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        self.write(kind, |bytes| bytes.extend_from_slice(value));
    }

    /// A text with the zero byte after it.
    pub(super) fn put_text(&mut self, kind: u16, value: &str) {
        self.write(kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        const NESTED: u16 = 1 << 15;
        self.write(kind | NESTED, |bytes| {
            // Everything is aligned here, so that the inside can be written in place.
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

/// Text that ends with a zero byte.
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

/// An address of either family, by its length.
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
