//! The state file: what it holds, and what is done once it is on the disk. [`crate::saving`] keeps what waits for it.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::state::State;
use super::{Failed, Node};
use crate::problems::Code;
use crate::saving::{AfterSave, Write};
use crate::store;

/// How long a write to the state file may take before the disk is reported as stuck.
pub(super) const DISK_TIMEOUT: Duration = Duration::from_secs(10);

impl Node {
    /// Requests a write of the state file. `then` is carried out once the file is on disk.
    pub(super) fn save_then(&self, state: &mut State, then: AfterSave) {
        state.save.then(then);
        self.saver.notify_one();
    }

    /// Requests a write of the state file, without waiting for it.
    pub(super) fn save_soon(&self) {
        self.state.borrow_mut().save.want();
        self.saver.notify_one();
    }

    /// Returns once the current state is on disk.
    ///
    /// # Errors
    ///
    /// The disk is stuck, or ovld is stopping.
    pub(super) async fn saved(&self) -> Result<(), Failed> {
        let (tell, done) = oneshot::channel();
        self.save_then(&mut self.state.borrow_mut(), AfterSave::Tell(tell));
        match tokio::time::timeout(DISK_TIMEOUT, done).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failed::unavailable("ovld is stopping")),
            Err(_) => Err(self.disk_is_stuck()),
        }
    }

    /// Returns the content of the state file.
    pub(super) fn snapshot(&self) -> store::State {
        let state = self.state.borrow();
        store::State {
            saved_ms: self.wall_ms(),
            generation: state.record().map_or(0, |record| record.generation),
            clock: state.objects.clock(),
            objects: state.objects.signed().cloned().collect(),
            peers: {
                // In minutes, so that the state does not change in many places each time.
                let minute = |ms: u64| ms - ms % 60_000;
                let peers = state.peers.iter();
                let peers = peers.map(|(_, peer)| (peer.signed().clone(), minute(peer.last_alive_ms())));
                peers.chain(state.newer.records()).collect()
            },
            leases: state.addresses.lent().collect(),
            alloc: Some(state.allocator.durable().clone()),
            bridges: state.bridges.iter().cloned().collect(),
            docker: state.engines.kept(),
            journal: false,
            behind_nat: state.reach.is_behind_nat(),
            unknown: state.save.unknown().clone(),
        }
    }

    /// Passes snapshots of the state to the writer, and carries out what waited for each. Runs forever.
    pub(super) async fn save_loop(
        self: Rc<Self>,
        mut done: tokio::sync::mpsc::UnboundedReceiver<(u64, anyhow::Result<()>)>,
    ) {
        // One write at a time: a snapshot of thousands of objects is not built again and again while the disk is
        // busy, and the next snapshot contains all changes up to then.
        let mut under_way = false;
        loop {
            let next = if under_way { None } else { self.state.borrow_mut().save.begin() };
            if let Some(Write { number, whole }) = next {
                match self.writer.save(number, self.snapshot(), whole) {
                    Ok(()) => under_way = true,
                    Err(error) => tracing::error!(%error, "cannot save the state"),
                }
            }
            tokio::select! {
                () = self.saver.notified() => {}
                result = done.recv() => {
                    under_way = false;
                    match result {
                    Some((number, Ok(()))) => {
                        self.state.borrow_mut().problems.set(Code::StateFile, "", None);
                        self.let_go(number);
                    }
                    Some((_, Err(error))) => {
                        // Keep everything waiting: nothing may be promised that is not on disk.
                        let sentence = format!("the state cannot be saved, and nothing new is promised: {error:#}");
                        self.state.borrow_mut().problems.set(Code::StateFile, "", Some(sentence));
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        self.state.borrow_mut().save.want();
                    }
                    None => return,
                    }
                },
            }
        }
    }

    /// Carries out everything that waited for a snapshot up to this number.
    fn let_go(&self, number: u64) {
        let ready = self.state.borrow_mut().save.written(number);
        for durable in ready {
            match durable {
                AfterSave::Alloc(output) => self.carry_out_now(output),
                AfterSave::Send(to, message) => {
                    self.links().send(to, &message);
                }
                // The waiting task may have timed out.
                AfterSave::Tell(tell) => drop(tell.send(())),
            }
        }
    }
}
