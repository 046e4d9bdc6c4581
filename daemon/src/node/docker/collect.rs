//! What Docker Engines leave behind: calls that came while ovld was not running, and reservations, interfaces and
//! networks that they no longer use.

use std::rc::Rc;

use nix::net::if_::if_nametoindex;
use ovl_control::{DockerCall, DockerDeleted};
use ovl_dataplane::device::Device;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_runtimes::docker;

use super::super::{Node, remove_if_there};
use super::is_unused;

impl Node {
    /// Carries out the stored calls, which came while ovld was not running. One that fails is kept for the next time.
    pub(in crate::node) async fn carry_out_docker(&self) {
        let calls = match DockerDeleted::all(&self.run_dir.socket()) {
            Ok(calls) => calls,
            Err(error) => {
                tracing::warn!(%error, "cannot look for calls of Docker Engines that were kept");
                return;
            }
        };
        for (path, call) in calls {
            let done = match call {
                Ok(call) => self.carry_out_kept(&call).await,
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "passed over a call of a Docker Engine that was kept");
                    true
                }
            };
            if done && let Err(error) = remove_if_there(&path) {
                tracing::warn!("{error:#}");
            }
        }
    }

    /// Carries out one stored call. Returns whether it succeeded.
    async fn carry_out_kept(&self, call: &DockerCall) -> bool {
        match self.docker(call).await {
            Ok(answer) => {
                tracing::info!(call = call.method, %answer, "carried out a call of a Docker Engine that was kept");
                true
            }
            Err(failed) => {
                tracing::warn!(call = call.method, error = failed.0.message, "a call that was kept fails");
                false
            }
        }
    }

    /// Releases what an Engine requested but did not use, and deletes what it left behind. To be called periodically.
    pub(in crate::node) fn collect_docker(self: &Rc<Self>) {
        let stale: Vec<EndpointId> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            for (network, address) in state.engines.take_stale(now) {
                state.addresses.release(network, address);
            }
            let here = |id: &EndpointId| {
                if_nametoindex(docker::waiting_name(Device::endpoint(*id).as_str()).as_str()).is_ok()
            };
            let ours = state.endpoints.iter().filter(|(_, local)| local.docker.is_some());
            state.engines.unfetched(ours.map(|(id, _)| id).filter(here), now)
        };
        self.collect_networks();
        if stale.is_empty() {
            return;
        }
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(failed) = node.take_away(&stale).await {
                tracing::warn!(error = failed.0.message, "cannot take away what a Docker Engine left");
            }
        });
    }

    /// Removes unused networks that were created for Engines. This is needed if the host of the last Engine is gone,
    /// or if that host did not know which others hold the network.
    fn collect_networks(&self) {
        let old: Vec<NetworkId> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            if !state.phase.is_caught_up() || !state.is_coordinator() {
                return;
            }
            let now = state.now();
            let unused = state.view.networks.iter().filter(|(_, found)| is_unused(state, found));
            let unused: Vec<NetworkId> = unused.map(|(id, _)| *id).collect();
            state.engines.unused(unused.into_iter(), now)
        };
        for network in old {
            if let Err(failed) = self.remove_unused(network) {
                tracing::warn!(error = failed.0.message, "cannot remove a network that no Engine has");
            }
        }
    }
}
