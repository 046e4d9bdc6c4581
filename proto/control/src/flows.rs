//! The request and replies of `ovlctl flows`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Whose flows are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowsOf {
    /// Those of the host that is asked.
    #[default]
    Here,
    /// Those of a host with this name.
    Host(String),
    /// Those of all members.
    All,
}

/// Who talks to whom on a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// The name of the host.
    pub host: String,
    /// The time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The flows: those with the most connections first.
    pub flows: Vec<Flow>,
    /// Whether there were more than can be told.
    #[serde(default)]
    pub incomplete: bool,
    /// Why there are none of this host. `None`: there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Connections between the same ends, at the same port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The source.
    pub from: IpAddr,
    /// What the source is: `NAMESPACE/NAME` of an endpoint, `host NAME`. `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_name: Option<String>,
    /// The destination that the source knows.
    pub to: IpAddr,
    /// What the destination is; also `Service NAMESPACE/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_name: Option<String>,
    /// `TCP`, `UDP`, `SCTP`, `ICMP` or the number of another protocol.
    pub protocol: String,
    /// The destination port. `None` for protocols without ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The address and port after the translation for a Service or a published port, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<(IpAddr, u16)>,
    /// What the backend is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_name: Option<String>,
    /// What became of it.
    pub verdict: FlowVerdict,
    /// The policies that decide: with a rule that lets it pass, or those that isolate an end and let it not pass. Empty: none
    /// is about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
    /// What decides, in a sentence, such as the rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Connections that began; without `follow`, connections that there are.
    pub opened: u64,
    /// Connections that ended.
    pub closed: u64,
    /// Packets that were dropped.
    pub dropped: u64,
    /// Bytes from the source. `None`: not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Bytes back to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
}

/// What became of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowVerdict {
    /// They passed.
    Passed,
    /// Network policies dropped packets.
    Dropped,
}
