//! The state that all threads of an engine share.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use ovl_metrics::Durations;
use ovl_zone::{Client, Zone};
use tokio::sync::{mpsc, oneshot};

use crate::answer::Target;
use crate::resolv::Upstreams;
use crate::servers::FailingServer;
use crate::share::{Limited, Share};
use crate::told::{self, Found, Recent, Told};
use crate::wire::Query;

/// How long an answer waits until its addresses are noted. Clients ask again after five seconds.
const TELL_WITHIN: Duration = Duration::from_secs(1);

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
    pub(crate) late: AtomicU64,
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
    /// Who is told of addresses of names that clients are watched for.
    pub(crate) told: Option<mpsc::Sender<Told>>,
    /// What was told lately.
    pub(crate) recent: Mutex<Recent>,
    pub(crate) ending: AtomicBool,
}

impl Shared {
    /// Returns what an answer tells a client of names that it is watched for, unless the same was told lately. `message` is the
    /// query; see [`told::find`] for the others.
    pub(crate) fn find(
        &self,
        zone: &Zone,
        client: Client,
        message: &[u8],
        alias: Option<&Target>,
        is_own: bool,
        answer: &[u8],
    ) -> Option<Found> {
        if self.told.is_none() || zone.watched(client).is_empty() {
            return None;
        }
        let asked = Query::read(message).ok()?.name;
        let found = told::find(zone, client, &asked, alias, is_own, answer)?;
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        (!recent.has(&found, Instant::now())).then_some(found)
    }

    /// Makes addresses known, and waits until they are noted, but not for long.
    pub(crate) async fn tell(&self, found: Found) {
        let Some(told) = &self.told else { return };
        let (noted, done) = oneshot::channel();
        let told = async {
            let sent = told.send(Told { found: found.clone(), noted }).await;
            sent.is_ok() && done.await.is_ok()
        };
        match tokio::time::timeout(TELL_WITHIN, told).await {
            Ok(true) => {
                let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
                recent.note(&found, Instant::now());
            }
            Ok(false) => {}
            Err(_) => {
                self.counters.late.fetch_add(1, Relaxed);
            }
        }
    }

    /// Counts and remembers that an asker has used up a share.
    pub(crate) fn note_limited(&self, asker: Client, share: Share) {
        self.counters.limited.fetch_add(1, Relaxed);
        let mut limited = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
        limited.note(asker, share, Instant::now());
    }
}
