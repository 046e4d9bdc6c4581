//! What a kernel has to hold because of the tables of all hosts, worked out without the code of the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::id::{Mac, NetworkId};
use ovl_proto::table::Endpoint;

/// An endpoint and its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed<'a> {
    /// The number of its host.
    pub(crate) host: usize,
    /// The name of its network.
    pub(crate) network: &'a String,
    /// Its entry in the table of its host.
    pub(crate) endpoint: &'a Endpoint,
}

/// Checks the kernel of a host for the endpoints of a switched network. `vteps` has the address of each host.
///
/// # Errors
///
/// Names what is missing or left over.
pub(crate) fn check_switched(
    kernel: &Dataplane,
    host: usize,
    network: NetworkId,
    endpoints: &[&Placed<'_>],
    vteps: &BTreeMap<usize, IpAddr>,
) -> Result<()> {
    let (bridge, vxlan) = (Device::bridge(network), Device::vxlan(network));
    let is_here = endpoints.iter().any(|placed| placed.host == host);
    ensure!(kernel.links.contains_key(&bridge) == is_here, "bridge {bridge}: expected {is_here}");
    ensure!(kernel.links.contains_key(&vxlan) == is_here, "VXLAN device {vxlan}: expected {is_here}");
    let (mut remotes, mut floods, mut neighbours) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
    for Placed { host: at, endpoint, .. } in endpoints.iter().copied().filter(|_| is_here) {
        let vtep = *vteps.get(at).context("a host without an address")?;
        if *at == host {
            check_link(kernel, endpoint, Some(bridge))?;
            let port = (Device::endpoint(endpoint.id), endpoint.mac);
            ensure!(kernel.ports.contains(&port), "no FDB entry for {} at its port", endpoint.name);
        } else {
            remotes.insert(endpoint.mac, vtep);
            floods.insert(vtep);
        }
        neighbours.extend(endpoint.addresses.iter().map(|net| (net.addr(), endpoint.mac)));
    }
    let held = kernel.remotes.iter().filter(|((device, _), _)| *device == vxlan);
    let held: BTreeMap<Mac, IpAddr> = held.map(|((_, mac), remote)| (*mac, remote.vtep)).collect();
    let (of_endpoints, of_hosts): (BTreeMap<_, _>, BTreeMap<_, _>) =
        held.into_iter().partition(|(mac, _)| remotes.contains_key(mac));
    ensure!(of_endpoints == remotes, "FDB entries {of_endpoints:?} in place of {remotes:?}");
    // One for the VXLAN device of each other host, to which path probes go.
    let hosts: BTreeSet<IpAddr> = of_hosts.values().copied().collect();
    ensure!(
        hosts == floods && of_hosts.len() == floods.len(),
        "FDB entries {of_hosts:?} for hosts {floods:?}"
    );
    let held = kernel.floods.iter().filter(|(device, _)| *device == vxlan);
    let held: BTreeSet<IpAddr> = held.map(|(_, remote)| remote.vtep).collect();
    ensure!(held == floods, "flood entries {held:?} in place of {floods:?}");
    let held = kernel.neighbours.iter().filter(|((device, _), _)| *device == bridge);
    let held: BTreeMap<IpAddr, Mac> = held.map(|((_, address), mac)| (*address, *mac)).collect();
    let missing = neighbours.iter().find(|(address, mac)| held.get(address) != Some(mac));
    ensure!(missing.is_none(), "no neighbour {missing:?}");
    let is_left = |address: &IpAddr| !neighbours.contains_key(address);
    let left = held.keys().find(|address| is_left(address));
    ensure!(left.is_none(), "a neighbour {left:?} of no endpoint");
    Ok(())
}

/// Checks the kernel of a host for the endpoints of a routed network. `vteps` has the address of each host.
///
/// # Errors
///
/// Names the endpoint to which no packet would come.
pub(crate) fn check_routed(
    kernel: &Dataplane,
    host: usize,
    network: NetworkId,
    endpoints: &[&Placed<'_>],
    vteps: &BTreeMap<usize, IpAddr>,
) -> Result<()> {
    let vxlan = Device::vxlan(network);
    for Placed { host: at, endpoint, .. } in endpoints.iter().copied() {
        let vtep = *vteps.get(at).context("a host without an address")?;
        for address in endpoint.addresses.iter().map(IpNet::addr) {
            let name = &endpoint.name;
            let covering = kernel.routes.iter().filter(|(to, _)| to.contains(&address));
            let longest = covering.max_by_key(|(to, _)| to.prefix_len());
            let (_, hop) = longest.with_context(|| format!("no route to {name}"))?;
            if *at == host {
                let device = Device::endpoint(endpoint.id);
                ensure!(hop.device == Some(device), "the route to {name} does not lead to its interface");
                let mac = kernel.neighbours.get(&(device, address));
                ensure!(mac == Some(&endpoint.mac), "no neighbour for {name}");
                check_link(kernel, endpoint, None)?;
                continue;
            }
            ensure!(hop.device == Some(vxlan), "the route to {name} does not lead to {vxlan}");
            let gateway = hop.gateway.with_context(|| format!("the route to {name} has no gateway"))?;
            let mac = kernel.neighbours.get(&(vxlan, gateway)).copied();
            let mac = mac.with_context(|| format!("no neighbour {gateway} for {name}"))?;
            let remote = kernel.remotes.get(&(vxlan, mac)).map(|remote| remote.vtep);
            ensure!(remote == Some(vtep), "packets to {name} go to {remote:?} in place of {vtep}");
        }
    }
    Ok(())
}

/// The host interface of an endpoint is up, and a port of its bridge.
fn check_link(kernel: &Dataplane, endpoint: &Endpoint, bridge: Option<Device>) -> Result<()> {
    match kernel.links.get(&Device::endpoint(endpoint.id)) {
        Some(Link::Endpoint { up: true, master, .. }) if *master == bridge => Ok(()),
        other => anyhow::bail!("the interface of {} is {other:?}", endpoint.name),
    }
}
