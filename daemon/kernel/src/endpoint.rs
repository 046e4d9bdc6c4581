//! Creates the veth pair of an endpoint: one batch of requests in the host's namespace, and one in the
//! workload's. If one fails, the pair is deleted.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::link::LinkAttribute;
use nix::libc::{EACCES, EEXIST, EOPNOTSUPP, EXFULL};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::Link;
use ovl_proto::bandwidth::Rate;
use ovl_proto::id::Mac;

use super::apply::{Devices, Located, with_mtu_has_inet6};
use super::dump::has_default_route;
use super::error::{KernelError, Result};
use super::link::LinkView;
use super::message::{self, Outer, Target};
use super::netns::{self, Netns, NetnsWorker};
use super::resolver::{self, Resolver};
use super::socket::{Batch, Refusal, Route};
use super::sweep::Sweeper;
use super::sys::LOOPBACK;
use super::sysctl;
use super::{CreatedEndpoint, EndpointSpec, HostEnd, Mended, PeerSpec, rate};

/// An interface name that the kernel completes with the first free number.
const ANY_NAME: &str = "eth%d";

/// A created veth pair.
#[derive(Debug)]
pub(super) struct CreatedPair {
    pub(super) index: u32,
    pub(super) link: Link,
    pub(super) made: CreatedEndpoint,
}

/// Creates the veth pair of an endpoint.
pub(super) fn create(
    route: &mut Route,
    devices: &mut Devices,
    netns_worker: &mut NetnsWorker,
    sweeper: &Sweeper,
    spec: EndpointSpec,
) -> Result<CreatedPair> {
    let EndpointSpec {
        device,
        name,
        netns,
        ifname,
        mac,
        mtu,
        host_end,
        addresses,
        gateways,
        resolver,
        bandwidth,
    } = spec;
    if let Some(name) = &ifname
        && !is_plain_name(name)
    {
        return Err(KernelError::InvalidInterfaceName(name.clone()));
    }
    let (outer, bridge, hairpin) = match host_end {
        HostEnd::Port(bridge, hairpin) => {
            devices.find(route, [bridge, device].into_iter())?;
            (Outer::Port(devices.get(route, bridge)?.index), Some(bridge), hairpin)
        }
        HostEnd::Routed { mac, .. } => (Outer::Alone(mac), None, false),
    };
    // If a device had this name, all requests of the batch but the first would change that device.
    match devices.get(route, device) {
        Err(KernelError::NoDevice(_)) => devices.forget(device),
        Err(error) => return Err(error),
        Ok(_) => return Err(KernelError::DeviceExists(device)),
    }
    let wanted = ifname.clone().unwrap_or_else(|| ANY_NAME.to_owned());
    let own = if netns.is_none() { Some(netns::own()?) } else { None };
    let target_netns = netns.as_ref().map(|netns| netns.fd.as_fd()).or(own.as_ref().map(AsFd::as_fd));
    let Some(target_netns) = target_netns else {
        return Err(KernelError::Other(format!("cannot create {device}: it has no network namespace")));
    };
    let make = |route: &mut Route| {
        let target = Target::Name(device);
        let mut batch = Batch::default();
        let pair = message::new_pair(device, outer, mtu, target_netns, &wanted, mac);
        batch.push(pair, NLM_F_CREATE | NLM_F_EXCL);
        let mut attributes = vec![message::alias(&format!("endpoint {name}"))];
        if bridge.is_some() {
            attributes.push(message::port(device, hairpin));
        }
        if with_mtu_has_inet6(mtu) {
            attributes.push(message::no_link_local());
        }
        batch.push(message::set(target, attributes), 0);
        Ok::<_, KernelError>(route.execute(batch)?.0)
    };
    let mut results = make(route)?;
    if let Some(Err(Refusal { errno: EXFULL, .. })) = results.first() {
        // Doomed pairs that are not deleted yet still use ports of the bridge.
        sweeper.sweep_now()?;
        results = make(route)?;
    }
    let mut results = results.into_iter();
    if let Some(Err(refusal)) = results.next() {
        return Err(explain(refusal, &wanted));
    }
    // A port of a bridge needs no IPv6 of the host, and a routed endpoint only if it has an IPv6 address.
    let with_v6 = bridge.is_none() && addresses.iter().any(|net| net.addr().is_ipv6());
    let up = match results.find_map(Result::err) {
        Some(refusal) => Err(refusal.into_error(format!("cannot configure {device}"))),
        None => bring_up(route, device, with_v6),
    };
    let done = up.and_then(|answer| {
        let view = LinkView::parse(&answer).ok_or(KernelError::NoDevice(device))?;
        if let Some(rate) = bandwidth.ingress {
            rate::limit(route, (view.index, device.as_str()), mtu, rate)?;
        }
        match netns {
            Some(netns) => {
                let egress = bandwidth.egress.map(|rate| (rate, mtu));
                let inside = Inside { ifname, addresses, gateways, host_end, resolver, egress };
                finish(view, inside, netns_worker, netns.fd)
            }
            None => Ok((located(&view), wanted, Vec::new())),
        }
    });
    match done {
        Ok((located, ifname, gateways)) => {
            devices.add(device, located);
            if bridge.is_some() {
                // The request is sent for its side effect: before the kernel replies, it enables a port that has
                // just gained its carrier. Otherwise it does so at a later time.
                let _ = route.request(message::get_link_at(located.index), 0)?;
            }
            let link = Link::Endpoint { mtu, master: bridge, up: true, tuned: bridge.is_some(), hairpin };
            Ok(CreatedPair { index: located.index, link, made: CreatedEndpoint { ifname, mtu, gateways } })
        }
        Err(error) => {
            // This deletes both interfaces of the pair.
            if let Err(refusal) = route.request(message::del_link_named(device), 0)? {
                tracing::warn!(%device, ?refusal, "cannot delete the device of a failed attach");
            }
            Err(error)
        }
    }
}

/// Sets the host's interface up, after its IPv6 settings, which must be in force when the first packet arrives: the
/// kernel also adds a link-local address as soon as an interface is up. Returns the payload of its link message.
fn bring_up(route: &mut Route, device: Device, with_v6: bool) -> Result<Vec<u8>> {
    sysctl::set_host_v6(device, with_v6)?;
    let mut batch = Batch::default();
    batch.push(message::set_up(Target::Name(device), true), 0);
    batch.push(message::get_link(device), 0);
    let (results, answers) = route.execute(batch)?;
    if let Some(refusal) = results.into_iter().find_map(Result::err) {
        return Err(refusal.into_error(format!("cannot set {device} up")));
    }
    answers.into_iter().next().map(|answer| answer.payload).ok_or(KernelError::NoDevice(device))
}

/// The configuration of the peer interface in the workload's namespace.
#[derive(Debug)]
struct Inside {
    ifname: Option<String>,
    addresses: Vec<IpNet>,
    gateways: Vec<IpAddr>,
    host_end: HostEnd,
    resolver: Option<Resolver>,
    /// The limit of what it sends, and its MTU in bytes.
    egress: Option<(Rate, u16)>,
}

fn finish(
    view: LinkView<'_>,
    inside: Inside,
    netns_worker: &mut NetnsWorker,
    netns: OwnedFd,
) -> Result<(Located, String, Vec<IpAddr>)> {
    let peer = view.peer.ok_or_else(|| {
        KernelError::Other(format!(
            "{}: the kernel does not report the index of the peer interface",
            view.name
        ))
    })?;
    let (ifname, gateways) = netns_worker.run_in(netns, move |route| configure(route, peer, inside))?;
    Ok((located(&view), ifname, gateways))
}

fn located(view: &LinkView<'_>) -> Located {
    Located { index: view.index, peer: view.peer, peer_netns: view.peer_netns }
}

/// Configures the peer interface: its addresses, the routes to the resolver and the gateways, and default routes of
/// the address families that have none. `route` is a socket in its namespace. Returns the name of the interface and
/// the gateways of the default routes that were added.
fn configure(route: &mut Route, index: u32, inside: Inside) -> Result<(String, Vec<IpAddr>)> {
    let mut batch = Batch::default();
    batch.push(message::set_up(Target::Index(LOOPBACK), true), 0);
    batch.push(message::set_up(Target::Index(index), true), 0);
    batch.push(message::get_link_at(index), 0);
    for net in &inside.addresses {
        batch.push(message::new_address(index, *net), NLM_F_CREATE | NLM_F_EXCL);
    }
    let (results, answers) = route.execute(batch)?;
    let ifname = answers
        .first()
        .and_then(|answer| LinkView::parse(&answer.payload))
        .map(|view| view.name.to_owned())
        .or(inside.ifname)
        .ok_or_else(|| KernelError::Other("the new interface vanished from its namespace".to_owned()))?;
    let mut results = results.into_iter();
    for (name, result) in ["lo", &ifname].into_iter().zip(&mut results) {
        result.map_err(|refusal| refusal.into_error(format!("cannot set {name} up in the namespace")))?;
    }
    results.next();
    if let Some((rate, mtu)) = inside.egress {
        rate::limit(route, (index, &ifname), mtu, rate)?;
    }
    for (net, result) in inside.addresses.iter().zip(results) {
        if let Err(refusal) = result {
            add_again(route, index, &ifname, *net, refusal)?;
        }
    }
    if let Some(resolver) = &inside.resolver {
        let shared_segment = matches!(inside.host_end, HostEnd::Port(..));
        resolver::add_routes(route, index, &ifname, resolver, &inside.addresses, shared_segment)?;
    }
    if let HostEnd::Routed { mac, routes } = inside.host_end {
        let results = reach_gateways(route, index, mac, &routes)?;
        results.into_iter().collect::<std::result::Result<(), _>>().map_err(|refusal| {
            refusal.into_error(format!("cannot set the routes of {ifname} in the namespace"))
        })?;
    }
    let gateways = add_default_routes(route, index, inside.gateways)?;
    Ok((ifname, gateways))
}

/// Adds default routes of the address families that have none. Returns the gateways of those that it added.
fn add_default_routes(route: &mut Route, index: u32, gateways: Vec<IpAddr>) -> Result<Vec<IpAddr>> {
    let mut added = Vec::new();
    for gateway in gateways {
        if has_default_route(route, message::family(gateway))? {
            continue;
        }
        route.request(message::default_route(index, gateway), NLM_F_CREATE | NLM_F_EXCL)?.map_err(
            |refusal| {
                refusal.into_error(format!("cannot set the default route via {gateway} in the namespace"))
            },
        )?;
        added.push(gateway);
    }
    Ok(added)
}

/// Puts back what peer interfaces in one namespace have lost, in the order in which they were created. An interface that
/// is down, or in another namespace, is left as it is.
pub(super) fn mend(
    route: &mut Route,
    netns_worker: &mut NetnsWorker,
    netns: Netns,
    specs: Vec<PeerSpec>,
) -> Result<Vec<Mended>> {
    let mut devices = Devices::default();
    devices.find(route, specs.iter().map(|spec| spec.device))?;
    let id = netns::id_of(route, &netns)?;
    let mut peers: Vec<(u32, PeerSpec)> = specs
        .into_iter()
        .filter_map(|spec| {
            let located = devices.get(route, spec.device).ok()?;
            located.peer.filter(|_| located.peer_netns == id).map(|index| (index, spec))
        })
        .collect();
    peers.sort_by_key(|(index, _)| *index);
    if peers.is_empty() {
        return Ok(Vec::new());
    }
    netns_worker.run_in(netns.fd, move |route| {
        let mended = peers.into_iter().map(|(index, spec)| mend_one(route, index, spec));
        mended.filter_map(Result::transpose).collect()
    })
}

/// Puts back what one peer interface has lost. `route` is a socket in its namespace. `None` if there is no such interface.
fn mend_one(route: &mut Route, index: u32, spec: PeerSpec) -> Result<Option<Mended>> {
    let PeerSpec { device, addresses, gateways, host_end, resolver } = spec;
    let mut batch = Batch::default();
    batch.push(message::get_link_at(index), 0);
    let (_, answers) = route.execute(batch)?;
    let Some(view) = answers.first().and_then(|answer| LinkView::parse(&answer.payload)) else {
        return Ok(None);
    };
    let mut mended = Mended { device, mac: view.mac, changed: false };
    if !view.up {
        return Ok(Some(mended));
    }
    let ifname = view.name.to_owned();
    let mut batch = Batch::default();
    for net in &addresses {
        batch.push(message::new_address(index, *net), NLM_F_CREATE | NLM_F_EXCL);
    }
    let (results, _) = route.execute(batch)?;
    for (net, result) in addresses.iter().zip(results) {
        match result {
            Err(Refusal { errno: EEXIST, .. }) => continue,
            Err(refusal) => add_again(route, index, &ifname, *net, refusal)?,
            Ok(_) => {}
        }
        mended.changed = true;
    }
    if let Some(resolver) = &resolver {
        let shared_segment = matches!(host_end, HostEnd::Port(..));
        resolver::add_routes(route, index, &ifname, resolver, &addresses, shared_segment)?;
    }
    if let HostEnd::Routed { mac, routes } = host_end {
        for result in reach_gateways(route, index, mac, &routes)? {
            match result {
                Err(refusal) if refusal.errno != EEXIST => {
                    return Err(
                        refusal.into_error(format!("cannot set the routes of {ifname} in the namespace"))
                    );
                }
                Ok(()) | Err(_) => {}
            }
        }
    }
    mended.changed |= !add_default_routes(route, index, gateways)?.is_empty();
    Ok(Some(mended))
}

/// Adds the routes of a routed endpoint: the gateways resolve to the MAC address of the host's interface, and the
/// prefixes are routed through them. Returns the result of each request.
fn reach_gateways(
    route: &mut Route,
    index: u32,
    mac: Mac,
    routes: &[(IpAddr, IpNet)],
) -> Result<Vec<std::result::Result<(), Refusal>>> {
    let mut batch = Batch::default();
    for (gateway, behind) in routes {
        // The interface may have entries of another network.
        let put = NLM_F_CREATE | NLM_F_REPLACE;
        batch.push(message::permanent_neighbour(index, *gateway, mac), put);
        batch.push(message::inner_route(index, IpNet::from(*gateway), None), NLM_F_CREATE | NLM_F_EXCL);
        batch.push(message::inner_route(index, *behind, Some(*gateway)), NLM_F_CREATE | NLM_F_EXCL);
    }
    Ok(route.execute(batch)?.0)
}

/// Turns IPv6 on for the interface and adds the address again. Container runtimes turn IPv6 off in namespaces
/// without IPv6 networks.
fn add_again(route: &mut Route, index: u32, ifname: &str, net: IpNet, refusal: Refusal) -> Result<()> {
    let action = || format!("cannot add address {net} to {ifname}");
    if refusal.errno != EACCES || net.addr().is_ipv4() {
        return Err(refusal.into_error(action()));
    }
    sysctl::allow_v6(ifname).map_err(|error| {
        KernelError::io(format!("cannot turn on IPv6 on {ifname} in the namespace"), &error)
    })?;
    route
        .request(message::new_address(index, net), NLM_F_CREATE | NLM_F_EXCL)?
        .map_err(|refusal| refusal.into_error(action()))
}

/// Converts the refusal of a new pair. `EEXIST` is about the name of the peer interface: the caller has checked that
/// the host's interface does not exist.
fn explain(refusal: Refusal, ifname: &str) -> KernelError {
    match refusal.errno {
        EOPNOTSUPP => KernelError::MissingFeature { feature: "veth pairs", module: "veth" },
        EEXIST => KernelError::Other(format!("the namespace already has an interface {ifname}")),
        EXFULL => KernelError::Other(
            "the bridge of the network has the maximum of 1,024 ports (endpoints and the VXLAN device): attach \
             on another host, or to another network"
                .to_owned(),
        ),
        _ => refusal.into_error(format!("cannot create interface {ifname} in the namespace")),
    }
}

/// Whether the kernel accepts an interface name and does not expand it (`%`).
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 15
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control())
}

/// Sets the MTU of peer interfaces in one namespace. `peers` are their indexes and MTUs.
pub(super) fn set_peer_mtu(
    netns_worker: &mut NetnsWorker,
    netns: OwnedFd,
    peers: Vec<(u32, u16)>,
) -> Result<Vec<Result<()>>> {
    netns_worker.run_in(netns, move |route| {
        let mut batch = Batch::default();
        for (index, mtu) in &peers {
            let mtu = LinkAttribute::Mtu(u32::from(*mtu));
            batch.push(message::set(Target::Index(*index), vec![mtu]), 0);
        }
        let (results, _) = route.execute(batch)?;
        Ok(results
            .into_iter()
            .map(|result| result.map_err(|refusal| refusal.into_error("cannot set the MTU in the namespace")))
            .collect())
    })
}
