//! The one binary codec: bincode, bounded. Every top-level frame begins with a version byte.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); `docs/dependencies.md` has the waiver. All use of
//! it is in this module.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version byte of every frame: gossip datagrams and sync messages alike. A frame with another
/// version is refused, and counted.
pub const VERSION: u8 = 1;

/// No frame is larger than this, on any path.
pub const MAX_FRAME: usize = 16 << 20;

/// Bytes that are no frame of ours.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Sent by a version that we do not speak.
    #[error("frame of version {0}, this is version {VERSION}")]
    Version(u8),
    /// Nothing there.
    #[error("empty frame")]
    Empty,
    /// Cut short, too long, or not what was expected.
    #[error("malformed frame: {0}")]
    Malformed(String),
}

/// Nothing that is kept in a file of ours is larger than this.
pub const MAX_STORED: usize = 256 << 20;

/// The body of a frame without its version byte: for what is nested in other frames, and signed.
pub fn encode_body<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    within(MAX_FRAME, encode_stored(value)?)
}

/// For a file of ours: several things that each fit a frame.
pub fn encode_stored<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    within(MAX_STORED, bytes)
}

/// The reverse of [`encode_stored`].
pub fn decode_stored<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    decode_with::<T, MAX_STORED>(bytes)
}

/// bincode applies its limit when it reads, and not when it writes.
fn within(most: usize, bytes: Vec<u8>) -> Result<Vec<u8>, WireError> {
    if bytes.len() > most {
        return Err(too_long(bytes.len(), most));
    }
    Ok(bytes)
}

fn too_long(length: usize, most: usize) -> WireError {
    WireError::Malformed(format!("{length} bytes, at most {most} are allowed"))
}

/// The reverse of [`encode_body`]; bytes left over are an error.
pub fn decode_body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    decode_with::<T, MAX_FRAME>(bytes)
}

fn decode_with<T: DeserializeOwned, const MOST: usize>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MOST {
        return Err(too_long(bytes.len(), MOST));
    }
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, bincode::config::standard().with_limit::<MOST>())
            .map_err(|error| WireError::Malformed(error.to_string()))?;
    if used != bytes.len() {
        return Err(WireError::Malformed(format!("{} bytes left over", bytes.len() - used)));
    }
    Ok(value)
}

/// A whole frame: version byte, then the body.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![VERSION];
    frame.append(&mut encode_body(value)?);
    Ok(frame)
}

/// The reverse of [`encode`].
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, WireError> {
    match frame.split_first() {
        None => Err(WireError::Empty),
        Some((&VERSION, body)) => decode_body(body),
        Some((&version, _)) => Err(WireError::Version(version)),
    }
}

/// Bytes as what they are, and not as a list of numbers that is gone through one by one: for fields with
/// `#[serde(with = "wire::bytes")]`. On the wire it is the same.
pub mod bytes {
    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    /// Writes them.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_byte_buf(Bytes)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = list.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sync::Message;

    #[test]
    fn another_version_is_refused() {
        assert!(matches!(decode::<u8>(&[9, 1]), Err(WireError::Version(9))));
        assert!(matches!(decode::<u8>(&[]), Err(WireError::Empty)));
        assert!(matches!(decode::<u8>(&[VERSION, 1, 2]), Err(WireError::Malformed(_))));
    }

    #[test]
    fn bytes_are_on_the_wire_what_a_list_of_them_is() {
        #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        struct Holder(#[serde(with = "bytes")] Vec<u8>);
        for length in [0, 1, 300] {
            let all = vec![7_u8; length];
            let encoded = encode_body(&Holder(all.clone())).unwrap();
            assert_eq!(encoded, encode_body(&all).unwrap());
            assert_eq!(decode_body::<Holder>(&encoded).unwrap(), Holder(all));
        }
        // A length that is not there allocates nothing.
        assert!(decode_body::<Holder>(&[0xfc, 0xff, 0xff, 0xff, 0x7f]).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Message>(&bytes);
            let _ = decode_body::<Message>(&bytes);
        }
    }
}
