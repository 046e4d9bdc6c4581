//! Requests about flows: reads what the kernel counted, as long as a client asks, and asks other hosts for theirs.
//! [`crate::flows`] renders it.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::{Flows, FlowsOf, Reply};
use ovl_kernel::{FlowTick, FlowWatch, flows_now};
use ovl_proto::id::NodeId;
use ovl_proto::sync::Message;
use tokio::sync::mpsc;

use super::asking::Topic;
use super::{Failed, Node};
use crate::failed::blocking;
use crate::flows::{DropsSeen, MOST_FLOWS, cut, decode, encode, render, shown_prefixes};
use crate::trace::question;

/// Time for the answers of other hosts, which list what the kernel tracks.
const WITHIN: Duration = Duration::from_secs(4);
/// How long another host may say nothing, or leave what it was sent. It says something each second.
const SILENT: Duration = Duration::from_secs(5);
/// Time until a host is asked again that did not answer, and until new members are followed.
const AGAIN: Duration = Duration::from_secs(5);
/// The most hosts that are followed for a client.
const MOST_HOSTS: usize = 64;
/// Why there is nothing of a host.
const NOT_CONNECTED: &str = "its ovld is not connected";
const NO_ANSWER: &str = "its ovld does not answer, or has a release without flows of other hosts";

fn nothing_of(host: String, why: impl Into<String>) -> Flows {
    Flows { host, error: Some(why.into()), ..Flows::default() }
}

impl Node {
    /// Answers [`ovl_control::Request::Flows`] without `follow`.
    pub(super) async fn flows_of(&self, of: FlowsOf) -> Result<Reply, Failed> {
        match of {
            FlowsOf::Here => Ok(Reply::Flows(Box::new(self.flows().await?))),
            FlowsOf::Host(name) => {
                let host = self.member_named(&name)?;
                if host == self.state.borrow().view.me {
                    return Ok(Reply::Flows(Box::new(self.flows().await?)));
                }
                let (answers, _) = self.ask::<Flows>(vec![host], Topic::Flows, WITHIN).await;
                match answers.into_iter().next() {
                    Some((host, Flows { error: None, flows, time_ms, incomplete, .. })) => {
                        Ok(Reply::Flows(Box::new(Flows { host, time_ms, flows, incomplete, error: None })))
                    }
                    Some((_, Flows { error: Some(why), .. })) => {
                        Err(Failed::unavailable(format!("{name}: {why}")))
                    }
                    None => Err(Failed::unavailable(format!("{name}: {NO_ANSWER}"))),
                }
            }
            FlowsOf::All => {
                let others = self.ask_members::<Flows>(Topic::Flows, WITHIN);
                let (own, (answers, unanswered)) = tokio::join!(self.flows_or_error(), others);
                // What a host says is shown under the name that its record has.
                let others = answers.into_iter().map(|(host, flows)| Flows { host, ..flows });
                let silent = unanswered.into_iter().map(|host| nothing_of(host, NO_ANSWER));
                Ok(Reply::HostFlows(std::iter::once(own).chain(others).chain(silent).collect()))
            }
        }
    }

    fn member_named(&self, name: &str) -> Result<NodeId, Failed> {
        let state = self.state.borrow();
        let host = question::host(&state.view, name).map(|node| node.record.id);
        host.filter(|id| *id == state.view.me || state.view.alloc.members.contains(id))
            .ok_or_else(|| Failed::not_found(format!("there is no member {name}: `ovlctl peers` lists them")))
    }

    /// Returns the connections that are tracked now on this host, and those that were refused recently.
    async fn flows(&self) -> Result<Flows, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("connections are not tracked here"));
        }
        let networks = self.shown_prefixes();
        let flows = blocking(move || flows_now(&networks)).await?;
        let drops = self.policy_drops().await?;
        Ok(self.rendered(&FlowTick { flows, incomplete: false }, drops))
    }

    /// The same, or why there are none.
    pub(super) async fn flows_or_error(&self) -> Flows {
        let flows = self.flows().await;
        flows.unwrap_or_else(|Failed(failure)| nothing_of(self.config.node.clone(), failure.message))
    }

    /// Follows flows: about once a second what was seen on each host, at most `most` flows, until the receiver is dropped. A
    /// host that does not answer is named once, and asked again every few seconds.
    pub(super) async fn follow_flows(
        self: &Rc<Self>,
        of: FlowsOf,
        most: usize,
    ) -> Result<mpsc::Receiver<Flows>, Failed> {
        let me = self.state.borrow().view.me;
        let host = match of {
            FlowsOf::Here => me,
            FlowsOf::Host(name) => self.member_named(&name)?,
            FlowsOf::All => return self.follow_all(most).await,
        };
        if host == me {
            return self.follow_here().await;
        }
        let (tell, told) = mpsc::channel(1);
        self.spawn_follow_there(host, most, &tell);
        Ok(told)
    }

    /// Follows the flows of all members, also of those that are admitted later.
    async fn follow_all(self: &Rc<Self>, most: usize) -> Result<mpsc::Receiver<Flows>, Failed> {
        let mut own = self.follow_here().await?;
        let (tell, told) = mpsc::channel(1);
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let mut followed = BTreeSet::new();
            let mut ticks = tokio::time::interval(AGAIN);
            loop {
                tokio::select! {
                    () = tell.closed() => return,
                    _ = ticks.tick() => {
                        for host in node.askable_members() {
                            if followed.len() < MOST_HOSTS && followed.insert(host) {
                                node.spawn_follow_there(host, most, &tell);
                            }
                        }
                    }
                    seen = own.recv() => {
                        let Some(mut seen) = seen else { return };
                        cut(&mut seen, most);
                        if tell.send(seen).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(told)
    }

    /// Follows the flows of this host.
    async fn follow_here(self: &Rc<Self>) -> Result<mpsc::Receiver<Flows>, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("connections are not tracked here"));
        }
        let slot = self.state.borrow().flow_followers.begin();
        let slot = slot
            .ok_or_else(|| Failed::unavailable("too many follow the flows of this host: end one of them"))?;
        let networks = self.shown_prefixes();
        let (tick, mut ticks) = mpsc::channel(1);
        // Connection tracking is in the stack.
        let pause = self.pause_fast_path().await;
        let watch = blocking(move || FlowWatch::start(networks, tick)).await?;
        let mut seen = DropsSeen::default();
        // What was refused before is not new.
        seen.new_of(self.policy_drops().await?);
        let (tell, told) = mpsc::channel(1);
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _slot = slot;
            let _watch = watch;
            let _pause = pause;
            loop {
                let tick = tokio::select! {
                    tick = ticks.recv() => tick,
                    () = tell.closed() => return,
                };
                let Some(tick) = tick else { return };
                let drops = match node.policy_drops().await {
                    Ok(drops) => seen.new_of(drops),
                    Err(failed) => {
                        tracing::warn!(error = failed.0.message, "cannot read what policies dropped");
                        Vec::new()
                    }
                };
                let flows = node.rendered(&tick, drops);
                if tell.send(flows).await.is_err() {
                    return;
                }
            }
        });
        Ok(told)
    }

    fn spawn_follow_there(self: &Rc<Self>, host: NodeId, most: usize, tell: &mpsc::Sender<Flows>) {
        let (node, tell) = (Rc::clone(self), tell.clone());
        tokio::task::spawn_local(async move {
            let mut was_told = false;
            while let Some(why) = node.follow_there(host, most, &tell, &mut was_told).await {
                let name = node.state.borrow().view.name_of(host);
                if !was_told && tell.send(nothing_of(name, why)).await.is_err() {
                    return;
                }
                was_told = true;
                tokio::select! {
                    () = tell.closed() => return,
                    () = tokio::time::sleep(AGAIN) => {}
                }
            }
        });
    }

    /// Asks another host for its flows, and passes on what it has. Returns why it ended, or `None` if the receiver is gone.
    /// Notes when the host answers.
    async fn follow_there(
        &self,
        host: NodeId,
        most: usize,
        tell: &mpsc::Sender<Flows>,
        was_told: &mut bool,
    ) -> Option<String> {
        let (id, mut seconds) = self.state.borrow_mut().flow_followers.ask(host);
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        let is_sent = self.links().send(host, &Message::FlowsFollow { id, most });
        let ended = loop {
            if !is_sent {
                break Some(NOT_CONNECTED.to_owned());
            }
            let second = tokio::select! {
                second = tokio::time::timeout(SILENT, seconds.recv()) => second,
                () = tell.closed() => break None,
            };
            match second {
                Ok(Some(Flows { error: Some(why), .. })) => break Some(why),
                Ok(Some(flows)) => {
                    *was_told = false;
                    let name = self.state.borrow().view.name_of(host);
                    if tell.send(Flows { host: name, ..flows }).await.is_err() {
                        break None;
                    }
                    self.links().send(host, &Message::FlowsTaken { id });
                }
                _ => break Some(NO_ANSWER.to_owned()),
            }
        };
        self.state.borrow_mut().flow_followers.give_up(id);
        self.links().send(host, &Message::FlowsStop { id });
        ended
    }

    /// Answers [`Message::FlowsFollow`] of a member.
    pub(super) fn take_flows_follow(self: &Rc<Self>, from: NodeId, id: u64, most: u32) {
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(Failed(failure)) = node.follow_for(from, id, most).await {
                node.send_second(from, id, nothing_of(node.config.node.clone(), failure.message));
            }
            node.state.borrow_mut().flow_followers.stop(from, id);
        });
    }

    /// Follows the flows of this host for another one, until that one stops or takes nothing.
    async fn follow_for(self: &Rc<Self>, by: NodeId, id: u64, most: u32) -> Result<(), Failed> {
        let most = usize::try_from(most).unwrap_or(MOST_FLOWS);
        let mut seconds = self.follow_here().await?;
        let mut taken = self.state.borrow_mut().flow_followers.keep(by, id);
        loop {
            let second = tokio::select! {
                second = seconds.recv() => second,
                taken = taken.recv() => match taken {
                    Some(()) => continue,
                    None => return Ok(()),
                },
            };
            let Some(mut flows) = second else { return Ok(()) };
            cut(&mut flows, most);
            if !self.send_second(by, id, flows) {
                return Ok(());
            }
            // Meanwhile what is seen here is summed up, so that nothing piles up for a host that is slow or gone.
            match tokio::time::timeout(SILENT, taken.recv()).await {
                Ok(Some(())) => {}
                _ => return Ok(()),
            }
        }
    }

    fn send_second(&self, to: NodeId, id: u64, flows: Flows) -> bool {
        let Ok(flows) = encode(flows) else { return false };
        self.links().send(to, &Message::FlowsSecond { id, flows })
    }

    /// Takes what another host saw.
    pub(super) fn take_flows_second(&self, from: NodeId, id: u64, flows: &str) {
        let is_wanted =
            decode(flows).is_some_and(|flows| self.state.borrow_mut().flow_followers.second(from, id, flows));
        if !is_wanted {
            self.links().send(from, &Message::FlowsStop { id });
        }
    }

    fn shown_prefixes(&self) -> Vec<ipnet::IpNet> {
        let view = &self.state.borrow().view;
        shown_prefixes(view, &self.config.ranges.of_services(view))
    }

    fn rendered(&self, tick: &FlowTick, drops: Vec<ovl_control::PolicyDrop>) -> Flows {
        let state = self.state.borrow();
        let (flows, is_cut) = render(&state.view, state.admitted_now(), &tick.flows, drops);
        Flows {
            host: self.config.node.clone(),
            time_ms: self.environment.wall_ms(),
            flows,
            incomplete: tick.incomplete || is_cut,
            error: None,
        }
    }
}
