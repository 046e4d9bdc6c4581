//! Runs arbitrary bytes through what reads relayed datagrams, for the fuzzer in `tests/fuzz` and for property tests.

use std::sync::OnceLock;

use ring::rand::{SecureRandom as _, SystemRandom};

use crate::frame::{self, CHANNEL_AT, COVERED, Channel, HEADER, HOP_LIMIT, Header, RelayKey};
use crate::run::{Kind, Run};

/// Reads bytes as a datagram, as the payload of one that a host of the cluster made and others changed, and as the lengths of
/// datagrams that are sent together. Also as what arrives over TCP.
pub fn frame(bytes: &[u8]) {
    crate::tcp::fuzz(bytes);
    let key = key();
    if let Some(header) = Header::parse(bytes) {
        assert!(!header.is_made_with(std::slice::from_ref(key), bytes), "forged");
    }
    let Some((&[at, bit, channel], payload)) = bytes.split_first_chunk() else { return };
    let mut datagram = vec![0; HEADER];
    datagram.extend_from_slice(payload);
    let (from, to) = ([1; 10], [2; 10]);
    frame::write(&mut datagram, channel, from, to, key);
    let is_made = |datagram: &[u8]| {
        Header::parse(datagram).is_some_and(|header| header.is_made_with(std::slice::from_ref(key), datagram))
    };
    let header =
        Header::parse(&datagram).map(|header| (header.hop_limit, header.channel, header.from, header.to));
    assert_eq!(header, Some((HOP_LIMIT, channel, from, to)));
    frame::set_hop_limit(&mut datagram, bit);
    assert!(is_made(&datagram), "a relay changes the hop limit");
    let at = usize::from(at) % datagram.len();
    if let Some(byte) = datagram.get_mut(at) {
        *byte ^= 1 << (bit % 8);
    }
    let is_covered = at == 0 || (CHANNEL_AT..HEADER + COVERED).contains(&at);
    assert_eq!(is_made(&datagram), !is_covered, "byte {at}");
    run(payload, channel);
}

/// A key that no input was made with.
fn key() -> &'static RelayKey {
    static KEY: OnceLock<RelayKey> = OnceLock::new();
    KEY.get_or_init(|| {
        let mut secret = [0; 32];
        let filled = SystemRandom::new().fill(&mut secret);
        assert!(filled.is_ok(), "the kernel returns no random numbers");
        RelayKey::new([7; 4], &secret)
    })
}

/// Collects datagrams of these lengths, each of one of two kinds: none is lost, cut or joined with another kind.
fn run(lengths: &[u8], channel: Channel) {
    const MOST: usize = 1000;
    let mut run = Run::new(MOST);
    let (mut given, mut taken) = (Vec::new(), Vec::new());
    let take = |run: &mut Run, taken: &mut Vec<(Channel, Vec<u8>)>| {
        if let Some((kind, bytes, segment)) = run.take() {
            taken.extend(bytes.chunks(segment).map(|datagram| (kind.channel, datagram.to_vec())));
        }
    };
    for (number, length) in lengths.iter().enumerate() {
        let kind = Kind { channel: channel ^ (length & 1), from: [1; 10], to: [2; 10] };
        // One that is empty has nothing to be passed on, and is no datagram of relays.
        let datagram = vec![number as u8; usize::from(*length).max(1)];
        if !run.takes(kind, datagram.len()) {
            take(&mut run, &mut taken);
        }
        let Some(place) = run.add(kind, datagram.len()) else { continue };
        place.copy_from_slice(&datagram);
        given.push((kind.channel, datagram));
    }
    take(&mut run, &mut taken);
    assert_eq!(given, taken);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("relayed", super::frame);
    }

    proptest! {
        #[test]
        fn any_bytes_pass(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            super::frame(&bytes);
        }
    }
}
