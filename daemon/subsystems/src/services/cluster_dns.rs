//! Who answers at the address of the cluster DNS: ovl, or a program of the cluster behind a Service, such as CoreDNS.
//!
//! The module owns no state. Begin to read at [`handed_over`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_cluster::claims::Claim;
use ovl_cluster::resources::Resources;
use ovl_proto::resource::{EndpointSlice, Name, SERVICE_NAME_LABEL};

/// Who answers at the address of the cluster DNS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ClusterDns {
    /// A Service of an API server while it has an endpoint that is ready, else ovl.
    #[default]
    Auto,
    /// ovl.
    Own,
    /// Another program. A Service may have the address.
    Elsewhere,
}

/// Returns those of the addresses of the cluster DNS that a Service of an API server has, with an endpoint that is ready.
///
/// The slices of the API server decide, and not which hosts are alive: ovl must not take the address over and give it back
/// while a host is suspected.
pub fn handed_over(resources: &Resources, addresses: impl Iterator<Item = IpAddr>) -> BTreeSet<IpAddr> {
    addresses.filter(|address| is_handed_over(resources, *address)).collect()
}

fn is_handed_over(resources: &Resources, address: IpAddr) -> bool {
    let Some(name) = resources.claims().holder(Claim::Address(address)) else { return false };
    let service = resources.services().get(name);
    let is_mirrored = service.is_some_and(|it| it.metadata.source.is_some() && it.is_translated());
    let first = Name::new(&name.namespace, "");
    let here = resources.slices().range(first..).take_while(|(slice, _)| slice.namespace == name.namespace);
    is_mirrored && here.map(|(_, slice)| slice).any(|slice| is_of(slice, name) && is_ready(slice, address))
}

fn is_of(slice: &EndpointSlice, service: &Name) -> bool {
    slice.metadata.labels.get(SERVICE_NAME_LABEL) == Some(&service.name)
}

/// Whether a slice has an endpoint of the family of an address that is ready.
fn is_ready(slice: &EndpointSlice, address: IpAddr) -> bool {
    slice.endpoints.iter().any(|endpoint| {
        endpoint.conditions.ready != Some(false)
            && endpoint.addresses.first().is_some_and(|at| at.is_ipv4() == address.is_ipv4())
    })
}
