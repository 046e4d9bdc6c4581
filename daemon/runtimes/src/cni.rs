//! Calls of container runtimes (CNI specification 1.1.0): parsing, results, and checks of attachments.

mod args;
mod bandwidth;
mod call;
mod check;
mod ports;
mod result;
#[cfg(test)]
mod tests;
mod value;

use ovl_control::{CNI_VERSIONS, CniError};
use serde::{Deserialize, Serialize};

pub use args::MAX_NAME;
pub use call::{Add, Call, Check, Gc, Status, parse};
pub use check::check;
pub use result::{Made, render};

/// Error codes: those of the specification, and codes of ovl from 100 on.
pub mod code {
    /// The version of the specification is not supported.
    pub const VERSION: u32 = 1;
    /// A field of the configuration is not supported.
    pub const UNSUPPORTED: u32 = 2;
    /// The container or its namespace does not exist, so nothing is left to do for it.
    pub const NO_CONTAINER: u32 = 3;
    /// An environment variable is missing or invalid.
    pub const ENVIRONMENT: u32 = 4;
    /// The input cannot be decoded.
    pub const DECODE: u32 = 6;
    /// The network configuration is invalid.
    pub const CONFIG: u32 = 7;
    /// The call may succeed later.
    pub const LATER: u32 = 11;
    /// For `STATUS`: `ADD` would fail.
    pub const UNAVAILABLE: u32 = 50;
    /// For `STATUS`: existing containers may not reach each other.
    pub const LIMITED: u32 = 51;
    /// For `CHECK`: the attachment differs from the one that was created.
    pub const DIFFERENCE: u32 = 100;
    /// The attachment exists already.
    pub const ATTACHED: u32 = 101;
    /// An address is taken.
    pub const TAKEN: u32 = 102;
    /// No address is free.
    pub const EXHAUSTED: u32 = 103;
    /// The kernel rejected an operation.
    pub const KERNEL: u32 = 104;
    /// ovl-cni and ovld are of incompatible releases.
    pub const MISMATCH: u32 = 105;
    /// An internal error of ovld.
    pub const INTERNAL: u32 = 106;
}

/// Creates an error.
pub fn error(code: u32, msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError { code, msg: msg.into(), details: details.into() }
}

/// A supported version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1: addresses in results have a `version`.
    V0_3_1,
    /// 0.4.0: adds `CHECK`.
    V0_4_0,
    /// 1.0.0: removes the `version` of addresses.
    V1_0_0,
    /// 1.1.0: adds `GC`, `STATUS`, and MTUs in results.
    V1_1_0,
}

impl Version {
    /// All versions, in the order of [`CNI_VERSIONS`].
    const ALL: [Self; CNI_VERSIONS.len()] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// Parses a version; `None` if it is not supported.
    pub fn parse(text: &str) -> Option<Self> {
        CNI_VERSIONS.iter().position(|version| *version == text).and_then(|at| Self::ALL.get(at)).copied()
    }

    /// Returns the text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

/// The key of an attachment, unique on a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The name of the network configuration. It is not the network's name: while the attachment exists, the
    /// network may be deleted, or a changed configuration may name another one.
    pub network: String,
    /// The container's id.
    pub container_id: String,
    /// The interface's name in the container.
    pub ifname: String,
}
