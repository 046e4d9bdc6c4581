//! Which selectors may match, without trying each: a selector that requires a label with one value is found
//! by that.

use std::collections::BTreeMap;

use ovl_proto::resource::{LabelSelector, Labels};

/// Selectors, by places in a list of somebody's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Index {
    by_label: BTreeMap<(String, String), Vec<usize>>,
    others: Vec<usize>,
}

impl Index {
    pub(super) fn insert(&mut self, place: usize, selector: &LabelSelector) {
        match selector.match_labels.iter().next() {
            Some((key, value)) => self.by_label.entry((key.clone(), value.clone())).or_default().push(place),
            None => self.others.push(place),
        }
    }

    /// All that match these labels, and few others, in order.
    pub(super) fn candidates(&self, labels: &Labels) -> Vec<usize> {
        let mut found = self.others.clone();
        for (key, value) in labels {
            found.extend(self.by_label.get(&(key.clone(), value.clone())).into_iter().flatten());
        }
        found.sort_unstable();
        found
    }
}
