//! Publishes ports of this host's endpoints: keeps them with the endpoint, tells peers and programs the kernel.
//! [`crate::publish`] holds the ports.

use ovl_proto::id::EndpointId;
use ovl_proto::object::Network;
use ovl_proto::publish::{Publish, Published};
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems as subsystems;

use super::{Failed, Node};
use crate::problems::Code;
use crate::publish::{ReservedPorts, refusal};

impl Node {
    /// Reserves ports for a new endpoint of this name, all or none.
    ///
    /// # Errors
    ///
    /// A request is invalid, or a port is in use.
    pub(super) fn reserve_ports(
        &self,
        name: &str,
        network: &Network,
        wishes: &[Publish],
    ) -> Result<ReservedPorts<'_>, Failed> {
        self.published.reserve(&self.state.borrow().view, (name, network), 0, wishes)
    }

    /// Publishes the reserved ports of an endpoint. Returns when the kernel has the rules.
    async fn publish_reserved(&self, id: EndpointId, reserved: ReservedPorts<'_>) -> Result<(), Failed> {
        let endpoint = self.endpoint_to_publish(id)?;
        let before = endpoint.publish.clone();
        let published = before.iter().chain(reserved.published()).copied().collect();
        let addresses = endpoint.addresses.clone();
        if let Err(failed) = self.set_published(endpoint, published).await {
            if let Ok(endpoint) = self.endpoint_to_publish(id) {
                self.set_published(endpoint, before).await?;
            }
            return Err(failed);
        }
        self.published.serve(id, reserved, &addresses);
        Ok(())
    }

    /// Publishes more ports of an endpoint of this host. Returns all ports that it then has.
    pub(super) async fn publish(&self, id: EndpointId, wishes: &[Publish]) -> Result<Vec<Published>, Failed> {
        let endpoint = self.endpoint_to_publish(id)?;
        let reserved = {
            let state = self.state.borrow();
            let found = state.view.networks.get(&endpoint.network);
            let network = &found.ok_or_else(|| Failed::not_found("the endpoint's network is gone"))?.network;
            let before = endpoint.publish.len();
            self.published.reserve(&state.view, (&endpoint.name, network), before, wishes)?
        };
        self.publish_reserved(id, reserved).await?;
        Ok(self.endpoint_to_publish(id)?.publish)
    }

    /// Withdraws all published ports of an endpoint. Does nothing if the endpoint does not exist.
    pub(super) async fn revoke(&self, id: EndpointId) -> Result<(), Failed> {
        self.published.release(id);
        let endpoint = self.state.borrow().own_endpoint(id).cloned();
        match endpoint {
            Some(endpoint) if !endpoint.publish.is_empty() => self.set_published(endpoint, Vec::new()).await,
            Some(_) | None => Ok(()),
        }
    }

    fn endpoint_to_publish(&self, id: EndpointId) -> Result<Endpoint, Failed> {
        let state = self.state.borrow();
        state.own_endpoint(id).cloned().ok_or_else(|| Failed::not_found("the endpoint is gone"))
    }

    /// Saves the published ports of an endpoint, announces them to peers and configures the kernel.
    async fn set_published(&self, mut endpoint: Endpoint, published: Vec<Published>) -> Result<(), Failed> {
        endpoint.publish = published;
        let local = self.state.borrow().endpoints.get(endpoint.id).cloned();
        let local = local.ok_or_else(|| Failed::not_found("the endpoint is gone"))?;
        self.keep_endpoint(&endpoint, &local).map_err(|error| Failed::internal(format!("{error:#}")))?;
        self.write_table(vec![Entry::Endpoint(endpoint)], Vec::new());
        let ops = {
            let mut state = self.state.borrow_mut();
            let (cluster, mut subsystems) = state.parts();
            subsystems::plan(&mut subsystems, &cluster)
        };
        let outcomes = self.kernel.apply(ops).await;
        self.note_outcomes(&outcomes, None);
        match outcomes.iter().find_map(refusal) {
            Some(error) => Err(Failed::kernel(format!("cannot publish ports: {error}"))),
            None => Ok(()),
        }
    }

    /// Binds the ports of endpoints that the last run left. A port that another program has bound meanwhile is reported
    /// and tried again.
    pub(super) fn hold_ports_again(&self) {
        self.published.hold_again(self.state.borrow().own_endpoints());
        self.report_ports();
    }

    /// Tries again to bind the ports that another program had.
    pub(super) fn retry_ports(&self) {
        let state = self.state.borrow();
        self.published.retry(|id| state.own_endpoint(id));
        drop(state);
        self.report_ports();
    }

    fn report_ports(&self) {
        self.state.borrow_mut().problems.replace(Code::PublishedPort, self.published.problems());
    }
}
