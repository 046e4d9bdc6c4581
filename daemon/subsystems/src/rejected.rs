//! Remembers that the kernel rejected operations of a subsystem, until a full pass has repaired them.

/// The first reason for which the kernel rejected an operation, while that is not repaired.
#[derive(Debug, Default)]
pub(crate) struct Rejected {
    reason: Option<String>,
    in_batch: bool,
}

impl Rejected {
    /// Records a rejected operation of the current batch.
    pub(crate) fn note(&mut self, reason: &str) {
        self.in_batch = true;
        self.reason.get_or_insert_with(|| reason.to_owned());
    }

    /// Records the end of a batch. A full pass without a rejected operation has repaired everything.
    pub(crate) fn batch_done(&mut self, full: bool) {
        let rejected = std::mem::take(&mut self.in_batch);
        if full && !rejected {
            self.reason = None;
        }
    }

    /// Returns the reason. `None` if nothing is rejected.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}
