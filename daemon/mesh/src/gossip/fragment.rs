//! Fragmentation of chitchat messages, which may exceed 64 KiB: they are compressed if that makes them smaller, split
//! into datagrams that fit every path, and reassembled with bounded memory.

use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

use super::bytes::Bytes;
use super::decompress::decompress;
use super::packet::{Fragment, MAX_FRAGMENT};
use super::seal::RunId;

/// The maximum size of a message in bytes. Messages of chitchat are slightly larger than 64 KiB at most.
pub(super) const MAX_MESSAGE: usize = 128 << 10;
/// The maximum number of incomplete messages of one sender.
const MAX_OPEN_PER_RUN: usize = 8;
/// The maximum size in bytes of all incomplete messages.
const MAX_OPEN_BYTES: usize = 8 << 20;
/// The time after which an incomplete message is dropped.
const REASSEMBLY_TIMEOUT: Duration = Duration::from_secs(2);

/// Splits messages into fragments.
pub(super) struct Splitter {
    compressor: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
    next: u32,
}

impl Splitter {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { compressor: zstd::bulk::Compressor::new(1)?, scratch: Vec::new(), next: 0 })
    }

    /// Splits a message into fragments. Returns none if it is too large.
    pub(super) fn split(&mut self, message: Vec<u8>) -> Vec<Fragment> {
        if message.len() > MAX_MESSAGE {
            return Vec::new();
        }
        self.next = self.next.wrapping_add(1);
        let number = self.next;
        // A message that fits one datagram is not compressed.
        if message.len() <= MAX_FRAGMENT {
            let data = Bytes(message);
            return vec![Fragment { message: number, index: 0, count: 1, compressed: false, data }];
        }
        self.scratch.resize(message.len(), 0);
        let (compressed, data) = match self.compressor.compress_to_buffer(&message, &mut self.scratch) {
            Ok(length) => (true, self.scratch.get(..length).unwrap_or_default()),
            // Compression does not make it smaller.
            Err(_) => (false, &message[..]),
        };
        let count = data.len().div_ceil(MAX_FRAGMENT) as u16;
        let piece = |(index, data): (usize, &[u8])| Fragment {
            message: number,
            index: index as u16,
            count,
            compressed,
            data: Bytes(data.to_vec()),
        };
        data.chunks(MAX_FRAGMENT).enumerate().map(piece).collect()
    }
}

/// Reassembles messages.
#[derive(Default)]
pub(super) struct Joiner {
    open: HashMap<(RunId, u32), Partial>,
    bytes: usize,
}

struct Partial {
    since: Instant,
    compressed: bool,
    pieces: Vec<Option<Bytes>>,
    missing: usize,
    bytes: usize,
}

impl Joiner {
    /// Adds a fragment. Returns the message if it is complete.
    ///
    /// # Errors
    ///
    /// A fragment that no correct sender produces.
    pub(super) fn join(
        &mut self,
        run: RunId,
        fragment: Fragment,
        now: Instant,
    ) -> Result<Option<Vec<u8>>, &'static str> {
        let Fragment { message, index, count, compressed, data } = fragment;
        if index >= count || usize::from(count) > MAX_MESSAGE.div_ceil(MAX_FRAGMENT) {
            return Err("invalid fragment: index or count out of range");
        }
        if data.0.len() > MAX_FRAGMENT {
            return Err("invalid fragment: too large");
        }
        if count == 1 {
            return decompressed(data.0, compressed).map(Some);
        }
        let key = (run, message);
        if !self.open.contains_key(&key) {
            self.make_room(run, now);
            let pieces = vec![None; usize::from(count)];
            let partial = Partial { since: now, compressed, missing: pieces.len(), pieces, bytes: 0 };
            self.open.insert(key, partial);
        }
        let Some(partial) = self.open.get_mut(&key) else { return Ok(None) };
        if partial.pieces.len() != usize::from(count) || partial.compressed != compressed {
            return Err("invalid fragment: it does not match the others of its message");
        }
        match partial.pieces.get_mut(usize::from(index)) {
            Some(slot @ None) => {
                partial.bytes += data.0.len();
                self.bytes += data.0.len();
                partial.missing -= 1;
                *slot = Some(data);
            }
            _ => return Ok(None),
        }
        if partial.missing > 0 {
            return Ok(None);
        }
        let Some(whole) = self.remove(&key) else { return Ok(None) };
        let mut joined = Vec::with_capacity(whole.bytes);
        for piece in whole.pieces.into_iter().flatten() {
            joined.extend_from_slice(&piece.0);
        }
        decompressed(joined, compressed).map(Some)
    }

    /// Drops the incomplete messages that are too old.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.open.is_empty() {
            return;
        }
        let stale = |partial: &Partial| now.saturating_duration_since(partial.since) > REASSEMBLY_TIMEOUT;
        let gone: Vec<_> =
            self.open.iter().filter(|(_, partial)| stale(partial)).map(|(key, _)| *key).collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Drops the oldest incomplete messages: of this sender if it has too many, and of all if they use too much memory.
    fn make_room(&mut self, run: RunId, now: Instant) {
        self.expire(now);
        let mut own: Vec<_> = self
            .open
            .iter()
            .filter(|(key, _)| key.0 == run)
            .map(|(key, partial)| (partial.since, *key))
            .collect();
        if own.len() >= MAX_OPEN_PER_RUN {
            own.sort_unstable();
            if let Some((_, key)) = own.first() {
                self.remove(key);
            }
        }
        while self.bytes > MAX_OPEN_BYTES - MAX_MESSAGE {
            let Some(key) = self.open.iter().min_by_key(|(_, partial)| partial.since).map(|(key, _)| *key)
            else {
                return;
            };
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &(RunId, u32)) -> Option<Partial> {
        let partial = self.open.remove(key)?;
        self.bytes -= partial.bytes;
        Some(partial)
    }
}

fn decompressed(data: Vec<u8>, compressed: bool) -> Result<Vec<u8>, &'static str> {
    if !compressed {
        return Ok(data);
    }
    decompress(&data, MAX_MESSAGE).map_err(|_| "invalid compressed message: damaged or too large")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(length)
        .collect()
    }

    fn join_all(joiner: &mut Joiner, fragments: Vec<Fragment>) -> Option<Vec<u8>> {
        let now = Instant::now();
        fragments.into_iter().find_map(|fragment| joiner.join([1; 16], fragment, now).unwrap())
    }

    #[test]
    fn messages_of_all_sizes_are_reassembled_in_any_order() {
        let mut splitter = Splitter::new().unwrap();
        let mut joiner = Joiner::default();
        for length in [0, 1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 65_536, MAX_MESSAGE] {
            for message in [noise(length), vec![7; length]] {
                let mut fragments = splitter.split(message.clone());
                fragments.reverse();
                assert_eq!(join_all(&mut joiner, fragments), Some(message));
            }
        }
        assert!(splitter.split(vec![0; MAX_MESSAGE + 1]).is_empty());
        assert!(splitter.split(vec![7; 60_000]).len() == 1, "it compresses");
        assert!(joiner.open.is_empty() && joiner.bytes == 0);
    }

    #[test]
    fn memory_is_bounded_and_old_fragments_are_dropped() {
        let mut splitter = Splitter::new().unwrap();
        let mut joiner = Joiner::default();
        let now = Instant::now();
        for run in 0..=255 {
            for _ in 0..12 {
                let mut fragments = splitter.split(noise(20_000));
                fragments.pop();
                for fragment in fragments {
                    assert_eq!(joiner.join([run; 16], fragment, now), Ok(None));
                }
            }
            let mine = joiner.open.keys().filter(|key| key.0 == [run; 16]).count();
            assert!(mine <= MAX_OPEN_PER_RUN);
            assert!(joiner.bytes <= MAX_OPEN_BYTES);
        }
        joiner.expire(now + REASSEMBLY_TIMEOUT * 2);
        assert!(joiner.open.is_empty() && joiner.bytes == 0);
    }

    #[test]
    fn decompression_bomb_is_rejected() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert!(bomb.len() > MAX_FRAGMENT || decompressed(bomb.clone(), true).is_err());
        assert!(decompressed(bomb, true).is_err());
    }

    proptest! {
        #[test]
        fn strange_fragments_never_panic(
            pieces in proptest::collection::vec(
                (0_u32..3, 0_u16..5, 0_u16..5, any::<bool>(), 0_usize..40), 0..60)
        ) {
            let mut joiner = Joiner::default();
            for (message, index, count, compressed, length) in pieces {
                let data = Bytes(vec![1; length]);
                let fragment = Fragment { message, index, count, compressed, data };
                // Errors and messages are both valid results.
                drop(joiner.join([0; 16], fragment, Instant::now()));
            }
        }
    }
}
