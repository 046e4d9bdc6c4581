//! Our tables of nftables beside the base one: skeletons, which `nft` writes, and elements, which netlink
//! changes. What the kernel holds is remembered, and read again only where somebody else has touched a
//! table, and from time to time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovl_dataplane::nft::{Contents, Element, Elements, Key, Set, Skeleton, Table, Value};
use ovl_dataplane::op::{NftOp, Op};

use super::Counted;
use super::error::{KernelError, Result};
use super::filter::{self, Done};
use super::nftables::{Change, Names, Nftables, fits};
use super::watch::Watch;

/// A dump looks at a table's skeleton when somebody changed the table, and after this time in any case.
const SKELETON_AGE: Duration = Duration::from_secs(30);
/// The same of its elements: forty thousand take a tenth of a second.
const ELEMENTS_AGE: Duration = Duration::from_secs(300);

/// What is known about the tables.
#[derive(Debug)]
pub(super) struct Tables {
    nftables: Nftables,
    states: BTreeMap<Table, State>,
}

/// What is known about one of them.
#[derive(Debug, Default)]
struct State {
    /// What was written last, and how the kernel described it.
    written: Option<(Arc<Skeleton>, Vec<u8>)>,
    /// What the last look found, and when; none if it has to be looked at.
    seen: Option<(Option<Arc<Skeleton>>, Instant)>,
    /// What is in these sets, since when; others are not read yet, or have to be read again.
    known: BTreeMap<Set, (Arc<Contents>, Instant)>,
    /// Things of an earlier skeleton that could not be deleted yet.
    stale: bool,
}

impl Tables {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Ok(Self { nftables: Nftables::open()?, states: BTreeMap::new() })
    }

    /// Who changes elements, as notifications name it.
    pub(super) fn port(&self) -> u32 {
        self.nftables.port()
    }

    /// Others have changed these tables, or may have.
    pub(super) fn touched(&mut self, tables: &BTreeSet<Table>) {
        for table in tables {
            let state = self.states.entry(*table).or_default();
            state.seen = None;
            state.known.clear();
        }
    }

    /// The skeleton that made a table; an empty one if somebody else, or another run, did; none if there is
    /// no table.
    pub(super) fn current(&mut self, table: Table) -> Result<Option<Arc<Skeleton>>> {
        let state = self.states.entry(table).or_default();
        if let Some((seen, at)) = &state.seen
            && at.elapsed() < SKELETON_AGE
        {
            return Ok(seen.clone());
        }
        let current = match (self.nftables.described(table), &state.written) {
            // A kernel without nftables; what needs the table will say so.
            (Err(KernelError::Refused { .. }), None) => None,
            (described, written) => described?.map(|described| match written {
                Some((skeleton, ours)) if *ours == described => Arc::clone(skeleton),
                _ => Arc::default(),
            }),
        };
        state.seen = Some((current.clone(), Instant::now()));
        Ok(current)
    }

    /// What is there of all tables of a kernel's model. A table that another run made has the sets that are
    /// `wanted` there, if they are.
    pub(super) fn dump(
        &mut self,
        wanted: &BTreeMap<Table, Arc<Skeleton>>,
    ) -> Result<(BTreeMap<Table, Arc<Skeleton>>, Elements)> {
        let mut tables = BTreeMap::new();
        let mut elements = Elements::default();
        for table in Table::ALL {
            let Some(skeleton) = self.current(table)? else { continue };
            let written = self.states.get(&table).and_then(|state| state.written.as_ref());
            let sets: BTreeSet<&Set> = written
                .map(|(skeleton, _)| skeleton)
                .into_iter()
                .chain(wanted.get(&table))
                .flat_map(|skeleton| &skeleton.sets)
                .collect();
            let sets: Vec<Set> = sets.into_iter().cloned().collect();
            for set in &sets {
                elements.set(set, self.held(set)?);
            }
            tables.insert(table, skeleton);
        }
        Ok((tables, elements))
    }

    /// Makes a table, or puts its rules right, in one transaction; elements of sets that stay are kept. What
    /// is in the table and not in the skeleton goes as soon as no element leads to it.
    pub(super) fn write(
        &mut self,
        table: Table,
        skeleton: &Arc<Skeleton>,
        mut watch: Option<&mut Watch>,
    ) -> Result<()> {
        // Of a table that stands as we wrote it, `nft` is given only what changes: of a thousand policies one.
        let part = match self.current(table)? {
            Some(there) if *there != Skeleton::default() => skeleton.since(&there),
            _ => Skeleton::clone(skeleton),
        };
        let state = self.states.entry(table).or_default();
        state.written = None;
        state.seen = None;
        let mut text = part.without_rules().text(table);
        for chain in &part.chains {
            let _ = writeln!(text, "flush chain {table} {}", chain.name);
        }
        text += &part.text(table);
        if let Err(error) = run(&text, watch.as_deref_mut())?.check() {
            // Made by another version, or by somebody else, with other sets or hooks: all anew.
            tracing::info!(%table, %error, "the table is made anew");
            let anew = self.anew(table, skeleton)?;
            run(&anew, watch.as_deref_mut())?.check()?;
            if let Some(state) = self.states.get_mut(&table) {
                state.known.clear();
            }
        }
        if let Some(state) = self.states.get_mut(&table) {
            state.known.retain(|set, _| skeleton.sets.contains(set));
        }
        self.sweep(table, skeleton)?;
        self.describe(table, skeleton)?;
        if let Some(watch) = watch {
            // Somebody else may have been there between the two: then the description is not of our text.
            watch.drain(0);
            if watch.is_touched(table) {
                self.states.remove(&table);
            }
        }
        Ok(())
    }

    /// The text that makes a table from nothing, with those elements that it holds and that fit.
    fn anew(&mut self, table: Table, skeleton: &Skeleton) -> Result<String> {
        let mut text = format!("table {table}\ndelete table {table}\n{}", skeleton.text(table));
        for set in &skeleton.sets {
            let Some(contents) = self.nftables.contents(set)?.filter(|contents| fits(set, contents)) else {
                continue;
            };
            if contents.is_empty() {
                continue;
            }
            let _ = write!(text, "add element {} {{ ", set.path());
            for (key, value) in contents {
                let _ = write!(text, "{}, ", Element { set: set.clone(), key, value });
            }
            text += "}\n";
        }
        Ok(text)
    }

    /// Deletes what is in a table and not in its skeleton, unless elements still lead there.
    fn sweep(&mut self, table: Table, skeleton: &Skeleton) -> Result<()> {
        let Names { mut chains, mut sets, mut objects } = self.nftables.names(table)?;
        for chain in &skeleton.chains {
            chains.remove(&chain.name);
        }
        for set in &skeleton.sets {
            sets.remove(set.name.as_ref());
        }
        for object in &skeleton.objects {
            sets.remove(&object.name);
            objects.retain(|(_, name)| *name != object.name);
        }
        let names = Names { chains, sets, objects };
        let stale = !names.is_empty() && self.nftables.delete(table, &names)?.is_err();
        self.states.entry(table).or_default().stale = stale;
        Ok(())
    }

    fn describe(&mut self, table: Table, skeleton: &Arc<Skeleton>) -> Result<()> {
        let described = self.nftables.described(table)?;
        let state = self.states.entry(table).or_default();
        state.written = described.map(|described| (Arc::clone(skeleton), described));
        state.seen = Some((state.written.as_ref().map(|(skeleton, _)| Arc::clone(skeleton)), Instant::now()));
        Ok(())
    }

    /// Removes a table; where there is none that is done.
    pub(super) fn remove(&mut self, table: Table) -> Result<()> {
        self.states.remove(&table);
        self.nftables.remove(table)
    }

    /// What sets count that packets add to.
    pub(super) fn counts(&mut self, table: Table, sets: &[String]) -> Result<Vec<Vec<Counted>>> {
        sets.iter().map(|set| self.nftables.counts(table, set)).collect()
    }

    /// How many packets a counter of a table has seen.
    pub(super) fn counted(&mut self, table: Table, counter: &str) -> Result<u64> {
        Ok(self.nftables.counted(table, counter)?.unwrap_or(0))
    }

    /// Does operations on elements: for each table all of them or none, in one transaction for all tables if
    /// none is refused. Gives each one's result.
    pub(super) fn apply(&mut self, ops: &[Op]) -> Vec<Result<()>> {
        let mut wanted: Wanted<'_> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Nft(NftOp::SetElement(Element { set, key, value })) => {
                    wanted.entry(set).or_default().insert(key, Some(value));
                }
                Op::Nft(NftOp::DeleteElement(set, key)) => {
                    wanted.entry(set).or_default().insert(key, None);
                }
                _ => {}
            }
        }
        let mut failed: BTreeMap<Table, KernelError> = BTreeMap::new();
        if let Err(error) = self.change(&wanted) {
            let tables: BTreeSet<Table> = wanted.keys().map(|set| set.table).collect();
            for table in &tables {
                let result = match tables.len() {
                    1 => Err(error.clone()),
                    _ => {
                        self.change(&wanted.iter().filter(|(set, _)| set.table == *table).map(same).collect())
                    }
                };
                if let Err(error) = result {
                    failed.insert(*table, error);
                }
            }
        }
        let of = |op: &Op| match op {
            Op::Nft(NftOp::SetElement(Element { set, .. })) | Op::Nft(NftOp::DeleteElement(set, _)) => {
                failed.get(&set.table).cloned()
            }
            _ => None,
        };
        ops.iter().map(|op| of(op).map_or(Ok(()), Err)).collect()
    }

    /// Brings keys of sets to these values, in one transaction.
    pub(super) fn change(&mut self, wanted: &Wanted<'_>) -> Result<()> {
        let mut refused = None;
        // What we know may be old: then the kernel refuses to delete what is gone.
        for _ in 0..2 {
            let mut held = BTreeMap::new();
            for (set, keys) in wanted {
                // What has only to go and is in no set of ours went with its set.
                if keys.values().all(Option::is_none) && !self.is_there(set) {
                    continue;
                }
                held.insert(*set, self.held(set)?);
            }
            let changes = held.iter().map(|(set, held)| {
                let mut change = Change::default();
                for (key, value) in wanted.get(set).into_iter().flatten() {
                    let there = held.get(*key);
                    if there == *value {
                        continue;
                    }
                    change.gone.extend(there.map(|there| (*key, there)));
                    change.new.extend(value.map(|value| (*key, value)));
                }
                (*set, change)
            });
            match self.nftables.change(&changes.collect())? {
                Ok(()) => {
                    drop(held);
                    wanted.iter().for_each(|(set, keys)| self.note(set, keys));
                    return self.sweep_again(wanted);
                }
                Err(refusal) => {
                    for set in wanted.keys() {
                        self.states.entry(set.table).or_default().known.clear();
                    }
                    refused = Some(refusal);
                }
            }
        }
        let tables: BTreeSet<String> = wanted.keys().map(|set| set.table.to_string()).collect();
        let tables = tables.into_iter().collect::<Vec<_>>().join(", ");
        refused
            .map_or(Ok(()), |refusal| Err(refusal.into_error(format!("cannot change elements of {tables}"))))
    }

    /// Whether a set is in the skeleton that was written last, as far as we know that.
    fn is_there(&self, set: &Set) -> bool {
        let written = self.states.get(&set.table).and_then(|state| state.written.as_ref());
        written.is_none_or(|(skeleton, _)| skeleton.sets.contains(set))
    }

    /// Remembers what was changed.
    fn note(&mut self, set: &Set, keys: &BTreeMap<&Key, Option<&Value>>) {
        let Some(state) = self.states.get_mut(&set.table) else { return };
        let Some((contents, _)) = state.known.get_mut(set) else { return };
        let contents = Arc::make_mut(contents);
        for (key, value) in keys {
            match value {
                Some(value) => drop(contents.insert((*key).clone(), (*value).clone())),
                None => drop(contents.remove(*key)),
            }
        }
    }

    /// What was in the way of a deletion may be gone.
    fn sweep_again(&mut self, wanted: &Wanted<'_>) -> Result<()> {
        let tables: BTreeSet<Table> = wanted.keys().map(|set| set.table).collect();
        for table in tables {
            let state = self.states.get(&table).filter(|state| state.stale);
            if let Some(skeleton) = state.and_then(|s| s.written.as_ref()).map(|(s, _)| Arc::clone(s)) {
                self.sweep(table, &skeleton)?;
                self.describe(table, &skeleton)?;
            }
        }
        Ok(())
    }

    /// What is in a set: known, or else read.
    pub(super) fn held(&mut self, set: &Set) -> Result<Arc<Contents>> {
        let state = self.states.entry(set.table).or_default();
        if let Some((contents, since)) = state.known.get(set)
            && since.elapsed() < ELEMENTS_AGE
        {
            return Ok(Arc::clone(contents));
        }
        // Of another shape it is another version's, which the skeleton replaces.
        let contents =
            self.nftables.contents(set)?.filter(|contents| fits(set, contents)).unwrap_or_default();
        let contents = Arc::new(contents);
        state.known.insert(set.clone(), (Arc::clone(&contents), Instant::now()));
        Ok(contents)
    }

    /// Reads all sets of a table again when they are asked for.
    pub(super) fn forget(&mut self, table: Table) {
        self.states.entry(table).or_default().known.clear();
    }

    /// Whether a table is as it was written, looked at now.
    pub(super) fn is_as_written(&mut self, table: Table) -> Result<bool> {
        self.states.entry(table).or_default().seen = None;
        Ok(self.current(table)?.is_some_and(|skeleton| *skeleton != Skeleton::default()))
    }
}

/// What keys of sets should lead to; none: they go.
pub(super) type Wanted<'a> = BTreeMap<&'a Set, BTreeMap<&'a Key, Option<&'a Value>>>;

fn same<'a>(
    (set, keys): (&&'a Set, &BTreeMap<&'a Key, Option<&'a Value>>),
) -> (&'a Set, BTreeMap<&'a Key, Option<&'a Value>>) {
    (*set, keys.clone())
}

fn run(text: &str, watch: Option<&mut Watch>) -> Result<Done> {
    let done = filter::run(&["-f", "-"], text)?;
    if let Some(watch) = watch {
        watch.drain(done.pid);
    }
    Ok(done)
}
