//! Addresses that a client is about to be told for names that its network policies admit connections to.
//!
//! They are made known before the answer is sent ([`Told`]), so that the first packet of the client passes. Which names an
//! answer is about is decided by [`find`]; the module owns no state.
//!
//! The name that a client asks for counts, and so do those that ovl itself gives in its place: an alias of the zone, the name
//! at which a search list ends. What another resolver's CNAME records lead to does not: whose domain the asked name is in may
//! put any names there, such as one that a policy trusts, with addresses of its own.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ovl_zone::{Client, Name, NamePattern, Resolution, Zone};
use tokio::sync::oneshot;

use crate::answer::Target;
use crate::message::{answers, expand};
use crate::wire::{IN, RecordType};

/// The limit of names in a chain of CNAME records that is followed.
const MAX_CHAIN: usize = 16;
/// How long the same is not told again.
const RECENT: Duration = Duration::from_secs(1);
/// The limit of what is remembered as told.
const MAX_RECENT: usize = 4096;

/// What a client is about to be told. The answer waits until `noted` is used or dropped, but not for long.
#[derive(Debug)]
pub struct Told {
    /// The name, and what it is an address of.
    pub found: Found,
    /// To be used or dropped when the client may be told.
    pub noted: oneshot::Sender<()>,
}

/// Addresses in an answer, and the patterns that match a name that they are of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The last of the names that a pattern matches.
    pub name: String,
    /// The patterns.
    pub patterns: Vec<NamePattern>,
    /// The addresses, each with its time to live in seconds: the shortest one on the way from the asked name.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// Returns what an answer tells a client of names that it is watched for. `alias` is what other resolvers were asked for in
/// place of the name in the query; `is_own` says that all records are of the zone. `None` if it tells nothing of them.
pub(crate) fn find(
    zone: &Zone,
    client: Client,
    asked: &Name,
    alias: Option<&Target>,
    is_own: bool,
    answer: &[u8],
) -> Option<Found> {
    let watched = zone.watched(client);
    if watched.is_empty() {
        return None;
    }
    let walked = match alias {
        Some(target) => target.walk.is_some(),
        None => is_own && matches!(zone.find(client, asked), Resolution::SearchPath(_)),
    };
    let Chain { owners, addresses } = chain(answer, asked)?;
    let vouched = owners.iter().enumerate().filter(|(place, owner)| match place {
        // A step of a search list is no name of what the list ends at.
        0 => !walked,
        _ => is_own || alias.is_some_and(|target| target.name == **owner),
    });
    let vouched = vouched.map(|(_, owner)| owner).filter(|owner| zone.is_full(client, owner));
    let (mut name, mut patterns) = (None, Vec::new());
    for owner in vouched {
        for pattern in watched.iter().filter(|pattern| pattern.matches(owner)) {
            name = Some(owner);
            if !patterns.contains(pattern) {
                patterns.push(pattern.clone());
            }
        }
    }
    let name = name.filter(|_| !addresses.is_empty())?.to_string();
    Some(Found { name, patterns, addresses })
}

/// What was told within the last second, so that a client that asks for one name all the time costs nothing more.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    since: Option<Instant>,
    told: HashSet<u64>,
}

impl Recent {
    /// Whether the same was told lately.
    pub(crate) fn has(&self, found: &Found, now: Instant) -> bool {
        self.is_current(now) && self.told.contains(&Self::key(found))
    }

    /// Records that something was told.
    pub(crate) fn note(&mut self, found: &Found, now: Instant) {
        if !self.is_current(now) || self.told.len() >= MAX_RECENT {
            self.told.clear();
            self.since = Some(now);
        }
        self.told.insert(Self::key(found));
    }

    fn is_current(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now.saturating_duration_since(since) < RECENT)
    }

    /// Times to live count down, and addresses rotate: neither is new.
    fn key(found: &Found) -> u64 {
        let mut addresses: Vec<IpAddr> = found.addresses.iter().map(|(address, _)| *address).collect();
        addresses.sort_unstable();
        let mut hasher = DefaultHasher::new();
        (&found.patterns, addresses).hash(&mut hasher);
        hasher.finish()
    }
}

/// The names from the asked one to the last CNAME record's target, and the addresses of the last one.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    owners: Vec<Name>,
    addresses: Vec<(IpAddr, u32)>,
}

/// Follows the CNAME records of an answer from a name to its addresses. `None` if it is malformed.
fn chain(answer: &[u8], asked: &Name) -> Option<Chain> {
    let mut owners = vec![*asked];
    let mut shortest = u32::MAX;
    // Records may come in any order.
    while let Some((target, ttl)) = step(answer, owners.last()?)? {
        if owners.len() >= MAX_CHAIN || owners.contains(&target) {
            return Some(Chain { owners, addresses: Vec::new() });
        }
        owners.push(target);
        shortest = shortest.min(ttl);
    }
    let last = owners.last()?;
    let mut addresses = Vec::new();
    for record in answers(answer)? {
        let record = record?;
        let address: IpAddr = match record.kind {
            RecordType::A => Ipv4Addr::from(<[u8; 4]>::try_from(record.data).ok()?).into(),
            RecordType::AAAA => Ipv6Addr::from(<[u8; 16]>::try_from(record.data).ok()?).into(),
            _ => continue,
        };
        if record.class == IN && expand(answer, record.owner)? == *last {
            addresses.push((address, record.ttl.min(shortest)));
        }
    }
    Some(Chain { owners, addresses })
}

/// Returns the target and the time to live of a name's CNAME record. The outer `None` means that the answer is malformed.
fn step(answer: &[u8], owner: &Name) -> Option<Option<(Name, u32)>> {
    for record in answers(answer)? {
        let record = record?;
        if record.kind == RecordType::CNAME && record.class == IN && expand(answer, record.owner)? == *owner {
            return Some(Some((expand(answer, record.start)?, record.ttl)));
        }
    }
    Some(None)
}
