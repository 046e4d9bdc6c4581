//! Domain names as peers of egress rules: the sets of addresses that workloads were told for them.
//!
//! Each pattern has one set for each address family, whose elements end by themselves; [`super::admitted`] decides which. A
//! connection that a pattern admits is remembered by its ends in another set, so that it goes on when the address is in the
//! first one no more and the packets of the connection are judged again, after a change of policies or a restart of ovld.
//!
//! The module owns no state.

use std::fmt;

use ovl_cluster::digest::hash;
use ovl_cluster::resources::Resources;
use ovl_dataplane::nft::Object;
use ovl_proto::resource::Labels;
use ovl_zone::NamePattern;

use super::members::family;
use super::{Direction, Policies, RulePeer};

/// The limit of addresses in the set of a pattern: of all patterns of a host together.
pub const MAX_ADDRESSES: usize = 16_384;

/// The prefix of the names of the sets of addresses.
pub const SETS: &str = "name.";

/// Connection tracking keeps an idle connection for as long.
const KEPT: &str = "size 65535; flags dynamic,timeout; timeout 5d";

/// Identifies a pattern in names of sets: the same on every host and after every start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameKey([u8; 6]);

impl NameKey {
    /// Returns the key of a pattern.
    pub fn of(pattern: &NamePattern) -> Self {
        let [a, b, c, d, e, f, ..] = hash(pattern.to_string().as_bytes());
        Self([a, b, c, d, e, f])
    }

    /// Returns the name of the set of addresses of a family.
    pub fn set(self, v4: bool) -> String {
        format!("{SETS}{self}.{}", family(v4))
    }

    /// Reads the name of a set. `None` if it is not one that [`Self::set`] returns.
    pub fn of_set(name: &str) -> Option<Self> {
        let (key, _) = name.strip_prefix(SETS)?.split_once('.')?;
        let mut bytes = [0; 6];
        for (place, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(key.get(2 * place..2 * place + 2)?, 16).ok()?;
        }
        (key.len() == 12).then_some(Self(bytes))
    }

    /// Returns the name of the set of the ends of connections that the pattern admitted.
    pub(super) fn kept(self, v4: bool) -> String {
        format!("kept.{self}.{}", family(v4))
    }

    /// Returns the sets as the table has them.
    pub(super) fn objects(self) -> impl Iterator<Item = Object> {
        [true, false].into_iter().flat_map(move |v4| {
            let address = if v4 { "ipv4_addr" } else { "ipv6_addr" };
            let addresses = format!("type {address}; size {MAX_ADDRESSES}; flags timeout");
            let ends = format!("type {address} . {address}; {KEPT}");
            [(self.set(v4), addresses), (self.kept(v4), ends)].map(|(name, body)| Object {
                kind: "set",
                name,
                body,
            })
        })
    }
}

impl fmt::Display for NameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Policies {
    /// Returns the pattern at an index, with its key. `None` if the index is out of range.
    pub fn pattern(&self, place: usize) -> Option<(&NamePattern, NameKey)> {
        self.names.get(place).map(|(pattern, key)| (pattern, *key))
    }

    /// Whether a pattern is a peer of a rule.
    pub fn has_pattern(&self, key: NameKey) -> bool {
        self.names.iter().any(|(_, known)| *known == key)
    }

    /// Whether a rule has a domain name as a peer.
    pub fn has_patterns(&self) -> bool {
        !self.names.is_empty()
    }

    /// Returns the patterns of names that rules admit connections to, for an endpoint with these labels. `None`: the labels are
    /// not known.
    pub fn patterns_of(
        &self,
        resources: &Resources,
        namespace: &str,
        labels: Option<&Labels>,
    ) -> Vec<NamePattern> {
        if self.names.is_empty() {
            return Vec::new();
        }
        let deciding = self.deciding(resources, namespace, labels, Direction::Egress);
        let policies = deciding.admin.iter().chain(&deciding.baseline);
        let rules = policies.flat_map(|policy| policy.rules(Direction::Egress));
        let mut found = Vec::new();
        for peer in rules.flat_map(|rule| &rule.rule.peers) {
            let RulePeer::Name(place) = peer else { continue };
            let Some((pattern, _)) = self.pattern(*place) else { continue };
            if !found.contains(pattern) {
                found.push(pattern.clone());
            }
        }
        found
    }
}
