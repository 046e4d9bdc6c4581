//! The cluster at one moment, as `ovlctl top` and the page show it.

use serde::{Deserialize, Serialize};

use crate::info::{DaemonState, EndpointInfo, NetworkInfo, PeerInfo, PeerPath, Problem};
use crate::resources::ServiceBackends;
use ovl_proto::id::NodeId;
use ovl_proto::record::PeerState;

/// What the cluster consists of, as one host knows it without asking another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Overview {
    /// The name of the host that says so.
    pub node: String,
    /// The time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The hosts, the local host first, then by name.
    pub hosts: Vec<PeerInfo>,
    /// The networks, by name.
    pub networks: Vec<NetworkInfo>,
    /// The endpoints, by network and name.
    pub endpoints: Vec<EndpointInfo>,
    /// The Services with their backends, by namespace and name.
    pub services: Vec<ServiceBackends>,
}

/// What the members say of themselves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reports {
    /// The reports, that of the local host first, then by host.
    pub hosts: Vec<HostReport>,
    /// The names of the members that did not answer.
    pub unanswered: Vec<String>,
}

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// The host's name.
    pub host: String,
    /// The time of its counters, in milliseconds of that run of its daemon. Rates are differences of two reports over
    /// the difference of their times.
    pub at_ms: u64,
    /// The number of that run. A report of another run is not compared with it.
    pub run: u64,
    /// The state of its daemon.
    pub state: DaemonState,
    /// Its problems.
    pub problems: Vec<Problem>,
    /// How it sees each other host.
    pub pairs: Vec<Pair>,
    /// The counters of its endpoints, at most [`MAX_COUNTED`].
    pub endpoints: Vec<EndpointCounters>,
}

/// The most endpoints of a host whose counters are in a report.
pub const MAX_COUNTED: usize = 2_000;

/// How one host sees another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The other host's name.
    pub to: String,
    /// The other host's id.
    pub id: NodeId,
    /// The other host's liveness.
    pub state: PeerState,
    /// Whether gossip datagrams arrive from it directly.
    pub reachable: bool,
    /// The round trip to its daemon, in microseconds.
    pub rtt_us: Option<u64>,
    /// The encryption of traffic of encrypted networks to it, as in [`PeerInfo::encryption`].
    pub encryption: String,
    /// The percentage of recent probes through the tunnel that were not answered. `None`: no tunnel, or not known.
    pub tunnel_loss_percent: Option<u8>,
    /// The paths to it that are probed.
    pub paths: Vec<PeerPath>,
}

/// What passed an endpoint since it was created, as the workload sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointCounters {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The network's name.
    pub network: String,
    /// Bytes that it sent.
    pub sent_bytes: u64,
    /// Bytes that it received.
    pub received_bytes: u64,
    /// Packets that it sent.
    pub sent_packets: u64,
    /// Packets that it received.
    pub received_packets: u64,
    /// Packets that its device dropped.
    pub dropped_packets: u64,
    /// Frames that it sent and may not send.
    pub refused_frames: u64,
    /// Packets to or from it that no network policy allowed.
    pub policy_packets: u64,
}

impl EndpointCounters {
    /// Returns how many packets were lost to this endpoint for whatever reason that is counted.
    #[must_use]
    pub fn drops(&self) -> u64 {
        self.dropped_packets.saturating_add(self.refused_frames).saturating_add(self.policy_packets)
    }
}
