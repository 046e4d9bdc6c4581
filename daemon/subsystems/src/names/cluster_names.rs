//! DNS names of Services and pods (Kubernetes DNS specification 1.1).
//!
//! The module owns no state: it computes the records of one Service or one pod. Begin to read at [`of_service`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::resource::{Service, ServiceType};

use ovl_cluster::backends::{Backend, Readiness};

/// The version of the specification, the answer to `dns-version.DOMAIN`.
pub const VERSION: &str = "1.1.0";

/// The records of one name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    /// A and AAAA records.
    pub addresses: BTreeSet<IpAddr>,
    /// SRV records: port and target name.
    pub services: BTreeSet<(u16, String)>,
    /// CNAME record: the target of a Service of type ExternalName.
    pub alias: Option<String>,
    /// Whether the name belongs to a headless Service without ready endpoints. The name does not exist then (section
    /// 2.4.1), also if an endpoint has the same name.
    pub unready: bool,
}

impl Set {
    /// Adds the records of another set.
    pub fn merge(&mut self, other: &Self) {
        self.addresses.extend(&other.addresses);
        self.services.extend(other.services.iter().cloned());
        self.alias = self.alias.take().or_else(|| other.alias.clone());
        self.unready |= other.unready;
    }
}

/// The records of a Service or a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterNames {
    /// Records by full name, in lower case and without a final dot. An empty set is a name that exists only because
    /// there are names below it (RFC 8020).
    pub sets: BTreeMap<String, Set>,
    /// PTR records by address.
    pub reverse: BTreeMap<IpAddr, BTreeSet<String>>,
}

/// Returns the records of a Service with these backends, under the cluster's domain.
pub fn of_service(domain: &str, service: &Service, backends: &[Backend]) -> ClusterNames {
    let meta = &service.metadata;
    let namespace = format!("{}.svc.{domain}", meta.namespace);
    let base = format!("{}.{namespace}", meta.name);
    let mut names = ClusterNames::default();
    names.sets.entry(namespace).or_default();
    let set = names.sets.entry(base.clone()).or_default();
    if service.spec.kind == ServiceType::ExternalName {
        set.alias = Some(service.spec.external_name.trim_end_matches('.').to_ascii_lowercase());
        return names;
    }
    if !service.is_headless() {
        set.addresses.extend(service.cluster_addresses());
        for address in service.cluster_addresses() {
            names.reverse.entry(address).or_default().insert(base.clone());
        }
        for port in &service.spec.ports {
            names.port(&base, &port.name, &port.protocol.to_string(), port.port, &base);
        }
        return names;
    }
    for backend in backends.iter().filter(|backend| backend.readiness == Readiness::Ready) {
        let addresses = backend.addresses.iter().filter(|address| {
            let families = &service.spec.ip_families;
            families.is_empty()
                || families.iter().any(|family| *family == ovl_proto::resource::IpFamily::of(**address))
        });
        for address in addresses {
            let host = match backend.hostname.as_str() {
                "" => dashed(*address),
                given => given.to_ascii_lowercase(),
            };
            let own = format!("{host}.{base}");
            for name in [&base, &own] {
                names.sets.entry(name.clone()).or_default().addresses.insert(*address);
            }
            names.reverse.entry(*address).or_default().insert(own.clone());
            for (port, number) in service.spec.ports.iter().zip(&backend.ports) {
                if let Some(number) = number {
                    names.port(&base, &port.name, &port.protocol.to_string(), *number, &own);
                }
            }
        }
    }
    if let Some(set) = names.sets.get_mut(&base) {
        set.unready = set.addresses.is_empty();
    }
    names
}

impl ClusterNames {
    /// Adds the SRV record of a named port, and the name above it.
    fn port(&mut self, base: &str, name: &str, protocol: &str, number: u16, target: &str) {
        if name.is_empty() {
            return;
        }
        let above = format!("_{}.{base}", protocol.to_ascii_lowercase());
        let full = format!("_{}.{above}", name.to_ascii_lowercase());
        self.sets.entry(above).or_default();
        self.sets.entry(full).or_default().services.insert((number, target.to_owned()));
    }
}

/// Returns the name of a pod's address, which is its only record: `10-1-0-5.NAMESPACE.pod.DOMAIN`.
pub fn of_pod(domain: &str, namespace: &str, address: IpAddr) -> String {
    format!("{}.{}", dashed(address), above_pods(domain, namespace))
}

/// Returns the name above those of the pods of a namespace.
pub(super) fn above_pods(domain: &str, namespace: &str) -> String {
    format!("{namespace}.pod.{domain}")
}

/// Returns an address as one label, with hyphens.
fn dashed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        // Without `::`, which would leave a hyphen at the beginning or end of a label.
        IpAddr::V6(address) => {
            let groups = address.segments();
            groups.map(|group| format!("{group:x}")).join("-")
        }
    }
}

/// Returns the search domains of a pod of a namespace, in the order of Kubernetes.
pub fn search(domain: &str, namespace: &str) -> [String; 3] {
    [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()]
}

/// The `ndots` option of Kubernetes: a name with at least this many dots is queried as it is first.
pub const NDOTS: u8 = 5;

#[cfg(test)]
mod tests {
    use ovl_proto::resource::{ClusterIp, IpFamily, Meta, Protocol, ServicePort};

    use super::*;

    const DOMAIN: &str = "cluster.local";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn service(ips: &[ClusterIp], ports: &[(&str, Protocol, u16)]) -> Service {
        let mut service = Service {
            metadata: Meta { namespace: "shop".to_owned(), name: "db".to_owned(), ..Meta::default() },
            ..Service::default()
        };
        service.spec.cluster_ips = ips.to_vec();
        service.spec.ports = ports
            .iter()
            .map(|(name, protocol, port)| ServicePort {
                name: (*name).to_owned(),
                protocol: *protocol,
                port: *port,
                ..ServicePort::default()
            })
            .collect();
        service
    }

    fn backend(addresses: &[&str], hostname: &str, readiness: Readiness) -> Backend {
        Backend {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            ports: vec![Some(5432)],
            host: None,
            readiness,
            hostname: hostname.to_owned(),
            name: String::new(),
            hints: None,
            names_only: false,
        }
    }

    /// Returns all records in the format of a zone file, without empty names.
    fn zone(names: &ClusterNames) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, set) in &names.sets {
            for address in &set.addresses {
                lines.push(format!("{name} {} {address}", if address.is_ipv4() { "A" } else { "AAAA" }));
            }
            lines.extend(set.services.iter().map(|(port, target)| format!("{name} SRV {port} {target}")));
            lines.extend(set.alias.iter().map(|alias| format!("{name} CNAME {alias}")));
        }
        for (address, all) in &names.reverse {
            lines.extend(all.iter().map(|name| format!("{address} PTR {name}")));
        }
        lines
    }

    /// Section 2.3: records for a Service with a cluster IP.
    #[test]
    fn a_service_has_a_aaaa_srv_and_ptr() {
        let ips = [ClusterIp::Address(ip("10.96.0.50")), ClusterIp::Address(ip("fd96::50"))];
        let service = service(&ips, &[("pg", Protocol::Tcp, 5432), ("", Protocol::Udp, 99)]);
        assert_eq!(
            zone(&of_service(DOMAIN, &service, &[backend(&["10.1.0.5"], "", Readiness::Ready)])),
            [
                "_pg._tcp.db.shop.svc.cluster.local SRV 5432 db.shop.svc.cluster.local",
                "db.shop.svc.cluster.local A 10.96.0.50",
                "db.shop.svc.cluster.local AAAA fd96::50",
                "10.96.0.50 PTR db.shop.svc.cluster.local",
                "fd96::50 PTR db.shop.svc.cluster.local",
            ]
        );
    }

    /// Section 2.4: records for a headless Service: its ready endpoints, by host name where they have one.
    #[test]
    fn a_headless_service_resolves_to_its_ready_endpoints() {
        let service = service(&[ClusterIp::Headless], &[("pg", Protocol::Tcp, 5432)]);
        let backends = [
            backend(&["10.1.0.5", "fd01::5"], "My-Pod", Readiness::Ready),
            backend(&["10.1.0.6"], "", Readiness::Ready),
            backend(&["10.1.0.7"], "late", Readiness::NotReady),
        ];
        let base = "db.shop.svc.cluster.local";
        assert_eq!(
            zone(&of_service(DOMAIN, &service, &backends)),
            [
                format!("10-1-0-6.{base} A 10.1.0.6"),
                format!("_pg._tcp.{base} SRV 5432 10-1-0-6.{base}"),
                format!("_pg._tcp.{base} SRV 5432 my-pod.{base}"),
                format!("{base} A 10.1.0.5"),
                format!("{base} A 10.1.0.6"),
                format!("{base} AAAA fd01::5"),
                format!("my-pod.{base} A 10.1.0.5"),
                format!("my-pod.{base} AAAA fd01::5"),
                format!("10.1.0.5 PTR my-pod.{base}"),
                format!("10.1.0.6 PTR 10-1-0-6.{base}"),
                format!("fd01::5 PTR my-pod.{base}"),
            ]
        );
        let unready = of_service(DOMAIN, &service, &backends[2..]);
        assert!(unready.sets[base].unready && zone(&unready).is_empty());
        let mut single = service;
        single.spec.ip_families = vec![IpFamily::IPv4];
        assert!(!zone(&of_service(DOMAIN, &single, &backends)).iter().any(|line| line.contains("AAAA")));
    }

    /// Section 2.5: records for external name Services.
    #[test]
    fn an_external_service_has_a_cname_record() {
        let mut service = service(&[], &[]);
        service.spec.kind = ServiceType::ExternalName;
        service.spec.external_name = "DB.example.org.".to_owned();
        assert_eq!(
            zone(&of_service(DOMAIN, &service, &[])),
            ["db.shop.svc.cluster.local CNAME db.example.org"]
        );
    }

    #[test]
    fn names_above_a_record_exist_and_pods_resolve_by_their_addresses() {
        let service = service(&[ClusterIp::Headless], &[("pg", Protocol::Tcp, 5432)]);
        let names = of_service(DOMAIN, &service, &[backend(&["10.1.0.5"], "", Readiness::Ready)]);
        for above in ["shop.svc.cluster.local", "_tcp.db.shop.svc.cluster.local"] {
            assert_eq!(names.sets.get(above), Some(&Set::default()), "{above}");
        }
        assert_eq!(of_pod(DOMAIN, "shop", ip("10.1.0.5")), "10-1-0-5.shop.pod.cluster.local");
        assert_eq!(of_pod(DOMAIN, "shop", ip("fd01::5")), "fd01-0-0-0-0-0-0-5.shop.pod.cluster.local");
    }
}
