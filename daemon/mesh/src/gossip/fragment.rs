//! Messages of chitchat grow to 64 KiB and more: here they are compressed where that helps, cut
//! into datagrams that every path carries, and put together again, within bounds.

use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

use super::packet::{Bytes, Fragment, MAX_FRAGMENT};
use super::seal::RunId;

/// chitchat's messages end at 64 KiB and a little; larger ones are neither sent nor made.
pub(super) const MAX_MESSAGE: usize = 128 << 10;
/// Messages of one sender that are in pieces at a time.
const MAX_OPEN_PER_RUN: usize = 8;
/// Bytes of all messages in pieces.
const MAX_OPEN_BYTES: usize = 8 << 20;
/// A message that is not whole by then has lost a piece.
const PATIENCE: Duration = Duration::from_secs(2);

/// Cuts messages to size.
pub(super) struct Splitter {
    compressor: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
    next: u32,
}

impl Splitter {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { compressor: zstd::bulk::Compressor::new(1)?, scratch: Vec::new(), next: 0 })
    }

    /// The fragments of a message; none if it is too large.
    pub(super) fn split(&mut self, message: Vec<u8>) -> Vec<Fragment> {
        if message.len() > MAX_MESSAGE {
            return Vec::new();
        }
        self.next = self.next.wrapping_add(1);
        let number = self.next;
        // What fits one datagram gains nothing.
        if message.len() <= MAX_FRAGMENT {
            let data = Bytes(message);
            return vec![Fragment { message: number, index: 0, count: 1, compressed: false, data }];
        }
        self.scratch.resize(message.len(), 0);
        let (compressed, data) = match self.compressor.compress_to_buffer(&message, &mut self.scratch) {
            Ok(length) => (true, self.scratch.get(..length).unwrap_or_default()),
            // It does not get smaller.
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

/// Puts messages together.
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
    /// Takes a fragment; gives the message if it was the last one missing. An error is a fragment
    /// that no honest sender makes.
    pub(super) fn join(
        &mut self,
        run: RunId,
        fragment: Fragment,
        now: Instant,
    ) -> Result<Option<Vec<u8>>, &'static str> {
        let Fragment { message, index, count, compressed, data } = fragment;
        if index >= count || usize::from(count) > MAX_MESSAGE.div_ceil(MAX_FRAGMENT) {
            return Err("a fragment that cannot be");
        }
        if data.0.len() > MAX_FRAGMENT {
            return Err("a fragment too large");
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
            return Err("fragments that do not belong together");
        }
        match partial.pieces.get_mut(usize::from(index)) {
            Some(place @ None) => {
                partial.bytes += data.0.len();
                self.bytes += data.0.len();
                partial.missing -= 1;
                *place = Some(data);
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

    /// Drops what will never be whole. Cheap when there is nothing.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.open.is_empty() {
            return;
        }
        let stale = |partial: &Partial| now.saturating_duration_since(partial.since) > PATIENCE;
        let gone: Vec<_> =
            self.open.iter().filter(|(_, partial)| stale(partial)).map(|(key, _)| *key).collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// The oldest go first: of the same sender if it has too many, else of all.
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
    zstd::bulk::decompress(&data, MAX_MESSAGE).map_err(|_| "compressed data that is damaged or too large")
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
    fn messages_of_all_sizes_survive_in_any_order() {
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
    fn memory_is_bounded_and_stale_pieces_go() {
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
        joiner.expire(now + PATIENCE * 2);
        assert!(joiner.open.is_empty() && joiner.bytes == 0);
    }

    #[test]
    fn a_bomb_does_not_go_off() {
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
                // Errors are fine, and so are messages.
                drop(joiner.join([0; 16], fragment, Instant::now()));
            }
        }
    }
}
