//! Elements of nftables sets that end by themselves: their requests, and what a dump says of them.
//!
//! The kernel alone counts their time down, also while ovld is down. They are in no desired data plane, and a table that is
//! written anew keeps them, as it keeps what packets add.

use netlink_packet_core::NLM_F_CREATE;
use ovl_dataplane::nft::Table;

use super::attribute::{Attributes, attributes};
use super::error::Result;
use super::nftables::{
    DATA_VALUE, DEL_ELEMENTS, ELEMENT, ELEMENT_EXPIRATION, ELEMENT_KEY, ELEMENTS_LIST, ELEMENTS_SET, LIST,
    NEW_ELEMENTS, Nftables, begin, find, in_table,
};
use super::socket::Refusal;

const ELEMENT_TIMEOUT: u16 = 4;
const ELEMENT_USERDATA: u16 = 6;
/// The type of a comment in the data that the kernel keeps for `nft`.
const COMMENT: u8 = 0;
/// The longest comment that `nft` shows, in bytes, with its zero.
const MAX_COMMENT: usize = 128;

/// An element of a set that ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimedElement {
    /// The name of the set.
    pub set: String,
    /// The key, as the kernel compares it.
    pub key: Box<[u8]>,
    /// The time until it ends, in milliseconds.
    pub left_ms: u64,
    /// What `nft list` shows as its comment; may be empty.
    pub comment: String,
}

/// A change of such an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimedChange {
    /// Puts it into its set, in place of one with the same key.
    Put(TimedElement),
    /// Takes the element with a key out of a set. One that has ended is no error.
    Delete(String, Box<[u8]>),
}

impl TimedChange {
    /// Returns the name of the set.
    pub fn set(&self) -> &str {
        match self {
            Self::Put(element) => &element.set,
            Self::Delete(set, _) => set,
        }
    }

    fn key(&self) -> &[u8] {
        match self {
            Self::Put(element) => &element.key,
            Self::Delete(_, key) => key,
        }
    }
}

/// A step of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Adds it, so that there is something to delete: the kernel may have ended it meanwhile.
    Ensure,
    /// Deletes it. No kernel can be told to put another end in its place.
    Delete,
    /// Adds it with its end.
    Put,
}

/// Reads the elements that end by themselves of a set; empty if there is no set.
pub(super) fn of_set(nftables: &mut Nftables, table: Table, set: &str) -> Result<Vec<TimedElement>> {
    nftables.elements(table, set, |element| read(set, element))
}

/// Changes elements of one set, in one transaction.
pub(super) fn change(
    nftables: &mut Nftables,
    table: Table,
    set: &str,
    changes: &[&TimedChange],
) -> Result<std::result::Result<(), Refusal>> {
    let mut batch = begin();
    for (step, kind, flags) in [
        (Step::Ensure, NEW_ELEMENTS, NLM_F_CREATE),
        (Step::Delete, DEL_ELEMENTS, 0),
        (Step::Put, NEW_ELEMENTS, NLM_F_CREATE),
    ] {
        for message in messages(table, set, step, changes) {
            batch.push_built(kind, flags, message.bytes());
        }
    }
    nftables.commit(batch)
}

/// Returns the messages of a step for the changes of one set, as many as their size needs.
fn messages(table: Table, set: &str, step: Step, changes: &[&TimedChange]) -> Vec<Attributes> {
    let part = |change: &&&TimedChange| step != Step::Put || matches!(change, TimedChange::Put(_));
    let mut changes = changes.iter().filter(part).peekable();
    let mut messages = Vec::new();
    while changes.peek().is_some() {
        let mut message = in_table(table);
        message.put_text(ELEMENTS_SET, set);
        message.nest(ELEMENTS_LIST, |list| {
            while list.bytes().len() < LIST
                && let Some(change) = changes.next()
            {
                put(list, step, change);
            }
        });
        messages.push(message);
    }
    messages
}

fn put(list: &mut Attributes, step: Step, change: &TimedChange) {
    list.nest(ELEMENT, |element| {
        element.nest(ELEMENT_KEY, |data| data.put(DATA_VALUE, change.key()));
        if step == Step::Put
            && let TimedChange::Put(TimedElement { left_ms, comment, .. }) = change
        {
            element.put(ELEMENT_TIMEOUT, &left_ms.max(&1).to_be_bytes());
            if let Some(data) = comment_data(comment) {
                element.put(ELEMENT_USERDATA, &data);
            }
        }
    });
}

/// Returns a comment as `nft` encodes it. `None` if it is empty or too long.
fn comment_data(comment: &str) -> Option<Vec<u8>> {
    let length = comment.len().checked_add(1).filter(|length| (2..=MAX_COMMENT).contains(length))?;
    let head = [COMMENT, u8::try_from(length).ok()?];
    Some([&head, comment.as_bytes(), &[0]].concat())
}

fn comment_of(data: &[u8]) -> Option<&str> {
    let (head, rest) = data.split_at_checked(2)?;
    let text = rest.get(..usize::from(*head.get(1)?))?.strip_suffix(&[0])?;
    std::str::from_utf8(text).ok().filter(|_| head.first() == Some(&COMMENT))
}

/// Reads an element of a dump. `None` if it is none that ends.
fn read(set: &str, element: &[u8]) -> Option<TimedElement> {
    let left = find(element, 0, ELEMENT_EXPIRATION)?;
    let key = find(find(element, 0, ELEMENT_KEY)?, 0, DATA_VALUE)?;
    let userdata = attributes(element, 0).find(|(kind, _)| *kind == ELEMENT_USERDATA);
    Some(TimedElement {
        set: set.to_owned(),
        key: key.into(),
        left_ms: u64::from_be_bytes(left.try_into().ok()?),
        comment: userdata.and_then(|(_, data)| comment_of(data)).unwrap_or_default().to_owned(),
    })
}

/// Runs bytes through the parser of this module.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let _ = read("set", bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_survives_a_round_trip() {
        let data = comment_data("www.ovl.test").unwrap();
        assert_eq!(comment_of(&data), Some("www.ovl.test"));
        assert_eq!(comment_data(""), None);
        assert_eq!(comment_data(&"a".repeat(128)), None);
        assert_eq!(comment_of(&[0]), None);
        assert_eq!(comment_of(&[0, 9, b'a', 0]), None);
        assert_eq!(comment_of(&[1, 2, b'a', 0]), None);
    }
}
