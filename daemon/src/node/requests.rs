//! Requests of the control socket.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::addresses as ipam;
use ovl_control::{
    ApiReport, CaptureRequest, CapturedFrom, DaemonState, Document, Failure, FdbRow, Flows, FlowsOf,
    MAX_NAMES, MirrorOffer, PeerInfo, PeerState, Problem, ReconcileStatus, Reply, Request, RouteRow, Status,
    SubnetUse,
};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop};
use ovl_proto::alloc::Change;
use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::object::{Driver, Subnet};
use ovl_proto::table::Entry;
use ovl_subsystems::encryption::tunnel::peers as sealed_to;
use tokio::sync::{mpsc, watch};

use super::peers::{UNREACHABLE, millis};
use super::ready::READY_WITHIN;
use super::state::State;
use super::{Failed, Node, Stop};
use crate::addresses::block_of;
use crate::control::Answers;
use crate::encryption;
use crate::events::{Events, Period};
use crate::flows::MOST_FLOWS;
use crate::modes::DnsMode;
use crate::problems::Code;
use ovl_metrics::Format;

impl Answers for Node {
    async fn answer(self: &Rc<Self>, request: Request, staged: Vec<Document>) -> Reply {
        match self.try_answer(request, staged).await {
            Ok(reply) => reply,
            Err(Failed(failure)) => Reply::Error(failure),
        }
    }

    fn events(&self) -> &Events {
        &self.events
    }

    fn begin_mirror(self: &Rc<Self>, offer: MirrorOffer) -> (u64, watch::Receiver<bool>) {
        Node::begin_mirror(self, offer)
    }

    fn end_mirror(&self, connection: u64) {
        Node::end_mirror(self, connection);
    }

    fn api_report(&self) -> watch::Receiver<ApiReport> {
        Node::api_report(self)
    }

    async fn capture(
        self: &Rc<Self>,
        request: CaptureRequest,
    ) -> Result<mpsc::Receiver<CapturedFrom>, Failure> {
        Node::capture(self, request).await.map_err(|failed| failed.0)
    }

    async fn follow_flows(self: &Rc<Self>, of: FlowsOf) -> Result<mpsc::Receiver<Flows>, Failure> {
        Node::follow_flows(self, of, MOST_FLOWS).await.map_err(|failed| failed.0)
    }
}

impl Node {
    async fn try_answer(self: &Rc<Self>, request: Request, staged: Vec<Document>) -> Result<Reply, Failed> {
        if self.state.borrow().phase.is_leaving() {
            return Err(Failed::unavailable("ovld is stopping"));
        }
        Ok(match request {
            Request::Status => {
                let fast_path = self.fast_path_status().await;
                Reply::Status(Box::new(Status { fast_path, ..self.status() }))
            }
            Request::Peers => {
                self.look_at_tunnel().await;
                Reply::Peers(self.peers())
            }
            Request::WaitReady { seconds } => {
                self.ready(Duration::from_secs(u64::from(seconds))).await?;
                Reply::Done
            }
            Request::PeersAdmit { node } => {
                self.ready(READY_WITHIN).await?;
                self.end_ban(&node).await?;
                Reply::Done
            }
            Request::PeersForget { node } => {
                self.ready(READY_WITHIN).await?;
                self.forget(&node).await?;
                Reply::Done
            }
            Request::Recover(step) => Reply::Recovery(Box::new(self.recover(step).await?)),
            Request::KeyRotateCluster { key } => {
                self.ready(READY_WITHIN).await?;
                Reply::Keys(Box::new(self.rotate_cluster_key(&key).await?))
            }
            Request::KeyRotateTunnel => Reply::Keys(Box::new(self.rotate_tunnel_key().await?)),
            Request::KeyStatus => Reply::Keys(Box::new(self.key_status()?)),
            Request::Leave => {
                self.leave(Stop::Leave).await?;
                Reply::Done
            }
            Request::Teardown => {
                self.leave(Stop::Teardown).await?;
                Reply::Done
            }
            Request::Subnets => Reply::Subnets(self.subnets()),
            Request::Fdb => Reply::Fdb(self.fdb().await?),
            Request::Routes => Reply::Routes(self.routes().await?),
            Request::Plan => Reply::Plan(self.compare().await?.0.iter().map(ToString::to_string).collect()),
            Request::Verify => Reply::Verify(self.verify().await?),
            Request::Doctor { all_hosts } => Reply::Doctor(Box::new(self.doctor(all_hosts).await)),
            Request::Netcheck => Reply::Netcheck(Box::new(self.netcheck().await?)),
            Request::Events { since_ms: None, until_ms: None, .. } => Reply::Events(self.events.latest()),
            Request::Events { since_ms, until_ms, .. } => {
                Reply::Events(self.events.of(Period { since_ms, until_ms }).await)
            }
            Request::Overview => Reply::Overview(Box::new(self.overview().await)),
            Request::Reports => Reply::Reports(self.reports().await),
            Request::Page => Reply::Page(self.page_address()?),
            Request::Metrics => Reply::Text(self.metrics(Format::Prometheus).await?),
            Request::NetworkCreate(create) => Reply::Network(Box::new(self.network_create(create).await?)),
            Request::NetworkLs => Reply::Networks(self.networks()),
            Request::NetworkInspect { name } => Reply::Network(Box::new(self.network_inspect(&name)?)),
            Request::NetworkUpdate { name, subnets, mtu } => {
                self.ready_for(&name).await?;
                Reply::Network(Box::new(self.network_update(&name, &subnets, mtu).await?))
            }
            Request::NetworkRm { name } => {
                self.ready_for(&name).await?;
                self.network_rm(&name).await?;
                Reply::Done
            }
            Request::Attach(attach) => Reply::Endpoint(Box::new(self.attach(*attach).await?)),
            Request::Detach { name, network, namespace } => {
                self.detach(&name, network.as_deref(), namespace.as_deref()).await?;
                Reply::Done
            }
            Request::Endpoints => Reply::Endpoints(self.endpoints().await?),
            Request::EndpointNetns { name, network, namespace } => {
                Reply::Netns(self.netns_of(&name, network.as_deref(), namespace.as_deref())?)
            }
            Request::Cni(call) => match self.cni(&call).await {
                Ok(result) => Reply::Cni(result),
                Err(error) => Reply::CniError(error),
            },
            Request::SandboxCreate(create) => Reply::Sandbox(Box::new(self.sandbox_create(create).await?)),
            Request::SandboxRm { name, force } => {
                self.sandbox_rm(&name, force).await?;
                Reply::Done
            }
            Request::SandboxLs => Reply::Sandboxes(self.sandbox_ls().await?),
            Request::Docker(call) => Reply::Docker(self.docker(&call).await?),
            Request::DockerName(names) => {
                self.name_docker(&names)?;
                Reply::Done
            }
            Request::PolicyLs => Reply::Policies(self.policy_ls().await?),
            Request::PolicyExplain { from, to, port, protocol } => {
                Reply::PolicyExplain(self.policy_explain(&from, &to, port.map(|port| (protocol, port)))?)
            }
            Request::PolicyDrops => Reply::PolicyDrops(self.policy_drops().await?),
            Request::CapturePlan { target } => Reply::CapturePlan(Box::new(self.capture_plan(target)?)),
            Request::Flows { of, .. } => self.flows_of(of).await?,
            Request::NamesOf { addresses } => {
                let some = addresses.get(..addresses.len().min(MAX_NAMES)).unwrap_or_default();
                Reply::Names(crate::capture::names(&self.state.borrow().view, some))
            }
            Request::Trace(request) => Reply::Trace(Box::new(self.trace(request).await?)),
            Request::Dns(question) => Reply::Dns(Box::new(self.dns(question).await?)),
            Request::ResolvConf { endpoint, network } => {
                Reply::Text(self.resolv_conf(&endpoint, network.as_deref())?)
            }
            Request::EndpointReady { name, network, namespace, ready } => {
                self.endpoint_ready(&name, network.as_deref(), namespace.as_deref(), ready)?;
                Reply::Done
            }
            Request::Stage { .. } => Reply::Done,
            Request::Apply(apply) => self.apply(staged, &apply).await?,
            Request::Delete { keys, namespace, dry_run } => {
                self.delete(staged, keys, namespace.as_deref(), dry_run).await?
            }
            // The socket itself handles it.
            Request::MirrorTurn(_) | Request::ApiReport | Request::Capture(_) => Reply::Done,
            Request::Mirror(request) => self.mirror(staged, &request).await?,
            Request::NodePods(request) => self.node_pods(staged, &request),
            Request::Join(request) => self.join_nodes(&request)?,
            Request::Nodes(nodes) => self.take_nodes(nodes)?,
            Request::OwnNode(own) => self.take_own_node(own)?,
            Request::Get(query) => Reply::Resources(self.resources(&query)?),
            Request::Backends(query) => Reply::Backends(self.service_backends(&query)),
        })
    }

    /// Returns the status of the daemon.
    pub(super) fn status(&self) -> Status {
        let state = self.state.borrow();
        let mut problems: Vec<Problem> = state.problems.all().collect();
        problems.extend(self.unreachable(&state));
        problems.extend(self.tunnel.borrow().problems(&state.view, &self.config));
        let called = |address| {
            let own = state.own_endpoints();
            let mut found = own.filter(|endpoint| endpoint.addresses.iter().any(|net| net.addr() == address));
            found.next().map(|endpoint| endpoint.name.clone())
        };
        problems.extend(self.resolver.problems(called));
        problems.extend(crate::names::ambiguous_names(&state.view));
        problems.extend(state.admitted.problems(state.clock.elapsed()));
        problems.extend(state.unheard_names(self.config.dns != DnsMode::Off));
        problems.extend(state.reconcile.problems());
        let starting = !state.is_member() || !state.phase.is_caught_up();
        Status {
            node: self.config.node.clone(),
            id: state.view.me,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: match (starting, problems.is_empty()) {
                (true, _) => DaemonState::Starting,
                (false, true) => DaemonState::Ready,
                (false, false) => DaemonState::Degraded,
            },
            problems,
            address: state.record().map_or(self.config.advertise, |record| record.address),
            vtep: state.record().map_or(self.config.advertise.ip(), |record| record.vtep),
            uptime_s: state.clock.elapsed().as_secs(),
            members: count(state.view.alloc.members.len()),
            alive: count(state.alive().intersection(&state.view.alloc.members).count()),
            endpoints: count(state.own_endpoints().count()),
            networks: count(state.view.networks.len()),
            rotation: Self::key_rotation(&state),
            gossip: self.gossip().counters(),
            relayed: self.relayed(),
            fast_path: self.fast_path_use(),
            reconcile: ReconcileStatus {
                passes: state.reconcile.counts().passes,
                operations: state.reconcile.counts().operations,
                repairs: state.reconcile.counts().repairs,
                failing: state.reconcile.failing().map(str::to_owned).collect(),
            },
        }
    }

    /// Reports live hosts from which no packet arrives directly, and those whose VTEP is of another address
    /// family.
    fn unreachable(&self, state: &State) -> Vec<Problem> {
        let contacts = self.gossip().contacts();
        let Some(own) = state.record() else { return Vec::new() };
        let mut sentences = Vec::new();
        for node in state.view.nodes.values().filter(|node| node.record.id != state.view.me) {
            let record = &node.record;
            if node.state != PeerState::Alive {
                continue;
            }
            if contacts.get(&record.id).is_none_or(|contact| contact.last_heard.elapsed() >= UNREACHABLE)
                && state.clock.elapsed() > UNREACHABLE
                // NAT hides some hosts from each other, whatever the firewalls do, and others have no address family in common.
                && !state.view.crosses_nat(node)
                && !state.view.is_apart(node)
            {
                let sentence = format!(
                    "host {} at {} is alive, as others say, and nothing comes from it directly: check the path and \
                     the firewalls for UDP and TCP port {}",
                    record.name,
                    record.address,
                    record.address.port()
                );
                sentences.push(Code::Unreachable.about(&record.name, sentence));
            }
            sentences.extend(plain_across_nat(state, node));
            let is_relayed = state.detours.relay(record.id).is_some();
            if own.is_apart(record) && !is_relayed && state.clock.elapsed() > UNREACHABLE {
                let sentence = format!(
                    "host {} is at {} and this one at {}: they have no address family in common, and no member that relays has \
                     addresses of both",
                    record.name, record.vtep, own.vtep
                );
                sentences.push(Code::VtepFamily.about(&record.name, sentence));
            }
        }
        sentences
    }

    /// Lists all hosts, the local host first and the others by name.
    pub(super) fn peers(&self) -> Vec<PeerInfo> {
        let contacts = self.gossip().contacts();
        let paths = self.gossip().path_mtus();
        let state = self.state.borrow();
        let direct_hops = state.subsystems.networks.direct_hops(&state.view);
        let sealed =
            encryption::kind(&state.view).map(|kind| (encryption::name(kind), sealed_to(&state.view)));
        let mut peers: Vec<PeerInfo> = state
            .view
            .nodes
            .values()
            .map(|node| {
                let record = &node.record;
                let own = record.id == state.view.me;
                let contact = contacts.get(&record.id);
                let endpoints =
                    node.table.entries().filter(|entry| matches!(entry, Entry::Endpoint(_))).count();
                PeerInfo {
                    name: record.name.clone(),
                    id: record.id,
                    address: if own { state.reach.own() } else { self.gossip().end(record.address) }
                        .unwrap_or(record.address),
                    vtep: record.vtep,
                    state: node.state,
                    last_heard_ms: contact.map(|contact| millis(contact.last_heard.elapsed())),
                    rtt_us: contact
                        .and_then(|contact| contact.rtt)
                        .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                    endpoints: count(endpoints),
                    version: record.version.clone(),
                    encryption: match &sealed {
                        Some((name, to)) if own || to.contains_key(&record.id) => (*name).to_owned(),
                        Some(_) | None => "none".to_owned(),
                    },
                    tunnel: self.tunnel.borrow().peer(record.id),
                    own,
                    member: state.view.alloc.members.contains(&record.id),
                    reachable: own
                        || contact.is_some_and(|contact| contact.last_heard.elapsed() < UNREACHABLE),
                    unreached: node.table.unreached().map(|id| state.view.name_of(id)).collect(),
                    via: state.detours.path(record.id).iter().map(|id| state.view.name_of(*id)).collect(),
                    via_s: state.detours.since(record.id).map(|since| since.elapsed().as_secs()),
                    tcp: by_tcp(&state, record.id).is_some(),
                    tcp_s: by_tcp(&state, record.id).map(|since| since.elapsed().as_secs()),
                    why: why(&state, node),
                    nat: if own { record.is_behind_nat() } else { state.view.crosses_nat(node) },
                    sealed: !own && state.view.is_framed(node) && !state.view.crosses_nat(node),
                    paths: self.peer_paths(&state, &direct_hops, record.id),
                    path_mtu: if own { Some(record.link_mtu) } else { paths.get(&record.id).copied() },
                }
            })
            .collect();
        peers.sort_by(|a, b| (!a.own, &a.name, a.id).cmp(&(!b.own, &b.name, b.id)));
        peers
    }

    /// Removes a host from the cluster by the decision of a majority.
    async fn forget(&self, name: &str) -> Result<(), Failed> {
        let node = {
            let state = self.state.borrow();
            let by_id = name.parse::<NodeId>().ok();
            let mut found: Vec<_> = state
                .view
                .nodes
                .values()
                .filter(|node| node.record.name == name || Some(node.record.id) == by_id)
                .collect();
            // A host that came back with a new identity has the name of its dead predecessor.
            if found.len() > 1 {
                found.retain(|node| node.state != PeerState::Alive);
            }
            match found.as_slice() {
                [] => match by_id {
                    Some(id) if state.view.alloc.members.contains(&id) => id,
                    // A host that left is not banned yet.
                    Some(id) if state.view.alloc.forgotten.contains(&id) => id,
                    _ => {
                        return Err(Failed::not_found(format!(
                            "there is no host {name}; `ovlctl peers` lists them"
                        )));
                    }
                },
                [one] if one.record.id == state.view.me => {
                    return Err(Failed::invalid("this is the host itself: `ovlctl leave` withdraws it"));
                }
                [one] if one.state == PeerState::Alive => {
                    return Err(Failed::conflict(format!(
                        "host {name} is alive: run `ovlctl leave` there; only hosts that are gone can be forgotten"
                    )));
                }
                [one] => one.record.id,
                _ => {
                    return Err(Failed::conflict(format!(
                        "several hosts are named {name}: give the id, see `ovlctl peers`"
                    )));
                }
            }
        };
        self.change(Change::Ban(node)).await?;
        // This also drops a host that was never admitted, which the cluster cannot forget.
        self.state.borrow_mut().peers.give_up(node);
        self.drop_forgotten(&mut self.state.borrow_mut());
        self.event("peer", name, "forgotten by request");
        Ok(())
    }

    fn subnets(&self) -> Vec<SubnetUse> {
        let state = self.state.borrow();
        let mut used: BTreeMap<(NetworkId, ipnet::IpNet), u64> = BTreeMap::new();
        for placed in state.view.all_endpoints() {
            for net in &placed.endpoint.addresses {
                if let Some(block) = block_of(&state.view, placed.endpoint.network, net.addr()) {
                    *used.entry((placed.endpoint.network, block)).or_default() += 1;
                }
            }
        }
        let mut rows: Vec<SubnetUse> = state
            .view
            .alloc
            .blocks
            .iter()
            .filter_map(|(block, holder)| {
                let network = &state.view.networks.get(&block.network)?.network;
                let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&block.prefix))?;
                Some(SubnetUse {
                    network: network.name.clone(),
                    prefix: block.prefix,
                    node: state.view.name_of(*holder),
                    used: used.get(&(block.network, block.prefix)).copied().unwrap_or(0),
                    size: u64::try_from(ipam::usable_in_block(block.prefix, subnet)).unwrap_or(u64::MAX),
                })
            })
            .collect();
        // Addresses on bridge networks are picked from the whole subnet.
        let own = state.view.networks.values().map(|found| &found.network);
        for network in own.filter(|network| network.driver == Driver::Bridge) {
            let used = |subnet: &Subnet| {
                let endpoints = state.view.endpoints(network.id).map(|placed| placed.endpoint);
                endpoints.flat_map(|e| &e.addresses).filter(|net| subnet.prefix.contains(&net.addr())).count()
            };
            rows.extend(network.subnets.iter().map(|subnet| SubnetUse {
                network: network.name.clone(),
                prefix: subnet.prefix,
                node: state.view.name_of(state.view.me),
                used: used(subnet) as u64,
                size: u64::try_from(ipam::usable_in_block(subnet.prefix, subnet)).unwrap_or(u64::MAX),
            }));
        }
        rows.sort_by(|a, b| (&a.network, a.prefix).cmp(&(&b.network, b.prefix)));
        rows
    }

    async fn fdb(&self) -> Result<Vec<FdbRow>, Failed> {
        let kernel = self.kernel.dump().await.map_err(Failed::from)?;
        let state = self.state.borrow();
        let mut rows = Vec::new();
        let network_of = |device: &Device| network_of(&state, device);
        let mut owners = BTreeMap::new();
        for network in state.view.networks.keys() {
            for placed in state.view.endpoints(*network) {
                let names = (placed.node.record.name.clone(), placed.endpoint.name.clone());
                owners.insert((*network, placed.endpoint.mac), names);
            }
        }
        let mut neighbours: BTreeMap<(Device, Mac), Vec<std::net::IpAddr>> = BTreeMap::new();
        for ((bridge, address), mac) in &kernel.neighbours {
            neighbours.entry((*bridge, *mac)).or_default().push(*address);
        }
        let row = |device: &Device, mac: Mac, destination: Option<std::net::IpAddr>| {
            let network = network_of(device);
            let owner = network.and_then(|network| owners.get(&(network, mac)));
            let addresses = network
                .and_then(|network| neighbours.get(&(Device::bridge(network), mac)))
                .cloned()
                .unwrap_or_default();
            FdbRow {
                network: network_name(&state, network),
                mac,
                device: device.to_string(),
                destination,
                node: owner.map(|(node, _)| node.clone()).or_else(|| {
                    let vtep = destination?;
                    let node = state.view.nodes.values().find(|node| node.record.vtep == vtep)?;
                    Some(node.record.name.clone())
                }),
                endpoint: owner.map(|(_, endpoint)| endpoint.clone()),
                addresses,
            }
        };
        for ((device, mac), remote) in &kernel.remotes {
            rows.push(row(device, *mac, Some(remote.vtep)));
        }
        for (device, mac) in
            kernel.ports.iter().filter(|(device, mac)| !kernel.remotes.contains_key(&(*device, *mac)))
        {
            rows.push(row(device, *mac, None));
        }
        for (device, remote) in &kernel.floods {
            rows.push(row(device, Mac::default(), Some(remote.vtep)));
        }
        for (device, mac, remote) in &kernel.groups {
            rows.push(row(device, *mac, Some(remote.vtep)));
        }
        rows.sort_by(|a, b| (&a.network, a.destination, a.mac).cmp(&(&b.network, b.destination, b.mac)));
        Ok(rows)
    }

    async fn routes(&self) -> Result<Vec<RouteRow>, Failed> {
        let kernel: Dataplane = self.kernel.dump().await.map_err(Failed::from)?;
        let state = self.state.borrow();
        let addresses = kernel.addresses.iter().map(|(device, net)| RouteRow {
            network: network_name(&state, network_of(&state, device)),
            destination: net.trunc(),
            via: None,
            device: device.to_string(),
            node: None,
        });
        let routes = kernel.routes.iter().map(|(to, hop)| {
            let network = state
                .view
                .networks
                .values()
                .map(|found| &found.network)
                .find(|network| network.subnets.iter().any(|subnet| subnet.prefix.contains(to)));
            let holder = network.and_then(|network| state.view.holder_of(network.id, to.addr()));
            RouteRow {
                network: network_name(&state, network.map(|network| network.id)),
                destination: *to,
                via: hop.gateway,
                device: match hop.device {
                    Some(device) => device.to_string(),
                    None if *hop == Hop::UNREACHABLE => "unreachable".to_owned(),
                    None => "underlay".to_owned(),
                },
                node: holder
                    .filter(|holder| *holder != state.view.me && *hop != Hop::UNREACHABLE)
                    .map(|holder| state.view.name_of(holder)),
            }
        });
        Ok(addresses.chain(routes).collect())
    }
}

fn network_of(state: &State, device: &Device) -> Option<NetworkId> {
    use ovl_dataplane::device::Role;
    match device.role()? {
        Role::Bridge(id) | Role::Vxlan(id) => Some(id),
        Role::Tunnel(_) => None,
        Role::Endpoint(id) => state.own_endpoint(id).map(|endpoint| endpoint.network),
    }
}

fn network_name(state: &State, network: Option<NetworkId>) -> String {
    network.map_or_else(String::new, |id| {
        state.view.networks.get(&id).map_or_else(|| id.to_string(), |found| found.network.name.clone())
    })
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Since when what is sent to a host, or to the first member on the way to it, goes by TCP. `None` if it goes by UDP.
fn by_tcp(state: &State, host: NodeId) -> Option<tokio::time::Instant> {
    state.tcp.used_since(state.detours.relay(host).unwrap_or(host))
}

/// Why a host is not reached directly by UDP. `None` if it is.
fn why(state: &State, node: &ovl_cluster::view::Node) -> Option<String> {
    let id = node.record.id;
    let first = state.detours.relay(id);
    let mut reasons = Vec::new();
    if first.is_some() {
        reasons.push(if state.view.is_apart(node) {
            "the two have no address family in common".to_owned()
        } else if state.view.is_framed(node) {
            "no probes pass directly: NAT or a firewall does not let them in".to_owned()
        } else {
            "it does not answer directly".to_owned()
        });
    }
    if let Some(at) = state.reach.elsewhere(id).filter(|_| !state.view.has_other_family(node)) {
        reasons.push(format!("it does not answer at {}, but at {at}", node.record.address.ip()));
    }
    if by_tcp(state, id).is_some() {
        let whom = first.map_or_else(|| "it".to_owned(), |first| state.view.name_of(first));
        reasons.push(format!("{whom} answers over streams and not by UDP, which is blocked"));
    }
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// The networks whose endpoints on this host and on another one do not reach each other, because only sealed packets pass between the two
/// and the networks are not encrypted.
fn plain_across_nat(state: &State, node: &ovl_cluster::view::Node) -> Vec<Problem> {
    let Some(own) = state.view.own().filter(|_| state.view.is_framed(node)) else { return Vec::new() };
    let what = match state.view.crosses_nat(node) {
        true => "there is NAT between the two, and only sealed packets cross it",
        false => "one of the two is not reached at its main address, so only sealed packets pass",
    };
    let name = &node.record.name;
    let both = node.table.networks().filter(|id| own.table.networks().any(|other| other == *id));
    both.filter_map(|id| state.view.networks.get(&id))
        .filter(|found| !found.network.may_be_sealed() && !state.view.is_own(found.network.id))
        .map(|found| {
            let network = &found.network.name;
            let sentence = format!(
                "endpoints of network {network} on this host and on {name} do not reach each other: {what}. Create another network for them, with --encrypted, or with --encrypt auto"
            );
            Code::PlainAcrossNat.about(format!("{network} on {name}"), sentence)
        })
        .collect()
}
