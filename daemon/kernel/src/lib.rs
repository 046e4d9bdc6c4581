//! The interface to the kernel: the only code of ovl that uses netlink, runs `nft` and writes sysctls.
//!
//! One thread, the kernel worker, owns the sockets and applies operations in order. It also detects drift:
//! it keeps a model of what the kernel holds ([`known`]), and reports a notification only if it contradicts
//! the model. So a change by ovld itself causes no event, whatever port id the kernel writes into the
//! message (for most of them it writes none).

#![warn(missing_docs)]

mod announce;
mod apply;
mod attribute;
mod capture;
mod clsact;
mod conntrack;
mod dump;
mod duplicate;
mod echo;
mod endpoint;
mod error;
mod event_queue;
mod fact;
mod fast;
mod filter;
mod flows;
mod foreign;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod groups;
mod inspect;
mod known;
mod link;
mod localnet;
mod message;
mod monitor;
mod netns;
mod nftables;
mod path;
mod probe;
mod rate;
mod received;
mod resolver;
mod sandbox;
mod simulated;
mod socket;
mod sources;
mod survey;
mod sweep;
mod sys;
mod sysctl;
mod tables;
#[cfg(test)]
mod tests;
mod timed;
mod trace;
mod tunnel;
mod watch;
mod wireguard;
mod worker;
mod xfrm;

use std::collections::{BTreeMap, BTreeSet};
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
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::Mac;
use ovl_tunnel::PrivateKey;
use tokio::sync::{mpsc, oneshot};

use self::event_queue::EventQueue;
use self::tunnel::Tunnels;
use self::worker::{Request, Worker};

pub use apply::has_inet6;
pub use capture::{Capture, CaptureSpec, Captured, WINDOW, devices_with};
pub use duplicate::other_owner;
pub use error::{KernelError, Result};
pub use fast::{FastCounters, fast_path_folder};
pub use flows::{FlowCounts, FlowKey, FlowTick, FlowWatch, SeenFlows, flows_now};
pub use foreign::{look as foreign_firewalls, run_commands};
pub use link::Traffic;
pub use message::port_mac;
pub use netns::{Netns, open_netns};
pub use ovl_tunnel::Offload;
pub use path::PathSocket;
pub use probe::{Probe, Prober};
pub use resolver::Resolver;
pub use sandbox::{
    MountPoint, NetnsCookie, NetnsHandle, Process, mount_netns, mount_points, netns_file, new_netns,
    own_netns, processes_in, unmount_netns,
};
pub use simulated::SimulatedKernel;
pub use survey::{
    BoundSocket, NeighbourUse, Survey, SurveyedChain, SurveyedDevice, Wanted, has_own_name, is_own, macs,
    survey,
};
pub use sys::{is_ethernet, own_addresses, return_free_memory};
pub use timed::{TimedChange, TimedElement};
pub use trace::{
    DroppedBy, DroppedPacket, TraceProbe, TraceWatch, WatchSpec, listens, remove_left_traces, wall_ns,
};
pub use tunnel::{TunnelPeerStatus, TunnelStatus};

/// A change in the kernel that ovld did not make. The channel holds at most one event of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEvent {
    /// Another program changed an object of ovl: a full pass is needed.
    Changed,
    /// The host's interface of an endpoint was deleted by another program, or with its namespace.
    EndpointGone(Device),
    /// An address, the MTU or the state of a device of the host, not of ovl, or a default route changed.
    Underlay,
    /// Notifications were lost: a full pass is needed.
    Overrun,
    /// Another program changed an nftables table of ovl.
    FilterChanged,
    /// The peer interface of an endpoint came up again, or has another MAC address.
    PeerChanged(Device),
    /// An endpoint has joined or left a multicast group: see [`KernelHandle::groups`].
    Groups,
}

/// The veth pair of an endpoint to be created.
#[derive(Debug)]
pub struct EndpointSpec {
    /// The host's interface.
    pub device: Device,
    /// The name of the endpoint; the alias of the host's interface is `ovl endpoint NAME`.
    pub name: String,
    /// The workload's namespace, which receives the peer interface. It is closed as soon as the pair is
    /// created, because an open descriptor keeps the namespace alive.
    /// `None` if the peer interface stays in the host's namespace, down and without addresses, until
    /// the container runtime moves it and configures it.
    pub netns: Option<Netns>,
    /// The name of the peer interface; `None` for the first free `ethN`.
    pub ifname: Option<String>,
    /// The MAC address of the peer interface.
    pub mac: Mac,
    /// The MTU of both interfaces, in bytes.
    pub mtu: u16,
    /// How the host's interface is connected.
    pub host_end: HostEnd,
    /// The addresses of the peer interface.
    pub addresses: Vec<IpNet>,
    /// The gateways of the default routes. A default route is only added if the namespace has none of its
    /// address family.
    pub gateways: Vec<IpAddr>,
    /// The routes to the resolver; `None` if the endpoint uses no resolver of ovl.
    pub resolver: Option<Resolver>,
    /// The limits of the endpoint's traffic.
    pub bandwidth: Bandwidth,
}

/// How the host's interface of a veth pair is connected.
#[derive(Debug, Clone)]
pub enum HostEnd {
    /// It is a port of this bridge; the flag is the port's hairpin mode.
    Port(Device, bool),
    /// It is the next hop of the peer interface.
    Routed {
        /// The MAC address of the host's interface.
        mac: Mac,
        /// The gateways that resolve to this MAC address, each with the prefix that is routed through it
        /// in addition to the default route.
        routes: Vec<(IpAddr, IpNet)>,
    },
}

/// The result of [`KernelHandle::prepare_and_create`].
#[derive(Debug)]
pub struct CreatedEndpoint {
    /// The name of the peer interface.
    pub ifname: String,
    /// The MTU of both interfaces, in bytes.
    pub mtu: u16,
    /// The gateways of the default routes that were added.
    pub gateways: Vec<IpAddr>,
}

/// What ovl gave the peer interface of an endpoint, to be put back by [`KernelHandle::mend`].
#[derive(Debug)]
pub struct PeerSpec {
    /// The host's interface.
    pub device: Device,
    /// See [`EndpointSpec::addresses`].
    pub addresses: Vec<IpNet>,
    /// See [`EndpointSpec::gateways`].
    pub gateways: Vec<IpAddr>,
    /// See [`EndpointSpec::host_end`].
    pub host_end: HostEnd,
    /// See [`EndpointSpec::resolver`].
    pub resolver: Option<Resolver>,
}

/// What [`KernelHandle::mend`] found at a peer interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mended {
    /// The host's interface.
    pub device: Device,
    /// The MAC address of the peer interface. `None` if it is unknown.
    pub mac: Option<Mac>,
    /// Whether an address or a default route was missing, and was put back.
    pub changed: bool,
}

/// An endpoint to be removed.
#[derive(Debug)]
pub struct RetiredEndpoint {
    /// The host's interface.
    pub device: Device,
    /// Where the peer interface is.
    pub other: PeerLocation,
}

/// The location of the peer interface of an endpoint's veth pair.
#[derive(Debug)]
pub enum PeerLocation {
    /// It is in this namespace.
    Netns(Netns),
    /// Its namespace is unknown. The pair is then deleted at once, so that a detach takes longer; the same
    /// happens if the interface is not in the namespace of [`Self::Netns`].
    Unknown,
    /// The container runtime moved it, and moves it back under a name that cannot collide.
    Moved,
}

/// An element of an nftables set that packets add elements to, with its counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountedElement {
    /// The key, as the kernel encodes it.
    pub key: Box<[u8]>,
    /// The number of packets.
    pub packets: u64,
    /// The length of them, in bytes.
    pub bytes: u64,
    /// The time until the element expires, in milliseconds; `None` if the set has no timeout.
    pub left_ms: Option<u64>,
}

/// The result of one operation.
#[derive(Debug)]
pub struct Outcome {
    /// The operation.
    pub op: Op,
    /// Its result.
    pub result: Result<()>,
}

/// The input of a full pass.
#[derive(Debug)]
pub struct Goal {
    /// The desired data plane.
    pub desired: Dataplane,
    /// Whether objects that are not in the desired data plane are deleted.
    pub prune: bool,
    /// Devices that are being created: they and their entries are not compared.
    pub ignored: BTreeSet<Device>,
    /// Neighbours on bridges that belong to ignored devices.
    pub expected: BTreeSet<(Device, IpAddr)>,
    /// Whether the plan is applied, or only returned.
    pub apply: bool,
}

/// The result of a full pass.
#[derive(Debug)]
pub struct Pass {
    /// The plan, with the result of each operation; all are `Ok` if the plan was not applied.
    pub outcomes: Vec<Outcome>,
    /// Endpoints whose host interfaces are missing.
    pub lost: Vec<Device>,
}

/// The device that has the underlay address of this host.
///
/// If the address is on a loopback or dummy device, it is the device by which peers are reached instead; if they are
/// reached by several, the one with the smallest MTU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The name of the device.
    pub device: String,
    /// The index of the device.
    pub index: u32,
    /// The MTU of the device, in bytes.
    pub mtu: u16,
    /// The address with its prefix length.
    pub prefix: IpNet,
    /// Whether the device depends on the peers, because the address is on a loopback or dummy device.
    pub by_peers: bool,
}

/// How this host is connected, apart from devices of ovl.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostConnections {
    /// The prefixes of the addresses of devices, each with the name of a device. Addresses that every host has, such as
    /// loopback, and announced ones are left out.
    pub connected: BTreeMap<IpNet, String>,
    /// The gateways of default routes of both address families, in all tables.
    pub gateways: BTreeSet<IpAddr>,
}

/// Returns the compiled eBPF programs that this build may load, by the names of their files in `daemon/bpf`.
pub fn ebpf_objects() -> [(&'static str, &'static [u8]); 2] {
    [("drops.bpf.o", trace::DROPS_OBJECT), ("fastpath.bpf.o", ovl_fastpath::OBJECT)]
}

/// Starts the kernel worker in the network namespace of the calling thread. `tunnel_keys` are the private keys
/// that tunnel devices may be configured with.
///
/// # Errors
///
/// The thread, or one of its sockets, cannot be created, or the first dump fails.
pub fn start(events: mpsc::Sender<KernelEvent>, tunnel_keys: Vec<PrivateKey>) -> Result<KernelHandle> {
    let error = |error| KernelError::io("cannot start the kernel worker", &error);
    let (bell, wake) = UnixStream::pair().map_err(error)?;
    // A full socket wakes the worker just as well.
    bell.set_nonblocking(true).map_err(error)?;
    wake.set_nonblocking(true).map_err(error)?;
    let worker = Worker::new(EventQueue::new(events), Tunnels::new(tunnel_keys))?;
    let (requests, queue) = queue::channel();
    std::thread::Builder::new()
        .name("kernel".to_owned())
        .spawn(move || worker.run(&queue, wake))
        .map_err(error)?;
    Ok(KernelHandle(Arc::new(Channel::Thread { requests, bell })))
}

/// Reads a sysctl, such as `net.ipv4.ip_forward`, in the network namespace of the calling thread. `None` if
/// the kernel has no such sysctl.
pub fn read_sysctl(name: &str) -> Option<String> {
    sysctl::read(name)
}

/// A handle to the kernel worker. The worker exits when the last handle is dropped.
///
/// Methods return [`KernelError::Stopped`] if the worker has exited.
#[derive(Debug, Clone)]
pub struct KernelHandle(Arc<Channel>);

#[derive(Debug)]
enum Channel {
    // The queue must be dropped before the bell: the closed bell wakes the worker, which then finds the queue closed.
    Thread { requests: queue::Sender<Request>, bell: UnixStream },
    Simulated(mpsc::UnboundedSender<Request>),
}

impl KernelHandle {
    /// Opens the network namespace of a workload, as [`open_netns`] does.
    ///
    /// # Errors
    ///
    /// The file does not exist or is not a network namespace.
    pub fn open_netns(&self, path: &Path) -> Result<Netns> {
        match &*self.0 {
            Channel::Thread { .. } => open_netns(path),
            Channel::Simulated(_) => simulated::netns(path),
        }
    }

    /// Dumps the actual data plane: all objects of ovl in the kernel.
    pub async fn dump(&self) -> Result<Dataplane> {
        self.ask(Request::Dump).await?
    }

    /// Runs a full pass: dumps, compares and applies in one request, so that no later request comes between.
    pub async fn reconcile(&self, goal: Goal) -> Result<Pass> {
        self.ask(|reply| Request::Reconcile(Box::new(goal), reply)).await?
    }

    /// Applies all operations in order. A failed operation does not stop the later ones.
    pub async fn apply(&self, ops: Vec<Op>) -> Vec<Outcome> {
        // For the reply if the worker has exited.
        let asked = ops.clone();
        self.ask(|reply| Request::Apply(ops, reply)).await.unwrap_or_else(|error| failed(asked, &error))
    }

    /// Applies operations and creates the veth pair of an endpoint. On failure no interface remains.
    ///
    /// Operations on the pair's own device follow its creation, and fail if that failed. All others precede it.
    pub async fn prepare_and_create(
        &self,
        ops: Vec<Op>,
        spec: EndpointSpec,
    ) -> (Vec<Outcome>, Result<CreatedEndpoint>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Create(ops, Box::new(spec), reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// Reads the state of an interface in a namespace. `None` if there is no such interface.
    pub async fn inspect(&self, netns: Netns, ifname: String) -> Result<Option<Inside>> {
        self.ask(|reply| Request::Inspect(netns, ifname, reply)).await?
    }

    /// Puts back what peer interfaces in one namespace have lost: addresses, and routes that belong to them. Default
    /// routes are only added where the namespace has none of that address family. An interface that is down is left as it
    /// is, and so is everything that ovl did not put there.
    pub async fn mend(&self, netns: Netns, specs: Vec<PeerSpec>) -> Result<Vec<Mended>> {
        self.ask(|reply| Request::Mend(netns, specs, reply)).await?
    }

    /// Disconnects endpoints, then applies operations. When this returns, no traffic passes and the names of
    /// the peer interfaces are free. The pairs are deleted later, see [`Self::sweep`].
    pub async fn retire(&self, retired: Vec<RetiredEndpoint>, ops: Vec<Op>) -> (Vec<Outcome>, Result<()>) {
        let asked = ops.clone();
        match self.ask(|reply| Request::Retire(retired, ops, reply)).await {
            Ok(answer) => answer,
            Err(error) => (failed(asked, &error), Err(error)),
        }
    }

    /// Deletes the veth pairs of endpoints that [`Self::retire`] disconnected.
    pub async fn sweep(&self) -> Result<()> {
        self.ask(Request::Sweep).await?
    }

    /// Deletes devices of ovl. A device that is absent is no error.
    pub async fn delete_links(&self, devices: Vec<Device>) -> Result<()> {
        self.ask(|reply| Request::Delete(devices, reply)).await?
    }

    /// Looks up the device that has an address, or by which these peers are reached from there.
    pub async fn underlay(&self, vtep: IpAddr, peers: Vec<IpAddr>) -> Result<Underlay> {
        self.ask(|reply| Request::Underlay(vtep, peers, reply)).await?
    }

    /// Announces addresses of this host again on the links of these devices, by ARP or neighbour discovery.
    pub async fn announce(&self, addresses: Vec<(Device, IpAddr)>) -> Result<()> {
        self.ask(|reply| Request::Announce(addresses, reply)).await
    }

    /// Looks up the index of the output interface of packets to an address. `None` if there is no route.
    pub async fn output_interface(&self, address: IpAddr) -> Result<Option<u32>> {
        self.ask(|reply| Request::OutputInterface(address, reply)).await?
    }

    /// Lists the prefixes that this host has addresses in or routes to, except those of ovl devices. The subnet
    /// of a new network should overlap none of them.
    pub async fn prefixes(&self) -> Result<Vec<IpNet>> {
        self.ask(Request::Prefixes).await?
    }

    /// Reads how this host is connected, apart from devices of ovl.
    pub async fn host_connections(&self) -> Result<HostConnections> {
        self.ask(Request::HostConnections).await?
    }

    /// Reads the elements and counters of nftables sets that packets add elements to. The list of a set that does
    /// not exist is empty.
    pub async fn counts(&self, table: Table, sets: Vec<String>) -> Result<Vec<Vec<CountedElement>>> {
        self.ask(|reply| Request::Counts(table, sets, reply)).await?
    }

    /// Reads the elements that end by themselves of all sets of a table whose names begin with `prefix`; none if there is no
    /// table.
    pub async fn timed(&self, table: Table, prefix: String) -> Result<Vec<TimedElement>> {
        self.ask(|reply| Request::Timed(table, prefix, reply)).await?
    }

    /// Changes elements that end by themselves, in one transaction for each set.
    ///
    /// # Errors
    ///
    /// A set is not there or full. The changes of other sets are made.
    pub async fn change_timed(&self, table: Table, changes: Vec<TimedChange>) -> Result<()> {
        self.ask(|reply| Request::ChangeTimed(table, changes, reply)).await?
    }

    /// Loads the programs of the fast path, if they can be loaded here. Returns whether an earlier run has left them in use.
    pub async fn open_fast_path(&self) -> Result<bool> {
        self.ask(Request::OpenFastPath).await?
    }

    /// Returns what the programs of the fast path have counted. `None` if they are not loaded.
    pub async fn fast_counters(&self) -> Option<FastCounters> {
        self.ask(Request::FastCounters).await.ok().flatten()
    }

    /// Reads what passed each host interface of an endpoint.
    pub async fn traffic(&self) -> Result<BTreeMap<Device, Traffic>> {
        self.ask(Request::Traffic).await?
    }

    /// Returns the multicast groups that each endpoint on a bridge has joined, those of which
    /// [`ovl_proto::table::is_followed`] is true.
    pub async fn groups(&self) -> Result<BTreeMap<Device, BTreeSet<IpAddr>>> {
        self.ask(Request::Groups).await
    }

    /// Asks endpoints which IPv6 multicast groups they have joined (MLD). For IPv4, their bridge asks (IGMP); for IPv6 it
    /// cannot, because it has no link-local address.
    pub async fn ask_for_members(&self, endpoints: Vec<Device>) -> Result<()> {
        self.ask(|reply| Request::AskForMembers(endpoints, reply)).await
    }

    /// Checks whether the kernel supports WireGuard devices.
    pub async fn has_wireguard(&self) -> Result<bool> {
        self.ask(Request::HasWireguard).await
    }

    /// Adds a private key that tunnel devices may be configured with.
    pub async fn learn_key(&self, key: PrivateKey) -> Result<()> {
        self.ask(|reply| Request::LearnKey(key, reply)).await
    }

    /// Reads the status of all tunnel devices and their peers.
    pub async fn tunnels(&self) -> Result<Vec<TunnelStatus>> {
        self.ask(Request::Tunnels).await?
    }

    /// Deletes all nftables tables of ovl, for a teardown.
    pub async fn remove_filter(&self) -> Result<()> {
        self.ask(Request::RemoveFilter).await?
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        match &*self.0 {
            Channel::Thread { requests, bell } => {
                requests.send(request(reply)).map_err(|_| KernelError::Stopped)?;
                let _ = (&mut &*bell).write(&[0]);
            }
            Channel::Simulated(requests) => {
                requests.send(request(reply)).map_err(|_| KernelError::Stopped)?
            }
        }
        answer.await.map_err(|_| KernelError::Stopped)
    }
}

fn failed(ops: Vec<Op>, error: &KernelError) -> Vec<Outcome> {
    ops.into_iter().map(|op| Outcome { op, result: Err(error.clone()) }).collect()
}
