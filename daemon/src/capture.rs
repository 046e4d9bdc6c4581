//! Captures of packets: which devices and packets are meant, and those that are in flight.
//!
//! [`Captures`] owns the captures of this host and what other hosts were asked for. [`Plan`] has no state: each host that takes
//! part makes it from the same target. Begin to read at [`Plan::of`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;
use ovl_cluster::backends::Backends;
use ovl_cluster::view::{Node, Placed, View};
use ovl_control::{CapturePlan, CaptureRequest, CaptureScope, CaptureTarget, Encapsulated};
use ovl_dataplane::device::Device;
use ovl_kernel::{Capture, WINDOW};
use ovl_proto::capture::{CaptureBatch, MAX_INSTRUCTIONS, MAX_SNAPLEN, PointKind};
use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::object::{Encrypt, Mode};
use ovl_proto::resource::{Name, Protocol};
use ovl_proto::{DEFAULT_PORT, SEALED_VXLAN_PORT};
use ovl_subsystems::encryption::tunnel;
use tokio::sync::mpsc;

use crate::asked::Asked;
use crate::failed::Failed;
use crate::slots::{ClientSlot, ClientSlots};
use crate::trace::question::{self, Source, Target};

/// The maximum number of captures in which a host takes part at a time.
const MOST: usize = 4;
/// The maximum number of devices of a capture on a host.
pub(crate) const MOST_DEVICES: usize = 64;
/// The maximum number of addresses and prefixes in an expression.
const MOST_ADDRESSES: usize = 64;
/// The longest capture, in seconds.
const LONGEST_S: u32 = 24 * 3600;

/// The captures of this host, and what other hosts were asked for.
#[derive(Debug)]
pub(crate) struct Captures {
    /// Captures for other hosts, by the requester and its number.
    running: HashMap<(NodeId, u64), (Rc<Capture>, ClientSlot)>,
    /// Slots for those, and for captures for clients of this host.
    slots: ClientSlots,
    /// The number of the last request to another host.
    last: u64,
    /// What other hosts were asked to capture.
    asked: HashMap<u64, (NodeId, mpsc::Sender<CaptureBatch>)>,
    /// The time that other hosts were asked for.
    pub times: Asked<u64>,
}

impl Captures {
    /// None yet. For `last` see [`Asked::new`].
    pub(crate) fn new(last: u64) -> Self {
        Self {
            running: HashMap::new(),
            slots: ClientSlots::new(MOST),
            last,
            asked: HashMap::new(),
            times: Asked::new(last),
        }
    }

    /// Begins a capture for a client or for another host. `None` if there are too many.
    pub(crate) fn begin(&self) -> Option<ClientSlot> {
        self.slots.take()
    }

    /// Keeps a capture for another host.
    pub(crate) fn keep(&mut self, by: NodeId, id: u64, capture: Rc<Capture>, slot: ClientSlot) {
        self.running.insert((by, id), (capture, slot));
    }

    /// Ends a capture for another host.
    pub(crate) fn stop(&mut self, by: NodeId, id: u64) {
        self.running.remove(&(by, id));
    }

    /// Whether a capture for another host goes on.
    pub(crate) fn is_running(&self, by: NodeId, id: u64) -> bool {
        self.running.contains_key(&(by, id))
    }

    /// Notes that another host has taken batches.
    pub(crate) fn taken(&self, by: NodeId, id: u64, batches: u32) {
        if let Some((capture, _)) = self.running.get(&(by, id)) {
            capture.take(batches.min(WINDOW));
        }
    }

    /// Notes that another host is asked, and returns the number of the request and where its batches are told.
    pub(crate) fn ask(&mut self, host: NodeId) -> (u64, mpsc::Receiver<CaptureBatch>) {
        let (tell, batches) = mpsc::channel(2 * WINDOW as usize);
        self.last = self.last.wrapping_add(1);
        self.asked.insert(self.last, (host, tell));
        (self.last, batches)
    }

    /// Takes a batch of a host that was asked. Returns false if nothing waits for it, so that the host is to stop. One that sends
    /// more than it may loses what it sent.
    pub(crate) fn batch(&mut self, from: NodeId, id: u64, batch: CaptureBatch) -> bool {
        match self.asked.get(&id) {
            Some((host, tell)) if *host == from => {
                !matches!(tell.try_send(batch), Err(mpsc::error::TrySendError::Closed(_)))
            }
            _ => false,
        }
    }

    /// Forgets what a host was asked for.
    pub(crate) fn give_up(&mut self, id: u64) {
        self.asked.remove(&id);
    }
}

/// Returns what is added to a host's clock to get that of this host, of some answers: when each was asked for, what it said and
/// when it came. The fastest one says it best, because half of its round trip is the error at most.
pub(crate) fn offset(answers: &[(u64, u64, u64)]) -> i64 {
    let best = answers.iter().min_by_key(|(asked, _, came)| came.saturating_sub(*asked));
    best.map_or(0, |(asked, said, came)| {
        let middle = asked / 2 + came / 2;
        i64::try_from(i128::from(middle) - i128::from(*said)).unwrap_or_default()
    })
}

/// Checks a request.
///
/// # Errors
///
/// It has a filter that the kernel does not take, or a limit that is out of range.
pub(crate) fn check(request: &CaptureRequest) -> Result<(), Failed> {
    let CaptureRequest { programs, snaplen, seconds, .. } = request;
    let fits = |length: usize| (1..=MAX_INSTRUCTIONS).contains(&length);
    if programs.len() > 8 || !programs.iter().all(|program| fits(program.code.len())) {
        return Err(Failed::invalid(format!("a filter has 1 to {MAX_INSTRUCTIONS} instructions")));
    }
    if !(1..=MAX_SNAPLEN).contains(snaplen) || !(1..=LONGEST_S).contains(seconds) {
        return Err(Failed::invalid(format!(
            "a capture keeps 1 to {MAX_SNAPLEN} bytes of a packet, and lasts 1 to {LONGEST_S} seconds"
        )));
    }
    Ok(())
}

/// What a target means.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// For people.
    pub(crate) what: String,
    /// The hosts that take part.
    pub(crate) hosts: BTreeSet<NodeId>,
    /// The endpoints whose interfaces are captured, with their hosts.
    endpoints: Vec<(NodeId, EndpointId)>,
    /// The networks whose VXLAN devices are captured.
    networks: Vec<NetworkId>,
    /// The hosts whose underlay devices and tunnels are captured.
    pair: Vec<NodeId>,
    scopes: Vec<CaptureScope>,
    /// Of packets from or to these prefixes it is watched whether they are dropped.
    pub(crate) watched: Vec<IpNet>,
}

impl Plan {
    /// Decides which devices and packets a target means.
    ///
    /// # Errors
    ///
    /// There is nothing of that name, or it has too many addresses for a filter.
    pub(crate) fn of(view: &View, backends: &Backends, target: &CaptureTarget) -> Result<Self, Failed> {
        match target {
            CaptureTarget::Any { name } => {
                if let Ok(plan) = Self::endpoint(view, name) {
                    return Ok(plan);
                }
                if let Ok(plan) = Self::network(view, name) {
                    return Ok(plan);
                }
                if let Ok(plan) = Self::service(view, backends, name) {
                    return Ok(plan);
                }
                Err(Failed::not_found(format!(
                    "there is no endpoint, network or Service {name}: give NAME or NAMESPACE/NAME, or HOST,HOST for what passes \
                     between two hosts; `ovlctl endpoints`, `ovlctl network ls` and `ovlctl get svc -A` list them"
                )))
            }
            CaptureTarget::Endpoint { name } => Self::endpoint(view, name),
            CaptureTarget::Network { name } => Self::network(view, name),
            CaptureTarget::Service { name } => Self::service(view, backends, name),
            CaptureTarget::Pair { hosts } => Self::pair(view, hosts),
            CaptureTarget::Flow { from, to, port, protocol } => {
                Self::flow(view, backends, from, to, port.map(|port| (port, *protocol)))
            }
        }
    }

    fn endpoint(view: &View, name: &str) -> Result<Self, Failed> {
        let Source::Endpoints(first) = question::source(view, name, None)? else {
            return Err(Failed::not_found(format!(
                "{name} is a host: give HOST,HOST for what passes between two"
            )));
        };
        let all = same_workload(view, first);
        let mut plan = Self {
            what: format!("endpoint {}/{}", first.endpoint.namespace, first.endpoint.name),
            endpoints: all.iter().map(|placed| (placed.node.record.id, placed.endpoint.id)).collect(),
            watched: all
                .iter()
                .flat_map(|placed| &placed.endpoint.addresses)
                .map(|net| IpNet::from(net.addr()))
                .collect(),
            ..Self::default()
        };
        plan.hosts.extend(plan.endpoints.iter().map(|(host, _)| *host));
        // Policies of the other end drop packets on its host.
        let networks: BTreeSet<NetworkId> = all.iter().map(|placed| placed.endpoint.network).collect();
        plan.hosts.extend(networks.iter().flat_map(|id| view.hosts_on(*id)).map(|node| node.record.id));
        Ok(plan)
    }

    fn network(view: &View, name: &str) -> Result<Self, Failed> {
        let network = &view.network(name).ok_or_else(|| Failed::no_network(view, name))?.network;
        Ok(Self {
            what: format!("network {}", network.name),
            hosts: view.hosts_on(network.id).map(|node| node.record.id).chain([view.me]).collect(),
            endpoints: view
                .endpoints(network.id)
                .map(|placed| (placed.node.record.id, placed.endpoint.id))
                .collect(),
            networks: vec![network.id],
            watched: network.subnets.iter().map(|subnet| subnet.prefix).collect(),
            ..Self::default()
        })
    }

    fn service(view: &View, backends: &Backends, name: &str) -> Result<Self, Failed> {
        let (namespace, short) = question::full_name(name);
        let name = Name::new(namespace, short);
        let Some(service) = view.resources.services().get(&name) else {
            return Err(Failed::not_found(format!(
                "there is no Service {name}: `ovlctl get svc -A` lists them"
            )));
        };
        let own: Vec<IpAddr> = question::service_addresses(service).collect();
        let mut parts: Vec<String> = own.iter().map(|address| format!("host {address}")).collect();
        let mut watched: Vec<IpNet> = own.into_iter().map(IpNet::from).collect();
        for backend in backends.of(&name) {
            let ports: BTreeSet<u16> = backend.ports.iter().flatten().copied().collect();
            let ports = any_of(ports.iter().map(|port| format!("port {port}")));
            parts.extend(backend.addresses.iter().map(|address| match ports.is_empty() {
                true => format!("host {address}"),
                false => format!("(host {address} and {ports})"),
            }));
            watched.extend(backend.addresses.iter().copied().map(IpNet::from));
        }
        let expression = bounded(parts)?;
        let all: Vec<_> = view.all_endpoints().filter(|placed| view.is_counted(placed)).collect();
        Ok(Self {
            what: format!("Service {name}"),
            hosts: all.iter().map(|placed| placed.node.record.id).chain([view.me]).collect(),
            endpoints: all.iter().map(|placed| (placed.node.record.id, placed.endpoint.id)).collect(),
            scopes: vec![plain(expression)],
            watched,
            ..Self::default()
        })
    }

    fn pair(view: &View, hosts: &[String; 2]) -> Result<Self, Failed> {
        let found = hosts.each_ref().map(|name| match question::source(view, name, None)? {
            Source::Host(node) => Ok(node),
            Source::Endpoints(_) => {
                Err(Failed::not_found(format!("{name} is no host: `ovlctl peers` lists them")))
            }
        });
        let [first, second] = found;
        let nodes = [first?, second?];
        let [a, b] = nodes
            .map(|node| any_of(underlay_addresses(node).iter().map(|address| format!("host {address}"))));
        // A capture of its own packets would not end.
        let own = format!("not port {DEFAULT_PORT}");
        let mut kinds: BTreeSet<u16> = nodes.iter().map(|node| node.record.address.port()).collect();
        kinds.remove(&DEFAULT_PORT);
        let own = kinds.iter().fold(own, |text, port| format!("{text} and not port {port}"));
        let ipv4 = nodes[0].record.vtep.is_ipv4();
        let ports: BTreeSet<u16> = nodes.iter().map(|node| node.record.vxlan_port).collect();
        let inside = nodes.map(|node| in_tunnel(view, node));
        let [c, d] = inside.map(bounded);
        Ok(Self {
            what: format!("hosts {} and {}", nodes[0].record.name, nodes[1].record.name),
            hosts: nodes.iter().map(|node| node.record.id).collect(),
            pair: nodes.iter().map(|node| node.record.id).collect(),
            scopes: vec![
                CaptureScope {
                    kinds: vec![PointKind::Underlay],
                    expression: format!("{a} and {b} and {own}"),
                    carries: ports.into_iter().map(|port| Encapsulated { port, ipv4 }).collect(),
                },
                CaptureScope {
                    kinds: vec![PointKind::Tunnel],
                    expression: format!("{} and {}", c?, d?),
                    carries: vec![Encapsulated { port: SEALED_VXLAN_PORT, ipv4: false }],
                },
            ],
            watched: view
                .networks
                .values()
                .flat_map(|found| &found.network.subnets)
                .map(|subnet| subnet.prefix)
                .collect(),
            ..Self::default()
        })
    }

    fn flow(
        view: &View,
        backends: &Backends,
        from: &str,
        to: &str,
        port: Option<(u16, Protocol)>,
    ) -> Result<Self, Failed> {
        let (mut addresses, what) = match question::target(view, to) {
            Target::Addresses(addresses, what) => (addresses, what),
            Target::Name(name) => {
                return Err(Failed::not_found(format!(
                    "{name} is no endpoint, Service or host: give its address; `ovlctl dns {name}` shows it"
                )));
            }
        };
        let source = question::source(view, from, addresses.first().copied())?;
        let (own, who): (Vec<IpAddr>, String) = match source {
            Source::Endpoints(placed) => (
                same_workload(view, placed)
                    .iter()
                    .flat_map(|each| &each.endpoint.addresses)
                    .map(|net| net.addr())
                    .collect(),
                format!("{}/{}", placed.endpoint.namespace, placed.endpoint.name),
            ),
            Source::Host(node) => {
                let gateways = view.networks.keys().flat_map(|id| view.gateways(*id, node.record.id));
                (
                    underlay_addresses(node).into_iter().chain(gateways).collect(),
                    format!("host {}", node.record.name),
                )
            }
        };
        let mut ports: BTreeSet<u16> = port.iter().map(|(port, _)| *port).collect();
        if let Some((name, service)) = question::service_with(view, &addresses) {
            for backend in backends.of(name) {
                addresses.extend(backend.addresses.iter().copied());
                let pairs = service.spec.ports.iter().zip(&backend.ports);
                let meant = pairs.filter(|(own, _)| port.is_some_and(|(port, _)| port == own.port));
                ports.extend(meant.filter_map(|(_, target)| *target));
            }
        }
        let both: BTreeSet<IpAddr> = addresses.iter().chain(&own).copied().collect();
        let of = |all: Vec<IpAddr>| bounded(all.iter().map(|address| format!("host {address}")).collect());
        let mut expression = format!("{} and {}", of(own)?, of(addresses)?);
        if let Some((_, protocol)) = port {
            let name = match protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            };
            let ports = any_of(ports.iter().map(|port| format!("{name} port {port}")));
            expression = format!("{expression} and {ports}");
        }
        let ends: Vec<Placed<'_>> =
            both.iter().filter_map(|address| question::with_address(view, *address)).collect();
        let networks: BTreeSet<NetworkId> = ends.iter().map(|placed| placed.endpoint.network).collect();
        Ok(Self {
            what: format!("{who} and {what}"),
            hosts: ends.iter().map(|placed| placed.node.record.id).chain([source.host()]).collect(),
            endpoints: ends
                .iter()
                .map(|placed| (placed.node.record.id, placed.endpoint.id))
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            networks: networks.into_iter().collect(),
            scopes: vec![plain(expression)],
            watched: both.into_iter().map(IpNet::from).collect(),
            ..Self::default()
        })
    }

    /// Returns what the client is to know.
    pub(crate) fn shown(&self, view: &View) -> CapturePlan {
        CapturePlan {
            what: self.what.clone(),
            hosts: self.hosts.iter().map(|host| view.name_of(*host)).collect(),
            scopes: self.scopes.clone(),
        }
    }

    /// Returns the devices of this host, each with its kind and what it belongs to, and the number of those that are too many.
    /// `underlay` is the device with this host's address.
    pub(crate) fn devices(
        &self,
        view: &View,
        underlay: Option<&str>,
    ) -> (Vec<(PointKind, String, String)>, usize) {
        let mut all = Vec::new();
        for (host, id) in &self.endpoints {
            let found = view.nodes.get(host).and_then(|node| node.table.endpoint(*id));
            if let Some(endpoint) = found.filter(|_| *host == view.me) {
                let name = format!("{}/{}", endpoint.namespace, endpoint.name);
                all.push((PointKind::Endpoint, name, Device::endpoint(*id).to_string()));
            }
        }
        for id in &self.networks {
            let network = view.networks.get(id).map(|found| &found.network);
            // A network has a VXLAN device where it has endpoints; that one which is missing is not captured is no fault.
            let has_device = |network: &&ovl_proto::object::Network| {
                !view.is_own(network.id) && (network.mode == Mode::L2 || !network.encrypted)
            };
            if let Some(network) = network.filter(has_device) {
                let second = (network.mode == Mode::L2 && network.encrypt() == Encrypt::Auto)
                    .then(|| Device::sealed_vxlan(*id));
                let devices = [Device::vxlan(*id)].into_iter().chain(second);
                all.extend(
                    devices.map(|device| (PointKind::Vxlan, network.name.clone(), device.to_string())),
                );
            }
        }
        if self.pair.contains(&view.me) {
            all.extend(
                underlay.map(|device| (PointKind::Underlay, "underlay".to_owned(), device.to_owned())),
            );
            if tunnel::is_wanted(view) {
                let tunnels = [false, true].map(|second| Device::tunnel(second).to_string());
                all.extend(tunnels.map(|device| (PointKind::Tunnel, "tunnel".to_owned(), device)));
            }
        }
        let too_many = all.len().saturating_sub(MOST_DEVICES);
        all.truncate(MOST_DEVICES);
        (all, too_many)
    }
}

/// Returns the endpoints of the workload of one: they have its name, namespace and host.
fn same_workload<'a>(view: &'a View, first: Placed<'a>) -> Vec<Placed<'a>> {
    let is_same = |placed: &Placed<'_>| {
        placed.node.record.id == first.node.record.id
            && placed.endpoint.namespace == first.endpoint.namespace
            && placed.endpoint.name == first.endpoint.name
    };
    view.all_endpoints().filter(is_same).collect()
}

fn underlay_addresses(node: &Node) -> BTreeSet<IpAddr> {
    BTreeSet::from([node.record.vtep, node.record.address.ip()])
}

/// Returns expressions for what a host sends and receives in the tunnel: its own address there, and its blocks.
fn in_tunnel(view: &View, node: &Node) -> Vec<String> {
    let id = node.record.id;
    let own = format!("host {}", tunnel::address(view.alloc.origin(), id));
    let through = view
        .networks
        .values()
        .filter(|found| found.network.may_be_sealed() && found.network.mode == Mode::L3);
    let blocks =
        through.flat_map(|found| view.blocks_of(found.network.id, id)).map(|block| format!("net {block}"));
    std::iter::once(own).chain(blocks).collect()
}

fn plain(expression: String) -> CaptureScope {
    CaptureScope { kinds: vec![PointKind::Endpoint, PointKind::Vxlan], expression, carries: Vec::new() }
}

fn any_of(parts: impl Iterator<Item = String>) -> String {
    let parts: Vec<String> = parts.collect();
    match parts.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        all => format!("({})", all.join(" or ")),
    }
}

fn bounded(parts: Vec<String>) -> Result<String, Failed> {
    match parts.len() {
        0 => Err(Failed::not_found("it has no address yet, so there are no packets of it")),
        count if count > MOST_ADDRESSES => Err(Failed::invalid(format!(
            "it has {count} addresses, and a filter takes {MOST_ADDRESSES}: capture a network or an endpoint with a filter"
        ))),
        _ => Ok(any_of(parts.into_iter())),
    }
}

/// The names of what has addresses, for `ovlctl`.
pub(crate) fn names(view: &View, addresses: &[IpAddr]) -> BTreeMap<IpAddr, String> {
    addresses.iter().filter_map(|address| Some((*address, question::known(view, *address)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::World;

    fn plan(world: &World, target: &CaptureTarget) -> Result<Plan, String> {
        Plan::of(&world.view, &Backends::default(), target).map_err(|failed| failed.0.message)
    }

    fn world() -> World {
        let mut world = World::new();
        world.attach(1, 1, &[], true);
        world.attach(2, 2, &[], true);
        world
    }

    #[test]
    fn endpoint_is_captured_on_its_host_and_watched_on_all_of_its_network() {
        let world = world();
        let found = plan(&world, &CaptureTarget::Any { name: "w1".to_owned() }).unwrap();
        assert_eq!((found.endpoints.len(), found.hosts.len()), (1, 2));
        assert!(!found.watched.is_empty() && found.scopes.is_empty());
        let (devices, too_many) = found.devices(&world.view, None);
        assert_eq!((devices.len(), too_many), (1, 0));
        assert_eq!((devices[0].0, &*devices[0].1), (PointKind::Endpoint, "default/w1"));
        // The other endpoint is on another host.
        let found = plan(&world, &CaptureTarget::Any { name: "w2".to_owned() }).unwrap();
        assert!(found.devices(&world.view, None).0.is_empty());
        let failed = plan(&world, &CaptureTarget::Any { name: "w9".to_owned() }).unwrap_err();
        assert!(failed.contains("no endpoint, network or Service w9"), "{failed}");
    }

    #[test]
    fn flow_has_an_expression_with_both_ends_and_the_port() {
        let world = world();
        let flow = CaptureTarget::Flow {
            from: "w1".to_owned(),
            to: "w2".to_owned(),
            port: Some(80),
            protocol: Protocol::Tcp,
        };
        let found = plan(&world, &flow).unwrap();
        let expression = &found.scopes[0].expression;
        assert!(expression.contains("10.9.0.9") && expression.ends_with("and tcp port 80"), "{expression}");
        assert_eq!(found.hosts.len(), 2);
    }

    #[test]
    fn fastest_answer_says_the_offset() {
        // The clock of the other host is 1000 ahead. The first answer was late on its way back.
        assert_eq!(offset(&[(0, 1_010, 500), (1_000, 2_005, 1_010)]), -1_000);
        assert_eq!(offset(&[]), 0);
    }

    #[test]
    fn batches_of_a_host_that_was_not_asked_are_refused() {
        let mut captures = Captures::new(0);
        let (asked, other) = (NodeId([1; 10]), NodeId([2; 10]));
        let (id, mut batches) = captures.ask(asked);
        assert!(!captures.batch(other, id, CaptureBatch::default()));
        assert!(captures.batch(asked, id, CaptureBatch::default()));
        assert!(batches.try_recv().is_ok());
        drop(batches);
        assert!(!captures.batch(asked, id, CaptureBatch::default()));
    }
}
