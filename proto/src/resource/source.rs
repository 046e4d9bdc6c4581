//! Where a mirrored object comes from.

use serde::{Deserialize, Serialize};

/// The Kubernetes API server that has the object, and when the object was as it is here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// The Kubernetes cluster: the uid of its namespace `kube-system`, at most [`Self::MAX_CLUSTER`] bytes.
    pub cluster: String,
    /// The API's `resourceVersion` of the object, or of its deletion. Of two states of an object of one cluster, the one
    /// with the higher version is later (Kubernetes promises that they are numbers which grow, by KEP 5504).
    pub version: u64,
}

impl Source {
    /// The maximum length of [`Self::cluster`].
    pub const MAX_CLUSTER: usize = 128;

    /// Whether this state of an object is known to be earlier than another one. States of different clusters cannot be
    /// compared.
    pub fn is_before(&self, other: &Self) -> bool {
        self.cluster == other.cluster && self.version < other.version
    }
}
