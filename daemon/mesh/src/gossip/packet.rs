//! Packets: the plaintext of sealed datagrams.

use std::net::SocketAddr;

use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;
use ovl_proto::wire::{self, WireError};
use serde::{Deserialize, Serialize};

use super::bytes::Bytes;
use super::pair::{PairId, PairStatement};
use super::seal::OVERHEAD;
use super::statement::SignedStatement;
use crate::socket;

/// The maximum UDP payload of gossip in bytes: with its headers it fits the minimum MTU of IPv6.
pub(super) const MAX_PAYLOAD: usize = 1200;

/// The packet of one datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Packet {
    /// A fragment of a chitchat message.
    Chitchat(Fragment),
    /// A request for a pong.
    Ping { nonce: u64 },
    /// The reply to a ping: a statement with its nonce.
    Pong(SignedStatement),
    /// The new hints of the sender: a statement without a nonce. Read, and no longer sent: pongs have the hints.
    Hints(SignedStatement),
    /// A request to ping another host, and to pass on its pong.
    PingFor { node: NodeId, nonce: u64 },
    /// The pong of another host.
    Relayed(SignedStatement),
    /// A record of the sender or another host, outside the rounds of gossip.
    Announce(SignedRecord),
    /// A path MTU probe, padded to the probed size.
    Probe { nonce: u64, padding: Bytes },
    /// The acknowledgement of a probe, with its nonce.
    ProbeAck { nonce: u64 },
    /// A request for a pong from a host that has a key with the sender. It is sent only to hosts that have signed a public
    /// key, because earlier releases do not know it.
    PairPing { nonce: u64, pair: PairId },
    /// The reply to it, from a host that has the same key. Other hosts reply with a signed pong.
    PairPong(PairStatement),
    /// Where a host behind NAT is seen, to another one behind NAT that looks for it: both ping each other at once, so that
    /// each NAT takes the other's ping for an answer (RFC 5128, section 3.3).
    Meet {
        node: NodeId,
        /// Its gossip.
        at: SocketAddr,
        /// Its socket of relayed datagrams, if that was heard.
        relay_at: Option<SocketAddr>,
    },
    /// A question for the address that this datagram came from.
    WhereAmI { nonce: u64 },
    /// The answer, and whether the sender has knocked there.
    SeenAt { nonce: u64, at: SocketAddr, knocks: bool },
    /// A datagram from a socket that the receiver has not sent to: it arrives unless a stateful firewall keeps it out.
    Knock { nonce: u64 },
    /// A request to introduce this host and another one, both behind NAT, to each other: see [`Self::Meet`].
    Seek { node: NodeId },
    /// A probe between the sockets of relayed datagrams.
    RelayProbe {
        /// Whether probes of the receiver arrive at the sender.
        heard: bool,
    },
    /// A trial of UDP, while the two hosts use TCP.
    Try { nonce: u64 },
    /// The answer to it, to where it came from.
    Tried { nonce: u64 },
    /// A question of a member about its NAT, from a socket of its own.
    Check { nonce: u64, by: Answerer },
    /// The answer: where the question came from.
    Checked { nonce: u64, at: SocketAddr },
    /// A request to answer a question of a host, which came from `at`.
    CheckFor { node: NodeId, nonce: u64, at: SocketAddr },
    /// As [`Self::RelayProbe`], from a host that reaches the receiver otherwise: the receiver uses another of its addresses. Earlier
    /// releases do not know it, and have one address.
    RelayFollow {
        /// Whether probes of the receiver arrive at the sender.
        heard: bool,
    },
}

/// What answers a question about NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answerer {
    /// The socket that was asked.
    SamePort,
    /// Another socket of the host that was asked.
    OtherPort,
    /// Another host.
    OtherHost,
}

/// A fragment of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fragment {
    /// The number of the message, which the sender assigns.
    pub message: u32,
    /// The index of the fragment, from 0.
    pub index: u16,
    /// The number of fragments of the message.
    pub count: u16,
    /// Whether the complete message is compressed.
    pub compressed: bool,
    pub data: Bytes,
}

/// The maximum number of bytes that the encoding adds to the data of a fragment.
const FRAGMENT_OVERHEAD: usize = 1 + 5 + 3 + 3 + 1 + 3;
/// The maximum size of the data of a fragment, in bytes.
pub(super) const MAX_FRAGMENT: usize = MAX_PAYLOAD - OVERHEAD - FRAGMENT_OVERHEAD;

impl Packet {
    pub(super) fn encode(&self) -> Result<Vec<u8>, WireError> {
        wire::encode_body(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        wire::decode_body(bytes)
    }

    /// A probe whose IP packet has exactly this size in bytes; without padding if the size is too small.
    pub(super) fn probe(nonce: u64, size: u16, to: std::net::IpAddr) -> Self {
        let room = usize::from(size).saturating_sub(socket::header_len(to) + OVERHEAD);
        // The variant and the nonce, as bincode encodes them. The length of the padding follows: one byte up to 250,
        // three bytes up to 65535.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn probe_has_the_requested_size() {
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
    fn largest_fragment_fits_the_maximum_payload() {
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
