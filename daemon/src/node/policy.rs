//! Requests about network policies, and endpoints that are made known to them before they exist. [`crate::policy`]
//! renders the answers.

use ovl_control::{PolicyDrop, PolicyJudgement, PolicyRow};
use ovl_dataplane::nft::Table;
use ovl_metrics::Page;
use ovl_proto::id::EndpointId;
use ovl_proto::resource::Protocol;
use ovl_proto::table::Endpoint;
use ovl_subsystems::Change;
use ovl_subsystems::policy::refused::Counter;

use super::{Failed, Node};
use crate::policy::{self, Refused};

/// An endpoint that is being created, made known to policies. Dropped when it is in the table or the attach
/// failed.
pub(super) struct Policed<'a> {
    node: &'a Node,
    id: EndpointId,
}

impl Drop for Policed<'_> {
    fn drop(&mut self) {
        let mut guard = self.node.state.borrow_mut();
        let state = &mut *guard;
        if let Some(endpoint) = state.local.attaches.end(self.id) {
            state.changed(Change::Attaching(&endpoint));
            self.node.work.notify_one();
        }
    }
}

impl Node {
    /// Makes an endpoint known to policies before it exists.
    pub(super) fn police_attach(&self, endpoint: &Endpoint) -> Policed<'_> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.local.attaches.begin(endpoint.clone());
        state.changed(Change::Attaching(endpoint));
        Policed { node: self, id: endpoint.id }
    }

    /// Counts the packets that policies dropped on this host.
    pub(super) async fn refused(&self) -> Result<Refused, Failed> {
        let sets = Counter::all().map(Counter::by_endpoint).to_vec();
        Ok(policy::refused(self.kernel.counts(Table::Policy, sets).await.map_err(Failed::from)?))
    }

    /// Lists all policies, with the number of packets that each dropped on this host.
    pub(super) async fn policy_ls(&self) -> Result<Vec<PolicyRow>, Failed> {
        let refused = self.refused().await?;
        Ok(policy::rows(&self.state.borrow().view, &refused))
    }

    /// Explains the verdict of all policies on a connection. `port` is `None` for a protocol without ports.
    pub(super) fn policy_explain(
        &self,
        from: &str,
        to: &str,
        port: Option<(Protocol, u16)>,
    ) -> Result<Vec<PolicyJudgement>, Failed> {
        let state = self.state.borrow();
        policy::judge(&state.view, state.admitted_now(), from, to, port)
    }

    /// Lists the connections of which packets were dropped recently.
    pub(super) async fn policy_drops(&self) -> Result<Vec<PolicyDrop>, Failed> {
        let sets = Counter::all().map(Counter::by_connection).to_vec();
        let counts = self.kernel.counts(Table::Policy, sets).await.map_err(Failed::from)?;
        let state = self.state.borrow();
        Ok(policy::drops(&state.view, state.admitted_now(), counts))
    }

    /// Adds the dropped packets to the metrics.
    pub(super) async fn add_policies(&self, page: &mut Page) -> Result<(), Failed> {
        if self.state.borrow().view.resources.has_policies() {
            let refused = self.refused().await?;
            let state = self.state.borrow();
            policy::add_refused(page, &state.view, &refused);
            state.admitted.add_to(page, state.clock.elapsed(), self.resolver.late());
        }
        Ok(())
    }
}
