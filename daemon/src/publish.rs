//! Published ports of this host's endpoints.
//!
//! [`PublishedPorts`] owns the sockets that hold the ports, the ports that requests in flight have reserved, and those
//! that another program has. A port is bound before any peer learns of it, and until its endpoint is deleted. The
//! kernel's rules are in [`ovl_subsystems::publish`]. Begin to read at [`PublishedPorts::reserve`]; [`choice`] decides.

mod choice;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_kernel::{KernelError, Outcome};
use ovl_proto::id::EndpointId;
use ovl_proto::object::Network;
use ovl_proto::publish::{Publish, Published};
use ovl_proto::table::Endpoint;
use ovl_subsystems::publish;

use crate::environment::Environment;
use crate::failed::Failed;
use crate::ports::{self, Held, Ports, Refused};

/// Ports that requests in flight have reserved.
#[derive(Debug, Default)]
struct Reservations {
    last: Cell<u64>,
    /// The name of the endpoint and its ports, by the number of the reservation.
    all: RefCell<BTreeMap<u64, (String, Vec<Published>)>>,
}

/// Ports that are reserved for an endpoint. Dropping this releases them.
pub(crate) struct ReservedPorts<'a> {
    reservations: &'a Reservations,
    number: u64,
    published: Vec<Published>,
    held: Vec<Held>,
}

impl ReservedPorts<'_> {
    /// Returns the reserved ports.
    pub(crate) fn published(&self) -> &[Published] {
        &self.published
    }
}

impl Drop for ReservedPorts<'_> {
    fn drop(&mut self) {
        self.reservations.all.borrow_mut().remove(&self.number);
    }
}

/// The published ports of this host.
pub(crate) struct PublishedPorts {
    /// The thread that holds the sockets and relays what does not pass the kernel.
    thread: Ports,
    environment: Rc<dyn Environment>,
    reservations: Reservations,
    /// Ports that could not be bound again after a restart, each with a sentence for the user.
    unheld: RefCell<BTreeMap<(EndpointId, Published), String>>,
}

impl PublishedPorts {
    /// Publishes no port yet. `environment` gives random numbers.
    pub(crate) fn new(thread: Ports, environment: Rc<dyn Environment>) -> Self {
        Self { thread, environment, reservations: Reservations::default(), unheld: RefCell::default() }
    }

    /// Reserves ports for an endpoint of this name, all or none. They must be free among the published ports and on
    /// this host. `before` is the number of ranges that the endpoint has already.
    ///
    /// # Errors
    ///
    /// A request is invalid, or a port is in use.
    pub(crate) fn reserve(
        &self,
        view: &View,
        (name, network): (&str, &Network),
        before: usize,
        wishes: &[Publish],
    ) -> Result<ReservedPorts<'_>, Failed> {
        choice::check(network, before, wishes)?;
        let reservations = &self.reservations;
        let number = reservations.last.get().wrapping_add(1);
        reservations.last.set(number);
        let mut reserved = ReservedPorts { reservations, number, published: Vec::new(), held: Vec::new() };
        for wish in wishes {
            let (published, held) = self.find(view, *wish, &reserved.published)?;
            reserved.published.push(published);
            reserved.held.extend(held);
        }
        if !wishes.is_empty() {
            let pending = (name.to_owned(), reserved.published.clone());
            reservations.all.borrow_mut().insert(number, pending);
        }
        Ok(reserved)
    }

    fn find(
        &self,
        view: &View,
        wish: Publish,
        before: &[Published],
    ) -> Result<(Published, Vec<Held>), Failed> {
        let mut random = [0; 2];
        self.environment.fill_random(&mut random);
        let ephemeral = ovl_kernel::read_sysctl("net.ipv4.ip_local_port_range");
        let ephemeral = choice::ephemeral(ephemeral.as_deref());
        let mut first = None;
        for candidate in choice::candidates(wish, ephemeral, u16::from_ne_bytes(random)) {
            let published = choice::at(wish, candidate);
            let reserved = self.reservations.all.borrow();
            let held = choice::check_free(view, &reserved, published, before)
                .and_then(|()| ports::hold(published).map_err(|refused| explain(published, &refused)));
            match held {
                Ok(held) => return Ok((published, held)),
                Err(failed) => first = first.or(Some(failed)),
            }
        }
        Err(choice::none_free(wish, first))
    }

    /// Serves the reserved ports of an endpoint, which now owns them.
    pub(crate) fn serve(&self, id: EndpointId, mut reserved: ReservedPorts<'_>, addresses: &[IpNet]) {
        if !reserved.held.is_empty() {
            self.thread.serve(id, std::mem::take(&mut reserved.held), targets(addresses));
        }
    }

    /// Closes all published ports of an endpoint.
    pub(crate) fn release(&self, id: EndpointId) {
        self.thread.release(id);
    }

    /// Binds the ports of endpoints that the last run left. The kernel translates them all the time.
    pub(crate) fn hold_again<'a>(&self, endpoints: impl IntoIterator<Item = &'a Endpoint>) {
        for endpoint in endpoints {
            endpoint.publish.iter().for_each(|published| self.hold(endpoint, *published));
        }
    }

    /// Tries again to bind the ports that [`Self::hold_again`] could not bind. `find` returns an endpoint of this host.
    pub(crate) fn retry<'a>(&self, find: impl Fn(EndpointId) -> Option<&'a Endpoint>) {
        let unheld: Vec<(EndpointId, Published)> = self.unheld.borrow().keys().copied().collect();
        for (id, published) in unheld {
            match find(id).filter(|endpoint| endpoint.publish.contains(&published)) {
                Some(endpoint) => self.hold(endpoint, published),
                None => drop(self.unheld.borrow_mut().remove(&(id, published))),
            }
        }
    }

    fn hold(&self, endpoint: &Endpoint, published: Published) {
        let key = (endpoint.id, published);
        match ports::hold(published) {
            Ok(held) => {
                self.thread.serve(endpoint.id, held, targets(&endpoint.addresses));
                self.unheld.borrow_mut().remove(&key);
            }
            Err(refused) => {
                let Failed(failure) = explain(published, &refused);
                let sentence = format!(
                    "endpoint {} has published {published}, and {}: what comes from other hosts goes to the endpoint",
                    endpoint.name, failure.message
                );
                self.unheld.borrow_mut().insert(key, sentence);
            }
        }
    }

    /// Returns a sentence for each port that another program has, with the endpoint and the port.
    pub(crate) fn problems(&self) -> Vec<(String, String)> {
        let unheld = self.unheld.borrow();
        let all = unheld.iter();
        all.map(|((id, published), sentence)| (format!("{id} {published}"), sentence.clone())).collect()
    }
}

fn targets(addresses: &[IpNet]) -> Vec<IpAddr> {
    addresses.iter().map(IpNet::addr).collect()
}

/// Returns the error of an operation that published ports depend on. `None` if it succeeded or is not such an
/// operation.
pub(crate) fn refusal(outcome: &Outcome) -> Option<&KernelError> {
    outcome.result.as_ref().err().filter(|_| publish::is_needed(&outcome.op))
}

fn explain(published: Published, refused: &Refused) -> Failed {
    let transport = published.transport;
    match refused {
        Refused::Taken { port, holder } => {
            let holder = holder.as_deref().unwrap_or("a program that cannot be seen from here");
            Failed::conflict(format!("port {port}/{transport} is in use on this host by {holder}"))
        }
        Refused::NoAddress(address) => Failed::invalid(format!("{address} is not an address of this host")),
        Refused::Other(error) => Failed::kernel(format!("cannot hold {published} on this host: {error}")),
    }
}
