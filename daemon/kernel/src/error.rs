//! Errors, as sentences for users.

use std::io;

use ovl_dataplane::device::Device;

/// Why something could not be done to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The kernel refused a request.
    #[error("{action}: {}{}", io::Error::from_raw_os_error(*errno), reason.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused {
        /// What was tried.
        action: String,
        /// The error's number.
        errno: i32,
        /// What the kernel says about it.
        reason: Option<String>,
    },
    /// A device has one of our names, but is not ours.
    #[error("a device {0} that ovl did not make is in the way: rename or delete it")]
    Foreign(Device),
    /// A device that something should be done to is not there.
    #[error("there is no device {0}")]
    NoDevice(Device),
    /// A program that is not installed.
    #[error("the program {0} is missing")]
    Missing(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
    /// The worker has ended.
    #[error("the thread that talks to the kernel has ended")]
    Stopped,
}

/// Short for this module.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

impl KernelError {
    pub(super) fn io(action: impl Into<String>, error: &io::Error) -> Self {
        let action = action.into();
        match error.raw_os_error() {
            Some(errno) => Self::Refused { action, errno, reason: None },
            None => Self::Other(format!("{action}: {error}")),
        }
    }

    /// The kernel has no such feature: its module is not installed, or must not be loaded.
    pub(super) fn missing(feature: &str, module: &str) -> Self {
        Self::Other(format!("this kernel has no {feature}: install or allow its module `{module}`"))
    }
}
