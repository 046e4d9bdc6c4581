//! Sealing of datagrams: AES-256-GCM with a key for each run of each sender.
//!
//! The key of a run is derived from 16 random bytes and the cluster key. So a counter from 0 is a safe nonce: no state
//! must outlive the process, and no two senders share a key. The receiver derives the same key from the header.
//!
//! A datagram to a live peer is bound to it: the id of the receiver is authenticated with the header, so no other host
//! accepts a copy. Datagrams to hosts that are not known yet are unbound.
//!
//! ```text
//! version (1) | bound (1) | key id (4) | run (16) | counter (8, big endian) | ciphertext | tag (16)
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use ovl_proto::id::{ClusterKeyId, NodeId};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::Instant;

use super::replay::ReplayWindow;
use crate::keys::{ClusterKey, Keyring};

/// The id of a run: the lifetime of a sealer of one sender.
pub(super) type RunId = [u8; 16];

/// The length of the header, in bytes.
pub(super) const HEADER: usize = 1 + 1 + 4 + 16 + 8;
/// The length of the authentication tag, in bytes.
const TAG: usize = 16;
/// The number of bytes that sealing adds to a plaintext.
pub(super) const OVERHEAD: usize = HEADER + TAG;

/// The maximum number of remembered runs. Runs of unproved senders are dropped first, the least recently heard first.
const MAX_RUNS: usize = 4096;

/// The reason why a datagram could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenError {
    /// It is too short, or no datagram of gossip.
    Foreign,
    /// It is sealed with an unknown key.
    UnknownKey,
    /// The key is known, and the authentication fails.
    BadSeal,
    /// It was received before, or is too old.
    Replayed,
}

/// Seals the datagrams of a run.
pub(super) struct Sealer {
    key: LessSafeKey,
    key_id: ClusterKeyId,
    run: RunId,
    counter: u64,
}

impl Sealer {
    /// Starts a new run.
    pub(super) fn new(cluster: &ClusterKey) -> anyhow::Result<Self> {
        let mut run = RunId::default();
        SystemRandom::new()
            .fill(&mut run)
            .map_err(|_| anyhow::anyhow!("cannot start gossip: the kernel returned no random numbers"))?;
        let key =
            run_key(cluster, &run).ok_or_else(|| anyhow::anyhow!("cannot create an AES-256-GCM key"))?;
        Ok(Self { key, key_id: cluster.id(), run, counter: 0 })
    }

    pub(super) fn run(&self) -> RunId {
        self.run
    }

    /// The id of the cluster key from which the key is derived.
    pub(super) fn key_id(&self) -> ClusterKeyId {
        self.key_id
    }

    /// Seals a plaintext of the own wire version, for tests.
    #[cfg(any(test, fuzzing))]
    pub(super) fn seal(
        &mut self,
        plaintext: &[u8],
        receiver: Option<NodeId>,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        self.seal_version(ovl_proto::wire::version(), plaintext, receiver, out)
    }

    /// Seals a plaintext of a wire version into `out`, and replaces its content. Only `receiver` can open it, or any host
    /// if it is `None`. Returns `None` if the encryption fails.
    pub(super) fn seal_version(
        &mut self,
        version: u8,
        plaintext: &[u8],
        receiver: Option<NodeId>,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        out.clear();
        out.push(version);
        out.push(u8::from(receiver.is_some()));
        out.extend_from_slice(&self.key_id.0);
        out.extend_from_slice(&self.run);
        out.extend_from_slice(&self.counter.to_be_bytes());
        out.extend_from_slice(plaintext);
        let (header, text) = out.split_at_mut(HEADER);
        let aad = Aad::from(authenticated(header, receiver));
        let tag = self.key.seal_in_place_separate_tag(nonce(self.counter), aad, text).ok()?;
        out.extend_from_slice(tag.as_ref());
        self.counter += 1;
        Some(())
    }
}

/// Opens received datagrams.
pub(super) struct Opener {
    /// The local host.
    node: NodeId,
    keyring: Arc<Keyring>,
    runs: HashMap<RunId, Run>,
    clock: u64,
}

struct Run {
    /// The id of the cluster key from which the key is derived.
    cluster: ClusterKeyId,
    key: LessSafeKey,
    window: ReplayWindow,
    used: u64,
    sender: Sender,
    /// The nonce of the challenge to the sender.
    asked: Option<u64>,
}

/// The authentication state of the sender of a run. A datagram of a new run may be a replayed recording, if the receiver
/// started after it. Only a sender that signs an answer to a new nonce is live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    New,
    /// It was challenged at this time.
    Asked(Instant),
    /// It has answered as this host.
    Proved(NodeId),
}

impl Opener {
    pub(super) fn new(node: NodeId, keyring: Arc<Keyring>) -> Self {
        Self { node, keyring, runs: HashMap::new(), clock: 0 }
    }

    /// Replaces the cluster keys. Runs with other keys are forgotten.
    pub(super) fn set_keyring(&mut self, keyring: Arc<Keyring>) {
        self.runs.retain(|_, run| keyring.get(run.cluster).is_some());
        self.keyring = keyring;
    }

    /// The id of the cluster key of a run; `None` if the run is unknown.
    pub(super) fn key_of(&self, run: &RunId) -> Option<ClusterKeyId> {
        self.runs.get(run).map(|run| run.cluster)
    }

    /// Opens a datagram in place. A datagram that is not authentic does not change the state.
    pub(super) fn open<'a>(&mut self, datagram: &'a mut [u8]) -> Result<(RunId, &'a [u8]), OpenError> {
        let (header, text) = datagram.split_at_mut_checked(HEADER).ok_or(OpenError::Foreign)?;
        let parsed = Header::parse(header).ok_or(OpenError::Foreign)?;
        if text.len() < TAG {
            return Err(OpenError::Foreign);
        }
        self.clock += 1;
        let aad = authenticated(header, parsed.bound.then_some(self.node));
        if let Some(run) = self.runs.get_mut(&parsed.run) {
            // Before decryption, so that a flood of replays costs little.
            if run.window.has(parsed.counter) {
                return Err(OpenError::Replayed);
            }
            let plain = run
                .key
                .open_in_place(nonce(parsed.counter), Aad::from(aad), text)
                .map_err(|_| OpenError::BadSeal)?;
            run.window.insert(parsed.counter);
            run.used = self.clock;
            return Ok((parsed.run, plain));
        }
        self.open_first(&parsed, &aad, text)
    }

    /// The authentication state of the sender of a run.
    pub(super) fn sender(&self, run: &RunId) -> Sender {
        self.runs.get(run).map_or(Sender::New, |run| run.sender)
    }

    /// Notes that the sender was challenged with a nonce.
    pub(super) fn ask(&mut self, run: &RunId, nonce: u64, now: Instant) {
        if let Some(run) = self.runs.get_mut(run) {
            run.sender = Sender::Asked(now);
            run.asked = Some(nonce);
        }
    }

    /// Whether a nonce is that of the pending challenge to the sender. The challenge is then no longer pending, so that
    /// each one costs at most one verification.
    pub(super) fn take_challenge(&mut self, run: &RunId, nonce: u64) -> bool {
        self.runs.get_mut(run).and_then(|run| run.asked.take_if(|asked| *asked == nonce)).is_some()
    }

    /// Notes that the sender has signed an answer. Returns whether it had not before.
    pub(super) fn prove(&mut self, run: &RunId, node: NodeId) -> bool {
        self.runs.get_mut(run).is_some_and(|run| {
            std::mem::replace(&mut run.sender, Sender::Proved(node)) != Sender::Proved(node)
        })
    }

    /// Opens the first datagram of a run.
    fn open_first<'a>(
        &mut self,
        header: &Header,
        aad: &[u8],
        text: &'a mut [u8],
    ) -> Result<(RunId, &'a [u8]), OpenError> {
        let mut candidates = self.keyring.opening(header.key_id).peekable();
        if candidates.peek().is_none() {
            return Err(OpenError::UnknownKey);
        }
        let sealed = text.to_vec();
        for cluster in candidates {
            let Some(key) = run_key(cluster, &header.run) else { continue };
            text.copy_from_slice(&sealed);
            let Ok(plain) = key.open_in_place(nonce(header.counter), Aad::from(aad), text) else {
                continue;
            };
            let length = plain.len();
            let mut window = ReplayWindow::default();
            window.insert(header.counter);
            if self.runs.len() >= MAX_RUNS
                && let Some(oldest) = self
                    .runs
                    .iter()
                    .min_by_key(|(_, run)| (matches!(run.sender, Sender::Proved(_)), run.used))
                    .map(|(id, _)| *id)
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
        Err(OpenError::BadSeal)
    }
}

/// The header after the version, which is that of the plaintext. The header and the seal are the same in every release.
struct Header {
    bound: bool,
    key_id: ClusterKeyId,
    run: RunId,
    counter: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (_, rest) = bytes.split_first()?;
        let (&bound, rest) = rest.split_first()?;
        let (key_id, rest) = rest.split_first_chunk()?;
        let (run, rest) = rest.split_first_chunk()?;
        let counter = u64::from_be_bytes(rest.try_into().ok()?);
        let known = bound <= 1;
        known.then_some(Self { bound: bound == 1, key_id: ClusterKeyId(*key_id), run: *run, counter })
    }
}

/// The data that is authenticated and not encrypted: the header, and the receiver if the datagram is bound to it.
fn authenticated(header: &[u8], receiver: Option<NodeId>) -> Vec<u8> {
    let receiver = receiver.map(|node| node.0);
    [header, receiver.as_ref().map_or(&[][..], |id| id)].concat()
}

fn run_key(cluster: &ClusterKey, run: &RunId) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, &*cluster.derive(run, b"ovl gossip v1")).ok().map(LessSafeKey::new)
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
        sealer.seal(text, None, &mut out).unwrap();
        out
    }

    #[test]
    fn sealed_datagram_opens_once() {
        let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
        let mut opener = Opener::new(NodeId([7; 10]), keyring(1));
        let first = sealed(&mut sealer, b"first");
        let second = sealed(&mut sealer, b"second");
        assert_eq!(first.len(), 5 + OVERHEAD);
        assert_eq!(opener.open(&mut second.clone()), Ok((sealer.run(), &b"second"[..])));
        assert_eq!(opener.open(&mut first.clone()), Ok((sealer.run(), &b"first"[..])));
        assert_eq!(opener.open(&mut first.clone()), Err(OpenError::Replayed));
        assert_eq!(opener.open(&mut second.clone()), Err(OpenError::Replayed));
    }

    #[test]
    fn datagram_to_one_host_is_refused_by_the_others() {
        let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
        let (here, there) = (NodeId([7; 10]), NodeId([8; 10]));
        let mut bound = Vec::new();
        for text in [b"first", b"other"] {
            sealer.seal(text, Some(here), &mut bound).unwrap();
            let mut third = Opener::new(there, keyring(1));
            assert_eq!(third.open(&mut bound.clone()), Err(OpenError::BadSeal));
            // Nor once it knows the run.
            third.open(&mut sealed(&mut sealer, b"x")).unwrap();
            assert_eq!(third.open(&mut bound.clone()), Err(OpenError::BadSeal));
            // Nor as an unbound one.
            let mut unbound = bound.clone();
            unbound[1] = 0;
            assert_eq!(third.open(&mut unbound), Err(OpenError::BadSeal));
            assert!(Opener::new(here, keyring(1)).open(&mut bound.clone()).is_ok());
        }
    }

    #[test]
    fn second_key_of_the_keyring_opens_too() {
        let mut sealer = Sealer::new(&ClusterKey::new([2; 32])).unwrap();
        let mut datagram = sealed(&mut sealer, b"x");
        assert!(Opener::new(NodeId([7; 10]), keyring(1)).open(&mut datagram).is_ok());
    }

    #[test]
    fn dropped_key_opens_nothing_even_of_a_known_run() {
        let mut opener = Opener::new(NodeId([7; 10]), keyring(1));
        let mut sealer = Sealer::new(&ClusterKey::new([2; 32])).unwrap();
        assert!(opener.open(&mut sealed(&mut sealer, b"x")).is_ok());
        assert_eq!(opener.key_of(&sealer.run()), Some(sealer.key_id()));
        opener.set_keyring(Arc::new(Keyring::new(ClusterKey::new([1; 32]), Vec::new())));
        assert_eq!(opener.open(&mut sealed(&mut sealer, b"x")), Err(OpenError::UnknownKey));
    }

    #[test]
    fn unknown_key_and_invalid_seal_are_refused_without_state() {
        let mut opener = Opener::new(NodeId([7; 10]), keyring(1));
        let mut stranger = Sealer::new(&ClusterKey::new([9; 32])).unwrap();
        assert_eq!(opener.open(&mut sealed(&mut stranger, b"x")), Err(OpenError::UnknownKey));
        let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
        let good = sealed(&mut sealer, b"good");
        for position in 0..good.len() {
            let mut bad = good.clone();
            *bad.get_mut(position).unwrap() ^= 1;
            assert!(opener.open(&mut bad).is_err());
        }
        assert!(opener.runs.is_empty());
        assert!(opener.open(&mut good.clone()).is_ok());
        // A forged counter of a known run does not move its window.
        let mut forged = good.clone();
        *forged.get_mut(HEADER - 8).unwrap() = 0xff;
        assert_eq!(opener.open(&mut forged), Err(OpenError::BadSeal));
        assert!(opener.open(&mut sealed(&mut sealer, b"next")).is_ok());
    }

    #[test]
    fn number_of_remembered_runs_is_bounded() {
        let mut opener = Opener::new(NodeId([7; 10]), keyring(1));
        for _ in 0..MAX_RUNS + 10 {
            let mut sealer = Sealer::new(&ClusterKey::new([1; 32])).unwrap();
            assert!(opener.open(&mut sealed(&mut sealer, b"x")).is_ok());
        }
        assert_eq!(opener.runs.len(), MAX_RUNS);
    }

    proptest! {
        #[test]
        fn garbage_never_opens(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Opener::new(NodeId([7; 10]), keyring(1)).open(&mut bytes).is_err());
        }
    }
}
