//! The handshake of a stream, and its frames.
//!
//! The cluster key encrypts the handshake (Noise NNpsk0). Then each side authenticates itself: it sends its record, and
//! a signature of the handshake hash, which is unique to the connection.
//!
//! ```text
//! dialler:   length (2) | version (1) | key id (4) | Noise message 1
//! listener:  length (2) | Noise message 2
//! both:      length (2) | sealed hello
//! dialler:   length (2) | sealed chunk, repeated
//! ```
//!
//! A hello of the dialler may ask for the stream to be passed on to another host. Then the handshake with that host follows, in
//! place of chunks, see [`super::relayed`].

use anyhow::{Context, bail, ensure};
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{Domain, NodeRecord, Signature, SignedRecord};
use ovl_proto::wire;
use serde::{Deserialize, Serialize};
use snow::{Builder, HandshakeState, TransportState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::keys::{self, ClusterKey, Identity, Keyring};
use crate::transport::Stream;

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
const PROLOGUE: &[u8] = b"ovl stream v1";
/// The length of a Noise message: an ephemeral key and a tag.
const NOISE_MESSAGE: usize = 32 + 16;
/// The maximum length of a hello: it contains one record and one signature.
const MAX_HELLO: usize = 2048;
/// The number of bytes that Noise adds to a chunk.
pub(super) const TAG: usize = 16;
/// The maximum length of a frame, which has a length field of two bytes.
pub(super) const MAX_FRAME: usize = 65_535;

/// The role of a side. It is signed, so that a hello cannot be reflected to its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Dialler = 0,
    Listener = 1,
}

/// The message by which a side authenticates itself.
#[derive(Debug)]
struct Hello {
    record: SignedRecord,
    /// The signature in [`Domain::Stream`] of the role and the handshake hash.
    signature: Signature,
    /// Of a dialler: the host to which the receiver is to pass the stream on.
    onward: Option<Onward>,
    /// Of a dialler: the receiver is to use the connection as if it had dialled.
    lent: bool,
    /// Of a dialler: which datagrams the connection is to carry.
    datagrams: Option<Datagrams>,
}

// A release without relayed streams, lent ones or those of datagrams must not take one for a stream of messages to itself.
ovl_proto::fields! { Hello { 1 record, 2 signature, 3 onward marked, 4 lent marked, 5 datagrams marked } }

/// What a dialler wants of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To send messages.
    Messages,
    /// To have it passed on.
    Onward(Onward),
    /// To lend it: see [`super::lent`].
    Lend,
    /// To carry datagrams: see [`super::datagrams`].
    Datagrams(Datagrams),
}

/// Which datagrams a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Datagrams {
    /// Gossip.
    Gossip,
    /// Those between the sockets of relayed datagrams.
    Relayed,
}

/// A request to pass a stream on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Onward {
    pub(super) to: NodeId,
    /// The number of members that may follow.
    pub(super) hop_limit: u8,
}

ovl_proto::fields! { Onward { 1 to, 2 hop_limit } }

/// An authenticated stream.
pub(super) struct AuthenticatedStream {
    pub(super) noise: TransportState,
    /// The cluster key of the handshake.
    pub(super) key: ClusterKeyId,
    pub(super) record: NodeRecord,
    pub(super) signed: SignedRecord,
    /// What the dialler wants.
    pub(super) purpose: Purpose,
}

/// Runs the handshake of the dialler with a cluster key.
pub(super) async fn dial(
    stream: &mut dyn Stream,
    key: &ClusterKey,
    identity: &Identity,
    own: &SignedRecord,
    purpose: Purpose,
) -> anyhow::Result<AuthenticatedStream> {
    let psk = psk(key);
    let mut noise = builder(&psk)?.build_initiator()?;
    let mut first = vec![0; NOISE_MESSAGE];
    let length = noise.write_message(&[], &mut first)?;
    first.truncate(length);
    let mut frame = vec![wire::version()];
    frame.extend_from_slice(&key.id().0);
    frame.append(&mut first);
    write_frame(stream, &frame).await?;

    let second = read_frame(stream, NOISE_MESSAGE).await.context("no reply to the handshake")?;
    noise.read_message(&second, &mut []).context("the peer does not have this cluster key")?;
    introduce(stream, noise, (Role::Dialler, purpose), key, identity, own).await
}

/// Runs the handshake of the listener.
pub(super) async fn listen(
    stream: &mut dyn Stream,
    keyring: &Keyring,
    identity: &Identity,
    own: &SignedRecord,
) -> anyhow::Result<AuthenticatedStream> {
    let first = read_frame(stream, 1 + 4 + NOISE_MESSAGE).await.context("invalid handshake")?;
    let Some((&version, rest)) = first.split_first() else { bail!("invalid handshake: it is empty") };
    ensure!(
        version == wire::version(),
        "the peer uses protocol version {version}, this host uses {}: run the same version of ovld on both",
        wire::version()
    );
    let Some((key_id, message)) = rest.split_first_chunk() else {
        bail!("invalid handshake: it is truncated")
    };
    let mut known = false;
    for key in keyring.opening(ClusterKeyId(*key_id)) {
        known = true;
        let psk = psk(key);
        let mut noise = builder(&psk)?.build_responder()?;
        if noise.read_message(message, &mut []).is_err() {
            continue;
        }
        let mut second = vec![0; NOISE_MESSAGE];
        let length = noise.write_message(&[], &mut second)?;
        second.truncate(length);
        write_frame(stream, &second).await?;
        return introduce(stream, noise, (Role::Listener, Purpose::Messages), key, identity, own).await;
    }
    ensure!(known, "the peer uses an unknown cluster key");
    bail!("invalid handshake: it is damaged or forged")
}

/// Runs the handshake of a dialler that sends these bytes as its hello, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) async fn dial_with_hello(
    stream: &mut dyn Stream,
    key: &ClusterKey,
    hello: &[u8],
) -> anyhow::Result<()> {
    let psk = psk(key);
    let mut noise = builder(&psk)?.build_initiator()?;
    let mut first = vec![0; NOISE_MESSAGE];
    noise.write_message(&[], &mut first)?;
    write_frame(stream, &[&[wire::VERSION], &key.id().0[..], &first].concat()).await?;
    let second = read_frame(stream, NOISE_MESSAGE).await?;
    noise.read_message(&second, &mut [])?;
    let mut noise = noise.into_transport_mode()?;
    let hello = hello.get(..MAX_HELLO - TAG).unwrap_or(hello);
    let mut sealed = vec![0; hello.len() + TAG];
    noise.write_message(hello, &mut sealed)?;
    write_frame(stream, &sealed).await
}

/// Authenticates both sides: exchanges and verifies their hellos.
async fn introduce(
    stream: &mut dyn Stream,
    noise: HandshakeState,
    (role, purpose): (Role, Purpose),
    key: &ClusterKey,
    identity: &Identity,
    own: &SignedRecord,
) -> anyhow::Result<AuthenticatedStream> {
    let hash = noise.get_handshake_hash().to_vec();
    let mut noise = noise.into_transport_mode()?;
    let signature = identity.sign(Domain::Stream, &proof(role, &hash));
    let mut hello = Hello { record: own.clone(), signature, onward: None, lent: false, datagrams: None };
    match purpose {
        Purpose::Messages => {}
        Purpose::Onward(onward) => hello.onward = Some(onward),
        Purpose::Lend => hello.lent = true,
        Purpose::Datagrams(kind) => hello.datagrams = Some(kind),
    }
    let hello = wire::encode(&hello)?;
    let mut sealed = vec![0; hello.len() + TAG];
    let length = noise.write_message(&hello, &mut sealed)?;
    sealed.truncate(length);
    write_frame(stream, &sealed).await?;

    let sealed = read_frame(stream, MAX_HELLO).await.context("the peer does not authenticate itself")?;
    let mut hello = vec![0; sealed.len()];
    let length = noise.read_message(&sealed, &mut hello)?;
    hello.truncate(length);
    let Hello { record: signed, signature, onward, lent, datagrams } = wire::decode(&hello)?;
    let record = keys::open_record(&signed)?;
    let theirs = if role == Role::Dialler { Role::Listener } else { Role::Dialler };
    ensure!(
        keys::verify(&record.public_key, Domain::Stream, &proof(theirs, &hash), &signature),
        "the peer claims to be host {} ({}), but its signature is invalid",
        record.name,
        record.id
    );
    let purpose = match (onward, datagrams) {
        (Some(onward), None) if !lent => Purpose::Onward(onward),
        (None, Some(kind)) if !lent => Purpose::Datagrams(kind),
        (None, None) if lent => Purpose::Lend,
        (None, None) => Purpose::Messages,
        _ => bail!("the peer wants two things of one stream"),
    };
    Ok(AuthenticatedStream { noise, key: key.id(), record, signed, purpose })
}

fn proof(role: Role, hash: &[u8]) -> Vec<u8> {
    [&[role as u8], hash].concat()
}

fn psk(key: &ClusterKey) -> Zeroizing<[u8; 32]> {
    key.derive(b"", PROLOGUE)
}

fn builder(psk: &[u8; 32]) -> Result<Builder<'_>, snow::Error> {
    Builder::new(PATTERN.parse()?).prologue(PROLOGUE)?.psk(0, psk)
}

async fn write_frame(stream: &mut dyn Stream, frame: &[u8]) -> anyhow::Result<()> {
    let mut bytes = u16::try_from(frame.len())?.to_be_bytes().to_vec();
    bytes.extend_from_slice(frame);
    stream.write_all(&bytes).await?;
    Ok(())
}

/// Reads a frame of the handshake. Its size is bounded, because the peer is not authenticated yet.
async fn read_frame(stream: &mut dyn Stream, most: usize) -> anyhow::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    ensure!(length <= most, "invalid frame: {length} bytes, at most {most} are expected");
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hello of a release without relayed streams.
    #[derive(Debug)]
    struct EarlierHello {
        record: SignedRecord,
        signature: Signature,
    }

    ovl_proto::fields! { EarlierHello { 1 record, 2 signature } }

    #[test]
    fn releases_without_relayed_streams_understand_a_hello_unless_it_asks_for_one() {
        let signature = Signature([7; 64]);
        let record = SignedRecord { body: vec![1, 2, 3], signature };
        let earlier = wire::encode(&EarlierHello { record: record.clone(), signature }).unwrap();
        let hello: Hello = wire::decode(&earlier).unwrap();
        assert!(hello.onward.is_none() && hello.record == record);
        assert_eq!(wire::encode(&hello).unwrap(), earlier);
        let onward = Some(Onward { to: NodeId([1; 10]), hop_limit: 3 });
        let asking = wire::encode(&Hello { onward, ..hello }).unwrap();
        assert_eq!(wire::decode::<Hello>(&asking).unwrap().onward, onward);
        assert!(wire::decode::<EarlierHello>(&asking).is_err(), "it must not act on it");
        let hello: Hello = wire::decode(&earlier).unwrap();
        let lent = wire::encode(&Hello { lent: true, ..hello }).unwrap();
        assert!(wire::decode::<Hello>(&lent).unwrap().lent && wire::decode::<EarlierHello>(&lent).is_err());
        let hello: Hello = wire::decode(&earlier).unwrap();
        let datagrams = Some(Datagrams::Relayed);
        let carrying = wire::encode(&Hello { datagrams, ..hello }).unwrap();
        assert_eq!(wire::decode::<Hello>(&carrying).unwrap().datagrams, datagrams);
        assert!(wire::decode::<EarlierHello>(&carrying).is_err());
    }
}
