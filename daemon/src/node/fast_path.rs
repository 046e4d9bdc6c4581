//! The fast path: finds out whether it can be used, pauses it while packets are to be seen in the stack, and shows it.
//!
//! [`ovl_subsystems::fastpath`] decides what the programs know.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::FastPathStatus;
use ovl_dataplane::device::Device;
use ovl_kernel::{fast_path_folder, is_ethernet};
use ovl_metrics::{In, Page};
use ovl_subsystems::Change;
use ovl_subsystems::local::Obstacle;

use super::Node;
use crate::modes::FastPathMode;
use crate::problems::Code;

/// While it exists, packets of this host take the stack.
pub(super) struct FastPause {
    watchers: Rc<Cell<u32>>,
    node: Rc<Node>,
}

impl Drop for FastPause {
    fn drop(&mut self) {
        self.watchers.set(self.watchers.get().saturating_sub(1));
        // The reconcile loop looks at the number.
        self.node.work.notify_one();
    }
}

/// Returns the device of the underlay. `None` if the programs cannot read its packets.
fn usable(device: &str) -> Option<Device> {
    Device::new(device).filter(|_| is_ethernet(device))
}

impl Node {
    /// Finds out whether the fast path can be used, before the first pass: what an earlier run has left goes on without a
    /// gap, or ends.
    pub(super) async fn look_at_fast_path(&self) {
        if self.config.fast_path == FastPathMode::Off || !self.environment.owns_host() {
            return;
        }
        // Also where it is not to be used: what an earlier run has left is taken away.
        let opened = self.kernel.open_fast_path().await.map_err(|error| error.to_string());
        if let Some(folder) = fast_path_folder() {
            // For those who look for it; ovld finds it by itself.
            let link = self.run_dir.fast_path();
            let _ = fs::remove_file(&link);
            let _ = symlink(folder, link);
        }
        let (vtep, peers) = self.underlay_ends();
        let underlay = self.kernel.underlay(vtep, peers).await.ok();
        {
            let local = &mut self.state.borrow_mut().local.fast;
            local.begin(opened);
            local.set_underlay(underlay.and_then(|underlay| usable(&underlay.device)));
        }
        if let Err(failed) = self.mind_firewalls_now().await {
            tracing::warn!(error = failed.0.message, "cannot look after other firewalls");
            self.note_fast_path();
        }
    }

    /// Records what stands in the way of the fast path, or that nothing of this kind does.
    pub(super) fn note_obstacle(&self, obstacle: Obstacle, sentence: Option<String>) {
        let changed = {
            let local = &mut self.state.borrow_mut().local.fast;
            local.is_configured() && local.set_obstacle(obstacle, sentence)
        };
        if changed {
            self.note_fast_path();
        }
    }

    /// Records whether the fast path is used where it can be: not while everything of ovl is being removed.
    pub(super) fn use_fast_path(&self, is_used: bool) {
        if self.config.fast_path != FastPathMode::Off {
            let why_not = (!is_used).then(|| "everything of ovl is being removed from this host".to_owned());
            let mut state = self.state.borrow_mut();
            state.local.fast.set_obstacle(Obstacle::Configured, why_not);
            state.changed(Change::FastPath);
        }
    }

    /// Records the device of the underlay.
    pub(super) fn note_underlay_device(&self, device: &str) {
        let changed = {
            let local = &mut self.state.borrow_mut().local.fast;
            local.is_configured() && local.set_underlay(usable(device))
        };
        if changed {
            self.note_fast_path();
        }
    }

    /// Tells everything that depends on it whether the fast path is used.
    fn note_fast_path(&self) {
        let mut state = self.state.borrow_mut();
        let why_not = state.local.fast.why_not().map(str::to_owned);
        let message = match &why_not {
            None => "packets of unencrypted networks take the fast path".to_owned(),
            Some(why) => format!("packets take the stack: {why}"),
        };
        let problem = why_not.filter(|_| self.config.fast_path == FastPathMode::On);
        let problem =
            problem.map(|why| format!("`fast_path = \"on\"`, and the fast path is not used: {why}"));
        state.problems.set(Code::FastPath, "", problem);
        state.changed(Change::FastPath);
        drop(state);
        self.event("kernel", "fast path", &message);
        self.work.notify_one();
    }

    /// Has packets of this host take the stack, until what is returned is dropped: they are to be seen there. When this
    /// returns, they do.
    pub(super) async fn pause_fast_path(self: &Rc<Self>) -> FastPause {
        self.fast_watchers.set(self.fast_watchers.get() + 1);
        let pause = FastPause { watchers: Rc::clone(&self.fast_watchers), node: Rc::clone(self) };
        if self.look_at_fast_watchers() {
            self.quick_pass().await;
        }
        pause
    }

    /// Has packets of this host take the stack for a while. When this returns, they do.
    pub(super) async fn pause_fast_path_for(self: &Rc<Self>, time: Duration) {
        let pause = self.pause_fast_path().await;
        tokio::task::spawn_local(async move {
            tokio::time::sleep(time).await;
            drop(pause);
        });
    }

    /// Notes whether packets are to be seen in the stack. Returns whether that is new.
    pub(super) fn look_at_fast_watchers(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let changed = state.local.fast.set_paused(self.fast_watchers.get() > 0);
        if changed {
            state.changed(Change::FastPath);
        }
        changed
    }

    /// Returns whether the fast path is used, and what its programs have counted.
    pub(super) async fn fast_path_status(&self) -> FastPathStatus {
        let mut status = self.fast_path_use();
        if let Some(counters) = self.kernel.fast_counters().await {
            let packets = |all: Vec<(&str, u64, u64)>| {
                all.into_iter().map(|(name, packets, _)| (name.to_owned(), packets)).collect()
            };
            status.fast = packets(counters.fast);
            status.slow = packets(counters.slow);
            status.attached_by = Some(counters.attached_by.to_owned());
        }
        status
    }

    /// Returns whether the fast path is used.
    pub(super) fn fast_path_use(&self) -> FastPathStatus {
        let state = self.state.borrow();
        let local = &state.local.fast;
        FastPathStatus {
            in_use: local.underlay().is_some(),
            why_not: local.why_not().map(str::to_owned),
            paused: local.is_paused(),
            ..FastPathStatus::default()
        }
    }

    /// Adds what the programs of the fast path have counted.
    pub(super) async fn add_fast_path(&self, page: &mut Page) {
        let in_use = self.fast_path_use().in_use;
        page.gauge(
            "fast_path_in_use",
            In::Numbers,
            "1 if packets of unencrypted networks take the fast path",
        )
        .is(in_use);
        let Some(counters) = self.kernel.fast_counters().await else { return };
        let help = "Packets that took the fast path, by their way";
        let family = page.counter("fast_path_packets", In::Numbers, help);
        for (way, packets, _) in &counters.fast {
            family.with(&[("way", way)], *packets);
        }
        let family = page.counter("fast_path", In::Bytes, "Bytes that took the fast path, by their way");
        for (way, _, bytes) in &counters.fast {
            family.with(&[("way", way)], *bytes);
        }
        let help = "Packets that the programs of the fast path left to the stack, by reason";
        let family = page.counter("fast_path_left_packets", In::Numbers, help);
        for (reason, packets, _) in &counters.slow {
            family.with(&[("reason", reason)], *packets);
        }
    }
}
