//! Conflicts of Services about addresses and node ports. Hosts choose these without consensus when a Service is
//! applied, so on two sides of a split two Services can claim the same one. The older Service keeps it, then the
//! one with the smaller name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::resource::{Created, Kind, Name, Protocol, ResourceKey, Service, ServiceType};

/// An address or port that only one Service may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// A cluster IP, or an address of a LoadBalancer.
    Address(IpAddr),
    /// A node port, for all protocols.
    NodePort(u16),
    /// A port at an external address. Other Services may have other ports of the address.
    External(IpAddr, Protocol, u16),
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::NodePort(port) => write!(f, "node port {port}"),
            Self::External(address, protocol, port) => write!(f, "{address} port {port}/{protocol}"),
        }
    }
}

/// Returns what a Service claims.
pub fn claims_of(service: &Service) -> BTreeSet<Claim> {
    let addresses = service.cluster_addresses().chain(service.load_balancer_addresses());
    let ports = service.spec.ports.iter().filter_map(|port| port.node_port);
    let ports = ports.chain(service.spec.health_check_node_port);
    addresses.map(Claim::Address).chain(ports.map(Claim::NodePort)).chain(externals_of(service)).collect()
}

/// Returns the ports at external addresses that a Service claims.
fn externals_of(service: &Service) -> impl Iterator<Item = Claim> {
    let ports = |address| {
        service.spec.ports.iter().map(move |port| Claim::External(address, port.protocol, port.port))
    };
    service.spec.external_ips.iter().copied().flat_map(ports)
}

/// Returns a Service without its lost claims.
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
    service.status.load_balancer.ingress.retain(|ingress| kept(ingress.ip));
    service
}

/// The claims of all Services. A Service that lost a claim works without it until the coordinator has allocated
/// another address or port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claims {
    all: BTreeMap<Claim, BTreeSet<(Created, Name)>>,
    /// Services that lost a claim, as they were written.
    contested: BTreeMap<Name, Service>,
    /// LoadBalancers without an address.
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
        holders.into_iter().flatten().find(|holder| *holder != name)
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

    /// Returns a Service as it was written, if it lost a claim.
    pub fn contested(&self, name: &Name) -> Option<&Service> {
        self.contested.get(name)
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
        let others: BTreeSet<Name> =
            claimants.map(|(_, other)| other.clone()).filter(|other| *other != name).collect();
        let at = before.symmetric_difference(&after).filter_map(|claim| match claim {
            Claim::Address(address) | Claim::External(address, ..) => Some(*address),
            Claim::NodePort(_) => None,
        });
        let sharing: BTreeSet<Name> =
            at.flat_map(|address| self.externals_at(address)).map(|(_, other)| other.clone()).collect();
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
        let lost: BTreeSet<Claim> = claims_of(&raw)
            .into_iter()
            .filter(given)
            .filter(|claim| self.holder(*claim) != Some(name))
            .collect();
        let effective = if lost.is_empty() { raw.clone() } else { without(&raw, &lost) };
        if !lost.is_empty() {
            self.contested.insert(name.clone(), raw);
        }
        let waits = effective.spec.kind == ServiceType::LoadBalancer
            && effective.status.load_balancer.ingress.is_empty();
        if waits {
            self.waiting.insert(name.clone())
        } else {
            self.waiting.remove(name)
        };
        let changed = services.get(name) != Some(&effective);
        services.insert(name.clone(), effective);
        changed
    }
}
