//! Who is meant by the ends of a trace.
//!
//! The module owns no state. Begin to read at [`source`].

use std::net::IpAddr;

use ovl_cluster::view::{Node, Placed, View};
use ovl_proto::id::NodeId;
use ovl_proto::resource::{Name, Service};

use crate::failed::Failed;

/// The word for the host on which a trace is requested.
pub(crate) const HOST: &str = "host";

/// Who sends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// One of these endpoints: one workload may have several.
    Endpoints(Placed<'a>),
    /// A host itself.
    Host(&'a Node),
}

impl Source<'_> {
    /// The host on which the probe is sent.
    pub(crate) fn host(&self) -> NodeId {
        match self {
            Self::Endpoints(placed) => placed.node.record.id,
            Self::Host(node) => node.record.id,
        }
    }
}

/// The destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// These addresses, and what they are.
    Addresses(Vec<IpAddr>, String),
    /// A name that only the resolver knows.
    Name(String),
}

/// Finds the sender. Of a name on several networks, the endpoint on the network of `to` is preferred.
///
/// # Errors
///
/// There is no such endpoint or host.
pub(crate) fn source<'a>(view: &'a View, text: &str, to: Option<IpAddr>) -> Result<Source<'a>, Failed> {
    if text == HOST
        && let Some(own) = view.own()
    {
        return Ok(Source::Host(own));
    }
    let mut found = match text.parse::<IpAddr>() {
        Ok(address) => with_address(view, address).into_iter().collect(),
        Err(_) => named(view, text),
    };
    let is_near = |placed: &Placed<'_>| {
        let network = view.networks.get(&placed.endpoint.network);
        to.is_some_and(|to| {
            network
                .is_some_and(|found| found.network.subnets.iter().any(|subnet| subnet.prefix.contains(&to)))
        })
    };
    let family = |placed: &Placed<'_>| {
        to.is_none_or(|to| placed.endpoint.addresses.iter().any(|net| net.addr().is_ipv4() == to.is_ipv4()))
    };
    found.sort_by_key(|placed| (!is_near(placed), !family(placed)));
    if let Some(first) = found.first() {
        return Ok(Source::Endpoints(*first));
    }
    let by_address = |node: &&Node| text.parse() == Ok(node.record.vtep);
    let host = host(view, text).or_else(|| view.nodes.values().find(by_address));
    host.map(Source::Host).ok_or_else(|| {
        Failed::not_found(format!(
            "there is no endpoint and no host {text}: give NAME, NAMESPACE/NAME, an address, or `host`; \
             `ovlctl endpoints` lists them"
        ))
    })
}

/// Finds the destination. A name is first that of an endpoint, then of a Service, of a host, and in DNS.
pub(crate) fn target(view: &View, text: &str) -> Target {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Target::Addresses(vec![address], describe(view, address));
    }
    if text == HOST
        && let Some(own) = view.own()
    {
        return Target::Addresses(vec![own.record.vtep], format!("host {}", own.record.name));
    }
    if let Some(first) = named(view, text).first() {
        let addresses = first.endpoint.addresses.iter().map(|net| net.addr()).collect();
        return Target::Addresses(addresses, format!("{}/{}", first.endpoint.namespace, first.endpoint.name));
    }
    let (namespace, name) = full_name(text);
    if let Some(service) = view.resources.services().get(&Name::new(namespace, name)) {
        let addresses: Vec<IpAddr> = service_addresses(service).collect();
        if !addresses.is_empty() {
            return Target::Addresses(addresses, format!("Service {namespace}/{name}"));
        }
    }
    match host(view, text) {
        Some(node) => Target::Addresses(vec![node.record.vtep], format!("host {}", node.record.name)),
        None => Target::Name(text.to_owned()),
    }
}

/// Returns what has an address, for people: the address itself if nothing is known of it.
pub(crate) fn describe(view: &View, address: IpAddr) -> String {
    known(view, address).unwrap_or_else(|| address.to_string())
}

/// Returns what has an address, for people. `None` if nothing is known of it.
pub(crate) fn known(view: &View, address: IpAddr) -> Option<String> {
    if let Some(placed) = with_address(view, address) {
        return Some(format!("{}/{}", placed.endpoint.namespace, placed.endpoint.name));
    }
    if let Some(node) = host_with(view, address) {
        return Some(format!("host {}", node.record.name));
    }
    service_with(view, &[address]).map(|(name, _)| format!("Service {name}"))
}

/// Returns the addresses of a Service that are its own.
pub(crate) fn service_addresses(service: &Service) -> impl Iterator<Item = IpAddr> {
    service.cluster_addresses().chain(service.load_balancer_addresses())
}

/// Returns the Service that has one of these addresses.
pub(crate) fn service_with<'a>(view: &'a View, addresses: &[IpAddr]) -> Option<(&'a Name, &'a Service)> {
    let has = |service: &Service| service_addresses(service).any(|own| addresses.contains(&own));
    view.resources.services().iter().find(|(_, service)| has(service))
}

/// Returns the used endpoint with an address.
pub(crate) fn with_address(view: &View, address: IpAddr) -> Option<Placed<'_>> {
    view.networks.keys().find_map(|id| view.endpoint_by_address(*id, address))
}

/// Returns the host with an underlay address.
pub(crate) fn host_with(view: &View, address: IpAddr) -> Option<&Node> {
    view.nodes.values().find(|node| node.record.vtep == address || node.record.address.ip() == address)
}

/// Returns the namespace and the name in `NAMESPACE/NAME` or `NAME`.
pub(crate) fn full_name(text: &str) -> (&str, &str) {
    text.split_once('/').unwrap_or(("default", text))
}

/// Returns the endpoints that are named so, or whose pod is. Those of dead hosts are named as well.
fn named<'a>(view: &'a View, text: &str) -> Vec<Placed<'a>> {
    let (namespace, name) = full_name(text);
    let pod = Name::new(namespace, name);
    let in_namespace = |placed: &Placed<'_>| placed.endpoint.namespace == namespace;
    let is_called = |placed: &Placed<'_>| {
        placed.endpoint.name.eq_ignore_ascii_case(name)
            || placed.endpoint.pod.as_ref().is_some_and(|of| of.name == pod.name)
    };
    let mut all: Vec<Placed<'a>> =
        view.all_endpoints().filter(in_namespace).filter(|placed| is_called(placed)).collect();
    all.sort_by_key(|placed| !view.is_counted(placed));
    all
}

/// Returns the host with a name.
pub(crate) fn host<'a>(view: &'a View, text: &str) -> Option<&'a Node> {
    let mut named = view.nodes.values().filter(|node| node.record.name == text);
    // A host that came back with a new identity has the name of its dead predecessor.
    let first = named.next()?;
    Some(std::iter::once(first).chain(named).find(|node| view.counts(node)).unwrap_or(first))
}
