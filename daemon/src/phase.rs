//! How far this daemon is on its way from its start to its stop.

/// How far this daemon is on its way from its start to its stop.
#[derive(Debug, Default)]
pub(crate) struct Phase {
    caught_up: bool,
    leaving: bool,
}

impl Phase {
    /// Whether gossip has caught up. Nothing is removed from the kernel before that.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.caught_up
    }

    /// Notes that gossip has caught up, which lasts.
    pub(crate) fn catch_up(&mut self) {
        self.caught_up = true;
    }

    /// Whether this daemon is stopping.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Notes that this daemon is stopping.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    /// Notes that this daemon goes on, because it could not stop.
    pub(crate) fn stay(&mut self) {
        self.leaving = false;
    }
}
