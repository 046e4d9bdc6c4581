//! All that the daemon knows, in one place and without any I/O of its own.
//!
//! Everything runs on one thread. Tasks borrow the state between two awaits and never across one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;

use ovl_cluster::liveness::Signs;
use ovl_cluster::objects::Objects;
use ovl_cluster::view::{Placed, View};
use ovl_consensus::{Output, Replica as Allocator};
use ovl_dataplane::device::Device;
use ovl_mesh::gossip::Hints;
use ovl_proto::alloc::Refusal;
use ovl_proto::clock::Clock;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Published;
use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::sync::Message;
use ovl_proto::table::{Endpoint, Entry};
use ovl_runtimes::cni::Attachment;
use ovl_runtimes::docker::EngineEndpoint;
use ovl_subsystems::local::Local;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Failed;
use super::docker::Docker;
use super::reconcile::Progress;
use super::sandbox::Sandbox;
use crate::environment::Environment;
use crate::ports::Answer;
use crate::problems::{Code, Problems};
use crate::workloads::Workloads;
use ovl_subsystems::{Change, Cluster, SubsystemList, Subsystems};

/// What is known of a peer beside its record and table.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its record with the proof, to be passed on and kept.
    pub signed: SignedRecord,
    /// Alive or not.
    pub signs: Signs,
    /// What it says it has.
    pub hints: Hints,
    /// Milliseconds since 1970 when gossip last counted it among the living.
    pub last_alive_ms: u64,
    /// A whole table was asked for at this time and did not come yet.
    pub pulled_at: Option<u64>,
    /// The digest of its objects for which it was last asked for what we lack.
    pub objects_asked: Option<[u8; 32]>,
    /// When a probe was last sent to it.
    pub probe_sent_at: u64,
    /// Gossip has counted it among the living in this run.
    pub heard: bool,
}

/// What is known of an endpoint of this host beside its entry in the table.
#[derive(Debug, Clone)]
pub(crate) struct LocalEndpoint {
    /// The interface's name inside the namespace.
    pub ifname: String,
    /// Whose it is, if a container runtime asked for it.
    pub cni: Option<Attachment>,
    /// Which one it is for a Docker Engine, if that asked for it. Its other end is the Engine's to
    /// put into a namespace and to bring back.
    pub docker: Option<EngineEndpoint>,
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// The number of that namespace, which endpoints in it share.
    pub inode: u64,
}

/// Two daemons with one identity.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clash {
    /// When it was told last, in milliseconds of this run.
    pub seen: u64,
    /// The generation of the one that was started later.
    pub later: u64,
}

/// Names, addresses and MACs of attaches under way.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// Network, Kubernetes namespace, name.
    pub names: BTreeSet<(NetworkId, String, String)>,
    /// MAC addresses chosen and not yet in the table.
    pub macs: BTreeSet<(NetworkId, Mac)>,
    /// Addresses chosen and not yet in the table.
    pub addresses: BTreeSet<(NetworkId, IpAddr)>,
    /// Devices being made: no pass may sweep them.
    pub devices: BTreeSet<Device>,
    /// Ports to be published, with the endpoints' names, by a number of their own.
    pub ports: BTreeMap<u64, (String, Vec<Published>)>,
    /// Names of sandboxes that are being made or removed.
    pub sandboxes: BTreeSet<String>,
}

/// What waits for the state file to be on the disk.
#[derive(Debug)]
pub(crate) enum Durable {
    /// What the allocator said: its messages are promises.
    Alloc(Output),
    /// A message that promises something.
    Send(NodeId, Box<Message>),
    /// A request that may be answered.
    Tell(oneshot::Sender<()>),
}

/// All that the daemon knows.
pub(crate) struct State {
    /// The cluster.
    pub view: View,
    /// This host's own part.
    pub local: Local,
    /// The own record is `view.own()`; this one is signed.
    pub own_record: SignedRecord,
    /// All other hosts, by id; each has its entry in `view.nodes`.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Identities that two daemons use.
    pub clashes: BTreeMap<NodeId, Clash>,
    /// All cluster objects, with their proofs. What is in `view.resources` follows.
    pub objects: Objects,
    /// Networks of this host alone.
    pub bridges: BTreeMap<NetworkId, Network>,
    /// Digest of the stamps of all objects, for the hints.
    pub objects_digest: [u8; 32],
    /// Who can be selected, and what stands behind each Service.
    pub workloads: Workloads,
    /// What wants something in the kernel.
    pub subsystems: Subsystems,
    /// What is answered to health checks, by port.
    pub health: BTreeMap<u16, Answer>,
    /// When objects last came from a peer, in milliseconds of this run.
    pub objects_taken_at: u64,
    /// Stamps new objects.
    pub clock: Clock,
    /// The cluster keys of this host.
    pub keys: super::keys::Keys,
    /// Agreement on members and blocks.
    pub allocator: Allocator,
    /// Requests to the allocator that somebody waits for.
    pub claims: HashMap<u64, oneshot::Sender<Result<u64, Refusal>>>,
    /// Lease requests that somebody waits for.
    pub leases: HashMap<u64, (NodeId, oneshot::Sender<Result<IpAddr, String>>)>,
    /// Addresses lent to others, and whether the borrower was seen using each.
    pub lent: BTreeMap<(NetworkId, IpAddr), Lent>,
    /// Numbers requests to peers.
    pub next_request: u64,
    /// Endpoints of this host.
    pub endpoints: BTreeMap<EndpointId, LocalEndpoint>,
    /// Published ports that somebody else has.
    pub unheld: BTreeSet<(EndpointId, Published)>,
    /// Sandboxes of this host, by name.
    pub sandboxes: BTreeMap<String, Sandbox>,
    /// What is kept for Docker Engines.
    pub docker: Docker,
    /// The address given out last on each subnet.
    pub cursors: BTreeMap<(NetworkId, IpAddr), IpAddr>,
    /// Attaches under way.
    pub pending: Pending,
    /// The right of this host's endpoints to their addresses may have changed.
    pub rights_changed: bool,
    /// What the reconcile loop has to do, and how it went.
    pub reconcile: Progress,
    /// Gossip has told all there is to know: from here on things may be removed.
    pub caught_up: bool,
    /// At least one peer has sent its objects, or there is none to send any.
    pub objects_seen: bool,
    /// What is wrong until it is taken back.
    pub problems: Problems,
    /// The next number of a saved state, the last one on the disk, and what waits.
    pub save: Save,
    /// Peers whose tables changed since they were last cached in the run directory.
    pub uncached: BTreeSet<NodeId>,
    /// Zero of the milliseconds that liveness counts.
    pub epoch: Instant,
    /// This daemon is on its way out.
    pub leaving: bool,
    /// Where the time comes from.
    pub environment: Rc<dyn Environment>,
}

/// An address lent to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lent {
    /// The borrower.
    pub to: NodeId,
    /// Since when, in milliseconds of this run.
    pub at: u64,
    /// The borrower's table had it at some time.
    pub seen: bool,
}

/// The state file's bookkeeping.
#[derive(Debug, Default)]
pub(crate) struct Save {
    /// The number of the state that was last handed to the writer.
    pub handed: u64,
    /// The state has changed since.
    pub wanted: bool,
    /// What waits for which number.
    pub waiting: Vec<(u64, Durable)>,
}

impl State {
    /// Milliseconds of the clock that never goes back.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Milliseconds since 1970.
    pub(crate) fn wall_ms(&self) -> u64 {
        self.environment.wall_ms()
    }

    /// Members that are alive, this host included.
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

    /// Whether any port is published here, or about to be.
    pub(crate) fn publishes(&self) -> bool {
        !self.pending.ports.is_empty() || self.own_endpoints().any(|endpoint| !endpoint.publish.is_empty())
    }

    /// What needs the cluster's agreement has to wait for the admission.
    pub(crate) fn check_member(&self) -> Result<(), Failed> {
        if self.is_member() {
            return Ok(());
        }
        Err(Failed::unavailable(self.problems.get(Code::Admission, "").unwrap_or("not admitted yet")))
    }

    /// The member that acts for all where one is enough: the live one with the smallest id.
    pub(crate) fn is_coordinator(&self) -> bool {
        self.alive().iter().find(|id| self.view.alloc.members.contains(id)) == Some(&self.view.me)
    }

    /// The own record.
    pub(crate) fn record(&self) -> Option<&NodeRecord> {
        self.view.own().map(|own| &own.record)
    }

    /// Endpoints of this host, with their entries.
    pub(crate) fn own_endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.view.own().into_iter().flat_map(|own| own.table.endpoints())
    }

    /// One of them.
    pub(crate) fn own_endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        self.view.own()?.table.endpoint(id)
    }

    /// What subsystems read, and their list.
    pub(crate) fn parts(&mut self) -> (Cluster<'_>, SubsystemList<'_>) {
        let Self { view, local, workloads, caught_up, subsystems, .. } = self;
        let cluster = Cluster { view, backends: workloads.backends(), local, caught_up: *caught_up };
        (cluster, subsystems.all())
    }

    /// Tells a change to all that keep something which follows from it.
    pub(crate) fn changed(&mut self, change: Change<'_>) {
        match change {
            Change::Entry { host, entry } => match entry {
                Entry::Lease { network, .. } => self.changed(Change::Rights(*network)),
                Entry::PathMtu { .. } => self.rights_of(host),
                Entry::Endpoint(_) | Entry::Held(_) | Entry::Announced(_) => {}
            },
            Change::Host(host) => self.rights_of(host),
            Change::ThisHost => {
                let networks: Vec<NetworkId> = self.view.networks.keys().copied().collect();
                networks.into_iter().for_each(|network| self.changed(Change::Rights(network)));
                self.rights_changed = true;
            }
            Change::Rights(_) | Change::Network(_) | Change::Built(_) | Change::Tunnel => {
                self.rights_changed = true;
            }
            Change::Attaching(_)
            | Change::Publishing
            | Change::Resources(_)
            | Change::Backends(_)
            | Change::Announcers
            | Change::Uplink => {}
        }
        self.workloads.changed(&change, &self.view);
        let (cluster, subsystems) = self.parts();
        subsystems.into_iter().for_each(|subsystem| subsystem.changed(&change, &cluster));
    }

    /// Tells that the rights on the networks on which a host has endpoints or leases, or routed blocks, may have
    /// changed.
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
                Entry::PathMtu { .. } | Entry::Held(_) | Entry::Announced(_) => None,
            }));
        }
        networks.into_iter().for_each(|network| self.changed(Change::Rights(network)));
    }

    /// The endpoint of this network, Kubernetes namespace and name, on whichever host.
    pub(crate) fn endpoint_named<'a>(
        &'a self,
        (network, namespace, name): &'a (NetworkId, String, String),
    ) -> Option<Placed<'a>> {
        self.view.all_named(name).find(|placed| {
            let endpoint = placed.endpoint;
            (endpoint.network, &endpoint.namespace) == (*network, namespace)
                && self.view.counts_on(placed.node, endpoint.network)
        })
    }
}

/// Files of the run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(pub PathBuf);

impl RunDir {
    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join("ovld.sock")
    }

    /// One file for each endpoint of this host.
    pub(crate) fn endpoints(&self) -> PathBuf {
        self.0.join("endpoints")
    }

    /// One file for each sandbox.
    pub(crate) fn sandboxes(&self) -> PathBuf {
        self.0.join("sandboxes")
    }

    /// One file for each other host's table.
    pub(crate) fn tables(&self) -> PathBuf {
        self.0.join("tables")
    }
}
