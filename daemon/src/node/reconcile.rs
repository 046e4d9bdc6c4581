//! The reconcile loop. Events mark what may have changed; this loop works out what the kernel
//! should hold, and sends it the difference.
//!
//! Two kinds of pass. A *quick* one compares with what was last sent to the kernel, for the
//! networks that changed, and costs what the change costs. A *whole* one compares with a dump: at
//! the start, when somebody else has touched our objects, after a refusal, and from time to time.
//! The kernel's worker does everything in the order in which it was handed in, so a whole pass
//! compares with the very state that all earlier work left.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_core::desired;
use ovl_core::device::Device;
use ovl_core::diff::diff;
use ovl_core::kernel::Kernel;
use ovl_core::op::{AnnouncedOp, LinkOp, Op};
use ovl_core::policy;
use ovl_core::touched;
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Backend, Mode, Network};

use tokio::time::Instant;

use super::state::State;
use super::{Node, ingress};
use crate::kernel::{Goal, KernelEvent, Outcome};

/// A whole pass is made at the latest after this time, whatever happened.
const RESYNC: Duration = Duration::from_secs(60);
/// After a refusal the next whole pass comes after this time, then later and later.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(30);
/// Of one pass, so many repairs are told one by one.
const REPAIRS_TOLD: usize = 50;
/// Others' changes come in bursts: wait for the end of one, but not for long.
const SETTLE: Duration = Duration::from_millis(30);

impl Node {
    /// Runs for ever.
    pub(super) async fn reconcile_loop(self: Rc<Self>) {
        let mut retry = RETRY_FIRST;
        let (mut last, mut was_failing) = (Instant::now(), false);
        loop {
            let failing = !self.state.borrow().failing.is_empty();
            if failing && !was_failing {
                last = Instant::now();
            }
            was_failing = failing;
            // Counted from the last whole pass, however often there was something small to do since.
            let next = last + if failing { retry } else { RESYNC };
            // Whether it was work or time that woke us is seen below.
            tokio::time::timeout_at(next, self.work.notified()).await.ok();
            if Instant::now() >= next {
                self.state.borrow_mut().dirty.full = true;
                retry = if failing { (retry * 2).min(RETRY_LAST) } else { RETRY_FIRST };
            } else if !failing {
                retry = RETRY_FIRST;
            }
            self.settle_backends(&mut self.state.borrow_mut());
            self.refresh_names();
            // Rights to addresses come and go with whole networks.
            let rights = {
                let dirty = &self.state.borrow().dirty;
                dirty.full || !dirty.networks.is_empty()
            };
            if rights {
                self.note_isolated();
            }
            if self.state.borrow().dirty.full {
                self.whole_pass().await;
                last = Instant::now();
            } else {
                self.quick_pass().await;
            }
        }
    }

    async fn quick_pass(&self) {
        let (ops, networks) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let dirty = &state.dirty;
            let networks: BTreeSet<NetworkId> =
                dirty.networks.iter().chain(dirty.touched.keys()).copied().collect();
            let ground = state.dirty.host || !networks.is_empty();
            let hosts = state.dirty.host;
            // Policies first: whom they isolate is not reached before they stand.
            let mut ops = self.plan_policies(state);
            if state.dirty.host {
                ops.extend(self.plan_host(state));
            }
            for network in &networks {
                ops.extend(self.plan_network(state, *network));
            }
            ops.extend(self.plan_services(state, ground, hosts));
            ops.extend(state.services.ended());
            (ops, networks)
        };
        if !ops.is_empty() {
            tracing::debug!(networks = networks.len(), operations = ops.len(), "quick pass");
            let outcomes = self.kernel.apply(ops).await;
            self.note_outcomes(&outcomes, None);
        }
        self.tell_announced();
    }

    /// What the endpoints of a network that were touched need beyond what was last sent, which counts
    /// as sent then. Nothing if the network must be looked at as a whole.
    pub(super) fn plan_touched(&self, state: &mut State, network: NetworkId) -> Option<Vec<Op>> {
        let prune = state.may_prune(network);
        let State { view, local, dirty, applied, .. } = state;
        if dirty.networks.contains(&network) {
            return None;
        }
        let touched = dirty.touched.remove(&network).unwrap_or_default();
        let ops = applied
            .get_mut(&network)
            .and_then(|applied| touched::plan(view, local, network, touched, applied, prune));
        if ops.is_none() {
            dirty.networks.insert(network);
        }
        ops
    }

    /// What one network needs beyond what was last sent. The plan counts as sent.
    pub(super) fn plan_network(&self, state: &mut State, network: NetworkId) -> Vec<Op> {
        if let Some(ops) = self.plan_touched(state, network) {
            return ops;
        }
        state.dirty.networks.remove(&network);
        state.dirty.touched.remove(&network);
        let desired = desired::network_part(&state.view, &state.local, network);
        let prune = state.may_prune(network);
        let applied = state.applied.entry(network).or_default();
        let ops = diff(applied, &desired, prune);
        let empty = desired == Kernel::default();
        if prune {
            *applied = desired;
        } else {
            applied.merge(desired);
        }
        if empty && prune {
            state.applied.remove(&network);
        }
        ops
    }

    /// The same for what concerns the host as a whole.
    pub(super) fn plan_host(&self, state: &mut State) -> Vec<Op> {
        state.dirty.host = false;
        let desired = desired::host(&state.view, &state.local);
        let ops = diff(&state.applied_host, &desired, state.caught_up);
        state.applied_host = desired;
        ops
    }

    /// What Services need beyond what was planned last; `ground`: networks may have changed; `hosts`: others may be
    /// alive.
    fn plan_services(&self, state: &mut State, ground: bool, hosts: bool) -> Vec<Op> {
        let State { view, backends, services, dirty, caught_up, .. } = state;
        if !*caught_up {
            return Vec::new();
        }
        let touched = std::mem::take(&mut dirty.services);
        let mut ops = services.plan(view, backends, touched.iter(), ground);
        ops.extend(ingress::plan(state, &touched, hosts));
        ops
    }

    /// Compares everything with a dump, and repairs it.
    pub(super) async fn whole_pass(&self) {
        let drift = std::mem::take(&mut self.state.borrow_mut().dirty.drift);
        let (desired, prune, ignored, expected) = self.plan_all();
        let pass = match self.kernel.reconcile(Goal { desired, prune, ignored, expected, apply: true }).await
        {
            Ok(pass) => pass,
            Err(error) => {
                let sentence = format!("the kernel's state cannot be read: {error}");
                let mut state = self.state.borrow_mut();
                state.problem("kernel", Some(sentence.clone()));
                state.failing.insert("dump".to_owned(), sentence);
                return;
            }
        };
        {
            let mut state = self.state.borrow_mut();
            state.problem("kernel", None);
            state.failing.clear();
            // Not before the pass: an attach that is under way was planned on what was refused.
            state.refused.clear();
            state.unpoliced = None;
            state.counts.passes += 1;
            if drift {
                state.counts.repairs += pass.outcomes.len() as u64;
            }
        }
        if drift {
            self.tell_repairs(&pass.outcomes);
        }
        self.note_outcomes(&pass.outcomes, None);
        self.tell_announced();
        self.lost(pass.lost);
        let ended = self.state.borrow_mut().services.ended();
        if !ended.is_empty() {
            let outcomes = self.kernel.apply(ended).await;
            self.note_outcomes(&outcomes, None);
        }
    }

    /// Each of a few repairs; of many, the first ones and how many more.
    fn tell_repairs(&self, outcomes: &[Outcome]) {
        for Outcome { op, .. } in outcomes.iter().take(REPAIRS_TOLD) {
            self.event("kernel", &op.device().map_or_else(String::new, |d| d.to_string()), &op.to_string());
        }
        if let Some(more) = outcomes.len().checked_sub(REPAIRS_TOLD).filter(|more| *more > 0) {
            self.event("kernel", "", &format!("{more} more repairs"));
        }
    }

    /// All that should be, whether things may be removed, and which devices and neighbours are being
    /// made.
    pub(super) fn plan_all(&self) -> (Kernel, bool, BTreeSet<Device>, BTreeSet<(Device, IpAddr)>) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.dirty.full = false;
        state.dirty.host = false;
        state.dirty.networks.clear();
        state.dirty.touched.clear();
        state.dirty.policies = false;
        state.dirty.policed.clear();
        state.local.publishing = state.publishes();
        state.local.served = state.view.has_services();
        state.applied.clear();
        state.applied_host = desired::host(&state.view, &state.local);
        let mut all = state.applied_host.clone();
        all.merge(state.policy.anew(&state.view, &state.local, state.caught_up));
        self.plan_services(state, true, true);
        all.merge(state.services.kernel());
        all.merge(state.ingress.kernel());
        let networks: Vec<NetworkId> = state.view.networks.keys().copied().collect();
        for network in networks {
            let part = desired::network_part(&state.view, &state.local, network);
            if part != Kernel::default() {
                all.merge(part.clone());
                state.applied.insert(network, part);
            }
        }
        (all, state.caught_up, state.pending.devices.clone(), expected(state))
    }

    /// Counts operations and keeps those that were refused; says the first refusal that an attach of
    /// this device to this network cannot do without.
    pub(super) fn note_outcomes(
        &self,
        outcomes: &[Outcome],
        attached: Option<(NetworkId, Device)>,
    ) -> Option<String> {
        let mut state = self.state.borrow_mut();
        state.counts.operations += outcomes.len() as u64;
        let mut first = None;
        // The first reason stands until all of a network's devices were made in one go. What was planned while
        // they were still being made has less in it, and says nothing about them.
        let networks = |refused: bool, counts: fn(&Op) -> bool| {
            let outcomes = outcomes.iter().filter(|outcome| outcome.result.is_err() == refused);
            let ops = outcomes.map(|outcome| &outcome.op).filter(|op| counts(op));
            ops.filter_map(Op::breaks_network).collect::<BTreeSet<NetworkId>>()
        };
        let made = networks(false, |op| matches!(op, Op::Link(LinkOp::Add(..))));
        for network in made.difference(&networks(true, |_| true)) {
            state.refused.remove(network);
        }
        for outcome in outcomes {
            if let Op::Announced(AnnouncedOp::Add(_, address)) = outcome.op {
                state.ingress.note(address, outcome.result.is_ok());
            }
            let Err(error) = &outcome.result else { continue };
            let op = outcome.op.to_string();
            tracing::warn!(%op, %error, "the kernel refused");
            if let Some(network) = outcome.op.breaks_network() {
                // An attach must not believe that the network stands: neither one that comes next,
                // nor one that was planned while these operations were under way.
                state.applied.remove(&network);
                state.refused.entry(network).or_insert_with(|| error.to_string());
            }
            if outcome.op.is_policy() {
                state.unpoliced.get_or_insert_with(|| error.to_string());
            }
            let concerned = attached.is_some_and(|(network, device)| {
                outcome.op.device() == Some(device) || outcome.op.breaks_network() == Some(network)
            });
            if concerned && first.is_none() {
                first = Some(error.to_string());
            }
            // The loop comes back with a whole pass as long as anything is failing.
            state.failing.insert(op.clone(), format!("{op}: {error}"));
            self.work.notify_one();
        }
        first.or_else(|| state.refused.get(&attached?.0).or(state.unpoliced.as_ref()).cloned())
    }

    /// One event of the kernel.
    pub(super) fn on_kernel(self: &Rc<Self>, event: KernelEvent) {
        match event {
            KernelEvent::EndpointGone(device) => self.lost([device]),
            KernelEvent::Changed | KernelEvent::Overrun | KernelEvent::FilterChanged => self.look_soon(),
            KernelEvent::Underlay => {
                self.underlay.notify_one();
                // With a link that goes down the kernel drops the routes by it, and says nothing.
                let direct =
                    |network: &Network| network.mode == Mode::L3 && network.backend != Backend::Vxlan;
                let routes = self.state.borrow().view.networks.values().any(|found| direct(&found.network));
                if routes {
                    self.look_soon();
                }
            }
        }
    }

    /// Somebody may have changed what is ours.
    fn look_soon(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        state.dirty.drift = true;
        if state.dirty.full {
            return;
        }
        state.dirty.full = true;
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(SETTLE).await;
            node.work.notify_one();
        });
    }

    /// What the loop would do now, and endpoints whose host's ends are missing.
    pub(super) async fn compare(&self) -> Result<(Vec<Op>, Vec<Device>), super::Failed> {
        let (desired, ignored, expected) = {
            let state = self.state.borrow();
            let mut desired = desired::desired(&state.view, &state.local);
            desired.merge(policy::part(&state.view, &state.local, state.policy.generation()));
            desired.merge(state.services.kernel());
            desired.merge(state.ingress.kernel());
            (desired, state.pending.devices.clone(), expected(&state))
        };
        let pass = self
            .kernel
            .reconcile(Goal { desired, prune: true, ignored, expected, apply: false })
            .await
            .map_err(super::Failed::from)?;
        Ok((pass.outcomes.into_iter().map(|outcome| outcome.op).collect(), pass.lost))
    }
}

/// The neighbours that attaches under way have set or are about to.
fn expected(state: &State) -> BTreeSet<(Device, IpAddr)> {
    let pending = &state.pending.addresses;
    pending.iter().map(|(network, address)| (Device::bridge(*network), *address)).collect()
}
