//! The kernel worker: the thread that serves all requests to the kernel in order.

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
use ovl_dataplane::nft::{Skeleton, Table};
use ovl_dataplane::observed::Inside;
use ovl_dataplane::op::{AnnouncedOp, LinkOp, NftOp, Op, SysctlOp};
use ovl_dataplane::state::{Dataplane, Link};
use ovl_tunnel::PrivateKey;
use tokio::sync::oneshot;

use super::announce::Announcer;
use super::apply::{self, Devices};
use super::error::{KernelError, Result};
use super::event_queue::EventQueue;
use super::fast::{Attachment, FastCounters, FastPath};
use super::filter::Filter;
use super::groups::PortGroups;
use super::known::KernelModel;
use super::link::Traffic;
use super::monitor::{Monitor, PeerMonitor};
use super::netns::{self, Netns, NetnsWorker};
use super::socket::Route;
use super::sweep::{self, Sweeper};
use super::tables::Tables;
use super::timed::{TimedChange, TimedElement};
use super::tunnel::{self, TunnelStatus, Tunnels};
use super::watch::Watch;
use super::{
    CountedElement, CreatedEndpoint, EndpointSpec, Goal, HostConnections, HostEnd, KernelEvent, Mended,
    Outcome, Pass, PeerSpec, RetiredEndpoint, Underlay,
};
use super::{conntrack, dump, endpoint, inspect, localnet, sysctl};

/// The maximum number of operations in a batch.
const BATCH: usize = 256;

/// A request to the worker, with the channel for the reply.
#[derive(Debug)]
pub(super) enum Request {
    Dump(oneshot::Sender<Result<Dataplane>>),
    Reconcile(Box<Goal>, oneshot::Sender<Result<Pass>>),
    Apply(Vec<Op>, oneshot::Sender<Vec<Outcome>>),
    Create(Vec<Op>, Box<EndpointSpec>, oneshot::Sender<(Vec<Outcome>, Result<CreatedEndpoint>)>),
    Inspect(Netns, String, oneshot::Sender<Result<Option<Inside>>>),
    Delete(Vec<Device>, oneshot::Sender<Result<()>>),
    Underlay(IpAddr, Vec<IpAddr>, oneshot::Sender<Result<Underlay>>),
    Announce(Vec<(Device, IpAddr)>, oneshot::Sender<()>),
    OutputInterface(IpAddr, oneshot::Sender<Result<Option<u32>>>),
    Prefixes(oneshot::Sender<Result<Vec<IpNet>>>),
    HostConnections(oneshot::Sender<Result<HostConnections>>),
    RemoveFilter(oneshot::Sender<Result<()>>),
    Retire(Vec<RetiredEndpoint>, Vec<Op>, oneshot::Sender<(Vec<Outcome>, Result<()>)>),
    Mend(Netns, Vec<PeerSpec>, oneshot::Sender<Result<Vec<Mended>>>),
    Sweep(oneshot::Sender<Result<()>>),
    Counts(Table, Vec<String>, oneshot::Sender<Result<Vec<Vec<CountedElement>>>>),
    Timed(Table, String, oneshot::Sender<Result<Vec<TimedElement>>>),
    ChangeTimed(Table, Vec<TimedChange>, oneshot::Sender<Result<()>>),
    OpenFastPath(oneshot::Sender<Result<bool>>),
    FastCounters(oneshot::Sender<Option<FastCounters>>),
    Traffic(oneshot::Sender<Result<BTreeMap<Device, Traffic>>>),
    Groups(oneshot::Sender<BTreeMap<Device, BTreeSet<IpAddr>>>),
    AskForMembers(Vec<Device>, oneshot::Sender<()>),
    HasWireguard(oneshot::Sender<bool>),
    LearnKey(PrivateKey, oneshot::Sender<()>),
    Tunnels(oneshot::Sender<Result<Vec<TunnelStatus>>>),
}

#[derive(Debug)]
pub(super) struct Worker {
    route: Route,
    monitor: Monitor,
    peer_monitor: PeerMonitor,
    watch: Watch,
    filter: Filter,
    tables: Tables,
    known: KernelModel,
    netns_worker: NetnsWorker,
    sweeper: Sweeper,
    tunnels: Tunnels,
    fast: FastPath,
    announcer: Announcer,
    event_queue: EventQueue,
}

impl Worker {
    /// Opens the sockets in the network namespace of the calling thread, and takes a first dump.
    pub(super) fn new(event_queue: EventQueue, tunnels: Tunnels) -> Result<Self> {
        // Subscribe before the dump, so that no change is missed between them.
        let monitor = Monitor::open()?;
        let peer_monitor = PeerMonitor::open();
        let tables = Tables::open()?;
        let watch = Watch::new(vec![tables.port()]);
        let filter = Filter::default();
        let mut route = Route::open()?;
        let mut known = KernelModel::default();
        let (kernel, names) = dump::kernel(&mut route)?;
        let sweeper = Sweeper::start()?;
        sweeper.doom(names.doomed.iter().copied());
        known.load(kernel, names, PortGroups::dump(&mut route)?);
        Ok(Self {
            route,
            monitor,
            peer_monitor,
            watch,
            filter,
            tables,
            known,
            netns_worker: NetnsWorker::default(),
            sweeper,
            tunnels,
            fast: FastPath::new(Attachment::of_kernel()),
            announcer: Announcer::open()?,
            event_queue,
        })
    }

    /// Serves requests and notifications until all senders of requests are dropped.
    pub(super) fn run(mut self, requests: &Receiver<Request>, mut wake: UnixStream) {
        let mut waiting = None;
        loop {
            let again = self.event_queue.flush();
            let fds = [
                Some(wake.as_raw_fd()),
                Some(self.monitor.descriptor()),
                self.watch.descriptor(),
                self.peer_monitor.descriptor(),
            ];
            let Ok([_, changes, nftables, peers]) = super::sys::poll(fds, again) else { return };
            let mut bytes = [0; 64];
            while wake.read(&mut bytes).is_ok_and(|length| length == bytes.len()) {}
            loop {
                match waiting.take().map_or_else(|| requests.try_recv(), Ok) {
                    Ok(request) => waiting = self.serve(request, requests),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if changes || peers {
                self.listen();
            }
            if nftables {
                self.listen_to_tables();
            }
        }
    }

    /// Serves a request. Returns the next request if it was taken from the queue and is of another kind.
    fn serve(&mut self, request: Request, requests: &Receiver<Request>) -> Option<Request> {
        self.sweeper.note_work();
        // The requester may have been cancelled, so errors of `reply.send` are ignored.
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
                let job = move |route: &mut Route| inspect::inspect(route, &ifname);
                let _ = reply.send(self.netns_worker.run_in(netns.fd, job));
            }
            Request::Delete(devices, reply) => return self.delete(devices, reply, requests),
            Request::Underlay(vtep, peers, reply) => {
                let _ = reply.send(dump::underlay(&mut self.route, vtep, &peers));
            }
            Request::Announce(addresses, reply) => {
                self.announcer.announce_at(&mut self.route, &addresses);
                let _ = reply.send(());
            }
            Request::OutputInterface(address, reply) => {
                let _ = reply.send(dump::output_interface(&mut self.route, address));
            }
            Request::Prefixes(reply) => {
                let _ = reply.send(dump::prefixes(&mut self.route));
            }
            Request::HostConnections(reply) => {
                let _ = reply.send(dump::host_connections(&mut self.route));
            }
            Request::Retire(retired, ops, reply) => {
                let _ = reply.send(self.retire(retired, ops));
                self.listen();
            }
            Request::Mend(netns, specs, reply) => {
                let mended = endpoint::mend(&mut self.route, &mut self.netns_worker, netns, specs);
                let _ = reply.send(mended);
            }
            Request::Sweep(reply) => self.sweeper.sweep_all(reply),
            Request::Counts(table, sets, reply) => {
                let _ = reply.send(self.tables.counts(table, &sets));
            }
            Request::Timed(table, prefix, reply) => {
                let _ = reply.send(self.tables.timed(table, &prefix));
            }
            Request::ChangeTimed(table, changes, reply) => {
                let _ = reply.send(self.tables.change_timed(table, &changes));
                self.listen_to_tables();
            }
            Request::Traffic(reply) => {
                let _ = reply.send(self.traffic());
            }
            Request::OpenFastPath(reply) => {
                let _ = reply.send(self.fast.adopt());
            }
            Request::FastCounters(reply) => {
                let _ = reply.send(self.fast.counters());
            }
            Request::Groups(reply) => {
                let _ = reply.send(self.known.groups());
            }
            Request::AskForMembers(endpoints, reply) => {
                let ports = self.known.indexes(&endpoints);
                ports.into_iter().for_each(|port| self.announcer.ask_for_members(port));
                let _ = reply.send(());
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

    /// Reads rtnetlink notifications, and queues events for changes by other programs.
    fn listen(&mut self) {
        if self.monitor.drain(&mut self.known) {
            self.event_queue.add(KernelEvent::Overrun);
        }
        self.peer_monitor.drain(&mut self.known);
        let changes = self.known.changes();
        self.event_queue.add_gone(changes.gone);
        if changes.changed {
            self.event_queue.add(KernelEvent::Changed);
        }
        if changes.underlay {
            self.event_queue.add(KernelEvent::Underlay);
        }
        changes.peers.into_iter().for_each(|device| self.event_queue.add(KernelEvent::PeerChanged(device)));
        if changes.groups {
            self.event_queue.add(KernelEvent::Groups);
        }
    }

    /// Reads nftables notifications, and queues an event for changes by other programs. Notifications of changes by
    /// ovld are read too, so that they do not fill the buffer.
    fn listen_to_tables(&mut self) {
        self.watch.drain(0);
        let filter = self.watch.take_filter();
        let tables = self.watch.take_tables();
        if filter {
            self.filter.touched();
        }
        self.tables.touched(&tables);
        if filter || !tables.is_empty() {
            self.event_queue.add(KernelEvent::FilterChanged);
        }
    }

    /// Deletes all nftables tables of ovl.
    fn remove_tables(&mut self) -> Result<()> {
        self.tunnels.remove()?;
        self.filter.remove(&mut self.watch)?;
        Table::ALL.into_iter().try_for_each(|table| self.tables.remove(table))
    }

    /// Dumps the actual data plane. `wanted` names the sets to read from nftables tables that this process did not
    /// write.
    fn dump(&mut self, wanted: &BTreeMap<Table, Arc<Skeleton>>) -> Result<Dataplane> {
        self.listen();
        let (mut kernel, names) = dump::kernel(&mut self.route)?;
        self.sweeper.doom(names.doomed.iter().copied());
        self.tunnels.fill(&mut kernel)?;
        kernel.fast = self.fast.dump(&names);
        self.known.load(kernel.clone(), names, PortGroups::dump(&mut self.route)?);
        self.listen();
        self.listen_to_tables();
        kernel.filter = self.filter.current()?;
        (kernel.tables, kernel.elements) = self.tables.dump(wanted)?;
        Ok(kernel)
    }

    /// Reads what passed the host interfaces of all endpoints, by the stack or by the fast path.
    fn traffic(&mut self) -> Result<BTreeMap<Device, Traffic>> {
        let mut traffic = dump::traffic(&mut self.route)?;
        self.fast.add_delivered(self.known.devices(), &mut traffic);
        Ok(traffic)
    }

    fn reconcile(&mut self, goal: &Goal) -> Result<Pass> {
        let (ops, lost) = compare(self.dump(&goal.desired.tables)?, goal);
        let outcomes = if goal.apply {
            // What packets met before a repair is not known.
            let repairs_policies = ops.iter().any(Op::is_policy);
            let outcomes = self.apply(ops, &mut Devices::default());
            if repairs_policies {
                self.fast.judge_again();
            }
            outcomes
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

    /// Applies operations in batches of one kind. Some notifications about them may still have to be read afterwards.
    fn carry_out(&mut self, ops: Vec<Op>, devices: &mut Devices) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut peers = Vec::new();
        self.tunnels.expect(&ops);
        let mut written = self.write_tables(&ops);
        let mut ops = ops.into_iter().peekable();
        while let Some(op) = ops.next() {
            let mut run = vec![op];
            let is_entry = |op: &Op| op.is_entry() && !self.tunnels.takes(op);
            let elements = run.first().is_some_and(Op::is_element);
            let flows = run.first().is_some_and(|op| matches!(op, Op::EndFlows(_)));
            let same = |first: &Op, next: &Op| {
                (is_entry(first) && is_entry(next))
                    || (elements && next.is_element())
                    || (flows && matches!(next, Op::EndFlows(_)))
                    || (self.tunnels.is_source(first) && self.tunnels.is_source(next))
                    || matches!((first, next), (Op::Link(LinkOp::Delete(_)), Op::Link(LinkOp::Delete(_))))
            };
            while (elements || flows || run.len() < BATCH)
                && let Some(op) = ops.next_if(|next| run.first().is_some_and(|first| same(first, next)))
            {
                run.push(op);
            }
            let results = self.run_of(&run, devices, &mut peers, &mut written);
            if run.iter().any(Op::judges_again) {
                self.fast.judge_again();
            }
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

    /// Writes all tables of nftables that no earlier operation is about, in one run of `nft`, and returns the results. The
    /// first endpoint of a host needs three, and each run takes 4 to 6 ms.
    fn write_tables(&mut self, ops: &[Op]) -> BTreeMap<Table, Result<()>> {
        let mut seen = BTreeSet::new();
        let mut tables = Vec::new();
        for op in ops {
            let Some(table) = op.table() else { continue };
            if seen.insert(table)
                && let Op::Nft(NftOp::SetTable(_, skeleton)) = op
            {
                tables.push((table, skeleton));
            }
        }
        let results = self.tables.write_all(&tables, &mut self.watch);
        tables.into_iter().map(|(table, _)| table).zip(results).collect()
    }

    /// Applies operations of one kind. Adds the MTUs that peer interfaces still need to `peers`. `written` has the results for
    /// tables that were written already.
    fn run_of(
        &mut self,
        run: &[Op],
        devices: &mut Devices,
        peers: &mut Vec<PeerMtu>,
        written: &mut BTreeMap<Table, Result<()>>,
    ) -> Vec<Result<()>> {
        let route = &mut self.route;
        let for_all = |results: Result<Vec<Result<()>>>| {
            results.unwrap_or_else(|error| run.iter().map(|_| Err(error.clone())).collect())
        };
        let one = match run {
            [first, ..] if first.is_element() => return self.tables.apply(run),
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
            [Op::Link(LinkOp::Delete(_)), ..] => {
                let doomed: Vec<Device> = run.iter().filter_map(Op::device).collect();
                doomed.iter().for_each(|device| self.tunnels.delete(*device));
                return for_all(apply::delete(route, devices, &doomed));
            }
            [Op::Sysctl(SysctlOp::Set { name, value })] => sysctl::write(name, value),
            [Op::Sysctl(SysctlOp::AllowLocalnet(device))] => localnet::allow(route, *device),
            [Op::Sysctl(SysctlOp::ForbidLocalnet(device))] => localnet::forbid(route, *device),
            [Op::Fast(op)] => self.fast.apply(route, devices, op),
            [op @ Op::Announced(AnnouncedOp::Add(device, address))] => {
                apply::announced(route, op, *device, *address, true)
            }
            [op @ Op::Announced(AnnouncedOp::Delete(device, address))] => {
                apply::announced(route, op, *device, *address, false)
            }
            [Op::Nft(NftOp::DeleteBase)] => self.filter.remove(&mut self.watch),
            [Op::Nft(NftOp::SetBase(text))] => self.filter.replace(text, &mut self.watch),
            [Op::Nft(NftOp::DeleteTable(table))] => self.tables.remove(*table),
            [Op::Nft(NftOp::SetTable(table, skeleton))] => {
                let done = written.remove(table);
                done.unwrap_or_else(|| self.tables.write(*table, skeleton, Some(&mut self.watch)))
            }
            [op @ Op::Link(LinkOp::Add(device, link))] => {
                let guarded = match link {
                    Link::Vxlan { vni, sealed: true, .. } => self.tunnels.guard(*device, *vni),
                    _ => Ok(()),
                };
                guarded.and_then(|()| apply::add_link(route, devices, &mut self.tunnels, op, *device, link))
            }
            [op @ Op::Link(LinkOp::Set(device, from, to))] => {
                apply::set_link(route, devices, op, *device, from, to).and_then(|located| {
                    let Some(mtu) = apply::peer_mtu(*device, from, to) else { return Ok(()) };
                    let peer = located.peer.zip(located.peer_netns);
                    let (index, netns) = peer.ok_or_else(|| {
                        KernelError::Other(format!(
                            "cannot set the MTU of the peer interface of {device}: it is unknown"
                        ))
                    })?;
                    peers.push(PeerMtu { device: *device, index, netns, mtu });
                    Ok(())
                })
            }
            _ => return for_all(apply::entries(route, devices, run)),
        };
        vec![one]
    }

    /// Sets the MTUs of peer interfaces, namespace by namespace. A failure replaces the result of the operation.
    fn set_peers(&mut self, peers: Vec<PeerMtu>, outcomes: &mut [Outcome]) {
        if peers.is_empty() {
            return;
        }
        let mut by_netns: BTreeMap<i32, Vec<PeerMtu>> = BTreeMap::new();
        for peer in peers {
            by_netns.entry(peer.netns).or_default().push(peer);
        }
        let wanted: BTreeSet<i32> = by_netns.keys().copied().collect();
        let mut found = netns::by_id(&mut self.route, &wanted).unwrap_or_default();
        for (id, peers) in by_netns {
            let results = match found.remove(&id) {
                Some(netns) => {
                    let mtus = peers.iter().map(|peer| (peer.index, peer.mtu)).collect();
                    endpoint::set_peer_mtu(&mut self.netns_worker, netns, mtus)
                }
                None => Err(KernelError::Other(
                    "cannot set the MTU in a namespace that has neither a name nor a process".to_owned(),
                )),
            };
            let results = results.unwrap_or_else(|error| peers.iter().map(|_| Err(error.clone())).collect());
            for (peer, result) in peers.iter().zip(results) {
                let Err(error) = result else { continue };
                let of_peer = |outcome: &&mut Outcome| {
                    outcome.result.is_ok()
                        && matches!(outcome.op, Op::Link(LinkOp::Set(device, ..)) if device == peer.device)
                };
                if let Some(outcome) = outcomes.iter_mut().find(of_peer) {
                    outcome.result = Err(error);
                }
            }
        }
    }

    fn create(&mut self, ops: Vec<Op>, spec: EndpointSpec) -> (Vec<Outcome>, Result<CreatedEndpoint>) {
        let (device, mac) = (spec.device, spec.mac);
        let (after, before): (Vec<Op>, Vec<Op>) =
            ops.into_iter().partition(|op| op.device() == Some(device) || publishes(op));
        let mut devices = Devices::default();
        // One lookup for both devices. An error is returned when the device is used.
        let bridge = match spec.host_end {
            HostEnd::Port(bridge, _) => Some(bridge),
            HostEnd::Routed { .. } => None,
        };
        let _ = devices.find(&mut self.route, bridge.into_iter().chain([device]));
        let mut outcomes = self.carry_out(before, &mut devices);
        let created =
            endpoint::create(&mut self.route, &mut devices, &mut self.netns_worker, &self.sweeper, spec);
        let result = match created {
            Ok(created) => {
                // What the creation itself did in the namespace is no news.
                self.peer_monitor.drain(&mut self.known);
                self.known.created(created.index, device, created.link);
                self.known.peer_is(device, true, mac);
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

    fn retire(&mut self, retired: Vec<RetiredEndpoint>, ops: Vec<Op>) -> (Vec<Outcome>, Result<()>) {
        let mut all = Ok(());
        for one in retired {
            let device = one.device;
            match sweep::retire(&mut self.route, &mut self.netns_worker, &self.sweeper, one) {
                Ok(()) => self.known.deleted(device),
                Err(error) => all = Err(error),
            }
        }
        (self.carry_out(ops, &mut Devices::default()), all)
    }

    /// Deletes devices, together with those of all `Delete` requests that follow in the queue: deleting many takes as
    /// long as deleting one. Returns the next request of another kind.
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
            // Take one result per requested device, even after a failure.
            let its: Vec<Result<()>> = results.by_ref().take(devices.len()).collect();
            let _ = reply.send(its.into_iter().collect());
        }
        other
    }
}

/// Returns the operations that lead from a dump to the desired data plane, and the endpoints whose host interfaces are
/// missing.
pub(super) fn compare(mut actual: Dataplane, goal: &Goal) -> (Vec<Op>, Vec<Device>) {
    actual.links.retain(|device, _| !goal.ignored.contains(device));
    actual.ports.retain(|(device, _)| !goal.ignored.contains(device));
    actual.routes.retain(|_, hop| hop.device.is_none_or(|device| !goal.ignored.contains(&device)));
    actual.neighbours.retain(|key, _| !goal.ignored.contains(&key.0) && !goal.expected.contains(key));
    // Other programs, such as the CNI plugin portmap, set route_localnet on devices too. ovl does not reset it there.
    actual.localnets.retain(|device| goal.desired.localnets.contains(device));
    actual.fast.pods.retain(|_, pod| !goal.ignored.contains(&pod.device));
    actual.fast.hooks.retain(|device| !goal.ignored.contains(device));
    let ops = diff(&actual, &goal.desired, goal.prune);
    let lost = lost_endpoints(&actual, &goal.desired).collect();
    (ops, lost)
}

/// Whether an operation publishes a port, withdraws one, or ends its old flows.
pub(super) fn publishes(op: &Op) -> bool {
    match op {
        Op::Nft(op) => op.is_element() && op.table() == Some(Table::Publish),
        Op::EndFlows(_) => true,
        Op::Link(_)
        | Op::Address(_)
        | Op::Announced(_)
        | Op::Fdb(_)
        | Op::Neighbour(_)
        | Op::Route(_)
        | Op::Wireguard(_)
        | Op::Source(_)
        | Op::Sysctl(_)
        | Op::Fast(_) => false,
    }
}

/// The peer interface of an endpoint whose MTU changes.
#[derive(Debug)]
struct PeerMtu {
    device: Device,
    index: u32,
    netns: i32,
    mtu: u16,
}
