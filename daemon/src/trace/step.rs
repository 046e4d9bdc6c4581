//! The steps of a packet's way, as the model says them, and where a probe can be seen at each.

use std::net::IpAddr;

use ovl_control::{TraceStage, TraceState};
use ovl_dataplane::passage::{PacketKind, Passage, Sighting};
use serde::{Deserialize, Serialize};

/// A step on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Step {
    /// What it is.
    pub stage: TraceStage,
    /// Whether the packet passes.
    pub state: TraceState,
    /// What it is, and why it passes or stops the packet.
    pub detail: String,
    /// The command that shows the same on this host.
    pub command: String,
    /// What to do if it stops the packet. May be empty.
    pub advice: String,
    /// Where the packet can be seen. `None` if it cannot.
    pub spot: Option<Spot>,
}

impl Step {
    /// A step that the packet passes.
    pub(crate) fn passes(stage: TraceStage, detail: impl Into<String>, command: impl Into<String>) -> Self {
        let (detail, command) = (detail.into(), command.into());
        Self { stage, state: TraceState::Passes, detail, command, advice: String::new(), spot: None }
    }

    /// A step that the packet does not pass.
    pub(crate) fn stops(
        stage: TraceStage,
        detail: impl Into<String>,
        command: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let advice = advice.into();
        Self { state: TraceState::Stops, advice, ..Self::passes(stage, detail, command) }
    }

    /// A step of which it is not known whether the packet passes.
    pub(crate) fn unknown(stage: TraceStage, detail: impl Into<String>, command: impl Into<String>) -> Self {
        Self { state: TraceState::Unknown, ..Self::passes(stage, detail, command) }
    }

    /// The same, where a packet can be seen there.
    pub(crate) fn at(self, spot: Spot) -> Self {
        Self { spot: Some(spot), ..self }
    }
}

/// Where a packet can be seen on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Spot {
    /// At the interface in the namespace of the workload, which sends it (`true`) or receives it.
    Inside(bool),
    /// At a device of the host, which sends it (`true`) or receives it.
    Device(String, bool),
    /// At a device of the host that is not of ovl.
    Underlay {
        /// Whether the device sends it.
        outgoing: bool,
        /// Whether it is in VXLAN.
        in_vxlan: bool,
    },
    /// At any device of the host that receives it.
    Received,
}

impl Spot {
    /// Whether a packet was seen here.
    pub(crate) fn fits(&self, seen: &Sighting) -> bool {
        let is_loopback = seen.device == "lo";
        match self {
            Self::Inside(outgoing) => {
                seen.inside && seen.outgoing == *outgoing && (*outgoing || !is_loopback)
            }
            Self::Device(name, outgoing) => {
                !seen.inside && seen.device == *name && seen.outgoing == *outgoing
            }
            Self::Underlay { outgoing, in_vxlan } => {
                !seen.inside
                    && !is_own(&seen.device)
                    && !is_loopback
                    && seen.outgoing == *outgoing
                    && seen.outer.is_some() == *in_vxlan
            }
            Self::Received => !seen.inside && !seen.outgoing,
        }
    }

    /// Returns the first time at which the probe was seen here.
    pub(crate) fn first(&self, passage: &Passage) -> Option<u64> {
        let probes = passage.sightings.iter().filter(|seen| seen.kind == PacketKind::Probe);
        probes.filter(|seen| self.fits(seen)).map(|seen| seen.at_us).min()
    }
}

/// Whether a device has a name of ovl.
fn is_own(device: &str) -> bool {
    ovl_dataplane::device::Device::new(device).is_some_and(|device| device.role().is_some())
}

/// How a packet gets from one host to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Carriage {
    /// It stays on the host.
    Local,
    /// In VXLAN, by this device.
    Vxlan(String),
    /// In the tunnel, by these devices: the tunnel's, and the VXLAN device of a switched network.
    Tunnel(Option<String>, Option<String>),
    /// As it is.
    Plain,
}

/// Where a packet goes that leaves the host, or stays there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Arrival {
    /// The source, as the destination sees it.
    pub source: IpAddr,
    /// The destination.
    pub to: IpAddr,
    /// How it gets there.
    pub carriage: Carriage,
}
