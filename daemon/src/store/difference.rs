//! The difference between two encodings of the state: which bytes of the earlier one stay, and what is new between them.
//!
//! It knows nothing of what the bytes mean, so it holds for fields of later releases too. The earlier encoding is cut into
//! chunks where a hash of the last bytes says so, which is at the same places wherever those bytes are. Where a chunk of the
//! later one is in the earlier one too, all bytes around it that are equal stay. The allocation map that is being agreed on
//! is a copy of the one before with few changes, so the same bytes may stay at several places.

use std::collections::HashMap;

use ovl_proto::wire::MAX_STORED;
use serde::{Deserialize, Serialize};

/// The maximum length of a chunk in bytes.
const MAX_CHUNK: usize = 1024;
/// The length of a page in bytes.
const PAGE: usize = 256;
/// After how many bytes without a page that is the same the places are taken to be others.
const MAX_STRANGE: usize = 4 * PAGE;
/// The minimum length of a chunk in bytes, except the last.
const MIN_CHUNK: usize = 16;
/// A chunk ends where these bits of the hash are zero: on average after 64 bytes more. They depend on the last 16 bytes.
const BOUNDARY: u64 = 0x3f << 10;

/// One step from the earlier bytes to the later ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Step {
    /// Where the earlier bytes begin that come next.
    from: u64,
    /// How many they are.
    keep: u64,
    /// The bytes that come then.
    #[serde(with = "ovl_proto::wire::bytes")]
    insert: Vec<u8>,
}

/// Bytes that stay: where they begin in the earlier and in the later bytes, and how many they are.
#[derive(Debug, Clone, Copy)]
struct Kept {
    old: usize,
    new: usize,
    length: usize,
}

/// Carries out the steps. `None` if they are not about these bytes, or if the result is longer than [`MAX_STORED`].
pub(super) fn apply(old: &[u8], steps: &[Step]) -> Option<Vec<u8>> {
    let mut new = Vec::with_capacity(old.len());
    for step in steps {
        let from = old.get(usize::try_from(step.from).ok()?..)?;
        let kept = from.get(..usize::try_from(step.keep).ok()?)?;
        if new.len() + kept.len() + step.insert.len() > MAX_STORED {
            return None;
        }
        new.extend_from_slice(kept);
        new.extend_from_slice(&step.insert);
    }
    Some(new)
}

/// Returns steps that lead from the earlier bytes to the later ones.
///
/// Most changes leave the length of what comes before them, or after them, as it is. So bytes at the same distance from the
/// beginning, and from the end, are compared first, by pages. Only what is left is cut into chunks.
pub(super) fn difference(old: &[u8], new: &[u8]) -> Vec<Step> {
    let shortest = old.len().min(new.len());
    let mut begin = alike(shortest, |from, until| old[from..until] == new[from..until]);
    let of_end = |bytes: &'_ [u8], from: usize, until: usize| (bytes.len() - until, bytes.len() - from);
    let mut end = alike(shortest - begin, |from, until| {
        let ((a, b), (c, d)) = (of_end(old, from, until), of_end(new, from, until));
        old[a..b] == new[c..d]
    });
    begin += common_start(&old[begin..old.len() - end], &new[begin..new.len() - end]);
    end += common_end(&old[begin..old.len() - end], &new[begin..new.len() - end]);
    let mut all = Vec::new();
    keep_pages(&mut all, (&old[..begin], 0), (&new[..begin], 0));
    let (old_until, new_until) = (old.len() - end, new.len() - end);
    // What is new may be a copy of what follows it.
    let reach = old.len().min(old_until + 2 * (new_until - begin));
    keep_chunks(&mut all, (&old[begin..reach], begin), (&new[begin..new_until], begin));
    keep_pages(&mut all, (&old[old_until..], old_until), (&new[new_until..], new_until));
    steps(new, &all)
}

/// Returns for how many bytes pages are alike, at most `length`. A few in a row may differ. The last one does not.
fn alike(length: usize, is_same: impl Fn(usize, usize) -> bool) -> usize {
    let (mut same, mut at) = (0, 0);
    while at < length && at - same < MAX_STRANGE {
        let until = length.min(at + PAGE);
        if is_same(at, until) {
            same = until;
        }
        at = until;
    }
    same
}

/// Keeps what is the same in bytes of the same length, of which most pages are the same.
fn keep_pages(all: &mut Vec<Kept>, (old, old_at): (&[u8], usize), (new, new_at): (&[u8], usize)) {
    let mut at = 0;
    for (one, other) in old.chunks(PAGE).zip(new.chunks(PAGE)) {
        let length = one.len();
        let begin = if one == other { length } else { common_start(one, other) };
        let end = common_end(&one[begin..], &other[begin..]);
        for (from, length) in [(at, begin), (at + length - end, end)] {
            match all.last_mut() {
                Some(last)
                    if last.old + last.length == old_at + from && last.new + last.length == new_at + from =>
                {
                    last.length += length;
                }
                _ if length == 0 => {}
                _ => all.push(Kept { old: old_at + from, new: new_at + from, length }),
            }
        }
        at += length;
    }
}

/// Keeps what is the same anywhere. What is kept is at the given places of all bytes.
fn keep_chunks(all: &mut Vec<Kept>, (old, old_at): (&[u8], usize), (new, new_at): (&[u8], usize)) {
    let places = if new.is_empty() { HashMap::new() } else { places(old) };
    let (mut next_old, mut next_new, mut at) = (0, 0, 0);
    for chunk in Chunks(new) {
        let here = at;
        at += chunk.len();
        // What stays around an earlier one may reach beyond it.
        if here < next_new {
            continue;
        }
        let Some(found) = places.get(chunk) else { continue };
        // Most likely what followed there follows here too.
        let place = found.get(found.partition_point(|place| *place < next_old)).or(found.first());
        let Some(place) = place.copied() else { continue };
        let before = common_end(&old[..place], &new[next_new..here]);
        let (from, to) = (place - before, here - before);
        let length = common_start(&old[from..], &new[to..]);
        all.push(Kept { old: old_at + from, new: new_at + to, length });
        (next_old, next_new) = (from + length, to + length);
    }
}

fn steps(new: &[u8], all: &[Kept]) -> Vec<Step> {
    let mut steps = Vec::with_capacity(all.len() + 1);
    let first = all.first().map_or(new.len(), |kept| kept.new);
    if first > 0 {
        steps.push(Step { from: 0, keep: 0, insert: new[..first].to_vec() });
    }
    for (index, kept) in all.iter().enumerate() {
        let until = all.get(index + 1).map_or(new.len(), |next| next.new);
        let insert = new[kept.new + kept.length..until].to_vec();
        if kept.length > 0 || !insert.is_empty() {
            steps.push(Step { from: kept.old as u64, keep: kept.length as u64, insert });
        }
    }
    steps
}

/// Returns where each chunk begins, in ascending order.
fn places(bytes: &[u8]) -> HashMap<&[u8], Vec<usize>> {
    let mut places: HashMap<&[u8], Vec<usize>> = HashMap::new();
    let mut at = 0;
    for chunk in Chunks(bytes) {
        places.entry(chunk).or_default().push(at);
        at += chunk.len();
    }
    places
}

/// Returns the number of bytes that are equal at the beginning.
fn common_start(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// Returns the number of bytes that are equal at the end.
fn common_end(one: &[u8], other: &[u8]) -> usize {
    one.iter().rev().zip(other.iter().rev()).take_while(|(one, other)| one == other).count()
}

/// The chunks of some bytes.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let most = self.0.len().min(MAX_CHUNK);
        let mut hash = 0_u64;
        let mut length = most;
        for (index, byte) in self.0[..most].iter().enumerate() {
            hash = (hash << 1).wrapping_add(MIXED[usize::from(*byte)]);
            if index + 1 >= MIN_CHUNK && hash & BOUNDARY == 0 {
                length = index + 1;
                break;
            }
        }
        let (chunk, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(chunk)
    }
}

/// A random number for each byte.
const MIXED: [u64; 256] = {
    let mut mixed = [0; 256];
    let mut index = 0;
    while index < 256 {
        // SplitMix64.
        let mut value = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed[index] = value ^ (value >> 31);
        index += 1;
    }
    mixed
};

/// Checks that the difference of two parts of the bytes leads from one to the other.
#[cfg(any(test, fuzzing))]
pub(super) fn check(old: &[u8], new: &[u8]) {
    assert_eq!(apply(old, &difference(old, new)).as_deref(), Some(new));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that differ everywhere, from a number.
    fn random(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(next).collect()
    }

    fn inserted(steps: &[Step]) -> usize {
        steps.iter().map(|step| step.insert.len()).sum()
    }

    #[test]
    fn changes_at_several_places_cost_what_they_change() {
        let old = random(1, 100_000);
        let mut new = old.clone();
        new.splice(70_000..70_000, random(2, 300));
        new.drain(40_000..45_000);
        new[10] ^= 1;
        *new.last_mut().unwrap() ^= 1;
        let steps = difference(&old, &new);
        assert_eq!(apply(&old, &steps).unwrap(), new);
        assert!(inserted(&steps) < 300 + 600, "{} bytes", inserted(&steps));
        assert!(steps.len() < 10, "{steps:?}");
        assert_eq!(inserted(&difference(&old, &old)), 0);
    }

    #[test]
    fn change_among_many_elements_that_resemble_each_other_is_found() {
        let element = |number: u32| {
            let name = format!("s{number}");
            [
                b"default/".as_slice(),
                name.as_bytes(),
                b" selector app TCP 80 8080 ",
                &random(number.into(), 64),
            ]
            .concat()
        };
        let old: Vec<u8> = (0..2000).flat_map(element).collect();
        let new: Vec<u8> = (0..2001).filter(|number| *number != 700).flat_map(element).collect();
        let steps = difference(&old, &new);
        assert_eq!(apply(&old, &steps).unwrap(), new);
        assert!(inserted(&steps) < 200, "{} bytes", inserted(&steps));
    }

    #[test]
    fn second_copy_of_what_is_there_costs_nothing() {
        let map = random(5, 20_000);
        let old = [b"promised, accepted: none, learned: ", &map[..]].concat();
        let mut next = map.clone();
        next.splice(9_000..9_000, *b"one more block");
        let new = [b"promised, accepted: ", &next[..], b"learned: ", &map].concat();
        let steps = difference(&old, &new);
        assert_eq!(apply(&old, &steps).unwrap(), new);
        assert!(inserted(&steps) < 200, "{} bytes", inserted(&steps));
    }

    #[test]
    fn steps_about_other_bytes_are_refused() {
        let steps = difference(b"some bytes", b"other bytes");
        assert_eq!(apply(b"short", &steps), None);
        let far = Step { from: u64::MAX, keep: u64::MAX, insert: Vec::new() };
        assert_eq!(apply(b"some bytes", &[far]), None);
    }

    proptest! {
        #[test]
        fn difference_leads_from_one_to_the_other(
            parts in proptest::collection::vec((0_u64..20, 0_usize..200, any::<bool>(), any::<bool>()), 0..40)
        ) {
            let side = |first: bool| -> Vec<u8> {
                let of = parts.iter().filter(|(_, _, one, other)| if first { *one } else { *other });
                of.flat_map(|(seed, length, ..)| random(*seed, *length)).collect()
            };
            check(&side(true), &side(false));
        }

        #[test]
        fn difference_of_short_bytes_is_right(
            old in proptest::collection::vec(0_u8..3, 0..40), new in proptest::collection::vec(0_u8..3, 0..40)
        ) {
            check(&old, &new);
        }
    }
}
