//! Which addresses and ports of a Service this host translates.
//!
//! Any member may write a Service, so each host holds what a Service names to its own configuration and to what it knows
//! of the hosts: traffic to a host's own address, and to ovl's own ports, is never taken over. [`Permits`] is computed
//! from the view. Begin to read at [`Permits::denials`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::{Node, View};
use ovl_manifest::FieldProblem;
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::resource::{Protocol, Service};

use super::allocation::{NodePortRange, Ranges};

/// What Services may take on one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Permits {
    ranges: Ranges,
    /// The ranges of clusterIPs.
    services: Vec<IpNet>,
    /// The addresses of the cluster DNS at which ovl answers.
    own_dns: BTreeSet<IpAddr>,
    /// The addresses of all members, whether they are alive or not, with their names.
    hosts: BTreeMap<IpAddr, String>,
    /// The ports at which ovl receives on this host.
    ports: BTreeSet<(Protocol, u16)>,
}

/// What a Service names and this host does not translate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Denial {
    /// A cluster IP is outside the service range, or the address of the cluster DNS.
    ClusterIp(IpAddr),
    /// An external IP is outside the external ranges. The flag says whether any are configured.
    ExternalIp(IpAddr, bool),
    /// An address of a LoadBalancer is outside the pool and the external ranges.
    LoadBalancer(IpAddr),
    /// An external IP or an address of a LoadBalancer is the one of this host.
    Host(IpAddr, String),
    /// A node port is one at which ovl receives.
    NodePort(Protocol, u16),
    /// A node port, or a health check port, is outside the range.
    NodePortRange(u16, NodePortRange),
}

impl std::fmt::Display for Denial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ClusterIp(address) => write!(
                f,
                "cluster IP {address} is outside the service_range or reserved for the cluster DNS: choose another one, \
                 or configure the same service_range on all hosts"
            ),
            Self::ExternalIp(address, true) => write!(
                f,
                "external IP {address} is outside the external_ranges: add its range there in ovld.toml on all hosts, or \
                 remove it from the Service"
            ),
            Self::ExternalIp(address, false) => write!(
                f,
                "external IP {address}: no external_ranges are configured, so external IPs are not allowed: set \
                 external_ranges in ovld.toml on all hosts, or remove it from the Service"
            ),
            Self::LoadBalancer(address) => write!(
                f,
                "LoadBalancer address {address} is outside the load_balancer_pool and the external_ranges: configure the \
                 same pool on all hosts, and apply the Service again, or if another program gave the address, add its \
                 range to external_ranges in ovld.toml on all hosts"
            ),
            Self::Host(address, host) => {
                write!(
                    f,
                    "{address} is the address of host {host}, which no Service can take: choose another one"
                )
            }
            Self::NodePort(protocol, port) => write!(
                f,
                "node port {port}/{protocol} is a port of ovl: choose another one, or another port in ovld.toml"
            ),
            Self::NodePortRange(port, range) => write!(
                f,
                "node port {port} is outside the node_port_range {range}: choose another one, or configure the same \
                 node_port_range on all hosts"
            ),
        }
    }
}

impl Permits {
    /// Returns what Services may take on the local host.
    pub fn of(view: &View, ranges: &Ranges) -> Self {
        let members = view.nodes.values().filter(|node| view.alloc.members.contains(&node.record.id));
        let own = view.own();
        let hosts = members.chain(own).flat_map(|node| {
            let record = &node.record;
            [record.vtep, record.address.ip()].map(|address| (address, record.name.clone()))
        });
        Self {
            ranges: ranges.clone(),
            services: ranges.of_services(view),
            own_dns: ranges.answered_dns(&view.resources),
            hosts: hosts.collect(),
            ports: own.into_iter().flat_map(ports_of).collect(),
        }
    }

    /// Returns why a cluster IP is not translated. `None` if it is.
    pub fn cluster_ip(&self, address: IpAddr) -> Option<Denial> {
        let is_within = self.services.iter().any(|range| range.contains(&address));
        let is_dns = self.own_dns.contains(&address);
        (!is_within || is_dns).then_some(Denial::ClusterIp(address))
    }

    /// Returns why an external IP is not translated. `None` if it is.
    pub fn external_ip(&self, address: IpAddr) -> Option<Denial> {
        let external = &self.ranges.external;
        match external.iter().any(|range| range.contains(&address)) {
            true => self.host(address),
            false => Some(Denial::ExternalIp(address, !external.is_empty())),
        }
    }

    /// Returns why an address of a LoadBalancer is not translated. `None` if it is.
    pub fn load_balancer(&self, address: IpAddr) -> Option<Denial> {
        let of_others = || self.ranges.external.iter().any(|range| range.contains(&address));
        match self.is_in_pool(address) || of_others() {
            true => self.host(address),
            false => Some(Denial::LoadBalancer(address)),
        }
    }

    /// Whether hosts announce an address of a LoadBalancer. What another program gave is announced by that program.
    pub fn is_announced(&self, service: &Service, address: IpAddr) -> bool {
        !self.ranges.is_balanced_by_others(service)
            && self.is_in_pool(address)
            && self.load_balancer(address).is_none()
    }

    fn is_in_pool(&self, address: IpAddr) -> bool {
        self.ranges.load_balancers.iter().any(|pool| pool.contains(&address))
    }

    fn host(&self, address: IpAddr) -> Option<Denial> {
        self.hosts.get(&address).map(|host| Denial::Host(address, host.clone()))
    }

    /// Returns why a node port is not translated. `None` if it is.
    pub fn node_port(&self, protocol: Protocol, port: u16) -> Option<Denial> {
        let is_own = self.ports.contains(&(protocol, port));
        is_own.then_some(Denial::NodePort(protocol, port)).or_else(|| self.outside_range(port))
    }

    /// Returns why health checks are not answered at a port. `None` if they are.
    pub fn health_check_port(&self, port: u16) -> Option<Denial> {
        self.node_port(Protocol::Tcp, port)
    }

    fn outside_range(&self, port: u16) -> Option<Denial> {
        let range = self.ranges.node_ports;
        (!range.contains(port)).then_some(Denial::NodePortRange(port, range))
    }

    /// Returns what a Service names and this host does not translate.
    pub fn denials(&self, service: &Service) -> Vec<Denial> {
        // At the address of the cluster DNS ovl answers itself, whatever Service an API server has there.
        let is_served =
            |address: &IpAddr| service.metadata.source.is_some() && self.own_dns.contains(address);
        let cluster = service.cluster_addresses().filter(|address| !is_served(address));
        let cluster = cluster.filter_map(|address| self.cluster_ip(address));
        let external = service.spec.external_ips.iter().filter_map(|address| self.external_ip(*address));
        let balancer = service.load_balancer_addresses().filter_map(|address| self.load_balancer(address));
        let ports = service.spec.ports.iter();
        let ports = ports.filter_map(|port| self.node_port(port.protocol, port.node_port?));
        let health = service.spec.health_check_node_port.and_then(|port| self.health_check_port(port));
        cluster.chain(external).chain(balancer).chain(ports).chain(health).collect()
    }

    /// Checks the external IPs and node ports of a Service that is being applied. The rest is checked when it is
    /// allocated.
    pub fn check(&self, service: &Service) -> Vec<FieldProblem> {
        let external =
            service.spec.external_ips.iter().enumerate().filter_map(|(n, address)| {
                Some((format!("spec.externalIPs[{n}]"), self.external_ip(*address)?))
            });
        let ports = service.spec.ports.iter().enumerate().filter_map(|(n, port)| {
            let denial = self.node_port(port.protocol, port.node_port?)?;
            Some((format!("spec.ports[{n}].nodePort"), denial))
        });
        let balancer = service
            .load_balancer_addresses()
            // The addresses that another program gave are not the applicant's to correct, and the rest works without.
            .filter(|_| !self.ranges.is_balanced_by_others(service))
            .filter_map(|address| Some(("spec.loadBalancerIP".to_owned(), self.load_balancer(address)?)));
        let health = service.spec.health_check_node_port.and_then(|port| self.health_check_port(port));
        let health = health.map(|denial| ("spec.healthCheckNodePort".to_owned(), denial));
        let all = external.chain(ports).chain(balancer).chain(health);
        all.map(|(field, denial)| FieldProblem { field, reason: denial.to_string() }).collect()
    }
}

/// Returns the ports at which ovl receives on a host: gossip and streams, VXLAN, the tunnel.
fn ports_of(node: &Node) -> Vec<(Protocol, u16)> {
    let record = &node.record;
    let mut udp = vec![record.address.port(), record.vxlan_port, SEALED_VXLAN_PORT];
    // While keys are rotated, the tunnel has the next port too.
    udp.extend(record.tunnel.iter().flat_map(|tunnel| [tunnel.port & !1, tunnel.port | 1]));
    let udp = udp.into_iter().map(|port| (Protocol::Udp, port));
    udp.chain([(Protocol::Tcp, record.address.port())]).collect()
}

#[cfg(test)]
mod tests {
    use ovl_proto::resource::ClusterIp;

    use super::*;
    use crate::services::cluster_dns::ClusterDns;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn permits() -> Permits {
        let parse = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
        let services: Vec<IpNet> = parse(&["10.96.0.0/16", "fd00:10:96::/112"]);
        let ranges = Ranges {
            services: services.clone(),
            dns: ClusterDns::Own,
            follows_cidrs: false,
            load_balancers: parse(&["192.0.2.0/28"]),
            external: parse(&["198.51.100.0/24", "2001:db8::/64"]),
            node_ports: "30000-32000".parse().unwrap(),
        };
        let hosts = [("198.51.100.7", "h2"), ("2001:db8::7", "h2"), ("192.0.2.7", "h3")];
        Permits {
            own_dns: ranges.answered_dns(&Default::default()),
            ranges,
            services,
            hosts: hosts.map(|(address, name)| (ip(address), name.to_owned())).into(),
            ports: [(Protocol::Udp, 31000), (Protocol::Tcp, 31000)].into(),
        }
    }

    #[test]
    fn addresses_are_held_to_their_ranges() {
        let permits = permits();
        for good in ["10.96.0.50", "fd00:10:96::50"] {
            assert_eq!(permits.cluster_ip(ip(good)), None);
        }
        // Outside, and the address of the cluster DNS.
        for bad in ["10.97.0.1", "192.168.1.1", "10.96.0.10", "fd00:10:96::a"] {
            assert_eq!(permits.cluster_ip(ip(bad)), Some(Denial::ClusterIp(ip(bad))));
        }
        for good in ["198.51.100.8", "2001:db8::8"] {
            assert_eq!(permits.external_ip(ip(good)), None);
        }
        let outside = ip("203.0.113.10");
        assert_eq!(permits.external_ip(outside), Some(Denial::ExternalIp(outside, true)));
        assert_eq!(Permits::default().external_ip(outside), Some(Denial::ExternalIp(outside, false)));
        assert_eq!(permits.load_balancer(ip("192.0.2.8")), None);
        assert_eq!(permits.load_balancer(outside), Some(Denial::LoadBalancer(outside)));
        // What another program gave a LoadBalancer is held to the external ranges, and not announced.
        assert_eq!(permits.load_balancer(ip("198.51.100.8")), None);
        let mut service = Service::default();
        assert!(permits.is_announced(&service, ip("192.0.2.8")));
        assert!(!permits.is_announced(&service, ip("198.51.100.8")));
        service.spec.load_balancer_class = Some("metallb.io/l2".to_owned());
        assert!(!permits.is_announced(&service, ip("192.0.2.8")));
        service.spec.load_balancer_class = Some(ovl_proto::resource::LOAD_BALANCER_CLASS.to_owned());
        assert!(permits.is_announced(&service, ip("192.0.2.8")));
    }

    #[test]
    fn service_of_the_cluster_dns_is_one_of_the_api_server() {
        let permits = permits();
        let mut service = Service::default();
        service.spec.cluster_ips = vec![ClusterIp::Address(ip("10.96.0.10"))];
        assert_eq!(permits.denials(&service), [Denial::ClusterIp(ip("10.96.0.10"))]);
        service.metadata.source = Some(Box::default());
        assert_eq!(permits.denials(&service), []);
        assert!(permits.cluster_ip(ip("10.96.0.10")).is_some());
        service.spec.cluster_ips.push(ClusterIp::Address(ip("10.98.0.10")));
        assert_eq!(permits.denials(&service), [Denial::ClusterIp(ip("10.98.0.10"))]);
    }

    #[test]
    fn addresses_and_ports_of_hosts_are_denied() {
        let permits = permits();
        for address in ["198.51.100.7", "2001:db8::7"] {
            assert_eq!(permits.external_ip(ip(address)), Some(Denial::Host(ip(address), "h2".to_owned())));
        }
        let address = ip("192.0.2.7");
        assert_eq!(permits.load_balancer(address), Some(Denial::Host(address, "h3".to_owned())));
        let denied = Some(Denial::NodePort(Protocol::Udp, 31000));
        assert_eq!(permits.node_port(Protocol::Udp, 31000), denied);
        assert_eq!(permits.node_port(Protocol::Sctp, 31000), None);
        assert_eq!(permits.node_port(Protocol::Tcp, 31001), None);
        let outside = |port| Some(Denial::NodePortRange(port, permits.ranges.node_ports));
        assert_eq!(permits.node_port(Protocol::Tcp, 22), outside(22));
        assert_eq!(permits.health_check_port(32001), outside(32001));
        assert_eq!(permits.health_check_port(32000), None);
    }
}
