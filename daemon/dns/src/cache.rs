//! The cache of upstream answers.
//!
//! It is bounded by two generations: entries that were added or used recently are in the young one. When that
//! is full, the old generation is dropped and the young one becomes the old one.

use ovl_zone::Name;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::message::Parts;
use crate::wire::{RecordType, u32_at};

/// The limits of each generation: entries, and bytes of messages.
const MAX_ENTRIES: usize = 5_000;
const MAX_BYTES: usize = 8 << 20;
/// The largest answer that is cached, in bytes. Larger ones are rare.
const MAX_MESSAGE: usize = 8 << 10;
/// The longest times to live of positive and negative answers, in seconds (RFC 2308, section 5).
const MAX_TTL: u32 = 86_400;
const MAX_DENIED: u32 = 10_800;

/// The key of a cached answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Question {
    name: Box<[u8]>,
    pub(crate) kind: RecordType,
    /// The DO bit (RFC 3225).
    pub(crate) dnssec: bool,
    /// The CD bit (RFC 4035, section 3.2.2).
    pub(crate) unchecked: bool,
}

impl Question {
    pub(crate) fn new(name: &Name, kind: RecordType, dnssec: bool, unchecked: bool) -> Self {
        Self { name: name.as_bytes().into(), kind, dnssec, unchecked }
    }

    pub(crate) fn name(&self) -> Name {
        Name::from_bytes(&self.name).unwrap_or(Name::ROOT)
    }
}

#[derive(Debug, Clone)]
struct Entry {
    message: Vec<u8>,
    /// The offsets of the times to live.
    ttls: Vec<u16>,
    stored: Instant,
    expires: Instant,
}

#[derive(Debug, Default)]
struct Generation {
    entries: HashMap<Question, Entry>,
    bytes: usize,
}

/// Caches answers by question.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    young: Generation,
    old: Generation,
}

impl Cache {
    /// Returns an answer with its times to live counted down. The id and the case of the name are those of
    /// another query.
    pub(crate) fn get(&mut self, question: &Question, now: Instant) -> Option<Vec<u8>> {
        if let Some(entry) = self.old.entries.remove(question) {
            self.old.bytes = self.old.bytes.saturating_sub(entry.message.len());
            self.insert(question.clone(), entry);
        }
        let entry = self.young.entries.get(question).filter(|entry| entry.expires > now)?;
        let age = u32::try_from(now.saturating_duration_since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        let mut message = entry.message.clone();
        for at in &entry.ttls {
            let at = usize::from(*at);
            let left = u32_at(&message, at).unwrap_or_default().saturating_sub(age);
            if let Some(room) = message.get_mut(at..at + 4) {
                room.copy_from_slice(&left.to_be_bytes());
            }
        }
        Some(message)
    }

    /// Adds an answer without OPT record, if it may be cached.
    pub(crate) fn put(&mut self, question: &Question, message: &[u8], parts: &Parts, now: Instant) {
        let has_answers = crate::wire::u16_at(message, 6).is_some_and(|count| count > 0);
        let longest = if has_answers { MAX_TTL } else { MAX_DENIED };
        let Some(ttl) = parts.ttl.map(|ttl| ttl.min(longest)).filter(|ttl| *ttl > 0) else { return };
        if message.len() > MAX_MESSAGE {
            return;
        }
        let expires = now + Duration::from_secs(u64::from(ttl));
        let ttls = parts.ttls.clone();
        self.insert(question.clone(), Entry { message: message.to_vec(), ttls, stored: now, expires });
    }

    /// Removes all entries, because other servers may give other answers.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    fn insert(&mut self, question: Question, entry: Entry) {
        if self.young.entries.len() >= MAX_ENTRIES || self.young.bytes + entry.message.len() > MAX_BYTES {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.bytes += entry.message.len();
        if let Some(before) = self.young.entries.insert(question, entry) {
            self.young.bytes = self.young.bytes.saturating_sub(before.message.len());
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.entries.len() + self.old.entries.len()
    }
}
