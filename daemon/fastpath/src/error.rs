//! The error of this crate.

/// Why the fast path cannot be used, or an entry not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Error {
    what: &'static str,
    why: String,
}

/// The result of what may fail because of the kernel.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What failed, and why.
    pub(crate) fn of(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into() }
    }

    /// What failed because of another error.
    pub(crate) fn new(what: &'static str, error: impl std::error::Error) -> Self {
        Self { what, why: describe(&error) }
    }
}

/// Returns an error with its causes.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
