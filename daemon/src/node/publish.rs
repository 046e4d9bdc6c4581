//! Published ports of this host's endpoints. A port is bound before any peer learns of it, and until its
//! endpoint is deleted.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_kernel::{self as kernel, Outcome};
use ovl_proto::id::EndpointId;
use ovl_proto::object::Network;
use ovl_proto::publish::{Ports as Range, Publish, Published};
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems::publish::{self, MOST_PORTS, MOST_RANGES};

use super::state::State;
use super::{Failed, Node};
use crate::ports::{self, Held, Refused};
use crate::problems::Code;
use ovl_subsystems as subsystems;

/// Number of ports that are tried if the request names none.
const TRIES: u16 = 256;
/// Range of ephemeral ports if `ip_local_port_range` cannot be read: the kernel's default.
const EPHEMERAL: Range = Range { first: 32_768, last: 60_999 };

/// Ports that are reserved for an endpoint. Dropping this releases them.
pub(super) struct SetAside<'a> {
    node: &'a Node,
    number: u64,
    published: Vec<Published>,
    held: Vec<Held>,
}

impl SetAside<'_> {
    /// Returns the reserved ports.
    pub(super) fn published(&self) -> &[Published] {
        &self.published
    }
}

impl Drop for SetAside<'_> {
    fn drop(&mut self) {
        self.node.state.borrow_mut().pending.ports.remove(&self.number);
    }
}

impl Node {
    /// Reserves ports, all or none. They must be free among the published ports and on this host.
    ///
    /// # Errors
    ///
    /// A request is invalid, or a port is in use.
    pub(super) fn set_ports_aside(
        &self,
        name: &str,
        network: &Network,
        wishes: &[Publish],
    ) -> Result<SetAside<'_>, Failed> {
        check(network, wishes)?;
        let number = u64::from_ne_bytes(self.random());
        let mut aside = SetAside { node: self, number, published: Vec::new(), held: Vec::new() };
        for wish in wishes {
            let (published, held) = self.find_ports(*wish, &aside.published)?;
            aside.published.push(published);
            aside.held.extend(held);
        }
        if !wishes.is_empty() {
            let pending = (name.to_owned(), aside.published.clone());
            self.state.borrow_mut().pending.ports.insert(number, pending);
        }
        Ok(aside)
    }

    fn find_ports(&self, wish: Publish, before: &[Published]) -> Result<(Published, Vec<Held>), Failed> {
        let Publish { address, host, container, transport } = wish;
        let published = |host| Published {
            transport,
            address,
            host,
            container: container.first,
            count: container.count(),
        };
        let candidates: Vec<u16> = match host {
            Some(host) if host.count() == container.count() => vec![host.first],
            Some(host) => (host.first..=host.last).collect(),
            None => ephemeral(container.count(), u16::from_ne_bytes(self.random())),
        };
        let mut first = None;
        for candidate in candidates {
            match self.try_ports(published(candidate), before) {
                Ok(held) => return Ok((published(candidate), held)),
                Err(failed) => first = first.or(Some(failed)),
            }
        }
        Err(match (host, first) {
            (Some(host), Some(failed)) if host.count() != container.count() => Failed::conflict(format!(
                "none of the ports {host}/{transport} is free: {}, and so on",
                failed.0.message
            )),
            (_, Some(failed)) => failed,
            (_, None) => Failed::exhausted(format!(
                "no {} ports in a row are free for {transport}: name some",
                container.count()
            )),
        })
    }

    fn try_ports(&self, published: Published, before: &[Published]) -> Result<Vec<Held>, Failed> {
        let transport = published.transport;
        if let Some(port) = before.iter().find_map(|other| published.conflict_with(*other)) {
            return Err(Failed::invalid(format!("port {port}/{transport} is asked for twice")));
        }
        if let Some(sentence) = publisher(&self.state.borrow(), published) {
            return Err(Failed::conflict(sentence));
        }
        ports::hold(published).map_err(|refused| explain(published, &refused))
    }

    /// Publishes the reserved ports of an endpoint. Returns when the kernel has the rules.
    async fn publish_aside(&self, id: EndpointId, aside: SetAside<'_>) -> Result<(), Failed> {
        let endpoint = self.endpoint_to_publish(id)?;
        let before = endpoint.publish.clone();
        let published = before.iter().chain(&aside.published).copied().collect();
        let addresses = endpoint.addresses.clone();
        if let Err(failed) = self.set_published(endpoint, published).await {
            if let Ok(endpoint) = self.endpoint_to_publish(id) {
                self.set_published(endpoint, before).await?;
            }
            return Err(failed);
        }
        self.serve_ports(id, aside, &addresses);
        Ok(())
    }

    /// Serves the reserved ports of an endpoint, which now owns them.
    pub(super) fn serve_ports(&self, id: EndpointId, mut aside: SetAside<'_>, addresses: &[IpNet]) {
        if !aside.held.is_empty() {
            let targets = addresses.iter().map(IpNet::addr).collect();
            self.ports.serve(id, std::mem::take(&mut aside.held), targets);
        }
    }

    /// Publishes more ports of an endpoint of this host. Returns all ports that it then has.
    pub(super) async fn publish(&self, id: EndpointId, wishes: &[Publish]) -> Result<Vec<Published>, Failed> {
        let endpoint = self.endpoint_to_publish(id)?;
        let network = {
            let state = self.state.borrow();
            let found = state.view.networks.get(&endpoint.network);
            found.ok_or_else(|| Failed::not_found("the endpoint's network is gone"))?.network.clone()
        };
        let total = u32::try_from(endpoint.publish.len()).unwrap_or(u32::MAX);
        if total as usize + wishes.len() > MOST_RANGES {
            return Err(too_many());
        }
        let aside = self.set_ports_aside(&endpoint.name, &network, wishes)?;
        self.publish_aside(id, aside).await?;
        Ok(self.endpoint_to_publish(id)?.publish)
    }

    /// Withdraws all published ports of an endpoint. Does nothing if the endpoint does not exist.
    pub(super) async fn revoke(&self, id: EndpointId) -> Result<(), Failed> {
        self.ports.release(id);
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
        let local = self.state.borrow().endpoints.get(&endpoint.id).cloned();
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

    /// Binds the ports of endpoints that the last run left. The kernel translates them all the time. A port
    /// that another program has bound meanwhile is reported and tried again.
    pub(super) fn hold_ports_again(&self) {
        let endpoints: Vec<Endpoint> = self
            .state
            .borrow()
            .own_endpoints()
            .filter(|endpoint| !endpoint.publish.is_empty())
            .cloned()
            .collect();
        for endpoint in endpoints {
            let targets: Vec<IpAddr> = endpoint.addresses.iter().map(IpNet::addr).collect();
            for published in &endpoint.publish {
                self.hold_again(&endpoint, *published, &targets);
            }
        }
    }

    /// Tries again to bind the ports that [`Self::hold_ports_again`] could not bind.
    pub(super) fn retry_ports(&self) {
        let unheld: Vec<(EndpointId, Published)> = self.state.borrow().unheld.iter().copied().collect();
        for (id, published) in unheld {
            let endpoint = self.state.borrow().own_endpoint(id).cloned();
            match endpoint.filter(|endpoint| endpoint.publish.contains(&published)) {
                Some(endpoint) => {
                    let targets: Vec<IpAddr> = endpoint.addresses.iter().map(IpNet::addr).collect();
                    self.hold_again(&endpoint, published, &targets);
                }
                None => self.note_unheld(id, published, None),
            }
        }
    }

    fn hold_again(&self, endpoint: &Endpoint, published: Published, targets: &[IpAddr]) {
        match ports::hold(published) {
            Ok(held) => {
                self.ports.serve(endpoint.id, held, targets.to_vec());
                self.note_unheld(endpoint.id, published, None);
            }
            Err(refused) => {
                let Failed(failure) = explain(published, &refused);
                let sentence = format!(
                    "endpoint {} has published {published}, and {}: what comes from other hosts goes to the endpoint",
                    endpoint.name, failure.message
                );
                self.note_unheld(endpoint.id, published, Some(sentence));
            }
        }
    }

    fn note_unheld(&self, id: EndpointId, published: Published, sentence: Option<String>) {
        let mut state = self.state.borrow_mut();
        match sentence {
            Some(_) => state.unheld.insert((id, published)),
            None => state.unheld.remove(&(id, published)),
        };
        state.problems.set(Code::PublishedPort, format!("{id} {published}"), sentence);
    }
}

/// Returns the error of an operation that published ports depend on. `None` if it succeeded or is not such an
/// operation.
pub(super) fn refusal(outcome: &Outcome) -> Option<&ovl_kernel::KernelError> {
    outcome.result.as_ref().err().filter(|_| publish::is_needed(&outcome.op))
}
