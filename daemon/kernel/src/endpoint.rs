//! An endpoint's pair of interfaces: made in one batch here and one inside of its namespace, or not
//! at all.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::link::LinkAttribute;
use nix::libc::{EACCES, EEXIST, EOPNOTSUPP, EXFULL};
use ovl_dataplane::state::Link;
use ovl_proto::id::Mac;

use super::apply::{Devices, Located, has_inet6};
use super::dump::has_default_route;
use super::error::{KernelError, Result};
use super::link::LinkView;
use super::message::{self, Outer, Target};
use super::netns::{self, Visitor};
use super::resolver::{self, Resolver};
use super::socket::{Batch, Refusal, Route};
use super::sweep::Sweeper;
use super::sysctl;
use super::{EndpointSpec, HostEnd, Made};

/// The kernel puts the first free number in.
const ANY_NAME: &str = "eth%d";

/// Every namespace's loopback device has this index.
pub(super) const LOOPBACK: u32 = 1;

/// What was made.
#[derive(Debug)]
pub(super) struct Created {
    pub(super) index: u32,
    pub(super) link: Link,
    pub(super) made: Made,
}

/// Makes the pair.
pub(super) fn create(
    route: &mut Route,
    devices: &mut Devices,
    visitor: &mut Visitor,
    sweeper: &Sweeper,
    spec: EndpointSpec,
) -> Result<Created> {
    let EndpointSpec { device, name, netns, ifname, mac, mtu, host_end, addresses, gateways, resolver } =
        spec;
    if let Some(name) = &ifname
        && !is_plain_name(name)
    {
        return Err(KernelError::Other(format!("'{name}' cannot be the name of an interface")));
    }
    let (outer, bridge, hairpin) = match host_end {
        HostEnd::Port(bridge, hairpin) => {
            devices.find(route, [bridge, device].into_iter())?;
            (Outer::Port(devices.get(route, bridge)?.index), Some(bridge), hairpin)
        }
        HostEnd::Routed { mac, .. } => (Outer::Alone(mac), None, false),
    };
    // With a device of this name there, all requests but the first would be for that device.
    match devices.get(route, device) {
        Err(KernelError::NoDevice(_)) => devices.forget(device),
        Err(error) => return Err(error),
        Ok(_) => return Err(KernelError::Other(format!("the device {device} is there already"))),
    }
    let wanted = ifname.as_deref().unwrap_or(ANY_NAME);
    let here = if netns.is_none() { Some(netns::own()?) } else { None };
    let place = netns.as_ref().map(|netns| netns.fd.as_fd()).or(here.as_ref().map(AsFd::as_fd));
    let Some(place) = place else { return Err(KernelError::Other("no namespace".to_owned())) };
    let make = |route: &mut Route| {
        let target = Target::Name(device);
        let mut batch = Batch::default();
        let pair = message::new_pair(device, outer, mtu, place, wanted, mac);
        batch.push(pair, NLM_F_CREATE | NLM_F_EXCL);
        let mut attributes = vec![message::alias(&format!("endpoint {name}"))];
        if bridge.is_some() {
            attributes.push(message::port(device, hairpin));
        }
        if has_inet6() {
            attributes.push(message::no_link_local());
        }
        batch.push(message::set(target, attributes), 0);
        // Only now: the kernel would make a link-local address at once.
        batch.push(message::set_up(target, true), 0);
        batch.push(message::get_link(device), 0);
        route.execute(batch)
    };
    let (mut results, mut answers) = make(route)?;
    if let Some(Err(Refusal { errno: EXFULL, .. })) = results.first() {
        // Pairs that were taken away and not swept yet are ports of the bridge still.
        sweeper.now()?;
        (results, answers) = make(route)?;
    }
    let mut results = results.into_iter();
    if let Some(Err(refusal)) = results.next() {
        return Err(explain(refusal, wanted));
    }
    let view = answers.first().and_then(|answer| LinkView::parse(&answer.payload));
    let done = match (results.find_map(Result::err), view) {
        (Some(refusal), _) => Err(refusal.into_error(format!("cannot set up {device}"))),
        (None, Some(view)) => match netns {
            Some(netns) => {
                let inside = Inside { ifname, addresses, gateways, host_end, resolver };
                finish(view, inside, visitor, netns.fd)
            }
            None => Ok((located(&view), wanted.to_owned(), Vec::new())),
        },
        (None, None) => Err(KernelError::NoDevice(device)),
    };
    match done {
        Ok((located, ifname, gateways)) => {
            devices.add(device, located);
            if bridge.is_some() {
                // Asking is for the effect: the kernel brings a port that has just got its carrier
                // into use before it answers, and else whenever it gets round to that.
                let _ = route.request(message::get_link_at(located.index), 0)?;
            }
            let link = Link::Endpoint { mtu, master: bridge, up: true, tuned: bridge.is_some(), hairpin };
            Ok(Created { index: located.index, link, made: Made { ifname, mtu, gateways } })
        }
        Err(error) => {
            // With its one end the other goes too.
            if let Err(refusal) = route.request(message::del_link_named(device), 0)? {
                tracing::warn!("{device} is left over from an attach that failed: {refusal:?}");
            }
            Err(error)
        }
    }
}

/// What is to be done inside.
#[derive(Debug)]
struct Inside {
    ifname: Option<String>,
    addresses: Vec<IpNet>,
    gateways: Vec<IpAddr>,
    host_end: HostEnd,
    resolver: Option<Resolver>,
}

fn finish(
    view: LinkView<'_>,
    inside: Inside,
    visitor: &mut Visitor,
    netns: OwnedFd,
) -> Result<(Located, String, Vec<IpAddr>)> {
    let peer =
        view.peer.ok_or_else(|| KernelError::Other("the kernel does not tell the other end".to_owned()))?;
    let (ifname, gateways) = visitor.visit(netns, move |route| configure(route, peer, inside))?;
    Ok((located(&view), ifname, gateways))
}

fn located(view: &LinkView<'_>) -> Located {
    Located { index: view.index, peer: view.peer, peer_netns: view.peer_netns }
}

/// Inside of the namespace: addresses, and default routes where there are none. Gives the
/// interface's name and the gateways of these routes.
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
        .ok_or_else(|| KernelError::Other("the namespace lost the interface at once".to_owned()))?;
    let mut results = results.into_iter();
    for (name, result) in ["lo", &ifname].into_iter().zip(&mut results) {
        result.map_err(|refusal| refusal.into_error(format!("cannot set {name} up in the namespace")))?;
    }
    results.next();
    for (net, result) in inside.addresses.iter().zip(results) {
        if let Err(refusal) = result {
            add_again(route, index, &ifname, *net, refusal)?;
        }
    }
    if let Some(resolver) = &inside.resolver {
        let guarded = matches!(inside.host_end, HostEnd::Port(..));
        resolver::lead(route, index, &ifname, resolver, &inside.addresses, guarded)?;
    }
    if let HostEnd::Routed { mac, routes } = inside.host_end {
        reach_gateways(route, index, &ifname, mac, &routes)?;
    }
    let mut gateways = Vec::new();
    for gateway in inside.gateways {
        if has_default_route(route, message::family(gateway))? {
            continue;
        }
        route.request(message::default_route(index, gateway), NLM_F_CREATE | NLM_F_EXCL)?.map_err(
            |refusal| {
                refusal.into_error(format!("cannot set the default route via {gateway} in the namespace"))
            },
        )?;
        gateways.push(gateway);
    }
    Ok((ifname, gateways))
}

/// The gateways are on the other end of the pair, and what is routed is behind them.
fn reach_gateways(
    route: &mut Route,
    index: u32,
    ifname: &str,
    mac: Mac,
    routes: &[(IpAddr, IpNet)],
) -> Result<()> {
    let mut batch = Batch::default();
    for (gateway, behind) in routes {
        // The interface may have been in use with another one.
        let put = NLM_F_CREATE | NLM_F_REPLACE;
        batch.push(message::permanent_neighbour(index, *gateway, mac), put);
        batch.push(message::inner_route(index, IpNet::from(*gateway), None), NLM_F_CREATE | NLM_F_EXCL);
        batch.push(message::inner_route(index, *behind, Some(*gateway)), NLM_F_CREATE | NLM_F_EXCL);
    }
    let (results, _) = route.execute(batch)?;
    let refused = results.into_iter().find_map(Result::err);
    refused.map_or(Ok(()), |refusal| {
        Err(refusal.into_error(format!("cannot set the routes of {ifname} in the namespace")))
    })
}

/// Runtimes turn IPv6 off in namespaces that shall have none; this one shall.
fn add_again(route: &mut Route, index: u32, ifname: &str, net: IpNet, refusal: Refusal) -> Result<()> {
    let action = || format!("cannot give {ifname} the address {net}");
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

/// That the host's end was not there before is known: it is the other end whose name is taken.
fn explain(refusal: Refusal, ifname: &str) -> KernelError {
    match refusal.errno {
        EOPNOTSUPP => KernelError::missing("veth pairs", "veth"),
        EEXIST => KernelError::Other(format!("the namespace already has an interface {ifname}")),
        EXFULL => KernelError::Other(
            "the network's bridge is full: the kernel takes 1,024 ports, endpoints and the VXLAN device together. Attach \
             to it on another host, or to another network"
                .to_owned(),
        ),
        _ => refusal.into_error(format!("cannot make the interface {ifname} in the namespace")),
    }
}

/// The kernel's rules, and no `%`, which it would replace.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 15
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control())
}

/// Gives other ends of pairs an MTU, each in its namespace.
pub(super) fn set_peer_mtu(
    visitor: &mut Visitor,
    netns: OwnedFd,
    peers: Vec<(u32, u16)>,
) -> Result<Vec<Result<()>>> {
    visitor.visit(netns, move |route| {
        let mut batch = Batch::default();
        for (index, mtu) in &peers {
            let mtu = LinkAttribute::Mtu(u32::from(*mtu));
            batch.push(message::set(Target::Index(*index), vec![mtu]), 0);
        }
        let (results, _) = route.execute(batch)?;
        Ok(results
            .into_iter()
            .map(|result| {
                result.map_err(|refusal| refusal.into_error("cannot set the MTU inside of the namespace"))
            })
            .collect())
    })
}
