//! Runs arbitrary bytes through what parses datagrams, for the fuzzer in `tests/fuzz` and for property tests.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ovl_proto::id::NodeId;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::time::Instant;

use super::admission::Admission;
use super::decode::{Exchange, Incarnation};
use super::fragment::Joiner;
use super::packet::Packet;
use super::pair::{Agreement, Pair};
use super::seal::{Opener, Sealer};
use crate::keys::{self, ClusterKey, Keyring};

const NODE: NodeId = NodeId([7; 10]);

/// Decodes the plaintext of a datagram, and a message of chitchat.
pub fn message(bytes: &[u8]) {
    let now = Instant::now();
    if let Ok(packet) = Packet::decode(bytes) {
        assert!(packet.encode().is_ok());
        match packet {
            Packet::Chitchat(fragment) => {
                if let Ok(Some(joined)) = Joiner::default().join([1; 16], fragment, now) {
                    exchange(&joined, now);
                }
            }
            Packet::Pong(signed) | Packet::Hints(signed) | Packet::Relayed(signed) => {
                if signed.claim().is_some() {
                    let _ = signed.is_valid();
                }
            }
            Packet::Announce(signed) => drop(keys::open_record(&signed)),
            Packet::PairPong(made) => drop(made.open(pair())),
            Packet::Ping { .. }
            | Packet::PairPing { .. }
            | Packet::PingFor { .. }
            | Packet::Probe { .. }
            | Packet::ProbeAck { .. }
            | Packet::Meet { .. }
            | Packet::Seek { .. }
            | Packet::WhereAmI { .. }
            | Packet::SeenAt { .. }
            | Packet::Knock { .. }
            | Packet::RelayProbe { .. }
            | Packet::Try { .. }
            | Packet::Tried { .. }
            | Packet::Check { .. }
            | Packet::Checked { .. }
            | Packet::CheckFor { .. }
            | Packet::RelayFollow { .. } => {}
        }
    }
    exchange(bytes, now);
    // So that the fuzzer need not find the magic number.
    if let Some((kind, rest)) = bytes.split_first() {
        exchange(&[&[0x53, 0xb0, 0, kind % 3], rest].concat(), now);
    }
}

/// The keys of this host and another one.
#[allow(clippy::unwrap_used, reason = "only for tests, which clippy does not recognise by this cfg")]
fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| Agreement::new(NODE).unwrap().pair(NodeId([8; 10]), [9; 32]).unwrap())
}

fn exchange(bytes: &[u8], now: Instant) {
    static ADMISSION: OnceLock<Mutex<Admission>> = OnceLock::new();
    let Ok(mut exchange) = Exchange::decode(bytes) else { return };
    let own = Incarnation { node: NODE, generation: 1, address: SocketAddr::from(([10, 0, 0, 1], 7940)) };
    let admission = ADMISSION.get_or_init(|| Mutex::new(Admission::new(own)));
    let mut admission = admission.lock().unwrap_or_else(PoisonError::into_inner);
    if admission.filter(&mut exchange, now).is_ok() {
        // chitchat refuses a delta that names a host twice.
        let _ = exchange.into_message();
    }
    // Without the filter, which few inputs pass.
    if let Ok(exchange) = Exchange::decode(bytes) {
        let _ = exchange.into_message();
    }
}

/// Opens a datagram: the bytes themselves, and a sealed datagram that they change.
pub fn datagram(bytes: &[u8]) {
    static SEALED: OnceLock<(Arc<Keyring>, Vec<u8>)> = OnceLock::new();
    let (keyring, sealed) = SEALED.get_or_init(|| {
        // Another one in each run, because what an earlier run sealed may be in the corpus.
        let mut secret = [0; 32];
        let _ = SystemRandom::new().fill(&mut secret);
        let key = ClusterKey::new(secret);
        let mut sealed = Vec::new();
        if let Ok(mut sealer) = Sealer::new(&key) {
            let _ = sealer.seal(b"text", Some(NODE), &mut sealed);
        }
        (Arc::new(Keyring::new(key, Vec::new())), sealed)
    });
    let mut opener = Opener::new(NODE, Arc::clone(keyring));
    // Only this target seals with the key.
    let mut input = bytes.to_vec();
    if let Ok((_, text)) = opener.open(&mut input) {
        assert_eq!(text, b"text");
    }
    let mut changed = sealed.clone();
    changed.iter_mut().zip(bytes).for_each(|(to, from)| *to ^= from);
    changed.extend_from_slice(bytes.get(sealed.len()..).unwrap_or_default());
    let same = changed == *sealed;
    assert_eq!(opener.open(&mut changed).is_ok(), same);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::message(&bytes);
            super::datagram(&bytes);
        }
    }

    #[test]
    fn corpora_pass() {
        ovl_corpus::replay("gossip", super::message);
        ovl_corpus::replay("datagrams", super::datagram);
    }
}
