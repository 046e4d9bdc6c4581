//! A blocking client for the control socket, used by `ovlctl` and the plugins.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::info::Failure;
use crate::reply::Reply;
use crate::request::Request;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket cannot be connected to.
    #[error("cannot reach ovld at {}: {error}. {}", path.display(), advice(error))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
    /// The connection was lost.
    #[error("lost the connection to ovld: {0}. Is it restarting? `journalctl -u ovld` shows its log")]
    Io(#[from] io::Error),
    /// The reply is not a valid one.
    #[error(
        "ovld sent a reply that this release does not understand: {0}. Compare `ovlctl --version` and `ovld --version`"
    )]
    Protocol(#[from] serde_json::Error),
    /// ovld replied with an error.
    #[error("{}", .0.message)]
    Failed(Failure),
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "Run as root",
        _ => "Is it running? `systemctl start ovld` starts it; --socket or OVL_SOCKET names another socket",
    }
}

/// A connection to ovld.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to ovld. `timeout` bounds each later read; `None` waits without limit.
    ///
    /// # Errors
    ///
    /// If the socket cannot be connected to.
    pub fn connect(path: &Path, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(timeout)?;
            stream.set_write_timeout(Some(Duration::from_secs(10)))?;
            Ok(stream)
        };
        connect()
            .map(|stream| Self { stream: BufReader::new(stream) })
            .map_err(|error| ClientError::Connect { path: path.to_owned(), error })
    }

    /// Sends a request and reads its reply.
    ///
    /// # Errors
    ///
    /// If the connection is lost, the reply is malformed, or it is [`Reply::Error`].
    pub fn request(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        self.next_reply()
    }

    /// Reads the next reply to [`Request::Events`].
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub fn next_reply(&mut self) -> Result<Reply, ClientError> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_str(&line)? {
            Reply::Error(failure) => Err(ClientError::Failed(failure)),
            reply => Ok(reply),
        }
    }
}
