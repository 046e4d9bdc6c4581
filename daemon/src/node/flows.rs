//! Requests about flows: reads what the kernel counted, as long as somebody asks. [`crate::flows`] renders it.

use std::rc::Rc;

use ovl_control::Flows;
use ovl_kernel::{FlowTick, FlowWatch, flows_now};
use tokio::sync::mpsc;

use super::{Failed, Node};
use crate::failed::blocking;
use crate::flows::{DropsSeen, render, shown_prefixes};

impl Node {
    /// Answers [`ovl_control::Request::Flows`]: the connections that are tracked now, and those that were refused recently.
    pub(super) async fn flows(&self) -> Result<Flows, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("connections are not tracked here"));
        }
        let networks = self.shown_prefixes();
        let flows = blocking(move || flows_now(&networks)).await?;
        let drops = self.policy_drops().await?;
        Ok(self.rendered(&FlowTick { flows, incomplete: false }, drops))
    }

    /// Follows flows: once a second what was seen in it, until the receiver is dropped.
    pub(super) async fn follow_flows(self: &Rc<Self>) -> Result<mpsc::Receiver<Flows>, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("connections are not tracked here"));
        }
        let slot = self.state.borrow().flow_followers.take();
        let slot = slot
            .ok_or_else(|| Failed::unavailable("too many follow the flows of this host: end one of them"))?;
        let networks = self.shown_prefixes();
        let (tick, mut ticks) = mpsc::channel(1);
        let watch = blocking(move || FlowWatch::start(networks, tick)).await?;
        let mut seen = DropsSeen::default();
        // What was refused before is not new.
        seen.new_of(self.policy_drops().await?);
        let (tell, told) = mpsc::channel(1);
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _slot = slot;
            let _watch = watch;
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

    fn shown_prefixes(&self) -> Vec<ipnet::IpNet> {
        let view = &self.state.borrow().view;
        shown_prefixes(view, &self.config.ranges.of_services(view))
    }

    fn rendered(&self, tick: &FlowTick, drops: Vec<ovl_control::PolicyDrop>) -> Flows {
        let (flows, is_cut) = render(&self.state.borrow().view, &tick.flows, drops);
        Flows {
            host: self.config.node.clone(),
            time_ms: self.environment.wall_ms(),
            flows,
            incomplete: tick.incomplete || is_cut,
        }
    }
}
