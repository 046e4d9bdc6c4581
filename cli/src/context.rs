//! Requests to ovld, and output of the replies.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use ovl_control::{Client, Reply, Request};
use ovl_manifest::yaml::to_yaml;
use serde::Serialize;
use serde_json::json;

use crate::args::{ObjectFormat, Output};
use crate::error::{Error, Result};
use crate::text::printable_lines;

/// The values of the global options.
#[derive(Debug)]
pub(crate) struct Context {
    /// Path of ovld's Unix socket.
    pub(crate) socket: PathBuf,
    /// Output format.
    pub(crate) output: Output,
    /// Output format of Kubernetes objects, if it is not one of every command.
    pub(crate) objects: Option<ObjectFormat>,
    /// How long to wait until this host is ready, in seconds. `None`: as long as the request waits by itself.
    pub(crate) ready_within_s: Option<u16>,
}

/// Returns the timeout of a request in seconds. Requests that wait for a majority, the kernel or other hosts
/// have a longer one.
fn timeout_s(request: &Request) -> u64 {
    match request {
        Request::Attach(_)
        | Request::Get(_)
        | Request::SandboxCreate(_)
        | Request::Leave
        | Request::Teardown
        | Request::PeersAdmit { .. }
        | Request::PeersForget { .. }
        | Request::Recover(_)
        | Request::KeyRotateCluster { .. } => 60,
        _ => 30,
    }
}

impl Context {
    /// Sends one request and returns the reply.
    pub(crate) fn request(&self, request: &Request) -> Result<Reply> {
        let seconds = timeout_s(request).saturating_add(self.ready_within_s.unwrap_or_default().into());
        Client::connect(&self.socket, Some(Duration::from_secs(seconds)))
            .and_then(|mut client| {
                if let Some(seconds) = self.ready_within_s {
                    client.request(&Request::WaitReady { seconds })?;
                }
                client.request(request)
            })
            .map_err(|error| Error::request_failed(error, seconds))
    }

    /// Sends a request whose reply carries no data. Prints nothing in table format, as `ip` does.
    pub(crate) fn request_done(&self, request: &Request) -> Result<()> {
        let Reply::Done = self.request(request)? else { return Err(Error::unexpected_reply()) };
        match self.output {
            Output::Table | Output::Wide => Ok(()),
            Output::Json | Output::Yaml => self.print(&json!({ "done": true }), |_| String::new()),
        }
    }

    /// Prints a note to standard error. Only in table format, which is read by people.
    pub(crate) fn note(&self, text: &str) {
        if self.output == Output::Table {
            // Not eprintln!: it panics if standard error is closed.
            let _ = writeln!(io::stderr(), "{}", printable_lines(text));
        }
    }

    /// Prints a value as JSON or YAML, or in the text form that `text` renders.
    pub(crate) fn print<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let text = match self.output {
            Output::Table | Output::Wide => text(value),
            Output::Json => json_text(serde_json::to_string_pretty(value))?,
            Output::Yaml => yaml_text(value)?,
        };
        write_out(&text).map(drop)
    }
}

/// Terminates serialized JSON with a newline.
pub(crate) fn json_text(json: serde_json::Result<String>) -> Result<String> {
    json.map(|text| text + "\n").map_err(serialization_error)
}

/// Serializes a value as a YAML document.
pub(crate) fn yaml_text<T: Serialize>(value: &T) -> Result<String> {
    let value = serde_json::to_value(value).map_err(serialization_error)?;
    Ok(format!("---\n{}", to_yaml(&value)))
}

fn serialization_error(error: serde_json::Error) -> Error {
    Error::Failed(format!("cannot serialize the reply: {error}. Use `-o table`, and report this bug"))
}

/// Writes to standard output and flushes it. Returns [`ControlFlow::Break`] if the reader has closed the pipe
/// (`| head`), which is not an error.
pub(crate) fn write_out(text: &str) -> Result<ControlFlow<()>> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Error::output(&error)),
    }
}
