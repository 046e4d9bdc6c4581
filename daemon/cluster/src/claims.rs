//! Conflicts of Services about addresses and node ports. Hosts choose these without consensus when a Service is
//! applied, so on two sides of a split two Services can claim the same one. The older Service keeps it, then the
//! one with the smaller name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::resource::{Created, Kind, Name, Protocol, ResourceKey, Service, ServiceType};

/// An address or port that only one Service may have. An address of a LoadBalancer can have several, at different ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// A cluster IP.
    Address(IpAddr),
    /// A node port, for all protocols.
    NodePort(u16),
    /// A port at an external address. Other Services may have other ports of the address.
    External(IpAddr, Protocol, u16),
    /// A port at an address of a LoadBalancer. Other Services of type LoadBalancer may have other ports of the address, and
    /// no Service can have it as an external address.
    Balancer(IpAddr, Protocol, u16),
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::NodePort(port) => write!(f, "node port {port}"),
            Self::External(address, protocol, port) | Self::Balancer(address, protocol, port) => {
                write!(f, "{address} port {port}/{protocol}")
            }
        }
    }
}

/// Returns what a Service claims.
pub fn claims_of(service: &Service) -> BTreeSet<Claim> {
    let addresses = service.cluster_addresses().map(Claim::Address);
    let balanced = service.load_balancer_addresses().flat_map(|address| balancers_of(service, address));
    let ports = service.spec.ports.iter().filter_map(|port| port.node_port);
    let ports = ports.chain(service.spec.health_check_node_port).map(Claim::NodePort);
    addresses.chain(balanced).chain(ports).chain(externals_of(service)).collect()
}

/// Returns the ports that a Service claims at an address of a LoadBalancer.
pub fn balancers_of(service: &Service, address: IpAddr) -> impl Iterator<Item = Claim> {
    service.spec.ports.iter().map(move |port| Claim::Balancer(address, port.protocol, port.port))
}

/// Returns the ports at external addresses that a Service claims.
fn externals_of(service: &Service) -> impl Iterator<Item = Claim> {
    let ports = |address| {
        service.spec.ports.iter().map(move |port| Claim::External(address, port.protocol, port.port))
    };
    service.spec.external_ips.iter().copied().flat_map(ports)
}

/// Returns a Service without its lost claims. If it lost a port at an address of a LoadBalancer, it loses the address.
fn without(service: &Service, lost: &BTreeSet<Claim>) -> Service {
    let mut service = service.clone();
    let kept = |address: IpAddr| !lost.contains(&Claim::Address(address));
    let spec = &mut service.spec;
    spec.cluster_ips.retain(|ip| ip.address().is_none_or(kept));
    spec.cluster_ip = spec.cluster_ips.first().copied();
    for port in &mut spec.ports {
        port.node_port = port.node_port.filter(|port| !lost.contains(&Claim::NodePort(*port)));
    }
    let health = &mut spec.health_check_node_port;
    *health = health.filter(|port| !lost.contains(&Claim::NodePort(*port)));
    let lost_at: BTreeSet<IpAddr> = lost.iter().filter_map(Claim::balancer).collect();
    service.status.load_balancer.ingress.retain(|ingress| !lost_at.contains(&ingress.ip));
    service
}

/// Whether a Service lacks an address of a LoadBalancer of one of its address families.
fn waits(service: &Service) -> bool {
    service.spec.kind == ServiceType::LoadBalancer && service.lacking_families().next().is_some()
}

impl Claim {
    /// Returns the address of a LoadBalancer. `None` for other claims.
    fn balancer(&self) -> Option<IpAddr> {
        match self {
            Self::Balancer(address, ..) => Some(*address),
            Self::Address(_) | Self::NodePort(_) | Self::External(..) => None,
        }
    }

    /// Returns the address, whatever is claimed of it.
    fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address(address) | Self::External(address, ..) | Self::Balancer(address, ..) => {
                Some(*address)
            }
            Self::NodePort(_) => None,
        }
    }

    /// Returns the first and the last claim of ports at an address of a LoadBalancer, in their order.
    pub fn balancers_at(address: IpAddr) -> std::ops::RangeInclusive<Self> {
        Self::Balancer(address, Protocol::Tcp, 0)..=Self::Balancer(address, Protocol::Sctp, u16::MAX)
    }
}

/// The claims of all Services. A Service that lost a claim works without it until the coordinator has allocated
/// another address or port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claims {
    all: BTreeMap<Claim, BTreeSet<(Created, Name)>>,
    /// Services that lost a claim, as they were written.
    contested: BTreeMap<Name, Service>,
    /// LoadBalancers that lack an address of one of their address families.
    waiting: BTreeSet<Name>,
}

impl Claims {
    /// Returns the Service that holds a claim.
    pub fn holder(&self, claim: Claim) -> Option<&Name> {
        self.all.get(&claim)?.first().map(|(_, name)| name)
    }

    /// Returns another Service that holds the port at an external address, or the whole address.
    fn other_at(&self, name: &Name, claim: Claim) -> Option<&Name> {
        let Claim::External(address, ..) = claim else { return None };
        let holders = [self.holder(Claim::Address(address)), self.holder(claim)];
        let holders = holders.into_iter().flatten().chain(self.balancers_at(address));
        holders.into_iter().find(|holder| *holder != name)
    }

    /// Whether a Service holds a port at an external address: no other Service has the whole address, and no older
    /// one the port.
    pub fn has_external(&self, name: &Name, address: IpAddr, protocol: Protocol, port: u16) -> bool {
        self.other_at(name, Claim::External(address, protocol, port)).is_none()
    }

    /// Returns the ports at external addresses that a Service lost, with the Services that hold them.
    pub fn lost_externals<'a>(
        &'a self,
        name: &'a Name,
        service: &'a Service,
    ) -> impl Iterator<Item = (Claim, &'a Name)> {
        externals_of(service).filter_map(move |claim| Some((claim, self.other_at(name, claim)?)))
    }

    /// Returns the Services with ports at an external address.
    fn externals_at(&self, address: IpAddr) -> impl Iterator<Item = &(Created, Name)> {
        let all = self.all.range(Claim::External(address, Protocol::Tcp, 0)..);
        let here =
            all.take_while(move |(claim, _)| matches!(claim, Claim::External(at, ..) if *at == address));
        here.flat_map(|(_, claimants)| claimants)
    }

    /// Returns the Services that claim ports at an address of a LoadBalancer, once for each port.
    pub fn balancers_at(&self, address: IpAddr) -> impl Iterator<Item = &Name> {
        self.all
            .range(Claim::balancers_at(address))
            .flat_map(|(_, claimants)| claimants)
            .map(|(_, name)| name)
    }

    /// Whether a Service may have what it claims: no other Service has it, and none has the address as its cluster IP.
    fn has(&self, name: &Name, claim: Claim) -> bool {
        let whole = claim.balancer().and_then(|address| self.holder(Claim::Address(address)));
        self.holder(claim) == Some(name) && whole.is_none_or(|holder| holder == name)
    }

    /// Returns a Service as it was written, if it lost a claim.
    pub fn contested(&self, name: &Name) -> Option<&Service> {
        self.contested.get(name)
    }

    /// Returns the Services of type LoadBalancer that lack an address of one of their address families.
    pub fn waiting(&self) -> impl Iterator<Item = &Name> {
        self.waiting.iter()
    }

    /// Returns the Services that lost a claim or lack an address.
    pub fn lacking(&self) -> impl Iterator<Item = &Name> {
        self.contested.keys().chain(&self.waiting)
    }

    /// Adds, replaces or removes a Service. Returns the Services that this changes, itself first.
    pub(crate) fn put(
        &mut self,
        services: &mut BTreeMap<Name, Service>,
        name: Name,
        service: Option<Service>,
    ) -> Vec<ResourceKey> {
        let effective = services.remove(&name);
        let old = self.contested.remove(&name).or(effective);
        let of = |service: &Option<Service>| service.as_ref().map(claims_of).unwrap_or_default();
        let (before, after) = (of(&old), of(&service));
        let entry = |service: &Service| (service.metadata.creation_timestamp, name.clone());
        for claim in &before {
            if let (Some(old), Some(claimants)) = (&old, self.all.get_mut(claim)) {
                claimants.remove(&entry(old));
                if claimants.is_empty() {
                    self.all.remove(claim);
                }
            }
        }
        self.waiting.remove(&name);
        if let Some(service) = service {
            for claim in &after {
                self.all.entry(*claim).or_default().insert(entry(&service));
            }
            services.insert(name.clone(), service);
        }
        let claimants = before.union(&after).filter_map(|claim| self.all.get(claim)).flatten();
        let claimants = claimants.map(|(_, other)| other);
        let at: BTreeSet<IpAddr> = before.symmetric_difference(&after).filter_map(Claim::address).collect();
        let balancers: BTreeSet<&Name> = at.iter().flat_map(|address| self.balancers_at(*address)).collect();
        let others: BTreeSet<Name> =
            claimants.chain(balancers.iter().copied()).filter(|other| **other != name).cloned().collect();
        let externals = at.iter().flat_map(|address| self.externals_at(*address)).map(|(_, other)| other);
        let sharing: BTreeSet<Name> = externals.chain(balancers).cloned().collect();
        self.judge(services, &name);
        let mut changed = vec![name.clone()];
        let others: BTreeSet<Name> = others.into_iter().filter(|other| self.judge(services, other)).collect();
        changed.extend(others.union(&sharing).filter(|other| **other != name).cloned());
        changed.into_iter().map(|name| ResourceKey { kind: Kind::Service, name }).collect()
    }

    /// Computes the effective form of a Service. Returns whether it has changed.
    fn judge(&mut self, services: &mut BTreeMap<Name, Service>, name: &Name) -> bool {
        let raw = self.contested.remove(name);
        let Some(raw) = raw.or_else(|| services.get(name).cloned()) else { return false };
        // Ports at external addresses cannot be allocated, so their loss does not make a Service contested.
        let given = |claim: &Claim| !matches!(claim, Claim::External(..));
        let lost: BTreeSet<Claim> =
            claims_of(&raw).into_iter().filter(given).filter(|claim| !self.has(name, *claim)).collect();
        let effective = if lost.is_empty() { raw.clone() } else { without(&raw, &lost) };
        if !lost.is_empty() {
            self.contested.insert(name.clone(), raw);
        }
        if waits(&effective) {
            self.waiting.insert(name.clone())
        } else {
            self.waiting.remove(name)
        };
        let changed = services.get(name) != Some(&effective);
        services.insert(name.clone(), effective);
        changed
    }
}
