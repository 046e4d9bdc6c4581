//! All that the daemon knows, in one place and without any I/O of its own.
//!
//! Everything runs on one thread. Tasks borrow the state between two awaits and never across one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Instant;

use ovl_core::alloc::{Allocator, Output};
use ovl_core::backends::Backends;
use ovl_core::cni::Attachment;
use ovl_core::device::Device;
use ovl_core::docker::EngineEndpoint;
use ovl_core::ingress::Ingress;
use ovl_core::kernel::Kernel;
use ovl_core::liveness::Signs;
use ovl_core::objects::Objects;
use ovl_core::policy::Standing;
use ovl_core::services::Services;
use ovl_core::touched::Touched;
use ovl_core::view::{Local, Placed, View};
use ovl_core::zone::Marks;
use ovl_mesh::gossip::Hints;
use ovl_proto::alloc::Refusal;
use ovl_proto::clock::Clock;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Published;
use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::resource::Name;
use ovl_proto::sync::Message;
use ovl_proto::table::{Endpoint, Entry};
use tokio::sync::oneshot;

use super::Failed;
use super::docker::Docker;
use super::sandbox::Sandbox;
use crate::ports::Answer;

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

/// Which parts of the kernel have to be looked at.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    /// These networks, as a whole.
    pub networks: BTreeSet<NetworkId>,
    /// Names that may have changed.
    pub names: BTreeMap<NetworkId, Marks>,
    /// Of these networks, all names.
    pub named: BTreeSet<NetworkId>,
    /// Names of Services and pods that may have changed.
    pub cluster_names: super::dns::ClusterMarks,
    /// Of these networks, single endpoints.
    pub touched: BTreeMap<NetworkId, Touched>,
    /// What decides who stands behind Services.
    pub members: DirtyMembers,
    /// Services that came, went or changed, or whose backends did.
    pub services: BTreeSet<Name>,
    /// What concerns the host as a whole.
    pub host: bool,
    /// Who announces addresses of LoadBalancers.
    pub announced: bool,
    /// What network policies follow from, as a whole.
    pub policies: bool,
    /// What endpoints with these addresses are to network policies.
    pub policed: BTreeSet<(NetworkId, IpAddr)>,
    /// Everything, against a dump.
    pub full: bool,
    /// Somebody else changed something of ours since the last whole pass.
    pub drift: bool,
}

/// What is to be looked at for Services, policies and names: see `core`'s backends.
#[derive(Debug, Default)]
pub(crate) struct DirtyMembers {
    /// All endpoints of these networks: whether they count may have changed.
    pub networks: BTreeSet<NetworkId>,
    /// Single endpoints.
    pub endpoints: BTreeSet<(NodeId, EndpointId)>,
    /// Hosts that died or came back.
    pub hosts: BTreeSet<NodeId>,
}

impl Dirty {
    /// Marks what an endpoint is to network policies.
    pub(crate) fn police(&mut self, endpoint: &Endpoint) {
        self.policed.extend(endpoint.addresses.iter().map(|net| (endpoint.network, net.addr())));
    }

    /// Marks whole networks: which of their endpoints count may have changed.
    pub(crate) fn rights(&mut self, networks: impl IntoIterator<Item = NetworkId>) {
        for network in networks {
            self.networks.insert(network);
            self.named.insert(network);
            self.members.networks.insert(network);
        }
    }
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
    pub backends: Backends,
    /// What Services come to in this host's kernel.
    pub services: Services,
    /// What LoadBalancers come to here.
    pub ingress: Ingress,
    /// What is answered to health checks, by port.
    pub health: BTreeMap<u16, Answer>,
    /// The device on which their addresses are announced.
    pub uplink: Option<Device>,
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
    /// To be looked at.
    pub dirty: Dirty,
    /// What was last sent to the kernel for each network, and for the host.
    pub applied: BTreeMap<NetworkId, Kernel>,
    /// The same for the host as a whole.
    pub applied_host: Kernel,
    /// What stands of network policies.
    pub policy: Standing,
    /// Why policies may not stand, since all of it was last sent.
    pub unpoliced: Option<String>,
    /// Networks of which something was refused since all of it was last sent, with the first reason.
    pub refused: BTreeMap<NetworkId, String>,
    /// Operations that the kernel refused, with its reason.
    pub failing: BTreeMap<String, String>,
    /// Whole passes so far, operations, repairs.
    pub counts: Counts,
    /// Gossip has told all there is to know: from here on things may be removed.
    pub caught_up: bool,
    /// At least one peer has sent its objects, or there is none to send any.
    pub objects_seen: bool,
    /// What is wrong, by a key of ours.
    pub problems: BTreeMap<String, String>,
    /// The next number of a saved state, the last one on the disk, and what waits.
    pub save: Save,
    /// Peers whose tables changed since they were last cached in the run directory.
    pub uncached: BTreeSet<NodeId>,
    /// Zero of the milliseconds that liveness counts.
    pub epoch: Instant,
    /// This daemon is on its way out.
    pub leaving: bool,
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

/// Counters of the reconcile loop.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    /// Whole passes.
    pub passes: u64,
    /// Operations carried out.
    pub operations: u64,
    /// Of those, repairs of what somebody else had changed.
    pub repairs: u64,
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

    /// Members that are alive, this host included.
    pub(crate) fn alive(&self) -> BTreeSet<NodeId> {
        use ovl_proto::control::PeerState;
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

    /// Whether what a network does not need any more may go: nobody has anything to say yet about it.
    pub(crate) fn may_prune(&self, network: NetworkId) -> bool {
        self.caught_up || self.view.is_own(network)
    }

    /// What needs the cluster's agreement has to wait for the admission.
    pub(crate) fn check_member(&self) -> Result<(), Failed> {
        if self.is_member() {
            return Ok(());
        }
        let why = self.problems.get("admission").cloned();
        Err(Failed::unavailable(why.unwrap_or_else(|| "not admitted yet".to_owned())))
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

    /// Marks what an entry of a host's table, which comes or goes, is about.
    pub(crate) fn touch(&mut self, host: NodeId, entry: &Entry) {
        match entry {
            Entry::Endpoint(endpoint) => {
                self.dirty.police(endpoint);
                let touched = self.dirty.touched.entry(endpoint.network).or_default();
                touched.note(self.view.me, host, endpoint);
                self.dirty.members.endpoints.insert((host, endpoint.id));
                self.dirty.names.entry(endpoint.network).or_default().note(endpoint);
            }
            Entry::Lease { network, .. } => self.dirty.rights([*network]),
            Entry::PathMtu { .. } => self.touch_networks_of(host),
            Entry::Held(_) => {}
            Entry::Announced(_) => self.dirty.announced = true,
        }
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

    /// Marks every network: something changed that may concern each.
    pub(crate) fn touch_all(&mut self) {
        self.dirty.rights(self.view.networks.keys().chain(self.applied.keys()).copied());
        self.dirty.host = true;
    }

    /// Marks the encrypted ones.
    pub(crate) fn touch_encrypted(&mut self) {
        let encrypted = self.view.networks.values().map(|found| &found.network).filter(|n| n.encrypted);
        self.dirty.networks.extend(encrypted.map(|network| network.id));
        self.dirty.host = true;
    }

    /// Marks the networks on which a host has endpoints, or blocks that others have routes to.
    pub(crate) fn touch_networks_of(&mut self, node: NodeId) {
        let routed =
            |id: &NetworkId| self.view.networks.get(id).is_some_and(|found| found.network.mode == Mode::L3);
        let blocks = self.view.alloc.blocks.iter().filter(|(_, holder)| **holder == node);
        let held = blocks.map(|(block, _)| block.network).filter(routed);
        self.dirty.rights(held);
        if let Some(node) = self.view.nodes.get(&node) {
            self.dirty.rights(node.table.entries().filter_map(|entry| match entry {
                Entry::Endpoint(endpoint) => Some(endpoint.network),
                Entry::Lease { network, .. } => Some(*network),
                Entry::PathMtu { .. } | Entry::Held(_) | Entry::Announced(_) => None,
            }));
        }
    }

    /// Raises a problem, or takes it back.
    pub(crate) fn problem(&mut self, key: impl Into<String>, sentence: Option<String>) {
        let key = key.into();
        match sentence {
            Some(sentence) => {
                if self.problems.get(&key) != Some(&sentence) {
                    tracing::warn!("{sentence}");
                    self.problems.insert(key, sentence);
                }
            }
            None => {
                self.problems.remove(&key);
            }
        }
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
