//! Client of QEMU's monitor (QMP), which stops, resets and resumes a machine.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// Timeout for a response of QEMU.
const ANSWER: Duration = Duration::from_secs(20);

/// Runs these commands, one after the other.
pub(crate) fn run(socket: &Path, commands: &[&str]) -> Result<()> {
    let mut writer = UnixStream::connect(socket)?;
    writer.set_read_timeout(Some(ANSWER))?;
    let mut reader = BufReader::new(writer.try_clone()?);
    for command in ["qmp_capabilities"].iter().chain(commands) {
        writer.write_all(format!("{}\n", json!({ "execute": command })).as_bytes())?;
        loop {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "QEMU closed its socket");
            let answer: Value = serde_json::from_str(&line)?;
            ensure!(answer["error"].is_null(), "QEMU rejects {command}: {}", answer["error"]["desc"]);
            // Skip greetings and events.
            if !answer["return"].is_null() {
                break;
            }
        }
    }
    Ok(())
}
