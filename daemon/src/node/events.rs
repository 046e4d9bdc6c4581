//! What happened lately, and whoever wants to hear of it.

use std::cell::RefCell;
use std::collections::VecDeque;

use ovl_control::Event;
use tokio::sync::broadcast;

/// How many are kept.
const KEPT: usize = 1000;

/// The latest events.
#[derive(Debug)]
pub(crate) struct Events {
    kept: RefCell<VecDeque<Event>>,
    live: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { kept: RefCell::default(), live: broadcast::channel(KEPT).0 }
    }
}

impl Events {
    /// Takes note of one.
    pub(super) fn push(&self, event: Event) {
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Nobody may be listening.
        self.live.send(event).ok();
    }

    /// All that are kept, oldest first.
    pub(crate) fn all(&self) -> Vec<Event> {
        self.kept.borrow().iter().cloned().collect()
    }

    /// All that are kept, and each new one from there on.
    pub(crate) fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        (self.all(), self.live.subscribe())
    }
}
