//! Chooses the host that announces each LoadBalancer address, and computes the answers to health checks.
//!
//! Hosts do not negotiate. Each host computes the announcer by rendezvous hashing over the hosts that can serve the
//! address, so if a host fails, only its addresses move. A host names the addresses that it announces in its owner
//! table. It withdraws an address only when the chosen host names it there: a host that has just restarted does not yet
//! know the whole cluster. Services that share an address have one announcer.
//!
//! [`Ingress`] owns the addresses that were last planned. Begin to read at [`Ingress::plan`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NodeId;
use ovl_proto::record::PeerState;
use ovl_proto::resource::{Name, Service, TrafficPolicy};

use ovl_cluster::backends::{Backends, Target, ready_targets, targets};
use ovl_cluster::digest::hash;
use ovl_cluster::view::{Node, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::op::{AnnouncedOp, Op};
use ovl_dataplane::state::Dataplane;

use super::allocation::Ranges;
use super::permits::Permits;

/// The number of announcements of an address after it moved here, and after hosts joined or left: a frame may be lost,
/// and another host may have announced it on the other side of a partition.
const REPEATS: u8 = 3;

/// The answer at a `healthCheckNodePort`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The port, on all addresses of the host.
    pub port: u16,
    /// The number of ready backends on this host. One that is shutting down does not count, although connections reach it
    /// while no other is left: a load balancer should go to another host.
    pub local: usize,
}

/// The part of one Service on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ServiceIngress {
    announced: BTreeSet<IpAddr>,
    health: Option<Health>,
}

/// The LoadBalancer addresses and health checks of one host.
#[derive(Debug, Clone, Default)]
pub struct Ingress {
    ranges: Ranges,
    services: BTreeMap<Name, ServiceIngress>,
    /// The announcements that were planned last.
    planned: BTreeSet<(Device, IpAddr)>,
    /// Addresses that the kernel rejected.
    refused: BTreeSet<IpAddr>,
    /// The number of announcements that are still due, by address.
    again: BTreeMap<IpAddr, u8>,
    /// Whether the announced addresses or health checks may have changed.
    changed: bool,
}

impl Ingress {
    /// Creates an empty plan. `ranges` are those that the host is configured with.
    pub fn new(ranges: Ranges) -> Self {
        Self { ranges, ..Self::default() }
    }

    /// Returns the ranges that the host is configured with.
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Returns the operations for these changed Services. With `all`, hosts or their announcements may have changed
    /// too.
    ///
    /// It must not be called before gossip has caught up.
    pub fn plan<'a>(
        &mut self,
        view: &View,
        backends: &Backends,
        services: impl Iterator<Item = &'a Name>,
        all: bool,
        uplink: Option<Device>,
    ) -> Vec<Op> {
        let balancer =
            |name: &Name| view.resources.services().get(name).filter(|service| is_balancer(service));
        let concerned = services.filter(|name| self.services.contains_key(name) || balancer(name).is_some());
        let mut names: BTreeSet<Name> = concerned.cloned().collect();
        if all {
            names.extend(view.resources.services().keys().filter(|name| balancer(name).is_some()).cloned());
            names.extend(self.services.keys().cloned());
        } else if names.is_empty() {
            return Vec::new();
        }
        self.changed = true;
        // The announcer of an address follows from all Services that share it.
        let shared: Vec<&Name> = names
            .iter()
            .filter_map(|name| view.resources.services().get(name))
            .flat_map(Service::load_balancer_addresses)
            .flat_map(|address| view.resources.claims().balancers_at(address))
            .collect();
        names.extend(shared.into_iter().cloned());
        let permits = Permits::of(view, &self.ranges);
        for name in names {
            match balancer(&name).map(|service| service_ingress(view, backends, &permits, &name, service)) {
                Some(part) => drop(self.services.insert(name, part)),
                None => drop(self.services.remove(&name)),
            }
        }
        let wanted: BTreeSet<(Device, IpAddr)> = uplink
            .into_iter()
            .flat_map(|device| self.announced().map(move |address| (device, address)))
            .collect();
        let new = wanted.iter().filter(|announced| all || !self.planned.contains(announced));
        self.again.extend(new.map(|(_, address)| (*address, REPEATS)));
        let withdrawn = self
            .planned
            .difference(&wanted)
            .map(|(device, address)| Op::Announced(AnnouncedOp::Delete(*device, *address)));
        let new = wanted
            .difference(&self.planned)
            .map(|(device, address)| Op::Announced(AnnouncedOp::Add(*device, *address)));
        let ops = withdrawn.chain(new).collect();
        self.planned = wanted;
        ops
    }

    fn announced(&self) -> impl Iterator<Item = IpAddr> {
        self.services.values().flat_map(|part| part.announced.iter().copied())
    }

    /// Returns the desired data plane, computed anew for all Services.
    ///
    /// It must not be called before gossip has caught up.
    pub fn desired(&self, view: &View, backends: &Backends, uplink: Option<Device>) -> Dataplane {
        let mut anew = self.clone();
        anew.plan(view, backends, std::iter::empty(), true, uplink);
        anew.dataplane()
    }

    /// Returns the data plane that was last planned.
    pub fn dataplane(&self) -> Dataplane {
        Dataplane { announced: self.planned.clone(), ..Dataplane::default() }
    }

    /// Records whether the kernel accepted an address.
    pub fn record_outcome(&mut self, address: IpAddr, accepted: bool) {
        self.changed = true;
        if accepted {
            self.refused.remove(&address);
        } else {
            self.refused.insert(address);
        }
    }

    /// Whether announced addresses or health checks may have changed since the last call.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns the addresses that this host's owner table should name as announced: those that were planned and not
    /// rejected.
    pub fn claimed(&self) -> BTreeSet<IpAddr> {
        let all = self.planned.iter().map(|(_, address)| *address);
        all.filter(|address| !self.refused.contains(address)).collect()
    }

    /// Returns at most `max` addresses that must be announced once more.
    pub fn again(&mut self, max: usize) -> Vec<(Device, IpAddr)> {
        let now: Vec<IpAddr> = self.again.keys().take(max).copied().collect();
        for address in &now {
            if let Some(times) = self.again.get_mut(address) {
                *times -= 1;
                if *times == 0 {
                    self.again.remove(address);
                }
            }
        }
        self.planned.iter().filter(|(_, address)| now.contains(address)).copied().collect()
    }

    /// Returns the answers to health checks, by Service.
    pub fn health(&self) -> impl Iterator<Item = (&Name, &Health)> {
        self.services.iter().filter_map(|(name, part)| Some((name, part.health.as_ref()?)))
    }
}

/// Returns the hosts whose owner tables name an address as announced. While an address moves, it can be two.
pub fn announcers(view: &View, address: IpAddr) -> impl Iterator<Item = &Node> {
    view.nodes.values().filter(move |node| view.counts(node) && node.table.announces(address))
}

fn is_balancer(service: &Service) -> bool {
    let is_any =
        service.load_balancer_addresses().next().is_some() || service.spec.health_check_node_port.is_some();
    is_any && service.is_translated()
}

fn service_ingress(
    view: &View,
    backends: &Backends,
    permits: &Permits,
    name: &Name,
    service: &Service,
) -> ServiceIngress {
    let addresses = service.load_balancer_addresses();
    let addresses = addresses.filter(|address| permits.is_announced(service, *address));
    let announced = addresses.filter(|address| is_ours(view, backends, *address)).collect();
    let health_port = service.spec.health_check_node_port;
    let health_port = health_port.filter(|port| permits.health_check_port(*port).is_none());
    let health = health_port.map(|port| {
        // A backend with several ports or with addresses of both families counts once.
        let local = |ipv4| {
            let ports = 0..service.spec.ports.len();
            let here = ports.flat_map(|port| ready_targets(backends.of(name), port, ipv4, Some(view.me)));
            here.map(|target| target.address).collect::<BTreeSet<IpAddr>>().len()
        };
        Health { port, local: local(true).max(local(false)) }
    });
    ServiceIngress { announced, health }
}

/// Returns the backends of all ports of a Service in one address family.
fn behind(backends: &Backends, name: &Name, service: &Service, ipv4: bool) -> BTreeSet<Target> {
    let ports = 0..service.spec.ports.len();
    ports.flat_map(|port| targets(backends.of(name), port, ipv4, None)).collect()
}

/// Whether this host announces an address.
fn is_ours(view: &View, backends: &Backends, address: IpAddr) -> bool {
    let Some(chosen) = chosen(view, backends, address) else { return false };
    let has = |node: NodeId| view.nodes.get(&node).is_some_and(|node| node.table.announces(address));
    chosen == view.me || (has(view.me) && !has(chosen))
}

/// Returns the Services that share an address, the oldest first.
fn sharing(view: &View, address: IpAddr) -> Vec<(&Name, &Service)> {
    let names: BTreeSet<&Name> = view.resources.claims().balancers_at(address).collect();
    let services = names.into_iter().filter_map(|name| Some((name, view.resources.services().get(name)?)));
    let has = |service: &Service| {
        service.is_translated() && service.load_balancer_addresses().any(|other| other == address)
    };
    let mut all: Vec<(&Name, &Service)> = services.filter(|(_, service)| has(service)).collect();
    all.sort_by_key(|(name, service)| (service.metadata.creation_timestamp, *name));
    all
}

/// Returns the host that should announce an address: among the hosts that can serve it, the one with the highest hash
/// of host and address. `None` if there is no host.
///
/// If no host can serve all Services that share the address, the older ones decide.
fn chosen(view: &View, backends: &Backends, address: IpAddr) -> Option<NodeId> {
    // A host whose ovld is silent cannot take over an address, but its kernel still answers for those that it
    // announces.
    let is_candidate =
        |node: &&Node| view.counts(node) && (node.state == PeerState::Alive || node.table.announces(address));
    let mut hosts: Vec<NodeId> =
        view.nodes.values().filter(is_candidate).map(|node| node.record.id).collect();
    // Endpoints of switched networks can answer outside clients only through their own host.
    let switched: Vec<IpNet> =
        view.switched().flat_map(|network| &network.subnets).map(|subnet| subnet.prefix).collect();
    let from_all = |target: &Target| !switched.iter().any(|prefix| prefix.contains(&target.address));
    for (name, service) in sharing(view, address) {
        let behind = behind(backends, name, service, address.is_ipv4());
        if service.spec.external_traffic_policy == TrafficPolicy::Cluster && behind.iter().any(from_all) {
            continue;
        }
        let local = |host: &&NodeId| behind.iter().any(|target| target.host == Some(**host));
        let serving: Vec<NodeId> = hosts.iter().filter(local).copied().collect();
        // Without backends, one host must still refuse connections.
        if !serving.is_empty() {
            hosts = serving;
        }
    }
    hosts.into_iter().max_by_key(|host| rank(*host, address))
}

fn rank(host: NodeId, address: IpAddr) -> [u8; 32] {
    let mut text = host.0.to_vec();
    match address {
        IpAddr::V4(address) => text.extend(address.octets()),
        IpAddr::V6(address) => text.extend(address.octets()),
    }
    hash(&text)
}
