//! What is still to be written of the state file and of the tables in the run directory, and what waits for that.

use std::collections::BTreeSet;

use ovl_consensus::Output;
use ovl_proto::id::NodeId;
use ovl_proto::sync::Message;
use ovl_proto::wire::fields::Unknown;
use tokio::sync::oneshot;

/// An action that must wait until the state file is on the disk.
#[derive(Debug)]
pub(crate) enum AfterSave {
    /// Send the output of the consensus replica, whose messages are promises.
    Alloc(Output),
    /// Send a message that is a promise.
    Send(NodeId, Box<Message>),
    /// Signal a request that its changes are saved.
    Tell(oneshot::Sender<()>),
}

/// A write of the state file that is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    /// The number of the state.
    pub number: u64,
    /// Whether the state is to be written whole and without a journal.
    pub whole: bool,
}

/// Progress of saving the state file.
#[derive(Debug)]
pub(crate) struct Save {
    /// Number of the state that was last given to the writer.
    handed: u64,
    /// Whether the state has changed since then.
    wanted: bool,
    whole: bool,
    /// Actions that wait, each with the number of the state that must be on the disk first.
    waiting: Vec<(u64, AfterSave)>,
    unknown: Unknown,
}

impl Save {
    /// Nothing has changed since the last run. `unknown` are the fields of the state file that this release does not know.
    pub(crate) fn new(unknown: Unknown) -> Self {
        Self { handed: 0, wanted: false, whole: false, waiting: Vec::new(), unknown }
    }

    /// Notes that the state has changed.
    pub(crate) fn want(&mut self) {
        self.wanted = true;
    }

    /// Notes that the state has changed, and what is to be done once the change is on the disk.
    pub(crate) fn then(&mut self, action: AfterSave) {
        self.waiting.push((self.handed + 1, action));
        self.wanted = true;
    }

    /// Keeps an output of the consensus replica behind the last one that waits for the disk: their order matters. Returns it
    /// if none waits.
    pub(crate) fn follow(&mut self, output: Output) -> Option<Output> {
        let last = self.waiting.iter().rev().find(|(_, action)| matches!(action, AfterSave::Alloc(_)));
        match last {
            Some((number, _)) => {
                self.waiting.push((*number, AfterSave::Alloc(output)));
                None
            }
            None => Some(output),
        }
    }

    /// From now on, the state is written whole and without a journal, because the daemon stops.
    pub(crate) fn whole(&mut self) {
        self.whole = true;
    }

    /// Takes the write that is to begin. `None` if nothing has changed.
    pub(crate) fn begin(&mut self) -> Option<Write> {
        if !std::mem::take(&mut self.wanted) {
            return None;
        }
        self.handed += 1;
        Some(Write { number: self.handed, whole: self.whole })
    }

    /// Notes that the state with this number is on the disk, and returns what waited for it, in order.
    pub(crate) fn written(&mut self, number: u64) -> Vec<AfterSave> {
        let ready = self.waiting.extract_if(.., |(at, _)| *at <= number);
        ready.map(|(_, action)| action).collect()
    }

    /// Returns the fields of the state file that this release does not know. They are written again.
    pub(crate) fn unknown(&self) -> &Unknown {
        &self.unknown
    }
}

/// Peers whose tables have changed since they were last cached in the run directory.
#[derive(Debug, Default)]
pub(crate) struct Uncached(BTreeSet<NodeId>);

impl Uncached {
    /// Notes that the table of a host has changed, or that the host is known no longer.
    pub(crate) fn note(&mut self, host: NodeId) {
        self.0.insert(host);
    }

    /// Takes the next one.
    pub(crate) fn next(&mut self) -> Option<NodeId> {
        self.0.pop_first()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise() -> AfterSave {
        AfterSave::Alloc(Output { persist: true, ..Output::default() })
    }

    fn persists(actions: &[AfterSave]) -> Vec<bool> {
        let outputs = actions.iter().filter_map(|action| match action {
            AfterSave::Alloc(output) => Some(output.persist),
            AfterSave::Send(..) | AfterSave::Tell(_) => None,
        });
        outputs.collect()
    }

    #[test]
    fn action_waits_for_the_state_that_has_its_change() {
        let mut save = Save::new(Unknown::default());
        assert_eq!(save.begin(), None);
        save.want();
        assert_eq!(save.begin(), Some(Write { number: 1, whole: false }));
        // The first write is under way and has nothing of this.
        save.then(promise());
        assert!(save.written(1).is_empty());
        save.whole();
        assert_eq!(save.begin(), Some(Write { number: 2, whole: true }));
        assert_eq!(save.begin(), None);
        assert_eq!(persists(&save.written(2)), [true]);
        assert!(save.written(2).is_empty());
    }

    #[test]
    fn output_without_a_promise_follows_one_that_waits() {
        let mut save = Save::new(Unknown::default());
        assert!(save.follow(Output::default()).is_some());
        save.then(promise());
        assert!(save.follow(Output::default()).is_none());
        assert_eq!(save.begin(), Some(Write { number: 1, whole: false }));
        assert_eq!(persists(&save.written(1)), [true, false]);
        assert!(save.follow(Output::default()).is_some());
    }
}
