//! `ovl-cni`, the plugin that container runtimes run (CNI specification 1.1.0). It makes no decisions: each call
//! becomes one request to ovld, and ovld's reply is printed. The plugin acts on its own only if ovld does not
//! reply.
//!
//! | module | content |
//! | --- | --- |
//! | [`call`] | environment and standard input |
//! | [`deleted`] | a `DEL` that is stored for ovld |

mod call;
mod deleted;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use ovl_control::{
    CNI_VERSIONS, Client, ClientError, CniCall, CniCommand, CniError, FailureKind, Reply, Request,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::call::Asked;

/// The specification's "Try again later".
const LATER: u32 = 11;
/// The specification's "The plugin is not available", for `STATUS`.
const UNAVAILABLE: u32 = 50;
/// A code of ovl: ovld and this plugin are of incompatible releases.
const MISMATCH: u32 = 105;

fn main() -> ExitCode {
    // Runtimes pass no arguments, so this is only for users.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        let mut stdout = io::stdout().lock();
        let written = writeln!(stdout, "ovl-cni {}\nCNI: {}", ovl_proto::VERSION, CNI_VERSIONS.join(", "));
        return if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match call::read() {
        Ok(Asked::Version(version)) => print(&json!({
            "cniVersion": version,
            "supportedVersions": CNI_VERSIONS,
        })),
        Ok(Asked::Call(call)) => match carry_out(&call) {
            Ok(Value::Null) => ExitCode::SUCCESS,
            Ok(result) => print(&result),
            Err(error) => report(&call.config, error),
        },
        Err((config, error)) => report(&config, error),
    }
}

/// Sends the call to ovld. A `DEL` is stored if ovld is unavailable.
fn carry_out(call: &CniCall) -> Result<Value, CniError> {
    match ask(call) {
        Ok(outcome) => outcome,
        Err(why) if call.command == CniCommand::Del && why.is_temporary() => {
            deleted::store(call)?;
            // If ovld started to listen and read the directory before the file was written, this second request
            // reaches it, and it deletes the file. In all other cases ovld finds the file later.
            if matches!(why, NoReply::Down(_)) {
                let _ = ask(call);
            }
            Ok(Value::Null)
        }
        Err(why) => Err(why.explain(call.command)),
    }
}

/// Sends the call to ovld and returns its reply, or why there is none.
fn ask(call: &CniCall) -> Result<Result<Value, CniError>, NoReply> {
    let patience = patience(call.command);
    let request = Request::Cni(Box::new(call.clone()));
    let reply = Client::connect(&call::socket(&call.config), Some(patience))
        .and_then(|mut client| client.request(&request))
        .map_err(|error| NoReply::of(error, patience))?;
    match reply {
        Reply::Cni(result) => Ok(Ok(result)),
        Reply::CniError(error) => Ok(Err(error)),
        _ => Err(NoReply::Mismatch("ovld sent a reply of another type".to_owned())),
    }
}

/// Returns how long ovld may take: `ADD` can wait for other hosts, `DEL` only for the kernel.
fn patience(command: CniCommand) -> Duration {
    Duration::from_secs(match command {
        CniCommand::Add | CniCommand::Check | CniCommand::Gc => 30,
        CniCommand::Del => 15,
        CniCommand::Status => 5,
    })
}

/// Why there is no reply to a call.
#[derive(Debug)]
enum NoReply {
    /// The socket cannot be connected to.
    Down(String),
    /// The connection was lost, or the time is over.
    Unfinished(String),
    /// ovld cannot handle calls now.
    Busy(String),
    /// ovld does not understand the call, or the plugin not its reply.
    Mismatch(String),
}

impl NoReply {
    fn of(error: ClientError, patience: Duration) -> Self {
        match error {
            ClientError::Connect { path, error } => Self::Down(format!(
                "cannot reach ovld at {}: {error}. {}",
                path.display(),
                match error.kind() {
                    io::ErrorKind::PermissionDenied => "The runtime must run its plugins as root",
                    _ =>
                        "`systemctl start ovld` starts it; the key `socket` of the configuration names another socket",
                }
            )),
            ClientError::Io(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                Self::Unfinished(format!(
                    "ovld did not reply within {} s, and may still handle the call: `ovlctl status` and \
                     `journalctl -u ovld` show the cause",
                    patience.as_secs()
                ))
            }
            ClientError::Io(error) => Self::Unfinished(format!(
                "lost the connection to ovld: {error}. If ovld has exited, `journalctl -u ovld` shows why, and \
                 `systemctl start ovld` starts it"
            )),
            ClientError::Failed(failure) if failure.kind == FailureKind::Unavailable => {
                Self::Busy(failure.message)
            }
            ClientError::Failed(failure) => Self::Mismatch(failure.message),
            ClientError::Protocol(error) => Self::Mismatch(error.to_string()),
        }
    }

    /// Whether ovld can handle the call later.
    fn is_temporary(&self) -> bool {
        !matches!(self, Self::Mismatch(_))
    }

    fn explain(self, command: CniCommand) -> CniError {
        let later = if command == CniCommand::Status { UNAVAILABLE } else { LATER };
        let (code, msg, details) = match self {
            Self::Down(details) => (later, "ovld is not running", details),
            Self::Unfinished(details) => (later, "ovld sent no reply", details),
            Self::Busy(details) => (later, "ovld cannot handle the call now", details),
            Self::Mismatch(details) => (
                MISMATCH,
                "ovl-cni and ovld are of incompatible releases",
                format!("{details}. Install the plugin of ovld's release: `ovlctl cni install`"),
            ),
        };
        CniError { code, msg: msg.to_owned(), details }
    }
}

/// Prints an error on standard output, as the specification requires, and returns an exit status other than 0.
fn report(config: &Value, error: CniError) -> ExitCode {
    #[derive(Serialize)]
    struct Report<'a> {
        #[serde(rename = "cniVersion")]
        version: &'a str,
        #[serde(flatten)]
        error: CniError,
    }
    print(&Report { version: call::version(config), error });
    ExitCode::FAILURE
}

fn print<T: Serialize>(value: &T) -> ExitCode {
    let mut stdout = io::stdout().lock();
    let written = serde_json::to_writer(&mut stdout, value).map_err(io::Error::from).and_then(|()| {
        stdout.write_all(b"\n")?;
        stdout.flush()
    });
    // If standard output is closed, only the exit status can report it.
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
