//! Slots for clients that are served at the same time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Slots for clients of one kind. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct ClientSlots(Arc<Semaphore>);

/// The slot of one client, which is free again once this is dropped.
#[derive(Debug)]
pub(crate) struct ClientSlot {
    _permit: OwnedSemaphorePermit,
}

impl ClientSlots {
    /// This many slots, all of them free.
    pub(crate) fn new(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most)))
    }

    /// Takes a slot. `None` if none is free.
    pub(crate) fn take(&self) -> Option<ClientSlot> {
        let permit = Arc::clone(&self.0).try_acquire_owned().ok()?;
        Some(ClientSlot { _permit: permit })
    }

    /// Takes a slot as soon as one is free. `None` would mean that no more are given, which never happens.
    pub(crate) async fn wait(&self) -> Option<ClientSlot> {
        let permit = Arc::clone(&self.0).acquire_owned().await.ok()?;
        Some(ClientSlot { _permit: permit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_is_free_again_once_it_is_dropped() {
        let slots = ClientSlots::new(2);
        let (first, second) = (slots.take(), slots.clone().take());
        assert!(first.is_some() && second.is_some() && slots.take().is_none());
        drop(first);
        assert!(slots.take().is_some());
    }
}
