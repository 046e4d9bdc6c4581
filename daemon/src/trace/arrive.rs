//! The way of a packet on the host of its destination.
//!
//! The module owns no state. Begin to read at [`arrive`].

use std::net::IpAddr;

use ovl_control::TraceStage as Stage;
use ovl_dataplane::device::Device;
use ovl_dataplane::passage::ProbeKind;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::table::Endpoint;
use ovl_subsystems::policy::Direction;
use ovl_subsystems::services::Client;

use super::model::{Destinations, Flow, Here, Interface, is_switched, policy, to_port, translation};
use super::question::with_address;
use super::step::{Arrival, Carriage, Spot, Step};

/// Returns the endpoint of this host to which a packet that arrives goes, if it goes to one.
pub(crate) fn receiver<'a>(here: &Here<'a>, arrival: &Arrival, kind: ProbeKind) -> Option<&'a Endpoint> {
    let (_, targets) = incoming(here, arrival, kind);
    let to = targets.and_then(|all| all.first().copied()).map_or(arrival.to, |(address, _)| address);
    with_address(here.view, to)
        .filter(|placed| placed.node.record.id == here.view.me)
        .map(|placed| placed.endpoint)
}

/// Returns the address to which a packet that arrives goes in the end, and what it then is.
pub(crate) fn inner(here: &Here<'_>, arrival: &Arrival, kind: ProbeKind) -> (IpAddr, ProbeKind) {
    let (_, targets) = incoming(here, arrival, kind);
    let first = targets.and_then(|all| all.first().copied());
    first.map_or((arrival.to, kind), |(address, port)| (address, to_port(kind, port)))
}

fn incoming(here: &Here<'_>, arrival: &Arrival, kind: ProbeKind) -> (Option<Step>, Option<Destinations>) {
    if arrival.carriage != Carriage::Plain {
        return (None, None);
    }
    let flow = Flow { from: None, source: arrival.source, to: arrival.to, kind };
    translation(here, flow, Client::Remote(arrival.source), here.own.contains(&arrival.to))
}

/// Returns the steps of a packet on the host of its destination. `interface` is that of the workload or, for the host
/// itself, only says what listens.
pub(crate) fn arrive(
    here: &Here<'_>,
    arrival: &Arrival,
    kind: ProbeKind,
    interface: &Interface,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let view = here.view;
    match &arrival.carriage {
        Carriage::Local => {}
        Carriage::Plain => steps.push(
            Step::passes(Stage::Enters, "by the underlay", format!("ip route get {}", arrival.source))
                .at(Spot::Underlay { outgoing: false, in_vxlan: false }),
        ),
        Carriage::Vxlan(device) => {
            let port = view.own().map_or(0, |own| own.record.vxlan_port);
            steps.push(
                Step::passes(
                    Stage::Enters,
                    format!("VXLAN at UDP port {port}"),
                    format!("ss -lnu sport = :{port}"),
                )
                .at(Spot::Underlay { outgoing: false, in_vxlan: true }),
            );
            steps.push(vxlan_device(here, device));
        }
        Carriage::Tunnel(outer, vxlan) => {
            if let Some(device) = outer {
                steps.push(
                    Step::passes(Stage::Enters, "decrypted by the tunnel", format!("wg show {device}"))
                        .at(Spot::Device(device.clone(), false)),
                );
            }
            steps.extend(vxlan.as_deref().map(|device| vxlan_device(here, device)));
        }
    }
    let (step, targets) = incoming(here, arrival, kind);
    steps.extend(step);
    let (to, kind) = match targets {
        Some(all) => match all.first() {
            Some((address, port)) => (*address, to_port(kind, *port)),
            None => return steps,
        },
        None => (arrival.to, kind),
    };
    match with_address(view, to) {
        Some(placed) if placed.node.record.id == view.me => {
            let endpoint = placed.endpoint;
            let switched = is_switched(view, endpoint);
            steps.push(policy(here, (arrival.source, to), kind, Direction::Ingress, switched));
            steps.push(delivery(here, endpoint));
            steps.push(destination(endpoint, to, kind, interface));
        }
        Some(placed) => {
            let detail = format!("sent on to host {}", placed.node.record.name);
            steps.push(Step::unknown(Stage::Destination, detail, format!("ip route get {to}")));
        }
        None => steps.push(host_itself(here, to, kind, interface)),
    }
    steps
}

fn vxlan_device(here: &Here<'_>, device: &str) -> Step {
    let command = format!("ip -d link show dev {device}");
    let exists = Device::new(device).is_some_and(|device| here.actual.links.contains_key(&device));
    let step = match exists {
        true => Step::passes(Stage::Decapsulated, format!("by {device}"), command),
        false => Step::stops(
            Stage::Decapsulated,
            format!("there is no device {device}"),
            command,
            "`ovlctl status` on this host says why the network is not built",
        ),
    };
    step.at(Spot::Device(device.to_owned(), false))
}

/// Returns the step at which a packet enters the veth pair of its destination.
fn delivery(here: &Here<'_>, endpoint: &Endpoint) -> Step {
    let device = Device::endpoint(endpoint.id);
    let command = format!("ip link show dev {device}");
    let link = |dataplane: &Dataplane| match dataplane.links.get(&device) {
        Some(Link::Endpoint { up, .. }) => Some(*up),
        _ => None,
    };
    let step = match (link(here.desired), link(here.actual)) {
        (_, None) => Step::stops(
            Stage::Delivery,
            format!("there is no device {device}"),
            command,
            "detach and attach the endpoint, or start its container again",
        ),
        (Some(false), _) => Step::stops(
            Stage::Delivery,
            format!("{device}: the endpoint is isolated, because another host has its address"),
            command,
            "`ovlctl status` on this host names the conflict",
        ),
        (_, Some(false)) => Step::stops(
            Stage::Delivery,
            format!("{device} is down"),
            command,
            "ovld sets it up within a minute: `ovlctl events` on this host",
        ),
        _ => Step::passes(Stage::Delivery, format!("{device}, up"), command),
    };
    step.at(Spot::Device(device.to_string(), true))
}

/// Returns the step of the destination in its namespace.
fn destination(endpoint: &Endpoint, to: IpAddr, kind: ProbeKind, interface: &Interface) -> Step {
    let Interface { name, state, error, listens } = interface;
    let exec = format!("ovlctl exec {} --", endpoint.name);
    let command = format!("{exec} ip addr show dev {name}");
    let spot = Spot::Inside(false);
    let stops = |detail: String, advice: String| Step::stops(Stage::Destination, detail, &*command, advice);
    let step = match state {
        _ if error.is_some() => {
            let error = error.as_deref().unwrap_or_default();
            Step::unknown(Stage::Destination, format!("{name}: {error}"), &*command)
        }
        None => stops(
            format!("there is no interface {name} in the namespace"),
            "detach and attach the endpoint, or start its container again".to_owned(),
        ),
        Some(state) if !state.up => {
            stops(format!("interface {name} is down"), format!("set it up: {exec} ip link set {name} up"))
        }
        Some(state) if !state.addresses.iter().any(|net| net.addr() == to) => stops(
            format!("interface {name} lacks the address {to}"),
            format!("put it back: {exec} ip addr add {to} dev {name}"),
        ),
        Some(_) => return listening(kind, to, *listens, &exec, name).at(spot),
    };
    step.at(spot)
}

/// Returns the step of what listens at the destination.
fn listening(kind: ProbeKind, to: IpAddr, listens: Option<bool>, exec: &str, name: &str) -> Step {
    let (flag, word, port) = match kind {
        ProbeKind::Echo => {
            let detail = format!("{to} on {name}: the kernel answers");
            let command = match exec.is_empty() {
                true => "ip addr".to_owned(),
                false => format!("{exec} ip addr show dev {name}"),
            };
            return Step::passes(Stage::Destination, detail, command);
        }
        ProbeKind::Tcp(port) => ("t", "TCP", port),
        ProbeKind::Udp(port) => ("u", "UDP", port),
    };
    let command = format!("{exec} ss -ln{flag} sport = :{port}");
    let command = command.trim();
    match listens {
        Some(true) => Step::passes(
            Stage::Destination,
            format!("{to}: a program listens at {word} port {port}"),
            command,
        ),
        Some(false) => Step::stops(
            Stage::Destination,
            format!("{to}: no program listens at {word} port {port}"),
            command,
            "start the program, or let it listen at this address and port",
        ),
        None => Step::unknown(Stage::Destination, format!("{to} {word} port {port}"), command),
    }
}

/// Returns the step of this host itself as the destination.
fn host_itself(here: &Here<'_>, to: IpAddr, kind: ProbeKind, interface: &Interface) -> Step {
    let spot = Spot::Received;
    match here.own.contains(&to) {
        true => listening(kind, to, interface.listens, "", "this host").at(spot),
        false => Step::stops(
            Stage::Destination,
            format!("{to} is no address of this host"),
            "ip addr",
            "`ovlctl peers` lists the addresses of hosts",
        )
        .at(spot),
    }
}
