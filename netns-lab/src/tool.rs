//! Execution of `ip`, `nft` and other tools.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::spawned::Spawned;

/// Timeout of the lab's own commands.
const TOOL_TIMEOUT: Duration = Duration::from_secs(30);

/// Debian's directories of system programs. A user's PATH often lacks them, and `su` keeps that PATH.
const SYSTEM_DIRS: [&str; 4] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin"];

/// The exit status and output of a command.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Returns whether it exited with status 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Returns the exit code. `None` if a signal killed it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Returns its standard output if it succeeded, otherwise an error with its standard error.
    pub(crate) fn into_stdout(self, what: &str) -> Result<String> {
        if self.success() {
            return Ok(self.stdout);
        }
        let said = if self.stderr.trim().is_empty() { self.stdout.trim() } else { self.stderr.trim() };
        bail!("`{what}` failed ({}): {said}", self.status);
    }
}

/// Builds the command `args[0]` with the remaining arguments, and the text that identifies it in errors.
pub(crate) fn command<I>(args: I) -> Result<(Command, String)>
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let words: Vec<OsString> = args.into_iter().map(|word| word.as_ref().to_owned()).collect();
    let (program, rest) = words.split_first().context("an empty command")?;
    let shown = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let mut command = Command::new(find(program).unwrap_or_else(|| PathBuf::from(program)));
    command.args(rest);
    Ok((command, shown))
}

/// Finds a program in PATH, then in the system directories.
pub(crate) fn find(program: &OsStr) -> Option<PathBuf> {
    if Path::new(program).components().count() > 1 {
        return Some(PathBuf::from(program));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_DIRS.iter().map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Runs a tool in the namespace of the calling thread, and returns its standard output.
pub(crate) fn run<I>(args: I, input: Option<&str>) -> Result<String>
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let (mut command, shown) = command(args)?;
    Spawned::start(&mut command, &shown, input)?.finish(TOOL_TIMEOUT)?.into_stdout(&shown)
}

/// Runs `ip -batch` with these lines, in a named namespace or in the machine's own. An error names the failed
/// line.
pub(crate) fn ip_batch(namespace: Option<&str>, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut args = vec!["ip"];
    if let Some(name) = namespace {
        args.extend(["-n", name]);
    }
    args.extend(["-batch", "-"]);
    let script = lines.join("\n") + "\n";
    run(args, Some(&script)).map(drop).map_err(|error| match failed_line(&error.to_string(), lines) {
        Some(line) => {
            error.context(format!("`ip {line}` failed in {}", namespace.unwrap_or("the machine's namespace")))
        }
        None => error,
    })
}

/// Returns the failed line of a batch. `ip -batch` prints "Command failed -:3" for the third line.
fn failed_line<'a>(said: &str, lines: &'a [String]) -> Option<&'a str> {
    let (_, number) = said.rsplit_once("Command failed -:")?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    let index = digits.parse::<usize>().ok()?.checked_sub(1)?;
    lines.get(index).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_batch_line_is_identified() {
        let lines = ["link add a".to_owned(), "link add b".to_owned()];
        assert_eq!(failed_line("RTNETLINK answers: no\nCommand failed -:2", &lines), Some("link add b"));
        assert_eq!(failed_line("something else", &lines), None);
    }
}
