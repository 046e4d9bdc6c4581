//! A request that failed, with what to tell the user.

use ovl_cluster::view::View;
use ovl_control::{Failure, FailureKind};

/// A request that failed.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) Failure);

impl Failed {
    fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self(Failure { kind, message: message.into() })
    }

    /// The request itself is wrong.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Invalid, message)
    }

    /// What the request names does not exist.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(FailureKind::NotFound, message)
    }

    /// Something that exists is in the way.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Conflict, message)
    }

    /// Nothing is left to give.
    pub(crate) fn exhausted(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Exhausted, message)
    }

    /// The request cannot be served now, and may be later.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Unavailable, message)
    }

    /// The kernel refused it.
    pub(crate) fn kernel(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Kernel, message)
    }

    /// The daemon itself is at fault.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Internal, message)
    }

    /// There is no network with this name.
    pub(crate) fn no_network(view: &View, name: &str) -> Self {
        let names: Vec<&str> = view.networks.values().map(|found| found.network.name.as_str()).collect();
        let known = if names.is_empty() {
            "there are none yet: `ovlctl network create NAME` makes one".to_owned()
        } else {
            format!("there are: {}", names.join(", "))
        };
        Self::not_found(format!("there is no network {name}; {known}"))
    }
}

impl From<ovl_kernel::KernelError> for Failed {
    fn from(error: ovl_kernel::KernelError) -> Self {
        Self::kernel(error.to_string())
    }
}

/// Runs work of the kernel's crate that blocks in another thread.
///
/// # Errors
///
/// The work fails, or its thread ends.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> ovl_kernel::Result<T> + Send + 'static,
) -> Result<T, Failed> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Failed::from),
        Err(error) => Err(Failed::internal(error.to_string())),
    }
}
