//! The way of a packet as ovl should carry it, and as the kernel's entries say, on the host of the sender. [`super::arrive`]
//! goes on at the destination.
//!
//! Decisions are not made again here. Policies are asked ([`crate::policy::judgement`]), Services and published ports are
//! looked up in the elements of their tables, and routes, neighbours and FDB entries in the desired data plane. An entry
//! that is missing in the kernel ends the way. The module owns no state. Begin to read at [`leave`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::{Node, Placed, View};
use ovl_control::{PeerState, TraceStage as Stage};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::nft::Table;
use ovl_dataplane::observed::Inside;
use ovl_dataplane::passage::ProbeKind;
use ovl_dataplane::state::{Dataplane, Hop, Link};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::resource::Protocol;
use ovl_proto::table::Endpoint;
use ovl_subsystems::policy::admitted::AdmittedAt;
use ovl_subsystems::policy::{Direction, protocol_number};
use ovl_subsystems::publish::published;
use ovl_subsystems::services::{Client, Translated, translate};

use super::question::{describe, host_with, with_address};
use super::step::{Arrival, Carriage, Spot, Step};
use crate::policy::judgement;

/// What is known on one host.
pub(crate) struct Here<'a> {
    /// The cluster.
    pub view: &'a View,
    /// What workloads were told for domain names of policies.
    pub admitted: AdmittedAt<'a>,
    /// What the kernel should hold.
    pub desired: &'a Dataplane,
    /// What the kernel holds.
    pub actual: &'a Dataplane,
    /// The addresses of this host.
    pub own: &'a [IpAddr],
    /// The ranges of cluster addresses of Services.
    pub services: &'a [IpNet],
    /// What is known of the paths to other hosts that carry no packets of workloads.
    pub broken: &'a BTreeMap<NodeId, String>,
}

/// The packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow<'a> {
    /// The sender; `None` for the host.
    pub from: Option<&'a Endpoint>,
    /// The address that it sends from.
    pub source: IpAddr,
    /// The address that it sends to.
    pub to: IpAddr,
    /// What it sends.
    pub kind: ProbeKind,
}

/// What is known of an interface in the namespace of a workload.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interface {
    /// Its name.
    pub name: String,
    /// Its state. `None` if there is none of that name.
    pub state: Option<Inside>,
    /// Why it could not be looked at.
    pub error: Option<String>,
    /// Whether something listens at the destination port. `None` if it is not known.
    pub listens: Option<bool>,
}

/// One of the ways that a packet may go, which differ in the backend of a Service.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// The destination, after translation.
    pub to: (IpAddr, Option<u16>),
    /// The steps on the host of the sender, behind those that all ways have.
    pub steps: Vec<Step>,
    /// The host to which it goes, which may be this one. `None`: outside of the cluster, or nowhere.
    pub host: Option<NodeId>,
    /// How it arrives there.
    pub arrival: Option<Arrival>,
}

/// Addresses and ports to which a packet is translated.
pub(super) type Destinations = Vec<(IpAddr, Option<u16>)>;

/// What becomes of a packet on the host of its sender.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leaving {
    /// The steps of all ways.
    pub steps: Vec<Step>,
    /// The ways: several if a Service has several backends. Empty if it ends before.
    pub ways: Vec<Way>,
}

/// Returns the port of a probe with its protocol.
pub(crate) fn port(kind: ProbeKind) -> Option<(Protocol, u16)> {
    match kind {
        ProbeKind::Echo => None,
        ProbeKind::Tcp(port) => Some((Protocol::Tcp, port)),
        ProbeKind::Udp(port) => Some((Protocol::Udp, port)),
    }
}

/// Returns a probe of the same kind to another port.
pub(crate) fn to_port(kind: ProbeKind, port: Option<u16>) -> ProbeKind {
    match (kind, port) {
        (ProbeKind::Tcp(_), Some(port)) => ProbeKind::Tcp(port),
        (ProbeKind::Udp(_), Some(port)) => ProbeKind::Udp(port),
        (kind, _) => kind,
    }
}

/// Returns the steps of a packet on the host of its sender.
pub(crate) fn leave(here: &Here<'_>, flow: Flow<'_>, interface: &Interface) -> Leaving {
    let mut leaving = Leaving::default();
    if let Some(from) = flow.from {
        leaving.steps.push(sender(from, interface));
        leaving.steps.push(source_check(here, from, flow.source));
    }
    let is_own = here.own.contains(&flow.to);
    let client = if flow.from.is_some() { Client::Endpoint } else { Client::Host };
    let plain = (flow.to, port(flow.kind).map(|(_, port)| port));
    let (step, targets) = translation(here, flow, client, is_own);
    let is_translated = step.is_some();
    leaving.steps.extend(step);
    let targets = targets.unwrap_or_else(|| vec![plain]);
    leaving.ways = targets.into_iter().map(|to| way(here, flow, to, is_translated)).collect();
    leaving
}

fn sender(from: &Endpoint, interface: &Interface) -> Step {
    let Interface { name, state, error, .. } = interface;
    let command = format!("ovlctl exec {} -- ip addr show dev {name}", from.name);
    let spot = Spot::Inside(true);
    let step = match (state, error) {
        (_, Some(error)) => Step::unknown(Stage::Sender, format!("{name}: {error}"), command),
        (None, None) => Step::stops(
            Stage::Sender,
            format!("there is no interface {name} in the namespace"),
            command,
            "detach and attach the endpoint, or start its container again",
        ),
        (Some(state), None) if !state.up => Step::stops(
            Stage::Sender,
            format!("interface {name} is down"),
            command,
            format!("set it up: ovlctl exec {} -- ip link set {name} up", from.name),
        ),
        (Some(state), None) => {
            Step::passes(Stage::Sender, format!("interface {name}, up, MTU {}", state.mtu), command)
        }
    };
    step.at(spot)
}

/// Returns the step of the source checks: an endpoint sends from its own addresses and from those that it was given.
fn source_check(here: &Here<'_>, from: &Endpoint, source: IpAddr) -> Step {
    let device = Device::endpoint(from.id);
    let is_routed = network(here.view, from).is_some_and(|network| network.mode == Mode::L3);
    let family = if is_routed { "inet" } else { "bridge" };
    let command = format!("nft list table {family} ovl-guard");
    let spot = Spot::Device(device.to_string(), false);
    let own = from.addresses.iter().any(|net| net.addr() == source);
    let allowed = from.allowed.iter().any(|net| net.contains(&source));
    if !here.actual.links.contains_key(&device) {
        return Step::stops(
            Stage::SourceCheck,
            format!("there is no device {device}"),
            format!("ip link show dev {device}"),
            "detach and attach the endpoint",
        )
        .at(spot);
    }
    match own || allowed {
        true => Step::passes(Stage::SourceCheck, format!("{device}: sends from {source}"), command),
        false => Step::stops(
            Stage::SourceCheck,
            format!("{device}: {source} is not an address of the endpoint"),
            command,
            "send from its own address, or attach it with --allow",
        ),
    }
    .at(spot)
}

/// Returns the step of the translation for a Service or a published port, and the destinations behind it. `None` in both if
/// nothing is translated. No destinations if the packet ends there.
pub(super) fn translation(
    here: &Here<'_>,
    flow: Flow<'_>,
    client: Client,
    is_own: bool,
) -> (Option<Step>, Option<Destinations>) {
    let none = (None, None);
    let command = "nft list table inet ovl-services";
    let what = describe(here.view, flow.to);
    let is_reserved = here.desired.tables.contains_key(&Table::Services)
        && here.services.iter().any(|range| range.contains(&flow.to));
    let Some((protocol, number)) = port(flow.kind) else {
        if is_reserved && !is_own {
            let step = Step::stops(
                Stage::Service,
                format!("{what}: a Service answers at its ports only, and refuses ICMP"),
                command,
                "trace one of its ports: TO:PORT",
            );
            return (Some(step), Some(Vec::new()));
        }
        return none;
    };
    let at = (flow.to, protocol_number(protocol), number);
    match translate(&here.desired.elements, client, flow.source, at, is_own) {
        Some(Translated::To(all)) => {
            let shown: Vec<String> = all
                .iter()
                .take(3)
                .map(|(address, port)| std::net::SocketAddr::new(*address, *port).to_string())
                .collect();
            let more = if all.len() > shown.len() {
                format!(" and {} more", all.len() - shown.len())
            } else {
                String::new()
            };
            let detail = format!("{what} port {number}: to {}{more}", shown.join(", "));
            let step = Step::passes(Stage::Service, detail, command);
            (Some(step), Some(all.into_iter().map(|(address, port)| (address, Some(port))).collect()))
        }
        Some(Translated::Refused) => {
            let step = Step::stops(
                Stage::Service,
                format!("{what} port {number} has no ready backend: it refuses connections"),
                command,
                "`ovlctl describe svc NAME` lists its backends: check its selector, and whether they are ready",
            );
            (Some(step), Some(Vec::new()))
        }
        Some(Translated::Dropped) => {
            let step = Step::stops(
                Stage::Service,
                format!("{what} port {number} has no backend on this host, and the traffic policy Local"),
                command,
                "use a host with a backend, or the traffic policy Cluster",
            );
            (Some(step), Some(Vec::new()))
        }
        Some(Translated::NotLetIn) => {
            let step = Step::stops(
                Stage::Service,
                format!("{what} port {number} does not let this source in: spec.loadBalancerSourceRanges"),
                command,
                "add the source to spec.loadBalancerSourceRanges of the Service",
            );
            (Some(step), Some(Vec::new()))
        }
        None if is_own => match published(&here.desired.elements, at) {
            Some((address, port)) => {
                let detail = format!("port {number} of the host is published: to {address} port {port}");
                let step = Step::passes(Stage::PublishedPort, detail, "nft list table inet ovl-publish");
                (Some(step), Some(vec![(address, Some(port))]))
            }
            None => none,
        },
        None if is_reserved => {
            let step = Step::stops(
                Stage::Service,
                format!("{what}: no Service has {protocol} port {number} at this address"),
                command,
                "`ovlctl get svc -A` lists the Services and their ports",
            );
            (Some(step), Some(Vec::new()))
        }
        None => none,
    }
}

/// Returns the way to a destination.
fn way(here: &Here<'_>, flow: Flow<'_>, to: (IpAddr, Option<u16>), is_translated: bool) -> Way {
    let view = here.view;
    let mut way = Way { to, steps: Vec::new(), host: None, arrival: None };
    let kind = to_port(flow.kind, to.1);
    if let Some(from) = flow.from {
        way.steps.push(policy(here, (flow.source, to.0), kind, Direction::Egress, is_switched(view, from)));
    }
    let target = with_address(view, to.0);
    if let Some(step) = isolation(here, flow, to.0, target, is_translated) {
        let ends = step.state != ovl_control::TraceState::Passes;
        way.steps.push(step);
        if ends {
            return way;
        }
    }
    match target {
        Some(placed) => to_endpoint(here, flow, placed, is_translated, &mut way),
        None if here.own.contains(&to.0) => {
            way.host = Some(view.me);
            way.arrival = Some(Arrival { source: flow.source, to: to.0, carriage: Carriage::Local });
        }
        None => match (host_with(view, to.0), network_of(view, to.0)) {
            (Some(node), _) => to_host(here, flow, node, &mut way),
            (None, Some(network)) => way.steps.push(no_endpoint(here, network, to.0)),
            (None, None) => outside(flow, to.0, &mut way),
        },
    }
    way
}

/// Returns the step of the policies of one end.
pub(super) fn policy(
    here: &Here<'_>,
    (from, to): (IpAddr, IpAddr),
    kind: ProbeKind,
    direction: Direction,
    switched: bool,
) -> Step {
    let judged = judgement(here.view, here.admitted, from, to, port(kind));
    let (stage, side) = match direction {
        Direction::Egress => (Stage::EgressPolicy, judged.egress),
        Direction::Ingress => (Stage::IngressPolicy, judged.ingress),
    };
    let family = if switched { "bridge" } else { "inet" };
    let command = format!("nft list table {family} ovl-policy");
    match side.passes {
        true => Step::passes(stage, side.why, command),
        false => {
            let advice = match port(kind) {
                Some((protocol, port)) => format!(
                    "allow it by a rule in a policy: `ovlctl policy explain {from} {}/{}`",
                    std::net::SocketAddr::new(to, port),
                    protocol.to_string().to_lowercase()
                ),
                None => format!(
                    "a policy with ports allows no ICMP: trace TO:PORT, or see `ovlctl policy explain {from} {to}`"
                ),
            };
            Step::stops(stage, side.why, command, advice)
        }
    }
}

/// Returns the step at which networks are kept apart. `None` if both ends are on one network, or the sender is the host.
fn isolation(
    here: &Here<'_>,
    flow: Flow<'_>,
    to: IpAddr,
    target: Option<Placed<'_>>,
    is_translated: bool,
) -> Option<Step> {
    let from = network(here.view, flow.from?)?;
    let other = match target {
        Some(placed) => Some(network(here.view, placed.endpoint)?),
        None => network_of(here.view, to),
    };
    if other.is_some_and(|other| other.id == from.id) {
        return None;
    }
    let command = "nft list chain inet ovl forward";
    let internal = [Some(from), other].into_iter().flatten().find(|network| network.internal);
    if let Some(internal) = internal {
        let detail = format!("network {} is internal: its endpoints reach only each other", internal.name);
        let advice = "attach both to one network, or use a network without --internal";
        return Some(Step::stops(Stage::Isolation, detail, command, advice));
    }
    let other = other?;
    let (detail, advice) = (
        format!("networks {} and {} are kept apart", from.name, other.name),
        "attach both to one network, or use a Service or a published port",
    );
    Some(match is_translated {
        true => Step::passes(Stage::Isolation, format!("{detail}, but this address was translated"), command),
        false => Step::stops(Stage::Isolation, detail, command, advice),
    })
}

/// Adds the steps of the way to an endpoint.
fn to_endpoint(here: &Here<'_>, flow: Flow<'_>, placed: Placed<'_>, is_translated: bool, way: &mut Way) {
    let view = here.view;
    let Some(network) = network(view, placed.endpoint) else { return };
    let host = placed.node.record.id;
    way.host = Some(host);
    let carriage = match (network.mode, host == view.me) {
        (Mode::L2, true) => {
            // What is bridged and what is routed to a bridge are found by the same entry.
            way.steps.push(local_port(here, placed.endpoint));
            Carriage::Local
        }
        (Mode::L3, true) => {
            way.steps.push(route(here, way.to.0).0);
            Carriage::Local
        }
        (Mode::L2, false) => {
            let bridge = Device::bridge(network.id);
            if (flow.from.is_none() || is_translated)
                && let Some(step) = neighbour(here, bridge, way.to.0)
            {
                way.steps.push(step);
            }
            let plain = Device::vxlan(network.id);
            let sealed = Device::sealed_vxlan(network.id);
            // A network that is encrypted only to some hosts has two.
            let is_second = here.desired.remotes.contains_key(&(sealed, placed.endpoint.mac));
            let device = if is_second { sealed } else { plain };
            let (step, vtep) = remote(here, device, placed.endpoint.mac, &describe(view, way.to.0));
            way.steps.push(step);
            let Some(vtep) = vtep else { return };
            match network.encrypted || is_second {
                true => in_tunnel(here, way, placed.node, Some(device)),
                false => in_vxlan(here, way, placed.node, device, vtep),
            }
        }
        (Mode::L3, false) => {
            let (step, hop) = route(here, way.to.0);
            way.steps.push(step);
            let Some(hop) = hop else { return };
            match hop.device.map(|device| (device, device.role())) {
                Some((device, Some(Role::Vxlan(_)))) => {
                    let Some(gateway) = hop.gateway else { return };
                    way.steps.extend(neighbour(here, device, gateway));
                    let mac = here.desired.neighbours.get(&(device, gateway)).copied().unwrap_or_default();
                    let (step, vtep) =
                        remote(here, device, mac, &format!("host {}", placed.node.record.name));
                    way.steps.push(step);
                    let Some(vtep) = vtep else { return };
                    in_vxlan(here, way, placed.node, device, vtep)
                }
                Some((_, Some(Role::Tunnel(_)))) => in_tunnel(here, way, placed.node, None),
                _ => {
                    let via = hop.gateway.map_or_else(String::new, |gateway| format!(" to {gateway}"));
                    let detail = format!("by the underlay without encapsulation{via}");
                    way.steps.push(
                        Step::passes(Stage::Leaves, detail, format!("ip route get {}", way.to.0))
                            .at(Spot::Underlay { outgoing: true, in_vxlan: false }),
                    );
                    Carriage::Plain
                }
            }
        }
    };
    if host != view.me {
        way.steps.push(liveness(here, placed.node));
    }
    let is_foreign = flow.from.is_some_and(|from| from.network != network.id);
    // What leaves the network of its sender for another host is masqueraded: by the kernel's choice with the source of the route
    // for IPv6, which is in the network, and with an address of another device for IPv4.
    let crosses = is_foreign && host != view.me && network.mode == Mode::L3;
    let gateway = view.first_gateway(network.id, view.me, way.to.0).filter(|_| crosses);
    let is_inside = gateway.is_some() && way.to.0.is_ipv6();
    // Translation on this host counts here alone: on the other host the packet comes out of VXLAN with a foreign source.
    if crosses && !is_inside && carriage != Carriage::Plain {
        way.steps.push(kept_apart(here, network, placed.node));
    }
    let source = match gateway {
        Some(gateway) => gateway,
        None => flow.source,
    };
    way.arrival = Some(Arrival { source, to: way.to.0, carriage });
}

/// Adds the step by which a packet leaves in VXLAN.
fn in_vxlan(here: &Here<'_>, way: &mut Way, node: &Node, device: Device, vtep: IpAddr) -> Carriage {
    let (vni, port, mtu) = match here.desired.links.get(&device) {
        Some(Link::Vxlan { vni, port, mtu, .. }) => (*vni, *port, *mtu),
        _ => (0, node.record.vxlan_port, 0),
    };
    let detail = format!("{device}: VXLAN {vni} to {vtep} UDP port {port}, MTU {mtu}");
    way.steps.push(
        Step::passes(Stage::Leaves, detail, format!("ip -d link show dev {device}"))
            .at(Spot::Underlay { outgoing: true, in_vxlan: true }),
    );
    Carriage::Vxlan(device.to_string())
}

/// Adds the step by which a packet leaves in the tunnel. A switched network has a VXLAN device as well.
fn in_tunnel(here: &Here<'_>, way: &mut Way, node: &Node, vxlan: Option<Device>) -> Carriage {
    let tunnel = here.desired.links.keys().find(|device| matches!(device.role(), Some(Role::Tunnel(_))));
    let is_tap =
        vxlan.is_some_and(|device| matches!(here.desired.links.get(&device), Some(Link::Tap { .. })));
    let outer = tunnel.filter(|_| !is_tap);
    let seen = outer.copied().or(vxlan);
    let detail = format!("in the tunnel to host {}, encrypted", node.record.name);
    let command = tunnel.map_or_else(|| "ovlctl peers".to_owned(), |device| format!("wg show {device}"));
    let step = Step::passes(Stage::Leaves, detail, command);
    way.steps.push(match seen {
        Some(device) => step.at(Spot::Device(device.to_string(), true)),
        None => step,
    });
    Carriage::Tunnel(outer.map(ToString::to_string), vxlan.map(|device| device.to_string()))
}

/// Returns the step of the FDB entry behind which port of the bridge an endpoint of this host is.
fn local_port(here: &Here<'_>, endpoint: &Endpoint) -> Step {
    let device = Device::endpoint(endpoint.id);
    let command = format!("bridge fdb show dev {device}");
    let key = (device, endpoint.mac);
    match (here.desired.ports.contains(&key), here.actual.ports.contains(&key)) {
        (true, true) => {
            Step::passes(Stage::Fdb, format!("{} is behind {device} on this host", endpoint.mac), command)
        }
        (true, false) => {
            missing(Stage::Fdb, &format!("the FDB entry of {} at {device}", endpoint.mac), command)
        }
        (false, _) => not_wanted(Stage::Fdb, &format!("{} at {device}", endpoint.mac), command),
    }
}

/// Returns the step of the FDB entry of a VXLAN device, and the VTEP.
fn remote(here: &Here<'_>, device: Device, mac: ovl_proto::id::Mac, whose: &str) -> (Step, Option<IpAddr>) {
    let command = format!("bridge fdb show dev {device}");
    let Some(remote) = here.desired.remotes.get(&(device, mac)) else {
        return (not_wanted(Stage::Fdb, &format!("{whose}, {mac}, at {device}"), command), None);
    };
    let step = match here.actual.remotes.get(&(device, mac)) == Some(remote) {
        true => Step::passes(Stage::Fdb, format!("{mac} is behind VTEP {}", remote.vtep), command),
        false => missing(Stage::Fdb, &format!("the FDB entry of {mac} at {device}"), command),
    };
    (step.at(Spot::Device(device.to_string(), true)), Some(remote.vtep))
}

/// Returns the step of a neighbour entry. `None` if none is wanted.
fn neighbour(here: &Here<'_>, device: Device, address: IpAddr) -> Option<Step> {
    let mac = here.desired.neighbours.get(&(device, address))?;
    let command = format!("ip neigh show {address} dev {device}");
    Some(match here.actual.neighbours.get(&(device, address)) == Some(mac) {
        true => Step::passes(Stage::Neighbour, format!("{address} is {mac} on {device}"), command),
        false => missing(Stage::Neighbour, &format!("the neighbour {address} on {device}"), command),
    })
}

/// Returns the step of the route to an address of a routed network, and the route.
fn route(here: &Here<'_>, to: IpAddr) -> (Step, Option<Hop>) {
    let command = format!("ip route get {to}");
    let fits = |routes: &BTreeMap<IpNet, Hop>| {
        let all = routes.iter().filter(|(net, _)| net.contains(&to));
        all.max_by_key(|(net, _)| net.prefix_len()).map(|(net, hop)| (*net, *hop))
    };
    let Some((net, hop)) = fits(&here.desired.routes) else {
        return (
            Step::unknown(Stage::Route, "by the routers of the underlay", command),
            Some(Hop::UNREACHABLE),
        );
    };
    if hop == Hop::UNREACHABLE {
        let detail = format!("{net} is unreachable: no live host holds the block of {to}");
        let advice = "`ovlctl subnets` lists the blocks, and `ovlctl peers` the hosts";
        return (Step::stops(Stage::Route, detail, command, advice), None);
    }
    if fits(&here.actual.routes) != Some((net, hop)) {
        return (missing(Stage::Route, &format!("the route to {net}"), command), Some(hop));
    }
    let via = hop.gateway.map_or_else(String::new, |gateway| format!(" via {gateway}"));
    let device = hop.device.map_or_else(|| " by the underlay".to_owned(), |device| format!(" dev {device}"));
    (Step::passes(Stage::Route, format!("{net}{via}{device}"), command), Some(hop))
}

fn missing(stage: Stage, what: &str, command: String) -> Step {
    let advice = "ovld puts it back within a minute: `ovlctl plan` shows what is missing, `ovlctl events` who was at it";
    Step::stops(stage, format!("{what} is missing in the kernel"), command, advice)
}

fn not_wanted(stage: Stage, what: &str, command: String) -> Step {
    let advice = "`ovlctl endpoints` and `ovlctl status` say why: the address is another host's, or the network is not built";
    Step::stops(
        stage,
        format!("there is no entry for {what}: the endpoint or its host is not used"),
        command,
        advice,
    )
}

/// Returns the step for an address of a network that no endpoint has.
fn no_endpoint(here: &Here<'_>, network: &Network, to: IpAddr) -> Step {
    let holder = here.view.holder_of(network.id, to).map(|holder| here.view.name_of(holder));
    let held = holder.map_or_else(String::new, |name| format!(" (host {name} holds its block)"));
    let is_known = here.view.all_with_address(network.id, to).next();
    if let Some(placed) = is_known {
        return liveness(here, placed.node);
    }
    Step::stops(
        Stage::Neighbour,
        format!("no endpoint of network {} has the address {to}{held}", network.name),
        format!("ip neigh show {to}"),
        "`ovlctl endpoints` lists all endpoints and their addresses",
    )
}

/// Returns the step of a packet of another network on the host of its destination. A host that has one network alone does not
/// keep networks apart, and it does not tell others of its bridge networks.
fn kept_apart(here: &Here<'_>, network: &Network, node: &Node) -> Step {
    let (view, name) = (here.view, &node.record.name);
    let is_there = |id: NetworkId| view.hosts_on(id).any(|there| there.record.id == node.record.id);
    let command = "nft list chain inet ovl forward";
    if view.networks.keys().filter(|id| is_there(**id)).count() < 2 {
        let detail = format!("host {name} keeps {} apart from other networks, if it has any", network.name);
        return Step::unknown(Stage::Isolation, detail, command);
    }
    Step::stops(
        Stage::Isolation,
        format!(
            "the sender is on another network than {}, and host {name} keeps them apart: a Service or a port leads to \
             another network's endpoints on the own host alone",
            network.name
        ),
        command,
        "give the Service backends on the network of its clients",
    )
}

/// Returns the step of the liveness of another host.
fn liveness(here: &Here<'_>, node: &Node) -> Step {
    let (name, command) = (&node.record.name, "ovlctl peers");
    if !here.view.alloc.members.contains(&node.record.id) {
        let advice = format!("let it join again: `ovlctl peers admit {name}`");
        return Step::stops(Stage::Host, format!("host {name} is no member of the cluster"), command, advice);
    }
    match node.state {
        PeerState::Alive => match here.broken.get(&node.record.id) {
            None => Step::passes(Stage::Host, format!("host {name} is alive"), command),
            Some(why) => Step::stops(
                Stage::Host,
                why.clone(),
                command,
                format!(
                    "open UDP port {} between the hosts in firewalls and security groups",
                    node.record.vxlan_port
                ),
            ),
        },
        PeerState::Suspect => {
            Step::unknown(Stage::Host, format!("host {name} is suspect: its ovld does not answer"), command)
        }
        PeerState::Dead | PeerState::Left => {
            let word = if node.state == PeerState::Left { "has left the cluster" } else { "is dead" };
            let advice = format!("start host {name} or its ovld, or move its workloads: `ovlctl peers`");
            Step::stops(Stage::Host, format!("host {name} {word}"), command, advice)
        }
    }
}

/// Adds the steps of the way to another host itself.
fn to_host(here: &Here<'_>, flow: Flow<'_>, node: &Node, way: &mut Way) {
    let own = here.view.own().map(|own| own.record.vtep);
    let source = match flow.from {
        // Packets of endpoints to the underlay are masqueraded.
        Some(_) => own.filter(|own| own.is_ipv4() == way.to.0.is_ipv4()).unwrap_or(flow.source),
        None => flow.source,
    };
    way.host = Some(node.record.id);
    underlay(flow, way);
    way.steps.push(match liveness(here, node) {
        // Its address is reached without VXLAN.
        step if here.broken.contains_key(&node.record.id) => {
            Step::passes(Stage::Host, format!("host {} is alive", node.record.name), step.command)
        }
        step => step,
    });
    way.arrival = Some(Arrival { source, to: way.to.0, carriage: Carriage::Plain });
}

fn outside(flow: Flow<'_>, to: IpAddr, way: &mut Way) {
    underlay(flow, way);
    way.steps.push(Step::unknown(
        Stage::Destination,
        format!("{to} is outside of the cluster: ovl does not know what is there"),
        format!("ip route get {to}"),
    ));
}

fn underlay(flow: Flow<'_>, way: &mut Way) {
    let masquerade = if flow.from.is_some() { ", from the address of the host (masqueraded)" } else { "" };
    way.steps.push(
        Step::passes(
            Stage::Leaves,
            format!("by the routes of the host{masquerade}"),
            format!("ip route get {}", way.to.0),
        )
        .at(Spot::Underlay { outgoing: true, in_vxlan: false }),
    );
}

fn network<'a>(view: &'a View, endpoint: &Endpoint) -> Option<&'a Network> {
    view.networks.get(&endpoint.network).map(|found| &found.network)
}

fn network_of(view: &View, address: IpAddr) -> Option<&Network> {
    let mut all = view.networks.values().map(|found| &found.network);
    all.find(|network| network.subnets.iter().any(|subnet| subnet.prefix.contains(&address)))
}

pub(super) fn is_switched(view: &View, endpoint: &Endpoint) -> bool {
    network(view, endpoint).is_some_and(|network| network.mode == Mode::L2)
}
