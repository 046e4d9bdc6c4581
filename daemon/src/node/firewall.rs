//! Checks the firewalls of other programs periodically, and reports what [`crate::firewall`] finds.

use std::rc::Rc;
use std::time::Duration;

use ovl_dataplane::nft::BASE_TABLE;
use ovl_proto::object::Network;

use super::{Failed, Node};
use crate::firewall::Found;
use crate::problems::Code;
use ovl_subsystems::local::Obstacle;

/// Time between two checks.
const AGAIN: Duration = Duration::from_secs(5);

impl Node {
    /// Checks the firewalls periodically. Runs forever.
    pub(super) async fn firewall_loop(self: Rc<Self>) {
        let mut idle = false;
        loop {
            let networks = self.built_networks();
            // Without networks one check is enough, to delete a rule that the previous run may have left.
            if !(idle && networks.is_empty())
                && let Err(failed) = self.mind_firewalls(&networks).await
            {
                tracing::warn!(error = failed.0.message, "cannot look after other firewalls");
            }
            idle = networks.is_empty();
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Deletes ovld's rule in Docker's chain, for a teardown.
    pub(super) async fn close_firewalls(&self) -> Result<(), Failed> {
        self.mind_firewalls(&[]).await
    }

    /// Returns the reported problems: firewalls that drop packets of endpoints or of published ports.
    pub(super) fn firewall_problems(&self) -> Vec<String> {
        let state = self.state.borrow();
        state.problems.of(Code::Firewall).map(|(_, sentence)| sentence.to_owned()).collect()
    }

    /// Returns the networks whose devices exist on this host.
    fn built_networks(&self) -> Vec<Network> {
        let state = self.state.borrow();
        let all = state.view.networks.values().map(|found| &found.network);
        all.filter(|network| state.local.is_built(&state.view, network.id)).cloned().collect()
    }

    /// Checks the firewalls at once, so that the first container of a Docker Engine does not wait for the next check.
    pub(super) async fn mind_firewalls_now(&self) -> Result<(), Failed> {
        self.mind_firewalls(&self.built_networks()).await
    }

    /// Maintains the rule in Docker's chain for these networks, and reports firewalls that drop their packets.
    async fn mind_firewalls(&self, networks: &[Network]) -> Result<(), Failed> {
        let tell = |command: &[String]| self.event("kernel", BASE_TABLE, &command.join(" "));
        if let Some(Found { problems, kube_proxy, bypassed }) = self.firewalls.mind(networks, tell).await? {
            self.state.borrow_mut().problems.replace(Code::Firewall, problems);
            self.give_way(kube_proxy);
            self.note_obstacle(Obstacle::Rules, bypassed);
        }
        Ok(())
    }

    /// Leaves the translation of Services to a kube-proxy, or takes it over again.
    fn give_way(&self, kube_proxy: bool) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let translates = self.config.proxy.translates(kube_proxy);
        let both = (kube_proxy && translates).then(|| {
            "kube-proxy and ovl both translate the Services of this host, so each connection is translated by whichever sees \
             it first: remove one, with `proxy = \"auto\"` in the configuration of ovld, or by deleting kube-proxy and what \
             `kube-proxy --cleanup` deletes"
                .to_owned()
        });
        state.problems.set(Code::KubeProxy, "", both);
        if state.subsystems.set_translates(translates) {
            let message = match translates {
                true => "this host translates Services",
                false if kube_proxy => "kube-proxy translates the Services of this host: ovl does not",
                false => "this host does not translate Services, as configured",
            };
            self.event("kubernetes", &self.config.node, message);
            state.reconcile.ask_full();
            self.work.notify_one();
        }
    }
}
