//! The state that all threads of an engine share.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use ovl_metrics::Durations;
use ovl_zone::{Client, Zone};

use crate::resolv::Upstreams;
use crate::servers::FailingServer;
use crate::share::{Limited, Share};

/// The kind of the clients at a listening address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenRole {
    /// Endpoints, which the zone knows by their addresses.
    Endpoints,
    /// The host itself.
    Host,
    /// Programs of the host that have no other resolver.
    HostOnly,
}

impl ListenRole {
    #[inline]
    pub(crate) fn client(self, from: IpAddr) -> Client {
        match self {
            Self::Endpoints => Client::Endpoint(from),
            Self::Host => Client::Host,
            Self::HostOnly => Client::HostOnly,
        }
    }
}

/// The counters behind [`crate::Stats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) answered: AtomicU64,
    pub(crate) ignored: AtomicU64,
    pub(crate) cached: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) limited: AtomicU64,
}

/// The state that all threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) zone: ArcSwap<Zone>,
    pub(crate) counters: Counters,
    pub(crate) failing: ArcSwap<Vec<FailingServer>>,
    /// What resolv.conf says. `None` until it was read.
    pub(crate) upstreams: ArcSwapOption<Upstreams>,
    pub(crate) limited: Mutex<Limited>,
    /// How long forwarded questions took, answered or not.
    pub(crate) waits: Mutex<Durations>,
    pub(crate) ending: AtomicBool,
}

impl Shared {
    /// Counts and remembers that an asker has used up a share.
    pub(crate) fn note_limited(&self, asker: Client, share: Share) {
        self.counters.limited.fetch_add(1, Relaxed);
        let mut limited = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
        limited.note(asker, share, Instant::now());
    }
}
