//! One copy of labels that many objects have: the pods of a Deployment all have the same.

use std::collections::BTreeMap;

use ovl_proto::resource::Labels;

/// Labels in use, and how many objects have each.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedLabels(BTreeMap<Labels, usize>);

impl SharedLabels {
    /// Counts an object with these labels, and replaces them by the copy that others have.
    pub(crate) fn share(&mut self, labels: &mut Labels) {
        if labels.is_empty() {
            return;
        }
        match self.0.get_key_value(labels) {
            Some((same, _)) => *labels = same.clone(),
            None => drop(self.0.insert(labels.clone(), 0)),
        }
        if let Some(count) = self.0.get_mut(labels) {
            *count += 1;
        }
    }

    /// Counts an object with these labels less.
    pub(crate) fn release(&mut self, labels: &Labels) {
        if let Some(count) = self.0.get_mut(labels) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(labels);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shared_until_the_last_object_is_gone() {
        let app = |value: &str| Labels::from([("app".to_owned(), value.to_owned())]);
        let mut shared = SharedLabels::default();
        let (mut first, mut second, mut other, mut none) = (app("web"), app("web"), app("db"), Labels::new());
        assert!(!first.is_shared_with(&second));
        for labels in [&mut first, &mut second, &mut other, &mut none] {
            shared.share(labels);
        }
        assert!(first.is_shared_with(&second) && !first.is_shared_with(&other));
        assert_eq!((&first, &other, &none), (&app("web"), &app("db"), &Labels::new()));
        shared.release(&first);
        let mut third = app("web");
        shared.share(&mut third);
        assert!(third.is_shared_with(&second));
        for labels in [&second, &third, &other, &none] {
            shared.release(labels);
        }
        assert!(shared.0.is_empty());
    }
}
