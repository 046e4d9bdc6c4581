//! The header of a relayed datagram.
//!
//! ```text
//! magic (1) | hop limit (1) | channel (1) | reserved (1) | from (10) | to (10) | key id (4) | tag (8) | payload
//! ```
//!
//! The payload is a WireGuard message (see the WireGuard paper, section 5.4), which no relay can read or forge. The tag is the
//! start of HMAC-SHA256 (RFC 2104, truncated as in its section 5) over the channel, the ids, the key id and the first 32 bytes of the
//! payload, with a key that is derived from the cluster key. So only hosts of the cluster make relays work. Relays change the hop limit alone,
//! which the tag does not cover. Copies of a datagram pass: WireGuard drops them at their destination.

use ring::hmac;

/// The id of a host.
pub type HostId = [u8; 10];

/// Which of the two WireGuard interfaces of both hosts a datagram is of, while tunnel keys are rotated.
pub type Channel = u8;

/// The channel of probes between the sockets of two hosts, which no relay passes on.
pub const PROBE: Channel = 0xff;

/// The length of the header in bytes.
pub const HEADER: usize = 1 + 1 + 2 + 10 + 10 + 4 + TAG;
/// The number of hosts that a datagram passes after its sender, at most.
pub const HOP_LIMIT: u8 = 4;

const TAG: usize = 8;
/// Unlike the first byte of WireGuard's messages (1 to 4), of DNS, STUN and VXLAN.
const MAGIC: u8 = 0xd7;
const HOP_LIMIT_AT: usize = 1;
/// Where what the tag covers begins, after the magic and the hop limit.
pub(crate) const CHANNEL_AT: usize = 2;
const FROM_AT: usize = 4;
const TO_AT: usize = FROM_AT + 10;
const KEY_AT: usize = TO_AT + 10;
const TAG_AT: usize = KEY_AT + 4;
/// The number of bytes of the payload that the tag covers: in a message with data, all that precedes the sealed part, and some of it.
pub(crate) const COVERED: usize = 32;

/// A key of relayed datagrams, with the id of the cluster key that it is derived from.
#[derive(Clone)]
pub struct RelayKey {
    id: [u8; 4],
    key: hmac::Key,
}

impl std::fmt::Debug for RelayKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl RelayKey {
    /// A key from its 32 secret bytes.
    pub fn new(id: [u8; 4], secret: &[u8; 32]) -> Self {
        Self { id, key: hmac::Key::new(hmac::HMAC_SHA256, secret) }
    }

    fn tag(&self, ids: &[u8], payload: &[u8]) -> [u8; TAG] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(ids);
        context.update(payload.get(..COVERED).unwrap_or(payload));
        let mut tag = [0; TAG];
        tag.iter_mut().zip(context.sign().as_ref()).for_each(|(to, from)| *to = *from);
        tag
    }
}

/// The header of a received datagram. Its tag is not verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) hop_limit: u8,
    pub(crate) channel: Channel,
    pub(crate) from: HostId,
    pub(crate) to: HostId,
    key: [u8; 4],
    tag: [u8; TAG],
}

impl Header {
    /// Reads the header. `None` if the datagram is too short or none of relays.
    pub(crate) fn parse(datagram: &[u8]) -> Option<Self> {
        let header = datagram.get(..HEADER)?;
        (*header.first()? == MAGIC).then_some(())?;
        Some(Self {
            hop_limit: *header.get(HOP_LIMIT_AT)?,
            channel: *header.get(CHANNEL_AT)?,
            from: *header.get(FROM_AT..)?.first_chunk()?,
            to: *header.get(TO_AT..)?.first_chunk()?,
            key: *header.get(KEY_AT..)?.first_chunk()?,
            tag: *header.get(TAG_AT..)?.first_chunk()?,
        })
    }

    /// Whether one of the keys made the tag of this datagram.
    pub(crate) fn is_made_with(&self, keys: &[RelayKey], datagram: &[u8]) -> bool {
        let (Some(ids), Some(payload)) = (datagram.get(CHANNEL_AT..TAG_AT), datagram.get(HEADER..)) else {
            return false;
        };
        keys.iter().filter(|key| key.id == self.key).any(|key| {
            let differs =
                key.tag(ids, payload).iter().zip(self.tag).fold(0, |all, (one, two)| all | (one ^ two));
            differs == 0
        })
    }
}

/// Writes the header before a payload, which begins at [`HEADER`] of `datagram`. Does nothing if the datagram is shorter.
pub(crate) fn write(datagram: &mut [u8], channel: Channel, from: HostId, to: HostId, key: &RelayKey) {
    let Some((header, payload)) = datagram.split_at_mut_checked(HEADER) else { return };
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = header.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &[MAGIC, HOP_LIMIT, channel, 0]);
    put(FROM_AT, &from);
    put(TO_AT, &to);
    put(KEY_AT, &key.id);
    if let Some(ids) = header.get(CHANNEL_AT..TAG_AT) {
        let tag = key.tag(ids, payload);
        if let Some(place) = header.get_mut(TAG_AT..TAG_AT + TAG) {
            place.copy_from_slice(&tag);
        }
    }
}

/// Replaces the hop limit.
pub(crate) fn set_hop_limit(datagram: &mut [u8], limit: u8) {
    if let Some(place) = datagram.get_mut(HOP_LIMIT_AT) {
        *place = limit;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> RelayKey {
        RelayKey::new([byte; 4], &[byte; 32])
    }

    fn datagram(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(payload);
        write(&mut bytes, 1, [1; 10], [2; 10], &key(7));
        bytes
    }

    #[test]
    fn header_is_read_as_it_was_written_and_its_hop_limit_may_change() {
        let mut bytes = datagram(b"sealed");
        let header = Header::parse(&bytes).unwrap();
        assert_eq!((header.hop_limit, header.channel), (HOP_LIMIT, 1));
        assert_eq!((header.from, header.to), ([1; 10], [2; 10]));
        assert!(header.is_made_with(&[key(6), key(7)], &bytes));
        set_hop_limit(&mut bytes, 1);
        let header = Header::parse(&bytes).unwrap();
        assert!(header.hop_limit == 1 && header.is_made_with(&[key(7)], &bytes));
        assert_eq!(&bytes[HEADER..], b"sealed");
    }

    #[test]
    fn what_another_key_made_or_a_relay_changed_is_refused() {
        let bytes = datagram(&[9; 100]);
        let header = Header::parse(&bytes).unwrap();
        assert!(!header.is_made_with(&[key(8)], &bytes) && !header.is_made_with(&[], &bytes));
        let same_id = RelayKey::new([7; 4], &[8; 32]);
        assert!(!header.is_made_with(std::slice::from_ref(&same_id), &bytes));
        assert!(header.is_made_with(&[same_id, key(7)], &bytes), "one of two keys with an id");
        for at in CHANNEL_AT..HEADER + COVERED {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let header = Header::parse(&changed).unwrap();
            assert!(!header.is_made_with(&[key(7)], &changed), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(header) = Header::parse(&bytes) {
                prop_assert!(bytes.len() >= HEADER);
                header.is_made_with(&[key(7)], &bytes);
            }
        }
    }
}
