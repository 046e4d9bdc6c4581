//! Chooses addresses and ports of Services, without a central allocator.
//!
//! The host on which a Service is applied chooses, beginning at an offset that follows from the Service's name, so that
//! hosts which choose at the same time seldom choose the same. If two Services still claim the same, on two sides of a
//! partition, the older one keeps it, then the one with the smaller name: see [`ovl_cluster::claims`]. The module owns
//! no state. Begin to read at [`ServiceAllocator::allocate`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::cluster_dns::{ClusterDns, handed_over};
use ipnet::IpNet;
use ovl_cluster::claims::{Claim, balancers_of, claims_of};
use ovl_cluster::digest::hash;
use ovl_cluster::networks::overlaps;
use ovl_cluster::resources::Resources;
use ovl_cluster::view::View;
use ovl_manifest::{FieldProblem, FieldProblems};
use ovl_proto::resource::{
    ClusterIp, IpFamily, IpFamilyPolicy, LoadBalancerIngress, Name, Service, ServicePort, ServiceType,
};

/// The offset of the cluster DNS in a Service range.
const DNS_OFFSET: u128 = 10;
/// The number of addresses at the start of a range that are used last, so that users can choose them.
const MANUAL_ADDRESSES: u128 = 256;
/// The number of ranges of ServiceCIDRs that are followed.
const MAX_CIDRS: usize = 64;
/// The shortest prefixes of ServiceCIDRs that are followed, of IPv4 and IPv6: those of the widest ranges that Kubernetes takes.
const WIDEST_CIDR: (u8, u8) = (12, 64);
/// The number of addresses that are tried before a range counts as full.
const MAX_PROBES: u128 = 1 << 18;

/// The ranges of Service addresses. They must be the same on all hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Ranges of clusterIPs, at most one of each family. The first one is the default.
    pub services: Vec<IpNet>,
    /// Who answers at the address of the cluster DNS.
    pub dns: ClusterDns,
    /// Whether the ranges of ServiceCIDRs are ranges of clusterIPs too.
    pub follows_cidrs: bool,
    /// Pools of LoadBalancer addresses. If empty, Services of type LoadBalancer get no address.
    pub load_balancers: Vec<IpNet>,
    /// Ranges of external IPs. If empty, Services can have none.
    pub external: Vec<IpNet>,
    /// The ports of every host that Services can have.
    pub node_ports: NodePortRange,
}

/// A range of node ports, written `30000-32767`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodePortRange {
    first: u16,
    last: u16,
}

impl Default for NodePortRange {
    /// Returns the default of the Kubernetes API server.
    fn default() -> Self {
        Self { first: 30_000, last: 32_767 }
    }
}

impl std::fmt::Display for NodePortRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// A text is not a range of node ports.
#[derive(Debug)]
pub struct NodePortRangeError(String);

impl std::fmt::Display for NodePortRangeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "'{}' is not a range of ports: give the first and the last one, such as 30000-32767",
            self.0
        )
    }
}

impl std::error::Error for NodePortRangeError {}

impl std::str::FromStr for NodePortRange {
    type Err = NodePortRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
        let bounds = text.split_once('-').and_then(|(first, last)| Some((port(first)?, port(last)?)));
        let bounds = bounds.filter(|(first, last)| first <= last);
        bounds.map(|(first, last)| Self { first, last }).ok_or_else(|| NodePortRangeError(text.to_owned()))
    }
}

impl NodePortRange {
    /// Whether a port is in the range.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Returns the first port that is used without need. Those before it are used last, so that users can choose them: as
    /// in Kubernetes, a thirty-second of the range, at least 16 and at most 128 ports.
    fn first_automatic(self) -> u16 {
        let size = (self.last - self.first).saturating_add(1);
        if size <= 16 { self.first } else { self.first + (size / 32).clamp(16, 128) }
    }
}

impl Ranges {
    /// Returns the addresses of the cluster DNS: the tenth address of each range.
    pub fn dns_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.services.iter().filter_map(|range| address_at(*range, DNS_OFFSET))
    }

    /// Whether an address is reserved for the cluster DNS, so that only a Service of an API server may have it.
    pub fn is_own_dns(&self, address: IpAddr) -> bool {
        self.dns != ClusterDns::Elsewhere && self.dns_addresses().any(|dns| dns == address)
    }

    /// Returns the addresses of the cluster DNS at which ovl itself answers now.
    pub fn answered_dns(&self, resources: &Resources) -> BTreeSet<IpAddr> {
        match self.dns {
            ClusterDns::Elsewhere => BTreeSet::new(),
            ClusterDns::Own => self.dns_addresses().collect(),
            ClusterDns::Auto => {
                let elsewhere = handed_over(resources, self.dns_addresses());
                self.dns_addresses().filter(|address| !elsewhere.contains(address)).collect()
            }
        }
    }

    /// Returns the ranges of clusterIPs that there are: those that are configured, and those of ServiceCIDRs if they are
    /// followed. None overlaps another one. A range of a ServiceCIDR is left out if it is wider than Kubernetes takes, has the
    /// address of a member, or overlaps a network: what has no Service in it is refused.
    pub fn of_services(&self, view: &View) -> Vec<IpNet> {
        if !self.follows_cidrs {
            return self.services.clone();
        }
        let is_taken = |range: &IpNet| {
            let mut hosts = view.nodes.values().flat_map(|node| [node.record.vtep, node.record.address.ip()]);
            let mut subnets = view.networks.values().flat_map(|found| &found.network.subnets);
            let widest = if range.addr().is_ipv4() { WIDEST_CIDR.0 } else { WIDEST_CIDR.1 };
            range.prefix_len() < widest
                || hosts.any(|address| range.contains(&address))
                || subnets.any(|subnet| overlaps(subnet.prefix, *range))
        };
        let added = view.resources.service_cidrs().filter(|range| !is_taken(range)).take(MAX_CIDRS);
        IpNet::aggregate(&self.services.iter().copied().chain(added).collect())
    }

    /// Returns all ranges that are configured.
    pub fn all(&self) -> impl Iterator<Item = IpNet> {
        self.services.iter().chain(&self.load_balancers).chain(&self.external).copied()
    }

    /// Whether another program gives a Service of type LoadBalancer its addresses: its class says so, or this cluster has no
    /// pool. The addresses are in the status of the object then.
    pub fn is_balanced_by_others(&self, service: &Service) -> bool {
        self.load_balancers.is_empty() || service.spec.is_of_other_class()
    }

    fn of(&self, family: IpFamily) -> Option<IpNet> {
        self.services.iter().copied().find(|range| IpFamily::of(range.addr()) == family)
    }
}

/// Claims of Services that are being applied and not in the cluster yet.
#[derive(Debug, Default)]
pub struct ReservedClaims(BTreeMap<Claim, Name>);

/// Allocates addresses and ports for Services that are being applied.
#[derive(Debug)]
pub struct ServiceAllocator<'a> {
    resources: &'a Resources,
    ranges: &'a Ranges,
    /// The ranges in which a clusterIP may be chosen by hand.
    services: Vec<IpNet>,
    reserved: &'a mut ReservedClaims,
    /// Pools without a free address. They are not searched again.
    full: BTreeSet<IpNet>,
}

impl<'a> ServiceAllocator<'a> {
    /// Creates an allocator that avoids the claims of Services and the reserved claims.
    pub fn new(view: &'a View, ranges: &'a Ranges, reserved: &'a mut ReservedClaims) -> Self {
        let services = ranges.of_services(view);
        Self { resources: &view.resources, ranges, services, reserved, full: BTreeSet::new() }
    }

    /// Fills in the addresses and ports that a Service needs. Values of its current version in the cluster are kept.
    ///
    /// # Errors
    ///
    /// The fields whose value is outside a range or in use, or for which nothing is free. A Service of type LoadBalancer for
    /// which no address is free gets none for now: see [`waiting`].
    pub fn allocate(&mut self, service: &mut Service) -> Result<(), Vec<FieldProblem>> {
        let mut problems = FieldProblems::default();
        let name = Name::new(&service.metadata.namespace, &service.metadata.name);
        let old = self.resources.services().get(&name);
        let given = std::mem::take(&mut service.status.load_balancer.ingress);
        if let Some(old) = old {
            carry_over(old, service, self.ranges.node_ports, &mut problems);
        }
        if self.ranges.is_balanced_by_others(service) {
            service.status.load_balancer.ingress = given;
        }
        service.status.load_balancer.ingress.retain(|_| service.spec.kind == ServiceType::LoadBalancer);
        if service.spec.kind != ServiceType::ExternalName {
            self.families(service, &mut problems);
            self.cluster_ips(service, &name, &mut problems);
            self.node_ports(service, &name, &mut problems);
            self.load_balancer(service, &name, &mut problems);
        }
        if !problems.is_empty() {
            return Err(problems.into_inner());
        }
        self.reserved.0.extend(claims_of(service).into_iter().map(|claim| (claim, name.clone())));
        Ok(())
    }

    /// Returns another Service that holds a claim. `None` if it is free.
    fn other(&self, claim: Claim, name: &Name) -> Option<&Name> {
        let holder = self.reserved.0.get(&claim).or_else(|| self.resources.claims().holder(claim));
        holder.filter(|holder| *holder != name)
    }

    fn families(&self, service: &mut Service, problems: &mut FieldProblems) {
        let bare_headless = service.is_headless() && service.spec.selector.is_empty();
        let spec = &mut service.spec;
        let both = spec.cluster_ips.len() > 1 || spec.ip_families.len() > 1;
        let policy = spec.ip_family_policy.unwrap_or(match (both, bare_headless) {
            (true, _) => IpFamilyPolicy::RequireDualStack,
            (false, true) => IpFamilyPolicy::PreferDualStack,
            (false, false) => IpFamilyPolicy::SingleStack,
        });
        let mut families = spec.ip_families.clone();
        if families.is_empty() {
            families = spec.cluster_ips.iter().filter_map(|ip| ip.address()).map(IpFamily::of).collect();
        }
        let available: Vec<IpFamily> =
            self.ranges.services.iter().map(|range| IpFamily::of(range.addr())).collect();
        if families.is_empty() {
            families.extend(available.first());
        }
        for (n, family) in families.iter().enumerate() {
            let reason = format!("no service_range of {family} is configured");
            problems.want(available.contains(family), format!("spec.ipFamilies[{n}]"), reason);
        }
        match policy {
            IpFamilyPolicy::SingleStack => families.truncate(1),
            IpFamilyPolicy::PreferDualStack | IpFamilyPolicy::RequireDualStack => {
                let second = available.iter().find(|family| !families.contains(family));
                families.extend(second.filter(|_| families.len() == 1));
                problems.want(
                    families.len() == 2 || policy == IpFamilyPolicy::PreferDualStack,
                    "spec.ipFamilyPolicy",
                    "RequireDualStack needs a service_range of each address family in the configuration",
                );
            }
        }
        spec.ip_families = families;
        spec.ip_family_policy = Some(policy);
    }

    fn cluster_ips(&self, service: &mut Service, name: &Name, problems: &mut FieldProblems) {
        if service.is_headless() {
            return;
        }
        let given: Vec<IpAddr> = service.cluster_addresses().collect();
        let mut ips = Vec::new();
        for family in &service.spec.ip_families {
            let Some(range) = self.ranges.of(*family) else { continue };
            let path = format!("spec.clusterIPs[{}]", ips.len());
            match given.iter().find(|address| IpFamily::of(**address) == *family) {
                Some(address) => {
                    let reason = format!("{address} is not in the service_range {range}");
                    let is_within = self.services.iter().any(|range| range.contains(address));
                    problems.want(is_within, &path, reason);
                    let is_mirrored = service.metadata.source.is_some();
                    let dns = !is_mirrored && self.ranges.is_own_dns(*address);
                    problems.want(!dns, &path, format!("{address} is reserved for the cluster DNS"));
                    self.want_free(Claim::Address(*address), name, &path, problems);
                    ips.push(ClusterIp::Address(*address));
                }
                None => match self.free_in(range, name) {
                    Some(address) => ips.push(ClusterIp::Address(address)),
                    None => problems.add(path, format!("the service_range {range} is full")),
                },
            }
        }
        service.spec.cluster_ip = ips.first().copied();
        service.spec.cluster_ips = ips;
    }

    fn node_ports(&self, service: &mut Service, name: &Name, problems: &mut FieldProblems) {
        let spec = &mut service.spec;
        let allocates = match spec.kind {
            ServiceType::NodePort => true,
            ServiceType::LoadBalancer => spec.allocate_load_balancer_node_ports != Some(false),
            ServiceType::ClusterIP | ServiceType::ExternalName => {
                spec.ports.iter_mut().for_each(|port| port.node_port = None);
                false
            }
        };
        let mut own: BTreeSet<u16> = spec.ports.iter().filter_map(|port| port.node_port).collect();
        for (n, port) in spec.ports.iter_mut().enumerate() {
            let path = format!("spec.ports[{n}].nodePort");
            match port.node_port {
                Some(given) => {
                    self.want_in_range(given, &path, problems);
                    self.want_free(Claim::NodePort(given), name, &path, problems);
                }
                None if allocates => {
                    port.node_port = self.free_port(name, &port.name, &own);
                    own.extend(port.node_port);
                    problems.want(port.node_port.is_some(), path, "all node ports are in use");
                }
                None => {}
            }
        }
        let path = "spec.healthCheckNodePort";
        if !spec.wants_health_check() {
            spec.health_check_node_port = None;
        } else if let Some(given) = spec.health_check_node_port {
            self.want_in_range(given, path, problems);
            self.want_free(Claim::NodePort(given), name, path, problems);
            problems.want(!own.contains(&given), path, "is a nodePort of the same Service");
        } else {
            spec.health_check_node_port = self.free_port(name, "health check", &own);
            problems.want(spec.health_check_node_port.is_some(), path, "all node ports are in use");
        }
    }

    fn load_balancer(&mut self, service: &mut Service, name: &Name, problems: &mut FieldProblems) {
        if service.spec.kind != ServiceType::LoadBalancer || self.ranges.is_balanced_by_others(service) {
            return;
        }
        let wanted = service.spec.load_balancer_ip;
        let had: Vec<IpAddr> = service.load_balancer_addresses().collect();
        let mut ingress = Vec::new();
        for family in &service.spec.ip_families {
            let of_family = |address: &IpAddr| IpFamily::of(*address) == *family;
            let pools: Vec<IpNet> =
                self.ranges.load_balancers.iter().copied().filter(|pool| of_family(&pool.addr())).collect();
            let in_pool = |address: &IpAddr| pools.iter().any(|pool| pool.contains(address));
            let path = "spec.loadBalancerIP";
            if let Some(wanted) = wanted.filter(of_family) {
                problems.want(in_pool(&wanted), path, format!("{wanted} is not in the load_balancer_pool"));
                self.want_shared(service, wanted, name, path, problems);
                ingress.push(wanted);
            } else if let Some(had) = had.iter().copied().filter(of_family).find(in_pool) {
                self.want_shared(service, had, name, "spec.ports", problems);
                ingress.push(had);
            } else {
                // If none is free, the Service waits for one.
                let open: Vec<IpNet> =
                    pools.iter().copied().filter(|pool| !self.full.contains(pool)).collect();
                for pool in open {
                    match self.free_in(pool, name) {
                        Some(address) => {
                            ingress.push(address);
                            break;
                        }
                        None => {
                            self.full.insert(pool);
                        }
                    }
                }
            }
        }
        let fits = wanted.is_none_or(|wanted| ingress.contains(&wanted));
        problems.want(fits, "spec.loadBalancerIP", "is not of an address family in spec.ipFamilies");
        let ingress = ingress.into_iter().map(|ip| LoadBalancerIngress { ip });
        service.status.load_balancer.ingress = ingress.collect();
    }

    fn want_in_range(&self, port: u16, path: &str, problems: &mut FieldProblems) {
        let range = self.ranges.node_ports;
        problems.want(range.contains(port), path, format!("{port} is not in the node_port_range {range}"));
    }

    fn want_free(&self, claim: Claim, name: &Name, path: &str, problems: &mut FieldProblems) {
        if let Some(other) = self.other(claim, name) {
            problems.add(path, format!("{claim} is in use by Service {other}"));
        }
    }

    /// Adds a problem unless a Service may have an address of the pool at all of its ports. Other Services may have the
    /// address at other ports.
    fn want_shared(
        &self,
        service: &Service,
        address: IpAddr,
        name: &Name,
        path: &str,
        problems: &mut FieldProblems,
    ) {
        for claim in balancers_of(service, address).chain([Claim::Address(address)]) {
            self.want_free(claim, name, path, problems);
        }
    }

    /// Whether another Service of type LoadBalancer has an address, at whichever ports.
    fn is_balanced(&self, address: IpAddr, name: &Name) -> bool {
        let reserved = self.reserved.0.range(Claim::balancers_at(address)).map(|(_, holder)| holder);
        reserved.chain(self.resources.claims().balancers_at(address)).any(|holder| holder != name)
    }

    /// Returns a free address, beginning at an offset that follows from the name. The first addresses of a large range
    /// are tried last. `None` if the range is full.
    fn free_in(&self, range: IpNet, name: &Name) -> Option<IpAddr> {
        let bits = u32::from(range.max_prefix_len() - range.prefix_len()).min(32);
        let size = 1_u128 << bits;
        let first = if size > 2 * MANUAL_ADDRESSES { MANUAL_ADDRESSES } else { 0 };
        let start = name_hash(&name.to_string()) % (size - first);
        let upper = (0..(size - first).min(MAX_PROBES)).map(|n| first + (start + n) % (size - first));
        upper.chain(0..first).filter_map(|offset| address_at(range, offset)).find(|address| {
            is_allocatable(range, *address)
                && self.other(Claim::Address(*address), name).is_none()
                && !self.is_balanced(*address, name)
                && !self.ranges.dns_addresses().any(|dns| dns == *address)
        })
    }

    /// Returns a free node port, beginning at an offset that follows from the name. `None` if all are in use.
    fn free_port(&self, name: &Name, port: &str, own: &BTreeSet<u16>) -> Option<u16> {
        let range = self.ranges.node_ports;
        let first = range.first_automatic();
        let size = u128::from(range.last - first) + 1;
        let start = name_hash(&format!("{name} {port}")) % size;
        let upper = (0..size).filter_map(|n| u16::try_from((start + n) % size).ok()).map(|n| first + n);
        upper
            .chain(range.first..first)
            .find(|port| !own.contains(port) && self.other(Claim::NodePort(*port), name).is_none())
    }
}

/// Returns the Services of type LoadBalancer that wait for an address, because the pool has none that is free, each with
/// the address families.
pub fn waiting<'a>(
    resources: &'a Resources,
    ranges: &'a Ranges,
) -> impl Iterator<Item = (&'a Name, Vec<IpFamily>)> {
    let all = resources.claims().waiting().filter_map(|name| Some((name, resources.services().get(name)?)));
    all.map(|(name, service)| (name, families_waited_for(service, ranges)))
        .filter(|(_, families)| !families.is_empty())
}

/// Returns the address families of which a Service waits for an address of the pool; empty if it waits for none.
pub fn families_waited_for(service: &Service, ranges: &Ranges) -> Vec<IpFamily> {
    if service.spec.kind != ServiceType::LoadBalancer || ranges.is_balanced_by_others(service) {
        return Vec::new();
    }
    let has_pool =
        |family: &IpFamily| ranges.load_balancers.iter().any(|pool| IpFamily::of(pool.addr()) == *family);
    // One that asks for an address waits for that one alone.
    let asked = service.spec.load_balancer_ip.map(IpFamily::of);
    service.lacking_families().filter(has_pool).filter(|family| Some(*family) != asked).collect()
}

/// Keeps allocated values of the current version where the manifest does not set them. Node ports outside of the range,
/// which was another one then, are not kept.
fn carry_over(old: &Service, new: &mut Service, node_ports: NodePortRange, problems: &mut FieldProblems) {
    new.metadata.creation_timestamp = old.metadata.creation_timestamp;
    let reached = |service: &Service| service.spec.kind != ServiceType::ExternalName;
    if !reached(old) || !reached(new) {
        return;
    }
    match (old.spec.cluster_ips.first(), new.spec.cluster_ips.first()) {
        (_, None) => new.spec.cluster_ips.clone_from(&old.spec.cluster_ips),
        (Some(old), Some(new)) if old != new => {
            problems
                .add("spec.clusterIP", format!("is {old} and cannot be changed: delete the Service first"));
        }
        _ => {}
    }
    new.spec.cluster_ip = new.spec.cluster_ips.first().copied();
    let policy = new.spec.ip_family_policy;
    if policy.is_none() && new.spec.ip_families.is_empty() {
        new.spec.ip_family_policy = old.spec.ip_family_policy;
    }
    if new.spec.ip_families.is_empty() {
        new.spec.ip_families.clone_from(&old.spec.ip_families);
    }
    if new.spec.ip_family_policy == Some(IpFamilyPolicy::SingleStack) {
        new.spec.ip_families.truncate(1);
        new.spec.cluster_ips.truncate(1);
    }
    for port in &mut new.spec.ports {
        let same = |other: &&ServicePort| {
            other.protocol == port.protocol
                && (other.port == port.port || !port.name.is_empty() && other.name == port.name)
        };
        let had = old.spec.ports.iter().find(same).and_then(|port| port.node_port);
        port.node_port = port.node_port.or(had.filter(|port| node_ports.contains(*port)));
    }
    if new.spec.wants_health_check() {
        let had = old.spec.health_check_node_port.filter(|port| node_ports.contains(*port));
        new.spec.health_check_node_port = new.spec.health_check_node_port.or(had);
    }
    new.status = old.status.clone();
}

/// Hashes a name, to spread names over a range.
fn name_hash(text: &str) -> u128 {
    hash(text.as_bytes()).iter().take(8).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// Returns the address at an offset of a range. `None` if it is outside.
fn address_at(range: IpNet, offset: u128) -> Option<IpAddr> {
    let address = match range.network() {
        IpAddr::V4(first) => IpAddr::V4(
            u32::try_from(offset).ok().and_then(|offset| u32::from(first).checked_add(offset))?.into(),
        ),
        IpAddr::V6(first) => IpAddr::V6(u128::from(first).checked_add(offset)?.into()),
    };
    range.contains(&address).then_some(address)
}

/// Whether an address may be allocated: not the first and the last one, which may be taken for network and broadcast
/// addresses.
fn is_allocatable(range: IpNet, address: IpAddr) -> bool {
    let small = range.max_prefix_len() - range.prefix_len() < 3;
    small || (address != range.network() && address != range.broadcast())
}

#[cfg(test)]
mod tests;
