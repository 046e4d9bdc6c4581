//! Messages on an authenticated stream: split into chunks of at most 64 KiB, sealed, and reassembled.
//!
//! The plaintext of a message is its length in four bytes, then the message. A chunk contains data of one message only.

use anyhow::{bail, ensure};
use bytes::{Buf, BytesMut};
use ovl_proto::wire;
use snow::TransportState;

use super::noise::{MAX_FRAME, TAG};

/// The maximum plaintext of a chunk, in bytes.
const MAX_CHUNK: usize = MAX_FRAME - TAG;
/// The capacity that is kept for the next messages; more is released.
const KEEP_CAPACITY: usize = 256 << 10;

/// Seals a message chunk by chunk: a message may be far larger than one write.
pub(super) struct Sealing {
    message: bytes::Bytes,
    sent: usize,
}

impl Sealing {
    pub(super) fn new(message: bytes::Bytes) -> Self {
        Self { message, sent: 0 }
    }

    /// Appends the next chunk to `out`. Returns whether there are more.
    ///
    /// # Errors
    ///
    /// The message is too large, or the encryption fails.
    pub(super) fn chunk(&mut self, noise: &mut TransportState, out: &mut Vec<u8>) -> anyhow::Result<bool> {
        let prefix = if self.sent == 0 {
            u32::try_from(self.message.len())?.to_be_bytes().to_vec()
        } else {
            Vec::new()
        };
        let rest = self.message.get(self.sent..).unwrap_or_default();
        let piece = rest.get(..MAX_CHUNK - prefix.len()).unwrap_or(rest);
        self.sent += piece.len();
        let more = piece.len() < rest.len();
        let start = out.len() + 2;
        let length = prefix.len() + piece.len() + TAG;
        out.extend_from_slice(&u16::try_from(length)?.to_be_bytes());
        out.resize(start + length, 0);
        let place = out.get_mut(start..).unwrap_or_default();
        if prefix.is_empty() {
            noise.write_message(piece, place)?;
        } else {
            noise.write_message(&[&prefix, piece].concat(), place)?;
        }
        Ok(more)
    }
}

/// Opens received chunks and reassembles messages.
#[derive(Default)]
pub(super) struct Opening {
    plain: Vec<u8>,
}

impl Opening {
    /// Takes frames out of `arrived` until a message is complete. `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// A chunk is not authentic, or a message is too long.
    pub(super) fn next(
        &mut self,
        noise: &mut TransportState,
        arrived: &mut BytesMut,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        while let Some(header) = arrived.first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*header));
            let Some(sealed) = arrived.get(2..2 + length) else {
                arrived.reserve(2 + length - arrived.len());
                return Ok(None);
            };
            let have = self.plain.len();
            // The buffer grows by the received data, not by the claimed length.
            self.plain.resize(have + length, 0);
            let opened = noise.read_message(sealed, self.plain.get_mut(have..).unwrap_or_default())?;
            self.plain.truncate(have + opened);
            arrived.advance(2 + length);
            if let Some(message) = self.complete()? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn complete(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let Some((total, message)) = self.plain.split_first_chunk() else {
            bail!("invalid chunk: the length of the message is missing")
        };
        let total = u32::from_be_bytes(*total) as usize;
        ensure!(
            total <= wire::MAX_FRAME,
            "invalid message: {total} bytes, at most {} are allowed",
            wire::MAX_FRAME
        );
        ensure!(message.len() <= total, "invalid message: longer than its length field");
        if message.len() < total {
            return Ok(None);
        }
        let message = message.to_vec();
        self.plain.clear();
        if self.plain.capacity() > KEEP_CAPACITY {
            self.plain.shrink_to(KEEP_CAPACITY);
        }
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (TransportState, TransportState) {
        let builder = || snow::Builder::new("Noise_NN_25519_AESGCM_SHA256".parse().unwrap());
        let (mut one, mut other) =
            (builder().build_initiator().unwrap(), builder().build_responder().unwrap());
        let mut buffer = [0; 100];
        let length = one.write_message(&[], &mut buffer).unwrap();
        other.read_message(&buffer[..length], &mut []).unwrap();
        let length = other.write_message(&[], &mut buffer).unwrap();
        one.read_message(&buffer[..length], &mut []).unwrap();
        (one.into_transport_mode().unwrap(), other.into_transport_mode().unwrap())
    }

    #[test]
    fn messages_of_all_sizes_arrive_in_any_segmentation() {
        let (mut one, mut other) = pair();
        let mut wire = Vec::new();
        let sizes =
            [0, 1, 100, MAX_CHUNK - 5, MAX_CHUNK - 4, MAX_CHUNK - 3, MAX_CHUNK, 3 * MAX_CHUNK, 1 << 20];
        for size in sizes {
            let mut sealing = Sealing::new(vec![7; size].into());
            while sealing.chunk(&mut one, &mut wire).unwrap() {}
        }
        let mut opening = Opening::default();
        let mut arrived = BytesMut::new();
        let mut lengths = Vec::new();
        for piece in wire.chunks(50_000) {
            arrived.extend_from_slice(piece);
            while let Some(message) = opening.next(&mut other, &mut arrived).unwrap() {
                lengths.push(message.len());
            }
        }
        assert_eq!(lengths, sizes);
        assert!(arrived.is_empty());
    }

    #[test]
    fn excessive_length_is_refused_and_a_claimed_length_allocates_nothing() {
        for (total, good) in
            [(wire::MAX_FRAME as u32, true), (wire::MAX_FRAME as u32 + 1, false), (u32::MAX, false)]
        {
            let (mut one, mut other) = pair();
            let mut sealed = vec![0; 100];
            let length = one.write_message(&total.to_be_bytes(), &mut sealed).unwrap();
            let mut arrived = BytesMut::from(&(length as u16).to_be_bytes()[..]);
            arrived.extend_from_slice(&sealed[..length]);
            let mut opening = Opening::default();
            assert_eq!(opening.next(&mut other, &mut arrived).is_ok(), good);
            assert!(opening.plain.capacity() < 1000);
        }
    }

    proptest! {
        #[test]
        fn garbage_returns_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (_, mut other) = pair();
            let mut arrived = BytesMut::from(&bytes[..]);
            let found = Opening::default().next(&mut other, &mut arrived);
            prop_assert!(!matches!(found, Ok(Some(_))));
        }
    }
}
