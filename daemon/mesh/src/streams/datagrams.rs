//! Streams that carry datagrams where UDP is blocked: the handshake. What goes over them afterwards is for threads of their own.
//!
//! Gossip and relayed datagrams have a stream each, so that a full one does not delay signs of life.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, ensure};
use ovl_proto::record::{NodeRecord, SignedRecord};
use snow::TransportState;
use tokio::time::timeout;
use tracing::debug;

pub use super::noise::Datagrams;
use super::noise::{self, AuthenticatedStream, Purpose};
use super::{HANDSHAKE, Shared, StreamEvent, Streams};
use crate::transport::{Side, Stream};

/// An authenticated stream for datagrams.
pub struct DatagramStream {
    /// What it carries.
    pub kind: Datagrams,
    /// The record of the host at the other end, verified. It may not be the latest one.
    pub record: NodeRecord,
    /// The signed record, to be passed on.
    pub signed: SignedRecord,
    /// The address of the other end, as this host sees it.
    pub at: SocketAddr,
    /// Whether this host dialled.
    pub is_dialled: bool,
    /// The connection.
    pub connection: TcpStream,
    /// What seals and opens its frames.
    pub cipher: FrameCipher,
}

impl std::fmt::Debug for DatagramStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, record, at, is_dialled, .. } = self;
        f.debug_struct("DatagramStream")
            .field("kind", kind)
            .field("peer", &record.id)
            .field("at", at)
            .field("is_dialled", is_dialled)
            .finish_non_exhaustive()
    }
}

/// The cipher of a stream after its handshake. Each frame grows by 16 bytes.
#[derive(Debug)]
pub struct FrameCipher(TransportState);

impl FrameCipher {
    /// Seals a frame of up to 65,519 bytes. Returns the length of what it wrote to `sealed`; `None` if it does not fit.
    pub fn seal(&mut self, frame: &[u8], sealed: &mut [u8]) -> Option<usize> {
        self.0.write_message(frame, sealed).ok()
    }

    /// Opens the next frame. Returns the length of what it wrote to `frame`; `None` if it is damaged, forged or not the next one.
    pub fn open(&mut self, sealed: &[u8], frame: &mut [u8]) -> Option<usize> {
        self.0.read_message(sealed, frame).ok()
    }
}

impl Streams {
    /// Dials a host for a stream that carries datagrams. Which host answers is known afterwards.
    pub fn dial_datagrams(
        &self,
        to: SocketAddr,
        kind: Datagrams,
    ) -> impl Future<Output = anyhow::Result<DatagramStream>> + Send + use<> {
        let shared = std::sync::Arc::clone(&self.shared);
        async move {
            let dialled = async {
                let mut stream = shared.connect(to).await?;
                stream.tune(Side::Dialled)?;
                let (keyring, record) = (shared.keyring(), shared.record());
                let purpose = Purpose::Datagrams(kind);
                let secured =
                    noise::dial(&mut *stream, keyring.sealing(), &shared.identity, &record, purpose).await?;
                ensure!(secured.record.id != shared.identity.id(), "it is this host");
                datagram_stream(stream, secured, (kind, to, true))
            };
            timeout(HANDSHAKE, dialled).await.context("no answer")?
        }
    }
}

/// Hands an accepted stream to the daemon.
pub(super) async fn accept(
    stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    (kind, from): (Datagrams, SocketAddr),
    shared: &Shared,
) {
    match datagram_stream(stream, secured, (kind, from, false)) {
        // Without a receiver, the daemon ends.
        Ok(stream) => drop(shared.events.send(StreamEvent::Datagrams(Box::new(stream))).await),
        Err(error) => debug!(%from, "stream for datagrams closed: {error:#}"),
    }
}

fn datagram_stream(
    stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    (kind, at, is_dialled): (Datagrams, SocketAddr, bool),
) -> anyhow::Result<DatagramStream> {
    let AuthenticatedStream { noise, record, signed, .. } = secured;
    let connection = stream.into_tcp().context("it is no TCP connection")?;
    Ok(DatagramStream { kind, record, signed, at, is_dialled, connection, cipher: FrameCipher(noise) })
}
