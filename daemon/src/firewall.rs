//! Firewalls of other programs: ovld's one rule in Docker's chain is maintained, and firewalls that drop packets of ovl
//! are found.
//!
//! [`Firewalls`] owns the turn: one task at a time inspects them. What follows from what is found is decided by
//! [`ovl_subsystems::firewall::decide`]. Begin to read at [`Firewalls::mind`].

use ovl_kernel as kernel;
use ovl_proto::object::Network;
use ovl_subsystems::firewall::{Decision, bypassed, decide};
use tokio::sync::Mutex;

use crate::failed::{Failed, blocking};
use crate::modes::has_kube_proxy;

/// What was found of other programs.
#[derive(Debug)]
pub(crate) struct Found {
    /// Firewalls that drop packets: a key and a sentence for each.
    pub problems: Vec<(String, String)>,
    /// Whether a kube-proxy translates Services.
    pub kube_proxy: bool,
    /// Rules that packets on the fast path would bypass, as a sentence.
    pub bypassed: Option<String>,
}

/// The firewalls of other programs on this host.
#[derive(Debug)]
pub(crate) struct Firewalls {
    /// Whether there is a host to inspect.
    owns_host: bool,
    turn: Mutex<()>,
}

impl Firewalls {
    /// Inspects nothing yet. If `owns_host` is not set, nothing ever is.
    pub(crate) fn new(owns_host: bool) -> Self {
        Self { owns_host, turn: Mutex::default() }
    }

    /// Inspects the firewalls and maintains the rule in Docker's chain for these networks. `tell` hears of each command
    /// before any is run. `None` if there is no host to inspect.
    ///
    /// # Errors
    ///
    /// The firewalls cannot be read, or a command failed.
    pub(crate) async fn mind(
        &self,
        networks: &[Network],
        tell: impl Fn(&[String]),
    ) -> Result<Option<Found>, Failed> {
        if !self.owns_host {
            return Ok(None);
        }
        let _turn = self.turn.lock().await;
        let foreign = blocking(kernel::foreign_firewalls).await?;
        let Decision { commands, problems } = decide(&foreign, &networks.iter().collect::<Vec<_>>());
        if !commands.is_empty() {
            commands.iter().for_each(|command| tell(command));
            blocking(move || kernel::run_commands(&commands)).await?;
        }
        Ok(Some(Found { problems, kube_proxy: has_kube_proxy(&foreign), bypassed: bypassed(&foreign) }))
    }
}
