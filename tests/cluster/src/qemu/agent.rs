//! Client of a machine's QEMU guest agent, over a Unix socket with one JSON object a line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::machine::CommandOutput;

/// Timeout for a response. The agent itself does nothing that takes long.
const ANSWER: Duration = Duration::from_secs(60);
/// Timeout of one attempt to reach the agent. A booting machine answers earlier requests once its agent runs.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Shortest and longest pause between two checks of a running command. Each check takes time that the command could
/// use.
const PAUSES: (Duration, Duration) = (Duration::from_millis(30), Duration::from_millis(400));

/// Connection to a machine's agent.
#[derive(Debug)]
pub(crate) struct Agent {
    socket: PathBuf,
    connection: Mutex<Option<Connection>>,
}

#[derive(Debug)]
struct Connection {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Agent {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket, connection: Mutex::new(None) }
    }

    /// Runs a script with `sh`.
    pub(crate) fn run(&self, timeout: Duration, script: &str) -> Result<CommandOutput> {
        let deadline = Instant::now() + timeout;
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", script], "capture-output": true });
        let pid = self.ask("guest-exec", &arguments, ANSWER)?["pid"].clone();
        let (mut pause, longest) = PAUSES;
        loop {
            thread::sleep(pause);
            pause = (pause * 3 / 2).min(longest);
            let status = self.ask("guest-exec-status", &json!({ "pid": pid }), ANSWER)?;
            if status["exited"] == true {
                let code =
                    status["exitcode"].as_i64().or(status["signal"].as_i64().map(|signal| 128 + signal));
                return Ok(CommandOutput {
                    code: i32::try_from(code.context("neither a status nor a signal")?)?,
                    out: decode(&status["out-data"])?,
                    err: decode(&status["err-data"])?,
                });
            }
            ensure!(Instant::now() < deadline, "`{script}` did not finish within {timeout:?}");
        }
    }

    /// Kernel's ID of this boot. One attempt, which fails while the agent does not answer.
    pub(crate) fn boot_id(&self) -> Result<String> {
        let path = json!({ "path": "/proc/sys/kernel/random/boot_id", "mode": "r" });
        let handle = self.ask("guest-file-open", &path, ATTEMPT)?;
        let read = self.ask("guest-file-read", &json!({ "handle": handle }), ANSWER)?;
        self.ask("guest-file-close", &json!({ "handle": handle }), ANSWER)?;
        decode(&read["buf-b64"])
    }

    /// Drops the connection, whose other end is gone.
    pub(crate) fn reset(&self) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn ask(&self, command: &str, arguments: &Value, timeout: Duration) -> Result<Value> {
        let mut slot = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let result = (|| {
            if slot.is_none() {
                *slot = Some(Connection::open(&self.socket)?);
            }
            let connection = slot.as_mut().context("no connection")?;
            connection.reader.get_ref().set_read_timeout(Some(timeout))?;
            connection.ask(command, arguments)
        })();
        if result.is_err() {
            // A late response must not be taken for the response to the next request.
            *slot = None;
        }
        result.with_context(|| format!("asking the agent for {command}"))
    }
}

impl Connection {
    /// Connects, and discards what an earlier connection left in the channel.
    fn open(socket: &PathBuf) -> Result<Self> {
        let writer = UnixStream::connect(socket)?;
        writer.set_write_timeout(Some(ATTEMPT))?;
        writer.set_read_timeout(Some(ATTEMPT))?;
        let mut this = Self { reader: BufReader::new(writer.try_clone()?), writer };
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        // The first byte makes the agent's parser drop an incomplete request.
        this.writer.write_all(b"\xff")?;
        this.send("guest-sync-delimited", &json!({ "id": id }))?;
        let deadline = Instant::now() + ATTEMPT;
        while Instant::now() < deadline {
            if this.receive().is_ok_and(|answer| answer["return"] == id) {
                return Ok(this);
            }
        }
        bail!("the agent does not answer")
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.send(command, arguments)?;
        let mut answer = self.receive()?;
        ensure!(answer["error"].is_null(), "{}", answer["error"]["desc"]);
        Ok(answer["return"].take())
    }

    fn send(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let line = json!({ "execute": command, "arguments": arguments });
        Ok(self.writer.write_all(format!("{line}\n").as_bytes())?)
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line)?;
        ensure!(!line.is_empty(), "the agent's socket was closed");
        let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
        Ok(serde_json::from_slice(&line[start..])?)
    }
}

fn decode(value: &Value) -> Result<String> {
    let bytes = BASE64.decode(value.as_str().unwrap_or_default().as_bytes())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
