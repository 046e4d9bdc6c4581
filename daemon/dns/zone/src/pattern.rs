//! Patterns of domain names, as the peers of network policies have them.

use std::fmt;

use crate::name::Name;

/// A domain name, or all names below one: `www.example.com` or `*.example.com`. Upper and lower case are the same, and so are
/// names with and without a final dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamePattern {
    /// The bytes of [`Name::as_bytes`] of the name, or of the one above all that match.
    name: Box<[u8]>,
    is_wildcard: bool,
}

impl NamePattern {
    /// Parses text such as `www.example.com` or `*.example.com`. `None` if no domain name can match: a label is empty or
    /// longer than 63 bytes, the name is too long, or there is a `*` elsewhere.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, is_wildcard) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let name = Name::parse(rest).filter(|_| !rest.contains('*'))?;
        Some(Self { name: name.as_bytes().into(), is_wildcard })
    }

    /// Whether the pattern matches a name. A wildcard stands for one or more whole labels, so `*.example.com` does not match
    /// `example.com`.
    pub fn matches(&self, name: &Name) -> bool {
        if !self.is_wildcard {
            return name.as_bytes() == &*self.name;
        }
        let above = Name::from_bytes(&self.name);
        above.and_then(|above| name.strip_suffix(&above)).is_some_and(|below| below != Name::ROOT)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.is_wildcard { "*." } else { "" };
        write!(f, "{star}{}", Name::from_bytes(&self.name).unwrap_or(Name::ROOT))
    }
}

impl fmt::Debug for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
