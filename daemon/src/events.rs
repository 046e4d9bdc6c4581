//! Recent events, and their subscribers.

use std::cell::RefCell;
use std::collections::VecDeque;

use ovl_control::Event;
use tokio::sync::broadcast;

/// How many events are kept.
const KEPT: usize = 1000;

/// The most recent events.
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
    /// Adds an event and sends it to all subscribers. If there are too many, the oldest is dropped.
    pub(crate) fn push(&self, event: Event) {
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // There may be no subscriber.
        self.live.send(event).ok();
    }

    /// Returns the kept events, oldest first.
    pub(crate) fn all(&self) -> Vec<Event> {
        self.kept.borrow().iter().cloned().collect()
    }

    /// Returns the kept events and a receiver for all later ones.
    pub(crate) fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        (self.all(), self.live.subscribe())
    }
}
