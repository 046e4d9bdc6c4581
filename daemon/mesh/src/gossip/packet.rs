//! What is inside a sealed datagram.

use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;
use ovl_proto::wire::{self, WireError};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::seal::OVERHEAD;
use super::socket;

/// A UDP payload of gossip is never larger: with its headers it fits the least MTU of IPv6.
pub(super) const MAX_PAYLOAD: usize = 1200;

/// One datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Packet {
    /// A piece of a message of chitchat.
    Chitchat(Fragment),
    /// Are you there?
    Ping { node: NodeId, nonce: u64 },
    /// I am. The nonce is that of the ping.
    Pong { node: NodeId, nonce: u64 },
    /// The sender's record, or that of another, without waiting for a round of gossip.
    Announce(SignedRecord),
    /// As large as the path shall carry.
    Probe { nonce: u64, padding: Bytes },
    /// A probe arrived whole.
    ProbeAck { nonce: u64 },
}

/// A piece of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fragment {
    /// The sender's number of the message.
    pub message: u32,
    /// Which piece, from 0.
    pub index: u16,
    /// Of how many.
    pub count: u16,
    /// Whether the message, once whole, is to be decompressed.
    pub compressed: bool,
    pub data: Bytes,
}

/// What encoding a fragment adds to its data, at most.
const FRAGMENT_OVERHEAD: usize = 1 + 5 + 3 + 3 + 1 + 3;
/// Data in a fragment, at most.
pub(super) const MAX_FRAGMENT: usize = MAX_PAYLOAD - OVERHEAD - FRAGMENT_OVERHEAD;

impl Packet {
    pub(super) fn encode(&self) -> Result<Vec<u8>, WireError> {
        wire::encode_body(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        wire::decode_body(bytes)
    }

    /// A probe whose IP packet is of exactly that size; a small one if there is no room.
    pub(super) fn probe(nonce: u64, size: u16, to: std::net::IpAddr) -> Self {
        let room = usize::from(size).saturating_sub(socket::header_len(to) + OVERHEAD);
        // The variant, the nonce as bincode writes it, and the length of the padding: one byte up
        // to 250, three up to 65535.
        let fixed = 1 + match nonce {
            0..=250 => 1,
            251..=0xffff => 3,
            0x1_0000..=0xffff_ffff => 5,
            _ => 9,
        };
        let padding = match room.saturating_sub(fixed + 1) {
            short @ ..=250 => short,
            _ => room.saturating_sub(fixed + 3),
        };
        Self::Probe { nonce, padding: Bytes(vec![0; padding]) }
    }
}

/// Bytes that are copied at once; serde would take a `Vec<u8>` byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }

            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        // Borrowed from the datagram: a length that it does not have is an error, and no allocation.
        deserializer.deserialize_bytes(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_probe_is_of_the_size_that_was_asked_for() {
        for (ip, headers) in [("10.0.0.1", 28), ("fd00::1", 48)] {
            for nonce in [1, 300, 70_000, u64::MAX] {
                for size in [600, 1279, 1280, 1281, 1500, 8900, 9000, 65_535] {
                    let packet = Packet::probe(nonce, size, ip.parse().unwrap());
                    let length = packet.encode().unwrap().len() + OVERHEAD + headers;
                    assert_eq!(length, usize::from(size), "{ip} {nonce} {size}");
                }
            }
            assert!(Packet::probe(1, 0, ip.parse().unwrap()).encode().unwrap().len() < 20);
        }
    }

    #[test]
    fn the_largest_fragment_fits() {
        let fragment = Fragment {
            message: u32::MAX,
            index: u16::MAX,
            count: u16::MAX,
            compressed: true,
            data: Bytes(vec![1; MAX_FRAGMENT]),
        };
        let packet = Packet::Chitchat(fragment);
        let bytes = packet.encode().unwrap();
        assert_eq!(bytes.len() + OVERHEAD, MAX_PAYLOAD);
        assert_eq!(Packet::decode(&bytes).unwrap(), packet);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert!(packet.encode().is_ok());
            }
        }
    }
}
