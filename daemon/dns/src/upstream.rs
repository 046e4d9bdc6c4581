//! Queries one upstream server: over UDP, and over TCP if the answer is truncated.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::cache::Question;
use crate::message::{self, Parts};
use crate::wire::{self, CD, Rcode};

/// The time after which a query to a server fails.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The largest accepted datagram, in bytes. Some servers ignore the smaller size that queries announce.
const MAX_DATAGRAM: usize = 8 << 10;

/// An upstream answer without its OPT record.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) message: Vec<u8>,
    pub(crate) parts: Parts,
}

/// Queries one server. The port is new and the id random, so an off-path attacker must guess both (RFC 5452).
/// A datagram that does not answer the question is ignored.
///
/// # Errors
///
/// [`io::ErrorKind::TimedOut`] if the server does not answer in time, and what the kernel reports.
pub(crate) async fn ask(server: SocketAddr, question: &Question) -> io::Result<Reply> {
    match timeout(TIMEOUT, exchange(server, question)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn exchange(server: SocketAddr, question: &Question) -> io::Result<Reply> {
    let reply = by_udp(server, question, true).await?;
    // The server does not know EDNS (RFC 6891, section 7).
    let old = matches!(reply.parts.rcode, Rcode::FORMAT_ERROR | Rcode::NOT_IMPLEMENTED);
    let reply = if old { by_udp(server, question, false).await? } else { reply };
    if reply.parts.truncated { by_tcp(server, question, !old).await } else { Ok(reply) }
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| io::Error::other("no random number for the query id"))?;
    Ok(u16::from_ne_bytes(bytes))
}

fn message_of(question: &Question, id: u16, edns: bool) -> Vec<u8> {
    let flags = if question.unchecked { CD } else { 0 };
    wire::question(id, &question.name(), question.kind, flags, edns.then_some(question.dnssec))
}

/// Parses a message. `None` if it does not answer the question.
fn reply(message: &[u8], id: u16, question: &Question) -> Option<Reply> {
    if !message::is_answer(message, id, &question.name(), question.kind) {
        return None;
    }
    let parts = message::parse_answer(message)?;
    let mut message = message.get(..parts.end)?.to_vec();
    message.get_mut(10..12)?.copy_from_slice(&parts.additional.to_be_bytes());
    Some(Reply { message, parts })
}

async fn by_udp(server: SocketAddr, question: &Question, edns: bool) -> io::Result<Reply> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    let id = random_id()?;
    socket.send(&message_of(question, id, edns)).await?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let received = buffer.get(..length).unwrap_or_default();
        if let Some(reply) = reply(received, id, question) {
            return Ok(reply);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &Question, edns: bool) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(server).await?;
    let id = random_id()?;
    let message = message_of(question, id, edns);
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes()[..], &message].concat()).await?;
    let mut buffer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut buffer).await?;
    let reply = reply(&buffer, id, question).filter(|reply| !reply.parts.truncated);
    reply.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
