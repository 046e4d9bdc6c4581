//! Sealing of datagrams: AES-256-GCM, with a key for each run of each sender.
//!
//! A run draws 16 random bytes and derives its key from them and the cluster key, so a counter
//! from 0 is a safe nonce: no state must outlive the process, and no two senders share a key. The
//! receiver derives the same key from the header.
//!
//! ```text
//! version (1) | key id (4) | run (16) | counter (8, big endian) | ciphertext | tag (16)
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::wire;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::Instant;

use super::replay::ReplayWindow;
use crate::keys::{ClusterKey, Keyring};

/// Names a run of a sender.
pub(super) type RunId = [u8; 16];

/// In front of the ciphertext.
pub(super) const HEADER: usize = 1 + 4 + 16 + 8;
/// Behind the ciphertext.
const TAG: usize = 16;
/// What sealing adds to a plaintext.
pub(super) const OVERHEAD: usize = HEADER + TAG;

/// No more runs than this are remembered; the one that was heard the longest ago goes first.
const MAX_RUNS: usize = 4096;

/// Why a datagram was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too short, or of another version.
    Foreign,
    /// Sealed with a key that we do not have.
    UnknownKey,
    /// The key is known, and the seal is broken.
    BadSeal,
    /// Seen before, or too old.
    Replayed,
}

/// Seals what this run sends.
pub(super) struct Sealer {
    key: LessSafeKey,
    key_id: ClusterKeyId,
    run: RunId,
    counter: u64,
}

impl Sealer {
    /// A new run.
    pub(super) fn new(cluster: &ClusterKey) -> anyhow::Result<Self> {
        let mut run = RunId::default();
        SystemRandom::new()
            .fill(&mut run)
            .map_err(|_| anyhow::anyhow!("the kernel gave no random numbers"))?;
        let key = run_key(cluster, &run).ok_or_else(|| anyhow::anyhow!("no AES-256-GCM"))?;
        Ok(Self { key, key_id: cluster.id(), run, counter: 0 })
    }

    pub(super) fn run(&self) -> RunId {
        self.run
    }

    /// The cluster key that it was made from.
    pub(super) fn key_id(&self) -> ClusterKeyId {
        self.key_id
    }

    /// Seals `plaintext` into `out`, whose former content is lost.
    pub(super) fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Option<()> {
        out.clear();
        out.push(wire::VERSION);
        out.extend_from_slice(&self.key_id.0);
        out.extend_from_slice(&self.run);
        out.extend_from_slice(&self.counter.to_be_bytes());
        out.extend_from_slice(plaintext);
        let (header, text) = out.split_at_mut(HEADER);
        let tag = self.key.seal_in_place_separate_tag(nonce(self.counter), Aad::from(&*header), text).ok()?;
        out.extend_from_slice(tag.as_ref());
        self.counter += 1;
        Some(())
    }
}

/// Opens what others sent.
pub(super) struct Opener {
    keyring: Arc<Keyring>,
    runs: HashMap<RunId, Run>,
    clock: u64,
}

struct Run {
    /// The cluster key that it is sealed with.
    cluster: ClusterKeyId,
    key: LessSafeKey,
    window: ReplayWindow,
    used: u64,
    sender: Sender,
    /// The nonce that the sender was asked for.
    asked: Option<u64>,
}

/// What is known of the sender of a run. What it seals could be a recording, played to a receiver
/// that is younger than it; only one that answers a new nonce is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    New,
    /// It was asked for an answer.
    Asked(Instant),
    /// It has answered, as this node.
    Proved(NodeId),
}

impl Opener {
    pub(super) fn new(keyring: Arc<Keyring>) -> Self {
        Self { keyring, runs: HashMap::new(), clock: 0 }
    }

    /// Opens with these keys from now on. Runs that were sealed with another one are forgotten.
    pub(super) fn set_keyring(&mut self, keyring: Arc<Keyring>) {
        self.runs.retain(|_, run| keyring.get(run.cluster).is_some());
        self.keyring = keyring;
    }

    /// The cluster key that a run is sealed with.
    pub(super) fn key_of(&self, run: &RunId) -> Option<ClusterKeyId> {
        self.runs.get(run).map(|run| run.cluster)
    }

    /// Opens a datagram in place. Nothing is remembered of one that is not authentic.
    pub(super) fn open<'a>(&mut self, datagram: &'a mut [u8]) -> Result<(RunId, &'a [u8]), Refused> {
        let (header, text) = datagram.split_at_mut_checked(HEADER).ok_or(Refused::Foreign)?;
        let parsed = Header::parse(header).ok_or(Refused::Foreign)?;
        if text.len() < TAG {
            return Err(Refused::Foreign);
        }
        self.clock += 1;
        let aad = Aad::from(&*header);
        if let Some(run) = self.runs.get_mut(&parsed.run) {
            // Before decryption: a flood of replays costs next to nothing.
            if run.window.has(parsed.counter) {
                return Err(Refused::Replayed);
            }
            let plain =
                run.key.open_in_place(nonce(parsed.counter), aad, text).map_err(|_| Refused::BadSeal)?;
            run.window.insert(parsed.counter);
            run.used = self.clock;
            return Ok((parsed.run, plain));
        }
        self.open_first(&parsed, aad, text)
    }

    /// What is known of a sender.
    pub(super) fn sender(&self, run: &RunId) -> Sender {
        self.runs.get(run).map_or(Sender::New, |run| run.sender)
    }

    /// The sender is being asked for that nonce.
    pub(super) fn ask(&mut self, run: &RunId, nonce: u64, now: Instant) {
        if let Some(run) = self.runs.get_mut(run) {
            run.sender = Sender::Asked(now);
            run.asked = Some(nonce);
        }
    }

    /// The sender gives a nonce; `expected` says that it is one of a ping to that node. Says whether
    /// the sender has proved to be there, and had not before.
    pub(super) fn answered(&mut self, run: &RunId, node: NodeId, nonce: u64, expected: bool) -> bool {
        match self.runs.get_mut(run) {
            Some(run) if expected || run.asked == Some(nonce) => {
                run.asked = None;
                std::mem::replace(&mut run.sender, Sender::Proved(node)) != Sender::Proved(node)
            }
            _ => false,
        }
    }

    /// The first datagram of a run that we hear.
    fn open_first<'a>(
        &mut self,
        header: &Header,
        aad: Aad<&[u8]>,
        text: &'a mut [u8],
    ) -> Result<(RunId, &'a [u8]), Refused> {
        let mut candidates = self.keyring.opening(header.key_id).peekable();
        if candidates.peek().is_none() {
            return Err(Refused::UnknownKey);
        }
        let sealed = text.to_vec();
        for cluster in candidates {
            let Some(key) = run_key(cluster, &header.run) else { continue };
            text.copy_from_slice(&sealed);
            let Ok(plain) = key.open_in_place(nonce(header.counter), Aad::from(aad.as_ref()), text) else {
                continue;
            };
            let length = plain.len();
            let mut window = ReplayWindow::default();
            window.insert(header.counter);
            if self.runs.len() >= MAX_RUNS
                && let Some(oldest) = self.runs.iter().min_by_key(|(_, run)| run.used).map(|(id, _)| *id)
            {
                self.runs.remove(&oldest);
            }
            let cluster = cluster.id();
            self.runs.insert(
                header.run,
                Run { cluster, key, window, used: self.clock, sender: Sender::New, asked: None },
            );
            return Ok((header.run, text.get(..length).unwrap_or_default()));
        }
        Err(Refused::BadSeal)
    }
}

struct Header {
    key_id: ClusterKeyId,
    run: RunId,
    counter: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (&version, rest) = bytes.split_first()?;
        let (key_id, rest) = rest.split_first_chunk()?;
        let (run, rest) = rest.split_first_chunk()?;
        let counter = u64::from_be_bytes(rest.try_into().ok()?);
        (version == wire::VERSION).then_some(Self { key_id: ClusterKeyId(*key_id), run: *run, counter })
    }
}

fn run_key(cluster: &ClusterKey, run: &RunId) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, &cluster.derive(run, b"ovl gossip v1")).ok().map(LessSafeKey::new)
}

fn nonce(counter: u64) -> Nonce {
    let [a, b, c, d, e, f, g, h] = counter.to_be_bytes();
    Nonce::assume_unique_for_key([0, 0, 0, 0, a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keyring(byte: u8) -> Arc<Keyring> {
        Arc::new(Keyring::new(ClusterKey::new([byte; 32]), vec![ClusterKey::new([byte + 1; 32])]))
    }

    fn sealed(sealer: &mut Sealer, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        sealer.seal(text, &mut out).unwrap();
        out
    }

    #[test]
    fn what_is_sealed_opens_once() {
        let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
        let mut opener = Opener::new(keyring(1));
        let first = sealed(&mut sealer, b"first");
        let second = sealed(&mut sealer, b"second");
        assert_eq!(first.len(), 5 + OVERHEAD);
        assert_eq!(opener.open(&mut second.clone()), Ok((sealer.run(), &b"second"[..])));
        assert_eq!(opener.open(&mut first.clone()), Ok((sealer.run(), &b"first"[..])));
        assert_eq!(opener.open(&mut first.clone()), Err(Refused::Replayed));
        assert_eq!(opener.open(&mut second.clone()), Err(Refused::Replayed));
    }

    #[test]
    fn the_other_key_of_the_ring_opens_too() {
        let mut sealer = Sealer::new(&ClusterKey::new([2; 32])).unwrap();
        let mut datagram = sealed(&mut sealer, b"x");
        assert!(Opener::new(keyring(1)).open(&mut datagram).is_ok());
    }

    #[test]
    fn a_key_that_is_dropped_opens_nothing_more_not_even_of_a_known_run() {
        let mut opener = Opener::new(keyring(1));
        let mut sealer = Sealer::new(&ClusterKey::new([2; 32])).unwrap();
        assert!(opener.open(&mut sealed(&mut sealer, b"x")).is_ok());
        assert_eq!(opener.key_of(&sealer.run()), Some(sealer.key_id()));
        opener.set_keyring(Arc::new(Keyring::new(ClusterKey::new([1; 32]), Vec::new())));
        assert_eq!(opener.open(&mut sealed(&mut sealer, b"x")), Err(Refused::UnknownKey));
    }

    #[test]
    fn another_key_and_a_broken_seal_are_refused_and_not_remembered() {
        let mut opener = Opener::new(keyring(1));
        let mut stranger = Sealer::new(&ClusterKey::new([9; 32])).unwrap();
        assert_eq!(opener.open(&mut sealed(&mut stranger, b"x")), Err(Refused::UnknownKey));
        let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
        let good = sealed(&mut sealer, b"good");
        for position in 0..good.len() {
            let mut bad = good.clone();
            *bad.get_mut(position).unwrap() ^= 1;
            assert!(opener.open(&mut bad).is_err());
        }
        assert!(opener.runs.is_empty());
        assert!(opener.open(&mut good.clone()).is_ok());
        // Nor does a forged counter of a known run move its window.
        let mut forged = good.clone();
        *forged.get_mut(HEADER - 8).unwrap() = 0xff;
        assert_eq!(opener.open(&mut forged), Err(Refused::BadSeal));
        assert!(opener.open(&mut sealed(&mut sealer, b"next")).is_ok());
    }

    #[test]
    fn the_memory_of_runs_is_bounded() {
        let mut opener = Opener::new(keyring(1));
        for _ in 0..MAX_RUNS + 10 {
            let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
            assert!(opener.open(&mut sealed(&mut sealer, b"x")).is_ok());
        }
        assert_eq!(opener.runs.len(), MAX_RUNS);
    }

    proptest! {
        #[test]
        fn garbage_never_opens(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Opener::new(keyring(1)).open(&mut bytes).is_err());
        }
    }
}
