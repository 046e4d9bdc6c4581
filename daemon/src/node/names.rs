//! The names of the cluster reach the resolver.
//!
//! A change of tables or objects marks names, and [`Node::refresh_names`] applies all marks. It is called before each
//! pass. It is also called when an endpoint of this host is attached or detached, before any peer is told.

use ipnet::IpNet;
use ovl_control::{DnsAnswer, DnsQuestion};
use ovl_dns::Client;
use ovl_proto::table::Endpoint;
use ovl_subsystems::names::resolver::resolv_conf;
use ovl_subsystems::names::{Names, Place, Sources};

use super::attach::as_spelled;
use super::state::State;
use super::{Failed, Node};
use crate::names::{self, Asked, Query};

impl Node {
    /// Gives the resolver all names that changed.
    pub(super) fn refresh_names(&self) {
        if let Some(zone) = self.state.borrow_mut().refresh_names(Names::refresh) {
            self.resolver.set_zone(zone);
        }
    }

    /// Gives the resolver all names again.
    pub(super) fn refresh_all_names(&self) {
        let zone = self.state.borrow_mut().refresh_names(Names::refresh_all);
        self.resolver.set_zone(zone);
    }

    /// Whether pods need the cluster DNS: there is a Service.
    pub(super) fn has_services(&self) -> bool {
        self.state.borrow().view.has_services()
    }

    /// Returns the DNS configuration of a pod for the result of a CNI call. `None` if there is no Service.
    pub(super) fn pod_dns(&self, namespace: &str) -> Option<serde_json::Value> {
        let state = self.state.borrow();
        let servers: Vec<_> = self.config.ranges.dns_addresses().collect();
        let domain = state.subsystems.names.cluster_domain();
        state.view.has_services().then(|| names::pod_dns(&servers, domain, namespace))
    }

    /// Returns the answer to a query and the reason for it.
    pub(super) async fn dns(&self, question: DnsQuestion) -> Result<DnsAnswer, Failed> {
        let query = Query::parse(&question)?;
        let asked = {
            let state = self.state.borrow();
            let (client, from) = match &question.from {
                None => (Client::Host, "host".to_owned()),
                Some(endpoint) => {
                    let found = state.own_endpoint_called(endpoint, question.network.as_deref())?;
                    let address = found.addresses.first().map(IpNet::addr);
                    let address =
                        address.ok_or_else(|| Failed::internal("an endpoint without an address"))?;
                    (Client::Endpoint(address), found.name.clone())
                }
            };
            let names = &state.subsystems.names;
            let why = names.explain(&state.view, client, &query.name);
            Asked { client, from, zone: names.zone().clone(), why }
        };
        self.resolver.answer(query, asked).await
    }

    /// Returns the content of resolv.conf for an endpoint.
    pub(super) fn resolv_conf(&self, endpoint: &str, network: Option<&str>) -> Result<String, Failed> {
        Ok(resolv_conf(&self.state.borrow().own_endpoint_called(endpoint, network)?.addresses))
    }
}

impl State {
    /// Applies all marks to the names, by [`Names::refresh`] or [`Names::refresh_all`].
    fn refresh_names<T>(&mut self, refresh: fn(&mut Names, Sources<'_>) -> T) -> T {
        let Self { view, workloads, subsystems, endpoints, .. } = self;
        let place = |id| {
            let local = endpoints.get(id)?;
            Some(Place { namespace: local.inode, interface: local.ifname.clone() })
        };
        refresh(&mut subsystems.names, Sources { view, backends: workloads.backends(), place: &place })
    }

    /// Returns the endpoint of this host with a name.
    ///
    /// # Errors
    ///
    /// There is none, or it is on several networks and `network` is absent.
    fn own_endpoint_called(&self, name: &str, network: Option<&str>) -> Result<&Endpoint, Failed> {
        let network = match network {
            Some(name) => {
                let found = self.view.network(name).map(|found| found.network.id);
                Some(found.ok_or_else(|| Failed::no_network(&self.view, name))?)
            }
            None => None,
        };
        let named = self.view.own().into_iter().flat_map(|own| own.table.named(name));
        let named = named.filter(|endpoint| network.is_none_or(|network| endpoint.network == network));
        let named: Vec<&Endpoint> = as_spelled(named, name).collect();
        match named[..] {
            [] => Err(Failed::not_found(format!("there is no endpoint {name} on this host"))),
            [one] => Ok(one),
            _ => Err(Failed::invalid(format!("{name} is on several networks: name one with --network"))),
        }
    }
}
