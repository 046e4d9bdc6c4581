//! The connection by which ovld says what is to be said to the API server.

use std::path::PathBuf;
use std::time::Duration;

use ovl_control::ApiReport;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::ovld::{Connection, Failure};

/// The wait before ovld is connected to again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long ovld may take to answer a new connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// What ovld said last.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    /// What it said. `None`: it is not connected.
    pub report: Option<ApiReport>,
    /// Since when it is, or is not, and since when its answer to whether new pods would fail is the same.
    pub since: Instant,
}

/// Listens to ovld for ever. `hear` is `None` until ovld has answered, or did not.
pub(crate) async fn listen(socket: PathBuf, hear: watch::Sender<Option<Heard>>) {
    loop {
        let failure = match Connection::open(&socket).await {
            Ok(connection) => follow(connection, &hear).await,
            Err(failure) => failure,
        };
        tracing::debug!(error = %failure, "ovld is asked again what is to be said");
        take(&hear, None);
        sleep(AGAIN).await;
    }
}

/// Listens until the connection is lost.
async fn follow(mut connection: Connection, hear: &watch::Sender<Option<Heard>>) -> Failure {
    if let Err(failure) = connection.ask_report().await {
        return failure;
    }
    let first = timeout(ANSWERS_WITHIN, connection.report()).await;
    let mut next = first.unwrap_or(Err(Failure::Silent));
    loop {
        match next {
            Ok(report) => take(hear, Some(report)),
            Err(failure) => return failure,
        }
        next = connection.report().await;
    }
}

fn take(hear: &watch::Sender<Option<Heard>>, report: Option<ApiReport>) {
    hear.send_if_modified(|last| {
        let unready = |report: &Option<ApiReport>| report.as_ref().map(|report| report.unready.is_some());
        let since = match last {
            Some(last) if last.report == report => return false,
            Some(last) if unready(&last.report) == unready(&report) => last.since,
            Some(_) | None => Instant::now(),
        };
        *last = Some(Heard { report, since });
        true
    });
}
