//! v1 Service.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{IntOrString, Labels, Meta, Protocol};
use crate::fields;
use crate::wire::fields::Unknown;

/// The label of a Service that another proxy translates, with the name of that proxy. Of an EndpointSlice: for such a
/// Service.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// The label of a Service, or an EndpointSlice, that no proxy translates. The value has no meaning.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Whether an object with these labels, a Service or an EndpointSlice, is not for translation by ovl. DNS has it all the
/// same.
pub fn is_for_names_only(labels: &Labels) -> bool {
    [PROXY_NAME_LABEL, HEADLESS_LABEL].into_iter().any(|label| labels.get(label).is_some())
}

/// v1 Service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct Service {
    /// The metadata. The name is a DNS label, which may begin with a digit.
    pub metadata: Meta,
    /// The desired state, with what was allocated.
    pub spec: ServiceSpec,
    /// The status, written by the cluster.
    pub status: ServiceStatus,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json Service { 1 metadata optional, 2 spec optional, 3 status optional, ..unknown } }

/// The specification of a Service, with what was allocated.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// The type: how clients reach the Service.
    #[serde(rename = "type")]
    pub kind: ServiceType,
    /// The labels that select its backends among the endpoints of its namespace. Empty: EndpointSlices list them.
    pub selector: Labels,
    /// The ports: at least one, unless the Service is headless or of type ExternalName.
    pub ports: Vec<ServicePort>,
    /// The first of `cluster_ips`; `None` for an ExternalName.
    #[serde(rename = "clusterIP", deserialize_with = "ClusterIp::or_empty")]
    pub cluster_ip: Option<ClusterIp>,
    /// The cluster IPs, one per entry of `ip_families` and in that order. A headless Service has only
    /// [`ClusterIp::Headless`]. Empty for an ExternalName, and before allocation.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<ClusterIp>,
    /// The address families of its addresses; of a headless Service those of its DNS records.
    pub ip_families: Vec<IpFamily>,
    /// Which address families it requests.
    pub ip_family_policy: Option<IpFamilyPolicy>,
    /// Addresses that an external router sends to the hosts, and at which the Service answers too.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<IpAddr>,
    /// The target name of an ExternalName.
    pub external_name: String,
    /// Whether a client's connections go to the same backend.
    pub session_affinity: SessionAffinity,
    /// The affinity timeout.
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// Which backends receive connections from within the cluster.
    pub internal_traffic_policy: TrafficPolicy,
    /// Which backends receive connections from outside.
    pub external_traffic_policy: TrafficPolicy,
    /// The health check port at which hosts report whether they have backends. Only for a LoadBalancer with external
    /// traffic policy Local.
    pub health_check_node_port: Option<u16>,
    /// Whether backends that are not ready receive connections and have DNS records.
    pub publish_not_ready_addresses: bool,
    /// The requested address of the pool.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: Option<IpAddr>,
    /// Whether the ports of a LoadBalancer get node ports as well. `None`: yes.
    pub allocate_load_balancer_node_ports: Option<bool>,
    /// Which of the backends that its selector selects clients prefer. `None`: no one. Slices say so with hints of their own.
    pub traffic_distribution: Option<TrafficDistribution>,
    /// Which program gives a LoadBalancer its addresses: see [`Self::is_of_other_class`].
    pub load_balancer_class: Option<String>,
    /// The only sources that are let in at the addresses of a LoadBalancer. Empty: all.
    pub load_balancer_source_ranges: Vec<IpNet>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ServiceSpec {
        1 kind optional, 2 selector optional, 3 ports optional, 4 cluster_ip optional,
        5 cluster_ips optional, 6 ip_families optional, 7 ip_family_policy optional, 8 external_ips optional,
        9 external_name optional, 10 session_affinity optional, 11 session_affinity_config optional,
        12 internal_traffic_policy optional, 13 external_traffic_policy optional,
        14 health_check_node_port optional, 15 publish_not_ready_addresses optional,
        16 load_balancer_ip optional, 17 allocate_load_balancer_node_ports optional,
        18 traffic_distribution optional, 19 load_balancer_class optional,
        20 load_balancer_source_ranges optional, ..unknown
    }
}

/// The type of a Service: how clients reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ServiceType {
    /// At a cluster IP.
    #[default]
    ClusterIP,
    /// Also at a port of every host.
    NodePort,
    /// Also at an address of the pool, which one host at a time announces.
    LoadBalancer,
    /// By a CNAME record only.
    ExternalName,
}

impl std::fmt::Display for ServiceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ServicePort {
    /// The name, unique within the Service. Empty only if it is the only port.
    pub name: String,
    /// The protocol; TCP by default.
    pub protocol: Protocol,
    /// The application protocol, informational.
    pub app_protocol: Option<String>,
    /// The port at the Service's addresses, 1 to 65535.
    pub port: u16,
    /// The port on the backends. In the cluster always filled in; defaults to `port`.
    pub target_port: Option<IntOrString>,
    /// The node port, of the range that the hosts are configured with. `None` if the Service has none, or none was
    /// allocated yet.
    pub node_port: Option<u16>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ServicePort {
        1 name optional, 2 protocol optional, 3 app_protocol optional, 4 port optional,
        5 target_port optional, 6 node_port optional, ..unknown
    }
}

/// A cluster IP, or the marker of a headless Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClusterIp {
    /// `None` in a manifest: the Service is headless, and its name resolves to its backends.
    Headless,
    /// The address.
    Address(IpAddr),
}

impl ClusterIp {
    /// Returns the address; `None` for a headless Service.
    pub fn address(self) -> Option<IpAddr> {
        match self {
            Self::Headless => None,
            Self::Address(address) => Some(address),
        }
    }

    /// Deserializes a cluster IP. Manifests use `clusterIP: ""` for an address that is to be allocated.
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
    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::IPv4 } else { Self::IPv6 }
    }
}

impl std::fmt::Display for IpFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Which address families a Service requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamilyPolicy {
    /// One family.
    SingleStack,
    /// Both families if the cluster has both, else one.
    PreferDualStack,
    /// Both families; the Service is refused if the cluster has only one.
    RequireDualStack,
}

/// Whether a client's connections go to the same backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SessionAffinity {
    /// Each connection may go to another backend.
    #[default]
    None,
    /// Connections from one client address go to the same backend.
    ClientIP,
}

/// The configuration of session affinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionAffinityConfig {
    /// The configuration for [`SessionAffinity::ClientIP`].
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// The configuration of affinity by client address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIpConfig {
    /// The timeout after a client's last packet, 1 to 86,400 seconds. `None`: [`DEFAULT_AFFINITY_SECONDS`].
    pub timeout_seconds: Option<u32>,
}

/// The `loadBalancerClass` of ovl. A LoadBalancer without a class is ovl's too, if ovl has a pool of addresses.
pub const LOAD_BALANCER_CLASS: &str = "ovl.io/pool";

/// The default affinity timeout of Kubernetes: three hours, in seconds.
pub const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// Which backends receive connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// All backends.
    #[default]
    Cluster,
    /// Only backends on the host where the connection arrives. The client's address is kept.
    Local,
}

/// Which backends clients prefer, while there are such ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficDistribution {
    /// Those in the client's zone: the earlier name of [`Self::PreferSameZone`].
    PreferClose,
    /// Those in the client's zone.
    PreferSameZone,
    /// Those on the client's host, then those in its zone.
    PreferSameNode,
}

/// The status of a Service, written by the cluster or by the program that gives a LoadBalancer its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// The status of a LoadBalancer.
    pub load_balancer: LoadBalancerStatus,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ServiceStatus { 1 load_balancer optional, ..unknown } }

/// The status of a LoadBalancer, written by the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct LoadBalancerStatus {
    /// The addresses: those of the pool, one for each family that it has and the Service requests, or those that another
    /// program gave.
    pub ingress: Vec<LoadBalancerIngress>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json LoadBalancerStatus { 1 ingress optional, ..unknown } }

/// An address of a LoadBalancer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadBalancerIngress {
    /// The address.
    pub ip: IpAddr,
}

impl ServiceSpec {
    /// Whether another program than ovl gives the Service its LoadBalancer addresses, by its class.
    pub fn is_of_other_class(&self) -> bool {
        self.load_balancer_class.as_ref().is_some_and(|class| class != LOAD_BALANCER_CLASS)
    }

    /// Whether hosts report to load balancers if they have backends.
    pub fn wants_health_check(&self) -> bool {
        self.kind == ServiceType::LoadBalancer && self.external_traffic_policy == TrafficPolicy::Local
    }
}

impl Service {
    /// Returns its cluster IPs: none for a headless Service, an ExternalName, and a Service for which no address was
    /// free.
    pub fn cluster_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.spec.cluster_ips.iter().filter_map(|ip| ip.address())
    }

    /// Whether the Service is headless: its name resolves to its backends.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ips.contains(&ClusterIp::Headless)
    }

    /// Whether hosts translate its addresses and ports: see [`is_for_names_only`].
    pub fn is_translated(&self) -> bool {
        !is_for_names_only(&self.metadata.labels)
    }

    /// Whether clients outside the cluster can reach it.
    pub fn is_reached_from_outside(&self) -> bool {
        match self.spec.kind {
            ServiceType::ClusterIP => !self.spec.external_ips.is_empty(),
            ServiceType::NodePort | ServiceType::LoadBalancer => true,
            ServiceType::ExternalName => false,
        }
    }

    /// Returns its LoadBalancer addresses.
    pub fn load_balancer_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.status.load_balancer.ingress.iter().map(|ingress| ingress.ip)
    }

    /// Returns its address families without a LoadBalancer address.
    pub fn lacking_families(&self) -> impl Iterator<Item = IpFamily> {
        let has = |family| self.load_balancer_addresses().any(|address| IpFamily::of(address) == family);
        self.spec.ip_families.iter().copied().filter(move |family| !has(*family))
    }

    /// Returns the affinity timeout in seconds; `None` without session affinity.
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
