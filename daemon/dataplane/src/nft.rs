//! Tables of ovl whose contents change often: a skeleton of chains, sets and maps, written by `nft` when
//! it differs, and elements, changed by netlink one by one. The base table ([`BASE_TABLE`]) is text alone.
//!
//! An element is kept as the bytes that the kernel compares, so that thousands cost little; its set's
//! [`Shape`] says what they mean.

mod bytes;
mod skeleton;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub(crate) use bytes::address;
pub use bytes::{Field, Key, Value, Verdict, length};
pub use skeleton::{Chain, Object, Skeleton};

/// The name of the base table, in the family `inet`. It is written as a whole, as text.
pub const BASE_TABLE: &str = "ovl";

/// A table of ovl.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Who may send what inside of the kernel's tunnel; beside [`crate::state::Dataplane::sources`].
    Sources,
    /// Which frames of switched networks go through the host's IP stack.
    Divert,
    /// What endpoints of this host may send: bridged frames.
    GuardFrames,
    /// What endpoints of this host may send: routed packets.
    Guard,
    /// Published ports.
    Publish,
    /// Frames that turn round at the port of an endpoint which has published ports, or may be behind a Service.
    PublishFrames,
    /// Services.
    Services,
    /// Network policies.
    Policy,
    /// Frames of switched networks that network policies are about.
    PolicyFrames,
    /// What rewrites queries for the resolver, and its answers.
    Resolver,
    /// What gets queries for the resolver past the host's firewall, IPv4 and IPv6.
    Resolver4,
    /// See [`Table::Resolver4`].
    Resolver6,
}

impl Table {
    /// Those in [`crate::state::Dataplane::tables`].
    pub const ALL: [Self; 11] = [
        Self::GuardFrames,
        Self::Guard,
        Self::Divert,
        Self::Publish,
        Self::PublishFrames,
        Self::Services,
        Self::Policy,
        Self::PolicyFrames,
        Self::Resolver,
        Self::Resolver4,
        Self::Resolver6,
    ];

    /// Of packets: `inet`, `bridge`, `ip` or `ip6`.
    pub fn family(self) -> &'static str {
        match self {
            Self::Divert | Self::GuardFrames | Self::PublishFrames | Self::PolicyFrames => "bridge",
            Self::Sources | Self::Guard | Self::Publish | Self::Services | Self::Policy | Self::Resolver => {
                "inet"
            }
            Self::Resolver4 => "ip",
            Self::Resolver6 => "ip6",
        }
    }

    /// Within its family.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sources => "ovl-sources",
            Self::GuardFrames | Self::Guard => "ovl-guard",
            Self::Divert => "ovl-divert",
            Self::Publish | Self::PublishFrames => "ovl-publish",
            Self::Services => "ovl-services",
            Self::Policy | Self::PolicyFrames => "ovl-policy",
            Self::Resolver | Self::Resolver4 | Self::Resolver6 => "ovl-resolver",
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family(), self.name())
    }
}

/// What one field of a key, or of a map's data, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Type {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A MAC address.
    Mac,
    /// The number of a transport protocol.
    Protocol,
    /// A port of one.
    Port,
    /// A packet's mark.
    Mark,
    /// A packet's priority.
    Priority,
    /// The name of the device that a packet comes from.
    Device,
    /// The name of the device that it leaves by.
    Leaves,
    /// What this expression of nft's reads, so many bytes.
    Expression(&'static str, usize),
}

impl Type {
    /// Its name, if it has one.
    fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Mac => "ether_addr",
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::Mark => "mark",
            Self::Priority => "classid",
            Self::Device | Self::Leaves => "ifname",
            Self::Expression(..) => return None,
        })
    }

    /// An expression of this type, as `typeof` wants it.
    fn expression(self) -> &'static str {
        match self {
            Self::Ipv4 => "ip saddr",
            Self::Ipv6 => "ip6 saddr",
            Self::Mac => "ether saddr",
            Self::Protocol => "meta l4proto",
            Self::Port => "th dport",
            Self::Mark => "meta mark",
            Self::Priority => "meta priority",
            Self::Device => "iifname",
            Self::Leaves => "oifname",
            Self::Expression(text, _) => text,
        }
    }

    /// In bytes; a field takes the next multiple of four.
    fn size(self) -> usize {
        match self {
            Self::Ipv4 | Self::Mark | Self::Priority => 4,
            Self::Ipv6 | Self::Device | Self::Leaves => 16,
            Self::Mac => 6,
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Expression(_, size) => size,
        }
    }
}

/// What the elements of a set are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// The fields of keys.
    pub key: &'static [Type],
    /// What a key leads to.
    pub data: Data,
    /// Whether a field of a key can be a range.
    pub ranges: bool,
}

/// What a key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// To nothing: a set.
    None,
    /// To these fields.
    Fields(&'static [Type]),
    /// To a verdict.
    Verdict,
}

/// The set of the mark of connections that network policies allow as they are now: a connection with it need not be judged.
pub const CURRENT_MARK: Set =
    Set::new(Table::Policy, "current", Shape { key: &[Type::Mark], data: Data::None, ranges: false });

/// A set or a map whose elements are ours alone. What packets add to belongs into [`Skeleton::objects`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    /// Where it is.
    pub table: Table,
    /// Within the table, at most 255 bytes.
    pub name: Cow<'static, str>,
    /// What its elements are like.
    pub shape: Shape,
}

impl Set {
    /// With a name that is fixed.
    pub const fn new(table: Table, name: &'static str, shape: Shape) -> Self {
        Self { table, name: Cow::Borrowed(name), shape }
    }

    /// As it is written in the table's skeleton.
    pub fn definition(&self) -> String {
        let (kind, fields) = self.parts();
        let flags = if self.shape.ranges { "\n\t\tflags interval" } else { "" };
        format!("\t{kind} {} {{\n\t\t{fields}{flags}\n\t}}\n", self.name)
    }

    /// Whether it is a set or a map, and what its fields are.
    pub(crate) fn parts(&self) -> (&'static str, String) {
        let fields = |fields: &[Type]| {
            let fields: Vec<&str> = fields.iter().map(|field| field.expression()).collect();
            fields.join(" . ")
        };
        let named = |fields: &[Type]| {
            let names: Option<Vec<&str>> = fields.iter().map(|field| field.name()).collect();
            names.map(|names| names.join(" . "))
        };
        // Names where there are some: what nft 1.0.6 reads back of expressions does not go with every rule.
        let (key, data) = (self.shape.key, self.shape.data);
        let of_data = match data {
            Data::Fields(data) => named(data),
            Data::None | Data::Verdict => Some(String::new()),
        };
        let (word, key, of_data) = match (named(key), of_data, data) {
            (Some(key), Some(of_data), _) => ("type", key, of_data),
            (_, _, Data::Fields(data)) => ("typeof", fields(key), fields(data)),
            (_, _, Data::None | Data::Verdict) => ("typeof", fields(key), String::new()),
        };
        match data {
            Data::None => ("set", format!("{word} {key}")),
            Data::Fields(_) => ("map", format!("{word} {key} : {of_data}")),
            Data::Verdict => ("map", format!("{word} {key} : verdict")),
        }
    }

    /// `inet ovl-services name`.
    pub fn path(&self) -> String {
        format!("{} {}", self.table, self.name)
    }
}

/// The elements of one set.
pub type Contents = BTreeMap<Key, Value>;

/// The elements of many sets. Cheap to clone: what is not changed is shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Elements(BTreeMap<Set, Arc<Contents>>);

impl Elements {
    /// Of one set; nothing if it has none.
    pub fn of(&self, set: &Set) -> Option<&Contents> {
        self.0.get(set).map(AsRef::as_ref)
    }

    /// All sets that have some.
    pub fn sets(&self) -> impl Iterator<Item = (&Set, &Contents)> {
        self.0.iter().map(|(set, contents)| (set, contents.as_ref()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.values().map(|contents| contents.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts one in, instead of one with the same key; gives that.
    pub fn insert(&mut self, set: &Set, key: Key, value: Value) -> Option<Value> {
        let contents = match self.0.get_mut(set) {
            Some(contents) => contents,
            None => self.0.entry(set.clone()).or_default(),
        };
        Arc::make_mut(contents).insert(key, value)
    }

    /// Takes one out.
    pub fn remove(&mut self, set: &Set, key: &Key) -> Option<Value> {
        let contents = self.0.get_mut(set)?;
        let removed = Arc::make_mut(contents).remove(key);
        if contents.is_empty() {
            self.0.remove(set);
        }
        removed
    }

    /// Takes all of a set's in, instead of those that are there.
    pub fn set(&mut self, set: &Set, contents: Arc<Contents>) {
        if contents.is_empty() {
            self.0.remove(set);
        } else {
            self.0.insert(set.clone(), contents);
        }
    }

    /// Takes all of `other` in.
    pub fn merge(&mut self, other: Self) {
        for (set, contents) in other.0 {
            match self.0.get_mut(&set) {
                Some(there) => {
                    let more = contents.iter().map(|(key, value)| (key.clone(), value.clone()));
                    Arc::make_mut(there).extend(more);
                }
                None => drop(self.0.insert(set, contents)),
            }
        }
    }

    /// Forgets a table's.
    pub fn forget(&mut self, table: Table) {
        self.0.retain(|set, _| set.table != table);
    }
}

/// An element, as `nft` writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// Where it is.
    pub set: Set,
    /// What is looked up.
    pub key: Key,
    /// What is found.
    pub value: Value,
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { set, key, value } = self;
        write!(f, "{}", key.show(set.shape.key))?;
        match (value, set.shape.data) {
            (Value::Data(bytes), Data::Fields(fields)) => {
                write!(f, " : {}", bytes::show(fields, bytes, None))
            }
            (Value::Verdict(verdict), _) => write!(f, " : {verdict}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
