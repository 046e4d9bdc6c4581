//! Other people's firewalls, looked at now and then: our one rule in Docker's is kept there, and what stops our packets
//! is named.

use std::rc::Rc;
use std::time::Duration;

use ovl_dataplane::nft::BASE_TABLE;
use ovl_kernel::{self as kernel, KernelError};
use ovl_proto::object::Network;
use ovl_subsystems::firewall::{Decision, decide};

use super::{Failed, Node};
use crate::problems::Code;

/// Between two looks.
const AGAIN: Duration = Duration::from_secs(5);

impl Node {
    /// Runs for ever.
    pub(super) async fn firewall_loop(self: Rc<Self>) {
        let mut idle = false;
        loop {
            let networks = self.built_networks();
            // Without networks one look is enough, to take away what the last run may have left.
            if !(idle && networks.is_empty())
                && let Err(failed) = self.mind_firewalls(&networks).await
            {
                tracing::warn!(error = failed.0.message, "cannot look after other firewalls");
            }
            idle = networks.is_empty();
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Takes our rule away, for a teardown.
    pub(super) async fn close_firewalls(&self) -> Result<(), Failed> {
        self.mind_firewalls(&[]).await
    }

    /// Sentences about firewalls that stop what is published or sent.
    pub(super) fn firewall_problems(&self) -> Vec<String> {
        let state = self.state.borrow();
        state.problems.of(Code::Firewall).map(|(_, sentence)| sentence.to_owned()).collect()
    }

    fn built_networks(&self) -> Vec<Network> {
        let state = self.state.borrow();
        let all = state.view.networks.values().map(|found| &found.network);
        all.filter(|network| state.local.is_built(&state.view, network.id)).cloned().collect()
    }

    /// Has a look now: a Docker Engine's first container must not wait for the next one.
    pub(super) async fn mind_firewalls_now(&self) -> Result<(), Failed> {
        self.mind_firewalls(&self.built_networks()).await
    }

    async fn mind_firewalls(&self, networks: &[Network]) -> Result<(), Failed> {
        if !self.environment.owns_host() {
            return Ok(());
        }
        let _turn = self.firewall_turn.lock().await;
        let foreign = blocking(kernel::foreign_firewalls).await?;
        let Decision { commands, problems } = decide(&foreign, &networks.iter().collect::<Vec<_>>());
        if !commands.is_empty() {
            for command in &commands {
                self.event("kernel", BASE_TABLE, &command.join(" "));
            }
            blocking(move || kernel::run_commands(&commands)).await?;
        }
        self.state.borrow_mut().problems.replace(Code::Firewall, problems);
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, Failed> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Failed::from),
        Err(error) => Err(Failed::internal(error.to_string())),
    }
}
