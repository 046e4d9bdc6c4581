//! The kernel: the only module of ovld that speaks netlink, runs `nft` and writes sysctls.
//!
//! One thread owns the sockets and does all work in order. It also watches what others do to our
//! objects: it keeps what it believes the kernel holds ([`known`]), and reports a notification only
//! where it disagrees with that. So what ovld itself changes causes no event, whatever port id the
//! kernel writes into the message (for most of them it writes none).

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
use std::sync::{Arc, mpsc as queue};

use ipnet::IpNet;
use ovl_core::cni::Inside;
use ovl_core::device::Device;
use ovl_core::kernel::Kernel;
use ovl_core::nft::Table;
use ovl_core::op::Op;
use ovl_proto::id::Mac;
use ovl_tunnel::PrivateKey;
use tokio::sync::{mpsc, oneshot};

use self::outbox::Outbox;
use self::tunnel::Tunnels;
use self::worker::{Request, Worker};

pub(crate) use apply::has_inet6;
pub(crate) use error::{KernelError, Result};
pub(crate) use foreign::{look as foreign_firewalls, run_all};
pub(crate) use message::port_mac;
pub(crate) use netns::{Netns, open_netns};
pub(crate) use probe::Prober;
pub(crate) use resolver::Resolver;
pub(crate) use sandbox::{
    Cookie, Held, Place, Process, look_at, mount_netns, netns_file, new_netns, own_netns, processes_in,
    unmount_netns,
};
pub(crate) use sys::own_addresses;
pub(crate) use tunnel::{TunnelPeerStatus, TunnelStatus};

/// What happened in the kernel that ovld did not do itself. At most one of each kind waits in the
/// channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KernelEvent {
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
pub(crate) struct EndpointSpec {
    /// The host's end.
    pub(crate) device: Device,
    /// For the alias of the host's end: `ovl endpoint NAME`.
    pub(crate) name: String,
    /// Where the other end goes; closed when the work is done, for it keeps the namespace alive.
    /// Nothing: it stays here, down and without addresses, until somebody fetches and sets it up.
    pub(crate) netns: Option<Netns>,
    /// The name of the other end; without one, the first free `ethN`.
    pub(crate) ifname: Option<String>,
    /// Of the other end.
    pub(crate) mac: Mac,
    /// Of both ends.
    pub(crate) mtu: u16,
    /// What the host's end becomes.
    pub(crate) host_end: HostEnd,
    /// Of the other end.
    pub(crate) addresses: Vec<IpNet>,
    /// Default routes; one is only set if the namespace has no default route of its family.
    pub(crate) gateways: Vec<IpAddr>,
    /// If ways to the resolver are to be made.
    pub(crate) resolver: Option<Resolver>,
}

/// What the host's end of a pair becomes.
#[derive(Debug, Clone)]
pub(crate) enum HostEnd {
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
pub(crate) struct Made {
    /// The name of the other end.
    pub(crate) ifname: String,
    /// Of both ends, in bytes.
    pub(crate) mtu: u16,
    /// Of the default routes that were set.
    pub(crate) gateways: Vec<IpAddr>,
}

/// An endpoint that goes.
#[derive(Debug)]
pub(crate) struct Retired {
    /// The host's end.
    pub(crate) device: Device,
    /// Where the other end is.
    pub(crate) other: Other,
}

/// Where the other end of an endpoint's pair is.
#[derive(Debug)]
pub(crate) enum Other {
    /// In this namespace.
    In(Netns),
    /// Nobody knows, and a detach takes longer. So it does if it is not where it should be.
    Lost,
    /// Whoever fetched it brings it back under a name that is in nobody's way.
    Fetched,
}

/// An element of a set that packets add to, with its counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counted {
    /// As the kernel has it.
    pub(crate) key: Box<[u8]>,
    /// Packets.
    pub(crate) packets: u64,
    /// After so many milliseconds without one it is forgotten.
    pub(crate) left_ms: Option<u64>,
}

/// What became of one operation.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// As it was asked for.
    pub(crate) op: Op,
    /// How it ended.
    pub(crate) result: Result<()>,
}

/// What should be, to be compared with what is.
#[derive(Debug)]
pub(crate) struct Goal {
    /// All of ours that should be in the kernel.
    pub(crate) desired: Kernel,
    /// Whether what should not be there may be removed.
    pub(crate) prune: bool,
    /// Devices that are left alone, with all that hangs on them: they are being made.
    pub(crate) ignored: BTreeSet<Device>,
    /// Neighbours on bridges that come with such devices.
    pub(crate) expected: BTreeSet<(Device, IpAddr)>,
    /// Whether the difference is applied, or only told.
    pub(crate) apply: bool,
}

/// What a comparison of everything with a dump found.
#[derive(Debug)]
pub(crate) struct Pass {
    /// The difference, and what became of each operation; all well if none was applied.
    pub(crate) outcomes: Vec<Outcome>,
    /// Endpoints whose host's ends are missing.
    pub(crate) lost: Vec<Device>,
}

/// The device that has an address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Underlay {
    /// Its name.
    pub(crate) device: String,
    /// Its index.
    pub(crate) index: u32,
    /// Its MTU.
    pub(crate) mtu: u16,
    /// The address and its prefix.
    pub(crate) prefix: IpNet,
}

/// Starts the worker, in the network namespace of the calling thread; with the private keys that ends of the
/// tunnel may get.
pub(crate) fn start(events: mpsc::Sender<KernelEvent>, tunnel_keys: Vec<PrivateKey>) -> Result<KernelHandle> {
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
    Ok(KernelHandle(Arc::new(Way { requests, bell })))
}

/// A setting under `net.`, by its name with dots, in the network namespace of the calling thread.
pub(crate) fn setting(name: &str) -> Option<String> {
    sysctl::read(name)
}

/// The way to the worker. It ends with the last handle.
#[derive(Debug, Clone)]
pub(crate) struct KernelHandle(Arc<Way>);

// The queue is dropped before the bell: hearing that, the worker finds the queue closed.
#[derive(Debug)]
struct Way {
    requests: queue::Sender<Request>,
    bell: UnixStream,
}

impl KernelHandle {
    /// All of ours that is in the kernel.
    pub(crate) async fn dump(&self) -> Result<Kernel> {
        self.ask(Request::Dump).await?
    }

    /// Dumps, compares and applies in one go, so that nothing handed in later comes between.
    pub(crate) async fn reconcile(&self, goal: Goal) -> Result<Pass> {
        self.ask(|reply| Request::Reconcile(Box::new(goal), reply)).await?
    }

    /// Does all of them in order, whatever becomes of each.
    pub(crate) async fn apply(&self, ops: Vec<Op>) -> Vec<Outcome> {
        // For the answer where there is no worker to give one.
        let asked = ops.clone();
        self.ask(|reply| Request::Apply(ops, reply)).await.unwrap_or_else(|error| failed(asked, &error))
    }

    /// Makes an endpoint's pair, all or nothing. Operations on
    /// the pair's device are done after that, and not at all if it failed; all others before.
    pub(crate) async fn prepare_and_create(
        &self,
        ops: Vec<Op>,
        spec: EndpointSpec,
    ) -> (Vec<Outcome>, Result<Made>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Create(ops, Box::new(spec), reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// What an interface in that namespace is like; nothing if it is not there.
    pub(crate) async fn inspect(&self, netns: Netns, ifname: String) -> Result<Option<Inside>> {
        self.ask(|reply| Request::Inspect(netns, ifname, reply)).await?
    }

    /// Takes endpoints away and does these operations after that. The names of their other ends are free
    /// and nothing passes any more when this returns; the pairs are deleted later.
    pub(crate) async fn retire(&self, retired: Vec<Retired>, ops: Vec<Op>) -> (Vec<Outcome>, Result<()>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Retire(retired, ops, reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// Deletes what is left of endpoints that were taken away.
    pub(crate) async fn sweep(&self) -> Result<()> {
        self.ask(Request::Sweep).await?
    }

    /// Deletes devices of ours; what is gone already is fine.
    pub(crate) async fn delete_links(&self, devices: Vec<Device>) -> Result<()> {
        self.ask(|reply| Request::Delete(devices, reply)).await?
    }

    /// The device that has this address.
    pub(crate) async fn underlay(&self, vtep: IpAddr) -> Result<Underlay> {
        self.ask(|reply| Request::Underlay(vtep, reply)).await?
    }

    /// Tells the links of these devices once more that this host has an address.
    pub(crate) async fn announce(&self, addresses: Vec<(Device, IpAddr)>) -> Result<()> {
        self.ask(|reply| Request::Announce(addresses, reply)).await
    }

    /// The index of the device by which packets to an address leave; nothing if there is no way.
    pub(crate) async fn way_to(&self, address: IpAddr) -> Result<Option<u32>> {
        self.ask(|reply| Request::WayTo(address, reply)).await?
    }

    /// The prefixes that this host has addresses in or routes to, our own devices' aside: a new
    /// network's subnet should collide with none.
    pub(crate) async fn prefixes(&self) -> Result<Vec<IpNet>> {
        self.ask(Request::Prefixes).await?
    }

    /// What sets of a table count that packets add to; nothing where there is no such set.
    pub(crate) async fn counts(&self, table: Table, sets: Vec<String>) -> Result<Vec<Vec<Counted>>> {
        self.ask(|reply| Request::Counts(table, sets, reply)).await?
    }

    /// How many packets a counter of a table has seen.
    pub(crate) async fn counter(&self, table: Table, name: &'static str) -> Result<u64> {
        self.ask(|reply| Request::Counter(table, name, reply)).await?
    }

    /// Whether the kernel makes WireGuard devices.
    pub(crate) async fn has_wireguard(&self) -> Result<bool> {
        self.ask(Request::HasWireguard).await
    }

    /// Takes another private key that an end of the tunnel may get.
    pub(crate) async fn learn_key(&self, key: PrivateKey) -> Result<()> {
        self.ask(|reply| Request::LearnKey(key, reply)).await
    }

    /// How the ends of the tunnel do.
    pub(crate) async fn tunnels(&self) -> Result<Vec<TunnelStatus>> {
        self.ask(Request::Tunnels).await?
    }

    /// Removes our nftables tables, for a teardown.
    pub(crate) async fn remove_filter(&self) -> Result<()> {
        self.ask(Request::RemoveFilter).await?
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.0.requests.send(request(reply)).map_err(|_| KernelError::Stopped)?;
        let _ = (&self.0.bell).write(&[0]);
        answer.await.map_err(|_| KernelError::Stopped)
    }
}

fn failed(ops: Vec<Op>, error: &KernelError) -> Vec<Outcome> {
    ops.into_iter().map(|op| Outcome { op, result: Err(error.clone()) }).collect()
}
