//! Asking ovld, and printing what it says.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use ovl_control::{Client, Reply, Request};
use ovl_manifest::yaml::to_yaml;
use serde::Serialize;
use serde_json::json;

use crate::args::Output;
use crate::error::{Error, Result};
use crate::text::printable_lines;

/// What the global options say.
#[derive(Debug)]
pub(crate) struct Context {
    /// Where ovld listens.
    pub(crate) socket: PathBuf,
    /// How to print.
    pub(crate) output: Output,
}

/// How long ovld may take. Those that get longer wait for a majority, the kernel or other hosts.
fn seconds(request: &Request) -> u64 {
    match request {
        Request::Attach(_)
        | Request::Get(_)
        | Request::SandboxCreate(_)
        | Request::Leave
        | Request::Teardown
        | Request::PeersForget { .. }
        | Request::KeyRotateCluster { .. } => 60,
        _ => 30,
    }
}

impl Context {
    /// Asks one question.
    pub(crate) fn ask(&self, request: &Request) -> Result<Reply> {
        let seconds = seconds(request);
        Client::connect(&self.socket, Some(Duration::from_secs(seconds)))
            .and_then(|mut client| client.request(request))
            .map_err(|error| Error::no_reply(error, seconds))
    }

    /// Asks for something that has no answer but that it was done. Nothing is printed as a table,
    /// as `ip` does.
    pub(crate) fn ask_done(&self, request: &Request) -> Result<()> {
        let Reply::Done = self.ask(request)? else { return Err(Error::unexpected_reply()) };
        match self.output {
            Output::Table | Output::Wide => Ok(()),
            Output::Json | Output::Yaml => self.print(&json!({ "done": true }), |_| String::new()),
        }
    }

    /// Tells a person something beside the answer, on standard error: nothing for programs.
    pub(crate) fn say(&self, text: &str) {
        if self.output == Output::Table {
            // Without a standard error there is nobody to tell, and eprintln! would panic.
            let _ = writeln!(io::stderr(), "{}", printable_lines(text));
        }
    }

    /// Prints a value: as JSON, or as what `text` makes of it.
    pub(crate) fn print<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let text = match self.output {
            Output::Table | Output::Wide => text(value),
            Output::Json => json_text(serde_json::to_string_pretty(value))?,
            Output::Yaml => yaml_text(value)?,
        };
        write_out(&text).map(drop)
    }
}

/// JSON with a newline, or why there is none.
pub(crate) fn json_text(json: serde_json::Result<String>) -> Result<String> {
    json.map(|text| text + "\n").map_err(unwritable)
}

/// A document of YAML, or why there is none.
pub(crate) fn yaml_text<T: Serialize>(value: &T) -> Result<String> {
    let value = serde_json::to_value(value).map_err(unwritable)?;
    Ok(format!("---\n{}", to_yaml(&value)))
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::Failed(format!("cannot write the answer as JSON: {error}. Use `-o table`, and report this"))
}

/// Writes to standard output at once. A reader that went away (`| head`) has what it wanted: that
/// is not an error, and [`ControlFlow::Break`] says so.
pub(crate) fn write_out(text: &str) -> Result<ControlFlow<()>> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Error::output(&error)),
    }
}
