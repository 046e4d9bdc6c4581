//! The journal beside the state file: what has changed since the state file was written.
//!
//! | part | bytes |
//! | --- | --- |
//! | `ovl journal 1` and a line feed | 14 |
//! | SHA-256 of the encoded state in the state file that it continues | 32 |
//! | records | |
//!
//! | part of a record | bytes |
//! | --- | --- |
//! | `ovlr` | 4 |
//! | length of the content, little-endian | 4 |
//! | number, little-endian: 1 for the first record, and one more for each other one | 8 |
//! | SHA-256 over the checksum above, the number and the content | 32 |
//! | content: an encoded [`Change`] | |
//!
//! A record is written with one call and synced before anything that depends on it is told to others. So what a crash
//! leaves half written is the last record, and nothing depends on it: it is cut off. A record that is damaged although a
//! later one is whole was damaged afterwards, which is an error.

use ovl_files::sha256;
use ovl_proto::wire::{self, WireError};

use super::difference::{self, Step};

const MAGIC: &[u8] = b"ovl journal 1\n";
const RECORD: &[u8] = b"ovlr";
/// The bytes of a record before its content.
const HEAD: usize = 4 + 4 + 8 + 32;
/// The maximum number of records, which limits how long it takes to read them: each one copies the state.
const MAX_RECORDS: u64 = 1024;
/// The size in bytes up to which the journal may grow, however small the state file is.
const MIN_LIMIT: usize = 64 << 10;

/// The SHA-256 of an encoded state.
pub(super) type Sum = [u8; 32];

/// What a record says.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    /// The steps from the state before to the state after it.
    steps: Vec<Step>,
    /// The SHA-256 of the state after it.
    sum: Sum,
}

ovl_proto::fields! { Change { 1 steps, 2 sum } }

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error("it does not begin as the journal of this state file does")]
    Another,
    #[error("record {0} is damaged")]
    Damaged(u64),
    #[error("record {0} is not about this state file")]
    Unfit(u64),
    #[error("after its last record the state has another checksum than the record says")]
    Sum,
    #[error(transparent)]
    Content(#[from] WireError),
}

/// Returns the beginning of the journal that continues an encoded state with this checksum.
pub(super) fn begin(sum: &Sum) -> Vec<u8> {
    [MAGIC, sum].concat()
}

/// Carries out what the journal says about a state with this checksum. Returns the encoded state.
///
/// # Errors
///
/// The journal is of another state, or it is damaged elsewhere than at its end, or a later release wrote it.
pub(super) fn replay(body: Vec<u8>, sum: &Sum, journal: &[u8]) -> Result<Vec<u8>, JournalError> {
    let records = journal.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix(sum));
    let mut rest = records.ok_or(JournalError::Another)?;
    let (mut state, mut last) = (body, None);
    let mut number = 1;
    while !rest.is_empty() {
        let Some((content, behind)) = record(sum, number, rest) else {
            return if has_record_after(sum, number, rest) {
                Err(JournalError::Damaged(number))
            } else {
                checked(state, last)
            };
        };
        let change: Change = wire::decode_stored(content)?;
        state = difference::apply(&state, &change.steps)
            .filter(|state| state.len() <= wire::MAX_STORED)
            .ok_or(JournalError::Unfit(number))?;
        last = Some(change.sum);
        rest = behind;
        number += 1;
    }
    checked(state, last)
}

/// Checks the state against the last record.
fn checked(state: Vec<u8>, last: Option<Sum>) -> Result<Vec<u8>, JournalError> {
    match last {
        Some(sum) if sha256(&state) != sum => Err(JournalError::Sum),
        _ => Ok(state),
    }
}

/// Splits off the content of a record, if the bytes begin with the whole record of this number.
fn record<'a>(sum: &Sum, number: u64, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (length, rest) = bytes.strip_prefix(RECORD)?.split_first_chunk()?;
    let (found, rest) = rest.split_first_chunk()?;
    let (check, rest) = rest.split_first_chunk::<32>()?;
    let (content, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    let whole = u64::from_le_bytes(*found) == number && check_of(sum, number, content) == *check;
    whole.then_some((content, rest))
}

/// Whether there is a whole record of a later number anywhere in the bytes.
fn has_record_after(sum: &Sum, number: u64, bytes: &[u8]) -> bool {
    (0..bytes.len()).filter_map(|at| bytes.get(at..)).filter(|rest| rest.starts_with(RECORD)).any(|rest| {
        let found = rest.get(8..16).and_then(|found| found.try_into().ok()).map(u64::from_le_bytes);
        found
            .is_some_and(|found| found > number && found <= MAX_RECORDS && record(sum, found, rest).is_some())
    })
}

fn check_of(sum: &Sum, number: u64, content: &[u8]) -> Sum {
    sha256(&[sum.as_slice(), &number.to_le_bytes(), content].concat())
}

/// What is on the disk: a state file and its journal.
#[derive(Debug)]
pub(super) struct Journal {
    /// Checksum of the state in the state file.
    sum: Sum,
    /// Length of the state file in bytes.
    file: usize,
    /// The encoded state after the last record.
    state: Vec<u8>,
    /// How many records there are.
    records: u64,
    /// Length of the journal in bytes.
    length: usize,
}

impl Journal {
    /// A journal without a record, of a state that was just written whole.
    pub(super) fn new(state: Vec<u8>) -> Self {
        let sum = sha256(&state);
        Self { sum, file: state.len(), length: begin(&sum).len(), state, records: 0 }
    }

    /// The encoded state after the last record.
    pub(super) fn state(&self) -> &[u8] {
        &self.state
    }

    /// Length of the journal in bytes.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Checksum of the state in the state file.
    pub(super) fn sum(&self) -> &Sum {
        &self.sum
    }

    /// Returns the record that leads to a later state. `None` if the state is to be written whole: the journal would be
    /// longer than the state file, or would have too many records.
    ///
    /// # Errors
    ///
    /// The record cannot be encoded.
    pub(super) fn record(&self, state: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        if self.records >= MAX_RECORDS {
            return Ok(None);
        }
        let steps = difference::difference(&self.state, state);
        let content = wire::encode_stored(&Change { steps, sum: sha256(state) })?;
        let fits = self.length + HEAD + content.len() <= self.file.max(MIN_LIMIT);
        let Some(length) = u32::try_from(content.len()).ok().filter(|_| fits) else { return Ok(None) };
        let number = self.records + 1;
        let check = check_of(&self.sum, number, &content);
        Ok(Some([RECORD, &length.to_le_bytes(), &number.to_le_bytes(), &check, &content].concat()))
    }

    /// Notes that a record was appended and is on the disk.
    pub(super) fn appended(&mut self, record: &[u8], state: Vec<u8>) {
        self.records += 1;
        self.length += record.len();
        self.state = state;
    }
}

/// Reads bytes as a journal, and as the content of its record. What is read was either written or is an error.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let state = b"a state of which something stays".to_vec();
    let sum = sha256(&state);
    let _ = replay(state.clone(), &sum, bytes);
    let _ = replay(state.clone(), &sum, &[&begin(&sum), bytes].concat());
    let head = |number: u64, content: &[u8]| {
        let length = u32::try_from(content.len()).unwrap_or_default().to_le_bytes();
        [RECORD, &length, &number.to_le_bytes(), &check_of(&sum, number, content)].concat()
    };
    let _ = replay(state.clone(), &sum, &[&begin(&sum), head(1, bytes).as_slice(), bytes].concat());
    let middle = bytes.len() / 2;
    let (one, other) = bytes.split_at(middle);
    difference::check(one, other);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A journal of these states, of which the first one is in the state file; and where each record ends.
    fn written(states: &[Vec<u8>]) -> (Sum, Vec<u8>, Vec<usize>) {
        let mut journal = Journal::new(states[0].clone());
        let mut bytes = begin(journal.sum());
        let mut ends = vec![bytes.len()];
        for state in &states[1..] {
            let record = journal.record(state).unwrap().unwrap();
            journal.appended(&record, state.clone());
            bytes.extend(record);
            assert_eq!(bytes.len(), journal.length());
            ends.push(bytes.len());
        }
        (*journal.sum(), bytes, ends)
    }

    fn states() -> Vec<Vec<u8>> {
        (0..4_u8).map(|number| [vec![7; 40], vec![number; usize::from(number) * 3]].concat()).collect()
    }

    #[test]
    fn journal_that_ends_anywhere_gives_the_state_of_its_last_whole_record() {
        let states = states();
        let (sum, bytes, ends) = written(&states);
        for length in 0..=bytes.len() {
            let read = replay(states[0].clone(), &sum, &bytes[..length]);
            match ends.iter().rposition(|end| *end <= length) {
                Some(records) => assert_eq!(read.unwrap(), states[records], "{length}"),
                None => assert!(matches!(read, Err(JournalError::Another)), "{length}"),
            }
        }
        // Space that a file system gave to the file and never filled is a record that was not written either.
        let unfilled = [&bytes[..], &[0; 100]].concat();
        assert_eq!(replay(states[0].clone(), &sum, &unfilled).unwrap(), states[3]);
    }

    #[test]
    fn each_flipped_bit_is_an_error_or_within_the_last_record() {
        let states = states();
        let (sum, bytes, ends) = written(&states);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let read = replay(states[0].clone(), &sum, &flipped);
                if at >= ends[2] {
                    assert_eq!(read.unwrap(), states[2], "{at} {bit}");
                } else {
                    assert!(read.is_err(), "{at} {bit}");
                }
            }
        }
    }

    #[test]
    fn journal_of_another_state_and_records_out_of_order_are_refused() {
        let states = states();
        let (sum, bytes, ends) = written(&states);
        let other = sha256(b"other");
        assert!(matches!(replay(states[0].clone(), &other, &bytes), Err(JournalError::Another)));
        let swapped = [&bytes[..ends[0]], &bytes[ends[1]..ends[2]], &bytes[ends[0]..ends[1]]].concat();
        assert!(matches!(replay(states[0].clone(), &sum, &swapped), Err(JournalError::Damaged(1))));
        assert!(matches!(replay(b"x".to_vec(), &sum, &bytes), Err(JournalError::Unfit(1))));
    }

    #[test]
    fn state_is_written_whole_when_the_journal_would_be_longer() {
        let mut journal = Journal::new(vec![0; 2 * MIN_LIMIT]);
        let mut whole = 0;
        for number in 0..100_u8 {
            let state = vec![number; 2 * MIN_LIMIT / 10];
            let Some(record) = journal.record(&state).unwrap() else {
                whole += 1;
                journal = Journal::new(vec![number; 2 * MIN_LIMIT]);
                continue;
            };
            journal.appended(&record, state);
            assert!(journal.length() <= 2 * MIN_LIMIT);
        }
        assert!((5..20).contains(&whole), "{whole}");
        let mut journal = Journal::new(b"small".to_vec());
        for number in 0..MAX_RECORDS {
            let state = number.to_le_bytes().to_vec();
            let Some(record) = journal.record(&state).unwrap() else {
                assert!(number > 500, "{number}");
                return;
            };
            journal.appended(&record, state);
        }
        assert_eq!(journal.record(b"one more").unwrap(), None);
    }

    proptest! {
        #[test]
        fn every_cut_of_any_journal_gives_one_of_its_states(
            states in proptest::collection::vec(proptest::collection::vec(0_u8..4, 0..200), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let (sum, bytes, ends) = written(&states);
            let length = ends[0] + cut.index(bytes.len() - ends[0] + 1);
            let records = ends.iter().rposition(|end| *end <= length).unwrap();
            prop_assert_eq!(&replay(states[0].clone(), &sum, &bytes[..length]).unwrap(), &states[records]);
        }
    }
}
