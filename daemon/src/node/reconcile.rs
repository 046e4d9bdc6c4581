//! The reconcile loop. Events mark what may have changed. The loop computes the desired data plane and
//! applies the difference to the kernel.
//!
//! There are two kinds of passes. A *quick pass* compares the networks that changed with what was last sent
//! to the kernel, so its cost depends on the size of the change. A *full pass* compares with a dump: at the
//! start, after drift, after a rejected operation, and at intervals.
//!
//! The kernel worker applies operations in order, so a full pass compares with the state that all earlier
//! operations left.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_dataplane::device::Device;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_kernel::{Goal, KernelEvent, Outcome};
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Backend, Mode, Network};

use tokio::time::Instant;

use super::Node;
use super::state::State;
use crate::problems::Code;
use ovl_subsystems as subsystems;

/// Maximum time between two full passes.
const RESYNC: Duration = Duration::from_secs(60);
/// Time from a rejected operation to the next full pass. It doubles up to the second value.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(30);
/// Maximum number of repairs of one pass that are recorded one by one.
const REPAIRS_TOLD: usize = 50;
/// Changes of peers come in bursts. The loop waits for the end of a burst, but not for long.
const SETTLE: Duration = Duration::from_millis(30);

impl Node {
    /// Runs the reconcile loop forever.
    pub(super) async fn reconcile_loop(self: Rc<Self>) {
        let mut retry = RETRY_FIRST;
        let (mut last, mut was_failing) = (Instant::now(), false);
        loop {
            let failing = self.state.borrow().reconcile.is_failing();
            if failing && !was_failing {
                last = Instant::now();
            }
            was_failing = failing;
            // The interval counts from the last full pass, no matter how many quick passes there were since.
            let next = last + if failing { retry } else { RESYNC };
            // Whether work or the timeout ended the wait is checked below.
            tokio::time::timeout_at(next, self.work.notified()).await.ok();
            if Instant::now() >= next {
                self.state.borrow_mut().reconcile.ask_full();
                retry = if failing { (retry * 2).min(RETRY_LAST) } else { RETRY_FIRST };
            } else if !failing {
                retry = RETRY_FIRST;
            }
            self.settle_backends(&mut self.state.borrow_mut());
            self.refresh_names();
            self.refuse_networks();
            self.look_at_fast_watchers();
            let full = self.state.borrow().reconcile.is_full_due();
            if self.state.borrow_mut().reconcile.take_rights() || full {
                self.note_isolated();
            }
            let started = Instant::now();
            if full {
                self.full_pass().await;
                last = Instant::now();
                self.measured.borrow_mut().full_pass(started.elapsed());
            } else {
                self.quick_pass().await;
                self.measured.borrow_mut().quick_pass(started.elapsed());
            }
            self.admit_again().await;
        }
    }

    /// Applies what has changed since the last pass.
    pub(super) async fn quick_pass(&self) {
        let ops = {
            let mut state = self.state.borrow_mut();
            let (cluster, mut subsystems) = state.parts();
            subsystems::plan(&mut subsystems, &cluster)
        };
        if !ops.is_empty() {
            tracing::debug!(operations = ops.len(), "quick pass");
            let outcomes = self.kernel.apply(ops).await;
            self.note_outcomes(&outcomes, None);
        }
        self.tell_announced();
    }

    /// Compares the desired data plane with a dump of the kernel and repairs the differences.
    pub(super) async fn full_pass(&self) {
        let (drift, desired, prune, ignored, expected) = {
            let mut state = self.state.borrow_mut();
            let drift = state.reconcile.begin_full();
            let prune = state.phase.is_caught_up();
            let (cluster, mut subsystems) = state.parts();
            let desired = subsystems::resync(&mut subsystems, &cluster);
            (drift, desired, prune, state.endpoints.reserved_devices().clone(), expected(&state))
        };
        let pass = match self.kernel.reconcile(Goal { desired, prune, ignored, expected, apply: true }).await
        {
            Ok(pass) => pass,
            Err(error) => {
                let sentence = format!("the kernel's state cannot be read: {error}");
                let mut state = self.state.borrow_mut();
                state.problems.set(Code::KernelDump, "", Some(sentence.clone()));
                state.reconcile.fail("dump".to_owned(), sentence);
                return;
            }
        };
        {
            let mut state = self.state.borrow_mut();
            state.problems.set(Code::KernelDump, "", None);
            let kinds = pass.outcomes.iter().map(|outcome| outcome.op.kind());
            state.reconcile.end_full(kinds.filter(|_| drift));
        }
        if drift {
            self.tell_repairs(&pass.outcomes);
            self.state.borrow_mut().admitted.note_drift();
        }
        self.note_batch(&pass.outcomes, None, true);
        self.tell_announced();
        self.lost(pass.lost);
        let afterwards = subsystems::afterwards(&mut self.state.borrow_mut().subsystems.all());
        if !afterwards.is_empty() {
            let outcomes = self.kernel.apply(afterwards).await;
            self.note_outcomes(&outcomes, None);
        }
    }

    /// Records the repairs of a pass. Of many repairs, records the first ones and the number of the others.
    fn tell_repairs(&self, outcomes: &[Outcome]) {
        for Outcome { op, .. } in outcomes.iter().take(REPAIRS_TOLD) {
            self.event("kernel", &op.device().map_or_else(String::new, |d| d.to_string()), &op.to_string());
        }
        if let Some(more) = outcomes.len().checked_sub(REPAIRS_TOLD).filter(|more| *more > 0) {
            self.event("kernel", "", &format!("{more} more repairs"));
        }
    }

    /// Passes the outcomes of operations to subsystems, counts them and keeps the rejected ones. Returns the
    /// first error that makes an attach of this device to this network fail.
    pub(super) fn note_outcomes(
        &self,
        outcomes: &[Outcome],
        attached: Option<(NetworkId, Device)>,
    ) -> Option<String> {
        self.note_batch(outcomes, attached, false)
    }

    fn note_batch(
        &self,
        outcomes: &[Outcome],
        attached: Option<(NetworkId, Device)>,
        full: bool,
    ) -> Option<String> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.reconcile.count(outcomes.len());
        super::multicast::note_outcomes(state, outcomes);
        state.admitted.note_outcomes(outcomes);
        let refusals: Vec<Option<String>> =
            outcomes.iter().map(|outcome| outcome.result.as_ref().err().map(ToString::to_string)).collect();
        let told = outcomes
            .iter()
            .zip(&refusals)
            .map(|(outcome, refusal)| subsystems::Outcome { op: &outcome.op, refusal: refusal.as_deref() });
        subsystems::outcomes(&mut state.subsystems.all(), told, full);
        let mut first = None;
        for (Outcome { op, .. }, error) in outcomes.iter().zip(refusals) {
            let Some(error) = error else { continue };
            tracing::warn!(%op, error, "the kernel refused");
            let concerned = attached.is_some_and(|(network, device)| {
                op.device() == Some(device) || op.breaks_network() == Some(network)
            });
            // The loop runs a full pass again as long as an operation is rejected.
            state.reconcile.fail(op.to_string(), format!("{op}: {error}"));
            if concerned && first.is_none() {
                first = Some(error);
            }
            self.work.notify_one();
        }
        first.or_else(|| subsystems::refusal(&state.subsystems.all(), attached?.0).map(str::to_owned))
    }

    /// Handles an event of the kernel.
    pub(super) fn on_kernel(self: &Rc<Self>, event: KernelEvent) {
        match event {
            KernelEvent::EndpointGone(device) => self.lost([device]),
            KernelEvent::PeerChanged(device) => self.look_inside(device),
            KernelEvent::Groups => self.read_groups(),
            KernelEvent::Changed | KernelEvent::FilterChanged => self.look_soon(),
            KernelEvent::Overrun => {
                self.ranges.notify_one();
                self.look_soon();
            }
            KernelEvent::Underlay => {
                self.underlay.notify_one();
                self.ranges.notify_one();
                // When a link goes down, the kernel deletes the routes through it without a notification.
                let direct =
                    |network: &Network| network.mode == Mode::L3 && network.backend != Backend::Vxlan;
                let routes = self.state.borrow().view.networks.values().any(|found| direct(&found.network));
                if routes {
                    self.look_soon();
                }
            }
        }
    }

    /// Schedules a full pass, because another program may have changed an object of ovl.
    fn look_soon(self: &Rc<Self>) {
        if !self.state.borrow_mut().reconcile.ask_for_drift() {
            return;
        }
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(SETTLE).await;
            node.work.notify_one();
        });
    }

    /// Returns the desired data plane.
    pub(super) fn desired(&self) -> Dataplane {
        let mut state = self.state.borrow_mut();
        let (cluster, subsystems) = state.parts();
        subsystems::desired(&subsystems, &cluster)
    }

    /// Returns the operations that a full pass would apply now, and the host interfaces of endpoints that are
    /// missing.
    pub(super) async fn compare(&self) -> Result<(Vec<Op>, Vec<Device>), super::Failed> {
        let desired = self.desired();
        let (ignored, expected) = {
            let state = self.state.borrow();
            (state.endpoints.reserved_devices().clone(), expected(&state))
        };
        let pass = self
            .kernel
            .reconcile(Goal { desired, prune: true, ignored, expected, apply: false })
            .await
            .map_err(super::Failed::from)?;
        Ok((pass.outcomes.into_iter().map(|outcome| outcome.op).collect(), pass.lost))
    }
}

/// Returns the neighbour entries that attaches in flight have set or are about to set.
fn expected(state: &State) -> BTreeSet<(Device, IpAddr)> {
    state.addresses.reserved().map(|(network, address)| (Device::bridge(network), address)).collect()
}
