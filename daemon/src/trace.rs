//! Traces: the way of a packet from one end to the other, as it should be and as a probe was seen on it.
//!
//! [`Traces`] owns the parts of traces that are in flight on this host: what was asked of other hosts, and what is being
//! watched for them. What is decided has no state: [`question`] finds the ends, [`model`] and
//! [`arrive`] the steps of the way, and [`compare`] the verdict.

pub(crate) mod arrive;
pub(crate) mod compare;
pub(crate) mod model;
pub(crate) mod question;
pub(crate) mod step;

use std::collections::HashMap;

use ovl_control::{Trace, TraceRequest};
use ovl_dataplane::passage::{Passage, ProbeKind};
use ovl_kernel::TraceWatch;
use ovl_proto::id::NodeId;
use serde::{Deserialize, Serialize};

use self::step::{Arrival, Step};
use crate::asked::Asked;
use crate::slots::{ClientSlot, ClientSlots};

/// The maximum number of traces in which a host takes part at a time.
pub(crate) const MOST: usize = 8;
/// The maximum number of questions of other hosts that are answered at a time: each reads the kernel's entries.
const MOST_ANSWERS: usize = 16;
/// The maximum number of watches of one trace on a host.
const MOST_WATCHES: usize = 8;

/// What one host asks another one for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// To run a trace whose sender is there.
    Run(TraceRequest),
    /// What becomes of a packet that arrives there, and to watch for the probe if `watch` is set.
    Arm {
        /// The cookie of the probe.
        cookie: u32,
        /// What arrives.
        arrival: Arrival,
        /// What the probe is.
        kind: ProbeKind,
        /// Whether a probe will be sent.
        watch: bool,
    },
    /// What was seen of a probe. This ends the watch.
    Collect {
        /// The cookie of the probe.
        cookie: u32,
    },
}

/// The answer to an [`Ask`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    /// To [`Ask::Run`].
    Trace(Box<Trace>),
    /// To [`Ask::Arm`]: the steps, and whether the destination is a workload.
    Armed(Vec<Step>, bool),
    /// To [`Ask::Collect`].
    Collected(Box<Passage>),
}

/// The parts of traces that are in flight.
#[derive(Debug)]
pub(crate) struct Traces {
    /// What other hosts were asked for.
    pub asked: Asked<Result<String, String>>,
    /// What is watched, by the host that asked for it and the cookie of the probe. Each backend of a Service has a watch.
    watched: HashMap<(NodeId, u32), Watched>,
    running: ClientSlots,
    answering: ClientSlots,
}

impl Traces {
    /// None yet. For `last` see [`Asked::new`].
    pub(crate) fn new(last: u64) -> Self {
        Self {
            asked: Asked::new(last),
            watched: HashMap::new(),
            running: ClientSlots::new(MOST),
            answering: ClientSlots::new(MOST_ANSWERS),
        }
    }

    /// Begins to answer a question of another host. `None` if there are too many.
    pub(crate) fn begin_answer(&self) -> Option<ClientSlot> {
        self.answering.take()
    }

    /// Begins a trace, or a part of one. `None` if there are too many.
    pub(crate) fn begin(&self) -> Option<ClientSlot> {
        self.running.take()
    }

    /// Whether a host watches for a probe already.
    pub(crate) fn is_watched(&self, by: NodeId, cookie: u32) -> bool {
        self.watched.contains_key(&(by, cookie))
    }

    /// Keeps a watch for a host, unless it has too many. `slot` is that of the trace if it began with this watch.
    pub(crate) fn keep(&mut self, by: NodeId, cookie: u32, watch: TraceWatch, slot: Option<ClientSlot>) {
        let watched = self.watched.entry((by, cookie)).or_default();
        if watched.watches.len() < MOST_WATCHES {
            watched.watches.push(watch);
            watched.slots.extend(slot);
        }
    }

    /// Ends the part of this host in a trace, and returns its watches. `None` if there are none.
    pub(crate) fn take(&mut self, by: NodeId, cookie: u32) -> Option<Vec<TraceWatch>> {
        self.watched.remove(&(by, cookie)).map(|watched| watched.watches)
    }
}

/// What is watched for one probe.
#[derive(Debug, Default)]
struct Watched {
    watches: Vec<TraceWatch>,
    slots: Vec<ClientSlot>,
}
