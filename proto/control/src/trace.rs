//! The request and the reply of `ovlctl trace`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use ovl_proto::resource::Protocol;

/// Asks why a packet arrives or does not: see [`crate::Request::Trace`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceRequest {
    /// The sender: an endpoint of any host, as NAME or NAMESPACE/NAME or by an address; `host`, or the name of a host.
    pub from: String,
    /// The destination: an endpoint or a Service, as NAME or NAMESPACE/NAME; a host's name or `host`; a name in DNS; an
    /// address, also one outside of the cluster.
    pub to: String,
    /// The destination port. `None`: an ICMP echo request.
    #[serde(default)]
    pub port: Option<u16>,
    /// The protocol of the port.
    #[serde(default)]
    pub protocol: Protocol,
    /// Whether only the model is asked, and no packet is sent.
    #[serde(default)]
    pub no_probe: bool,
}

/// The way of a packet, as it should be and as a probe was seen on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The sender: name, address and host.
    pub from: String,
    /// The destination: name, address and host.
    pub to: String,
    /// `icmp`, or a port such as `tcp/80`.
    pub protocol: String,
    /// Whether the packet arrived: what the probe showed, or without a probe what the model says.
    pub arrived: bool,
    /// Why it did not arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do next, if it did not arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// Which other packets do not arrive, though this one did: large ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited: Option<String>,
    /// What the model says.
    pub model: TraceVerdict,
    /// What the probe showed. `None` if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<TraceVerdict>,
    /// Whether the two agree. The model may leave open what it cannot know.
    pub agree: bool,
    /// The backend of a Service, or of a port of a host, that received the probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<IpAddr>,
    /// The hops, in the order of the way.
    pub hops: Vec<TraceHop>,
    /// What could not be looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A verdict on the whole way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceVerdict {
    /// Whether the packet arrives and, where an answer is expected, is answered. `None`: it cannot be known.
    pub arrives: Option<bool>,
    /// The reason, in a sentence.
    pub why: String,
}

/// A hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceHop {
    /// The name of the host on which it is.
    pub host: String,
    /// What it is.
    pub stage: TraceStage,
    /// What the model says.
    pub model: TraceState,
    /// Whether the probe was seen there, with the time since it was first seen on that host in microseconds. `None` if a
    /// packet cannot be seen at this hop, or there was no probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<TraceSeen>,
    /// What it is, and why it passes or stops the packet, in a sentence.
    pub detail: String,
    /// The command that shows the same on that host.
    pub command: String,
}

/// The kinds of hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceStage {
    /// The interface in the namespace of the sender.
    Sender,
    /// The name of the destination.
    Name,
    /// What endpoints may send.
    SourceCheck,
    /// Address translation for a Service.
    Service,
    /// Network policies of the sender.
    EgressPolicy,
    /// Isolation of networks from each other.
    Isolation,
    /// The route.
    Route,
    /// The neighbour entry.
    Neighbour,
    /// The FDB entry.
    Fdb,
    /// The packet leaves the host.
    Leaves,
    /// The liveness of the host to which it goes.
    Host,
    /// The packet reaches the other host.
    Enters,
    /// The packet comes out of VXLAN or the tunnel.
    Decapsulated,
    /// A published port of the host.
    PublishedPort,
    /// Network policies of the destination.
    IngressPolicy,
    /// The interface of the destination on its host.
    Delivery,
    /// The destination itself: its interface, and what listens.
    Destination,
    /// The way of the answer.
    Answer,
}

/// What the model says of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceState {
    /// The packet passes.
    Passes,
    /// The packet ends here.
    Stops,
    /// The model cannot know.
    Unknown,
}

/// Whether the probe was seen at a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceSeen {
    /// Whether it was.
    pub seen: bool,
    /// The time since the probe was first seen on the same host, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_us: Option<u64>,
}
