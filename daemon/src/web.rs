//! The HTTP server for programs and people that watch ovld: metrics, and the page.
//!
//! It reads and writes; what a path stands for, and who may see it, is for [`Pages`]. There is no TLS: a Unix socket is
//! protected by its mode, and TCP is for a loopback address, a proxy or a trusted network.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use http_body_util::channel::Channel;
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_io_timeout::TimeoutStream;

use crate::slots::{ClientSlot, ClientSlots};

/// Maximum number of connections at a time. Further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// Time in which a request must arrive. Between two requests of a connection, it is the time that a client may be idle.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// Time in which a client must take some of what is sent to it.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// Time after which a connection is closed. Clients open another one.
const LIFETIME: Duration = Duration::from_secs(600);
/// Maximum size of a request's head, in bytes. hyper wants at least 8 KiB.
const MAX_HEAD: usize = 8 << 10;

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    /// At a TCP port.
    Tcp(SocketAddr),
    /// At a Unix socket, for root alone.
    Unix(PathBuf),
}

impl Listen {
    /// Parses `ADDR:PORT` or `unix:/PATH`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(path) => Err(format!("'{path}' does not begin with /")),
            None => match text.parse::<SocketAddr>() {
                Ok(address) if address.port() != 0 => Ok(Self::Tcp(address)),
                _ => Err(format!("'{text}' is neither ADDR:PORT nor unix:/PATH")),
            },
        }
    }

    /// Whether only this host reaches it.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(at) => at.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }

    /// Returns the port at which other hosts reach the server at this address of the host; 0 if they do not.
    pub(crate) fn port_at(&self, address: IpAddr) -> u16 {
        match self {
            Self::Tcp(at) if at.ip() == address => at.port(),
            // The address `::` takes connections of both families.
            Self::Tcp(at) if at.ip().is_unspecified() && (at.is_ipv6() || address.is_ipv4()) => at.port(),
            Self::Tcp(_) | Self::Unix(_) => 0,
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a client asks for. The method is GET or HEAD.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// The path.
    pub(crate) path: &'a str,
    /// The query behind the path, without `?`. Empty if there is none.
    pub(crate) query: &'a str,
    /// The header.
    pub(crate) headers: &'a HeaderMap,
}

impl<'a> Asked<'a> {
    /// Returns a field of the header. The empty string if it is absent or not ASCII.
    pub(crate) fn header(&self, name: HeaderName) -> &'a str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    status: StatusCode,
    content_type: &'static str,
    body: Body,
}

/// The content of an answer: a document, or one that is written as time passes.
type Body = Either<Full<Bytes>, Channel<Bytes>>;

impl Answer {
    /// A document.
    pub(crate) fn document(content_type: &'static str, content: impl Into<Bytes>) -> Self {
        Self { status: StatusCode::OK, content_type, body: Either::Left(Full::new(content.into())) }
    }

    /// Something else than what was asked for, with a sentence for people.
    pub(crate) fn other(status: StatusCode, sentence: &str) -> Self {
        let body = Either::Left(Full::new(Bytes::from(format!("{sentence}\n"))));
        Self { status, content_type: "text/plain; charset=utf-8", body }
    }

    /// A stream of events (`text/event-stream` of the HTML standard), which others write to.
    pub(crate) fn events(events: Channel<Bytes>) -> Self {
        Self { status: StatusCode::OK, content_type: "text/event-stream", body: Either::Right(events) }
    }
}

/// What answers requests.
pub(crate) trait Pages: 'static {
    /// Fields of the header of each answer, besides those of HTTP itself. Names are in lower case.
    const HEADERS: &'static [(&'static str, &'static str)];

    /// Answers a request.
    async fn answer(self: &Rc<Self>, asked: &Asked<'_>) -> Answer;
}

/// Serves clients until the task is dropped.
///
/// # Errors
///
/// Why the address or the socket cannot be listened at.
pub(crate) async fn serve(pages: Rc<impl Pages>, listen: &Listen, opened: impl FnOnce()) -> io::Result<()> {
    let slots = ClientSlots::new(MAX_CONNECTIONS);
    let listener = Listener::open(listen).await?;
    opened();
    loop {
        let Some(slot) = slots.wait().await else { return Ok(()) };
        match listener.accept().await {
            Ok(stream) => spawn(&pages, stream, slot),
            Err(error) => {
                // The usual cause is that the file descriptors are exhausted. Clients that disconnect free some.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A stream of either kind.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn open(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            Listen::Unix(path) => listen_unix(path).map(Self::Unix),
        }
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Creates the socket. Replaces one that a previous run left, but nothing else and none that a process listens at.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err()
    {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn spawn(pages: &Rc<impl Pages>, stream: Box<dyn Stream>, slot: ClientSlot) {
    let pages = Rc::clone(pages);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(TAKEN_WITHIN));
    tokio::task::spawn_local(async move {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_WITHIN)
            .max_buf_size(MAX_HEAD)
            .serve_connection(
                TokioIo::new(Box::pin(stream)),
                service_fn(|request| answer(Rc::clone(&pages), request)),
            );
        // An error means that the client went away or sent no HTTP; it has no recipient then.
        let _ = tokio::time::timeout(LIFETIME, connection).await;
        drop(slot);
    });
}

async fn answer<P: Pages>(pages: Rc<P>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let asked = Asked {
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        headers: request.headers(),
    };
    let is_read = request.method() == Method::GET || request.method() == Method::HEAD;
    let answer = match is_read {
        true => pages.answer(&asked).await,
        false => Answer::other(StatusCode::METHOD_NOT_ALLOWED, "everything here is read with GET"),
    };
    let mut response = Response::new(answer.body);
    *response.status_mut() = answer.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    if !is_read {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    for (name, value) in P::HEADERS {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_to_listen_is_an_address_with_a_port_or_a_path() {
        assert_eq!(Listen::parse("[::1]:9640").unwrap(), Listen::Tcp("[::1]:9640".parse().unwrap()));
        assert_eq!(Listen::parse("unix:/run/m").unwrap(), Listen::Unix("/run/m".into()));
        for wrong in ["9640", "host:9640", "127.0.0.1", "127.0.0.1:0", "unix:m", ""] {
            assert!(Listen::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn port_is_told_to_others_only_where_they_reach_it() {
        let port = |listen: &str, own: &str| Listen::parse(listen).unwrap().port_at(own.parse().unwrap());
        assert_eq!(port("0.0.0.0:9640", "192.0.2.1"), 9640);
        assert_eq!(port("[::]:9640", "192.0.2.1"), 9640);
        assert_eq!(port("192.0.2.1:9640", "192.0.2.1"), 9640);
        assert_eq!(port("0.0.0.0:9640", "2001:db8::1"), 0);
        assert_eq!(port("192.0.2.2:9640", "192.0.2.1"), 0);
        assert_eq!(port("127.0.0.1:9640", "192.0.2.1"), 0);
        assert_eq!(port("unix:/run/m", "192.0.2.1"), 0);
    }
}
