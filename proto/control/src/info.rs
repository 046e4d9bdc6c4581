//! What replies are about: hosts, networks, endpoints and the other things that `ovlctl` lists.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use ovl_proto::id::{ClusterKeyId, Mac, NetworkId, NodeId, TunnelKey};
use ovl_proto::object::{Backend, Driver, Encrypt, Mode};
use ovl_proto::publish::Published;
use ovl_proto::record::PeerState;

/// Where the page is served, as `ovlctl page` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageAddress {
    /// The URL for a browser on this host. Its fragment is the token, which a browser does not send.
    Url(String),
    /// The Unix socket.
    Unix(std::path::PathBuf),
}

/// The answer to a DNS query, as `ovlctl dns` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAnswer {
    /// The queried name.
    pub name: String,
    /// The record type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name of the querying endpoint, or `host`.
    pub from: String,
    /// The response code: `NOERROR`, `NXDOMAIN`, `SERVFAIL`, `REFUSED` and so on.
    pub status: String,
    /// The records.
    pub answers: Vec<DnsRecord>,
    /// The origin of the answer, in a sentence.
    pub why: String,
}

/// A DNS record of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsRecord {
    /// The owner name.
    pub name: String,
    /// The record type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The time to live, in seconds.
    pub ttl: u32,
    /// The record data: an address, a name, or the like.
    pub data: String,
}

/// An error in the form of the CNI specification 1.1.0, section 5, "Error".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// A well-known code, or a code of ovl from 100 on.
    pub code: u32,
    /// A short message.
    pub msg: String,
    /// What is wrong and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

/// A sandbox, as `ovlctl sandbox ls` and `create` print it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxInfo {
    /// The name.
    pub name: String,
    /// The namespace's file. `ip netns exec` takes its last path component.
    pub netns: std::path::PathBuf,
    /// The names of its networks, or `host`, or `none`.
    pub networks: Vec<String>,
    /// The addresses of all its endpoints.
    pub addresses: Vec<IpNet>,
    /// The ids of the processes inside.
    pub processes: Vec<u32>,
    /// Warnings, see [`EndpointInfo::warnings`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The network namespace of a workload on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// A path that it can be opened by.
    pub path: std::path::PathBuf,
    /// Its inode: another one at the path is another workload's.
    pub inode: u64,
    /// A resolv.conf(5) with ovl's resolver as the workload reaches it.
    pub resolv_conf: String,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind, for programs.
    pub kind: FailureKind,
    /// What is wrong and what to do, for people.
    pub message: String,
}

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The request is invalid.
    Invalid,
    /// A named object does not exist.
    NotFound,
    /// A requested resource is taken or in use.
    Conflict,
    /// No address is left.
    Exhausted,
    /// The request cannot succeed now: no majority, or not ready yet.
    Unavailable,
    /// The kernel rejected an operation.
    Kernel,
    /// An internal error of ovld.
    Internal,
}

/// The state of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DaemonState {
    /// The host is not a member yet, or has not caught up with gossip: ovld deletes nothing.
    Starting,
    /// The daemon works and there is no problem.
    Ready,
    /// The daemon works, but there are problems.
    Degraded,
}

/// A problem on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable code such as `OVL-E020`. `docs/problems.md` has a section for each.
    pub code: String,
    /// The severity.
    pub severity: Severity,
    /// The affected object: a host, network, endpoint or file. Empty: the host that reports it.
    pub object: String,
    /// What is wrong and what to do, in one or two sentences.
    pub message: String,
}

/// The severity of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Error,
    /// Everything works, but a failure is likely or something is not as intended.
    Warning,
}

/// The daemon's status, as `ovlctl status` prints it.
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
    /// The problems.
    pub problems: Vec<Problem>,
    /// The address of gossip and streams.
    pub address: SocketAddr,
    /// The VTEP.
    pub vtep: IpAddr,
    /// The time since the daemon started, in seconds.
    pub uptime_s: u64,
    /// The number of members, including this host.
    pub members: u32,
    /// The number of live members, including this host.
    pub alive: u32,
    /// The number of endpoints on this host.
    pub endpoints: u32,
    /// The number of networks in the cluster.
    pub networks: u32,
    /// The rotation of the cluster key in progress, if any.
    pub rotation: Option<KeyRotation>,
    /// Counters of gossip datagrams.
    pub gossip: GossipCounters,
    /// What was relayed between hosts that do not reach each other. `None`: this host takes no part.
    #[serde(default)]
    pub relayed: Option<RelayCounters>,
    /// Whether packets of this host take the fast path.
    #[serde(default)]
    pub fast_path: FastPathStatus,
    /// The state of reconciliation.
    pub reconcile: ReconcileStatus,
}

/// Whether packets of a host take the fast path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FastPathStatus {
    /// Whether the fast path is used, for what it is for.
    pub in_use: bool,
    /// Why it is not, in a sentence.
    pub why_not: Option<String>,
    /// Whether it pauses, because `capture`, `flows` or `trace` look at packets in the stack.
    pub paused: bool,
    /// How its programs are attached to devices: `tcx` or `clsact`. `None` if they are not loaded.
    #[serde(default)]
    pub attached_by: Option<String>,
    /// Packets that took it, by their way: `local`, `direct_out`, `vxlan_out`, `direct_in`, `vxlan_in`. Empty if the programs
    /// are not loaded.
    pub fast: BTreeMap<String, u64>,
    /// Packets that its programs left to the stack, by reason.
    pub slow: BTreeMap<String, u64>,
}

/// Counters of relayed datagrams since the start, and of streams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayCounters {
    /// Datagrams of this host that were sent through members.
    pub sent: u64,
    /// Datagrams for this host that came through members.
    pub received: u64,
    /// Datagrams of other hosts that were passed on.
    pub forwarded: u64,
    /// Dropped: not of this cluster.
    pub dropped_unauthenticated: u64,
    /// Dropped: there is no way to the host, or it has passed too many hosts.
    pub dropped_no_path: u64,
    /// Dropped: the two hosts have sent more than `relay` allows.
    pub dropped_limited: u64,
    /// Dropped: the socket's buffer was full.
    pub dropped_full: u64,
    /// Streams of other hosts that are being passed on now.
    pub streams: u32,
}

/// The numbers of gossip datagrams.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GossipCounters {
    /// Sent.
    pub sent: u64,
    /// Received and valid.
    pub received: u64,
    /// Dropped: not sealed with a known key.
    pub dropped_unauthenticated: u64,
    /// Dropped: duplicate, or too old.
    pub dropped_replayed: u64,
    /// Dropped: authentic but malformed.
    pub dropped_malformed: u64,
    /// The recent sources of unauthenticated datagrams.
    pub strangers: Vec<IpAddr>,
}

/// The state of reconciliation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReconcileStatus {
    /// The number of full passes.
    pub passes: u64,
    /// The number of operations applied.
    pub operations: u64,
    /// The number of these that repaired drift.
    pub repairs: u64,
    /// The objects that the kernel rejects, with its error.
    pub failing: Vec<String>,
}

/// The state of all keys, as `ovlctl key status` prints it: ids of keys, never keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyStatus {
    /// The rotation of the cluster key in progress, if any.
    pub rotation: Option<KeyRotation>,
    /// The names of the hosts that this host waits for during a rotation of any host's tunnel key. `None`: no
    /// rotation.
    pub tunnel_waits_for: Option<Vec<String>>,
    /// All hosts, the local host first, then by name.
    pub hosts: Vec<HostKeys>,
}

/// What is known about the loss of a majority, as `ovlctl recover` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlan {
    /// Whether there can be a recovery on this host.
    pub state: RecoveryState,
    /// The version of the allocation map from which a recovery would start.
    pub version: u64,
    /// How many members are a majority.
    pub needed: u32,
    /// The members, the local host first, then by name.
    pub members: Vec<RecoveryMember>,
    /// Why there can be no recovery now.
    pub refused: Option<String>,
    /// What a recovery may cost, in sentences. Empty if there can be none.
    pub costs: Vec<String>,
    /// The last recovery of this cluster, if it ever was recovered.
    pub last: Option<RecoveryInfo>,
    /// A recovery of this host's cluster by other hosts, which left it out.
    pub left_out: Option<RecoveryInfo>,
}

/// Whether there can be a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryState {
    /// The majority is lost, and nothing is in the way.
    Possible,
    /// There can be none now: see [`RecoveryPlan::refused`].
    Refused,
    /// The cluster was recovered, and a majority of its members is alive: there is nothing to do.
    Recovered,
    /// Other hosts recovered the cluster without this one.
    LeftOut,
}

/// A member, and what becomes of it in a recovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryMember {
    /// The host's name, or its id if its name is not known.
    pub name: String,
    /// The host's id.
    pub id: NodeId,
    /// The host's liveness.
    pub state: PeerState,
    /// Whether it is a member afterwards. If not, it counts as lost.
    pub survives: bool,
    /// When it was last alive, in milliseconds since 1970; `None` for the local host, and if it is not known.
    pub last_alive_ms: Option<u64>,
    /// The number of its address blocks.
    pub blocks: u32,
    /// The number of its endpoints.
    pub endpoints: u32,
    /// Whether this is the local host.
    #[serde(rename = "self")]
    pub own: bool,
}

/// A recovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryInfo {
    /// When it was requested, in milliseconds since 1970.
    pub at_ms: u64,
    /// The name of the host on which it was requested.
    pub by: String,
    /// The id of that host.
    pub by_id: NodeId,
    /// The names of the survivors.
    pub survivors: Vec<String>,
}

/// A rotation of the cluster key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRotation {
    /// The new key's id.
    pub key: ClusterKeyId,
    /// The start of the rotation, in milliseconds since 1970.
    pub since_ms: u64,
    /// The number of live members.
    pub hosts: u32,
    /// The number of live members that have the new key.
    pub have: u32,
    /// The number of live members that seal with it.
    pub seal: u32,
    /// Whether a majority of the members is alive. The rotation needs one to proceed.
    pub majority: bool,
    /// The names of the hosts that the rotation waits for.
    pub waits_for: Vec<String>,
}

/// The keys of a host, as its record states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKeys {
    /// The host's name.
    pub name: String,
    /// The host's id.
    pub id: NodeId,
    /// The host's liveness.
    pub state: PeerState,
    /// Whether a majority has admitted it.
    pub member: bool,
    /// The id of the key that it seals with.
    pub seals: ClusterKeyId,
    /// The ids of the other keys that it opens with.
    pub opens: Vec<ClusterKeyId>,
    /// The tunnel key in the form of `wg`. `None`: the host has no tunnel.
    pub tunnel: Option<TunnelKey>,
    /// Whether a rotation of the tunnel key is in progress: the previous key is still in use.
    pub tunnel_rotating: bool,
    /// Whether this is the local host.
    #[serde(rename = "self")]
    pub own: bool,
}

/// A host, as `ovlctl peers` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// The host's name.
    pub name: String,
    /// The host's id.
    pub id: NodeId,
    /// The address of gossip and streams. Of a host behind NAT: where its gossip comes from, or an address that only names it while that
    /// is not known.
    pub address: SocketAddr,
    /// The VTEP.
    pub vtep: IpAddr,
    /// The host's liveness.
    pub state: PeerState,
    /// The time since the last direct datagram from it, in milliseconds. `None` for the local host, and before the
    /// first.
    pub last_heard_ms: Option<u64>,
    /// The smoothed round-trip time to its daemon, in microseconds.
    pub rtt_us: Option<u64>,
    /// The number of its endpoints.
    pub endpoints: u32,
    /// The release of its ovld.
    pub version: String,
    /// The encryption of traffic of encrypted networks to it: `wireguard (kernel)` or `wireguard (userspace)`, as
    /// this host does it; `none` if there is no such traffic.
    pub encryption: String,
    /// The tunnel to it. `None`: there is none.
    pub tunnel: Option<PeerTunnel>,
    /// Whether this is the local host.
    #[serde(rename = "self")]
    pub own: bool,
    /// Whether a majority has admitted it.
    pub member: bool,
    /// Whether gossip datagrams arrive from it directly, and not only through other hosts.
    pub reachable: bool,
    /// The path MTU to it in bytes, including the outer IP header.
    pub path_mtu: Option<u16>,
    /// The members through which datagrams of encrypted networks and messages to it go, in order, because it does not answer
    /// directly. Empty: they go directly.
    #[serde(default)]
    pub via: Vec<String>,
    /// For how long, in seconds.
    #[serde(default)]
    pub via_s: Option<u64>,
    /// Whether what is sent to it, or to the first of `via`, goes by TCP, because UDP is blocked.
    #[serde(default)]
    pub tcp: bool,
    /// For how long, in seconds.
    #[serde(default)]
    pub tcp_s: Option<u64>,
    /// Why it is not reached directly by UDP. `None` if it is.
    #[serde(default)]
    pub why: Option<String>,
    /// Whether what is exchanged with it crosses NAT; of the local host, whether it is behind NAT.
    #[serde(default)]
    pub nat: bool,
    /// Whether all that is exchanged with it is sealed, because one of the two is not reached at its main address.
    #[serde(default)]
    pub sealed: bool,
    /// The hosts that it says it does not reach directly.
    #[serde(default)]
    pub unreached: Vec<String>,
    /// The paths to it that are probed.
    #[serde(default)]
    pub paths: Vec<PeerPath>,
}

/// A probed path to a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerPath {
    /// How packets of workloads are carried: `vxlan`, or `direct` for a route to the host.
    pub encapsulation: String,
    /// The network by whose device or route the probes pass.
    pub network: String,
    /// The length of the longest packets of workloads, in bytes. Large probes in VXLAN have it.
    pub mtu: u16,
    /// From this host to the other one.
    pub sent: PathDirection,
    /// From the other host to this one.
    pub received: PathDirection,
    /// The smoothed round-trip time, in microseconds. `None` before the first.
    pub rtt_us: Option<u64>,
    /// Whether this host sends packets of workloads to it by the fast path, if it is for them.
    #[serde(default)]
    pub fast: bool,
    /// Why it does not, in a sentence.
    #[serde(default)]
    pub why_not_fast: Option<String>,
}

/// What is known of one direction of a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathDirection {
    /// Whether packets arrive.
    pub state: PathVerdict,
    /// The percentage of recent probes that did not arrive. `None` if it is not known.
    pub loss_percent: Option<u8>,
}

/// Whether packets arrive by a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathVerdict {
    /// It is not known.
    Unknown,
    /// They do.
    Works,
    /// Only small ones do.
    SmallOnly,
    /// None does.
    Broken,
}

/// The tunnel to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerTunnel {
    /// The source of the last authenticated datagram, or else the address in the peer's record.
    pub endpoint: Option<SocketAddr>,
    /// The time since the last handshake, in seconds. `None` before the first.
    pub last_handshake_s: Option<u64>,
    /// The number of bytes sent to it.
    pub sent_bytes: u64,
    /// The number of bytes received from it.
    pub received_bytes: u64,
    /// The smoothed round-trip time through the tunnel between the two kernels, in microseconds.
    pub rtt_us: Option<u64>,
    /// The percentage of recent probes through the tunnel that were not answered.
    pub loss_percent: Option<u8>,
}

/// A block and its use, as `ovlctl subnets` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SubnetUse {
    /// The network's name.
    pub network: String,
    /// The block.
    pub prefix: IpNet,
    /// The name of the host that holds it.
    pub node: String,
    /// The number of addresses in use.
    pub used: u64,
    /// The number of addresses for endpoints.
    pub size: u64,
}

/// An FDB entry, as `ovlctl fdb` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FdbRow {
    /// The network's name.
    pub network: String,
    /// The destination MAC address. The zero address: the flood entry.
    pub mac: Mac,
    /// The output interface.
    pub device: String,
    /// The VTEP of a remote destination.
    pub destination: Option<IpAddr>,
    /// The name of the destination's host.
    pub node: Option<String>,
    /// The name of the destination endpoint.
    pub endpoint: Option<String>,
    /// The addresses of its neighbour entries.
    pub addresses: Vec<IpAddr>,
}

/// A route or an address of a device of ovl, as `ovlctl routes` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// The network's name.
    pub network: String,
    /// The destination.
    pub destination: IpNet,
    /// The next hop.
    pub via: Option<IpAddr>,
    /// The output interface.
    pub device: String,
    /// The destination's host. `None`: the local host.
    pub node: Option<String>,
}

/// The result of a comparison with the kernel, as `ovlctl verify` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// Whether there are no differences.
    pub clean: bool,
    /// The time until nothing differed, in milliseconds. `None` if something still differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_ms: Option<u64>,
    /// The differences; each names the object.
    pub differences: Vec<String>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The kind: `peer`, `network`, `endpoint`, `block`, `kernel`, `problem`.
    pub kind: String,
    /// The affected object.
    pub object: String,
    /// What happened.
    pub message: String,
}

/// A network, as `ovlctl network ls` and `inspect` print it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// The name.
    pub name: String,
    /// The id.
    pub id: NetworkId,
    /// The driver.
    pub driver: Driver,
    /// The mode.
    pub mode: Mode,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The subnets.
    pub subnets: Vec<IpNet>,
    /// The gateway of each subnet. Empty on an internal network.
    pub gateways: Vec<IpAddr>,
    /// The current MTU in bytes.
    pub mtu: u16,
    /// Whether traffic between hosts passes only through the tunnel.
    pub encrypted: bool,
    /// When traffic between hosts passes through the tunnel.
    #[serde(default)]
    pub encrypt: Encrypt,
    /// The hosts to which this host sends through the tunnel, because there is no path in plain text: with [`Encrypt::Auto`] only.
    #[serde(default)]
    pub sealed_to: Vec<String>,
    /// Whether the network has no gateway.
    pub internal: bool,
    /// How a routed network reaches other hosts. `None` on a switched network.
    pub backend: Option<Backend>,
    /// Whether the network is deleted but still has endpoints.
    pub removing: bool,
    /// The number of endpoints in the cluster.
    pub endpoints: u32,
    /// The hosts that have endpoints on it.
    pub nodes: Vec<String>,
    /// The bridge on this host, if any.
    pub bridge: Option<String>,
    /// Whether names resolve on it.
    pub dns: bool,
    /// Whether names outside of the cluster resolve on it, too. Always on a network that is not internal.
    pub external_names: bool,
    /// The multicast groups that endpoints on a switched network have joined. Those that are never followed, such as
    /// 224.0.0.0/24, are left out.
    #[serde(default)]
    pub groups: Vec<GroupInfo>,
    /// The hosts that get the packets of all groups, because they do not follow them.
    #[serde(default)]
    pub all_groups: Vec<String>,
}

/// A multicast group on a switched network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// The address of the group.
    pub group: IpAddr,
    /// The hosts with endpoints that have joined it.
    pub nodes: Vec<String>,
}

/// The state of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// The endpoint is in use.
    Ready,
    /// Its host is dead. The entry is restored when the host returns.
    Suspended,
    /// Its address belongs to another host now, so it is disconnected.
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

/// An endpoint, as `ovlctl endpoints` and `attach` print it.
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
    /// The MAC address of the interface.
    pub mac: Mac,
    /// The addresses, each with the prefix length of its subnet.
    pub addresses: Vec<IpNet>,
    /// Further names that resolve to it.
    pub aliases: Vec<String>,
    /// The labels that selectors match.
    pub labels: BTreeMap<String, String>,
    /// The state.
    pub state: EndpointState,
    /// The interface's name in the workload's namespace. `None` for an endpoint of another host.
    pub ifname: Option<String>,
    /// The host's interface of the veth pair. `None` for an endpoint of another host.
    pub device: Option<String>,
    /// The published ports of its host.
    pub publish: Vec<Published>,
    /// Warnings about what may prevent connections to it, for the client that attached it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Whether Services send it connections.
    pub ready: bool,
    /// Prefixes that it may send from, beside its own addresses.
    #[serde(default)]
    pub allowed: Vec<IpNet>,
    /// MAC addresses that it may send from, beside its own.
    #[serde(default)]
    pub allowed_macs: Vec<Mac>,
    /// The number of frames that it sent and may not send, as far as this host counts them. `None` for an endpoint of
    /// another host.
    #[serde(default)]
    pub refused: Option<u64>,
    /// The pod that it belongs to. `None` if no container runtime named one.
    #[serde(default)]
    pub pod: Option<PodInfo>,
    /// The directions in which it is isolated until its labels are known: `ingress`, `egress`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undecided: Vec<String>,
}

/// The pod of an endpoint. Its namespace is that of the endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// The pod's name.
    pub name: String,
    /// The pod's unique id. Empty if the runtime did not say it.
    pub uid: String,
    /// Whether the v1 Pod and the DNS name of the pod are this endpoint's: no other one of the network fits better.
    pub current: bool,
}

/// A network policy, as `ovlctl policy ls` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// The namespace. Empty for a ClusterNetworkPolicy.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The tier of a ClusterNetworkPolicy: `Admin` or `Baseline`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// The precedence of a ClusterNetworkPolicy within its tier: the lowest number decides first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
    /// The selector in the form of `kubectl -l`. Empty: all pods of the namespace, or of all namespaces.
    pub selects: String,
    /// The directions in which it isolates the selected pods, or has rules about them.
    pub isolates: Vec<String>,
    /// The number of endpoints in the cluster that it selects.
    pub endpoints: u64,
    /// The number of packets to or from its endpoints on this host that no policy allowed. Each packet counts for
    /// every policy that isolates the endpoint.
    pub refused: u64,
    /// The allowed connections, in words: `ingress: from ...`.
    pub rules: Vec<String>,
}

/// The decision of network policies on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyJudgement {
    /// The source.
    pub from: IpAddr,
    /// The destination.
    pub to: IpAddr,
    /// Whether the connection is allowed.
    pub passes: bool,
    /// The decision at the source.
    pub egress: PolicySide,
    /// The decision at the destination.
    pub ingress: PolicySide,
}

/// The decision of the network policies of the source or the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySide {
    /// Whether the connection is allowed there.
    pub passes: bool,
    /// The deciding policies as `NAMESPACE/NAME`, or `NAME` of a ClusterNetworkPolicy: the one that allows or denies the
    /// connection, or all that isolate the endpoint. Empty if the endpoint is not isolated.
    pub policies: Vec<String>,
    /// The number of the rule that allows or denies it, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<u64>,
    /// The reason, in a sentence.
    pub why: String,
}

/// Refused connections, as `ovlctl policy drops` prints them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyDrop {
    /// The deciding policies: `egress` of the source, `ingress` of the destination.
    pub direction: String,
    /// The source.
    pub from: IpAddr,
    /// The source endpoint, as `NAMESPACE/NAME`.
    pub from_endpoint: Option<String>,
    /// The destination.
    pub to: IpAddr,
    /// The destination endpoint, as `NAMESPACE/NAME`.
    pub to_endpoint: Option<String>,
    /// `TCP`, `UDP`, `SCTP`, or the number of another protocol.
    pub protocol: String,
    /// The destination port. `None` for protocols without ports.
    pub port: Option<u16>,
    /// The number of recorded packets.
    pub packets: u64,
    /// The time since the last packet, in milliseconds.
    pub last_ms: u64,
    /// The policies that isolate the endpoint; none of them allows the connection.
    pub policies: Vec<String>,
}
