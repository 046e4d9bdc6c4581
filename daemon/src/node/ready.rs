//! Requests that come too early wait for a limited time: while the daemon starts, until a majority has admitted this host
//! and gossip has caught up.

use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::object::Driver;
use tokio::time::{Instant, timeout_at};

use super::state::State;
use super::{Failed, Node};
use crate::problems::Code;

/// How long a request waits.
pub(super) const READY_WITHIN: Duration = Duration::from_secs(10);
/// The problems with which no new endpoint can be created, or none is reached.
const WITHOUT_ENDPOINTS: [Code; 3] = [Code::Address, Code::KernelDump, Code::NoBlock];
/// How often a reason is looked for that waiting does not cure.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What a request waits for.
pub(super) enum Waits {
    /// Something that may come.
    For(String),
    /// Something that does not come by waiting: an operator has to do something first.
    InVain(Failed),
}

impl Node {
    /// Waits until this host is a member and knows what live peers announce.
    ///
    /// # Errors
    ///
    /// It is not so after this time, or it cannot become so by itself. The message says what is missing.
    pub(super) async fn ready(&self, within: Duration) -> Result<(), Failed> {
        self.wait_until(within, |state| self.waits_for(state).map_or(Ok(()), Err)).await
    }

    /// Waits until what a request needs is found in the state, and returns it.
    ///
    /// # Errors
    ///
    /// It is not there after this time, or it cannot come by itself. The message says what is missing.
    pub(super) async fn wait_until<T>(
        &self,
        within: Duration,
        find: impl Fn(&State) -> Result<T, Waits>,
    ) -> Result<T, Failed> {
        let until = Instant::now() + within;
        loop {
            let news = self.membership.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            let missing = {
                let state = self.state.borrow();
                if state.phase.is_leaving() {
                    return Err(Failed::unavailable("ovld is stopping"));
                }
                match find(&state) {
                    Ok(found) => return Ok(found),
                    Err(Waits::InVain(failed)) => return Err(failed),
                    Err(Waits::For(what)) => what,
                }
            };
            let now = Instant::now();
            if now >= until {
                return Err(Failed::unavailable(format!("waited {} s: {missing}", within.as_secs())));
            }
            timeout_at(until.min(now + LOOK_EVERY), news).await.ok();
        }
    }

    /// As [`Self::ready`], for a request about this network. A bridge network is local to this host, so there is nothing to
    /// wait for.
    pub(super) async fn ready_for(&self, network: &str) -> Result<(), Failed> {
        let own = {
            let state = self.state.borrow();
            state.view.network(network).is_some_and(|found| found.network.driver == Driver::Bridge)
        };
        if own { Ok(()) } else { self.ready(READY_WITHIN).await }
    }

    /// Returns why new endpoints of this host would fail, or would not be reached. `None`: they would not.
    pub(super) fn unready(&self, state: &State) -> Option<String> {
        match self.waits_for(state) {
            Some(Waits::For(why)) => return Some(why),
            Some(Waits::InVain(Failed(failure))) => return Some(failure.message),
            None => {}
        }
        let of = |code: &Code| state.problems.of(*code).next().map(|(_, why)| why.to_owned());
        WITHOUT_ENDPOINTS.iter().find_map(of)
    }

    fn waits_for(&self, state: &State) -> Option<Waits> {
        if let Some(why) = self.left_out(state) {
            return Some(Waits::InVain(Failed::unavailable(why)));
        }
        if !state.is_member() {
            if let Some(why) = self.not_admitted_because(state) {
                return Some(Waits::InVain(Failed::unavailable(why)));
            }
            let why = state.problems.get(Code::Admission, "").map(str::to_owned);
            return Some(Waits::For(why.unwrap_or_else(|| {
                "not admitted yet: no majority of the members has answered. `ovlctl status` says what is missing"
                    .to_owned()
            })));
        }
        if state.phase.is_caught_up() {
            return None;
        }
        let missing: Vec<NodeId> = state.other_members().filter(|id| !state.has_arrived(*id)).collect();
        let names = state.names_of(&missing);
        let whom = if names.is_empty() { "the other hosts" } else { &names };
        Some(Waits::For(format!(
            "ovld has just started, and what {whom} announced has not arrived yet: the endpoints there, networks and \
             Kubernetes objects. Try again; `ovlctl peers` shows whom this host reaches"
        )))
    }
}
