//! The requests and replies of `ovlctl capture`.

use serde::{Deserialize, Serialize};

use ovl_proto::capture::{CaptureBatch, CaptureProgram, PointKind};
use ovl_proto::resource::Protocol;

/// Whose packets to capture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CaptureTarget {
    /// An endpoint, a network or a Service: the first that has the name.
    Any {
        /// NAME or NAMESPACE/NAME, or the address of an endpoint.
        name: String,
    },
    /// An endpoint.
    Endpoint {
        /// NAME or NAMESPACE/NAME, or an address.
        name: String,
    },
    /// A network: all of its endpoints, and what passes between hosts.
    Network {
        /// The name or id.
        name: String,
    },
    /// A Service: packets to its addresses, and of its backends at their ports.
    Service {
        /// NAME or NAMESPACE/NAME.
        name: String,
    },
    /// What passes between two hosts, in and out of encapsulation.
    Pair {
        /// The names of the hosts.
        hosts: [String; 2],
    },
    /// What passes between two ends, at both.
    Flow {
        /// The one that connects: as the sender of a trace.
        from: String,
        /// The other one: as the destination of a trace.
        to: String,
        /// The port of the destination. `None`: all packets.
        #[serde(default)]
        port: Option<u16>,
        /// The protocol of the port.
        #[serde(default)]
        protocol: Protocol,
    },
}

/// What a capture will do: which packets are meant, as expressions of pcap-filter(7), which the client compiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturePlan {
    /// What is captured, for people.
    pub what: String,
    /// The names of the hosts that take part.
    pub hosts: Vec<String>,
    /// The packets that are meant, by the kind of device. For a kind that is not listed: all.
    pub scopes: Vec<CaptureScope>,
}

/// The packets that are meant at devices of some kinds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureScope {
    /// The kinds of devices.
    pub kinds: Vec<PointKind>,
    /// The expression. Empty: all packets.
    pub expression: String,
    /// The VXLAN packets that may be there, in which a filter looks as well.
    #[serde(default)]
    pub carries: Vec<Encapsulated>,
}

/// VXLAN packets at a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encapsulated {
    /// The UDP port.
    pub port: u16,
    /// Whether they are sent over IPv4.
    pub ipv4: bool,
}

/// Asks for captured packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Whose packets.
    pub target: CaptureTarget,
    /// The filters. At a device without one all packets are captured.
    #[serde(default)]
    pub programs: Vec<CaptureProgram>,
    /// The number of bytes of each packet that are kept where there is no filter.
    pub snaplen: u32,
    /// How long to capture at most, in seconds.
    pub seconds: u32,
}

/// What a host captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedFrom {
    /// The name of the host.
    pub host: String,
    /// What is added to its times to get those of the host that was asked, in nanoseconds.
    pub offset_ns: i64,
    /// What it captured.
    pub batch: CaptureBatch,
}
