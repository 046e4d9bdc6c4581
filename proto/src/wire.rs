//! The binary codec: bincode with size limits. Every top-level frame begins with a version byte.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); `docs/dependencies.md` has the waiver. Only this module uses it.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version byte of every frame, in gossip datagrams and streams. A frame with another version is rejected, and
/// counted.
pub const VERSION: u8 = 1;

/// The maximum size of a frame in bytes.
pub const MAX_FRAME: usize = 16 << 20;

/// Why bytes cannot be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The frame has another version.
    #[error("frame has version {0}, this release understands {VERSION}")]
    Version(u8),
    /// The frame is empty.
    #[error("empty frame")]
    Empty,
    /// The frame is truncated, too long, or of another type.
    #[error("malformed frame: {0}")]
    Malformed(String),
}

/// The maximum size of a state file in bytes.
pub const MAX_STORED: usize = 256 << 20;

/// Encodes a value without a version byte: for values that are signed or nested in frames.
///
/// # Errors
///
/// If the encoding exceeds [`MAX_FRAME`].
pub fn encode_body<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    check_size(MAX_FRAME, encode_stored(value)?)
}

/// Encodes a value for a state file, which may contain several values of frame size.
///
/// # Errors
///
/// If the encoding exceeds [`MAX_STORED`].
pub fn encode_stored<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    check_size(MAX_STORED, bytes)
}

/// Decodes what [`encode_stored`] returns.
///
/// # Errors
///
/// If the bytes are malformed or exceed [`MAX_STORED`].
pub fn decode_stored<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    decode_with::<T, MAX_STORED>(bytes)
}

/// Checks the size of an encoding: bincode enforces its limit only when it decodes.
fn check_size(most: usize, bytes: Vec<u8>) -> Result<Vec<u8>, WireError> {
    if bytes.len() > most {
        return Err(too_long(bytes.len(), most));
    }
    Ok(bytes)
}

fn too_long(length: usize, most: usize) -> WireError {
    WireError::Malformed(format!("{length} bytes exceed the limit of {most}"))
}

/// Decodes what [`encode_body`] returns.
///
/// # Errors
///
/// If the bytes are malformed, exceed [`MAX_FRAME`], or are longer than the value.
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

/// Encodes a frame: the version byte, then the value.
///
/// # Errors
///
/// If the encoding exceeds [`MAX_FRAME`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![VERSION];
    frame.append(&mut encode_body(value)?);
    Ok(frame)
}

/// Decodes what [`encode`] returns.
///
/// # Errors
///
/// If the frame is empty, malformed or of another version.
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, WireError> {
    match frame.split_first() {
        None => Err(WireError::Empty),
        Some((&VERSION, body)) => decode_body(body),
        Some((&version, _)) => Err(WireError::Version(version)),
    }
}

/// Serializes a byte vector as bytes rather than element by element: for `#[serde(with = "wire::bytes")]`.
///
/// The encoding on the wire is the same.
pub mod bytes {
    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    /// Serializes bytes.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    /// Deserializes bytes.
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
    fn other_version_is_rejected() {
        assert!(matches!(decode::<u8>(&[9, 1]), Err(WireError::Version(9))));
        assert!(matches!(decode::<u8>(&[]), Err(WireError::Empty)));
        assert!(matches!(decode::<u8>(&[VERSION, 1, 2]), Err(WireError::Malformed(_))));
    }

    #[test]
    fn bytes_have_the_same_encoding_as_a_list() {
        #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        struct Holder(#[serde(with = "bytes")] Vec<u8>);
        for length in [0, 1, 300] {
            let all = vec![7_u8; length];
            let encoded = encode_body(&Holder(all.clone())).unwrap();
            assert_eq!(encoded, encode_body(&all).unwrap());
            assert_eq!(decode_body::<Holder>(&encoded).unwrap(), Holder(all));
        }
        // A length without its bytes allocates nothing.
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
