//! Labels, which thousands of objects have, and many in common.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Labels: keys and values, ordered by key. A clone shares the memory of the original.
///
/// Encoded as a map in every format.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Labels(Option<Arc<[(String, String)]>>);

/// Iterates over the keys and values of [`Labels`], in the order of the keys.
pub type LabelsIter<'a> = std::iter::Map<
    std::slice::Iter<'a, (String, String)>,
    fn(&'a (String, String)) -> (&'a String, &'a String),
>;

impl Labels {
    /// Creates empty labels.
    pub fn new() -> Self {
        Self::default()
    }

    fn as_slice(&self) -> &[(String, String)] {
        self.0.as_deref().unwrap_or_default()
    }

    /// Returns the number of labels.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether there are no labels.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Returns the value of a label.
    pub fn get(&self, key: &str) -> Option<&String> {
        let all = self.as_slice();
        let at = all.binary_search_by(|(own, _)| own.as_str().cmp(key)).ok()?;
        all.get(at).map(|(_, value)| value)
    }

    /// Iterates over keys and values, in the order of the keys.
    pub fn iter(&self) -> LabelsIter<'_> {
        self.as_slice().iter().map(|(key, value)| (key, value))
    }

    /// Returns these labels and others. A label that both have has the value of the others.
    pub fn overlaid(&self, others: &Self) -> Self {
        self.iter().chain(others).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Whether two labels share their memory. Empty ones need none.
    pub fn is_shared_with(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (None, None) => true,
            _ => false,
        }
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self).finish()
    }
}

impl<'a> IntoIterator for &'a Labels {
    type Item = (&'a String, &'a String);
    type IntoIter = LabelsIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<BTreeMap<String, String>> for Labels {
    fn from(map: BTreeMap<String, String>) -> Self {
        Self((!map.is_empty()).then(|| map.into_iter().collect()))
    }
}

impl<const N: usize> From<[(String, String); N]> for Labels {
    fn from(labels: [(String, String); N]) -> Self {
        BTreeMap::from(labels).into()
    }
}

impl FromIterator<(String, String)> for Labels {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(labels: T) -> Self {
        BTreeMap::from_iter(labels).into()
    }
}

impl From<&Labels> for BTreeMap<String, String> {
    fn from(labels: &Labels) -> Self {
        labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    }
}

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self)
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BTreeMap::deserialize(deserializer).map(<BTreeMap<String, String>>::into)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{decode_body, encode_body};

    fn labels(all: &[(&str, &str)]) -> Labels {
        all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn overlaid_labels_have_the_values_of_the_later_ones() {
        let (own, pod) =
            (labels(&[("app", "web"), ("tier", "front")]), labels(&[("app", "db"), ("zone", "a")]));
        assert_eq!(own.overlaid(&pod), labels(&[("app", "db"), ("tier", "front"), ("zone", "a")]));
        assert_eq!(own.overlaid(&Labels::new()), own);
        assert!(own.clone().is_shared_with(&own) && !own.is_shared_with(&labels(&[("app", "web")])));
        assert!(labels(&[]).is_empty() && labels(&[]).is_shared_with(&Labels::new()));
    }

    proptest! {
        #[test]
        fn labels_are_encoded_and_ordered_as_a_map_is(
            one in any::<BTreeMap<String, String>>(), other in any::<BTreeMap<String, String>>()
        ) {
            let [a, b] = [&one, &other].map(|map| Labels::from(map.clone()));
            let bytes = encode_body(&one).unwrap();
            prop_assert_eq!(&encode_body(&a).unwrap(), &bytes);
            prop_assert_eq!(&decode_body::<Labels>(&bytes).unwrap(), &a);
            let json = serde_json::to_string(&one).unwrap();
            prop_assert_eq!(&serde_json::to_string(&a).unwrap(), &json);
            prop_assert_eq!(&serde_json::from_str::<Labels>(&json).unwrap(), &a);
            prop_assert_eq!(format!("{a:?}"), format!("{one:?}"));
            prop_assert_eq!(a.cmp(&b), one.cmp(&other));
            prop_assert_eq!(&BTreeMap::from(&a), &one);
            for key in one.keys().chain(other.keys()) {
                prop_assert_eq!(a.get(key), one.get(key));
            }
        }
    }
}
