//! The state of the daemon, in one place and without I/O.
//!
//! Everything runs on one thread. Tasks borrow the state between two awaits and never across one.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::view::Placed;
use ovl_consensus::Replica as Allocator;
use ovl_proto::alloc::{AllocMap, Block};
use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::object::Mode;
use ovl_proto::record::NodeRecord;
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::ranges::HostRanges;
use tokio::time::Instant;

use super::Failed;
use crate::addresses::Addresses;
use crate::admitted::AdmittedNames;
use crate::asked::Asked;
use crate::capture::Captures;
use crate::clashes::Clashes;
use crate::clocks::{LastWall, RefusedObjects};
use crate::detours::Detours;
use crate::endpoints::{FullName, LocalEndpoints};
use crate::engines::Engines;
use crate::environment::Environment;
use crate::exchange::Exchanges;
use crate::flows::FlowFollowers;
use crate::kubernetes::Kubernetes;
use crate::multicast::Multicast;
use crate::networks::Bridges;
use crate::objects::ObjectStore;
use crate::paths::PathFaults;
use crate::peers::Peers;
use crate::phase::Phase;
use crate::picture::Picture;
use crate::problems::{Code, Problems};
use crate::progress::Progress;
use crate::reach::Reach;
use crate::saving::{Save, Uncached};
use crate::tcp_paths::TcpPaths;
use crate::trace::Traces;
use crate::workloads::Workloads;
use ovl_subsystems::{Change, Cluster, SubsystemList, Subsystems};

/// The state of the daemon.
pub(crate) struct State {
    /// The local host's picture of the cluster.
    pub view: Picture,
    /// State of the local host that subsystems read.
    pub local: Local,
    /// How this host is connected, which decides which networks it builds.
    pub host_ranges: HostRanges,
    /// All peers. Each has an entry in `view.nodes`.
    pub peers: Peers,
    /// Identities that two daemons use.
    pub clashes: Clashes,
    /// All cluster objects with their signatures. `view.resources` is derived from them.
    pub objects: ObjectStore,
    /// What this host asks of peers' objects.
    pub exchanges: Exchanges,
    /// Objects of peers that were refused for their stamps, and those of this host that peers refuse.
    pub refused_objects: RefusedObjects,
    /// The wall clock at the last tick.
    pub wall: LastWall,
    /// Bridge networks of this host.
    pub bridges: Bridges,
    /// What is known from a Kubernetes API server.
    pub kubernetes: Kubernetes,
    /// What workloads were told for domain names of policies.
    pub admitted: AdmittedNames,
    /// Index of the endpoints that labels select and of the backends of each Service.
    pub workloads: Workloads,
    /// Subsystems, which contribute to the desired data plane.
    pub subsystems: Subsystems,
    /// Cluster keys of this host.
    pub keys: crate::keys::Keys,
    /// Consensus replica for the allocation map.
    pub allocator: Allocator,
    /// Changes of the allocation map that are waited for.
    pub maps: crate::maps::Maps,
    /// Addresses that other hosts were asked for.
    pub leases: Asked<Result<IpAddr, String>>,
    /// Questions of hosts to one another that are waited for.
    pub questions: super::asking::Questions,
    /// Addresses that are reserved or lent.
    pub addresses: Addresses,
    /// Endpoints of this host.
    pub endpoints: LocalEndpoints,
    /// What Docker Engines have here.
    pub engines: Engines,
    /// Multicast groups of this host's endpoints.
    pub multicast: Multicast,
    /// Parts of traces that are in flight.
    pub traces: Traces,
    /// Captures that are in flight.
    pub captures: Captures,
    /// Who follows flows, and what other hosts were asked for.
    pub flow_followers: FlowFollowers,
    /// Pending work of the reconcile loop, and the results so far.
    pub reconcile: Progress,
    /// How far this daemon is on its way from its start to its stop.
    pub phase: Phase,
    /// Peers that are not reached directly.
    pub detours: Detours,
    /// Where peers are with which what is exchanged crosses NAT.
    pub reach: Reach,
    /// Peers to which UDP is blocked.
    pub tcp: TcpPaths,
    /// Faults of paths that are worked around.
    pub path_faults: PathFaults,
    /// Problems that last until they are cleared.
    pub problems: Problems,
    /// What is not understood of other hosts.
    pub newer: crate::newer::Newer,
    /// Progress of saving the state file.
    pub save: Save,
    /// Peers whose tables are to be cached in the run directory.
    pub uncached: Uncached,
    /// The clock of this run.
    pub clock: RunClock,
}

/// The clock of this run.
pub(crate) struct RunClock {
    /// The start of the milliseconds of this run.
    start: Instant,
    /// Source of the wall-clock time.
    environment: Rc<dyn Environment>,
}

impl RunClock {
    /// Starts the milliseconds of this run.
    pub(crate) fn start(environment: Rc<dyn Environment>) -> Self {
        Self { start: Instant::now(), environment }
    }

    /// Returns the time of this run, from a monotonic clock.
    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Returns a moment as milliseconds of this run.
    pub(crate) fn at(&self, moment: Instant) -> u64 {
        let since = moment.saturating_duration_since(self.start);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

impl State {
    /// Returns the milliseconds of this run, from a monotonic clock.
    pub(crate) fn now(&self) -> u64 {
        self.clock.at(Instant::now())
    }

    /// Returns the wall-clock time in milliseconds since 1970.
    pub(crate) fn wall_ms(&self) -> u64 {
        self.clock.environment.wall_ms()
    }

    /// Returns the hosts that are alive, including this one.
    pub(crate) fn alive(&self) -> BTreeSet<NodeId> {
        use ovl_control::PeerState;
        self.view
            .nodes
            .values()
            .filter(|node| node.state == PeerState::Alive)
            .map(|node| node.record.id)
            .collect()
    }

    /// Whether a majority has admitted this host.
    pub(crate) fn is_member(&self) -> bool {
        self.view.alloc.members.contains(&self.view.me)
    }

    /// Returns the members other than this host.
    pub(crate) fn other_members(&self) -> impl Iterator<Item = NodeId> {
        self.view.alloc.members.iter().copied().filter(|id| *id != self.view.me)
    }

    /// Whether a peer has an allocation map, as far as its hints tell.
    pub(crate) fn has_map(&self, peer: NodeId) -> bool {
        self.peers.get(peer).is_some_and(|peer| peer.hints().alloc > 0)
    }

    /// Whether everything that a member announces has arrived here, as far as it can arrive.
    pub(crate) fn has_arrived(&self, member: NodeId) -> bool {
        use ovl_control::PeerState;
        let (Some(node), Some(peer)) = (self.view.nodes.get(&member), self.peers.get(member)) else {
            return false;
        };
        let hints = peer.hints();
        match node.state {
            PeerState::Alive => {
                hints.table != ovl_proto::table::Revision::default()
                    && node.table.revision() >= hints.table
                    && self.exchanges.is_level(&member)
                    // This host may have been forgotten while it was down, and its blocks may belong to other hosts.
                    && self.view.alloc.version >= hints.alloc
            }
            // The peer is silent, so nothing newer than its cached table can arrive.
            PeerState::Suspect => self.now() > 5_000,
            PeerState::Dead | PeerState::Left => true,
        }
    }

    /// Lists up to three hosts by name, and the number of the others.
    pub(crate) fn names_of(&self, hosts: &[NodeId]) -> String {
        let mut names: Vec<String> = hosts.iter().take(3).map(|id| self.view.name_of(*id)).collect();
        let more = hosts.len().saturating_sub(names.len());
        if more > 0 {
            names.push(format!("{more} more"));
        }
        names.join(", ")
    }

    /// Checks that this host is a member.
    ///
    /// # Errors
    ///
    /// This host is not admitted, so it cannot do what needs the agreement of the cluster.
    pub(crate) fn check_member(&self) -> Result<(), Failed> {
        if self.is_member() {
            return Ok(());
        }
        Err(Failed::unavailable(self.problems.get(Code::Admission, "").unwrap_or("not admitted yet")))
    }

    /// Whether this host is the coordinator: the live member with the smallest id.
    pub(crate) fn is_coordinator(&self) -> bool {
        self.alive().iter().find(|id| self.view.alloc.members.contains(id)) == Some(&self.view.me)
    }

    /// Returns the record of this host.
    pub(crate) fn record(&self) -> Option<&NodeRecord> {
        self.view.own().map(|own| &own.record)
    }

    /// Returns the table entries of this host's endpoints.
    pub(crate) fn own_endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.view.own().into_iter().flat_map(|own| own.table.endpoints())
    }

    /// Returns the table entry of an endpoint of this host. `None` if there is none with this id.
    pub(crate) fn own_endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        self.view.own()?.table.endpoint(id)
    }

    /// Returns what subsystems read, and the list of subsystems.
    pub(crate) fn parts(&mut self) -> (Cluster<'_>, SubsystemList<'_>) {
        let Self { view, local, workloads, phase, subsystems, .. } = self;
        let cluster =
            Cluster { view, backends: workloads.backends(), local, caught_up: phase.is_caught_up() };
        (cluster, subsystems.all())
    }

    /// Reports a change to everything that derives state from it.
    pub(crate) fn changed(&mut self, change: Change<'_>) {
        if let Change::Host(_) | Change::ThisHost | Change::Network(_) | Change::Built(_) = change {
            self.reconcile.mark_ranges();
        }
        if !matches!(
            change,
            Change::Attaching(_) | Change::Groups(_) | Change::FastPath | Change::Uplink | Change::Tunnel
        ) {
            self.reconcile.count_change();
        }
        match change {
            Change::Entry { host, entry } => match entry {
                Entry::Lease { network, address, .. } => self.rights_to(*network, *address),
                Entry::PathMtu { .. } => self.rights_of(host),
                Entry::Endpoint(_)
                | Entry::Held(_)
                | Entry::Announced(_)
                | Entry::Unreached(_)
                | Entry::Opaque(_) => {}
            },
            Change::Host(host) => self.rights_of(host),
            Change::ThisHost => {
                let networks: Vec<NetworkId> = self.view.networks.keys().copied().collect();
                networks.into_iter().for_each(|network| self.changed(Change::Rights(network)));
                self.reconcile.mark_rights();
            }
            Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Network(_)
            | Change::Built(_)
            | Change::Tunnel => {
                self.reconcile.mark_rights();
            }
            Change::Attaching(_)
            | Change::Resources(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
        self.workloads.changed(&change, &self.view);
        let (cluster, subsystems) = self.parts();
        subsystems.into_iter().for_each(|subsystem| subsystem.changed(&change, &cluster));
    }

    /// Reports what a new allocation map changes.
    pub(crate) fn map_changed(&mut self, before: &AllocMap) {
        let (me, after) = (self.view.me, &self.view.alloc);
        let is_member = |map: &AllocMap| map.members.contains(&me);
        if before.origin() != after.origin() || is_member(before) != is_member(after) {
            return self.changed(Change::ThisHost);
        }
        let members: Vec<NodeId> = before.members.symmetric_difference(&after.members).copied().collect();
        let blocks = before.blocks.keys().chain(after.blocks.keys());
        let blocks: BTreeSet<Block> =
            blocks.filter(|block| before.blocks.get(block) != after.blocks.get(block)).copied().collect();
        let mode = |block: &Block| self.view.networks.get(&block.network).map(|found| found.network.mode);
        let (routed, switched): (BTreeSet<Block>, BTreeSet<Block>) =
            blocks.into_iter().partition(|block| mode(block) == Some(Mode::L3));
        // The endpoints whose addresses are in a block on which nothing else depends. Most blocks were free before.
        let holders = switched.iter().flat_map(|Block { network, prefix }| {
            let all = self.view.all_endpoints_on(*network);
            all.filter(|placed| placed.endpoint.addresses.iter().any(|net| prefix.contains(&net.addr())))
        });
        let holders: Vec<(NodeId, Entry)> =
            holders.map(|placed| (placed.node.record.id, Entry::Endpoint(placed.endpoint.clone()))).collect();
        members.into_iter().for_each(|host| self.changed(Change::Host(host)));
        let routed: BTreeSet<NetworkId> = routed.into_iter().map(|block| block.network).collect();
        routed.into_iter().for_each(|network| self.changed(Change::Network(network)));
        holders.iter().for_each(|(host, entry)| self.changed(Change::Entry { host: *host, entry }));
        self.reconcile.mark_rights();
    }

    /// Reports that the right to an address may have changed: the endpoints with it may be valid now or no longer.
    fn rights_to(&mut self, network: NetworkId, address: IpAddr) {
        let holders = self.view.all_with_address(network, address);
        let holders: Vec<(NodeId, Entry)> =
            holders.map(|placed| (placed.node.record.id, Entry::Endpoint(placed.endpoint.clone()))).collect();
        holders.iter().for_each(|(host, entry)| self.changed(Change::Entry { host: *host, entry }));
        self.reconcile.mark_rights();
    }

    /// Reports that the rights to addresses may have changed on the networks on which a host has endpoints,
    /// leases or routed blocks.
    fn rights_of(&mut self, host: NodeId) {
        let routed =
            |id: &NetworkId| self.view.networks.get(id).is_some_and(|found| found.network.mode == Mode::L3);
        let blocks = self.view.alloc.blocks.iter().filter(|(_, holder)| **holder == host);
        let mut networks: BTreeSet<NetworkId> =
            blocks.map(|(block, _)| block.network).filter(routed).collect();
        if let Some(node) = self.view.nodes.get(&host) {
            networks.extend(node.table.entries().filter_map(|entry| match entry {
                Entry::Endpoint(endpoint) => Some(endpoint.network),
                Entry::Lease { network, .. } => Some(*network),
                Entry::PathMtu { .. }
                | Entry::Held(_)
                | Entry::Announced(_)
                | Entry::Unreached(_)
                | Entry::Opaque(_) => None,
            }));
        }
        networks.into_iter().for_each(|network| self.changed(Change::HostRights { host, network }));
    }

    /// Finds an endpoint of any host by network, Kubernetes namespace and name.
    pub(crate) fn endpoint_named<'a>(
        &'a self,
        (network, namespace, name): &'a FullName,
    ) -> Option<Placed<'a>> {
        self.view.all_named(name).find(|placed| {
            let endpoint = placed.endpoint;
            (endpoint.network, &endpoint.namespace) == (*network, namespace)
                && self.view.counts_on(placed.node, endpoint.network)
        })
    }
}

/// Paths in the run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(pub PathBuf);

impl RunDir {
    /// Returns the path of the control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join("ovld.sock")
    }

    /// Returns the path of a symbolic link to the folder with the programs of the fast path.
    pub(crate) fn fast_path(&self) -> PathBuf {
        self.0.join("fast-path")
    }

    /// Returns the directory with one file for each endpoint of this host.
    pub(crate) fn endpoints(&self) -> PathBuf {
        self.0.join("endpoints")
    }

    /// Returns the directory with one file for each sandbox.
    pub(crate) fn sandboxes(&self) -> PathBuf {
        self.0.join("sandboxes")
    }

    /// Returns the directory with one file for the table of each peer.
    pub(crate) fn tables(&self) -> PathBuf {
        self.0.join("tables")
    }
}
