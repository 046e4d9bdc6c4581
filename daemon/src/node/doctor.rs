//! `ovlctl doctor`: reads what is to be judged, here and on other hosts. [`crate::doctor`] judges.
//!
//! Everything is read at the same time and each part has a limit, so that a diagnosis takes at most [`WITHIN`]: what did not
//! answer by then is said to be unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::OFlag;
use ovl_cluster::view::Placed;
use ovl_control::{Diagnosis, HostDiagnosis, PeerState};
use ovl_dataplane::device::Device;
use ovl_dataplane::observed::Inside;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_dns::{Name, RecordType};
use ovl_kernel::{self as kernel, Survey, Wanted};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::{EndpointId, NodeId};
use ovl_proto::object::Mode;
use ovl_proto::record::Presence;
use ovl_proto::resource::{Kind, Name as ResourceName, ServiceType};
use ovl_subsystems::names::resolver::{ADDRESS_V4, HOST_ADDRESSES, LOOPBACK, PORT_HOST};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use super::asking::Topic;
use super::peers::millis;
use super::state::State;
use super::{Failed, Node};
use crate::doctor::cluster::{self, Member};
use crate::doctor::host::{self, NeededPort, OpenPort};
use crate::doctor::names::{self, Answered, ClientSettings};
use crate::doctor::network::{self, Attached, Backed, NodePort};
use crate::doctor::{Found, Remark, diagnose};
use crate::failed::blocking;
use crate::problems::Code;

/// Time for the diagnosis of one host.
const WITHIN: Duration = Duration::from_millis(3_800);
/// Time for the answers of other hosts: somewhat longer, because they begin later.
const OTHERS_WITHIN: Duration = Duration::from_millis(4_700);
/// Time in which a path that is in doubt is judged.
const PATHS_WITHIN: Duration = Duration::from_millis(2_600);
/// Time for the answer of a resolver.
const RESOLVER_WITHIN: Duration = Duration::from_millis(1_500);
/// The most addresses whose routes are looked up.
const MOST_ADDRESSES: usize = 256;
/// The most endpoints whose namespaces are looked into.
const MOST_ENDPOINTS: usize = 128;
/// The most resolvers that are asked.
const MOST_RESOLVERS: usize = 6;

/// What was read of the host.
struct Surveyed {
    before: Survey,
    after: Survey,
}

impl Node {
    /// Checks what commonly breaks: on this host, or on all live members.
    pub(super) async fn doctor(self: &Rc<Self>, all_hosts: bool) -> Diagnosis {
        let others = async {
            match all_hosts {
                true => self.ask_members(Topic::Diagnosis, OTHERS_WITHIN).await,
                false => (Vec::new(), Vec::new()),
            }
        };
        let (own, (others, unanswered)) = tokio::join!(self.diagnosis(), others);
        // What a host says of itself is shown under the name that its record has.
        let others = others.into_iter().map(|(host, diagnosis)| HostDiagnosis { host, ..diagnosis });
        let hosts: Vec<HostDiagnosis> = std::iter::once(own).chain(others).collect();
        let healthy = unanswered.is_empty() && hosts.iter().all(|host| host.findings.is_empty());
        Diagnosis { healthy, hosts, unanswered }
    }

    /// Checks this host.
    pub(super) async fn diagnosis(self: &Rc<Self>) -> HostDiagnosis {
        let begun = Instant::now();
        let mut remarks = Vec::new();
        let mut found = Vec::new();
        let (surveyed, verified, inside, resolvers, workloads, other, ()) = tokio::join!(
            timeout(WITHIN, self.survey()),
            timeout(WITHIN, self.verify()),
            timeout(WITHIN, self.survey_interfaces()),
            timeout(WITHIN, self.ask_resolvers()),
            timeout(WITHIN, self.client_settings()),
            timeout(WITHIN, self.other_owner()),
            async {
                timeout(WITHIN, self.check_settings()).await.ok();
                timeout(PATHS_WITHIN, self.wait_for_paths()).await.ok();
            },
        );
        match surveyed {
            Ok(Ok(surveyed)) => found.extend(self.judge_survey(surveyed).await),
            Ok(Err(Failed(failure))) => remarks.extend(unread(&failure.message)),
            Err(_) => remarks.extend(unread("the kernel did not answer in time")),
        }
        let differences = match verified {
            Ok(Ok(verify)) => verify.differences,
            Ok(Err(Failed(failure))) => {
                remarks.push(Remark::unknown("networks", "kernel", failure.message));
                Vec::new()
            }
            // Work in flight for so long that nothing can be said.
            Err(_) => {
                remarks.push(Remark::unknown("networks", "kernel", "it changes all the time"));
                Vec::new()
            }
        };
        found.extend(network::contested(&differences, &self.events.latest(), self.wall_ms()));
        found.extend(differences.iter().filter_map(|text| text.strip_prefix("gossip: ")).map(|text| {
            let fix = "see whether the TCP port of ovld is open between the hosts: `ovlctl peers`";
            Found::new(Code::NotSynchronised, text, text, fix)
        }));
        found.extend(
            inside
                .unwrap_or_default()
                .iter()
                .flat_map(|(it, inside)| network::interface(it, inside.as_ref())),
        );
        match resolvers {
            Ok((own, upstreams)) => {
                found.extend(own.and_then(names::own));
                found.extend(names::upstreams(&upstreams));
            }
            Err(_) => {
                remarks.push(Remark::unknown("names", "upstream", "the resolvers were not asked in time"))
            }
        }
        let own_resolver: Vec<IpAddr> = HOST_ADDRESSES
            .into_iter()
            .chain([IpAddr::V4(LOOPBACK)])
            .chain(self.config.ranges.dns_addresses())
            .collect();
        let walks = self.config.walk_search_lists;
        found.extend(workloads.unwrap_or_default().iter().filter_map(|(workload, settings)| {
            names::search_lists(&format!("endpoint {workload}"), settings, &own_resolver, walks)
        }));
        if let Ok(Ok(Some(duplicate))) = other {
            found.push(duplicate);
        }
        found.extend(self.judge_cluster(&mut remarks));
        found.extend(self.judge_services());
        let mut status = self.status();
        status.problems.extend(self.resolver.file_problems(&self.config));
        diagnose(status.node, millis(begun.elapsed()), &status.problems, found, &remarks)
    }

    /// Makes the checks at once that are otherwise made every few seconds.
    async fn check_settings(&self) {
        self.check_limits().await;
        self.look_at_tunnel().await;
        if let Err(Failed(failure)) = self.mind_firewalls_now().await {
            tracing::warn!(error = failure.message, "cannot look after other firewalls");
        }
    }

    /// Waits while it is in doubt whether packets pass to or from a host.
    async fn wait_for_paths(&self) {
        loop {
            {
                let now = self.state.borrow().clock.elapsed();
                let (vxlan, direct) = (self.paths.borrow(), self.direct_paths.borrow());
                if !vxlan.all(now).chain(direct.all(now)).any(|(_, path)| path.is_in_doubt()) {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Reads the host, and once more what counts up.
    async fn survey(&self) -> Result<Surveyed, Failed> {
        let wanted = self.wanted();
        let again = Wanted { ports: BTreeSet::new(), ..wanted.clone() };
        let before = blocking(move || kernel::survey(&wanted)).await?;
        tokio::time::sleep(Duration::from_millis(400)).await;
        let after = blocking(move || kernel::survey(&again)).await?;
        Ok(Surveyed { before, after })
    }

    /// Returns what is read of the host.
    fn wanted(&self) -> Wanted {
        let state = self.state.borrow();
        // A few of each host and network, and never more than can be looked up in time.
        let mut taken: BTreeMap<_, usize> = BTreeMap::new();
        let few = |placed: &Placed<'_>| {
            let count = taken.entry((placed.node.record.id, placed.endpoint.network)).or_default();
            *count += 1;
            *count <= 16
        };
        let built = |placed: &Placed<'_>| state.local.is_built(&state.view, placed.endpoint.network);
        let used = state
            .view
            .all_endpoints()
            .filter(|placed| state.view.counts_on(placed.node, placed.endpoint.network));
        let addresses = used.filter(built).filter(few).flat_map(|placed| placed.endpoint.addresses.iter());
        let mut sysctls: BTreeSet<String> =
            ["net.ipv4.ip_forward", "net.ipv6.conf.all.disable_ipv6"].map(str::to_owned).into();
        sysctls.extend(["ipv4", "ipv6"].map(|family| format!("net.{family}.neigh.default.gc_thresh3")));
        Wanted {
            sysctls,
            of_devices: vec![("net.ipv4.conf.", ".forwarding"), ("net.ipv6.conf.", ".disable_ipv6")],
            leads_to: addresses.map(|net| net.addr()).take(MOST_ADDRESSES).collect(),
            ports: self
                .needed_ports()
                .map(|it| it.port)
                .into_iter()
                .chain(node_ports(&state).into_iter().map(|it| it.port))
                .collect(),
        }
    }

    /// Returns the UDP ports that operations of the kernel worker may be refused for.
    fn needed_ports(&self) -> [NeededPort; 4] {
        let tunnel = self.config.tunnel_port;
        [
            (self.config.vxlan_port, "VXLAN", "vxlan_port"),
            (SEALED_VXLAN_PORT, "VXLAN in the tunnel", "vxlan_port"),
            (tunnel, "the tunnel", "tunnel_port"),
            (tunnel.saturating_add(1), "the tunnel while keys are rotated", "tunnel_port"),
        ]
        .map(|(port, purpose, setting)| NeededPort { port, purpose, setting })
    }

    async fn judge_survey(&self, surveyed: Surveyed) -> Vec<Found> {
        let Surveyed { before, after } = surveyed;
        let desired = self.desired();
        let peers: Vec<IpAddr> = self.vteps().into_values().collect();
        let vtep = self.state.borrow().record().map(|own| own.vtep);
        let underlay = match vtep {
            Some(vtep) => self.kernel.underlay(vtep, peers).await.ok().map(|underlay| underlay.device),
            None => None,
        };
        let state = self.state.borrow();
        let built: Vec<_> = state
            .view
            .networks
            .values()
            .map(|found| &found.network)
            .filter(|network| state.local.is_built(&state.view, network.id))
            .collect();
        let of_family = |v4: bool| {
            let has = move |prefix: ipnet::IpNet| prefix.addr().is_ipv4() == v4;
            built.iter().filter(move |network| network.subnets.iter().any(|subnet| has(subnet.prefix)))
        };
        let bridges_v6: BTreeSet<String> = of_family(false)
            .map(|network| Device::bridge(network.id).to_string())
            .filter(|bridge| before.devices.contains_key(bridge))
            .collect();
        let mut forwards: BTreeSet<String> = of_family(true)
            .filter(|network| !network.internal && network.mode == Mode::L2)
            .map(|network| Device::bridge(network.id).to_string())
            .collect();
        let routed = |id: &EndpointId| {
            let endpoint = state.own_endpoint(*id);
            endpoint.is_some_and(|it| {
                built.iter().any(|network| network.id == it.network && network.mode == Mode::L3)
            })
        };
        let own = state.own_endpoints().map(|endpoint| endpoint.id).filter(routed);
        forwards.extend(own.map(|id| Device::endpoint(id).to_string()));
        if !built.is_empty() {
            forwards.extend(underlay.clone());
        }
        let endpoints: BTreeMap<IpAddr, String> = state
            .view
            .all_endpoints()
            .flat_map(|placed| placed.endpoint.addresses.iter().map(move |net| (net.addr(), placed.endpoint)))
            .filter(|(address, _)| before.leads_to.contains_key(address))
            .map(|(address, endpoint)| (address, endpoint.name.clone()))
            .collect();
        let refused: Vec<(String, String)> =
            state.reconcile.problems().map(|problem| (problem.object, problem.message)).collect();
        let mut ports = vec![OpenPort { port: self.config.advertise.port(), purpose: "gossip" }];
        if built.iter().any(|network| !network.encrypted) {
            ports.push(OpenPort { port: self.config.vxlan_port, purpose: "VXLAN" });
        }
        if built.iter().any(|network| network.may_be_sealed()) {
            ports.push(OpenPort { port: self.config.tunnel_port, purpose: "the tunnel" });
        }
        let subnets: Vec<String> = built
            .iter()
            .flat_map(|network| &network.subnets)
            .map(|subnet| subnet.prefix.to_string())
            .collect();
        let hosts: Vec<String> = state.view.nodes.values().map(|node| node.record.vtep.to_string()).collect();
        let missing = [Code::PathBroken, Code::TunnelBroken, Code::Unreachable];
        let is_cut_off = missing.iter().any(|code| state.problems.of(*code).next().is_some())
            || self
                .tunnel
                .borrow()
                .problems(&state.view, &self.config)
                .iter()
                .any(|it| it.code == Code::TunnelBroken.as_str());
        let translates = self.config.proxy.translates(true) && !state.view.resources.services().is_empty();
        // What is there twice is no change in flight.
        let lasting = |judge: &dyn Fn(&Survey) -> Vec<Found>| {
            let again = judge(&after);
            judge(&before).into_iter().filter(|found| again.contains(found)).collect::<Vec<_>>()
        };
        [
            lasting(&|survey| host::forwarding(survey, &forwards)),
            lasting(&|survey| host::features(survey, &bridges_v6, &refused)),
            lasting(&|survey| host::traffic_control(survey, underlay.as_deref().unwrap_or_default())),
            lasting(&host::leftovers),
            lasting(&|survey| host::dropping_rules(&survey.chains, &ports, &subnets, &hosts, is_cut_off)),
            lasting(&|survey| network::other_translator(&survey.chains, translates).into_iter().collect()),
            host::taken(&before, &self.needed_ports(), &refused),
            host::neighbours(&before, &after),
            lasting(&|survey| network::diverted(&desired, &survey.leads_to, &endpoints)),
            network::node_ports(&node_ports(&state), &before.sockets),
        ]
        .concat()
    }

    /// Returns the VTEPs of the live hosts other than this one.
    fn vteps(&self) -> BTreeMap<NodeId, IpAddr> {
        let state = self.state.borrow();
        let others = state
            .view
            .nodes
            .iter()
            .filter(|(id, node)| **id != state.view.me && node.state == PeerState::Alive);
        others.map(|(id, node)| (*id, node.record.vtep)).collect()
    }

    /// Looks for another machine with the underlay address of this host.
    async fn other_owner(&self) -> Result<Option<Found>, Failed> {
        let Some(vtep) = self.state.borrow().record().map(|own| own.vtep) else { return Ok(None) };
        let underlay = self.kernel.underlay(vtep, Vec::new()).await.map_err(Failed::from)?;
        if underlay.by_peers {
            // The address is on no link.
            return Ok(None);
        }
        let (device, index) = (underlay.device, underlay.index);
        let other = blocking(move || {
            let macs = kernel::macs()?;
            let Some(mac) = macs.get(&index).copied() else { return Ok(None) };
            kernel::other_owner(index, mac, &macs.into_values().collect(), vtep)
        })
        .await?;
        Ok(other.map(|other| host::duplicate(&device, vtep, other)))
    }

    /// Reads the interfaces of this host's endpoints inside their namespaces, twice where something is odd, because a workload
    /// may be about to change them.
    async fn survey_interfaces(&self) -> Vec<(Attached, Option<Inside>)> {
        let desired = self.desired();
        let ids: Vec<EndpointId> = {
            let state = self.state.borrow();
            state.endpoints.iter().map(|(id, _)| id).take(MOST_ENDPOINTS).collect()
        };
        let mut odd = Vec::new();
        for id in ids {
            if let Some((attached, inside)) = self.survey_interface(&desired, id).await
                && !network::interface(&attached, inside.as_ref()).is_empty()
            {
                odd.push(id);
            }
        }
        let mut found = Vec::new();
        if !odd.is_empty() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        for id in odd {
            found.extend(self.survey_interface(&desired, id).await);
        }
        found
    }

    /// `None` if the endpoint is not of a kind that ovl configures, or its namespace is another one now.
    async fn survey_interface(
        &self,
        desired: &Dataplane,
        id: EndpointId,
    ) -> Option<(Attached, Option<Inside>)> {
        let configured = self.configured(id)?;
        let (endpoint, local, network) = (configured.endpoint, configured.local, configured.network);
        let Some(Link::Endpoint { mtu, .. }) = desired.links.get(&Device::endpoint(id)) else { return None };
        let netns = self.kernel.open_netns(&local.netns).ok().filter(|netns| netns.inode == local.inode)?;
        let inside = self.kernel.inspect(netns, local.ifname.clone()).await.ok()?;
        let attached = Attached {
            name: endpoint.name,
            network: network.name,
            ifname: local.ifname,
            addresses: endpoint.addresses,
            mtu: u32::from(*mtu),
        };
        Some((attached, inside))
    }

    /// Asks ovl's resolver and those of the host. The first is `None` if names are not resolved here.
    async fn ask_resolvers(&self) -> (Option<Option<Duration>>, Vec<Answered>) {
        let own = async {
            if !self.resolver.is_running() {
                return None;
            }
            // A name that it knows: what others answer says nothing of it.
            let name = Name::parse(&format!("dns-version.{}", self.config.cluster_domain))?;
            // As workloads reach it; without networks, there are no rules that lead there.
            let fronted = ask(SocketAddr::from((ADDRESS_V4, 53)), name, RecordType::TXT);
            let direct = ask(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT_HOST)), name, RecordType::TXT);
            Some(tokio::select! {
                Some(took) = fronted => Some(took),
                Some(took) = direct => Some(took),
                else => None,
            })
        };
        let others = async {
            let mut asked = Vec::new();
            for server in self.resolver.upstream_addresses().into_iter().take(MOST_RESOLVERS) {
                asked.push((server, tokio::task::spawn_local(ask(server, Name::ROOT, RecordType::SOA))));
            }
            let mut answered = Vec::new();
            for (server, took) in asked {
                answered.push(Answered { server, took: took.await.ok().flatten() });
            }
            answered
        };
        tokio::join!(own, others)
    }

    /// Reads the resolv.conf(5) of a process of each endpoint of this host.
    async fn client_settings(&self) -> Vec<(String, ClientSettings)> {
        let namespaces: BTreeMap<u64, String> = {
            let state = self.state.borrow();
            let named = state
                .endpoints
                .iter()
                .filter_map(|(id, local)| Some((local.inode, state.own_endpoint(id)?.name.clone())));
            named.take(MOST_ENDPOINTS).collect()
        };
        let Ok(processes) = kernel::processes_in(namespaces.keys().copied().collect()).await else {
            return Vec::new();
        };
        let read = blocking(move || {
            let of = |(inode, name): (u64, String)| {
                let process = processes.get(&inode)?.first()?;
                let path = PathBuf::from(format!("/proc/{}/root/etc/resolv.conf", process.pid));
                Some((name, ClientSettings::parse(&read_of_workload(&path)?)))
            };
            Ok(namespaces.into_iter().filter_map(of).collect())
        });
        read.await.unwrap_or_default()
    }

    fn judge_cluster(&self, remarks: &mut Vec<Remark>) -> Vec<Found> {
        let contacts = self.gossip().contacts();
        let state = self.state.borrow();
        let members: Vec<Member> = state
            .view
            .alloc
            .members
            .iter()
            .filter_map(|id| state.view.nodes.get(id))
            .map(|node| Member {
                name: node.record.name.clone(),
                state: node.state,
                restarting: node.record.presence == Presence::Restarting,
                silent: contacts.get(&node.record.id).map(|contact| contact.last_heard.elapsed()),
                version: node.record.version.clone(),
            })
            .collect();
        if let Some(rotation) = Self::key_rotation(&state) {
            let text = format!("the cluster key is being changed to {}", rotation.key);
            remarks.push(Remark::note("cluster", "keys", text));
        }
        let mut found = if state.is_member() { cluster::down(&members) } else { Vec::new() };
        found.extend(cluster::versions(&members));
        found
    }

    fn judge_services(&self) -> Vec<Found> {
        let query = ovl_control::ResourceQuery { kind: Kind::Service, namespace: None, name: None };
        let all = self.service_backends(&query);
        let state = self.state.borrow();
        let services = state.view.resources.services();
        let judged = all.iter().filter_map(|has| {
            let service = services.get(&ResourceName::new(&has.namespace, &has.name))?;
            if service.spec.kind == ServiceType::ExternalName {
                return None;
            }
            let selector: Vec<String> =
                service.spec.selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let backed = Backed {
                name: format!("{}/{}", has.namespace, has.name),
                selector: selector.join(","),
                publishes_unready: service.spec.publish_not_ready_addresses,
            };
            network::backends(&backed, has)
        });
        judged.collect()
    }
}

/// Returns the node ports of all Services.
fn node_ports(state: &State) -> BTreeSet<NodePort> {
    let services = state.view.resources.services().iter();
    let ports = services.flat_map(|(name, service)| service.spec.ports.iter().map(move |port| (name, port)));
    let node_ports = ports.filter_map(|(name, port)| {
        NodePort::new(port.node_port?, port.protocol, &format!("{}/{}", name.namespace, name.name))
    });
    node_ports.collect()
}

/// Remarks for all checks that need what was not read.
fn unread(why: &str) -> Vec<Remark> {
    [
        ("host", "features"),
        ("host", "ports"),
        ("host", "forwarding"),
        ("host", "traffic control"),
        ("host", "leftovers"),
        ("networks", "routes"),
    ]
    .map(|(group, check)| Remark::unknown(group, check, why))
    .into()
}

/// Asks a resolver for a name, up to twice: the first answer may be late by chance. Returns the time of the faster answer.
/// Whatever it answers shows that it does.
async fn ask(server: SocketAddr, name: Name, kind: RecordType) -> Option<Duration> {
    let mut best = None;
    for _ in 0..2 {
        let begun = Instant::now();
        if timeout(RESOLVER_WITHIN, exchange(server, &name, kind))
            .await
            .is_ok_and(|answered| answered.is_ok())
        {
            let took = begun.elapsed();
            best = Some(best.map_or(took, |best: Duration| best.min(took)));
            if took < Duration::from_millis(100) {
                break;
            }
        }
    }
    best
}

async fn exchange(server: SocketAddr, name: &Name, kind: RecordType) -> std::io::Result<()> {
    const ID: u16 = 0x6f76;
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&ovl_dns::question(ID, name, kind, 0, None)).await?;
    let mut buffer = [0; 512];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if length >= 12 && buffer.starts_with(&ID.to_be_bytes()) {
            return Ok(());
        }
    }
}

/// Reads a text file of a workload. `None` if it is no file, as a link or a pipe that the workload put there.
fn read_of_workload(path: &Path) -> Option<String> {
    /// As much as the C library reads of a resolv.conf(5), and more.
    const MOST: u64 = 64 << 10;
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let mut bytes = Vec::new();
    file.metadata().ok().filter(|found| found.is_file())?;
    file.take(MOST).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
