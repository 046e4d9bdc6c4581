//! Streams through members, to hosts that are not reached directly.
//!
//! A host dials the member, and says in its hello to which host the stream is to be passed on. The member dials that host, or the
//! next member, and copies bytes from then on. Then the host makes the handshake with the other end, through the members, which
//! can neither read nor change what follows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ovl_proto::id::NodeId;
use tokio::sync::broadcast;
use tokio::time::timeout;

use super::Shared;
use super::noise::{self, AuthenticatedStream, Onward, Purpose};
use crate::keys::ClusterKey;
use crate::transport::{Side, Stream};

/// The number of members that a stream passes, at most: as many as a path of relayed datagrams has.
const HOP_LIMIT: u8 = 3;
/// How long the next host may take to answer: the ways to it may have changed, and the first host dials again.
const NEXT: Duration = Duration::from_secs(2);
/// The maximum number of streams that this host passes on, each of which takes two descriptors.
const MAX_PASSED: usize = 512;
/// The number of hosts that may move at one moment until all streams that are passed on end.
const MAX_MOVED: usize = 64;
/// The maximum number of those that one host has dialled.
const MAX_PASSED_FROM: usize = 64;

/// The ways to hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ways {
    /// Whether streams of other hosts are passed on.
    pub relays: bool,
    /// The address of the member through which each host is dialled that is not reached directly.
    pub through: BTreeMap<NodeId, SocketAddr>,
}

/// The streams that this host passes on.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// The number of streams of each host.
    counts: Mutex<BTreeMap<NodeId, usize>>,
    /// Tells of hosts that have moved.
    moved: Moved,
}

/// Tells of hosts that have moved.
#[derive(Debug)]
struct Moved(broadcast::Sender<NodeId>);

impl Default for Moved {
    fn default() -> Self {
        Self(broadcast::Sender::new(MAX_MOVED))
    }
}

impl Passed {
    /// Counts a stream of a host until the returned place is dropped. `None` if there are too many.
    fn enter(&self, from: NodeId) -> Option<Place<'_>> {
        let mut counts = self.counts();
        let own = counts.get(&from).copied().unwrap_or_default();
        if own >= MAX_PASSED_FROM || counts.values().sum::<usize>() >= MAX_PASSED {
            return None;
        }
        counts.insert(from, own + 1);
        Some(Place { passed: self, from })
    }

    /// The number of streams of each host.
    pub(super) fn counts(&self) -> MutexGuard<'_, BTreeMap<NodeId, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the streams to a host behind NAT that is elsewhere now.
    pub(super) fn moved(&self, host: NodeId) {
        // Without a stream, there is no receiver.
        let _ = self.moved.0.send(host);
    }

    /// Completes when one of these hosts has moved, or too many have.
    fn until_moved(&self, hosts: [NodeId; 2]) -> impl Future<Output = ()> + use<> {
        let mut moved = self.moved.0.subscribe();
        async move { while moved.recv().await.is_ok_and(|host| !hosts.contains(&host)) {} }
    }
}

/// The place of one stream.
struct Place<'a> {
    passed: &'a Passed,
    from: NodeId,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut counts = self.passed.counts();
        if let Some(count) = counts.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

/// Connects to a host: directly, or through members. Returns the address of the member with it.
///
/// # Errors
///
/// The host or the member does not answer, or the member refuses.
pub(super) async fn connect(
    shared: &Shared,
    to: NodeId,
    direct: SocketAddr,
    key: &ClusterKey,
) -> anyhow::Result<(Box<dyn Stream>, Option<SocketAddr>)> {
    let through = shared.ways().through.get(&to).copied();
    Ok((connect_by(shared, to, direct, through, key, HOP_LIMIT).await?, through))
}

async fn connect_by(
    shared: &Shared,
    to: NodeId,
    direct: SocketAddr,
    through: Option<SocketAddr>,
    key: &ClusterKey,
    hop_limit: u8,
) -> anyhow::Result<Box<dyn Stream>> {
    let mut stream = shared.connect(through.unwrap_or(direct)).await?;
    stream.tune(if shared.behind_nat { Side::Hidden } else { Side::Dialled })?;
    if through.is_some() {
        let Some(hop_limit) = hop_limit.checked_sub(1) else { bail!("it has passed too many hosts") };
        let onward = Purpose::Onward(Onward { to, hop_limit });
        noise::dial(&mut *stream, key, &shared.identity, &shared.record(), onward)
            .await
            .context("the relay refuses the stream")?;
    }
    Ok(stream)
}

/// Passes a stream on until one of its ends closes it.
///
/// # Errors
///
/// This host does not relay, or not to that host, or has too many streams, or one of the ends fails.
pub(super) async fn pass_on(
    mut stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    onward: Onward,
    shared: &Shared,
) -> anyhow::Result<()> {
    let from = secured.record.id;
    let (relays, through) = {
        let ways = shared.ways();
        (ways.relays, ways.through.get(&onward.to).copied())
    };
    ensure!(relays, "this host does not relay");
    ensure!(through != Some(secured.record.address), "the stream would go back to where it came from");
    let direct = shared.address_of(onward.to).context("a stream is to go to a host that is not known")?;
    let _place = shared.passed.enter(from).context("too many streams are passed on")?;
    let keyring = shared.keyring();
    let key = keyring.get(secured.key).context("the cluster key was dropped")?;
    let moved = shared.passed.until_moved([from, onward.to]);
    let connecting = connect_by(shared, onward.to, direct, through, key, onward.hop_limit);
    let mut next = timeout(NEXT, connecting).await.context("the next host does not answer")??;
    tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut *stream, &mut *next) => copied.map(drop)?,
        () = moved => bail!("one of the two hosts has moved"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_and_all_of_them_have_a_limit_of_streams_that_are_passed_on() {
        let passed = Passed::default();
        let enter = |host: usize, count: usize| -> Vec<Place<'_>> {
            let from = NodeId([u8::try_from(host).unwrap(); 10]);
            (0..count).map_while(|_| passed.enter(from)).collect()
        };
        let first = enter(1, 100);
        assert_eq!(first.len(), MAX_PASSED_FROM);
        let others: Vec<Vec<Place<'_>>> = (2..20).map(|host| enter(host, 50)).collect();
        assert_eq!(first.len() + others.iter().map(Vec::len).sum::<usize>(), MAX_PASSED);
        drop(first);
        assert_eq!(enter(20, 100).len(), MAX_PASSED_FROM);
        drop(others);
        assert!(passed.counts().is_empty());
    }
}
