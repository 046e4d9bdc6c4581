//! The kernel: the only code of ovl that speaks netlink, runs `nft` and writes sysctls.
//!
//! One thread owns the sockets and does all work in order. It also watches what others do to our
//! objects: it keeps what it believes the kernel holds ([`known`]), and reports a notification only
//! where it disagrees with that. So what ovld itself changes causes no event, whatever port id the
//! kernel writes into the message (for most of them it writes none).

#![warn(missing_docs)]

mod announce;
mod apply;
mod attribute;
mod conntrack;
mod dump;
mod endpoint;
mod error;
mod fact;
mod filter;
mod foreign;
mod inspect;
mod known;
mod link;
mod message;
mod monitor;
mod netns;
mod nftables;
mod outbox;
mod probe;
mod resolver;
mod sandbox;
mod simulated;
mod socket;
mod sources;
mod sweep;
mod sys;
mod sysctl;
mod tables;
#[cfg(test)]
mod tests;
mod tunnel;
mod watch;
mod wireguard;
mod worker;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc as queue};

use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::Table;
use ovl_dataplane::observed::Inside;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::Mac;
use ovl_tunnel::PrivateKey;
use tokio::sync::{mpsc, oneshot};

use self::outbox::Outbox;
use self::tunnel::Tunnels;
use self::worker::{Request, Worker};

pub use apply::has_inet6;
pub use error::{KernelError, Result};
pub use foreign::{look as foreign_firewalls, run_all};
pub use message::port_mac;
pub use netns::{Netns, open_netns};
pub use probe::{Probe, Prober};
pub use resolver::Resolver;
pub use sandbox::{
    Cookie, Held, Place, Process, look_at, mount_netns, netns_file, new_netns, own_netns, processes_in,
    unmount_netns,
};
pub use simulated::SimulatedKernel;
pub use sys::own_addresses;
pub use tunnel::{TunnelPeerStatus, TunnelStatus};

/// What happened in the kernel that ovld did not do itself. At most one of each kind waits in the
/// channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEvent {
    /// Somebody else changed something of ours: dump again.
    Changed,
    /// The host's end of an endpoint was deleted by somebody else, or its namespace is gone.
    EndpointGone(Device),
    /// An address, the MTU or the state of a device that is not ours changed.
    Underlay,
    /// Notifications were lost: dump again.
    Overrun,
    /// Somebody else changed one of our nftables tables.
    FilterChanged,
}

/// An endpoint's pair of interfaces.
#[derive(Debug)]
pub struct EndpointSpec {
    /// The host's end.
    pub device: Device,
    /// For the alias of the host's end: `ovl endpoint NAME`.
    pub name: String,
    /// Where the other end goes; closed when the work is done, for it keeps the namespace alive.
    /// Nothing: it stays here, down and without addresses, until somebody fetches and sets it up.
    pub netns: Option<Netns>,
    /// The name of the other end; without one, the first free `ethN`.
    pub ifname: Option<String>,
    /// Of the other end.
    pub mac: Mac,
    /// Of both ends.
    pub mtu: u16,
    /// What the host's end becomes.
    pub host_end: HostEnd,
    /// Of the other end.
    pub addresses: Vec<IpNet>,
    /// Default routes; one is only set if the namespace has no default route of its family.
    pub gateways: Vec<IpAddr>,
    /// If ways to the resolver are to be made.
    pub resolver: Option<Resolver>,
}

/// What the host's end of a pair becomes.
#[derive(Debug, Clone)]
pub enum HostEnd {
    /// A port of this bridge; whether frames may leave by it that came in by it.
    Port(Device, bool),
    /// The next hop of the other end.
    Routed {
        /// Its MAC address.
        mac: Mac,
        /// Each gateway that it stands for, and what is reached through it beside the default.
        routes: Vec<(IpAddr, IpNet)>,
    },
}

/// An endpoint that was made.
#[derive(Debug)]
pub struct Made {
    /// The name of the other end.
    pub ifname: String,
    /// Of both ends, in bytes.
    pub mtu: u16,
    /// Of the default routes that were set.
    pub gateways: Vec<IpAddr>,
}

/// An endpoint that goes.
#[derive(Debug)]
pub struct Retired {
    /// The host's end.
    pub device: Device,
    /// Where the other end is.
    pub other: Other,
}

/// Where the other end of an endpoint's pair is.
#[derive(Debug)]
pub enum Other {
    /// In this namespace.
    In(Netns),
    /// Nobody knows, and a detach takes longer. So it does if it is not where it should be.
    Lost,
    /// Whoever fetched it brings it back under a name that is in nobody's way.
    Fetched,
}

/// An element of a set that packets add to, with its counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// As the kernel has it.
    pub key: Box<[u8]>,
    /// Packets.
    pub packets: u64,
    /// After so many milliseconds without one it is forgotten.
    pub left_ms: Option<u64>,
}

/// What became of one operation.
#[derive(Debug)]
pub struct Outcome {
    /// As it was asked for.
    pub op: Op,
    /// How it ended.
    pub result: Result<()>,
}

/// What should be, to be compared with what is.
#[derive(Debug)]
pub struct Goal {
    /// All of ours that should be in the kernel.
    pub desired: Dataplane,
    /// Whether what should not be there may be removed.
    pub prune: bool,
    /// Devices that are left alone, with all that hangs on them: they are being made.
    pub ignored: BTreeSet<Device>,
    /// Neighbours on bridges that come with such devices.
    pub expected: BTreeSet<(Device, IpAddr)>,
    /// Whether the difference is applied, or only told.
    pub apply: bool,
}

/// What a comparison of everything with a dump found.
#[derive(Debug)]
pub struct Pass {
    /// The difference, and what became of each operation; all well if none was applied.
    pub outcomes: Vec<Outcome>,
    /// Endpoints whose host's ends are missing.
    pub lost: Vec<Device>,
}

/// The device that has an address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub device: String,
    /// Its index.
    pub index: u32,
    /// Its MTU.
    pub mtu: u16,
    /// The address and its prefix.
    pub prefix: IpNet,
}

/// Starts the worker, in the network namespace of the calling thread; with the private keys that ends of the
/// tunnel may get.
pub fn start(events: mpsc::Sender<KernelEvent>, tunnel_keys: Vec<PrivateKey>) -> Result<KernelHandle> {
    let error = |error| KernelError::io("cannot start the thread that talks to the kernel", &error);
    let (bell, wake) = UnixStream::pair().map_err(error)?;
    // A full socket means that the worker has enough to wake up for.
    bell.set_nonblocking(true).map_err(error)?;
    wake.set_nonblocking(true).map_err(error)?;
    let worker = Worker::new(Outbox::new(events), Tunnels::new(tunnel_keys))?;
    let (requests, queue) = queue::channel();
    std::thread::Builder::new()
        .name("kernel".to_owned())
        .spawn(move || worker.run(&queue, wake))
        .map_err(error)?;
    Ok(KernelHandle(Arc::new(Way::Thread { requests, bell })))
}

/// A setting under `net.`, by its name with dots, in the network namespace of the calling thread.
pub fn setting(name: &str) -> Option<String> {
    sysctl::read(name)
}

/// The way to the worker. It ends with the last handle.
#[derive(Debug, Clone)]
pub struct KernelHandle(Arc<Way>);

#[derive(Debug)]
enum Way {
    // The queue is dropped before the bell: hearing that, the worker finds the queue closed.
    Thread { requests: queue::Sender<Request>, bell: UnixStream },
    Simulated(mpsc::UnboundedSender<Request>),
}

impl KernelHandle {
    /// Opens the network namespace of a workload, as [`open_netns`] does.
    pub fn open_netns(&self, path: &Path) -> Result<Netns> {
        match &*self.0 {
            Way::Thread { .. } => open_netns(path),
            Way::Simulated(_) => simulated::netns(path),
        }
    }

    /// All of ours that is in the kernel.
    pub async fn dump(&self) -> Result<Dataplane> {
        self.ask(Request::Dump).await?
    }

    /// Dumps, compares and applies in one go, so that nothing handed in later comes between.
    pub async fn reconcile(&self, goal: Goal) -> Result<Pass> {
        self.ask(|reply| Request::Reconcile(Box::new(goal), reply)).await?
    }

    /// Does all of them in order, whatever becomes of each.
    pub async fn apply(&self, ops: Vec<Op>) -> Vec<Outcome> {
        // For the answer where there is no worker to give one.
        let asked = ops.clone();
        self.ask(|reply| Request::Apply(ops, reply)).await.unwrap_or_else(|error| failed(asked, &error))
    }

    /// Makes an endpoint's pair, all or nothing. Operations on
    /// the pair's device are done after that, and not at all if it failed; all others before.
    pub async fn prepare_and_create(&self, ops: Vec<Op>, spec: EndpointSpec) -> (Vec<Outcome>, Result<Made>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Create(ops, Box::new(spec), reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// What an interface in that namespace is like; nothing if it is not there.
    pub async fn inspect(&self, netns: Netns, ifname: String) -> Result<Option<Inside>> {
        self.ask(|reply| Request::Inspect(netns, ifname, reply)).await?
    }

    /// Takes endpoints away and does these operations after that. The names of their other ends are free
    /// and nothing passes any more when this returns; the pairs are deleted later.
    pub async fn retire(&self, retired: Vec<Retired>, ops: Vec<Op>) -> (Vec<Outcome>, Result<()>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Retire(retired, ops, reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// Deletes what is left of endpoints that were taken away.
    pub async fn sweep(&self) -> Result<()> {
        self.ask(Request::Sweep).await?
    }

    /// Deletes devices of ours; what is gone already is fine.
    pub async fn delete_links(&self, devices: Vec<Device>) -> Result<()> {
        self.ask(|reply| Request::Delete(devices, reply)).await?
    }

    /// The device that has this address.
    pub async fn underlay(&self, vtep: IpAddr) -> Result<Underlay> {
        self.ask(|reply| Request::Underlay(vtep, reply)).await?
    }

    /// Tells the links of these devices once more that this host has an address.
    pub async fn announce(&self, addresses: Vec<(Device, IpAddr)>) -> Result<()> {
        self.ask(|reply| Request::Announce(addresses, reply)).await
    }

    /// The index of the device by which packets to an address leave; nothing if there is no way.
    pub async fn way_to(&self, address: IpAddr) -> Result<Option<u32>> {
        self.ask(|reply| Request::WayTo(address, reply)).await?
    }

    /// The prefixes that this host has addresses in or routes to, our own devices' aside: a new
    /// network's subnet should collide with none.
    pub async fn prefixes(&self) -> Result<Vec<IpNet>> {
        self.ask(Request::Prefixes).await?
    }

    /// What sets of a table count that packets add to; nothing where there is no such set.
    pub async fn counts(&self, table: Table, sets: Vec<String>) -> Result<Vec<Vec<Counted>>> {
        self.ask(|reply| Request::Counts(table, sets, reply)).await?
    }

    /// How many packets a counter of a table has seen.
    pub async fn counter(&self, table: Table, name: &'static str) -> Result<u64> {
        self.ask(|reply| Request::Counter(table, name, reply)).await?
    }

    /// Whether the kernel makes WireGuard devices.
    pub async fn has_wireguard(&self) -> Result<bool> {
        self.ask(Request::HasWireguard).await
    }

    /// Takes another private key that an end of the tunnel may get.
    pub async fn learn_key(&self, key: PrivateKey) -> Result<()> {
        self.ask(|reply| Request::LearnKey(key, reply)).await
    }

    /// How the ends of the tunnel do.
    pub async fn tunnels(&self) -> Result<Vec<TunnelStatus>> {
        self.ask(Request::Tunnels).await?
    }

    /// Removes our nftables tables, for a teardown.
    pub async fn remove_filter(&self) -> Result<()> {
        self.ask(Request::RemoveFilter).await?
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        match &*self.0 {
            Way::Thread { requests, bell } => {
                requests.send(request(reply)).map_err(|_| KernelError::Stopped)?;
                let _ = (&mut &*bell).write(&[0]);
            }
            Way::Simulated(requests) => requests.send(request(reply)).map_err(|_| KernelError::Stopped)?,
        }
        answer.await.map_err(|_| KernelError::Stopped)
    }
}

fn failed(ops: Vec<Op>, error: &KernelError) -> Vec<Outcome> {
    ops.into_iter().map(|op| Outcome { op, result: Err(error.clone()) }).collect()
}
