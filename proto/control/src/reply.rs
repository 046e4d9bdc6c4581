//! What ovld answers. Everything here is printed by `ovlctl -o json` as it stands.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::resources::{AppliedAll, ManifestProblem, ResourceInfo, ServiceBackends};
use ovl_proto::id::{ClusterKeyId, Mac, NetworkId, NodeId, TunnelKey};
use ovl_proto::object::{Backend, Driver, Mode};
use ovl_proto::publish::Published;
use ovl_proto::record::PeerState;

/// One reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Done,
    /// It was not done.
    Error(Failure),
    /// Text to be printed as it is.
    Text(String),
    /// How the daemon is.
    Status(Box<Status>),
    /// All hosts, the own one first.
    Peers(Vec<Peer>),
    /// Who has which cluster key.
    Keys(Box<KeyStatus>),
    /// All blocks.
    Subnets(Vec<SubnetUse>),
    /// What the kernel holds.
    Fdb(Vec<FdbRow>),
    /// What the kernel holds.
    Routes(Vec<RouteRow>),
    /// Commands that the loop would run now; none when all is as it should be.
    Plan(Vec<String>),
    /// The outcome of a comparison.
    Verify(Verify),
    /// Events, oldest first.
    Events(Vec<Event>),
    /// One network.
    Network(Box<NetworkInfo>),
    /// All networks, by name.
    Networks(Vec<NetworkInfo>),
    /// One endpoint.
    Endpoint(Box<EndpointInfo>),
    /// All endpoints of the cluster, by network and name.
    Endpoints(Vec<EndpointInfo>),
    /// What the plugin prints; null where a call has no result.
    Cni(serde_json::Value),
    /// What the plugin prints when a call failed.
    CniError(CniError),
    /// One sandbox.
    Sandbox(Box<SandboxInfo>),
    /// All sandboxes of this host, by name.
    Sandboxes(Vec<SandboxInfo>),
    /// What an Engine is answered, an error with `Err` included.
    Docker(serde_json::Value),
    /// All network policies, by namespace and name.
    Policies(Vec<PolicyRow>),
    /// What they say of a connection: for each two addresses of one family.
    PolicyExplain(Vec<PolicyJudgement>),
    /// What they refused lately on this host, the latest first.
    PolicyDrops(Vec<PolicyDrop>),
    /// What would be answered.
    Dns(Box<DnsAnswer>),
    /// What became of each object.
    Applied(Box<AppliedAll>),
    /// Nothing was written, because this is wrong.
    Refused(Vec<ManifestProblem>),
    /// Objects.
    Resources(Vec<ResourceInfo>),
    /// Services with what stands behind them.
    Backends(Vec<ServiceBackends>),
}

/// `ovlctl dns`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAnswer {
    /// What was asked for.
    pub name: String,
    /// The type of record.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who asks: the endpoint's name, or `host`.
    pub from: String,
    /// How it ends: `NOERROR`, `NXDOMAIN`, `SERVFAIL`, `REFUSED` and so on.
    pub status: String,
    /// The records.
    pub answers: Vec<DnsRecord>,
    /// Where the answer comes from, in a sentence.
    pub why: String,
}

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsRecord {
    /// Whose it is.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// For how long it may be kept, in seconds.
    pub ttl: u32,
    /// An address, a name, or the like.
    pub data: String,
}

/// An error as container runtimes understand it (CNI specification 1.1.0, section 5, "Error").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// One of the well-known ones, or one of ours from 100 on.
    pub code: u32,
    /// In a few words.
    pub msg: String,
    /// What is wrong and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

/// `ovlctl sandbox ls`, and what `create` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxInfo {
    /// The name.
    pub name: String,
    /// The namespace's file; `ip netns exec` takes its last part.
    pub netns: std::path::PathBuf,
    /// The networks' names, or `host`, or `none`.
    pub networks: Vec<String>,
    /// Of all its endpoints.
    pub addresses: Vec<IpNet>,
    /// Ids of the processes inside.
    pub processes: Vec<u32>,
    /// As [`EndpointInfo::warnings`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people: what is wrong, and what to do.
    pub message: String,
}

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The request itself is wrong.
    Invalid,
    /// What it names is not there.
    NotFound,
    /// What it wants is taken, or in use.
    Conflict,
    /// No address is left.
    Exhausted,
    /// It cannot be done now: no majority, not yet ready.
    Unavailable,
    /// The kernel refused.
    Kernel,
    /// A fault of ours.
    Internal,
}

/// How a daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DaemonState {
    /// Not yet a member, or not yet caught up with gossip: nothing is pruned.
    Starting,
    /// All is as it should be.
    Ready,
    /// At work, and something is wrong: see the problems.
    Degraded,
}

/// Something that is wrong on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable, such as `OVL-E020`; `docs/problems.md` has a section for each.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: a host, a network, an endpoint, a file. Empty for the host that reports it.
    pub object: String,
    /// What is wrong and what to do, in one or two sentences.
    pub message: String,
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Error,
    /// Everything works, but it will not stay so, or not as intended.
    Warning,
}

/// `ovlctl status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The node's id.
    pub id: NodeId,
    /// The release.
    pub version: String,
    /// See [`DaemonState`].
    pub state: DaemonState,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Where gossip and sync reach this node.
    pub address: SocketAddr,
    /// Where its VXLAN packets come from.
    pub vtep: IpAddr,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
    /// Members of the cluster, this one included.
    pub members: u32,
    /// Those that are alive, this one included.
    pub alive: u32,
    /// Endpoints on this host.
    pub endpoints: u32,
    /// Networks in the cluster.
    pub networks: u32,
    /// The rotation of the cluster key that is under way.
    pub rotation: Option<KeyRotation>,
    /// Counters of gossip and sync.
    pub gossip: GossipCounters,
    /// The reconcile loop.
    pub reconcile: ReconcileStatus,
}

/// Datagrams by what became of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GossipCounters {
    /// Sent.
    pub sent: u64,
    /// Received and good.
    pub received: u64,
    /// Dropped: not sealed with a key that we have.
    pub dropped_unauthenticated: u64,
    /// Dropped: seen before, or too old.
    pub dropped_replayed: u64,
    /// Dropped: sealed well, and not to be understood.
    pub dropped_malformed: u64,
    /// Where the unauthenticated ones came from lately.
    pub strangers: Vec<IpAddr>,
}

/// The reconcile loop.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReconcileStatus {
    /// Whole passes, each with a kernel dump.
    pub passes: u64,
    /// Operations carried out.
    pub operations: u64,
    /// Of those, repairs of what somebody else had changed.
    pub repairs: u64,
    /// Objects that the kernel refuses, with its reason.
    pub failing: Vec<String>,
}

/// `ovlctl key status`: ids of keys, never keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyStatus {
    /// The rotation of the cluster key that is under way.
    pub rotation: Option<KeyRotation>,
    /// Names of the hosts that this one waits for while a tunnel key, its own or another's, is rotated; none: none is.
    pub tunnel_waits_for: Option<Vec<String>>,
    /// All hosts, the own one first, then by name.
    pub hosts: Vec<HostKeys>,
}

/// A rotation of the cluster key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRotation {
    /// The new key's id.
    pub key: ClusterKeyId,
    /// When it began, in milliseconds since 1970.
    pub since_ms: u64,
    /// Live members.
    pub hosts: u32,
    /// Of those, the ones that have the new key.
    pub have: u32,
    /// Of those, the ones that seal with it.
    pub seal: u32,
    /// Whether a majority of the members is alive; without one it goes no further.
    pub majority: bool,
    /// Names of the hosts that hold it up.
    pub waits_for: Vec<String>,
}

/// The cluster keys of a host, as it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKeys {
    /// The host's name.
    pub name: String,
    /// Its id.
    pub id: NodeId,
    /// See [`PeerState`].
    pub state: PeerState,
    /// Whether a majority has admitted it.
    pub member: bool,
    /// The id of the key that it seals with.
    pub seals: ClusterKeyId,
    /// Ids of the others that it takes.
    pub opens: Vec<ClusterKeyId>,
    /// Its tunnel key, as `wg` shows it; none where it has no tunnel.
    pub tunnel: Option<TunnelKey>,
    /// It is on its way to other keys: what it had before is still there.
    pub tunnel_rotating: bool,
    /// The host that answers.
    #[serde(rename = "self")]
    pub own: bool,
}

/// `ovlctl peers`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// The host's name.
    pub name: String,
    /// Its id.
    pub id: NodeId,
    /// Where gossip and sync reach it.
    pub address: SocketAddr,
    /// Where its VXLAN packets come from.
    pub vtep: IpAddr,
    /// See [`PeerState`].
    pub state: PeerState,
    /// Since anything came from it directly; nothing for the own node and for one never heard.
    pub last_heard_ms: Option<u64>,
    /// Round trip to its daemon, smoothed.
    pub rtt_us: Option<u64>,
    /// How many it owns.
    pub endpoints: u32,
    /// Its release.
    pub version: String,
    /// What protects traffic of encrypted networks to it: `wireguard (kernel)` or `wireguard (userspace)`, by who
    /// does it on this host; `none` where there is no such traffic.
    pub encryption: String,
    /// The tunnel to it, where there is one.
    pub tunnel: Option<PeerTunnel>,
    /// Whether this line is the node that answers.
    #[serde(rename = "self")]
    pub own: bool,
    /// Whether a majority has admitted it.
    pub member: bool,
    /// Whether packets of gossip arrive from it directly, and not only through others.
    pub reachable: bool,
    /// What the path to it carries, outer IP header included, in bytes.
    pub path_mtu: Option<u16>,
}

/// The tunnel to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerTunnel {
    /// Where the last authenticated datagram came from, or where its record says that it is.
    pub endpoint: Option<SocketAddr>,
    /// Seconds since the last handshake; nothing before the first.
    pub last_handshake_s: Option<u64>,
    /// Bytes of packets for it.
    pub sent_bytes: u64,
    /// Bytes of packets from it.
    pub received_bytes: u64,
    /// Round trip through the tunnel, kernel to kernel, smoothed.
    pub rtt_us: Option<u64>,
    /// How many of the last probes through the tunnel were not answered.
    pub loss_percent: Option<u8>,
}

/// `ovlctl subnets`: one block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SubnetUse {
    /// The network's name.
    pub network: String,
    /// The block.
    pub prefix: IpNet,
    /// The name of its holder.
    pub node: String,
    /// Addresses in use.
    pub used: u64,
    /// Addresses that can be used.
    pub size: u64,
}

/// `ovlctl fdb`: where the kernel sends frames.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FdbRow {
    /// The network's name.
    pub network: String,
    /// The destination; all zeroes: broadcast, multicast and what is unknown.
    pub mac: Mac,
    /// The device that it leaves by.
    pub device: String,
    /// The VTEP, for a remote one.
    pub destination: Option<IpAddr>,
    /// The host.
    pub node: Option<String>,
    /// The endpoint.
    pub endpoint: Option<String>,
    /// The addresses that the kernel holds for it in the neighbour table.
    pub addresses: Vec<IpAddr>,
}

/// `ovlctl routes`: routes and addresses of our devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// The network's name.
    pub network: String,
    /// Where to.
    pub destination: IpNet,
    /// The next hop.
    pub via: Option<IpAddr>,
    /// The device.
    pub device: String,
    /// The host behind it; nothing where it is this one.
    pub node: Option<String>,
}

/// `ovlctl verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// No differences.
    pub clean: bool,
    /// Milliseconds until nothing differed any more. `None` if something still does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_ms: Option<u64>,
    /// Each names the object.
    pub differences: Vec<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `peer`, `network`, `endpoint`, `block`, `kernel`, `problem`.
    pub kind: String,
    /// What it happened to.
    pub object: String,
    /// What happened.
    pub message: String,
}

/// `ovlctl network ls` and `inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// The name.
    pub name: String,
    /// The id.
    pub id: NetworkId,
    /// How it is built.
    pub driver: Driver,
    /// What it carries.
    pub mode: Mode,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The ranges.
    pub subnets: Vec<IpNet>,
    /// The gateway in each range; none on an internal network.
    pub gateways: Vec<IpAddr>,
    /// In force now, in bytes.
    pub mtu: u16,
    /// Only ever through the tunnel.
    pub encrypted: bool,
    /// Without a gateway.
    pub internal: bool,
    /// How a routed network reaches other hosts; nothing on a switched one.
    pub backend: Option<Backend>,
    /// Removed, and waiting for its last endpoints to go.
    pub removing: bool,
    /// Endpoints in the whole cluster.
    pub endpoints: u32,
    /// Hosts that have endpoints on it.
    pub nodes: Vec<String>,
    /// The bridge on this host, if it has one.
    pub bridge: Option<String>,
    /// Whether names resolve on it.
    pub dns: bool,
}

/// How an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// In use.
    Ready,
    /// Its host is dead: the entry waits for it.
    Suspended,
    /// Its address belongs to another host now: it is cut off.
    Isolated,
}

impl std::fmt::Display for EndpointState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Suspended => "suspended",
            Self::Isolated => "isolated",
        })
    }
}

/// `ovlctl endpoints`, and what `attach` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// The name.
    pub name: String,
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The network's name.
    pub network: String,
    /// The host's name.
    pub node: String,
    /// Of the interface.
    pub mac: Mac,
    /// Each with the length of its subnet.
    pub addresses: Vec<IpNet>,
    /// More names.
    pub aliases: Vec<String>,
    /// What selectors match.
    pub labels: BTreeMap<String, String>,
    /// See [`EndpointState`].
    pub state: EndpointState,
    /// The interface's name in the workload's namespace; only known on its own host.
    pub ifname: Option<String>,
    /// The host's end of the pair; only known on its own host.
    pub device: Option<String>,
    /// Ports of its host that lead to it.
    pub publish: Vec<Published>,
    /// What may keep it from being reached, as far as whoever attached it has to know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Services send it connections.
    pub ready: bool,
}

/// `ovlctl policy ls`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The pods that it selects, as `kubectl -l` takes it; empty: all of the namespace.
    pub selects: String,
    /// In which directions it isolates them.
    pub isolates: Vec<String>,
    /// The endpoints that it selects, in the cluster.
    pub endpoints: u64,
    /// Packets that were refused to, or from, those of them that are on this host, because no policy let
    /// them pass: each counts for every policy that isolates the endpoint.
    pub refused: u64,
    /// What it lets pass, in words: `ingress: from ...`.
    pub rules: Vec<String>,
}

/// What network policies say of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyJudgement {
    /// The source.
    pub from: IpAddr,
    /// The destination.
    pub to: IpAddr,
    /// Whether the connection is made.
    pub passes: bool,
    /// What decides at the source.
    pub egress: PolicySide,
    /// What decides at the destination.
    pub ingress: PolicySide,
}

/// What one end's network policies say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySide {
    /// Whether it passes there.
    pub passes: bool,
    /// The policies that decide, as `NAMESPACE/NAME`: the one that lets it pass, or all that isolate the
    /// endpoint; none where it is not isolated.
    pub policies: Vec<String>,
    /// The rule of the policy that lets it pass, counted from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<u64>,
    /// Why, in a sentence.
    pub why: String,
}

/// Connections that network policies refused: `ovlctl policy drops`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyDrop {
    /// Whose policies: `egress` the source's, `ingress` the destination's.
    pub direction: String,
    /// The source.
    pub from: IpAddr,
    /// The endpoint that has it, as `NAMESPACE/NAME`.
    pub from_endpoint: Option<String>,
    /// The destination.
    pub to: IpAddr,
    /// The endpoint that has it.
    pub to_endpoint: Option<String>,
    /// `TCP`, `UDP`, `SCTP`, or the number of another protocol.
    pub protocol: String,
    /// Of the destination; none with other protocols.
    pub port: Option<u16>,
    /// Packets, since they are remembered.
    pub packets: u64,
    /// Since the last one, in milliseconds.
    pub last_ms: u64,
    /// The policies that isolate the endpoint, none of which lets it pass.
    pub policies: Vec<String>,
}
