//! The thread that does all work on the kernel, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::{diff, lost_endpoints};
use ovl_dataplane::nft::{Element, Skeleton, Table};
use ovl_dataplane::observed::Inside;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_tunnel::PrivateKey;
use tokio::sync::oneshot;

use super::announce::Announcer;
use super::apply::{self, Devices};
use super::error::{KernelError, Result};
use super::filter::Filter;
use super::known::Known;
use super::monitor::Monitor;
use super::netns::{self, Netns, Visitor};
use super::outbox::Outbox;
use super::socket::Route;
use super::sweep::{self, Sweeper};
use super::tables::Tables;
use super::tunnel::{self, TunnelStatus, Tunnels};
use super::watch::Watch;
use super::{Counted, EndpointSpec, Goal, HostEnd, KernelEvent, Made, Outcome, Pass, Retired, Underlay};
use super::{conntrack, dump, endpoint, inspect, sysctl};

/// So many entries go to the kernel at once.
const BATCH: usize = 256;

/// What the worker is asked to do, and where the answer goes.
#[derive(Debug)]
pub(super) enum Request {
    Dump(oneshot::Sender<Result<Dataplane>>),
    Reconcile(Box<Goal>, oneshot::Sender<Result<Pass>>),
    Apply(Vec<Op>, oneshot::Sender<Vec<Outcome>>),
    Create(Vec<Op>, Box<EndpointSpec>, oneshot::Sender<(Vec<Outcome>, Result<Made>)>),
    Inspect(Netns, String, oneshot::Sender<Result<Option<Inside>>>),
    Delete(Vec<Device>, oneshot::Sender<Result<()>>),
    Underlay(IpAddr, oneshot::Sender<Result<Underlay>>),
    Announce(Vec<(Device, IpAddr)>, oneshot::Sender<()>),
    WayTo(IpAddr, oneshot::Sender<Result<Option<u32>>>),
    Prefixes(oneshot::Sender<Result<Vec<IpNet>>>),
    RemoveFilter(oneshot::Sender<Result<()>>),
    Retire(Vec<Retired>, Vec<Op>, oneshot::Sender<(Vec<Outcome>, Result<()>)>),
    Sweep(oneshot::Sender<Result<()>>),
    Counts(Table, Vec<String>, oneshot::Sender<Result<Vec<Vec<Counted>>>>),
    Counter(Table, &'static str, oneshot::Sender<Result<u64>>),
    HasWireguard(oneshot::Sender<bool>),
    LearnKey(PrivateKey, oneshot::Sender<()>),
    Tunnels(oneshot::Sender<Result<Vec<TunnelStatus>>>),
}

#[derive(Debug)]
pub(super) struct Worker {
    route: Route,
    monitor: Monitor,
    watch: Watch,
    filter: Filter,
    tables: Tables,
    known: Known,
    visitor: Visitor,
    sweeper: Sweeper,
    tunnels: Tunnels,
    announcer: Announcer,
    outbox: Outbox,
}

impl Worker {
    /// In the network namespace of the calling thread.
    pub(super) fn new(outbox: Outbox, tunnels: Tunnels) -> Result<Self> {
        // First the ears, then the first look: so nothing falls between.
        let monitor = Monitor::open()?;
        let tables = Tables::open()?;
        let watch = Watch::new(vec![tables.port()]);
        let filter = Filter::default();
        let mut route = Route::open()?;
        let mut known = Known::default();
        let (kernel, names) = dump::kernel(&mut route)?;
        let sweeper = Sweeper::start()?;
        sweeper.doom(names.doomed.iter().copied());
        known.load(kernel, names);
        Ok(Self {
            route,
            monitor,
            watch,
            filter,
            tables,
            known,
            visitor: Visitor::default(),
            sweeper,
            tunnels,
            announcer: Announcer::open()?,
            outbox,
        })
    }

    /// Until all senders of requests are gone.
    pub(super) fn run(mut self, requests: &Receiver<Request>, mut wake: UnixStream) {
        let mut waiting = None;
        loop {
            let again = self.outbox.flush();
            let fds = [Some(wake.as_raw_fd()), Some(self.monitor.descriptor()), self.watch.descriptor()];
            let Ok([_, changes, nftables]) = super::sys::poll(fds, again) else { return };
            let mut bytes = [0; 64];
            while wake.read(&mut bytes).is_ok_and(|length| length == bytes.len()) {}
            loop {
                match waiting.take().map_or_else(|| requests.try_recv(), Ok) {
                    Ok(request) => waiting = self.serve(request, requests),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if changes {
                self.listen();
            }
            if nftables {
                self.listen_to_tables();
            }
        }
    }

    /// Gives back a request that was taken from the queue and is not for it.
    fn serve(&mut self, request: Request, requests: &Receiver<Request>) -> Option<Request> {
        self.sweeper.note_work();
        // Who asked may have gone away: then nobody wants the answer.
        match request {
            Request::Dump(reply) => {
                let _ = reply.send(self.dump(&BTreeMap::new()));
            }
            Request::Reconcile(goal, reply) => {
                let _ = reply.send(self.reconcile(&goal));
            }
            Request::Apply(ops, reply) => {
                let _ = reply.send(self.apply(ops, &mut Devices::default()));
            }
            Request::Create(ops, spec, reply) => {
                let _ = reply.send(self.create(ops, *spec));
                self.listen();
            }
            Request::Inspect(netns, ifname, reply) => {
                let look = move |route: &mut Route| inspect::inspect(route, &ifname);
                let _ = reply.send(self.visitor.visit(netns.fd, look));
            }
            Request::Delete(devices, reply) => return self.delete(devices, reply, requests),
            Request::Underlay(vtep, reply) => {
                let _ = reply.send(dump::underlay(&mut self.route, vtep));
            }
            Request::Announce(addresses, reply) => {
                self.announcer.announce_at(&mut self.route, &addresses);
                let _ = reply.send(());
            }
            Request::WayTo(address, reply) => {
                let _ = reply.send(dump::way_to(&mut self.route, address));
            }
            Request::Prefixes(reply) => {
                let _ = reply.send(dump::prefixes(&mut self.route));
            }
            Request::Retire(retired, ops, reply) => {
                let _ = reply.send(self.retire(retired, ops));
                self.listen();
            }
            Request::Sweep(reply) => self.sweeper.all(reply),
            Request::Counts(table, sets, reply) => {
                let _ = reply.send(self.tables.counts(table, &sets));
            }
            Request::Counter(table, name, reply) => {
                let _ = reply.send(self.tables.counted(table, name));
            }
            Request::HasWireguard(reply) => {
                let _ = reply.send(tunnel::kernel_has_wireguard());
            }
            Request::LearnKey(key, reply) => {
                self.tunnels.learn(key);
                let _ = reply.send(());
            }
            Request::Tunnels(reply) => {
                let _ = reply.send(self.tunnels.status(self.known.kernel()));
            }
            Request::RemoveFilter(reply) => {
                let _ = reply.send(self.remove_tables());
            }
        }
        None
    }

    /// Reads what the kernel says has changed, and passes on what we did not know.
    fn listen(&mut self) {
        if self.monitor.drain(&mut self.known) {
            self.outbox.add(KernelEvent::Overrun);
        }
        let news = self.known.news();
        self.outbox.add_gone(news.gone);
        if news.changed {
            self.outbox.add(KernelEvent::Changed);
        }
        if news.underlay {
            self.outbox.add(KernelEvent::Underlay);
        }
    }

    /// The same for tables. What we change there ourselves is read too, so that it does not pile up.
    fn listen_to_tables(&mut self) {
        self.watch.drain(0);
        let filter = self.watch.take_filter();
        let tables = self.watch.take_tables();
        if filter {
            self.filter.touched();
        }
        self.tables.touched(&tables);
        if filter || !tables.is_empty() {
            self.outbox.add(KernelEvent::FilterChanged);
        }
    }

    /// For a teardown.
    fn remove_tables(&mut self) -> Result<()> {
        self.tunnels.remove()?;
        self.filter.remove(&mut self.watch)?;
        Table::ALL.into_iter().try_for_each(|table| self.tables.remove(table))
    }

    /// Of our tables, what `wanted` says is looked for where we did not write it.
    fn dump(&mut self, wanted: &BTreeMap<Table, Arc<Skeleton>>) -> Result<Dataplane> {
        self.listen();
        let (mut kernel, names) = dump::kernel(&mut self.route)?;
        self.sweeper.doom(names.doomed.iter().copied());
        self.tunnels.fill(&mut kernel)?;
        self.known.load(kernel.clone(), names);
        self.listen();
        self.listen_to_tables();
        kernel.filter = self.filter.current()?;
        (kernel.tables, kernel.elements) = self.tables.dump(wanted)?;
        Ok(kernel)
    }

    fn reconcile(&mut self, goal: &Goal) -> Result<Pass> {
        let (ops, lost) = compare(self.dump(&goal.desired.tables)?, goal);
        let outcomes = if goal.apply {
            self.apply(ops, &mut Devices::default())
        } else {
            ops.into_iter().map(|op| Outcome { op, result: Ok(()) }).collect()
        };
        Ok(Pass { outcomes, lost })
    }

    fn apply(&mut self, ops: Vec<Op>, devices: &mut Devices) -> Vec<Outcome> {
        let outcomes = self.carry_out(ops, devices);
        self.listen();
        self.listen_to_tables();
        outcomes
    }

    /// Leaves some of what the kernel says about it to be heard.
    fn carry_out(&mut self, ops: Vec<Op>, devices: &mut Devices) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut peers = Vec::new();
        self.tunnels.expect(&ops);
        let mut ops = ops.into_iter().peekable();
        while let Some(op) = ops.next() {
            let mut run = vec![op];
            let is_entry = |op: &Op| apply::is_entry(op) && !self.tunnels.takes(op);
            let elements = run.first().is_some_and(apply::is_element);
            let flows = run.first().is_some_and(|op| matches!(op, Op::EndFlows(_)));
            let same = |first: &Op, next: &Op| {
                (is_entry(first) && is_entry(next))
                    || (elements && apply::is_element(next))
                    || (flows && matches!(next, Op::EndFlows(_)))
                    || (self.tunnels.is_source(first) && self.tunnels.is_source(next))
                    || matches!((first, next), (Op::DelLink(_), Op::DelLink(_)))
            };
            while (elements || flows || run.len() < BATCH)
                && let Some(op) = ops.next_if(|next| run.first().is_some_and(|first| same(first, next)))
            {
                run.push(op);
            }
            let results = self.run_of(&run, devices, &mut peers);
            for (op, result) in run.into_iter().zip(results) {
                let result = result.and_then(|()| self.tunnels.routed(&op));
                if result.is_ok() {
                    self.known.applied(&op);
                }
                outcomes.push(Outcome { op, result });
            }
            if ops.peek().is_some() {
                self.listen();
            }
        }
        self.set_peers(peers, &mut outcomes);
        self.announcer.announce(&mut self.route, &outcomes);
        outcomes
    }

    /// Operations of one kind; `peers` takes the MTUs of other ends that are still to be set.
    fn run_of(&mut self, run: &[Op], devices: &mut Devices, peers: &mut Vec<Peer>) -> Vec<Result<()>> {
        let route = &mut self.route;
        let for_all = |results: Result<Vec<Result<()>>>| {
            results.unwrap_or_else(|error| run.iter().map(|_| Err(error.clone())).collect())
        };
        let one = match run {
            [first, ..] if apply::is_element(first) => return self.tables.apply(run),
            [Op::EndFlows(_), ..] => {
                let flows = run.iter().filter_map(|op| match op {
                    Op::EndFlows(flows) => Some(flows),
                    _ => None,
                });
                let result = conntrack::end(&flows.collect::<Vec<_>>());
                return run.iter().map(|_| result.clone()).collect();
            }
            [first, ..] if self.tunnels.is_source(first) => {
                let result = self.tunnels.change_sources(run);
                return run.iter().map(|_| result.clone()).collect();
            }
            [op] if self.tunnels.takes(op) => self.tunnels.apply(op),
            [Op::DelLink(_), ..] => {
                let doomed: Vec<Device> = run.iter().filter_map(Op::device).collect();
                doomed.iter().for_each(|device| self.tunnels.delete(*device));
                return for_all(apply::delete(route, devices, &doomed));
            }
            [Op::Sysctl { name, value }] => sysctl::write(name, value),
            [Op::SetLocalnet(device)] => sysctl::route_localnet(*device, true),
            [Op::DelLocalnet(device)] => sysctl::route_localnet(*device, false),
            [op @ Op::AddAnnounced(device, address)] => apply::announced(route, op, *device, *address, true),
            [op @ Op::DelAnnounced(device, address)] => apply::announced(route, op, *device, *address, false),
            [Op::DelFilter] => self.filter.remove(&mut self.watch),
            [Op::Filter(text)] => self.filter.replace(text, &mut self.watch),
            [Op::DelTable(table)] => self.tables.remove(*table),
            [Op::Table(table, skeleton)] => self.tables.write(*table, skeleton, Some(&mut self.watch)),
            [op @ Op::AddLink(device, link)] => {
                let guarded = match link {
                    Link::Vxlan { vni, sealed: true, .. } => self.tunnels.guard(*device, *vni),
                    _ => Ok(()),
                };
                guarded.and_then(|()| apply::add_link(route, devices, &mut self.tunnels, op, *device, link))
            }
            [op @ Op::SetLink(device, from, to)] => apply::set_link(route, devices, op, *device, from, to)
                .and_then(|located| {
                    let Some(mtu) = apply::peer_mtu(*device, from, to) else { return Ok(()) };
                    let peer = located.peer.zip(located.peer_netns);
                    let (index, netns) = peer
                        .ok_or_else(|| KernelError::Other(format!("the other end of {device} is unknown")))?;
                    peers.push(Peer { device: *device, index, netns, mtu });
                    Ok(())
                }),
            _ => return for_all(apply::entries(route, devices, run)),
        };
        vec![one]
    }

    /// Gives the other ends of endpoints their MTU, namespace by namespace.
    fn set_peers(&mut self, peers: Vec<Peer>, outcomes: &mut [Outcome]) {
        if peers.is_empty() {
            return;
        }
        let mut by_netns: BTreeMap<i32, Vec<Peer>> = BTreeMap::new();
        for peer in peers {
            by_netns.entry(peer.netns).or_default().push(peer);
        }
        let wanted: BTreeSet<i32> = by_netns.keys().copied().collect();
        let mut found = netns::by_id(&mut self.route, &wanted).unwrap_or_default();
        for (id, peers) in by_netns {
            let results = match found.remove(&id) {
                Some(netns) => {
                    let mtus = peers.iter().map(|peer| (peer.index, peer.mtu)).collect();
                    endpoint::set_peer_mtu(&mut self.visitor, netns, mtus)
                }
                None => Err(KernelError::Other(
                    "cannot set the MTU inside of a namespace that has neither a name nor a process"
                        .to_owned(),
                )),
            };
            let results = results.unwrap_or_else(|error| peers.iter().map(|_| Err(error.clone())).collect());
            for (peer, result) in peers.iter().zip(results) {
                let Err(error) = result else { continue };
                let of_peer = |outcome: &&mut Outcome| {
                    outcome.result.is_ok()
                        && matches!(outcome.op, Op::SetLink(device, ..) if device == peer.device)
                };
                if let Some(outcome) = outcomes.iter_mut().find(of_peer) {
                    outcome.result = Err(error);
                }
            }
        }
    }

    fn create(&mut self, ops: Vec<Op>, spec: EndpointSpec) -> (Vec<Outcome>, Result<Made>) {
        let device = spec.device;
        let (after, before): (Vec<Op>, Vec<Op>) =
            ops.into_iter().partition(|op| op.device() == Some(device) || publishes(op));
        let mut devices = Devices::default();
        // All in one go; what is wrong with one of them, its user hears.
        let bridge = match spec.host_end {
            HostEnd::Port(bridge, _) => Some(bridge),
            HostEnd::Routed { .. } => None,
        };
        let _ = devices.find(&mut self.route, bridge.into_iter().chain([device]));
        let mut outcomes = self.carry_out(before, &mut devices);
        let created = endpoint::create(&mut self.route, &mut devices, &mut self.visitor, &self.sweeper, spec);
        let result = match created {
            Ok(created) => {
                self.known.created(created.index, device, created.link);
                outcomes.extend(self.carry_out(after, &mut devices));
                Ok(created.made)
            }
            Err(error) => {
                outcomes.extend(after.into_iter().map(|op| Outcome { op, result: Err(error.clone()) }));
                Err(error)
            }
        };
        (outcomes, result)
    }

    fn retire(&mut self, retired: Vec<Retired>, ops: Vec<Op>) -> (Vec<Outcome>, Result<()>) {
        let mut all = Ok(());
        for one in retired {
            let device = one.device;
            match sweep::retire(&mut self.route, &mut self.visitor, &self.sweeper, one) {
                Ok(()) => self.known.deleted(device),
                Err(error) => all = Err(error),
            }
        }
        (self.carry_out(ops, &mut Devices::default()), all)
    }

    /// Takes along further requests of the kind that wait already: together they take no longer.
    fn delete(
        &mut self,
        devices: Vec<Device>,
        reply: oneshot::Sender<Result<()>>,
        requests: &Receiver<Request>,
    ) -> Option<Request> {
        let mut other = None;
        let mut together = vec![(devices, reply)];
        loop {
            match requests.try_recv() {
                Ok(Request::Delete(devices, reply)) => together.push((devices, reply)),
                Ok(request) => {
                    other = Some(request);
                    break;
                }
                Err(_) => break,
            }
        }
        let all: Vec<Device> = together.iter().flat_map(|(devices, _)| devices).copied().collect();
        all.iter().for_each(|device| self.tunnels.delete(*device));
        let results = match apply::delete(&mut self.route, &mut Devices::default(), &all) {
            Ok(results) => results,
            Err(error) => all.iter().map(|_| Err(error.clone())).collect(),
        };
        for (device, _) in all.iter().zip(&results).filter(|(_, result)| result.is_ok()) {
            self.known.deleted(*device);
        }
        self.listen();
        let mut results = results.into_iter();
        for (devices, reply) in together {
            // Each takes as many as it asked for, also where one of them failed.
            let its: Vec<Result<()>> = results.by_ref().take(devices.len()).collect();
            let _ = reply.send(its.into_iter().collect());
        }
        other
    }
}

/// The operations that lead from a dump to what is desired, and the endpoints whose host's ends are missing.
pub(super) fn compare(mut actual: Dataplane, goal: &Goal) -> (Vec<Op>, Vec<Device>) {
    actual.links.retain(|device, _| !goal.ignored.contains(device));
    actual.ports.retain(|(device, _)| !goal.ignored.contains(device));
    actual.routes.retain(|_, hop| hop.device.is_none_or(|device| !goal.ignored.contains(&device)));
    actual.neighbours.retain(|key, _| !goal.ignored.contains(&key.0) && !goal.expected.contains(key));
    // What others opened, as the plugin portmap does, is theirs to close.
    actual.localnets.retain(|device| goal.desired.localnets.contains(device));
    let ops = diff(&actual, &goal.desired, goal.prune);
    let lost = lost_endpoints(&actual, &goal.desired).collect();
    (ops, lost)
}

/// Whether an operation publishes a port, takes one back, or ends what was before.
pub(super) fn publishes(op: &Op) -> bool {
    match op {
        Op::SetElement(Element { set, .. }) | Op::DelElement(set, _) => set.table == Table::Publish,
        Op::EndFlows(_) => true,
        _ => false,
    }
}

/// The other end of an endpoint whose MTU changes.
#[derive(Debug)]
struct Peer {
    device: Device,
    index: u32,
    netns: i32,
    mtu: u16,
}
