//! Elements that many parts want, such as Services and endpoints: each part's can be replaced at the cost of
//! that part alone, and an element that several want stays until the last one has done with it.

use std::collections::BTreeMap;

use crate::nft::{Element, Elements, Key, Set, Value};
use crate::op::{NftOp, Op};

/// What one part wants.
pub type Entries = BTreeMap<(Set, Key), Value>;

/// What all parts want.
#[derive(Debug, Clone)]
pub struct Ledger<P> {
    parts: BTreeMap<P, Entries>,
    /// Of each element all who want it, with the value that each wants: the first one's counts.
    claims: BTreeMap<(Set, Key), BTreeMap<P, Value>>,
    wanted: Elements,
}

impl<P> Default for Ledger<P> {
    fn default() -> Self {
        Self { parts: BTreeMap::new(), claims: BTreeMap::new(), wanted: Elements::default() }
    }
}

impl<P: Ord + Clone> Ledger<P> {
    /// All elements.
    pub fn wanted(&self) -> &Elements {
        &self.wanted
    }

    /// The parts that want something.
    pub fn parts(&self) -> impl Iterator<Item = &P> {
        self.parts.keys()
    }

    /// What one part wants from now on, instead of what it wanted; gives what that changes.
    pub fn set(&mut self, part: &P, entries: Entries) -> Vec<Op> {
        let old = self.parts.remove(part).unwrap_or_default();
        let mut touched = Vec::new();
        for (at, _) in old.iter().filter(|(at, value)| entries.get(*at) != Some(*value)) {
            if let Some(claims) = self.claims.get_mut(at) {
                claims.remove(part);
            }
            touched.push(at.clone());
        }
        for (at, value) in entries.iter().filter(|(at, value)| old.get(*at) != Some(*value)) {
            self.claims.entry(at.clone()).or_default().insert(part.clone(), value.clone());
            touched.push(at.clone());
        }
        if !entries.is_empty() {
            self.parts.insert(part.clone(), entries);
        }
        touched.sort_unstable();
        touched.dedup();
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for at in touched {
            let value = self.claims.get(&at).and_then(|claims| claims.values().next()).cloned();
            let (set, key) = &at;
            let was = self.wanted.of(set).and_then(|contents| contents.get(key));
            if was == value.as_ref() {
                continue;
            }
            if was.is_some() {
                gone.push(Op::Nft(NftOp::DeleteElement(set.clone(), key.clone())));
            }
            match value {
                Some(value) => {
                    self.wanted.insert(set, key.clone(), value.clone());
                    new.push(Op::Nft(NftOp::SetElement(Element {
                        set: set.clone(),
                        key: key.clone(),
                        value,
                    })));
                }
                None => {
                    self.wanted.remove(set, key);
                    self.claims.remove(&at);
                }
            }
        }
        gone.extend(new);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::{Data, Field, Shape, Table, Type};

    const SET: Set = Set::new(
        Table::Services,
        "s",
        Shape { key: &[Type::Mark], data: Data::Fields(&[Type::Port]), ranges: false },
    );

    fn entries(all: &[(u32, u16)]) -> Entries {
        let entry = |(key, value): &(u32, u16)| {
            ((SET, Key::of(&[Field::Number(*key)])), Value::of(&[Field::Port(*value)]))
        };
        all.iter().map(entry).collect()
    }

    fn shown(ops: Vec<Op>) -> Vec<String> {
        let short = |op: Op| op.to_string().replace("nft ", "").replace(" element inet ovl-services s", "");
        ops.into_iter().map(short).collect()
    }

    #[test]
    fn an_element_stays_as_long_as_somebody_wants_it() {
        let mut ledger = Ledger::default();
        assert_eq!(
            shown(ledger.set(&2, entries(&[(1, 10), (2, 20)]))),
            ["add '{ 1 : 10 }'", "add '{ 2 : 20 }'"]
        );
        assert_eq!(shown(ledger.set(&3, entries(&[(1, 10), (3, 30)]))), ["add '{ 3 : 30 }'"]);
        // The first one's value counts.
        assert!(ledger.set(&3, entries(&[(1, 11), (3, 30)])).is_empty());
        assert_eq!(shown(ledger.set(&1, entries(&[(3, 33)]))), ["delete '{ 3 }'", "add '{ 3 : 33 }'"]);
        assert_eq!(
            shown(ledger.set(&2, entries(&[]))),
            ["delete '{ 1 }'", "delete '{ 2 }'", "add '{ 1 : 11 }'"]
        );
        assert_eq!(shown(ledger.set(&1, entries(&[]))), ["delete '{ 3 }'", "add '{ 3 : 30 }'"]);
        assert_eq!(ledger.parts().count(), 1);
        ledger.set(&3, entries(&[]));
        assert!(ledger.wanted().is_empty());
    }
}
