//! Calls of container runtimes (CNI specification 1.1.0): what they mean, what is answered, and
//! what an attachment should look like.

mod args;
mod call;
mod check;
mod result;
#[cfg(test)]
mod tests;

use ovl_control::{CNI_VERSIONS, CniError};
use serde::{Deserialize, Serialize};

pub use call::{Add, Call, Check, Gc, MAX_NAME, Status, parse};
pub use check::check;
pub use result::{Made, render};

/// Numbers of errors: those of the specification, and from 100 on ours.
pub mod code {
    /// The version of the specification is not spoken.
    pub const VERSION: u32 = 1;
    /// A field of the configuration is not supported.
    pub const UNSUPPORTED: u32 = 2;
    /// The container or its namespace does not exist: nothing is left to be done for it.
    pub const NO_CONTAINER: u32 = 3;
    /// An environment variable is missing or wrong.
    pub const ENVIRONMENT: u32 = 4;
    /// Something cannot be decoded.
    pub const DECODE: u32 = 6;
    /// The configuration is wrong.
    pub const CONFIG: u32 = 7;
    /// Later it may work.
    pub const LATER: u32 = 11;
    /// For `STATUS`: `ADD` would fail.
    pub const UNAVAILABLE: u32 = 50;
    /// For `STATUS`: containers may not reach each other.
    pub const LIMITED: u32 = 51;
    /// For `CHECK`: something is not as it was made.
    pub const DIFFERENCE: u32 = 100;
    /// The attachment is there already.
    pub const ATTACHED: u32 = 101;
    /// An address is taken.
    pub const TAKEN: u32 = 102;
    /// No address is left.
    pub const EXHAUSTED: u32 = 103;
    /// The kernel refused.
    pub const KERNEL: u32 = 104;
    /// ovl-cni and ovld do not understand each other.
    pub const MISMATCH: u32 = 105;
    /// A fault of ours.
    pub const INTERNAL: u32 = 106;
}

/// An error.
pub fn error(code: u32, msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError { code, msg: msg.into(), details: details.into() }
}

/// A version of the specification that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1: addresses say which family they are of.
    V0_3_1,
    /// 0.4.0: `CHECK`.
    V0_4_0,
    /// 1.0.0: they do not any more.
    V1_0_0,
    /// 1.1.0: `GC`, `STATUS`, MTUs in results.
    V1_1_0,
}

impl Version {
    /// In the order of [`CNI_VERSIONS`].
    const ALL: [Self; CNI_VERSIONS.len()] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// Nothing if it is not spoken.
    pub fn parse(text: &str) -> Option<Self> {
        CNI_VERSIONS.iter().position(|version| *version == text).and_then(|at| Self::ALL.get(at)).copied()
    }

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

/// What tells one attachment from all others on a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The name of the network configuration. Not of the network: that may go, or be another one
    /// in a changed configuration, before the attachment does.
    pub network: String,
    /// The container's.
    pub container_id: String,
    /// The interface's name in the container.
    pub ifname: String,
}
