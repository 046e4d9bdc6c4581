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

/// The body of a frame without its version byte: for what is nested in other frames, and signed.
pub fn encode_body<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard().with_limit::<MAX_FRAME>())
        .map_err(|error| WireError::Malformed(error.to_string()))
}

/// The reverse of [`encode_body`]; bytes left over are an error.
pub fn decode_body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MAX_FRAME {
        return Err(WireError::Malformed(format!("{} bytes, at most {MAX_FRAME} are allowed", bytes.len())));
    }
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, bincode::config::standard().with_limit::<MAX_FRAME>())
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

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Message>(&bytes);
            let _ = decode_body::<Message>(&bytes);
        }
    }
}
