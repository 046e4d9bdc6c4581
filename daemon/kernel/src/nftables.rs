//! Access to nftables by netlink: descriptions of tables, and elements of sets. `nft` writes the rules and sets.

use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_core::NLM_F_CREATE;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::{self, ENOENT};
use ovl_dataplane::nft::{Contents, Data, Key, Set, Table, Value, Verdict, length};

use super::CountedElement;
use super::attribute::{Attributes, attributes, text, u8_at};
use super::error::Result;
use super::socket::{Batch, Netlink, Refusal};

/// The subsystem of nftables, in the upper half of a message type.
pub(super) const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
pub(super) const BATCH_BEGIN: u16 = libc::NFNL_MSG_BATCH_BEGIN as u16;
pub(super) const BATCH_END: u16 = libc::NFNL_MSG_BATCH_END as u16;
const GET_TABLE: u16 = message_type(libc::NFT_MSG_GETTABLE);
const DEL_TABLE: u16 = message_type(libc::NFT_MSG_DELTABLE);
const GET_CHAIN: u16 = message_type(libc::NFT_MSG_GETCHAIN);
const DEL_CHAIN: u16 = message_type(libc::NFT_MSG_DELCHAIN);
const GET_RULE: u16 = message_type(libc::NFT_MSG_GETRULE);
const DEL_RULE: u16 = message_type(libc::NFT_MSG_DELRULE);
const GET_SET: u16 = message_type(libc::NFT_MSG_GETSET);
const DEL_SET: u16 = message_type(libc::NFT_MSG_DELSET);
pub(super) const NEW_ELEMENTS: u16 = message_type(libc::NFT_MSG_NEWSETELEM);
const GET_ELEMENTS: u16 = message_type(libc::NFT_MSG_GETSETELEM);
pub(super) const DEL_ELEMENTS: u16 = message_type(libc::NFT_MSG_DELSETELEM);
const GET_OBJECT: u16 = message_type(libc::NFT_MSG_GETOBJ);
const DEL_OBJECT: u16 = message_type(libc::NFT_MSG_DELOBJ);

/// The netlink message type of an `NFT_MSG_...` constant.
pub(super) const fn message_type(message: libc::c_int) -> u16 {
    SUBSYSTEM << 8 | message as u16
}

// Attributes of nftables (`NFTA_...` in `linux/netfilter/nf_tables.h`), which `libc` does not define.

/// The name of the table, which is the first attribute of all objects.
pub(super) const IN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
pub(super) const ELEMENTS_SET: u16 = 2;
pub(super) const ELEMENTS_LIST: u16 = 3;
pub(super) const ELEMENT: u16 = 1;
pub(super) const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
pub(super) const ELEMENT_EXPIRATION: u16 = 5;
const ELEMENT_EXPRESSION: u16 = 7;
const ELEMENT_KEY_END: u16 = 10;
const EXPRESSION_DATA: u16 = 2;
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
const COUNTER: u32 = 1;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// The flag of an anonymous set, which belongs to a rule and is deleted with it.
const ANONYMOUS: u32 = libc::NFT_SET_ANONYMOUS as u32;
/// The flag of an element whose key is the first one after a range.
const INTERVAL_END: u32 = libc::NFT_SET_ELEM_INTERVAL_END as u32;

/// The size in bytes at which a list of elements is split: an attribute has at most 64 KiB.
pub(super) const LIST: usize = 56 * 1024;

/// The length of `nfgenmsg`, the fixed part of a message.
pub(super) const FIXED: usize = 4;

/// The `NFPROTO_...` number of the family of a table.
pub(super) fn family(table: Table) -> u8 {
    let family = match table.family() {
        "ip" => libc::NFPROTO_IPV4,
        "bridge" => libc::NFPROTO_BRIDGE,
        "ip6" => libc::NFPROTO_IPV6,
        _ => libc::NFPROTO_INET,
    };
    family as u8
}

/// The changes of one set.
#[derive(Debug, Default)]
pub(super) struct Change<'a> {
    /// The elements to delete.
    pub(super) gone: Vec<(&'a Key, &'a Value)>,
    /// The elements to add after that.
    pub(super) new: Vec<(&'a Key, &'a Value)>,
}

/// The names in a table: of chains, sets, and stateful objects with their types.
#[derive(Debug, Default)]
pub(super) struct ObjectNames {
    pub(super) chains: BTreeSet<String>,
    pub(super) sets: BTreeSet<String>,
    pub(super) objects: BTreeSet<(u32, String)>,
}

impl ObjectNames {
    /// Whether there are no names.
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty() && self.objects.is_empty()
    }
}

/// A netlink socket for nftables.
#[derive(Debug)]
pub(super) struct Nftables(Netlink);

impl Nftables {
    /// Opens the socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Netlink::open(NETLINK_NETFILTER).map(Self)
    }

    /// The port id of the socket, by which notifications name the sender of a change.
    pub(super) fn port(&self) -> u32 {
        self.0.port()
    }

    /// Reads the kernel's description of a table, its chains, rules, sets and objects. `None` if there is no table.
    ///
    /// It contains the handles, which the kernel never reuses, so that it differs after any change by another program,
    /// even one that writes the same rules again. It does not contain elements and counters.
    pub(super) fn described(&mut self, table: Table) -> Result<Option<Vec<u8>>> {
        const TABLE: &[u16] = &[2, 4];
        const CHAIN: &[u16] = &[2, 3, 4, 5, 7, 10];
        const RULE: &[u16] = &[2, 3];
        const SET: &[u16] = &[2, 3, 5, 7, 16];
        const OBJECT: &[u16] = &[2, 3, 6];
        let Some(answer) = self.ask(GET_TABLE, table, &in_table(table))? else { return Ok(None) };
        let mut bytes = Vec::new();
        let mut take = |payload: &[u8], kinds: &[u16]| {
            for (kind, value) in attributes(payload, FIXED).filter(|(kind, _)| kinds.contains(kind)) {
                bytes.extend_from_slice(&kind.to_ne_bytes());
                bytes.extend_from_slice(&(value.len() as u16).to_ne_bytes());
                bytes.extend_from_slice(value);
            }
        };
        take(&answer, TABLE);
        for (kind, kinds) in [(GET_CHAIN, CHAIN), (GET_RULE, RULE), (GET_SET, SET), (GET_OBJECT, OBJECT)] {
            self.all(kind, table, |payload| take(payload, kinds))?;
        }
        Ok(Some(bytes))
    }

    /// Lists the names in a table.
    pub(super) fn names(&mut self, table: Table) -> Result<ObjectNames> {
        let mut names = ObjectNames::default();
        self.all(GET_CHAIN, table, |payload| names.chains.extend(name_in(payload, CHAIN_NAME)))?;
        self.all(GET_SET, table, |payload| {
            if number_in(payload, SET_FLAGS).unwrap_or(0) & ANONYMOUS == 0 {
                names.sets.extend(name_in(payload, SET_NAME));
            }
        })?;
        self.all(GET_OBJECT, table, |payload| {
            names.objects.extend(number_in(payload, OBJECT_TYPE).zip(name_in(payload, OBJECT_NAME)));
        })?;
        Ok(names)
    }

    /// Reads the elements of a set. `None` if there is no set.
    pub(super) fn contents(&mut self, set: &Set) -> Result<Option<Contents>> {
        let mut question = in_table(set.table);
        question.put_text(ELEMENTS_SET, &set.name);
        let mut batch = Batch::default();
        batch.push_built(GET_ELEMENTS, 0, question.bytes());
        let dump = match self.0.dump(batch)? {
            Ok(dump) => dump,
            Err(refusal) if refusal.errno == ENOENT => return Ok(None),
            Err(refusal) => return Err(refusal.into_error(format!("cannot read {}", set.path()))),
        };
        let lists = dump.messages().filter(|message| message.kind == NEW_ELEMENTS).flat_map(|message| {
            attributes(message.payload, FIXED)
                .filter(|(kind, _)| *kind == ELEMENTS_LIST)
                .map(|(_, list)| list)
        });
        let elements =
            lists.flat_map(|list| attributes(list, 0)).filter_map(|(_, element)| DumpedElement::of(element));
        let plain_ranges = set.shape.ranges && set.shape.key.len() == 1;
        Ok(Some(if plain_ranges {
            pair(elements.collect())
        } else {
            elements.map(|read| (Key::from_bytes(read.first, read.last), read.value)).collect()
        }))
    }

    /// Reads the elements and counters of a set that packets add elements to; empty if there is no set.
    pub(super) fn counts(&mut self, table: Table, set: &str) -> Result<Vec<CountedElement>> {
        self.counts_in(in_table(table), table.name(), set)
    }

    /// As [`Self::counts`], of a table of the family `bridge` or `inet` that is not one of ovl's subsystems.
    pub(super) fn counts_of(
        &mut self,
        is_bridge: bool,
        table: &str,
        set: &str,
    ) -> Result<Vec<CountedElement>> {
        let family = if is_bridge { libc::NFPROTO_BRIDGE } else { libc::NFPROTO_INET };
        let mut question = Attributes::after(&[family as u8, 0, 0, 0]);
        question.put_text(IN_TABLE, table);
        self.counts_in(question, table, set)
    }

    fn counts_in(&mut self, mut question: Attributes, table: &str, set: &str) -> Result<Vec<CountedElement>> {
        question.put_text(ELEMENTS_SET, set);
        self.elements_in(&question, table, set, counted)
    }

    /// Reads the elements of a set of which `read` makes something; empty if there is no set.
    pub(super) fn elements<T>(
        &mut self,
        table: Table,
        set: &str,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut question = in_table(table);
        question.put_text(ELEMENTS_SET, set);
        self.elements_in(&question, table.name(), set, read)
    }

    fn elements_in<T>(
        &mut self,
        question: &Attributes,
        table: &str,
        set: &str,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut batch = Batch::default();
        batch.push_built(GET_ELEMENTS, 0, question.bytes());
        let dump = match self.0.dump(batch)? {
            Ok(dump) => dump,
            Err(refusal) if refusal.errno == ENOENT => return Ok(Vec::new()),
            Err(refusal) => return Err(refusal.into_error(format!("cannot read {table} {set}"))),
        };
        let lists = dump.messages().filter(|message| message.kind == NEW_ELEMENTS).flat_map(|message| {
            attributes(message.payload, FIXED)
                .filter(|(kind, _)| *kind == ELEMENTS_LIST)
                .map(|(_, list)| list)
        });
        Ok(lists.flat_map(|list| attributes(list, 0)).filter_map(|(_, element)| read(element)).collect())
    }

    /// Changes elements of sets, in one transaction.
    pub(super) fn change(&mut self, changes: &BTreeMap<&Set, Change<'_>>) -> Result<Result<(), Refusal>> {
        if changes.values().all(|change| change.gone.is_empty() && change.new.is_empty()) {
            return Ok(Ok(()));
        }
        let mut batch = begin();
        for (set, change) in changes {
            lists(&mut batch, set, DEL_ELEMENTS, 0, &change.gone);
        }
        for (set, change) in changes {
            lists(&mut batch, set, NEW_ELEMENTS, NLM_F_CREATE, &change.new);
        }
        self.commit(batch)
    }

    /// Deletes chains, sets and objects by name, in one transaction.
    pub(super) fn delete(&mut self, table: Table, names: &ObjectNames) -> Result<Result<(), Refusal>> {
        let mut batch = begin();
        let mut push = |kind, attribute, name: &str, object: Option<u32>| {
            let mut message = in_table(table);
            message.put_text(attribute, name);
            if let Some(object) = object {
                message.put(OBJECT_TYPE, &object.to_be_bytes());
            }
            batch.push_built(kind, 0, message.bytes());
        };
        // The rules first: they may refer to other chains and sets.
        names.chains.iter().for_each(|chain| push(DEL_RULE, RULE_CHAIN, chain, None));
        names.chains.iter().for_each(|chain| push(DEL_CHAIN, CHAIN_NAME, chain, None));
        names.sets.iter().for_each(|set| push(DEL_SET, SET_NAME, set, None));
        names.objects.iter().for_each(|(kind, name)| push(DEL_OBJECT, OBJECT_NAME, name, Some(*kind)));
        self.commit(batch)
    }

    /// Deletes a table. An absent table is no error.
    pub(super) fn remove(&mut self, table: Table) -> Result<()> {
        let mut batch = begin();
        batch.push_built(DEL_TABLE, 0, in_table(table).bytes());
        match self.commit(batch)? {
            Err(refusal) if refusal.errno != ENOENT => {
                Err(refusal.into_error(format!("nft delete table {table}")))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Reads a named counter, in packets. `None` if there is no counter.
    pub(super) fn counted(&mut self, table: Table, counter: &str) -> Result<Option<u64>> {
        let mut question = in_table(table);
        question.put_text(OBJECT_NAME, counter);
        question.put(OBJECT_TYPE, &COUNTER.to_be_bytes());
        let Some(answer) = self.ask(GET_OBJECT, table, &question)? else { return Ok(None) };
        let packets = find(&answer, FIXED, OBJECT_DATA).and_then(|data| find(data, 0, COUNTER_PACKETS));
        Ok(packets.and_then(|value| value.try_into().ok()).map(u64::from_be_bytes))
    }

    /// Sends a request that has one reply. `None` if the object does not exist.
    fn ask(&mut self, kind: u16, table: Table, question: &Attributes) -> Result<Option<Vec<u8>>> {
        let mut batch = Batch::default();
        batch.push_built(kind, 0, question.bytes());
        let (mut results, answers) = self.0.execute(batch)?;
        match results.pop() {
            Some(Err(refusal)) if refusal.errno == ENOENT => Ok(None),
            Some(Err(refusal)) => Err(refusal.into_error(format!("cannot read the table {table}"))),
            Some(Ok(())) | None => Ok(answers.into_iter().next().map(|answer| answer.payload)),
        }
    }

    /// Calls `each` for every object of a kind in a table.
    fn all(&mut self, kind: u16, table: Table, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut batch = Batch::default();
        batch.push_built(kind, 0, in_table(table).bytes());
        let dump = match self.0.dump(batch)? {
            Ok(dump) => dump,
            Err(refusal) if refusal.errno == ENOENT => return Ok(()),
            Err(refusal) => return Err(refusal.into_error(format!("cannot read the table {table}"))),
        };
        for message in dump.messages().filter(|message| message.kind >> 8 == SUBSYSTEM) {
            // Some kernels ignore the filter and dump all tables.
            if is_in(table, message.payload) {
                each(message.payload);
            }
        }
        Ok(())
    }

    /// Ends a transaction that [`begin`] began.
    pub(super) fn commit(&mut self, mut batch: Batch) -> Result<Result<(), Refusal>> {
        batch.close_transaction(BATCH_END, &about_tables());
        let (results, _) = self.0.execute(batch)?;
        Ok(results.into_iter().find_map(Result::err).map_or(Ok(()), Err))
    }
}

fn counted(element: &[u8]) -> Option<CountedElement> {
    let number = |data: &[u8]| data.try_into().ok().map(u64::from_be_bytes);
    let key = find(find(element, 0, ELEMENT_KEY)?, 0, DATA_VALUE)?;
    let counter = find(element, 0, ELEMENT_EXPRESSION).and_then(|counter| find(counter, 0, EXPRESSION_DATA));
    Some(CountedElement {
        key: key.into(),
        packets: counter.and_then(|data| find(data, 0, COUNTER_PACKETS)).and_then(number)?,
        bytes: counter.and_then(|data| find(data, 0, COUNTER_BYTES)).and_then(number).unwrap_or_default(),
        left_ms: find(element, 0, ELEMENT_EXPIRATION).and_then(number),
    })
}

/// The first attribute of a type.
pub(super) fn find(payload: &[u8], fixed: usize, wanted: u16) -> Option<&[u8]> {
    attributes(payload, fixed).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn name_in(payload: &[u8], wanted: u16) -> Option<String> {
    find(payload, FIXED, wanted).map(|value| text(value).to_owned())
}

fn number_in(payload: &[u8], wanted: u16) -> Option<u32> {
    find(payload, FIXED, wanted).and_then(|value| value.try_into().ok()).map(u32::from_be_bytes)
}

/// Runs bytes through the parsers of this module.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let _ = counted(bytes);
    let _ = (name_in(bytes, SET_NAME), number_in(bytes, OBJECT_TYPE), is_in(Table::Publish, bytes));
    let elements = || attributes(bytes, 0).filter_map(|(_, element)| DumpedElement::of(element));
    let contents = pair(elements().collect());
    assert!(contents.len() <= elements().count());
    for element in elements() {
        assert!(successor(&element.first).is_none_or(|after| *predecessor(&after) == *element.first));
    }
}

/// Whether a message is about an object of a table.
pub(super) fn is_in(table: Table, payload: &[u8]) -> bool {
    u8_at(payload, 0) == Some(family(table))
        && attributes(payload, FIXED).any(|(kind, value)| kind == IN_TABLE && text(value) == table.name())
}

pub(super) fn in_table(table: Table) -> Attributes {
    let mut message = Attributes::after(&[family(table), 0, 0, 0]);
    message.put_text(IN_TABLE, table.name());
    message
}

fn about_tables() -> [u8; FIXED] {
    [0, 0, 0, SUBSYSTEM as u8]
}

/// Begins a transaction.
pub(super) fn begin() -> Batch {
    let mut batch = Batch::default();
    batch.push_built(BATCH_BEGIN, 0, &about_tables());
    batch
}

/// Adds requests for elements of a set, as many as their size needs.
fn lists(batch: &mut Batch, set: &Set, kind: u16, flags: u16, elements: &[(&Key, &Value)]) {
    let mut elements = elements.iter().peekable();
    while elements.peek().is_some() {
        let mut message = in_table(set.table);
        message.put_text(ELEMENTS_SET, &set.name);
        message.nest(ELEMENTS_LIST, |list| {
            while list.bytes().len() < LIST
                && let Some((key, value)) = elements.next()
            {
                put_element(list, set, key, value);
            }
        });
        batch.push_built(kind, flags, message.bytes());
    }
}

fn put_element(list: &mut Attributes, set: &Set, key: &Key, value: &Value) {
    let last = key.last().unwrap_or(key.first());
    let plain_ranges = set.shape.ranges && set.shape.key.len() == 1;
    list.nest(ELEMENT, |element| {
        element.nest(ELEMENT_KEY, |data| data.put(DATA_VALUE, key.first()));
        // Even if it equals the key: otherwise `nft` cannot list the set.
        if set.shape.ranges && !plain_ranges {
            element.nest(ELEMENT_KEY_END, |data| data.put(DATA_VALUE, last));
        }
        match value {
            Value::None => {}
            Value::Data(bytes) => element.nest(ELEMENT_DATA, |data| data.put(DATA_VALUE, bytes)),
            Value::Verdict(verdict) => element.nest(ELEMENT_DATA, |data| {
                data.nest(DATA_VERDICT, |data| put_verdict(data, verdict));
            }),
        }
    });
    if let Some(after) = plain_ranges.then(|| successor(last)).flatten() {
        list.nest(ELEMENT, |element| {
            element.nest(ELEMENT_KEY, |data| data.put(DATA_VALUE, &after));
            element.put(ELEMENT_FLAGS, &INTERVAL_END.to_be_bytes());
        });
    }
}

fn put_verdict(data: &mut Attributes, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (libc::NF_DROP, None),
        Verdict::Accept => (libc::NF_ACCEPT, None),
        Verdict::Continue => (libc::NFT_CONTINUE, None),
        Verdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
        Verdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
        Verdict::Return => (libc::NFT_RETURN, None),
    };
    data.put(VERDICT_CODE, &code.to_be_bytes());
    if let Some(chain) = chain {
        data.put_text(VERDICT_CHAIN, chain);
    }
}

fn read_verdict(data: &[u8]) -> Option<Verdict> {
    let chain = || find(data, 0, VERDICT_CHAIN).map(|name| text(name).to_owned().into());
    Some(match i32::from_be_bytes(find(data, 0, VERDICT_CODE)?.try_into().ok()?) {
        libc::NF_DROP => Verdict::Drop,
        libc::NF_ACCEPT => Verdict::Accept,
        libc::NFT_CONTINUE => Verdict::Continue,
        libc::NFT_JUMP => Verdict::Jump(chain()?),
        libc::NFT_GOTO => Verdict::Goto(chain()?),
        libc::NFT_RETURN => Verdict::Return,
        _ => return None,
    })
}

/// An element of a set in a dump.
struct DumpedElement {
    first: Box<[u8]>,
    last: Option<Box<[u8]>>,
    value: Value,
    is_end: bool,
}

impl DumpedElement {
    fn of(element: &[u8]) -> Option<Self> {
        let (mut first, mut last, mut value, mut is_end) = (None, None, Value::None, false);
        for (kind, data) in attributes(element, 0) {
            match kind {
                ELEMENT_KEY => first = find(data, 0, DATA_VALUE),
                ELEMENT_KEY_END => last = find(data, 0, DATA_VALUE),
                ELEMENT_FLAGS => {
                    let flags = data.try_into().map_or(0, u32::from_be_bytes);
                    is_end = flags & INTERVAL_END != 0;
                }
                ELEMENT_DATA => {
                    value = match find(data, 0, DATA_VERDICT) {
                        Some(verdict) => Value::Verdict(read_verdict(verdict)?),
                        None => Value::Data(find(data, 0, DATA_VALUE)?.into()),
                    }
                }
                _ => {}
            }
        }
        Some(Self { first: first?.into(), last: last.map(Into::into), value, is_end })
    }
}

/// Joins the elements of a set of ranges with one field. A range is an element with its first key, and an end element
/// with the key after its last one. The last range may have no end.
fn pair(mut elements: Vec<DumpedElement>) -> Contents {
    elements.sort_by(|a, b| (&a.first, !a.is_end).cmp(&(&b.first, !b.is_end)));
    let mut contents = Contents::new();
    let mut open: Option<DumpedElement> = None;
    for read in elements {
        if let Some(DumpedElement { first, value, .. }) = open.take() {
            contents.insert(Key::from_bytes(first, Some(predecessor(&read.first))), value);
        }
        open = (!read.is_end).then_some(read);
    }
    if let Some(DumpedElement { first, value, .. }) = open {
        let last = vec![u8::MAX; first.len()];
        contents.insert(Key::from_bytes(first, Some(last.into())), value);
    }
    contents
}

/// The key after this one. `None` if it is the last.
fn successor(last: &[u8]) -> Option<Vec<u8>> {
    let mut after = last.to_vec();
    for byte in after.iter_mut().rev() {
        let (sum, carries) = byte.overflowing_add(1);
        *byte = sum;
        if !carries {
            return Some(after);
        }
    }
    None
}

fn predecessor(after: &[u8]) -> Box<[u8]> {
    let mut last = after.to_vec();
    for byte in last.iter_mut().rev() {
        let (difference, borrows) = byte.overflowing_sub(1);
        *byte = difference;
        if !borrows {
            break;
        }
    }
    last.into()
}

/// Whether the elements fit the shape of a set: another version of ovl may have used another shape.
pub(super) fn fits(set: &Set, contents: &Contents) -> bool {
    contents.iter().all(|(key, value)| {
        let value_fits = match (set.shape.data, value) {
            (Data::None, Value::None) | (Data::Verdict, Value::Verdict(_)) => true,
            (Data::Fields(fields), Value::Data(bytes)) => bytes.len() == length(fields),
            _ => false,
        };
        key.first().len() == length(set.shape.key) && value_fits
    })
}
