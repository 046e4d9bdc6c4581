//! `ovl-cni`, the plugin that container runtimes run (CNI specification 1.1.0). It decides nothing:
//! each call becomes one request to ovld, and ovld's answer is printed. What it does by itself is
//! what has to be done when ovld does not answer.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`call`] | environment and standard input |
//! | [`deleted`] | a `DEL` that waits on disk for ovld |

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

/// "Try again later" of the specification.
const LATER: u32 = 11;
/// "The plugin is not available", for `STATUS`.
const UNAVAILABLE: u32 = 50;
/// Ours: ovld and this plugin do not understand each other.
const MISMATCH: u32 = 105;

fn main() -> ExitCode {
    // Runtimes give no arguments: this is for people.
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

/// One request; a `DEL` that ovld is not there for is remembered.
fn carry_out(call: &CniCall) -> Result<Value, CniError> {
    match ask(call) {
        Ok(outcome) => outcome,
        Err(why) if call.command == CniCommand::Del && why.is_for_later() => {
            deleted::remember(call)?;
            // ovld may have begun to listen, and looked for files, before this one was in place. Having
            // done what it asks for, it removes it. In all other cases it runs, and comes across it.
            if matches!(why, Silence::Down(_)) {
                let _ = ask(call);
            }
            Ok(Value::Null)
        }
        Err(why) => Err(why.explain(call.command)),
    }
}

/// What ovld says; or why it says nothing.
fn ask(call: &CniCall) -> Result<Result<Value, CniError>, Silence> {
    let patience = patience(call.command);
    let request = Request::Cni(Box::new(call.clone()));
    let reply = Client::connect(&call::socket(&call.config), Some(patience))
        .and_then(|mut client| client.request(&request))
        .map_err(|error| Silence::of(error, patience))?;
    match reply {
        Reply::Cni(result) => Ok(Ok(result)),
        Reply::CniError(error) => Ok(Err(error)),
        _ => Err(Silence::Mismatch("ovld gave an answer that does not belong to the question".to_owned())),
    }
}

/// How long ovld may take: `ADD` can wait for other hosts, `DEL` for nobody but the kernel.
fn patience(command: CniCommand) -> Duration {
    Duration::from_secs(match command {
        CniCommand::Add | CniCommand::Check | CniCommand::Gc => 30,
        CniCommand::Del => 15,
        CniCommand::Status => 5,
    })
}

/// Why there is no answer to a call.
#[derive(Debug)]
enum Silence {
    /// Nobody listens.
    Down(String),
    /// It did not come to an end.
    Unfinished(String),
    /// ovld cannot take calls at this moment.
    Busy(String),
    /// ovld does not take this call from us at all.
    Mismatch(String),
}

impl Silence {
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
                    "ovld did not answer within {} s, and may still be at work: `ovlctl status` and \
                     `journalctl -u ovld` tell what holds it up",
                    patience.as_secs()
                ))
            }
            ClientError::Io(error) => Self::Unfinished(format!(
                "lost the connection to ovld: {error}. `systemctl start ovld` starts it if it has ended, \
                 `journalctl -u ovld` tells why"
            )),
            ClientError::Failed(failure) if failure.kind == FailureKind::Unavailable => {
                Self::Busy(failure.message)
            }
            ClientError::Failed(failure) => Self::Mismatch(failure.message),
            ClientError::Protocol(error) => Self::Mismatch(error.to_string()),
        }
    }

    /// Whether ovld can do later what it did not do now.
    fn is_for_later(&self) -> bool {
        !matches!(self, Self::Mismatch(_))
    }

    fn explain(self, command: CniCommand) -> CniError {
        let later = if command == CniCommand::Status { UNAVAILABLE } else { LATER };
        let (code, msg, details) = match self {
            Self::Down(details) => (later, "ovld is not running", details),
            Self::Unfinished(details) => (later, "ovld gave no answer", details),
            Self::Busy(details) => (later, "ovld cannot do this now", details),
            Self::Mismatch(details) => (
                MISMATCH,
                "ovl-cni and ovld do not understand each other",
                format!("{details}. Install the plugin of ovld's release: `ovlctl cni install`"),
            ),
        };
        CniError { code, msg: msg.to_owned(), details }
    }
}

/// An error, as the specification wants it: on standard output, with a status that is not 0.
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
    // Without a reader there is nobody to tell but the exit status.
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
