//! The resolver: what answers queries for names on this host.
//!
//! [`Resolver`] owns the DNS engine. Which names exist is decided by [`ovl_subsystems::names::Names`]; the resolver is
//! given each new zone. Begin to read at [`Resolver::start`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ovl_cluster::view::View;
use ovl_control::{DnsAnswer, DnsQuestion, DnsRecord};
use ovl_dns::{
    AnswerOrigin, Client, Engine, FailingServer, Listen, ListenRole, Lookup, Name, Outcome, RecordType,
    ResolvConfWatcher, Share, Told, Transport, UnusedLine, Upstreams, Zone,
};
use ovl_metrics::Durations;
use ovl_subsystems::names::resolver::{
    ADDRESS_V4, ADDRESS_V6, CLUSTER_V4, CLUSTER_V6, HOST_ADDRESSES, PORT, PORT_DIRECT, PORT_FROM_LOCALHOST,
    PORT_HOST, PORT_HOST_DIRECT,
};
use ovl_subsystems::names::{Ambiguous, Bearer, ambiguous, cluster_names};

use tokio::sync::mpsc;

use crate::config::Config;
use crate::failed::Failed;
use crate::problems::{Code, Problem};

/// How long a failure of an upstream resolver is reported. One that was not queried since then may have recovered.
const FAILED_LATELY: Duration = Duration::from_secs(300);

/// The resolver of this host.
pub(crate) struct Resolver {
    /// `None` if names are not resolved here.
    engine: Option<Engine>,
    /// The file that names the upstream resolvers.
    resolv_conf: PathBuf,
}

/// A query that `ovlctl dns` asks for.
#[derive(Debug)]
pub(crate) struct Query {
    /// The name, or the reverse name of an address.
    pub name: Name,
    /// The type of the records.
    pub kind: RecordType,
}

impl Query {
    /// Reads the name and the type of a question. An address stands for its PTR record.
    ///
    /// # Errors
    ///
    /// The name or the type is not valid.
    pub(crate) fn parse(question: &DnsQuestion) -> Result<Self, Failed> {
        if let Ok(address) = question.name.parse::<IpAddr>() {
            return Ok(Self { name: Name::reverse_of(address), kind: RecordType::PTR });
        }
        let name = Name::parse(&question.name)
            .ok_or_else(|| Failed::invalid(format!("'{}' cannot be a name in DNS", question.name)))?;
        let kind = RecordType::parse(&question.kind)
            .ok_or_else(|| Failed::invalid(format!("'{}' is no type of record", question.kind)))?;
        Ok(Self { name, kind })
    }
}

/// Who asks, and what the zone has for it.
pub(crate) struct Asked {
    /// The client.
    pub client: Client,
    /// What the client is called: an endpoint's name, or `host`.
    pub from: String,
    /// A snapshot of the zone.
    pub zone: Zone,
    /// Why the zone answers as it does, for an answer from the zone.
    pub why: String,
}

impl Resolver {
    /// Returns a watcher of the resolvers that this host asks.
    pub(crate) fn upstream_servers(config: &Config) -> ResolvConfWatcher {
        let own = own_addresses(config).chain(config.dns_listen.iter().copied()).collect();
        ResolvConfWatcher::new(config.resolv_conf.clone(), own)
    }

    /// Starts the resolver with a zone if `serves` is set. `told` is told of addresses of names that endpoints are watched for. If it cannot start, the second value is the reason.
    pub(crate) fn start(
        config: &Config,
        serves: bool,
        zone: Zone,
        told: mpsc::Sender<Told>,
    ) -> (Self, Option<String>) {
        let (v4, v6) = (IpAddr::from(ADDRESS_V4), IpAddr::from(ADDRESS_V6));
        let (cluster4, cluster6) = (IpAddr::from(CLUSTER_V4), IpAddr::from(CLUSTER_V6));
        let endpoints = [
            (v4, PORT),
            (v6, PORT),
            (v4, PORT_DIRECT),
            (v4, PORT_FROM_LOCALHOST),
            (cluster4, PORT),
            (cluster6, PORT),
        ];
        let endpoints =
            endpoints.map(|(address, port)| (SocketAddr::new(address, port), ListenRole::Endpoints));
        let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
        let programs = loopback.into_iter().flat_map(|address| {
            [PORT_HOST, PORT_HOST_DIRECT].map(|port| (SocketAddr::new(address, port), ListenRole::HostOnly))
        });
        let host = config.dns_listen.iter().map(|address| (*address, ListenRole::Host));
        let listen = endpoints.into_iter().chain(programs);
        let listen = listen.filter(|(at, _)| at.is_ipv4() || has_v6()).chain(host);
        let own = own_addresses(config).collect();
        let resolv_conf = config.resolv_conf.clone();
        let config = ovl_dns::Config {
            listen: listen.map(|(address, role)| Listen { address, role }).collect(),
            own,
            resolv_conf: resolv_conf.clone(),
            stubs: config.stub_domains.clone(),
            told: Some(told),
        };
        let (engine, problem) = match serves.then(|| Engine::start(config, zone)) {
            None => (None, None),
            Some(Ok(engine)) => (Some(engine), None),
            Some(Err(error)) => (None, Some(format!("names are not resolved: {error}"))),
        };
        (Self { engine, resolv_conf }, problem)
    }

    /// Answers from this zone from now on.
    pub(crate) fn set_zone(&self, zone: Zone) {
        if let Some(engine) = &self.engine {
            engine.set_zone(zone);
        }
    }

    /// Returns a problem for each upstream resolver that recently failed to answer.
    /// Also returns one for each client that used up its share of the resolver lately; `called` returns what the
    /// endpoint with an address is called.
    pub(crate) fn problems(&self, called: impl Fn(IpAddr) -> Option<String>) -> Vec<Problem> {
        let failing = self.engine.as_ref().map(Engine::failing).unwrap_or_default();
        let lately = failing.iter().filter(|each| each.at.elapsed() < FAILED_LATELY && !each.is_default);
        let default = failing.iter().find(|each| each.is_default);
        let sentence = |FailingServer { server, stub, at, .. }: &FailingServer| {
            let whose = stub.map_or_else(String::new, |domain| format!(" of the stub domain {domain}"));
            let ago = at.elapsed().as_secs();
            let sentence = format!(
                "the resolver {server}{whose} did not answer in time when it was asked, the last time {ago} s ago"
            );
            Code::UpstreamResolver.about(server.to_string(), sentence)
        };
        let limited = self.engine.as_ref().map(Engine::limited).unwrap_or_default();
        let limited = limited.into_iter().map(|(client, share)| limit_problem(client, share, &called));
        let upstreams = self.engine.as_ref().and_then(Engine::upstreams);
        let of_file = upstreams
            .iter()
            .flat_map(|upstreams| file_problems(&self.resolv_conf, upstreams, default.is_some()));
        lately.map(sentence).chain(limited).chain(of_file).collect()
    }

    /// Reads resolv.conf(5) and returns what is wrong with it, before the resolver itself looks at it again.
    pub(crate) fn file_problems(&self, config: &Config) -> Vec<Problem> {
        let read = Self::upstream_servers(config).changed();
        read.iter().flat_map(|upstreams| file_problems(&self.resolv_conf, upstreams, false)).collect()
    }

    /// Whether names are resolved here.
    pub(crate) fn is_running(&self) -> bool {
        self.engine.is_some()
    }

    /// Returns the upstream servers that resolv.conf(5) names.
    pub(crate) fn upstream_addresses(&self) -> Vec<SocketAddr> {
        let upstreams = self.engine.as_ref().and_then(Engine::upstreams);
        upstreams.map(|upstreams| upstreams.servers.clone()).unwrap_or_default()
    }

    /// Returns how many answers were sent before their addresses were admitted.
    pub(crate) fn late(&self) -> u64 {
        self.engine.as_ref().map_or(0, |engine| engine.stats().late)
    }

    /// Returns how long questions to upstream servers took. `None` if the resolver does not run.
    pub(crate) fn waits(&self) -> Option<Durations> {
        Some(self.engine.as_ref()?.waits())
    }

    /// Returns the counters of the resolver, with their names for metrics.
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        let Some(stats) = self.engine.as_ref().map(Engine::stats) else { return Vec::new() };
        vec![
            ("zone", stats.answered),
            ("cache", stats.cached),
            ("forwarded", stats.forwarded),
            ("failed", stats.failed),
            ("limited", stats.limited),
            ("ignored", stats.ignored),
        ]
    }

    /// Returns the answer to a query and the reason for it. Names that are not in the zone are looked up at the
    /// upstream resolvers.
    ///
    /// # Errors
    ///
    /// The client gets no answer, or names are not resolved here.
    pub(crate) async fn answer(&self, query: Query, asked: Asked) -> Result<DnsAnswer, Failed> {
        let Asked { client, from, zone, why } = asked;
        let Query { name, kind } = query;
        let message = ovl_dns::question(0, &name, kind, 0, None);
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let (name, answer, why) =
            match ovl_dns::answer(&zone, client, Transport::Tcp, &message, &mut buffer, 0) {
                Outcome::Answer(length) => {
                    buffer.truncate(length);
                    (name, buffer, why)
                }
                Outcome::Ignore => {
                    let why = "its addresses are not in use, or a network policy denies it the resolver";
                    return Err(Failed::unavailable(format!("{from} gets no answer: {why}")));
                }
                outcome @ (Outcome::Forward | Outcome::Alias(_)) => {
                    let alias = outcome.alias().map(|target| target.name);
                    let found = self.look_up(&alias.unwrap_or(name), kind).await?;
                    let stands = alias.map(|name| format!("it stands for {name}: ")).unwrap_or_default();
                    let why = stands + &self.said(&found);
                    (name, found.message, why)
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

    async fn look_up(&self, name: &Name, kind: RecordType) -> Result<Lookup, Failed> {
        let engine =
            self.engine.as_ref().ok_or_else(|| Failed::unavailable("names are not resolved here"))?;
        engine.look_up(name, kind).await.ok_or_else(|| Failed::unavailable("the resolver has ended"))
    }

    /// Says where the answer of another resolver comes from.
    fn said(&self, found: &Lookup) -> String {
        let of = match &found.stub {
            Some(domain) => format!("of the stub domain {domain}"),
            None => format!("in {}", self.resolv_conf.display()),
        };
        match found.origin {
            AnswerOrigin::Cache => format!("no name of ovl's; a resolver {of} said so a while ago"),
            AnswerOrigin::Server(server) => format!("no name of ovl's; {}, {of}, said so", server.ip()),
            AnswerOrigin::Unanswered => format!("no name of ovl's; none of the resolvers {of} answered"),
        }
    }
}

/// Returns what is wrong with resolv.conf(5). `is_silent` says that 127.0.0.1, which is queried if the file names no
/// resolver, does not answer.
fn file_problems(path: &Path, upstreams: &Upstreams, is_silent: bool) -> Vec<Problem> {
    let Upstreams { servers, is_default, unused } = upstreams;
    let path = path.display();
    let none = if *is_default && is_silent {
        Some(format!(
            "{path} has no usable `nameserver` line, and no resolver answers at 127.0.0.1, which the C library and ovld \
             query instead: names outside of the cluster do not resolve. Write the addresses of this host's resolvers \
             into the file"
        ))
    } else if servers.is_empty() && unused.is_empty() {
        Some(format!(
            "{path} names only resolvers that send queries back to ovld: names outside of the cluster do not resolve. \
             Write the address of another resolver into the file"
        ))
    } else {
        None
    };
    let line = |UnusedLine { number, text, reason }: &UnusedLine| {
        let sentence =
            format!("line {number} of {path} is not used: `{text}`: {reason}. Correct or remove the line");
        Code::ResolvConf.about(format!("{path}:{number}"), sentence)
    };
    let none = none.map(|sentence| Code::ResolvConf.about(path.to_string(), sentence));
    none.into_iter().chain(unused.iter().map(line)).collect()
}

/// Returns a problem for each name with two meanings of which one is an endpoint of this host.
pub(crate) fn ambiguous_names(view: &View) -> impl Iterator<Item = Problem> {
    ambiguous(view).into_iter().map(|(name, Ambiguous { called, qualified })| {
        let bearer = |Bearer { endpoint, network, host }: &Bearer| {
            format!("endpoint {endpoint} on network {network} (host {host})")
        };
        let sentence = format!(
            "the name {name} has two meanings: {} is called so, and it is the full name of {}. Endpoints on both networks \
             get the addresses of the second one for it, and those of the first one for {name}.{}. Give one of them \
             another name",
            bearer(&called),
            bearer(&qualified),
            called.network
        );
        Code::AmbiguousName.about(name, sentence)
    })
}

/// Returns the addresses at which ovld itself answers, beside those that it listens at.
fn own_addresses(config: &Config) -> impl Iterator<Item = SocketAddr> {
    let rewritten = HOST_ADDRESSES.into_iter().chain(config.ranges.dns_addresses());
    rewritten.map(|address| SocketAddr::new(address, PORT))
}

/// Says which client has used up a share of the resolver.
fn limit_problem(client: Client, share: Share, called: impl Fn(IpAddr) -> Option<String>) -> Problem {
    let (object, who) = match client {
        Client::Host | Client::HostOnly => ("host".to_owned(), "a program of this host".to_owned()),
        Client::Endpoint(address) => match called(address) {
            Some(name) => (name.clone(), format!("endpoint {name} ({address})")),
            None => (address.to_string(), format!("the endpoint at {address}")),
        },
    };
    let sentence = match share {
        Share::Connections => format!(
            "{who} holds as many TCP connections to the resolver as one client may: its idle ones are closed for new ones. \
             Stop what opens them"
        ),
        Share::Queries => format!(
            "{who} has as many queries waiting for upstream resolvers as one client may, so further ones fail. Stop what \
             sends them, or see why the upstream resolvers do not answer"
        ),
    };
    Code::ResolverShare.about(object, sentence)
}

/// Returns the DNS configuration of a pod, as the result of a CNI call has it (CNI specification 1.1.0, "DNS").
pub(crate) fn pod_dns(servers: &[IpAddr], domain: &str, namespace: &str) -> serde_json::Value {
    let search = cluster_names::search(domain, namespace);
    let ndots = format!("ndots:{}", cluster_names::NDOTS);
    serde_json::json!({ "nameservers": servers, "domain": domain, "search": search, "options": [ndots] })
}

fn has_v6() -> bool {
    ovl_kernel::read_sysctl("net.ipv6.conf.all.forwarding").is_some()
}
