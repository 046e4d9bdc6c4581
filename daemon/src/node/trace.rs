//! Runs traces: sends the probe, watches it here, and asks the other end's daemon for its part. [`crate::trace`] decides
//! what the way should be and what follows from what was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use ovl_cluster::view::Placed;
use ovl_control::{
    DnsQuestion, PathVerdict, PeerPath, PeerState, Trace, TraceRequest, TraceStage, TraceVerdict,
};
use ovl_dataplane::passage::{PacketKind, Passage, ProbeKind};
use ovl_dataplane::state::Dataplane;
use ovl_kernel::{Netns, TraceProbe, TraceWatch, WatchSpec};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::{EndpointId, NodeId};
use ovl_proto::object::Mode;
use ovl_proto::resource::Protocol;
use ovl_proto::sync::{MAX_TRACE, Message};
use ovl_proto::table::Endpoint;

use super::{Failed, Node};
use crate::failed::blocking;
use crate::problems::Code;
use crate::slots::ClientSlot;
use crate::trace::arrive::{arrive, inner, receiver};
use crate::trace::compare::{End, Known, Others, compare};
use crate::trace::model::{Flow, Here, Interface, Leaving, Way, leave, to_port};
use crate::trace::question::{self, HOST, Source, Target};
use crate::trace::step::{Arrival, Step};
use crate::trace::{Ask, MOST, Said};

/// How long a trace takes at most.
const WITHIN: Duration = Duration::from_secs(5);
/// How long another host has to answer. It has to read its kernel and to start a watch.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);
/// How often the probe is sent, so that the loss of one packet is not taken for a fault.
const TIMES: u32 = 3;
/// The time between two of them. The last one has as long to arrive.
const PAUSE: Duration = Duration::from_millis(350);
/// The maximum time that is added to each pause at random. Else two traces that begin together would stay in step, and each
/// took what the kernel drops of the other's probes for its own.
const JITTER: Duration = Duration::from_millis(100);
/// How long packets that are on their way have to be seen after the answer.
const GRACE: Duration = Duration::from_millis(30);
/// The maximum number of backends of a Service that are looked at.
const MOST_WAYS: usize = 8;
/// For how long a watch is kept for another host that does not collect it.
const KEPT: Duration = Duration::from_secs(5);

/// The destination of a trace.
struct Found {
    addresses: Vec<IpAddr>,
    what: String,
    /// The step of its name, if the resolver knows it.
    name: Option<Step>,
}

/// What is known of this host at the moment of a trace.
struct Facts {
    desired: Dataplane,
    actual: Dataplane,
    own: Vec<IpAddr>,
    services: Vec<IpNet>,
    broken: BTreeMap<NodeId, String>,
    /// The hosts to or from which large packets are lost, with the sentence that says so.
    narrow: BTreeMap<String, String>,
}

impl Node {
    /// Deletes the tables of a trace that was running when the last run was killed.
    pub(super) async fn remove_left_traces(&self) {
        if let Err(failed) = blocking(ovl_kernel::remove_left_traces).await {
            tracing::warn!(error = failed.0.message, "cannot delete the tables of traces of the last run");
        }
    }

    /// Answers [`ovl_control::Request::Trace`], on any host.
    pub(super) async fn trace(self: &Rc<Self>, request: TraceRequest) -> Result<Trace, Failed> {
        if !self.environment.owns_host() {
            return Err(Failed::unavailable("packets are not traced here"));
        }
        if request.port.is_some() && request.protocol == Protocol::Sctp && !request.no_probe {
            return Err(Failed::invalid("SCTP cannot be probed: add --no-probe"));
        }
        let (mut request, host) = {
            let state = self.state.borrow();
            let hint = match question::target(&state.view, &request.to) {
                Target::Addresses(addresses, _) => addresses.first().copied(),
                Target::Name(_) => None,
            };
            let source = question::source(&state.view, &request.from, hint)?;
            (request.clone(), source.host())
        };
        let (me, own) = {
            let state = self.state.borrow();
            (state.view.me, state.record().map(|record| record.vtep))
        };
        if host == me {
            return self.run_trace(request).await;
        }
        // On the other host the word would mean that host.
        if let (HOST, Some(own)) = (&*request.to, own) {
            request.to = own.to_string();
        }
        let from = request.from.clone();
        match self.ask_trace(host, &Ask::Run(request), WITHIN + ANSWER_WITHIN).await {
            Ok(Said::Trace(trace)) => Ok(*trace),
            Ok(_) => Err(Failed::internal("another host gave an answer to another question")),
            Err(why) => {
                let name = self.state.borrow().view.name_of(host);
                let message = format!("{from} is on host {name}, which does not take part: {why}");
                Err(Failed::unavailable(message))
            }
        }
    }

    /// Runs a trace whose sender is on this host.
    async fn run_trace(self: &Rc<Self>, request: TraceRequest) -> Result<Trace, Failed> {
        let _slot = self.begin_trace()?;
        match tokio::time::timeout(WITHIN, self.trace_from_here(request)).await {
            Ok(result) => result,
            Err(_) => Err(Failed::unavailable(format!("the trace took longer than {WITHIN:?}: try again"))),
        }
    }

    fn begin_trace(&self) -> Result<ClientSlot, Failed> {
        let slot = self.state.borrow().traces.begin();
        slot.ok_or_else(|| {
            Failed::unavailable(format!(
                "host {} takes part in {MOST} traces: try again in some seconds",
                self.config.node
            ))
        })
    }

    async fn trace_from_here(self: &Rc<Self>, request: TraceRequest) -> Result<Trace, Failed> {
        let kind = match (request.port, request.protocol) {
            (None, _) => ProbeKind::Echo,
            (Some(port), Protocol::Udp) => ProbeKind::Udp(port),
            (Some(port), Protocol::Tcp | Protocol::Sctp) => ProbeKind::Tcp(port),
        };
        let found = match self.find_target(&request, kind).await? {
            Ok(found) => found,
            Err(trace) => return Ok(*trace),
        };
        let Found { addresses, what, name } = found;
        let (from, to) = self.choose(&request.from, &addresses)?;
        let cookie = u32::from_le_bytes(self.random()) & !1;
        let netns = from.as_ref().map(|from| self.netns_to_trace(from.id)).transpose();
        let (netns, netns_error) = match netns {
            Ok(netns) => (netns, None),
            Err(failed) => (None, Some(failed.0.message)),
        };
        let is_probed = !request.no_probe && (from.is_none() || netns.is_some());
        let (probe, send_error) = match is_probed {
            true => match blocking(move || TraceProbe::open(netns, cookie, to, kind)).await? {
                Ok(probe) => (Some(probe), None),
                Err(error) => (None, Some(error.to_string())),
            },
            false => (None, None),
        };
        let mut interface = match &from {
            Some(from) => self.look_at_interface(from, None).await,
            None => Interface::default(),
        };
        interface.error = netns_error.or(interface.error.take());
        let facts = self.trace_facts().await?;
        let own_source = || {
            let address = from.as_ref()?.addresses.iter().map(|net| net.addr());
            address.into_iter().find(|address| address.is_ipv4() == to.is_ipv4())
        };
        let source = probe.as_ref().map(|probe| probe.source).or_else(own_source);
        let source = source.unwrap_or(to);
        let Leaving { steps, mut ways } = {
            let state = self.state.borrow();
            let flow = Flow { from: from.as_ref(), source, to, kind };
            leave(&facts.here(&state), flow, &interface)
        };
        let steps = name.into_iter().chain(steps).collect();
        ways.truncate(MOST_WAYS);
        let mut notes = Vec::new();
        let mut ends = self.arm_all(&ways, cookie, kind, is_probed, &mut notes).await;
        let (passage, send_error) = match probe {
            Some(probe) => self.send_probe(&probe, cookie, from.as_ref(), send_error).await?,
            None => (None, send_error),
        };
        if is_probed {
            self.collect_all(&mut ends, cookie, &mut notes).await;
        }
        let chosen = choose_way(&ways, &ends, passage.as_ref());
        let others = Others {
            all: ways.len(),
            ending: ways.iter().enumerate().filter(|(n, way)| ends_there(way, ends.get(n))).count(),
        };
        let mut known = Known {
            from: self.label(from.as_ref(), source),
            to: format!("{what} ({to})"),
            to_address: Some(to),
            source: End { host: self.config.node.clone(), steps, passage },
            from_workload: from.is_some(),
            to_workload: false,
            others,
            send_error,
            is_probed,
            notes,
            ..Known::default()
        };
        if let Some((n, way)) = chosen.and_then(|n| Some((n, ways.get(n)?))) {
            known.source.steps.extend(way.steps.iter().cloned());
            known.is_outside = way.host.is_none() && way.arrival.is_none() && is_unknown(&way.steps);
            // Most programs do not answer a datagram that they do not understand.
            known.answer =
                self.answer_step(from.as_ref(), way).filter(|_| !matches!(kind, ProbeKind::Udp(_)));
            known.backend = (way.to.0 != to).then_some(way.to.0);
            let other = way.host.map(|host| self.state.borrow().view.name_of(host));
            let narrow = other.and_then(|other| facts.narrow.get(&other));
            known.limited = narrow.map(|why| format!("host {}: {why}", self.config.node));
            if let Some((end, is_workload)) = ends.remove(&n) {
                known.to_workload = is_workload;
                known.to = format!("{} on {}", known.to, end.host);
                known.destination = Some(end);
            }
        }
        Ok(compare(known, kind))
    }

    /// Finds the addresses of the destination, what it is, and the step of its name. The inner error is the trace of a name
    /// that has no address.
    async fn find_target(
        &self,
        request: &TraceRequest,
        kind: ProbeKind,
    ) -> Result<Result<Found, Box<Trace>>, Failed> {
        let name = match question::target(&self.state.borrow().view, &request.to) {
            Target::Addresses(addresses, what) => return Ok(Ok(Found { addresses, what, name: None })),
            Target::Name(name) => name,
        };
        let (from, network) = {
            let state = self.state.borrow();
            match question::source(&state.view, &request.from, None)? {
                Source::Host(_) => (None, None),
                Source::Endpoints(Placed { endpoint, .. }) => {
                    let network = state.view.networks.get(&endpoint.network);
                    (Some(endpoint.name.clone()), network.map(|found| found.network.name.clone()))
                }
            }
        };
        let asked_by = from.as_deref().map_or_else(String::new, |from| format!(" --from {from}"));
        let command = format!("ovlctl dns {name}{asked_by}");
        let mut why = format!("the name {name} has no address");
        for record in ["A", "AAAA"] {
            let question = DnsQuestion {
                name: name.clone(),
                kind: record.to_owned(),
                from: from.clone(),
                network: network.clone(),
            };
            match self.dns(question).await {
                Ok(answer) => {
                    let found = answer.answers.iter().filter_map(|record| record.data.parse::<IpAddr>().ok());
                    let found: Vec<IpAddr> = found.collect();
                    if let Some(first) = found.first() {
                        let step = Step::passes(
                            TraceStage::Name,
                            format!("{name} is {first}: {}", answer.why),
                            command,
                        );
                        return Ok(Ok(Found { addresses: found, what: name, name: Some(step) }));
                    }
                    why = format!("{name} has no address ({}): {}", answer.status, answer.why);
                }
                Err(failed) => why = format!("{name} is not resolved: {}", failed.0.message),
            }
        }
        let advice =
            "check the name: `ovlctl endpoints`, `ovlctl get svc -A` and `ovlctl peers` list what has one";
        let step = Step::stops(TraceStage::Name, why.clone(), command, advice);
        let source = End { host: self.config.node.clone(), steps: vec![step], passage: None };
        let known = Known { from: request.from.clone(), to: name, source, ..Known::default() };
        let mut trace = compare(known, kind);
        trace.probe = Some(TraceVerdict { arrives: Some(false), why }).filter(|_| !request.no_probe);
        Ok(Err(Box::new(trace)))
    }

    /// Chooses the endpoint of this host that sends (`None` for the host itself) and the address to which it sends.
    fn choose(&self, from: &str, addresses: &[IpAddr]) -> Result<(Option<Endpoint>, IpAddr), Failed> {
        let state = self.state.borrow();
        let first = addresses.first().copied();
        let from = match question::source(&state.view, from, first)? {
            Source::Host(_) => None,
            Source::Endpoints(placed) => Some(placed.endpoint.clone()),
        };
        let has_family = |to: &IpAddr| {
            from.as_ref()
                .is_none_or(|from| from.addresses.iter().any(|net| net.addr().is_ipv4() == to.is_ipv4()))
        };
        let to = addresses.iter().copied().find(has_family).or(first);
        let to = to.ok_or_else(|| Failed::not_found("the destination has no address"))?;
        Ok((from, to))
    }

    fn netns_to_trace(&self, id: EndpointId) -> Result<Netns, Failed> {
        let state = self.state.borrow();
        let local = state.endpoints.get(id);
        let local = local.ok_or_else(|| Failed::not_found("the namespace of the endpoint is not known"))?;
        let netns = self.kernel.open_netns(&local.netns).map_err(Failed::from)?;
        match netns.inode == local.inode {
            true => Ok(netns),
            false => Err(Failed::not_found("the namespace of the endpoint is gone")),
        }
    }

    /// Looks at the interface of an endpoint of this host, and at what listens.
    async fn look_at_interface(&self, endpoint: &Endpoint, to: Option<(IpAddr, ProbeKind)>) -> Interface {
        let name = self.state.borrow().endpoints.get(endpoint.id).map(|local| local.ifname.clone());
        let mut interface = Interface { name: name.unwrap_or_default(), ..Interface::default() };
        let look = async {
            let netns = self.netns_to_trace(endpoint.id)?;
            let state = self.kernel.inspect(netns, interface.name.clone()).await.map_err(Failed::from)?;
            let listens = match to {
                Some((to, kind)) => {
                    let netns = self.netns_to_trace(endpoint.id)?;
                    blocking(move || ovl_kernel::listens(Some(netns), to, kind)).await?
                }
                None => None,
            };
            Ok::<_, Failed>((state, listens))
        };
        match look.await {
            Ok((state, listens)) => (interface.state, interface.listens) = (state, listens),
            Err(failed) => interface.error = Some(failed.0.message),
        }
        interface
    }

    async fn trace_facts(&self) -> Result<Facts, Failed> {
        let desired = self.desired();
        let actual = self.kernel.dump().await.map_err(Failed::from)?;
        let own = ovl_kernel::own_addresses().map_err(|error| Failed::kernel(error.to_string()))?;
        let state = self.state.borrow();
        let direct = state.subsystems.networks.direct_hops(&state.view);
        let broken =
            state.view.nodes.values().filter(|node| node.state == PeerState::Alive).filter_map(|node| {
                let paths = self.peer_paths(&state, &direct, node.record.id);
                let is_broken = |path: &PeerPath| {
                    [&path.sent, &path.received].iter().any(|way| way.state == PathVerdict::Broken)
                };
                let path = paths.into_iter().find(is_broken)?;
                // Where nothing comes back, it is not known what arrives there.
                let (name, by) = (&node.record.name, &path.encapsulation);
                let why = match path.sent.state {
                    PathVerdict::Broken => {
                        format!("host {name} receives nothing from this host ({by}): path probes are lost")
                    }
                    _ => format!("this host receives nothing from host {name} ({by}): path probes are lost"),
                };
                Some((node.record.id, why))
            });
        Ok(Facts {
            desired,
            actual,
            own: own.map(|(_, address)| address).collect(),
            services: self.config.ranges.of_services(&state.view),
            broken: broken.collect(),
            narrow: state
                .problems
                .of(Code::PathNarrow)
                .map(|(host, why)| (host.to_owned(), why.to_owned()))
                .collect(),
        })
    }

    /// Asks the hosts to which the packet may go for their steps, and to watch for it. By the numbers of the ways.
    async fn arm_all(
        self: &Rc<Self>,
        ways: &[Way],
        cookie: u32,
        kind: ProbeKind,
        watch: bool,
        notes: &mut Vec<String>,
    ) -> BTreeMap<usize, (End, bool)> {
        let mut ends = BTreeMap::new();
        let mut silent: BTreeSet<NodeId> = BTreeSet::new();
        for (n, way) in ways.iter().enumerate() {
            let (Some(host), Some(arrival)) = (way.host, way.arrival.clone()) else { continue };
            if silent.contains(&host) {
                continue;
            }
            let kind = match arrival.to == way.to.0 {
                true => to_port(kind, way.to.1),
                false => kind,
            };
            let name = self.state.borrow().view.name_of(host);
            let me = self.state.borrow().view.me;
            let armed = if host == me {
                self.arm(me, cookie, arrival, kind, watch).await.map_err(|failed| failed.0.message)
            } else {
                let ask = Ask::Arm { cookie, arrival, kind, watch };
                match self.ask_trace(host, &ask, ANSWER_WITHIN).await {
                    Ok(Said::Armed(steps, is_workload)) => Ok((steps, is_workload)),
                    Ok(_) => Err("it gave an answer to another question".to_owned()),
                    Err(why) => Err(why),
                }
            };
            match armed {
                Ok((steps, is_workload)) => {
                    ends.insert(n, (End { host: name, steps, passage: None }, is_workload));
                }
                Err(why) => {
                    silent.insert(host);
                    notes.push(format!("host {name} does not take part: {why}"));
                }
            }
        }
        ends
    }

    /// Sends the probe until it is answered. Returns what was seen of it here, and why it could not be sent.
    async fn send_probe(
        self: &Rc<Self>,
        probe: &TraceProbe,
        cookie: u32,
        from: Option<&Endpoint>,
        mut error: Option<String>,
    ) -> Result<(Option<Passage>, Option<String>), Failed> {
        let netns = from.map(|from| self.netns_to_trace(from.id)).transpose()?;
        let mut watch = self.start_watch(cookie, netns).await?;
        for _ in 0..TIMES {
            match probe.send() {
                Ok(()) => error = None,
                // The answer to the one before it.
                Err(refused) if refused.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(failed) => error = Some(failed.to_string()),
            }
            let random = u32::from_le_bytes(self.random());
            let pause = PAUSE + JITTER.mul_f64(f64::from(random) / f64::from(u32::MAX));
            if tokio::time::timeout(pause, &mut watch.answered).await.is_ok() {
                break;
            }
        }
        tokio::time::sleep(GRACE).await;
        let passage = finish(watch).await?;
        Ok((Some(passage), error))
    }

    async fn start_watch(self: &Rc<Self>, cookie: u32, netns: Option<Netns>) -> Result<TraceWatch, Failed> {
        let own = self.state.borrow().record().map(|record| record.vxlan_port);
        let vxlan_ports = own.into_iter().chain([SEALED_VXLAN_PORT]).collect();
        self.pause_fast_path_for(KEPT).await;
        blocking(move || TraceWatch::start(WatchSpec { cookie, netns, vxlan_ports })).await
    }

    /// Ends all watches, and adds what was seen to the ends.
    async fn collect_all(
        &self,
        ends: &mut BTreeMap<usize, (End, bool)>,
        cookie: u32,
        notes: &mut Vec<String>,
    ) {
        let me = self.state.borrow().view.me;
        let mut seen: BTreeMap<String, Option<Passage>> = BTreeMap::new();
        for (end, _) in ends.values_mut() {
            if !seen.contains_key(&end.host) {
                let host = self.host_called(&end.host);
                let collected = match host {
                    Some(host) if host == me => {
                        self.collect(me, cookie).await.map_err(|failed| failed.0.message)
                    }
                    Some(host) => match self.ask_trace(host, &Ask::Collect { cookie }, ANSWER_WITHIN).await {
                        Ok(Said::Collected(passage)) => Ok(*passage),
                        Ok(_) => Err("it gave an answer to another question".to_owned()),
                        Err(why) => Err(why),
                    },
                    None => Err("it is gone".to_owned()),
                };
                let passage = match collected {
                    Ok(passage) => Some(passage),
                    Err(why) => {
                        notes.push(format!("host {} does not say what it saw: {why}", end.host));
                        None
                    }
                };
                seen.insert(end.host.clone(), passage);
            }
            end.passage = seen.get(&end.host).cloned().flatten();
        }
    }

    fn host_called(&self, name: &str) -> Option<NodeId> {
        let state = self.state.borrow();
        let mut all = state.view.nodes.values().filter(|node| node.record.name == name);
        all.find(|node| state.view.counts(node)).map(|node| node.record.id)
    }

    /// Returns the steps of what arrives here, and watches for the probe.
    async fn arm(
        self: &Rc<Self>,
        by: NodeId,
        cookie: u32,
        arrival: Arrival,
        kind: ProbeKind,
        watch: bool,
    ) -> Result<(Vec<Step>, bool), Failed> {
        let facts = self.trace_facts().await?;
        let (endpoint, to, kind_there) = {
            let state = self.state.borrow();
            let here = facts.here(&state);
            let endpoint = receiver(&here, &arrival, kind).cloned();
            let (to, there) = inner(&here, &arrival, kind);
            (endpoint, to, there)
        };
        let interface = match &endpoint {
            Some(endpoint) => self.look_at_interface(endpoint, Some((to, kind_there))).await,
            None => Interface {
                listens: blocking(move || ovl_kernel::listens(None, to, kind_there)).await?,
                ..Interface::default()
            },
        };
        if watch {
            let netns = endpoint.as_ref().and_then(|endpoint| self.netns_to_trace(endpoint.id).ok());
            self.watch_for(by, cookie, netns).await?;
        }
        let state = self.state.borrow();
        Ok((arrive(&facts.here(&state), &arrival, kind, &interface), endpoint.is_some()))
    }

    /// Watches for the probe of a host until it collects what was seen.
    async fn watch_for(self: &Rc<Self>, by: NodeId, cookie: u32, netns: Option<Netns>) -> Result<(), Failed> {
        let (is_first, is_own) = {
            let state = self.state.borrow();
            (!state.traces.is_watched(by, cookie), by == state.view.me)
        };
        // The rules of this host are followed once: of what stays here, by the watch of the sender.
        let (watch, slot) = if is_first && !is_own {
            let slot = self.begin_trace()?;
            (self.start_watch(cookie, netns).await?, Some(slot))
        } else {
            (blocking(move || TraceWatch::start_without_rules(cookie, netns)).await?, None)
        };
        self.state.borrow_mut().traces.keep(by, cookie, watch, slot);
        if is_first {
            let node = Rc::clone(self);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(KEPT).await;
                drop(node.state.borrow_mut().traces.take(by, cookie));
            });
        }
        Ok(())
    }

    async fn collect(&self, by: NodeId, cookie: u32) -> Result<Passage, Failed> {
        let watches = self.state.borrow_mut().traces.take(by, cookie);
        let watches = watches.ok_or_else(|| Failed::not_found("nothing was watched"))?;
        let mut all = Passage::default();
        for watch in watches {
            let Passage { sightings, drops, reasons, notes } = finish(watch).await?;
            all.sightings.extend(sightings);
            all.drops.extend(drops);
            all.reasons.extend(reasons);
            all.notes.extend(notes);
        }
        all.sightings.sort_by_key(|seen| seen.at_us);
        Ok(all)
    }

    /// Asks another host for its part.
    ///
    /// # Errors
    ///
    /// A sentence: the host is not connected, does not answer in time, or refuses.
    async fn ask_trace(&self, host: NodeId, ask: &Ask, within: Duration) -> Result<Said, String> {
        let ask = serde_json::to_string(ask).map_err(|error| error.to_string())?;
        let ((id, answer), name) = {
            let mut state = self.state.borrow_mut();
            (state.traces.asked.ask(host), state.view.name_of(host))
        };
        let sent = self.links().send(host, &Message::TraceAsk { id, ask });
        let answer = match sent {
            true => tokio::time::timeout(within, answer).await,
            false => {
                self.state.borrow_mut().traces.asked.give_up(id);
                return Err(format!("its ovld is not connected: `ovlctl peers` has the state of {name}"));
            }
        };
        self.state.borrow_mut().traces.asked.give_up(id);
        let said = match answer {
            Ok(Ok(said)) => said?,
            Ok(Err(_)) | Err(_) => {
                return Err("its ovld does not answer, or has a release without traces".to_owned());
            }
        };
        serde_json::from_str(&said).map_err(|error| format!("its answer cannot be read: {error}"))
    }

    /// Answers [`Message::TraceAsk`] of a member.
    pub(super) fn take_trace_ask(self: &Rc<Self>, from: NodeId, id: u64, ask: String) {
        let Some(slot) = self.state.borrow().traces.begin_answer() else {
            let result = Err("it answers other traces: try again".to_owned());
            self.links().send(from, &Message::TraceReply { id, result });
            return;
        };
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let result = node.answer_trace(from, &ask).await.map_err(|failed| failed.0.message);
            drop(slot);
            let result =
                result.and_then(|said| serde_json::to_string(&said).map_err(|error| error.to_string()));
            let result = result.and_then(|said| match said.len() <= MAX_TRACE {
                true => Ok(said),
                false => Err("what it has to say of the trace is too long".to_owned()),
            });
            node.links().send(from, &Message::TraceReply { id, result });
        });
    }

    async fn answer_trace(self: &Rc<Self>, from: NodeId, ask: &str) -> Result<Said, Failed> {
        if ask.len() > MAX_TRACE || !self.environment.owns_host() {
            return Err(Failed::unavailable("packets are not traced here"));
        }
        let ask = serde_json::from_str(ask).map_err(|error| {
            Failed::invalid(format!("not a question that this release understands: {error}"))
        })?;
        Ok(match ask {
            Ask::Run(request) => Said::Trace(Box::new(self.run_trace(request).await?)),
            Ask::Arm { cookie, arrival, kind, watch } => {
                let (steps, is_workload) = self.arm(from, cookie, arrival, kind, watch).await?;
                Said::Armed(steps, is_workload)
            }
            Ask::Collect { cookie } => Said::Collected(Box::new(self.collect(from, cookie).await?)),
        })
    }

    /// Returns who sends, for people.
    fn label(&self, from: Option<&Endpoint>, source: IpAddr) -> String {
        match from {
            Some(from) => format!("{}/{} ({source}) on {}", from.namespace, from.name, self.config.node),
            None => format!("host {} ({source})", self.config.node),
        }
    }

    /// Returns the step of an answer that does not come back. `None` if nothing is in its way.
    fn answer_step(&self, from: Option<&Endpoint>, way: &Way) -> Option<Step> {
        let state = self.state.borrow();
        let placed = question::with_address(&state.view, way.to.0)?;
        let network = &state.view.networks.get(&placed.endpoint.network)?.network;
        let is_elsewhere = placed.node.record.id != state.view.me;
        let is_foreign = from.is_none_or(|from| from.network != network.id);
        (is_foreign && is_elsewhere && network.mode == Mode::L2).then(|| {
            Step::stops(
                TraceStage::Answer,
                format!(
                    "endpoints of {} answer by the gateway on their own host, here {}, so the answer does not come back",
                    network.name, placed.node.record.name
                ),
                "ip addr",
                "reach endpoints of a switched network from another endpoint of it, by a node port, or by a published port",
            )
        })
    }
}

impl Facts {
    fn here<'a>(&'a self, state: &'a super::state::State) -> Here<'a> {
        Here {
            view: &state.view,
            admitted: state.admitted_now(),
            desired: &self.desired,
            actual: &self.actual,
            own: &self.own,
            services: &self.services,
            broken: &self.broken,
        }
    }
}

/// Returns the number of the way that the probe took: to the last address at which it was seen here that belongs to one,
/// because a probe that is sent again may meet another backend. What a server sends back comes from such an address.
/// Otherwise the first one that ends, or else the first one.
fn choose_way(ways: &[Way], ends: &BTreeMap<usize, (End, bool)>, passage: Option<&Passage>) -> Option<usize> {
    let seen = passage.into_iter().flat_map(|passage| &passage.sightings);
    let probes: Vec<_> = seen.filter(|seen| seen.kind == PacketKind::Probe).collect();
    let sender = probes.first().map(|seen| seen.source);
    let is_sent = |source: IpAddr| Some(source) == sender || !ways.iter().any(|way| way.to.0 == source);
    let mut sent = probes.iter().rev().filter(|seen| is_sent(seen.source));
    sent.find_map(|seen| ways.iter().position(|way| way.to.0 == seen.destination))
        .or_else(|| ways.iter().enumerate().position(|(n, way)| ends_there(way, ends.get(&n))))
        .or((!ways.is_empty()).then_some(0))
}

/// Whether the model says that a packet does not pass this way.
fn ends_there(way: &Way, end: Option<&(End, bool)>) -> bool {
    let there = end.into_iter().flat_map(|(end, _)| &end.steps);
    way.steps.iter().chain(there).any(|step| step.state == ovl_control::TraceState::Stops)
}

fn is_unknown(steps: &[Step]) -> bool {
    steps.last().is_some_and(|step| step.state == ovl_control::TraceState::Unknown)
}

async fn finish(watch: TraceWatch) -> Result<Passage, Failed> {
    let joined = tokio::task::spawn_blocking(move || watch.finish()).await;
    joined.map_err(|error| Failed::internal(error.to_string()))
}
