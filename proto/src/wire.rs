//! The binary codec: bincode with size limits. Every top-level frame begins with a version byte.
//!
//! What may grow is encoded as a list of numbered fields: see [`fields`]. bincode itself is positional, and is used for
//! the values of the fields.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); `docs/dependencies.md` has the waiver. Only this module uses it.

pub mod fields;

use bincode::error::{DecodeError, EncodeError};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

/// The version byte of every frame, in gossip datagrams and streams: the wire version. It changes only if a message
/// changes its meaning; what is added is a field or a number that others do not know.
pub const VERSION: u8 = 1;

/// The version byte of an introduction: a datagram of gossip that has a record and nothing else. It is the same in every
/// release, so that hosts without a common wire version can name each other.
pub const INTRODUCTION: u8 = 0;

/// Returns the wire version that this daemon speaks: [`VERSION`].
///
/// Debug builds take another one from the variable `OVL_TEST_WIRE_VERSION`, so that tests can play a later release.
pub fn version() -> u8 {
    #[cfg(debug_assertions)]
    {
        static PLAYED: std::sync::OnceLock<Option<u8>> = std::sync::OnceLock::new();
        let played = PLAYED
            .get_or_init(|| std::env::var("OVL_TEST_WIRE_VERSION").ok().and_then(|text| text.parse().ok()));
        if let Some(played) = played {
            return *played;
        }
    }
    VERSION
}

/// The maximum size of a frame in bytes.
pub const MAX_FRAME: usize = 16 << 20;

/// Why bytes cannot be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The frame has another version.
    #[error("frame has version {0}, this release understands {own}", own = version())]
    Version(u8),
    /// The frame is empty.
    #[error("empty frame")]
    Empty,
    /// The frame is truncated, too long, or of another type.
    #[error("{MALFORMED}{0}")]
    Malformed(String),
    /// A later release wrote it, and whoever does not know the named field, kind or message must not act on it.
    #[error("{NOT_UNDERSTOOD}{0}")]
    NotUnderstood(String),
}

/// How the text of [`WireError::Malformed`] begins.
const MALFORMED: &str = "malformed frame: ";
/// How the text of [`WireError::NotUnderstood`] begins. Errors pass through serde as text.
const NOT_UNDERSTOOD: &str = "a later release of ovld wrote it, and this one does not know ";

impl WireError {
    /// Reads an error that passed through serde.
    fn of_text(text: &str) -> Self {
        match text.strip_prefix(NOT_UNDERSTOOD) {
            Some(what) => Self::NotUnderstood(what.to_owned()),
            None => Self::Malformed(text.strip_prefix(MALFORMED).unwrap_or(text).to_owned()),
        }
    }

    fn of_decoding(error: &DecodeError) -> Self {
        match error {
            DecodeError::OtherString(text) => Self::of_text(text),
            other => Self::Malformed(other.to_string()),
        }
    }

    fn of_encoding(error: &EncodeError) -> Self {
        match error {
            EncodeError::OtherString(text) => Self::of_text(text),
            other => Self::Malformed(other.to_string()),
        }
    }
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
    // Most values are of this size or smaller.
    let mut bytes = Vec::with_capacity(128);
    bare::encode_into(value, &mut bytes)?;
    check_size(MAX_STORED, bytes)
}

/// bincode without limits on what is encoded.
mod bare {
    use bincode::enc::write::Writer;
    use bincode::error::EncodeError;
    use serde::Serialize;

    use super::WireError;

    struct Appender<'a>(&'a mut Vec<u8>);

    impl Writer for Appender<'_> {
        fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }

    /// Appends the encoding of a value.
    pub(super) fn encode_into<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) -> Result<(), WireError> {
        bincode::serde::encode_into_writer(value, Appender(out), bincode::config::standard())
            .map_err(|error| WireError::of_encoding(&error))
    }
}

/// Bytes that are serialized as bytes rather than element by element.
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
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
        bincode::serde::borrow_decode_from_slice(bytes, bincode::config::standard().with_limit::<MOST>())
            .map_err(|error| WireError::of_decoding(&error))?;
    if used != bytes.len() {
        return Err(WireError::Malformed(format!("{} bytes left over", bytes.len() - used)));
    }
    Ok(value)
}

/// Returns the list of fields in a body that is one, whatever is in it.
///
/// # Errors
///
/// If the body is no list of bytes.
pub fn fields_of(body: &[u8]) -> Result<&[u8], WireError> {
    let (fields, used) = bincode::serde::borrow_decode_from_slice(body, bincode::config::standard())
        .map_err(|error| WireError::of_decoding(&error))?;
    if used == body.len() { Ok(fields) } else { Err(WireError::Malformed("bytes left over".to_owned())) }
}

/// Encodes a frame: the version byte, then the value.
///
/// # Errors
///
/// If the encoding exceeds [`MAX_FRAME`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![version()];
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
        Some((first, body)) if *first == version() => decode_body(body),
        Some((other, _)) => Err(WireError::Version(*other)),
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
