//! The nftables tables of ovl except the base table. `nft` writes their skeletons, and netlink changes their
//! elements. The content of the kernel is cached. It is read again after a change by another program, and after a
//! maximum age.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovl_dataplane::nft::{Contents, Element, Elements, Key, Set, Skeleton, Table, Value};
use ovl_dataplane::op::{NftOp, Op};

use super::CountedElement;
use super::error::{KernelError, Result};
use super::filter::{self, NftRun};
use super::nftables::{Change, Nftables, ObjectNames, fits};
use super::timed::{self, TimedChange, TimedElement};
use super::watch::Watch;

/// The maximum age of a cached skeleton.
const SKELETON_AGE: Duration = Duration::from_secs(30);
/// The maximum age of cached elements: to read forty thousand takes a tenth of a second.
const ELEMENTS_AGE: Duration = Duration::from_secs(300);

/// The tables as far as they are known.
#[derive(Debug)]
pub(super) struct Tables {
    nftables: Nftables,
    states: BTreeMap<Table, TableState>,
}

/// The cached state of one table.
#[derive(Debug, Default)]
struct TableState {
    /// The skeleton that was written last, and the kernel's description of it.
    written: Option<(Arc<Skeleton>, Vec<u8>)>,
    /// The skeleton that was found last, and when; `None` if it must be read again.
    seen: Option<(Option<Arc<Skeleton>>, Instant)>,
    /// The contents of sets, and when they were read. Sets that must be read again are absent.
    known: BTreeMap<Set, (Arc<Contents>, Instant)>,
    /// Whether objects of an earlier skeleton could not be deleted yet.
    stale: bool,
}

impl Tables {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Ok(Self { nftables: Nftables::open()?, states: BTreeMap::new() })
    }

    /// The port id of the socket, by which notifications name the sender of a change.
    pub(super) fn port(&self) -> u32 {
        self.nftables.port()
    }

    /// Notes that other programs have changed these tables, or may have.
    pub(super) fn touched(&mut self, tables: &BTreeSet<Table>) {
        for table in tables {
            let state = self.states.entry(*table).or_default();
            state.seen = None;
            state.known.clear();
        }
    }

    /// The skeleton that a table was written from. It is empty if another program or process wrote the table. `None`
    /// if there is no table.
    pub(super) fn current(&mut self, table: Table) -> Result<Option<Arc<Skeleton>>> {
        let state = self.states.entry(table).or_default();
        if let Some((seen, at)) = &state.seen
            && at.elapsed() < SKELETON_AGE
        {
            return Ok(seen.clone());
        }
        let current = match (self.nftables.described(table), &state.written) {
            // The kernel has no nftables. An operation that needs the table will report it.
            (Err(KernelError::Refused { .. }), None) => None,
            (described, written) => described?.map(|described| match written {
                Some((skeleton, ours)) if *ours == described => Arc::clone(skeleton),
                _ => Arc::default(),
            }),
        };
        state.seen = Some((current.clone(), Instant::now()));
        Ok(current)
    }

    /// Dumps the skeletons and elements of all tables. From a table that another process wrote, the sets of the
    /// `wanted` skeleton are read.
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

    /// Writes a table in one transaction. Elements of sets that remain are kept. Objects that are not in the skeleton
    /// are deleted as soon as no element refers to them.
    pub(super) fn write(
        &mut self,
        table: Table,
        skeleton: &Arc<Skeleton>,
        mut watch: Option<&mut Watch>,
    ) -> Result<()> {
        let text = self.update(table, skeleton)?;
        if let Err(error) = run(&text, watch.as_deref_mut())?.check() {
            // Another version of ovl or another program created it with other sets or hooks.
            tracing::info!(%table, %error, "cannot update the nftables table: it is created again");
            let text = self.recreation(table, skeleton)?;
            run(&text, watch.as_deref_mut())?.check()?;
            if let Some(state) = self.states.get_mut(&table) {
                state.known.clear();
            }
        }
        self.settle(table, skeleton, watch)
    }

    /// Writes tables as [`Self::write`] does, in one run of `nft` if that takes all of them: a run takes as long for one table
    /// as for five. Returns the result for each.
    pub(super) fn write_all(
        &mut self,
        wanted: &[(Table, &Arc<Skeleton>)],
        watch: &mut Watch,
    ) -> Vec<Result<()>> {
        let together = wanted.len() > 1 && self.update_all(wanted, watch).is_ok();
        let mut write = |(table, skeleton): &(Table, &Arc<Skeleton>)| match together {
            true => self.settle(*table, skeleton, Some(&mut *watch)),
            // One of them was refused, perhaps because another version of ovl wrote the table.
            false => self.write(*table, skeleton, Some(&mut *watch)),
        };
        wanted.iter().map(&mut write).collect()
    }

    fn update_all(&mut self, wanted: &[(Table, &Arc<Skeleton>)], watch: &mut Watch) -> Result<()> {
        let mut text = String::new();
        for (table, skeleton) in wanted {
            text += &self.update(*table, skeleton)?;
        }
        run(&text, Some(watch))?.check().map(drop)
    }

    /// The text that leads from the table as it is to a skeleton. From now on, the table counts as unknown until
    /// [`Self::settle`] describes it.
    fn update(&mut self, table: Table, skeleton: &Skeleton) -> Result<String> {
        // If the table is as written, only the difference is passed to `nft`: one of a thousand policies.
        let part = match self.current(table)? {
            Some(there) if *there != Skeleton::default() => skeleton.since(&there),
            _ => skeleton.clone(),
        };
        let state = self.states.entry(table).or_default();
        state.written = None;
        state.seen = None;
        let mut text = part.without_rules().text(table);
        for chain in &part.chains {
            let _ = writeln!(text, "flush chain {table} {}", chain.name);
        }
        text += &part.text(table);
        Ok(text)
    }

    /// Deletes what is left of an earlier skeleton of a table that `nft` has just written, and notes the table as written.
    fn settle(&mut self, table: Table, skeleton: &Arc<Skeleton>, watch: Option<&mut Watch>) -> Result<()> {
        if let Some(state) = self.states.get_mut(&table) {
            state.known.retain(|set, _| skeleton.sets.contains(set));
        }
        self.sweep(table, skeleton)?;
        self.describe(table, skeleton)?;
        if let Some(watch) = watch {
            // If another program changed the table in between, the description is not of the written skeleton.
            watch.drain(0);
            if watch.is_touched(table) {
                self.states.remove(&table);
            }
        }
        Ok(())
    }

    /// The text that deletes and creates a table, with those of its elements that fit the skeleton.
    fn recreation(&mut self, table: Table, skeleton: &Skeleton) -> Result<String> {
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

    /// Deletes the objects of a table that are not in its skeleton, unless elements still refer to them.
    fn sweep(&mut self, table: Table, skeleton: &Skeleton) -> Result<()> {
        let ObjectNames { mut chains, mut sets, mut objects } = self.nftables.names(table)?;
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
        let names = ObjectNames { chains, sets, objects };
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

    /// Deletes a table. An absent table is no error.
    pub(super) fn remove(&mut self, table: Table) -> Result<()> {
        self.states.remove(&table);
        self.nftables.remove(table)
    }

    /// Reads the elements and counters of sets that packets add elements to.
    pub(super) fn counts(&mut self, table: Table, sets: &[String]) -> Result<Vec<Vec<CountedElement>>> {
        sets.iter().map(|set| self.nftables.counts(table, set)).collect()
    }

    /// Reads the elements that end by themselves of all sets of a table whose names begin with `prefix`.
    pub(super) fn timed(&mut self, table: Table, prefix: &str) -> Result<Vec<TimedElement>> {
        let mut all = Vec::new();
        for set in self.nftables.names(table)?.sets.iter().filter(|set| set.starts_with(prefix)) {
            all.extend(timed::of_set(&mut self.nftables, table, set)?);
        }
        Ok(all)
    }

    /// Changes elements that end by themselves, in one transaction for each set. Returns the first refusal.
    pub(super) fn change_timed(&mut self, table: Table, changes: &[TimedChange]) -> Result<()> {
        let mut sets: BTreeMap<&str, Vec<&TimedChange>> = BTreeMap::new();
        for change in changes {
            sets.entry(change.set()).or_default().push(change);
        }
        let mut first = Ok(());
        for (set, changes) in sets {
            let result = timed::change(&mut self.nftables, table, set, &changes)?;
            let result = result
                .map_err(|refusal| refusal.into_error(format!("cannot change elements of {table} {set}")));
            first = first.and(result);
        }
        first
    }

    /// Reads a named counter, in packets; 0 if there is no counter.
    pub(super) fn counted(&mut self, table: Table, counter: &str) -> Result<u64> {
        Ok(self.nftables.counted(table, counter)?.unwrap_or(0))
    }

    /// Applies operations on elements in one transaction. If it is refused, in one transaction for each table. Returns
    /// the result of each operation.
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
                    _ => self
                        .change(&wanted.iter().filter(|(set, _)| set.table == *table).map(copied).collect()),
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

    /// Sets keys of sets to these values, in one transaction.
    pub(super) fn change(&mut self, wanted: &Wanted<'_>) -> Result<()> {
        let mut refused = None;
        // The cache may be stale. Then the kernel refuses to delete an absent element, and a second attempt reads again.
        for _ in 0..2 {
            let mut held = BTreeMap::new();
            for (set, keys) in wanted {
                // Elements to be deleted from a set that is not in the skeleton were deleted with the set.
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

    /// Whether a set is in the skeleton that was written last, or the skeleton is unknown.
    fn is_there(&self, set: &Set) -> bool {
        let written = self.states.get(&set.table).and_then(|state| state.written.as_ref());
        written.is_none_or(|(skeleton, _)| skeleton.sets.contains(set))
    }

    /// Updates the cache by a change that succeeded.
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

    /// Retries the deletion of stale objects, to which elements may no longer refer.
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

    /// The content of a set, which is read unless it is cached.
    pub(super) fn held(&mut self, set: &Set) -> Result<Arc<Contents>> {
        let state = self.states.entry(set.table).or_default();
        if let Some((contents, since)) = state.known.get(set)
            && since.elapsed() < ELEMENTS_AGE
        {
            return Ok(Arc::clone(contents));
        }
        // A set of another shape is of another version of ovl. Writing the skeleton replaces it.
        let contents =
            self.nftables.contents(set)?.filter(|contents| fits(set, contents)).unwrap_or_default();
        let contents = Arc::new(contents);
        state.known.insert(set.clone(), (Arc::clone(&contents), Instant::now()));
        Ok(contents)
    }

    /// Drops the cached sets of a table.
    pub(super) fn forget(&mut self, table: Table) {
        self.states.entry(table).or_default().known.clear();
    }

    /// Whether a table is as this process wrote it. It reads the kernel, not the cache.
    pub(super) fn is_as_written(&mut self, table: Table) -> Result<bool> {
        self.states.entry(table).or_default().seen = None;
        Ok(self.current(table)?.is_some_and(|skeleton| *skeleton != Skeleton::default()))
    }
}

/// The wanted value of each key of each set; `None` to delete it.
pub(super) type Wanted<'a> = BTreeMap<&'a Set, BTreeMap<&'a Key, Option<&'a Value>>>;

fn copied<'a>(
    (set, keys): (&&'a Set, &BTreeMap<&'a Key, Option<&'a Value>>),
) -> (&'a Set, BTreeMap<&'a Key, Option<&'a Value>>) {
    (*set, keys.clone())
}

fn run(text: &str, watch: Option<&mut Watch>) -> Result<NftRun> {
    let done = filter::run(&["-f", "-"], text)?;
    if let Some(watch) = watch {
        watch.drain(done.pid);
    }
    Ok(done)
}
