//! Errors of commands. A message is one sentence that says what failed, and one that says what to do.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use ovl_control::ClientError;

use crate::text::printable_lines;

/// The result of a command.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// The error of a command.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// The command failed: exit status 1.
    Failed(String),
    /// The command line is invalid in a way that clap does not detect: exit status 2.
    Usage(String),
    /// A program cannot be run: this exit status.
    Program(String, u8),
}

impl Error {
    /// A valid reply of ovld whose type does not match the request.
    pub(crate) fn unexpected_reply() -> Self {
        Self::Failed(
            "ovld sent a reply of an unexpected type. \
             Use ovlctl and ovld of the same release: `ovlctl --version`, `ovld --version`"
                .to_owned(),
        )
    }

    /// A request without a usable reply. `seconds` is the timeout that applied.
    pub(crate) fn request_failed(error: ClientError, seconds: u64) -> Self {
        Self::Failed(match error {
            // The error kind of a socket timeout depends on the system.
            ClientError::Io(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                format!(
                    "ovld did not answer within {seconds} s; the request may still be running. \
                     Check with `ovlctl status` and `journalctl -u ovld`"
                )
            }
            ClientError::Protocol(_) => {
                format!(
                    "{error}. Use ovlctl and ovld of the same release: `ovlctl --version`, `ovld --version`"
                )
            }
            ClientError::Connect { .. } | ClientError::Io(_) | ClientError::Failed(_) => error.to_string(),
        })
    }

    /// A failed write to standard output.
    pub(crate) fn output(error: &io::Error) -> Self {
        Self::Failed(format!("cannot write to standard output: {error}. Is the disk full?"))
    }

    /// Prints the error to standard error and returns the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        let (message, code) = match self {
            Self::Failed(message) => (message, 1),
            Self::Usage(message) => (message, 2),
            Self::Program(message, status) => (message, *status),
        };
        // Not eprintln!: it panics if standard error is closed.
        let _ = writeln!(io::stderr(), "ovlctl: {}", printable_lines(message));
        ExitCode::from(code)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Failed(message) | Self::Usage(message) | Self::Program(message, _)) = self;
        f.write_str(message)
    }
}

/// The commands that are never suggested for a misspelt one.
const NOT_SUGGESTED: [&str; 3] = ["leave", "teardown", "recover"];

/// Removes suggestions of commands that take the host out of the cluster. `None` if there are none.
fn suggest_nothing_destructive(error: &clap::Error, cli: &clap::Command) -> Option<clap::Error> {
    let kind = ContextKind::SuggestedSubcommand;
    let mut names = match error.get(kind)? {
        ContextValue::String(name) => vec![name.clone()],
        ContextValue::Strings(names) => names.clone(),
        _ => return None,
    };
    let before = names.len();
    names.retain(|name| !NOT_SUGGESTED.contains(&name.as_str()));
    if names.len() == before {
        return None;
    }
    // clap's error cannot be copied.
    let mut changed = clap::Error::new(error.kind()).with_cmd(cli);
    for (other, value) in error.context().filter(|(other, _)| *other != kind) {
        changed.insert(other, value.clone());
    }
    if !names.is_empty() {
        changed.insert(kind, ContextValue::Strings(names));
    }
    Some(changed)
}

/// Prints clap's output: help and version, or an error in the format of all errors of ovlctl.
pub(crate) fn usage(error: &clap::Error, cli: &clap::Command) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let without_suggestions = suggest_nothing_destructive(error, cli);
    let error = without_suggestions.as_ref().unwrap_or(error);
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
    } else {
        let text = error.render().to_string();
        let _ = write!(io::stderr(), "ovlctl: {}", text.strip_prefix("error: ").unwrap_or(&text));
    }
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn no_misspelt_command_suggests_to_leave_the_cluster() {
        let named = |error: &clap::Error| {
            let text = error.render().to_string();
            NOT_SUGGESTED.iter().any(|name| text.contains(&format!("'{name}'")))
        };
        let mut removed = 0;
        for word in
            ["leav", "lave", "leaves", "eave", "teardwn", "tear-down", "teadown", "lebel", "creat", "edit"]
        {
            let error = Cli::command().try_get_matches_from(["ovlctl", word]).unwrap_err();
            let changed = suggest_nothing_destructive(&error, &Cli::command());
            removed += usize::from(changed.is_some());
            let shown = changed.as_ref().unwrap_or(&error);
            assert!(!named(shown), "{word}: {shown}");
            assert!(
                shown.render().to_string().contains(&format!("unrecognized subcommand '{word}'")),
                "{shown}"
            );
        }
        assert!(removed > 2);
    }

    #[test]
    fn timeout_and_broken_connection_have_different_messages() {
        let timeout = Error::request_failed(io::Error::from(io::ErrorKind::WouldBlock).into(), 30);
        assert!(
            matches!(timeout, Error::Failed(text) if text.starts_with("ovld did not answer within 30 s"))
        );
        let broken = Error::request_failed(io::Error::from(io::ErrorKind::UnexpectedEof).into(), 30);
        assert!(matches!(broken, Error::Failed(text) if text.starts_with("lost the connection to ovld")));
    }
}
