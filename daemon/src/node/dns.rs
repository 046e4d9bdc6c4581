//! The resolver and its zone, which is derived from the state of the cluster.
//!
//! A change of tables or objects leaves marks, and [`Node::refresh_names`] applies them to the zone. It is called
//! before each pass. It is also called when an endpoint of this host is attached or detached, before any peer is
//! told.

mod cluster;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ovl_control::{DnsAnswer, DnsQuestion, DnsRecord};
use ovl_dns::{
    AnswerOrigin, Client, ClientContext, Engine, FailingServer, Listen, ListenRole, Name, Outcome,
    RecordType, Records, Resolution, Transport, Zone,
};
use ovl_proto::id::NetworkId;
use ovl_proto::resource::Name as ResourceName;
use ovl_proto::table::Endpoint;
use ovl_subsystems::names::cluster_names;
use ovl_subsystems::names::resolver::{
    ADDRESS_V4, ADDRESS_V6, CLUSTER_V4, CLUSTER_V6, PORT, PORT_DIRECT, resolv_conf,
};
use ovl_subsystems::names::zone::{self, Marks};

use self::cluster::{Cluster, Owner};
use super::state::State;
use super::{Failed, Node};
use crate::config::{Config, OWN_DOMAIN};
use crate::problems::{Code, Problem};
use ovl_subsystems::Change;
use ovl_subsystems::names::NameMarks;

/// How long a failure of an upstream resolver is reported. One that was not queried since then may have recovered.
const FAILED_LATELY: Duration = Duration::from_secs(300);

/// The resolver and its zone.
pub(super) struct Names {
    engine: Option<Engine>,
    zone: RefCell<Zone>,
    cluster: RefCell<Cluster>,
    /// The cluster domain, which contains the names of Services.
    domain: String,
}

impl Names {
    /// Starts the resolver if `serves` is set. If it cannot start, the second value is the reason.
    pub(super) fn start(config: &Config, serves: bool) -> (Self, Option<String>) {
        let mut zone = Zone::new(Name::parse(OWN_DOMAIN));
        let domain = config.cluster_domain.trim_end_matches('.').to_ascii_lowercase();
        cluster::begin(&mut zone, &domain, config.walk_search_lists);
        let (v4, v6) = (IpAddr::from(ADDRESS_V4), IpAddr::from(ADDRESS_V6));
        let (cluster4, cluster6) = (IpAddr::from(CLUSTER_V4), IpAddr::from(CLUSTER_V6));
        let endpoints = [(v4, PORT), (v6, PORT), (v4, PORT_DIRECT), (cluster4, PORT), (cluster6, PORT)];
        let endpoints =
            endpoints.map(|(address, port)| (SocketAddr::new(address, port), ListenRole::Endpoints));
        let host = config.dns_listen.iter().map(|address| (*address, ListenRole::Host));
        let listen = endpoints.into_iter().filter(|(at, _)| at.is_ipv4() || has_v6()).chain(host);
        let config = ovl_dns::Config {
            listen: listen.map(|(address, role)| Listen { address, role }).collect(),
            resolv_conf: config.resolv_conf.clone(),
            stubs: config.stub_domains.clone(),
        };
        let (engine, problem) = match serves.then(|| Engine::start(config, zone.clone())) {
            None => (None, None),
            Some(Ok(engine)) => (Some(engine), None),
            Some(Err(error)) => (None, Some(format!("names are not resolved: {error}"))),
        };
        let zone = RefCell::new(zone);
        (Self { engine, zone, cluster: RefCell::default(), domain }, problem)
    }

    /// Returns a problem for each upstream resolver that recently failed to answer.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let failing = self.engine.as_ref().map(Engine::failing).unwrap_or_default();
        let lately = failing.iter().filter(|each| each.at.elapsed() < FAILED_LATELY);
        let sentence = |FailingServer { server, stub, at }: &FailingServer| {
            let whose = stub.map_or_else(String::new, |domain| format!(" of the stub domain {domain}"));
            let ago = at.elapsed().as_secs();
            let sentence = format!(
                "the resolver {server}{whose} did not answer in time when it was asked, the last time {ago} s ago"
            );
            Code::UpstreamResolver.about(server.to_string(), sentence)
        };
        lately.map(sentence).collect()
    }

    /// Returns the counters of the resolver, with their names for metrics.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let Some(stats) = self.engine.as_ref().map(Engine::stats) else { return Vec::new() };
        vec![
            ("zone", stats.answered),
            ("cache", stats.cached),
            ("forwarded", stats.forwarded),
            ("failed", stats.failed),
            ("ignored", stats.ignored),
        ]
    }
}

fn has_v6() -> bool {
    ovl_kernel::read_sysctl("net.ipv6.conf.all.forwarding").is_some()
}

fn key(network: NetworkId) -> ovl_dns::NetworkKey {
    network.0.iter().fold(0, |key, byte| key << 8 | u64::from(*byte))
}

impl Node {
    /// Applies all marks to the zone.
    pub(super) fn refresh_names(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let NameMarks { single, networks, services, pods } = state.subsystems.names.take_marks();
        let cluster = self.name_cluster(state, services, pods);
        if single.is_empty() && networks.is_empty() && !cluster {
            return;
        }
        self.name(state, &networks, single);
    }

    /// Applies all marks to the zone, and computes the names of all networks again.
    pub(super) fn refresh_all_names(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let NameMarks { single, services, pods, .. } = state.subsystems.names.take_marks();
        self.name_cluster(state, services, pods);
        let all = state.view.networks.keys().copied().collect();
        self.name(state, &all, single);
    }

    /// Updates the zone: all names of the networks in `whole`, and the marked names of the others.
    fn name(&self, state: &State, whole: &BTreeSet<NetworkId>, marks: BTreeMap<NetworkId, Marks>) {
        let mut zone = self.names.zone.borrow_mut();
        // The clients depend on this host's endpoints, and on which other hosts have the same addresses.
        let is_own = |network: NetworkId, address: IpAddr| {
            let me = state.view.me;
            let mut all = state.view.all_with_address(network, address);
            zone.has_client(address) || all.any(|placed| placed.node.record.id == me)
        };
        let asks = !whole.is_empty()
            || marks.iter().any(|(network, marks)| marks.addresses().iter().any(|at| is_own(*network, *at)));
        if !whole.is_empty() || zone.networks() != state.view.networks.len() {
            let networks: HashSet<_> = state.view.networks.keys().map(|id| key(*id)).collect();
            zone.retain_networks(|key| networks.contains(&key));
        }
        for network in whole {
            let Some(found) = state.view.networks.get(network) else { continue };
            let label = Name::parse(&found.network.name).unwrap_or(Name::ROOT);
            let subnets = found.network.subnets.iter().map(|subnet| subnet.prefix).collect();
            zone.set_network(key(*network), label, subnets);
            let there = Marks::of_network(&state.view, *network);
            let gone = zone.names(key(*network));
            for name in gone {
                match name.reversed() {
                    Some(address) if !there.addresses().contains(&address) => {
                        zone.set(key(*network), &name, Records::default());
                    }
                    None if !there.names().contains(&name.to_string()) => {
                        zone.set(key(*network), &name, Records::default());
                    }
                    Some(_) | None => {}
                }
            }
            set(&mut zone, state, *network, &there);
        }
        for (network, marks) in marks.into_iter().filter(|(network, _)| !whole.contains(network)) {
            set(&mut zone, state, network, &marks);
        }
        if asks {
            set_clients(&mut zone, state);
        }
        if let Some(engine) = &self.names.engine {
            engine.set_zone(zone.clone());
        }
    }

    /// Updates the names of Services and pods in the zone. Returns whether any was marked.
    fn name_cluster(
        &self,
        state: &mut State,
        services: BTreeSet<ResourceName>,
        pods: Vec<(String, Vec<IpAddr>, bool)>,
    ) -> bool {
        if services.is_empty() && pods.is_empty() {
            return false;
        }
        if state.view.has_services() {
            // From the first Service on, existing pods need the resolver's address too.
            let networks: Vec<_> =
                state.view.own().into_iter().flat_map(|own| own.table.networks()).collect();
            networks.into_iter().for_each(|network| state.subsystems.names.resolve(network));
        }
        let (mut zone, mut cluster) = (self.names.zone.borrow_mut(), self.names.cluster.borrow_mut());
        let domain = &self.names.domain;
        for name in services {
            let service = state.view.resources.services().get(&name);
            let names = service.map(|service| {
                cluster_names::of_service(domain, service, state.workloads.backends().of(&name))
            });
            cluster.change(&mut zone, Owner::Service(name), names);
        }
        for (namespace, addresses, is_there) in pods {
            let names = is_there.then(|| cluster_names::of_pod(domain, &namespace, &addresses));
            cluster.change(&mut zone, Owner::Pod(namespace, addresses), names);
        }
        true
    }

    /// Whether pods need the cluster DNS: there is a Service.
    pub(super) fn has_services(&self) -> bool {
        self.state.borrow().view.has_services()
    }

    /// Returns the DNS configuration of a pod, as the result of a CNI call has it (CNI specification 1.1.0, "DNS").
    /// `None` if there is no Service.
    pub(super) fn pod_dns(&self, namespace: &str) -> Option<serde_json::Value> {
        let (servers, domain) = (self.config.ranges.dns_addresses().collect::<Vec<_>>(), &self.names.domain);
        self.has_services().then(|| {
            let search = cluster_names::search(domain, namespace);
            let ndots = format!("ndots:{}", cluster_names::NDOTS);
            serde_json::json!({
                "nameservers": servers, "domain": domain, "search": search, "options": [ndots]
            })
        })
    }

    /// Returns the answer to a query and the reason for it.
    pub(super) async fn dns(&self, question: DnsQuestion) -> Result<DnsAnswer, Failed> {
        let address: Option<IpAddr> = question.name.parse().ok();
        let name = match address {
            Some(address) => Name::reverse_of(address),
            None => Name::parse(&question.name)
                .ok_or_else(|| Failed::invalid(format!("'{}' cannot be a name in DNS", question.name)))?,
        };
        let kind = match address {
            Some(_) => RecordType::PTR,
            None => RecordType::parse(&question.kind)
                .ok_or_else(|| Failed::invalid(format!("'{}' is no type of record", question.kind)))?,
        };
        let (asker, from) = match &question.from {
            None => (Client::Host, "host".to_owned()),
            Some(endpoint) => {
                let found = self.own_endpoint_called(endpoint, question.network.as_deref())?;
                let address = found.addresses.first().map(IpNet::addr);
                let address = address.ok_or_else(|| Failed::internal("an endpoint without an address"))?;
                (Client::Endpoint(address), found.name)
            }
        };
        let zone = self.names.zone.borrow().clone();
        let message = ovl_dns::question(0, &name, kind, 0, None);
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let (answer, why) = match ovl_dns::answer(&zone, asker, Transport::Tcp, &message, &mut buffer, 0) {
            Outcome::Answer(length) => {
                buffer.truncate(length);
                (buffer, self.why(&zone, asker, &name))
            }
            Outcome::Ignore => {
                return Err(Failed::unavailable(format!(
                    "{from} gets no answer: its addresses are not in use"
                )));
            }
            outcome @ (Outcome::Forward | Outcome::Alias) => {
                let engine = self.names.engine.as_ref();
                let engine = engine.ok_or_else(|| Failed::unavailable("names are not resolved here"))?;
                let alias = (outcome == Outcome::Alias).then(|| ovl_dns::target(&zone, asker, &message));
                let alias = alias.flatten().map(|target| target.name);
                let name = alias.unwrap_or(name);
                let found = engine.look_up(&name, kind).await;
                let found = found.ok_or_else(|| Failed::unavailable("the resolver has ended"))?;
                let of = match found.stub {
                    Some(domain) => format!("of the stub domain {domain}"),
                    None => format!("in {}", self.config.resolv_conf.display()),
                };
                let why = match found.origin {
                    AnswerOrigin::Cache => format!("no name of ovl's; a resolver {of} said so a while ago"),
                    AnswerOrigin::Server(server) => {
                        format!("no name of ovl's; {}, {of}, said so", server.ip())
                    }
                    AnswerOrigin::Unanswered => {
                        format!("no name of ovl's; none of the resolvers {of} answered")
                    }
                };
                let stands = alias.map(|name| format!("it stands for {name}: ")).unwrap_or_default();
                (found.message, stands + &why)
            }
        };
        let (status, records) =
            ovl_dns::records(&answer).ok_or_else(|| Failed::internal("an answer that cannot be read"))?;
        let answers = records.into_iter().map(|record| DnsRecord {
            name: record.name,
            kind: record.kind.to_string(),
            ttl: record.ttl,
            data: record.data.to_string(),
        });
        Ok(DnsAnswer {
            name: name.to_string(),
            kind: kind.to_string(),
            from,
            status: status.to_string(),
            answers: answers.collect(),
            why,
        })
    }

    /// Explains an answer from the zone.
    fn why(&self, zone: &Zone, asker: Client, name: &Name) -> String {
        let state = self.state.borrow();
        match zone.find(asker, name) {
            Resolution::Found(found, records) => {
                let Some(network) = state.view.networks.values().find(|n| key(n.network.id) == found) else {
                    return format!("of the cluster, under {}", self.names.domain);
                };
                let addresses = records.v4.iter().map(|at| IpAddr::from(*at));
                let addresses = addresses.chain(records.v6.iter().map(|at| IpAddr::from(*at)));
                let addresses: Vec<IpAddr> = addresses.chain(name.reversed()).collect();
                let of = addresses.into_iter().filter_map(|address| {
                    let placed = state.view.endpoint_by_address(network.network.id, address)?;
                    Some(format!("{} on {}", placed.endpoint.name, placed.node.record.name))
                });
                let of: BTreeSet<String> = of.collect();
                let of: Vec<String> = of.into_iter().collect();
                format!("on network {}: {}", network.network.name, of.join(", "))
            }
            Resolution::NotFound => "only ovl would know this name, and nothing is called so".to_owned(),
            Resolution::SearchPath(to) => format!("a search list is walked here, and ends at {to}"),
            Resolution::External => {
                format!("not under {OWN_DOMAIN}: the host asks its own resolvers for other names")
            }
        }
    }

    /// Returns the content of resolv.conf for an endpoint.
    pub(super) fn resolv_conf(&self, endpoint: &str, network: Option<&str>) -> Result<String, Failed> {
        Ok(resolv_conf(&self.own_endpoint_called(endpoint, network)?.addresses))
    }

    /// Returns the endpoint of this host with a name.
    ///
    /// # Errors
    ///
    /// There is none, or it is on several networks and `network` is absent.
    fn own_endpoint_called(&self, name: &str, network: Option<&str>) -> Result<Endpoint, Failed> {
        let state = self.state.borrow();
        let network = match network {
            Some(name) => {
                let found = state.view.network(name).map(|found| found.network.id);
                Some(found.ok_or_else(|| Failed::no_network(&state, name))?)
            }
            None => None,
        };
        let named = state.view.own().into_iter().flat_map(|own| own.table.named(name));
        let named: Vec<&Endpoint> =
            named.filter(|endpoint| network.is_none_or(|network| endpoint.network == network)).collect();
        match named[..] {
            [] => Err(Failed::not_found(format!("there is no endpoint {name} on this host"))),
            [one] => Ok(one.clone()),
            _ => Err(Failed::invalid(format!("{name} is on several networks: name one with --network"))),
        }
    }
}

fn records_of(addresses: BTreeSet<IpAddr>) -> Records {
    let mut records = Records::default();
    for address in addresses {
        match address {
            IpAddr::V4(address) => records.v4.push(address),
            IpAddr::V6(address) => records.v6.push(address),
        }
    }
    records
}

/// Sets the clients of the zone by their addresses.
fn set_clients(zone: &mut Zone, state: &State) {
    let place = |endpoint: &Endpoint| {
        let local = state.endpoints.get(&endpoint.id)?;
        // If the namespace is unknown, assume that the endpoint does not share it.
        let alone = (local.inode == 0).then_some(endpoint.id);
        Some(((local.inode, alone), local.ifname.clone()))
    };
    let clients = zone::dns_clients(&state.view, place).into_iter().map(|(address, client)| {
        let networks = client.networks.into_iter().map(key).collect();
        let search = Name::parse(&format!("{}.svc", client.namespace));
        (address, ClientContext { networks, search })
    });
    zone.set_clients(clients.collect());
}

/// Sets the current records of the marked names and addresses.
fn set(zone: &mut Zone, state: &State, network: NetworkId, marks: &Marks) {
    for text in marks.names() {
        // Not every valid endpoint name is a valid DNS name.
        let Some(name) = Name::parse(text) else { continue };
        zone.set(key(network), &name, records_of(zone::addresses(&state.view, network, text)));
    }
    for address in marks.addresses() {
        let names = zone::names_of(&state.view, network, *address);
        let names = names.iter().filter_map(|name| Name::parse(name)).collect();
        zone.set(key(network), &Name::reverse_of(*address), Records { names, ..Records::default() });
    }
}
