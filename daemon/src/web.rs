//! The HTTP server for programs that watch ovld: metrics, and the list of hosts that have some.
//!
//! It reads and writes; what a path stands for is for [`Pages`]. There is no TLS and no login: a Unix socket is protected by
//! its directory, and TCP is for a loopback address, a proxy or a trusted network.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of connections at a time. Further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// Time in which a request must arrive. Between two requests of a connection, it is the time that a client may be idle.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
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

/// A document that a path stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    /// The media type.
    pub(crate) content_type: &'static str,
    /// The document.
    pub(crate) text: String,
}

/// What answers requests.
pub(crate) trait Pages: 'static {
    /// Returns what a path stands for. `None` if it stands for nothing. `accepted` are the media types that the client
    /// accepts, as its header says.
    ///
    /// # Errors
    ///
    /// Why the document cannot be made now.
    async fn page(self: &Rc<Self>, path: &str, accepted: &str) -> Result<Option<Page>, String>;
}

/// Serves clients until the task is dropped.
///
/// # Errors
///
/// Why the address or the socket cannot be listened at.
pub(crate) async fn serve(pages: Rc<impl Pages>, listen: &Listen, opened: impl FnOnce()) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let listener = Listener::open(listen).await?;
    opened();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok(stream) => spawn(&pages, stream, place),
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

fn spawn(pages: &Rc<impl Pages>, stream: Box<dyn Stream>, place: OwnedSemaphorePermit) {
    let pages = Rc::clone(pages);
    tokio::task::spawn_local(async move {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_WITHIN)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service_fn(|request| answer(Rc::clone(&pages), request)));
        // An error means that the client went away or sent no HTTP; it has no recipient then.
        let _ = tokio::time::timeout(LIFETIME, connection).await;
        drop(place);
    });
}

async fn answer(
    pages: Rc<impl Pages>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "everything here is read with GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    let accepted = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(match pages.page(request.uri().path(), accepted).await {
        Ok(Some(page)) => respond(StatusCode::OK, page),
        Ok(None) => plain(StatusCode::NOT_FOUND, "there are /metrics and /targets\n"),
        Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, &format!("{why}\n")),
    })
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    respond(status, Page { content_type: "text/plain; charset=utf-8", text: text.to_owned() })
}

fn respond(status: StatusCode, page: Page) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(page.text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    response
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
