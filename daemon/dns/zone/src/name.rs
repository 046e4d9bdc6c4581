//! Domain names in wire format (RFC 1035, section 3.1): labels, each preceded by its length.

use std::fmt;

/// The longest name in bytes, without the root's zero.
const MAX: usize = 254;
/// The longest label, in bytes.
const MAX_LABEL: usize = 63;

/// A domain name in lower case. It lies on the stack, so that a query allocates nothing.
#[derive(Clone, Copy)]
pub struct Name {
    length: u8,
    bytes: [u8; MAX],
}

/// A domain name that is kept: it takes as many bytes as it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptName(Box<[u8]>);

impl KeptName {
    /// Returns the bytes of [`Name::as_bytes`].
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the name.
    pub fn name(&self) -> Name {
        Name::from_bytes(&self.0).unwrap_or(Name::ROOT)
    }
}

impl From<Name> for KeptName {
    fn from(name: Name) -> Self {
        Self(name.as_bytes().into())
    }
}

impl Name {
    /// The root domain.
    pub const ROOT: Self = Self { length: 0, bytes: [0; MAX] };

    /// Parses text like `web.blue`, with or without a final dot. `None` if it is not a valid name.
    pub fn parse(text: &str) -> Option<Self> {
        let mut name = Self::ROOT;
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return None;
        }
        for label in text.split('.') {
            name.push(label.as_bytes())?;
        }
        Some(name)
    }

    /// Creates a name from the bytes of [`Self::as_bytes`]. `None` if they are too long.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut name = Self::ROOT;
        name.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        name.length = u8::try_from(bytes.len()).ok()?;
        Some(name)
    }

    /// Appends a label. `None` if the label or the name becomes too long.
    pub fn push(&mut self, label: &[u8]) -> Option<()> {
        if label.is_empty() || label.len() > MAX_LABEL {
            return None;
        }
        let start = usize::from(self.length);
        let room = self.bytes.get_mut(start..start + 1 + label.len())?;
        let (length, rest) = room.split_first_mut()?;
        *length = label.len() as u8;
        rest.copy_from_slice(label);
        rest.make_ascii_lowercase();
        self.length += 1 + label.len() as u8;
        Some(())
    }

    /// Reads an uncompressed name from a question. Also returns where it ends.
    #[inline]
    pub fn read(message: &[u8], at: usize) -> Option<(Self, usize)> {
        let mut name = Self::ROOT;
        let mut end = at;
        loop {
            let length = usize::from(*message.get(end)?);
            end += 1;
            if length == 0 {
                break;
            }
            if length > MAX_LABEL {
                return None;
            }
            end += length;
        }
        let bytes = message.get(at..end - 1)?;
        name.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        name.length = bytes.len() as u8;
        // Lengths are smaller than letters, so the conversion does not change them.
        name.bytes[..bytes.len()].make_ascii_lowercase();
        Some((name, end))
    }

    /// Returns the wire format without the root's zero.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    /// Returns whether the name has two labels or more.
    #[inline]
    pub(crate) fn has_several_labels(&self) -> bool {
        let first = self.as_bytes().first().map_or(0, |length| usize::from(*length));
        self.as_bytes().len() > first + 1
    }

    /// Iterates over the labels.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.as_bytes();
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first()?;
            let (label, next) = after.split_at_checked(usize::from(*length))?;
            rest = next;
            Some(label)
        })
    }

    /// Returns the name without a suffix; the root if they are equal. `None` if the name does not end with
    /// the suffix.
    pub fn strip_suffix(&self, suffix: &Self) -> Option<Self> {
        let (all, end) = (self.as_bytes(), suffix.as_bytes());
        let at = all.len().checked_sub(end.len())?;
        if all.get(at..)? != end {
            return None;
        }
        // The suffix must begin at a label.
        let mut start = 0;
        while start < at {
            start += 1 + usize::from(*all.get(start)?);
        }
        if start == at { Self::from_bytes(all.get(..at)?) } else { None }
    }

    /// Appends a name. `None` if the result is too long.
    pub fn join(&self, after: &Self) -> Option<Self> {
        let mut name = *self;
        let start = usize::from(self.length);
        let end = start + after.as_bytes().len();
        name.bytes.get_mut(start..end)?.copy_from_slice(after.as_bytes());
        name.length = u8::try_from(end).ok()?;
        Some(name)
    }

    /// Returns the address of a reverse name (RFC 1035, section 3.5; RFC 3596, section 2.5). `None` if it is
    /// none.
    pub fn reversed(&self) -> Option<std::net::IpAddr> {
        fn number(label: &[u8], radix: u32) -> Option<u8> {
            u8::from_str_radix(std::str::from_utf8(label).ok()?, radix).ok()
        }
        let mut labels = self.labels();
        let count = self.labels().count();
        match count {
            6 => {
                let mut octets = [0u8; 4];
                for octet in octets.iter_mut().rev() {
                    *octet = number(labels.next()?, 10)?;
                }
                (labels.next()? == b"in-addr" && labels.next()? == b"arpa").then(|| octets.into())
            }
            34 => {
                let mut octets = [0u8; 16];
                for octet in octets.iter_mut().rev() {
                    let (low, high) = (labels.next()?, labels.next()?);
                    if low.len() != 1 || high.len() != 1 {
                        return None;
                    }
                    *octet = number(high, 16)? << 4 | number(low, 16)?;
                }
                (labels.next()? == b"ip6" && labels.next()? == b"arpa").then(|| octets.into())
            }
            _ => None,
        }
    }

    /// Returns the reverse name of an address.
    pub fn reverse_of(address: std::net::IpAddr) -> Self {
        use std::fmt::Write as _;
        let mut text = String::new();
        match address {
            std::net::IpAddr::V4(address) => {
                for octet in address.octets().iter().rev() {
                    let _ = write!(text, "{octet}.");
                }
                text.push_str("in-addr.arpa");
            }
            std::net::IpAddr::V6(address) => {
                for octet in address.octets().iter().rev() {
                    let _ = write!(text, "{:x}.{:x}.", octet & 15, octet >> 4);
                }
                text.push_str("ip6.arpa");
            }
        }
        Self::parse(&text).unwrap_or(Self::ROOT)
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Name {}

impl fmt::Display for Name {
    /// Writes the name with escapes (RFC 4343, section 2.1).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.length == 0 {
            return f.write_str(".");
        }
        for (i, label) in self.labels().enumerate() {
            if i > 0 {
                f.write_str(".")?;
            }
            for byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", char::from(*byte))?,
                    b'!'..=b'~' => write!(f, "{}", char::from(*byte))?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
