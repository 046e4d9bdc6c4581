//! An index that finds the selectors that may match a set of labels, without a test of each.
//!
//! A selector that requires a label with one value is found by that label; all others are always candidates. [`Index`]
//! owns the positions of the selectors in a list of its caller. Begin to read at [`Index::candidates`].

use std::collections::BTreeMap;

use ovl_proto::resource::{LabelSelector, Labels};

/// Selectors, by their positions in a list of the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Index {
    by_label: BTreeMap<(String, String), Vec<usize>>,
    others: Vec<usize>,
}

impl Index {
    /// Adds the selector at a position.
    pub(super) fn insert(&mut self, place: usize, selector: &LabelSelector) {
        match selector.match_labels.iter().next() {
            Some((key, value)) => self.by_label.entry((key.clone(), value.clone())).or_default().push(place),
            None => self.others.push(place),
        }
    }

    /// Returns the positions of all selectors that match these labels, and of few others, in ascending order.
    pub(super) fn candidates(&self, labels: &Labels) -> Vec<usize> {
        let mut found = self.others.clone();
        for (key, value) in labels {
            found.extend(self.by_label.get(&(key.clone(), value.clone())).into_iter().flatten());
        }
        found.sort_unstable();
        found
    }
}
