//! The queue of kernel events to the daemon: the channel holds at most one event of each kind.

use std::collections::VecDeque;
use std::time::Duration;

use ovl_dataplane::device::Device;
use tokio::sync::mpsc::Sender;

use super::KernelEvent;

/// The time after which the channel is checked again for received events.
const RETRY: Duration = Duration::from_millis(5);

/// Events that wait for the channel.
#[derive(Debug)]
pub(super) struct EventQueue {
    channel: Sender<KernelEvent>,
    waiting: VecDeque<KernelEvent>,
    /// Events that were put into the channel and may still be in it.
    sent: Vec<KernelEvent>,
}

impl EventQueue {
    pub(super) fn new(channel: Sender<KernelEvent>) -> Self {
        Self { channel, waiting: VecDeque::new(), sent: Vec::new() }
    }

    /// Queues an event, unless the same event is queued already.
    pub(super) fn add(&mut self, event: KernelEvent) {
        if !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }

    /// Queues an event for each endpoint whose host interface was deleted.
    pub(super) fn add_gone(&mut self, devices: Vec<Device>) {
        devices.into_iter().for_each(|device| self.add(KernelEvent::EndpointGone(device)));
    }

    /// Moves events into the channel. Returns the time after which to call it again; `None` if no event is left.
    pub(super) fn flush(&mut self) -> Option<Duration> {
        // This queue is the only sender, so an empty channel means that all events were received.
        if self.channel.capacity() == self.channel.max_capacity() {
            self.sent.clear();
        }
        let mut left = VecDeque::new();
        for event in self.waiting.drain(..) {
            if !self.sent.contains(&event) && self.channel.try_send(event).is_ok() {
                self.sent.push(event);
            } else {
                left.push_back(event);
            }
        }
        if self.channel.is_closed() {
            left.clear();
        }
        self.waiting = left;
        (!self.waiting.is_empty()).then_some(RETRY)
    }
}
