//! Judges networks, endpoints and Services: where packets go, how workloads' interfaces are, what Services have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_control::{Event, ServiceBackends};
use ovl_dataplane::observed::Inside;
use ovl_dataplane::state::{Dataplane, Hop};
use ovl_kernel::{BoundSocket, SurveyedChain};
use ovl_proto::resource::Protocol;

use super::Found;
use crate::modes::is_of_kube_proxy;
use crate::problems::Code;

/// A change of the kernel that ovld undid this often within [`WINDOW_MS`] is made again and again.
const OFTEN: usize = 3;
/// The time in which repairs are counted, in milliseconds.
const WINDOW_MS: u64 = 10_000;
/// The time since the last repair after which it is over, in milliseconds.
const OVER_MS: u64 = 5_000;

/// Returns the device by which the desired data plane sends packets to an address. `None` if it says nothing of it, or sends
/// them as they are over the underlay.
fn wanted_device(desired: &Dataplane, address: IpAddr) -> Option<String> {
    let routes = desired.routes.iter().filter(|(_, hop)| **hop != Hop::UNREACHABLE);
    let routes = routes.map(|(to, hop)| (*to, hop.device));
    let connected = desired.addresses.iter().map(|(device, net)| (net.trunc(), Some(*device)));
    let (_, device) = routes
        .chain(connected)
        .filter(|(to, _)| to.contains(&address))
        .max_by_key(|(to, _)| to.prefix_len())?;
    Some(device?.to_string())
}

/// Returns the endpoints to which the host's routes lead by another device than ovl's. `leads_to` is the output interface to
/// each address, `endpoints` the endpoint of each address.
pub(crate) fn diverted(
    desired: &Dataplane,
    leads_to: &BTreeMap<IpAddr, Option<String>>,
    endpoints: &BTreeMap<IpAddr, String>,
) -> Vec<Found> {
    let wrong = leads_to.iter().filter_map(|(address, device)| {
        let wanted = wanted_device(desired, *address)?;
        (device.as_ref() != Some(&wanted)).then_some((address, device, wanted))
    });
    let mut by_device: BTreeMap<(String, String), Vec<(&IpAddr, &str)>> = BTreeMap::new();
    for (address, device, wanted) in wrong {
        let device = device.clone().unwrap_or_else(|| "no route".to_owned());
        let endpoint = endpoints.get(address).map_or("an endpoint", |name| name);
        by_device.entry((device, wanted)).or_default().push((address, endpoint));
    }
    by_device
        .into_iter()
        .filter_map(|((device, wanted), all)| {
            let (address, endpoint) = *all.first()?;
            let more = if all.len() > 1 { format!(" and {} more", all.len() - 1) } else { String::new() };
            let goes = if device == "no route" { "have no route".to_owned() } else { format!("leave by {device}") };
            Some(Found::new(
                Code::RouteDiverted,
                address.to_string(),
                format!("packets of this host for endpoint {endpoint} at {address}{more} {goes} instead of {wanted}: a route or a rule of another program comes first"),
                format!("`ip route get {address}` and `ip rule show` show it; delete the route or the rule, or give it another prefix"),
            ))
        })
        .collect()
}

/// An endpoint of this host whose interface ovl configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    /// The endpoint's name.
    pub name: String,
    /// The network's name.
    pub network: String,
    /// The name of its interface.
    pub ifname: String,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// The MTU of the network, in bytes.
    pub mtu: u32,
}

/// Returns what is not as it was attached at an interface of a workload. `None` as `inside` means that there is no such
/// interface.
pub(crate) fn interface(attached: &Attached, inside: Option<&Inside>) -> Vec<Found> {
    let Attached { name, network, ifname, addresses, mtu } = attached;
    let found = |cause: String, fix: String| {
        vec![Found::new(
            Code::EndpointInterface,
            name,
            format!("endpoint {name} on network {network}: {cause}"),
            fix,
        )]
    };
    let Some(inside) = inside else {
        return found(
            format!("its interface {ifname} is not in its namespace: it was renamed, moved or deleted"),
            format!("name it {ifname} again, or detach the endpoint and attach it again"),
        );
    };
    if !inside.up {
        return found(
            format!("its interface {ifname} is down"),
            format!(
                "`ovlctl exec {name} -- ip link set {ifname} up`: addresses and routes come back by themselves"
            ),
        );
    }
    let lost = addresses.iter().find(|net| !inside.addresses.iter().any(|has| has.addr() == net.addr()));
    if let Some(lost) = lost {
        return found(
            format!("its interface {ifname} does not have its address {lost} any more"),
            format!("`ovlctl exec {name} -- ip address add {lost} dev {ifname}`"),
        );
    }
    if inside.mtu > *mtu {
        return found(
            format!(
                "its interface {ifname} has an MTU of {} bytes, and the network carries {mtu}: larger packets are lost",
                inside.mtu
            ),
            format!("`ovlctl exec {name} -- ip link set {ifname} mtu {mtu}`"),
        );
    }
    Vec::new()
}

/// What the kernel should hold and does not, or what is changed again and again. `differences` are those of `ovlctl verify`
/// that are about the kernel, `events` the latest events, oldest first.
pub(crate) fn contested(differences: &[String], events: &[Event], now_ms: u64) -> Vec<Found> {
    let lasting = differences.iter().filter_map(|text| text.strip_prefix("kernel: "));
    let mut found: Vec<Found> = lasting
        .map(|difference| {
            Found::new(
                Code::Contested,
                difference,
                format!("the kernel differs from what ovl wants, and that lasts: {difference}"),
                "`ovlctl events` and `journalctl -u ovld` say why it cannot be repaired",
            )
        })
        .collect();
    let mut repairs: BTreeMap<(&str, &str), Vec<u64>> = BTreeMap::new();
    for event in events.iter().filter(|event| event.kind == "kernel") {
        if now_ms.saturating_sub(event.time_ms) <= WINDOW_MS {
            repairs.entry((&event.object, &event.message)).or_default().push(event.time_ms);
        }
    }
    let again = repairs.into_iter().filter(|(_, times)| {
        let last = times.iter().max().copied().unwrap_or(0);
        times.len() >= OFTEN && now_ms.saturating_sub(last) <= OVER_MS
    });
    found.extend(again.map(|((object, message), times)| {
        Found::new(
            Code::Contested,
            if object.is_empty() { message } else { object },
            format!(
                "another program undoes what ovld sets, again and again: `{message}` was needed {} times in the last {} s",
                times.len(),
                WINDOW_MS / 1000
            ),
            "find the program that changes it: a network manager, a script, a second ovld. `ip monitor` and `nft monitor` show changes as they happen",
        )
    }));
    found
}

/// A Service as far as its backends matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backed {
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// Its selector, as `kubectl -l` takes it. Empty: EndpointSlices list its backends.
    pub selector: String,
    /// Whether backends that are not ready receive connections.
    pub publishes_unready: bool,
}

/// Returns the ports of Services to which no connection can be made, because no backend is ready.
pub(crate) fn backends(service: &Backed, has: &ServiceBackends) -> Option<Found> {
    let Backed { name, selector, publishes_unready } = service;
    let port =
        has.ports.iter().find(|port| !port.backends.iter().any(|it| it.ready || *publishes_unready))?;
    let which = match (port.port, has.ports.len()) {
        (Some(number), 2..) => format!("port {number} of "),
        _ => String::new(),
    };
    // One with addresses of both families is two backends.
    let unready: BTreeSet<&str> = port.backends.iter().map(|backend| &*backend.name).collect();
    let others = has.ports.iter().any(|port| !port.backends.is_empty());
    let (why, fix) = if !unready.is_empty() {
        (
            format!(
                "none of its {} backends is ready: {}",
                unready.len(),
                unready.iter().copied().collect::<Vec<_>>().join(", ")
            ),
            "see why they are not ready; `ovlctl endpoint ready NAME` marks an endpoint of its host as ready"
                .to_owned(),
        )
    } else if others {
        (
            "its other ports have backends, and none has a port of this name or number".to_owned(),
            format!("correct `targetPort`: `ovlctl describe service {name}` shows the ports"),
        )
    } else if selector.is_empty() {
        (
            "it has no selector, and no EndpointSlice lists addresses for it".to_owned(),
            "give it a selector, or create an EndpointSlice with its name in `kubernetes.io/service-name`"
                .to_owned(),
        )
    } else {
        (
            format!("its selector {selector} matches no endpoint with such a port"),
            format!(
                "compare it with the labels of endpoints: `ovlctl endpoints -o wide`, `ovlctl describe service {name}`"
            ),
        )
    };
    Some(Found::new(
        Code::NoBackends,
        name,
        format!("no connection to {which}Service {name} can be made: {why}"),
        fix,
    ))
}

/// A node port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodePort {
    /// The port.
    pub port: u16,
    /// Whether it is one of UDP, or of TCP.
    pub udp: bool,
    /// The Service, as `NAMESPACE/NAME`.
    pub service: String,
}

impl NodePort {
    /// Creates a node port. `None` for a protocol whose sockets are not listed.
    pub(crate) fn new(port: u16, protocol: Protocol, service: &str) -> Option<Self> {
        let udp = match protocol {
            Protocol::Udp => true,
            Protocol::Tcp => false,
            Protocol::Sctp => return None,
        };
        Some(Self { port, udp, service: service.to_owned() })
    }
}

/// Returns the programs that listen at node ports.
pub(crate) fn node_ports(ports: &BTreeSet<NodePort>, sockets: &[BoundSocket]) -> Vec<Found> {
    let taken = ports.iter().filter_map(|port| {
        let BoundSocket { owner: (name, pid), .. } =
            sockets.iter().find(|it| (it.port, it.udp) == (port.port, port.udp))?;
        let protocol = if port.udp { "UDP" } else { "TCP" };
        Some(Found::new(
            Code::NodePortTaken,
            format!("{protocol} {}", port.port),
            format!(
                "the program {name} (process {pid}) listens at {protocol} port {}, which is the node port of Service {}: \
                 connections from other machines go to the Service",
                port.port, port.service
            ),
            format!("let {name} listen at another port, or give the Service another `nodePort`"),
        ))
    });
    taken.collect()
}

/// Returns the finding that a kube-proxy translates Services as well, if ovl does so beside one (`translates`).
pub(crate) fn other_translator(chains: &[SurveyedChain], translates: bool) -> Option<Found> {
    let is_proxy = |chain: &&SurveyedChain| is_of_kube_proxy(&chain.table, &chain.name);
    let SurveyedChain { family, table, name, .. } = chains.iter().find(is_proxy).filter(|_| translates)?;
    Some(Found::new(
        Code::KubeProxy,
        "",
        format!(
            "kube-proxy runs on this host, or left its rules (chain {name} of the table {family} {table}): which of the two \
             translates a connection to a Service depends on the order of rules"
        ),
        "stop kube-proxy and run `kube-proxy --cleanup`, or set `proxy = \"auto\"`: see docs/kubernetes.md",
    ))
}

#[cfg(test)]
mod tests {
    use ovl_control::{BackendInfo, BackendPort};
    use ovl_dataplane::device::Device;
    use ovl_proto::id::{Mac, NetworkId};

    use super::*;

    fn bridge() -> Device {
        Device::bridge(NetworkId([7; 5]))
    }

    #[test]
    fn route_of_another_program_is_named_and_longer_ones_of_ovl_count() {
        let mut desired = Dataplane::default();
        desired.addresses.insert((bridge(), "10.1.0.1/16".parse().unwrap()));
        let address: IpAddr = "10.1.2.3".parse().unwrap();
        let names = BTreeMap::from([(address, "web".to_owned())]);
        let of = |device: Option<&str>| {
            diverted(&desired, &BTreeMap::from([(address, device.map(str::to_owned))]), &names)
        };
        assert!(of(Some(bridge().as_str())).is_empty());
        assert!(of(Some("eth0"))[0].cause.contains("endpoint web at 10.1.2.3 leave by eth0 instead of ovb-"));
        assert!(of(None)[0].cause.contains("have no route"));
        desired.routes.insert("10.1.2.0/24".parse().unwrap(), Hop::UNREACHABLE);
        desired.routes.insert("10.1.2.3/32".parse().unwrap(), Hop { mtu: Some(1400), ..Hop::UNREACHABLE });
        // As it is over the underlay: by any device.
        assert!(diverted(&desired, &BTreeMap::from([(address, Some("eth0".to_owned()))]), &names).is_empty());
    }

    #[test]
    fn interface_of_a_workload_is_compared_with_what_was_attached() {
        let attached = Attached {
            name: "web".to_owned(),
            network: "blue".to_owned(),
            ifname: "eth0".to_owned(),
            addresses: vec!["10.1.0.2/16".parse().unwrap()],
            mtu: 1450,
        };
        let good = Inside {
            mac: Mac::default(),
            mtu: 1400,
            up: true,
            addresses: vec!["10.1.0.2/32".parse().unwrap(), "192.0.2.1/24".parse().unwrap()],
            gateways: Vec::new(),
        };
        let said = |inside: Option<&Inside>| {
            interface(&attached, inside).into_iter().map(|found| found.cause).collect::<String>()
        };
        assert_eq!(said(Some(&good)), "");
        assert!(said(None).contains("not in its namespace"));
        assert!(said(Some(&Inside { up: false, ..good.clone() })).contains("is down"));
        assert!(
            said(Some(&Inside { addresses: Vec::new(), ..good.clone() })).contains("address 10.1.0.2/16")
        );
        assert!(said(Some(&Inside { mtu: 1500, ..good })).contains("MTU of 1500"));
    }

    #[test]
    fn change_is_contested_if_it_lasts_or_comes_again_and_again() {
        let event = |time_ms, message: &str| Event {
            time_ms,
            kind: "kernel".to_owned(),
            object: String::new(),
            message: message.to_owned(),
        };
        let events =
            [event(1_000, "sysctl"), event(8_000, "sysctl"), event(9_000, "sysctl"), event(9_500, "ip")];
        assert_eq!(contested(&[], &events, 10_000).len(), 1);
        assert!(contested(&[], &events, 11_001).is_empty(), "the first one is too old");
        assert!(contested(&[], &[&events[1..], &events[1..2]].concat(), 14_001).is_empty(), "it is over");
        let lasting = ["kernel: needs `ip link`".to_owned(), "gossip: x".to_owned()];
        assert_eq!(contested(&lasting, &[], 0)[0].object, "needs `ip link`");
        assert_eq!(contested(&lasting, &[], 0).len(), 1);
    }

    #[test]
    fn service_without_ready_backends_says_why() {
        let backend = |ready| BackendInfo {
            address: "10.1.0.2".parse().unwrap(),
            port: Some(80),
            name: "web-1".to_owned(),
            node: "h1".to_owned(),
            ready,
        };
        let port =
            |backends| BackendPort { name: String::new(), protocol: Protocol::Tcp, port: Some(80), backends };
        let has = |ports| ServiceBackends {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            created_ms: 0,
            ports,
            announced: Vec::new(),
            notes: Vec::new(),
        };
        let service = |selector: &str| Backed {
            name: "shop/web".to_owned(),
            selector: selector.to_owned(),
            publishes_unready: false,
        };
        let said = |service: &Backed, ports| {
            backends(service, &has(ports)).map(|found| found.cause).unwrap_or_default()
        };
        let selecting = service("app=web");
        assert_eq!(said(&selecting, vec![port(vec![backend(true), backend(false)])]), "");
        assert!(
            said(&selecting, vec![port(vec![backend(false)])])
                .ends_with("none of its 1 backends is ready: web-1")
        );
        assert!(said(&selecting, vec![port(vec![])]).contains("selector app=web matches no endpoint"));
        assert!(said(&service(""), vec![port(vec![])]).contains("no EndpointSlice"));
        assert!(
            said(&selecting, vec![port(vec![backend(true)]), port(vec![])])
                .contains("no connection to port 80")
        );
        let unready = Backed { publishes_unready: true, ..service("app=web") };
        assert_eq!(said(&unready, vec![port(vec![backend(false)])]), "");
    }

    #[test]
    fn program_at_a_node_port_is_named() {
        let port = NodePort::new(30080, Protocol::Tcp, "shop/web").unwrap();
        let socket = |udp| BoundSocket { udp, port: 30080, owner: ("nginx".to_owned(), 9) };
        assert!(node_ports(&[port.clone()].into(), &[socket(false)])[0].cause.contains("nginx (process 9)"));
        assert!(node_ports(&[port].into(), &[socket(true)]).is_empty());
    }
}
