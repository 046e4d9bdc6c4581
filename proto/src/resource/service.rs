//! v1 Service.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{IntOrString, Labels, Meta, Protocol};

/// Ports of all hosts that are kept free for Services of type NodePort and LoadBalancer, as with Kubernetes.
pub const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// v1 Service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Service {
    /// Its name is one in DNS.
    pub metadata: Meta,
    /// What was asked for, and what was allocated.
    pub spec: ServiceSpec,
    /// Written by the cluster.
    pub status: ServiceStatus,
}

/// What was asked for, and what was allocated.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// How it is reached.
    #[serde(rename = "type")]
    pub kind: ServiceType,
    /// Which endpoints of its namespace are its backends. Empty: EndpointSlices say.
    pub selector: Labels,
    /// At least one, except of a headless or external one.
    pub ports: Vec<ServicePort>,
    /// The first of `cluster_ips`; none of an external one.
    #[serde(rename = "clusterIP", deserialize_with = "ClusterIp::or_empty")]
    pub cluster_ip: Option<ClusterIp>,
    /// One for each of `ip_families`, in that order; `None` alone for a headless Service; none for an external one,
    /// and before any was allocated.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<ClusterIp>,
    /// The families of its addresses; of a headless Service those of its records.
    pub ip_families: Vec<IpFamily>,
    /// Which families it wants.
    pub ip_family_policy: Option<IpFamilyPolicy>,
    /// Addresses that somebody routes to the hosts, and at which it answers as well.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<IpAddr>,
    /// The name that it stands for; of an external one.
    pub external_name: String,
    /// Whether a client stays with its backend.
    pub session_affinity: SessionAffinity,
    /// For how long.
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// Who takes what comes from within the cluster.
    pub internal_traffic_policy: TrafficPolicy,
    /// Who takes what comes from outside.
    pub external_traffic_policy: TrafficPolicy,
    /// Where hosts tell load balancers whether they have backends: of a LoadBalancer with external policy Local.
    pub health_check_node_port: Option<u16>,
    /// Backends count and have records whether they are ready or not.
    pub publish_not_ready_addresses: bool,
    /// The address that is wanted of the pool.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: Option<IpAddr>,
    /// Whether a LoadBalancer's ports get node ports as well. Nothing: yes.
    pub allocate_load_balancer_node_ports: Option<bool>,
}

/// How a Service is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ServiceType {
    /// At an address of the cluster.
    #[default]
    ClusterIP,
    /// Also at a port of every host.
    NodePort,
    /// Also at an address of the pool, which one host at a time announces.
    LoadBalancer,
    /// Not at all: it is another name in DNS.
    ExternalName,
}

impl std::fmt::Display for ServiceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Unique within the Service; empty only where it is the only port.
    pub name: String,
    /// TCP unless given.
    pub protocol: Protocol,
    /// For people and programs.
    pub app_protocol: Option<String>,
    /// At the Service's addresses; 1 to 65535.
    pub port: u16,
    /// On the backends. In the cluster always filled in: `port` unless given.
    pub target_port: Option<IntOrString>,
    /// On every host, 30000 to 32767; nothing: there is none, or none was allocated yet.
    pub node_port: Option<u16>,
}

/// An address within the cluster, or the word that there shall be none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClusterIp {
    /// `None`: the Service is headless, and its name leads to its backends.
    Headless,
    /// The address.
    Address(IpAddr),
}

impl ClusterIp {
    /// The address, if it is one.
    pub fn address(self) -> Option<IpAddr> {
        match self {
            Self::Headless => None,
            Self::Address(address) => Some(address),
        }
    }

    /// Manifests have `clusterIP: ""` for one that is to be allocated.
    fn or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Self>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.filter(|text| !text.is_empty()).map(|text| parse(&text)).transpose()
    }
}

fn parse<E: serde::de::Error>(text: &str) -> Result<ClusterIp, E> {
    match text {
        "None" => Ok(ClusterIp::Headless),
        address => address.parse().map(ClusterIp::Address).map_err(|_| {
            E::invalid_value(
                serde::de::Unexpected::Str(text),
                &"an IP address, or None for a headless Service",
            )
        }),
    }
}

impl std::fmt::Display for ClusterIp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Headless => f.write_str("None"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl Serialize for ClusterIp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClusterIp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse(&String::deserialize(deserializer)?)
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl IpFamily {
    /// That of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::IPv4 } else { Self::IPv6 }
    }
}

impl std::fmt::Display for IpFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Which address families a Service wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamilyPolicy {
    /// One.
    SingleStack,
    /// Both where the cluster has both, else one.
    PreferDualStack,
    /// Both, or it is refused.
    RequireDualStack,
}

/// Whether a client stays with its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SessionAffinity {
    /// Each connection may go to another one.
    #[default]
    None,
    /// By its address.
    ClientIP,
}

/// For how long a client stays with its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionAffinityConfig {
    /// Of [`SessionAffinity::ClientIP`].
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// For how long a client stays with its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIpConfig {
    /// Seconds after its last packet, 1 to 86,400. Nothing: [`DEFAULT_AFFINITY_SECONDS`].
    pub timeout_seconds: Option<u32>,
}

/// Kubernetes' default: three hours.
pub const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// Which backends take traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// All.
    #[default]
    Cluster,
    /// Those of the host where it comes in; the client's address is kept.
    Local,
}

/// Written by the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Of a LoadBalancer.
    pub load_balancer: LoadBalancerStatus,
}

/// Written by the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerStatus {
    /// Its addresses, one for each family that the pool has and the Service wants.
    pub ingress: Vec<LoadBalancerIngress>,
}

/// An address of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
}

impl ServiceSpec {
    /// Whether hosts tell load balancers if they have backends.
    pub fn wants_health_check(&self) -> bool {
        self.kind == ServiceType::LoadBalancer && self.external_traffic_policy == TrafficPolicy::Local
    }
}

impl Service {
    /// Its addresses within the cluster: none of a headless one, an external one, and one for which none was
    /// free.
    pub fn cluster_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.spec.cluster_ips.iter().filter_map(|ip| ip.address())
    }

    /// Whether its name leads to its backends.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ips.contains(&ClusterIp::Headless)
    }

    /// Whether there is a way to it that is not for the cluster alone.
    pub fn is_reached_from_outside(&self) -> bool {
        match self.spec.kind {
            ServiceType::ClusterIP => !self.spec.external_ips.is_empty(),
            ServiceType::NodePort | ServiceType::LoadBalancer => true,
            ServiceType::ExternalName => false,
        }
    }

    /// Its addresses of the pool.
    pub fn load_balancer_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.status.load_balancer.ingress.iter().map(|ingress| ingress.ip)
    }

    /// For how many seconds a client stays with its backend; nothing: it need not.
    pub fn affinity_seconds(&self) -> Option<u32> {
        let config = self.spec.session_affinity_config.and_then(|config| config.client_ip);
        match self.spec.session_affinity {
            SessionAffinity::None => None,
            SessionAffinity::ClientIP => {
                Some(config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_AFFINITY_SECONDS))
            }
        }
    }
}
