//! Limits of an endpoint's traffic.

use serde::{Deserialize, Serialize};

/// The limits of an endpoint's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// The limit of what it receives. `None`: there is none.
    #[serde(default)]
    pub ingress: Option<Rate>,
    /// The limit of what it sends. `None`: there is none.
    #[serde(default)]
    pub egress: Option<Rate>,
}

/// A limit of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bits in a second, with the Ethernet headers. Not 0.
    pub rate: u64,
    /// The bits that may pass at once after a pause. Not 0.
    pub burst: u64,
}
