//! Connections that a host behind NAT lends: others cannot dial it, so it dials them, and they use the connection as if they had.
//!
//! The hello says that the connection is lent. Then both wait, and the borrower begins with the handshake of a dialler when it has a
//! use for it: a stream of its own, or one that it passes on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use ovl_proto::id::NodeId;
use ovl_proto::record::named_by;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::noise::{self, Purpose};
use super::{HANDSHAKE, Shared, inbound};
use crate::transport::{Side, Stream};

/// The maximum number of hosts that lend connections.
const MAX_LENDERS: usize = 1024;
/// The pause after a connection could not be lent.
const AGAIN: Duration = Duration::from_secs(1);

/// Idle connections that other hosts have lent to this one.
#[derive(Default)]
pub(super) struct Lent {
    /// One of each host: it lends another one when it is used, or lost.
    idle: Mutex<BTreeMap<NodeId, Box<dyn Stream>>>,
    /// Another one has come.
    more: Notify,
}

impl Lent {
    fn idle(&self) -> MutexGuard<'_, BTreeMap<NodeId, Box<dyn Stream>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection that a host lends. It is closed if there are too many.
    pub(super) fn put(&self, from: NodeId, stream: Box<dyn Stream>) {
        let mut idle = self.idle();
        if idle.len() >= MAX_LENDERS && !idle.contains_key(&from) {
            return;
        }
        idle.insert(from, stream);
        drop(idle);
        self.more.notify_waiters();
    }

    /// The connection that a host has lent. Waits for one.
    async fn take(&self, from: NodeId) -> Box<dyn Stream> {
        loop {
            self.came(from).await;
            if let Some(stream) = self.idle().remove(&from) {
                return stream;
            }
        }
    }

    /// Completes when a host has lent a connection that is not used.
    pub(super) async fn came(&self, from: NodeId) {
        loop {
            // Before the look, so that none is missed.
            let more = self.more.notified();
            if self.idle().contains_key(&from) {
                return;
            }
            more.await;
        }
    }

    /// Closes the connections of a host.
    pub(super) fn forget(&self, host: NodeId) {
        self.idle().remove(&host);
    }

    /// Closes the connections of all hosts but these.
    pub(super) fn retain(&self, is_known: impl Fn(NodeId) -> bool) {
        self.idle().retain(|host, _| is_known(*host));
    }
}

impl Shared {
    /// Opens a connection to an address: that which a host behind NAT has lent, if the address only names one.
    ///
    /// # Errors
    ///
    /// What the kernel reports, and a timeout if the host lends none.
    pub(super) async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        match named_by(to.ip()) {
            Some(host) => Ok(timeout(HANDSHAKE, self.lent.take(host)).await?),
            None => {
                let at = self.ends().get(&to).copied().unwrap_or(to);
                self.transport.connect(at).await
            }
        }
    }
}

/// The hosts to which this one lends connections, each with the task that does.
#[derive(Default)]
pub(super) struct Lending {
    tasks: BTreeMap<SocketAddr, JoinSet<()>>,
}

impl Lending {
    /// Lends connections to the hosts at these addresses from now on, and to no others.
    pub(super) fn set(&mut self, to: &BTreeSet<SocketAddr>, shared: &Arc<Shared>) {
        self.tasks.retain(|address, _| to.contains(address));
        for address in to {
            self.tasks.entry(*address).or_insert_with(|| {
                let mut tasks = JoinSet::new();
                tasks.spawn(lend(*address, Arc::clone(shared)));
                tasks
            });
        }
    }
}

/// Lends a connection at a time to the host at an address, forever. What comes on it is served as if that host had dialled.
async fn lend(to: SocketAddr, shared: Arc<Shared>) {
    let mut used = JoinSet::new();
    loop {
        match lend_one(to, &shared).await {
            Ok((stream, secured)) => {
                let shared = Arc::clone(&shared);
                used.spawn(async move { inbound::serve(stream, secured, to, &shared).await });
            }
            Err(error) => {
                debug!(%to, "cannot lend a connection: {error:#}");
                tokio::time::sleep(AGAIN).await;
            }
        }
        while used.try_join_next().is_some() {}
    }
}

async fn lend_one(
    to: SocketAddr,
    shared: &Shared,
) -> anyhow::Result<(Box<dyn Stream>, noise::AuthenticatedStream)> {
    let dialled = async {
        let mut stream = shared.connect(to).await?;
        stream.tune(Side::Hidden)?;
        let (keyring, record) = (shared.keyring(), shared.record());
        let key = keyring.sealing();
        noise::dial(&mut *stream, key, &shared.identity, &record, Purpose::Lend).await?;
        anyhow::Ok(stream)
    };
    let mut stream = timeout(HANDSHAKE, dialled).await.context("no answer")??;
    // It may be idle for long. The connection fails when the host is gone.
    let (keyring, record) = (shared.keyring(), shared.record());
    let secured = noise::listen(&mut *stream, &keyring, &shared.identity, &record).await?;
    Ok((stream, secured))
}
