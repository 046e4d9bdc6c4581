//! What stands in a table beside the elements.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::{Set, Table};

/// Chains, and what their rules use. Empty, it stands for a table in a dump that is not as we wrote it:
/// different from all that is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skeleton {
    /// Sets and maps whose elements are ours.
    pub sets: Vec<Set>,
    /// Counters, and sets that packets add to.
    pub objects: Vec<Object>,
    /// Chains, in any order.
    pub chains: Vec<Chain>,
}

/// Something with a name that rules use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// `counter`, `set`, `map`, ...
    pub kind: &'static str,
    /// Within the table.
    pub name: String,
    /// What stands between the braces.
    pub body: String,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Within the table.
    pub name: String,
    /// Where packets come in, such as `type filter hook input priority raw; policy accept;`.
    pub hook: Option<String>,
    /// One a line.
    pub rules: Vec<String>,
}

impl Skeleton {
    /// A table without elements, as text for `nft -f`. Where the same sets, objects and chains are there
    /// already it adds the rules to theirs.
    pub fn text(&self, table: Table) -> String {
        let mut text = format!("table {table} {{\n");
        for set in &self.sets {
            text += &set.definition();
        }
        for Object { kind, name, body } in &self.objects {
            let _ = writeln!(text, "\t{kind} {name} {{\n\t\t{body}\n\t}}");
        }
        for chain in &self.chains {
            let _ = writeln!(text, "\tchain {} {{", chain.name);
            for line in chain.hook.iter().chain(&chain.rules) {
                let _ = writeln!(text, "\t\t{line}");
            }
            text.push_str("\t}\n");
        }
        text.push_str("}\n");
        text
    }

    /// What of it is not the same in a table that was written from another one.
    pub fn since(&self, other: &Self) -> Self {
        let chains: BTreeMap<&str, &Chain> = other.chains.iter().map(|chain| (&*chain.name, chain)).collect();
        let sets: BTreeSet<&Set> = other.sets.iter().collect();
        Self {
            sets: self.sets.iter().filter(|set| !sets.contains(set)).cloned().collect(),
            objects: self.objects.iter().filter(|object| !other.objects.contains(object)).cloned().collect(),
            chains: self
                .chains
                .iter()
                .filter(|chain| chains.get(&*chain.name).copied() != Some(*chain))
                .cloned()
                .collect(),
        }
    }

    /// The same without rules.
    pub fn without_rules(&self) -> Self {
        let bare = |chain: &Chain| Chain { rules: Vec::new(), ..chain.clone() };
        Self {
            sets: self.sets.clone(),
            objects: self.objects.clone(),
            chains: self.chains.iter().map(bare).collect(),
        }
    }
}
