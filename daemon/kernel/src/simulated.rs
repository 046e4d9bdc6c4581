//! A kernel in memory, for tests that run many daemons in one process without root.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::{Hash as _, Hasher as _};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ovl_dataplane::device::Device;
use ovl_dataplane::op::{
    AddressOp, FdbOp, LinkOp, NeighbourOp, NftOp, Op, RouteOp, SourceOp, SysctlOp, WireguardOp,
};
use ovl_dataplane::state::{Dataplane, Link};
use tokio::sync::mpsc;

use super::worker::{Request, compare, publishes};
use super::{
    Channel, CreatedEndpoint, EndpointSpec, HostConnections, HostEnd, KernelError, KernelEvent, KernelHandle,
    Netns, Outcome, Pass, Result, Underlay,
};

/// The kernel of one simulated host. It outlives the daemons that are started on it. Clones share it.
#[derive(Debug, Clone)]
pub struct SimulatedKernel(Arc<Mutex<Held>>);

#[derive(Debug)]
struct Held {
    dataplane: Dataplane,
    underlay: Underlay,
    /// Counts the daemons that were started. Requests of earlier ones are discarded.
    run: u64,
    events: Option<mpsc::Sender<KernelEvent>>,
}

impl SimulatedKernel {
    /// A kernel that holds nothing but this underlay device.
    pub fn new(underlay: Underlay) -> Self {
        Self(Arc::new(Mutex::new(Held { dataplane: Dataplane::default(), underlay, run: 0, events: None })))
    }

    /// Serves a daemon, which gets each answer after `latency`. Must be called within a tokio runtime.
    pub fn start(&self, events: mpsc::Sender<KernelEvent>, latency: Duration) -> KernelHandle {
        let run = {
            let mut held = self.lock();
            held.run += 1;
            held.events = Some(events);
            held.run
        };
        let (requests, mut queue) = mpsc::unbounded_channel();
        let kernel = self.clone();
        tokio::spawn(async move {
            while let Some(request) = queue.recv().await {
                tokio::time::sleep(latency).await;
                let mut held = kernel.lock();
                if held.run != run {
                    return;
                }
                held.serve(request);
            }
        });
        KernelHandle(Arc::new(Channel::Simulated(requests)))
    }

    /// Discards the requests that the daemon has in flight: its process was killed.
    pub fn halt(&self) {
        let mut held = self.lock();
        held.run += 1;
        held.events = None;
    }

    /// Drops everything that it holds, as a reboot does. No daemon may be running.
    pub fn empty(&self) {
        self.lock().dataplane = Dataplane::default();
    }

    /// What it holds.
    pub fn dataplane(&self) -> Dataplane {
        self.lock().dataplane.clone()
    }

    /// Changes what it holds as another program would: the daemon is notified.
    pub fn interfere(&self, change: impl FnOnce(&mut Dataplane)) {
        let mut held = self.lock();
        change(&mut held.dataplane);
        if let Some(events) = &held.events {
            // A full channel already holds one.
            let _ = events.try_send(KernelEvent::Changed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stand-in for the network namespace with this name. It names no namespace of this host.
pub(super) fn netns(path: &Path) -> Result<Netns> {
    let file = File::open("/dev/null").map_err(|error| KernelError::io("cannot open /dev/null", &error))?;
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    Ok(Netns { fd: file.into(), inode: hasher.finish() })
}

impl Held {
    /// The receiver of an answer may be gone: then it is discarded.
    fn serve(&mut self, request: Request) {
        match request {
            Request::Dump(reply) => drop(reply.send(Ok(self.dataplane.clone()))),
            Request::Reconcile(goal, reply) => {
                let (ops, lost) = compare(self.dataplane.clone(), &goal);
                let outcomes = if goal.apply {
                    self.carry_out(ops)
                } else {
                    ops.into_iter().map(|op| Outcome { op, result: Ok(()) }).collect()
                };
                drop(reply.send(Ok(Pass { outcomes, lost })));
            }
            Request::Apply(ops, reply) => drop(reply.send(self.carry_out(ops))),
            Request::Create(ops, spec, reply) => drop(reply.send(self.create(ops, *spec))),
            Request::Inspect(_, _, reply) => drop(reply.send(Ok(None))),
            Request::Delete(devices, reply) => {
                devices.into_iter().for_each(|device| self.dataplane.forget_device(device));
                drop(reply.send(Ok(())));
            }
            Request::Underlay(vtep, _, reply) => drop(reply.send(self.underlay(vtep))),
            Request::Announce(_, reply) => drop(reply.send(())),
            Request::OutputInterface(_, reply) => drop(reply.send(Ok(Some(self.underlay.index)))),
            Request::Prefixes(reply) => drop(reply.send(Ok(vec![self.underlay.prefix.trunc()]))),
            Request::HostConnections(reply) => {
                let connected =
                    BTreeMap::from([(self.underlay.prefix.trunc(), self.underlay.device.clone())]);
                drop(reply.send(Ok(HostConnections { connected, ..HostConnections::default() })));
            }
            Request::RemoveFilter(reply) => {
                self.dataplane.filter = None;
                self.dataplane.tables.clear();
                self.dataplane.elements = Default::default();
                drop(reply.send(Ok(())));
            }
            Request::Retire(retired, ops, reply) => {
                retired.into_iter().for_each(|one| self.dataplane.forget_device(one.device));
                drop(reply.send((self.carry_out(ops), Ok(()))));
            }
            Request::Mend(_, _, reply) => drop(reply.send(Ok(Vec::new()))),
            Request::Sweep(reply) => drop(reply.send(Ok(()))),
            Request::Counts(_, sets, reply) => {
                drop(reply.send(Ok(sets.iter().map(|_| Vec::new()).collect())));
            }
            Request::Timed(_, _, reply) => drop(reply.send(Ok(Vec::new()))),
            Request::ChangeTimed(_, _, reply) => drop(reply.send(Ok(()))),
            Request::OpenFastPath(reply) => drop(reply.send(Ok(false))),
            Request::FastCounters(reply) => drop(reply.send(None)),
            Request::Traffic(reply) => drop(reply.send(Ok(BTreeMap::new()))),
            Request::Groups(reply) => drop(reply.send(BTreeMap::new())),
            Request::AskForMembers(_, reply) => drop(reply.send(())),
            Request::HasWireguard(reply) => drop(reply.send(true)),
            Request::LearnKey(_, reply) => drop(reply.send(())),
            Request::Tunnels(reply) => drop(reply.send(Ok(Vec::new()))),
        }
    }

    fn underlay(&self, vtep: IpAddr) -> Result<Underlay> {
        if self.underlay.prefix.addr() == vtep {
            Ok(self.underlay.clone())
        } else {
            Err(KernelError::Other(format!("no device has the address {vtep}")))
        }
    }

    fn create(&mut self, ops: Vec<Op>, spec: EndpointSpec) -> (Vec<Outcome>, Result<CreatedEndpoint>) {
        let device = spec.device;
        let (after, before): (Vec<Op>, Vec<Op>) =
            ops.into_iter().partition(|op| op.device() == Some(device) || publishes(op));
        let mut outcomes = self.carry_out(before);
        let (master, hairpin) = match spec.host_end {
            HostEnd::Port(bridge, hairpin) => (Some(bridge), hairpin),
            HostEnd::Routed { .. } => (None, false),
        };
        let link = Link::Endpoint { mtu: spec.mtu, master, up: true, tuned: master.is_some(), hairpin };
        let made =
            apply(&mut self.dataplane, &Op::Link(LinkOp::Add(device, link))).map(|()| CreatedEndpoint {
                ifname: spec.ifname.unwrap_or_else(|| "eth0".to_owned()),
                mtu: spec.mtu,
                gateways: spec.gateways,
            });
        match &made {
            Ok(_) => outcomes.extend(self.carry_out(after)),
            Err(error) => {
                outcomes.extend(after.into_iter().map(|op| Outcome { op, result: Err(error.clone()) }));
            }
        }
        (outcomes, made)
    }

    fn carry_out(&mut self, ops: Vec<Op>) -> Vec<Outcome> {
        let one = |op: Op| {
            let result = apply(&mut self.dataplane, &op);
            Outcome { op, result }
        };
        ops.into_iter().map(one).collect()
    }
}

/// Applies one operation as the kernel does, and refuses what the kernel refuses.
fn apply(kernel: &mut Dataplane, op: &Op) -> Result<()> {
    let present = |device: &Device| {
        if kernel.links.contains_key(device) { Ok(()) } else { Err(KernelError::NoDevice(*device)) }
    };
    match op {
        Op::Nft(NftOp::SetElement(element)) if !kernel.tables.contains_key(&element.set.table) => {
            return Err(KernelError::Other(format!("{op}: no such table")));
        }
        Op::Link(LinkOp::Add(device, link)) => {
            if let Link::Vxlan { master: Some(master), .. }
            | Link::Tap { master: Some(master), .. }
            | Link::Endpoint { master: Some(master), .. } = link
            {
                present(master)?;
            }
            // One that is there is taken as it is.
            if kernel.links.contains_key(device) {
                return Ok(());
            }
        }
        Op::Route(RouteOp::Set(_, hop)) => hop.device.iter().try_for_each(present)?,
        Op::Link(LinkOp::Set(..))
        | Op::Address(AddressOp::Add(..))
        | Op::Fdb(FdbOp::SetRemote(..) | FdbOp::AddFlood(..) | FdbOp::AddGroup(..) | FdbOp::AddPort(..))
        | Op::Neighbour(NeighbourOp::Set(..))
        | Op::Wireguard(WireguardOp::SetInterface(..) | WireguardOp::SetPeer(..))
        | Op::Source(SourceOp::Set(..))
        | Op::Sysctl(SysctlOp::AllowLocalnet(_)) => op.device().iter().try_for_each(present)?,
        // An announced address is on a device of the host, and a deletion of what is gone succeeds.
        _ => {}
    }
    op.apply_to(kernel);
    Ok(())
}
