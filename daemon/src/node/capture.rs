//! Captures of packets: starts those of this host, asks other hosts for theirs, and passes on what they have.
//! [`crate::capture`] decides which devices and packets are meant.

use std::rc::Rc;
use std::time::Duration;

use ovl_control::{CapturePlan, CaptureRequest, CaptureTarget, CapturedFrom};
use ovl_kernel::{Capture, CaptureSpec, Captured, DroppedBy, DroppedPacket, devices_with, wall_ns};
use ovl_proto::capture::{CaptureBatch, CapturePoint, CapturedDrop, MAX_MESSAGE};
use ovl_proto::id::NodeId;
use ovl_proto::sync::Message;
use ovl_subsystems::policy::protocol_of;
use tokio::sync::mpsc;

use super::fast_path::FastPause;
use super::{Failed, Node};
use crate::capture::{Plan, check, offset};
use crate::failed::blocking;
use crate::policy;
use crate::trace::question::HOST;

/// How often a host is asked for its time, and how long it has to answer.
const TIMES: usize = 4;
const TIME_WITHIN: Duration = Duration::from_millis(500);
/// How long another host may say nothing. It sends something every tenth of a second.
const SILENT: Duration = Duration::from_secs(5);

/// A capture of this host and what it says.
struct Started {
    capture: Capture,
    batches: mpsc::UnboundedReceiver<Captured>,
    /// The first batch, which names the points.
    first: CaptureBatch,
    /// Packets are captured in the stack.
    _pause: FastPause,
}

impl Node {
    /// Answers [`ovl_control::Request::CapturePlan`].
    pub(super) fn capture_plan(&self, mut target: CaptureTarget) -> Result<CapturePlan, Failed> {
        self.name_this_host(&mut target);
        Ok(self.plan_of(&target)?.shown(&self.state.borrow().view))
    }

    fn plan_of(&self, target: &CaptureTarget) -> Result<Plan, Failed> {
        let state = self.state.borrow();
        Plan::of(&state.view, state.workloads.backends(), target)
    }

    /// Replaces the word for this host, which means another one elsewhere.
    fn name_this_host(&self, target: &mut CaptureTarget) {
        let own = self.state.borrow().record().map(|record| record.vtep.to_string());
        let replace = |text: &mut String| {
            if let (HOST, Some(own)) = (text.as_str(), &own) {
                text.clone_from(own);
            }
        };
        match target {
            CaptureTarget::Pair { hosts } => hosts.iter_mut().for_each(replace),
            CaptureTarget::Flow { from, to, .. } => [from, to].into_iter().for_each(replace),
            _ => {}
        }
    }

    /// Answers [`ovl_control::Request::Capture`]. What was captured ends when all hosts have ended, and all hosts end when the
    /// receiver is dropped.
    pub(super) async fn capture(
        self: &Rc<Self>,
        mut request: CaptureRequest,
    ) -> Result<mpsc::Receiver<CapturedFrom>, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("packets are not captured here"));
        }
        check(&request)?;
        self.name_this_host(&mut request.target);
        let plan = self.plan_of(&request.target)?;
        let slot = self.state.borrow().captures.begin();
        let slot =
            slot.ok_or_else(|| Failed::unavailable("too many captures run on this host: end one of them"))?;
        // Free again once all hosts have ended.
        let slot = Rc::new(slot);
        let me = self.state.borrow().view.me;
        let (tell, told) = mpsc::channel(1);
        for host in plan.hosts.iter().copied().filter(|host| *host != me) {
            let (node, tell, slot) = (Rc::clone(self), tell.clone(), Rc::clone(&slot));
            let request = request.clone();
            tokio::task::spawn_local(async move {
                node.capture_there(host, &request, &tell).await;
                drop(slot);
            });
        }
        if plan.hosts.contains(&me) {
            let started = self.start_capture(&request, &plan).await?;
            let node = Rc::clone(self);
            tokio::task::spawn_local(async move {
                node.capture_here(started, &tell).await;
                drop(slot);
            });
        }
        Ok(told)
    }

    async fn start_capture(
        self: &Rc<Self>,
        request: &CaptureRequest,
        plan: &Plan,
    ) -> Result<Started, Failed> {
        let vtep = self.state.borrow().record().map(|record| record.vtep);
        let underlay = match vtep {
            Some(vtep) => blocking(move || devices_with(&[vtep])).await?.remove(&vtep),
            None => None,
        };
        let (devices, too_many) = plan.devices(&self.state.borrow().view, underlay.as_deref());
        let (batches_tell, batches) = mpsc::unbounded_channel();
        let spec = CaptureSpec {
            devices: devices.iter().map(|(kind, _, device)| (*kind, device.clone())).collect(),
            programs: request.programs.clone(),
            snaplen: request.snaplen,
            watched: plan.watched.clone(),
            namespaces: self.state.borrow().endpoints.iter().map(|(_, local)| local.inode).collect(),
            lasts: Duration::from_secs(request.seconds.into()),
        };
        let pause = self.pause_fast_path().await;
        let mut capture = blocking(move || Capture::start(spec, batches_tell)).await?;
        let links = std::mem::take(&mut capture.links);
        let points = devices.into_iter().zip(links).map(|((kind, name, device), link)| CapturePoint {
            kind,
            name,
            device,
            // The number of a point is its place in the list, so one that is not captured is listed too.
            link: link.unwrap_or(ovl_proto::capture::LinkType::Ethernet),
        });
        let mut notes = std::mem::take(&mut capture.notes);
        if too_many > 0 {
            notes.push(format!("{too_many} interfaces are too many and not captured"));
        }
        let first = CaptureBatch { points: points.collect(), notes, ..CaptureBatch::default() };
        Ok(Started { capture, batches, first, _pause: pause })
    }

    /// Passes on what is captured here until it ends.
    async fn capture_here(&self, started: Started, tell: &mpsc::Sender<CapturedFrom>) {
        let Started { capture, mut batches, first, _pause } = started;
        let host = self.config.node.clone();
        let from = |batch| CapturedFrom { host: host.clone(), offset_ns: 0, batch };
        if tell.send(from(first)).await.is_err() {
            return;
        }
        loop {
            let captured = tokio::select! {
                captured = batches.recv() => captured,
                () = tell.closed() => return,
            };
            let Some(captured) = captured else { return };
            if tell.send(from(self.batch_of(captured))).await.is_err() {
                return;
            }
            capture.take(1);
        }
    }

    /// Asks another host to capture, and passes on what it has until it ends.
    async fn capture_there(&self, host: NodeId, request: &CaptureRequest, tell: &mpsc::Sender<CapturedFrom>) {
        let name = self.state.borrow().view.name_of(host);
        let offset_ns = self.offset_of(host).await;
        let from = |batch| CapturedFrom { host: name.clone(), offset_ns, batch };
        let end = |why: &str| CaptureBatch {
            until_ns: u64::MAX,
            ended: Some(why.to_owned()),
            ..CaptureBatch::default()
        };
        let Ok(ask) = serde_json::to_string(request) else { return };
        let (id, mut batches) = self.state.borrow_mut().captures.ask(host);
        let sent = ask.len() <= MAX_MESSAGE && self.links().send(host, &Message::CaptureStart { id, ask });
        let mut reason = match sent {
            true => None,
            false => Some("its ovld is not connected"),
        };
        while reason.is_none() {
            let batch = tokio::select! {
                batch = tokio::time::timeout(SILENT, batches.recv()) => batch,
                () = tell.closed() => break,
            };
            let Ok(Some(batch)) = batch else {
                reason = Some("its ovld does not answer, or has a release without captures");
                break;
            };
            let is_last = batch.ended.is_some();
            if tell.send(from(batch)).await.is_err() || is_last {
                break;
            }
            self.links().send(host, &Message::CaptureTaken { id, batches: 1 });
        }
        self.state.borrow_mut().captures.give_up(id);
        self.links().send(host, &Message::CaptureStop { id });
        if let Some(why) = reason {
            // The receiver may be gone.
            let _ = tell.send(from(end(why))).await;
        }
    }

    /// Returns what is added to another host's clock to get that of this host, in nanoseconds; 0 if it does not answer.
    async fn offset_of(&self, host: NodeId) -> i64 {
        let mut answers = Vec::new();
        for _ in 0..TIMES {
            let (id, answer) = self.state.borrow_mut().captures.times.ask(host);
            let asked = wall_ns();
            let sent = self.links().send(host, &Message::TimeRequest { id });
            let said = match sent {
                true => tokio::time::timeout(TIME_WITHIN, answer).await,
                false => {
                    self.state.borrow_mut().captures.times.give_up(id);
                    break;
                }
            };
            self.state.borrow_mut().captures.times.give_up(id);
            let Ok(Ok(said)) = said else { break };
            answers.push((asked, said, wall_ns()));
        }
        offset(&answers)
    }

    /// Answers [`Message::TimeRequest`].
    pub(super) fn send_time(&self, to: NodeId, id: u64) {
        self.links().send(to, &Message::TimeReply { id, now_ns: wall_ns() });
    }

    /// Answers [`Message::CaptureStart`] of a member.
    pub(super) fn take_capture_start(self: &Rc<Self>, from: NodeId, id: u64, ask: String) {
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(failed) = node.capture_for(from, id, &ask).await {
                let ended = Some(failed.0.message);
                node.send_batch(
                    from,
                    id,
                    &CaptureBatch { until_ns: u64::MAX, ended, ..CaptureBatch::default() },
                );
            }
            node.state.borrow_mut().captures.stop(from, id);
        });
    }

    /// Captures for another host until it ends.
    async fn capture_for(self: &Rc<Self>, by: NodeId, id: u64, ask: &str) -> Result<(), Failed> {
        if ask.len() > MAX_MESSAGE || !self.environment.owns_host() {
            return Err(Failed::unavailable("packets are not captured here"));
        }
        let request: CaptureRequest = serde_json::from_str(ask).map_err(|error| {
            Failed::invalid(format!("not a capture that this release understands: {error}"))
        })?;
        check(&request)?;
        let plan = self.plan_of(&request.target)?;
        let slot = self.state.borrow().captures.begin();
        let slot = slot.ok_or_else(|| Failed::unavailable("too many captures run there"))?;
        let Started { capture, mut batches, first, _pause } = self.start_capture(&request, &plan).await?;
        self.state.borrow_mut().captures.keep(by, id, Rc::new(capture), slot);
        let mut is_sent = self.send_batch(by, id, &first);
        while is_sent && self.state.borrow().captures.is_running(by, id) {
            // The thread ends with its capture, and says something every tenth of a second until then.
            let Some(captured) = batches.recv().await else { break };
            let batch = self.batch_of(captured);
            let is_last = batch.ended.is_some();
            is_sent = self.send_batch(by, id, &batch) && !is_last;
        }
        Ok(())
    }

    fn send_batch(&self, to: NodeId, id: u64, batch: &CaptureBatch) -> bool {
        let Ok(batch) = serde_json::to_string(batch) else { return false };
        batch.len() <= MAX_MESSAGE && self.links().send(to, &Message::CaptureBatch { id, batch })
    }

    /// Takes what another host captured.
    pub(super) fn take_capture_batch(&self, from: NodeId, id: u64, batch: &str) {
        let batch = match batch.len() <= MAX_MESSAGE {
            true => serde_json::from_str(batch).ok(),
            false => None,
        };
        let is_wanted = batch.is_some_and(|batch| self.state.borrow_mut().captures.batch(from, id, batch));
        if !is_wanted {
            self.links().send(from, &Message::CaptureStop { id });
        }
    }

    fn batch_of(&self, captured: Captured) -> CaptureBatch {
        let Captured { packets, drops, lost, until_ns, ended } = captured;
        let drops = drops.into_iter().map(|drop| CapturedDrop {
            at_ns: drop.at_ns,
            key: drop.key,
            reason: self.reason_of(&drop),
        });
        let drops = drops.collect();
        CaptureBatch { packets, drops, lost, until_ns, ended, ..CaptureBatch::default() }
    }

    /// Says what dropped a packet: of network policies, which ones.
    fn reason_of(&self, drop: &DroppedPacket) -> String {
        let DroppedPacket { key, to, by, .. } = drop;
        let host = &self.config.node;
        let by = match by {
            DroppedBy::Rule(by) => by,
            DroppedBy::Filter => {
                return format!(
                    "dropped on {host} by a packet filter whose rule is not known: it is in the namespace of the workload or in \
                     iptables' legacy tables, or the connection was open already"
                );
            }
            DroppedBy::Kernel(reason) => return format!("dropped on {host} by the kernel: {reason}"),
        };
        if by.table == ovl_dataplane::nft::Table::Policy.name() {
            let port = protocol_of(key.protocol).map(|protocol| (protocol, to.1));
            let state = self.state.borrow();
            let judged = policy::judgement(&state.view, state.admitted_now(), key.source, to.0, port);
            let refusing = [judged.egress, judged.ingress].into_iter().find(|side| !side.passes);
            if let Some(side) = refusing {
                return format!("dropped on {host} by network policy: {}", side.why);
            }
        }
        format!("dropped on {host} by {}", by.by())
    }
}
