//! Requests to ovld, and what happens while it is unavailable.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ovl_control::{Client, ClientError, DockerCall, DockerDeleted, FailureKind, Reply, Request};
use ovl_runtimes::docker::{self, Later};
use serde_json::Value;

/// How long ovld may take for a call that it has accepted: it may wait for other hosts.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to retry while ovld is down or not ready: a restart takes less.
const RETRY: Duration = Duration::from_secs(3);
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// A client of ovld.
#[derive(Debug, Clone)]
pub(crate) struct Ovld {
    socket: PathBuf,
}

impl Ovld {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Returns the response to a call of the Engine.
    pub(crate) async fn answer(&self, call: &DockerCall) -> Value {
        let meaning = match docker::parse(&call.method, &call.body) {
            Ok(meaning) => meaning,
            Err(why) => return docker::failed(&why),
        };
        if let Some(answer) = docker::always(&meaning) {
            return answer;
        }
        let later = docker::later(&meaning);
        // A deletion does not wait for ovld: it can be completed later.
        let retry = if later == Later::No { RETRY } else { Duration::ZERO };
        match self.ask(Request::Docker(call.clone()), retry).await {
            Ok(Reply::Docker(answer)) => answer,
            Ok(_) => {
                docker::failed("ovld sent a reply of another type: are ovld and ovl-docker of one release?")
            }
            Err(why) => self.respond_without_ovld(later, call, &why),
        }
    }

    /// Returns the response if ovld is unavailable. A deletion is stored for ovld, because the Engine goes on even if
    /// it fails.
    fn respond_without_ovld(&self, later: Later, call: &DockerCall, why: &ClientError) -> Value {
        eprintln!("ovl-docker: {}: {why}", call.method);
        match later {
            Later::No => docker::failed(&explain(why, &self.socket)),
            Later::Follows => docker::nothing(),
            Later::Keep(key) => match DockerDeleted::keep(&self.socket, &key, call) {
                Ok(()) => docker::nothing(),
                Err(error) => docker::failed(&format!(
                    "ovld is not running, and the call cannot be stored for it: {error}"
                )),
            },
        }
    }

    /// Sends a request, and retries for a time while ovld is unavailable.
    pub(crate) async fn ask(&self, request: Request, retry: Duration) -> Result<Reply, ClientError> {
        let socket = self.socket.clone();
        let ask = move || {
            let end = Instant::now() + retry;
            loop {
                let error = match Client::connect(&socket, Some(PATIENCE))
                    .and_then(|mut client| client.request(&request))
                {
                    Ok(reply) => return Ok(reply),
                    Err(error) => error,
                };
                if Instant::now() >= end || !is_temporary(&error) {
                    return Err(error);
                }
                std::thread::sleep(PAUSE);
            }
        };
        match tokio::task::spawn_blocking(ask).await {
            Ok(result) => result,
            Err(error) => Err(ClientError::Io(io::Error::other(error))),
        }
    }
}

/// Whether a retry may succeed. A request that is sent twice does no harm.
fn is_temporary(error: &ClientError) -> bool {
    match error {
        ClientError::Connect { error, .. } => error.kind() != io::ErrorKind::PermissionDenied,
        ClientError::Io(error) => {
            !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        }
        ClientError::Failed(failure) => failure.kind == FailureKind::Unavailable,
        ClientError::Protocol(_) => false,
    }
}

fn explain(error: &ClientError, socket: &Path) -> String {
    match error {
        ClientError::Connect { error, .. } => format!(
            "ovld is not running on this host ({}: {error}); `systemctl start ovld` starts it",
            socket.display()
        ),
        ClientError::Io(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            format!(
                "ovld did not reply within {} s: `ovlctl status` and `journalctl -u ovld` show the cause",
                PATIENCE.as_secs()
            )
        }
        ClientError::Failed(failure) if failure.kind == FailureKind::Unavailable => {
            format!("ovld is not ready: {}", failure.message)
        }
        ClientError::Io(_) | ClientError::Failed(_) | ClientError::Protocol(_) => error.to_string(),
    }
}
