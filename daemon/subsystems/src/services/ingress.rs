//! LoadBalancers: which host announces each address, and what a host answers to those who check its health.
//!
//! Nobody is asked. Each host computes who it should be, by rendezvous hashing over the hosts that can serve the
//! address: so when one goes, only its own addresses move. What a host has taken stands in its table. It lets go
//! when the one that should have it says so there, and not before: a host that has just come back has still to
//! hear of everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NodeId;
use ovl_proto::record::PeerState;
use ovl_proto::resource::{Name, Service, TrafficPolicy};

use ovl_cluster::backends::{Backends, Target, targets};
use ovl_cluster::digest::hash;
use ovl_cluster::view::{Node, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;

/// So often an address is announced after it was taken, and after hosts came or went: a frame may be lost, and
/// on another side of a split another host may have had it.
const TIMES: u8 = 3;

/// What is answered at a `healthCheckNodePort`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Where, on all addresses of the host.
    pub port: u16,
    /// How many backends that take connections are on this host.
    pub local: usize,
}

/// What one Service comes to on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Here {
    announced: BTreeSet<IpAddr>,
    health: Option<Health>,
}

/// All LoadBalancers of the cluster, for one host.
#[derive(Debug, Clone, Default)]
pub struct Ingress {
    services: BTreeMap<Name, Here>,
    /// What was planned last.
    planned: BTreeSet<(Device, IpAddr)>,
    /// Addresses that the kernel did not take.
    refused: BTreeSet<IpAddr>,
    /// How often each is still to be announced.
    again: BTreeMap<IpAddr, u8>,
    /// What is said and answered may be other than it was.
    news: bool,
}

impl Ingress {
    /// What these Services need beyond what was planned last; `all`: hosts, or what they have announced, may be
    /// others. Not before gossip has caught up.
    pub fn plan<'a>(
        &mut self,
        view: &View,
        backends: &Backends,
        services: impl Iterator<Item = &'a Name>,
        all: bool,
        uplink: Option<Device>,
    ) -> Vec<Op> {
        let balancer = |name: &Name| view.resources.services.get(name).filter(|service| is_balancer(service));
        let concerned = services.filter(|name| self.services.contains_key(name) || balancer(name).is_some());
        let mut names: BTreeSet<Name> = concerned.cloned().collect();
        if all {
            names.extend(view.resources.services.keys().filter(|name| balancer(name).is_some()).cloned());
            names.extend(self.services.keys().cloned());
        } else if names.is_empty() {
            return Vec::new();
        }
        self.news = true;
        for name in names {
            match balancer(&name).map(|service| here(view, backends, &name, service)) {
                Some(here) => drop(self.services.insert(name, here)),
                None => drop(self.services.remove(&name)),
            }
        }
        let wanted: BTreeSet<(Device, IpAddr)> = uplink
            .into_iter()
            .flat_map(|device| self.announced().map(move |address| (device, address)))
            .collect();
        let new = wanted.iter().filter(|announced| all || !self.planned.contains(announced));
        self.again.extend(new.map(|(_, address)| (*address, TIMES)));
        let gone =
            self.planned.difference(&wanted).map(|(device, address)| Op::DelAnnounced(*device, *address));
        let new =
            wanted.difference(&self.planned).map(|(device, address)| Op::AddAnnounced(*device, *address));
        let ops = gone.chain(new).collect();
        self.planned = wanted;
        ops
    }

    fn announced(&self) -> impl Iterator<Item = IpAddr> {
        self.services.values().flat_map(|here| here.announced.iter().copied())
    }

    /// What belongs into the desired state.
    pub fn dataplane(&self) -> Dataplane {
        Dataplane { announced: self.planned.clone(), ..Dataplane::default() }
    }

    /// What became of an address.
    pub fn note(&mut self, address: IpAddr, taken: bool) {
        self.news = true;
        if taken {
            self.refused.remove(&address);
        } else {
            self.refused.insert(address);
        }
    }

    /// Whether there is something to tell since this was asked last.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// What this host can say that it announces.
    pub fn said(&self) -> BTreeSet<IpAddr> {
        let all = self.planned.iter().map(|(_, address)| *address);
        all.filter(|address| !self.refused.contains(address)).collect()
    }

    /// Addresses that are to be announced once more, at most so many.
    pub fn again(&mut self, most: usize) -> Vec<(Device, IpAddr)> {
        let now: Vec<IpAddr> = self.again.keys().take(most).copied().collect();
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

    /// What is answered where, for each Service.
    pub fn health(&self) -> impl Iterator<Item = (&Name, &Health)> {
        self.services.iter().filter_map(|(name, here)| Some((name, here.health.as_ref()?)))
    }
}

/// The hosts that say that they announce an address: one, but for an instant.
pub fn announcers(view: &View, address: IpAddr) -> impl Iterator<Item = &Node> {
    view.nodes.values().filter(move |node| view.counts(node) && node.table.announces(address))
}

fn is_balancer(service: &Service) -> bool {
    service.load_balancer_addresses().next().is_some() || service.spec.health_check_node_port.is_some()
}

fn here(view: &View, backends: &Backends, name: &Name, service: &Service) -> Here {
    let behind = |ipv4| -> BTreeSet<Target> {
        let ports = 0..service.spec.ports.len();
        ports.flat_map(|port| targets(backends.of(name), port, ipv4, None)).collect()
    };
    let (v4, v6) = (behind(true), behind(false));
    let of = |ipv4: bool| if ipv4 { &v4 } else { &v6 };
    let addresses = service.load_balancer_addresses();
    let announced =
        addresses.filter(|address| is_ours(view, service, of(address.is_ipv4()), *address)).collect();
    let health = service.spec.health_check_node_port.map(|port| {
        // A backend of several ports or of both families is one.
        let local = |behind: &BTreeSet<Target>| {
            let here = behind.iter().filter(|target| target.host == Some(view.me));
            here.map(|target| target.address).collect::<BTreeSet<IpAddr>>().len()
        };
        Health { port, local: local(&v4).max(local(&v6)) }
    });
    Here { announced, health }
}

/// Whether this host announces an address.
fn is_ours(view: &View, service: &Service, behind: &BTreeSet<Target>, address: IpAddr) -> bool {
    let Some(chosen) = chosen(view, service, behind, address) else { return false };
    let has = |node: NodeId| view.nodes.get(&node).is_some_and(|node| node.table.announces(address));
    chosen == view.me || (has(view.me) && !has(chosen))
}

/// The host that should announce an address: of those that can serve it the one with the highest hash of both.
fn chosen(view: &View, service: &Service, behind: &BTreeSet<Target>, address: IpAddr) -> Option<NodeId> {
    // A host whose ovld is silent takes nothing; what it has taken its kernel still answers for.
    let there =
        |node: &&Node| view.counts(node) && (node.state == PeerState::Alive || node.table.announces(address));
    let hosts: Vec<NodeId> = view.nodes.values().filter(there).map(|node| node.record.id).collect();
    let local = |host: &&NodeId| behind.iter().any(|target| target.host == Some(**host));
    // Endpoints of switched networks answer to nobody outside but by their own host.
    let switched: Vec<IpNet> =
        view.switched().flat_map(|network| &network.subnets).map(|subnet| subnet.prefix).collect();
    let from_all = |target: &Target| !switched.iter().any(|prefix| prefix.contains(&target.address));
    let everywhere =
        service.spec.external_traffic_policy == TrafficPolicy::Cluster && behind.iter().any(from_all);
    let serving: Vec<NodeId> =
        if everywhere { Vec::new() } else { hosts.iter().filter(local).copied().collect() };
    // Without backends somebody has to refuse.
    let candidates = if serving.is_empty() { hosts } else { serving };
    candidates.into_iter().max_by_key(|host| rank(*host, address))
}

fn rank(host: NodeId, address: IpAddr) -> [u8; 32] {
    let mut text = host.0.to_vec();
    match address {
        IpAddr::V4(address) => text.extend(address.octets()),
        IpAddr::V6(address) => text.extend(address.octets()),
    }
    hash(&text)
}
