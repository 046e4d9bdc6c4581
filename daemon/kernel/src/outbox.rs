//! Events on their way to the engine: at most one of each kind waits in the channel.

use std::collections::VecDeque;
use std::time::Duration;

use ovl_dataplane::device::Device;
use tokio::sync::mpsc::Sender;

use super::KernelEvent;

/// When to look again whether the engine has taken what it was given.
const AGAIN: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Outbox {
    channel: Sender<KernelEvent>,
    waiting: VecDeque<KernelEvent>,
    /// In the channel, as far as we know.
    given: Vec<KernelEvent>,
}

impl Outbox {
    pub(super) fn new(channel: Sender<KernelEvent>) -> Self {
        Self { channel, waiting: VecDeque::new(), given: Vec::new() }
    }

    pub(super) fn add(&mut self, event: KernelEvent) {
        if !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }

    pub(super) fn add_gone(&mut self, devices: Vec<Device>) {
        devices.into_iter().for_each(|device| self.add(KernelEvent::EndpointGone(device)));
    }

    /// Hands over what can be handed over; gives when to try again, if something is left.
    pub(super) fn flush(&mut self) -> Option<Duration> {
        // Nobody but us sends: an empty channel means that all was taken.
        if self.channel.capacity() == self.channel.max_capacity() {
            self.given.clear();
        }
        let mut left = VecDeque::new();
        for event in self.waiting.drain(..) {
            if !self.given.contains(&event) && self.channel.try_send(event).is_ok() {
                self.given.push(event);
            } else {
                left.push_back(event);
            }
        }
        if self.channel.is_closed() {
            left.clear();
        }
        self.waiting = left;
        (!self.waiting.is_empty()).then_some(AGAIN)
    }
}
