//! Runs arbitrary bytes through what reads streams, for the fuzzer in `tests/fuzz` and for property tests.

use std::io;
use std::sync::OnceLock;

use bytes::BytesMut;
use ovl_proto::sync::Message;
use ovl_proto::wire;
use snow::TransportState;
use tokio::io::{AsyncWriteExt as _, DuplexStream, duplex};

use super::frame::Opening;
use super::noise;
use crate::keys::{ClusterKey, Identity, Keyring};
use crate::transport::{Side, Stream};

impl Stream for DuplexStream {
    fn tune(&self, _: Side) -> io::Result<()> {
        Ok(())
    }
}

/// Reads frames: the bytes themselves, and chunks that an authenticated peer seals. The first byte is the length of a
/// chunk.
pub fn frames(bytes: &[u8]) {
    let Some((_, mut other)) = pair() else { return };
    let mut arrived = BytesMut::from(bytes);
    assert!(!matches!(Opening::default().next(&mut other, &mut arrived), Ok(Some(_))));
    let Some((mut near, mut far)) = pair() else { return };
    let Some((length, rest)) = bytes.split_first() else { return };
    let mut arrived = BytesMut::new();
    for chunk in rest.chunks(usize::from(*length).max(1)) {
        let mut sealed = vec![0; chunk.len() + noise::TAG];
        if near.write_message(chunk, &mut sealed).is_err() {
            return;
        }
        arrived.extend_from_slice(&(sealed.len() as u16).to_be_bytes());
        arrived.extend_from_slice(&sealed);
    }
    let mut opening = Opening::default();
    while let Ok(Some(message)) = opening.next(&mut far, &mut arrived) {
        let _ = wire::decode::<Message>(&message);
    }
}

/// Two ends of an authenticated stream.
fn pair() -> Option<(TransportState, TransportState)> {
    let builder = || Some(snow::Builder::new("Noise_NN_25519_AESGCM_SHA256".parse().ok()?));
    let (mut one, mut other) = (builder()?.build_initiator().ok()?, builder()?.build_responder().ok()?);
    let mut buffer = [0; 100];
    let length = one.write_message(&[], &mut buffer).ok()?;
    other.read_message(buffer.get(..length)?, &mut []).ok()?;
    let length = other.write_message(&[], &mut buffer).ok()?;
    one.read_message(buffer.get(..length)?, &mut []).ok()?;
    Some((one.into_transport_mode().ok()?, other.into_transport_mode().ok()?))
}

/// Answers the handshake of a dialler that sends these bytes, without the cluster key, and with it as its hello.
pub fn handshake(bytes: &[u8]) {
    static IDENTITY: OnceLock<Identity> = OnceLock::new();
    let identity = IDENTITY.get_or_init(Identity::ephemeral);
    let keyring = Keyring::new(ClusterKey::new([1; 32]), Vec::new());
    let record = crate::keys::sample_record(identity);
    let Ok(own) = identity.sign_record(&record) else { return };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    runtime.block_on(async {
        let (mut near, mut far) = duplex(1 << 16);
        let sent = near.write_all(bytes.get(..60_000).unwrap_or(bytes)).await;
        let closed = near.shutdown().await;
        assert!(sent.is_ok() && closed.is_ok());
        assert!(noise::listen(&mut far, &keyring, identity, &own).await.is_err());

        let (mut near, mut far) = duplex(1 << 16);
        let (dialled, answered) = tokio::join!(
            noise::dial_with_hello(&mut near, keyring.sealing(), bytes),
            noise::listen(&mut far, &keyring, identity, &own),
        );
        drop(dialled);
        assert!(answered.is_err());
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::frames(&bytes);
            super::handshake(&bytes);
        }
    }

    #[test]
    fn corpora_pass() {
        ovl_corpus::replay("frames", super::frames);
        ovl_corpus::replay("handshakes", super::handshake);
    }
}
