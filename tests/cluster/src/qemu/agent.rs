//! The guest agent of a machine, over a Unix socket: one JSON object a line.

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

use crate::machine::Ran;

/// How long the agent may take for an answer: it does nothing that takes time.
const ANSWER: Duration = Duration::from_secs(60);
/// How long one attempt to be heard takes. A machine that boots answers what was sent before, once it can.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Until the first look at a command that runs, and the longest time between two: each look takes time that the
/// command could have had.
const LOOK: (Duration, Duration) = (Duration::from_millis(30), Duration::from_millis(400));

/// The way to a machine's agent.
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
    pub(crate) fn run(&self, timeout: Duration, script: &str) -> Result<Ran> {
        let deadline = Instant::now() + timeout;
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", script], "capture-output": true });
        let pid = self.ask("guest-exec", &arguments, ANSWER)?["pid"].clone();
        let (mut pause, longest) = LOOK;
        loop {
            thread::sleep(pause);
            pause = (pause * 3 / 2).min(longest);
            let status = self.ask("guest-exec-status", &json!({ "pid": pid }), ANSWER)?;
            if status["exited"] == true {
                let code =
                    status["exitcode"].as_i64().or(status["signal"].as_i64().map(|signal| 128 + signal));
                return Ok(Ran {
                    code: i32::try_from(code.context("neither a status nor a signal")?)?,
                    out: decode(&status["out-data"])?,
                    err: decode(&status["err-data"])?,
                });
            }
            ensure!(Instant::now() < deadline, "`{script}` has not ended within {timeout:?}");
        }
    }

    /// The kernel's id of this boot, as soon as the agent answers; one attempt.
    pub(crate) fn boot_id(&self) -> Result<String> {
        let path = json!({ "path": "/proc/sys/kernel/random/boot_id", "mode": "r" });
        let handle = self.ask("guest-file-open", &path, ATTEMPT)?;
        let read = self.ask("guest-file-read", &json!({ "handle": handle }), ANSWER)?;
        self.ask("guest-file-close", &json!({ "handle": handle }), ANSWER)?;
        decode(&read["buf-b64"])
    }

    /// Forgets the connection: the agent at its other end is gone.
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
            // What arrives late must not be taken for the answer to the next question.
            *slot = None;
        }
        result.with_context(|| format!("asking the agent for {command}"))
    }
}

impl Connection {
    /// Connects, and reads away what an earlier connection has left in the pipe.
    fn open(socket: &PathBuf) -> Result<Self> {
        let writer = UnixStream::connect(socket)?;
        writer.set_write_timeout(Some(ATTEMPT))?;
        writer.set_read_timeout(Some(ATTEMPT))?;
        let mut this = Self { reader: BufReader::new(writer.try_clone()?), writer };
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        // The byte in front ends whatever the agent's parser has in hand.
        this.writer.write_all(b"\xff")?;
        this.send("guest-sync-delimited", &json!({ "id": id }))?;
        let deadline = Instant::now() + ATTEMPT;
        while Instant::now() < deadline {
            if this.receive().is_ok_and(|answer| answer["return"] == id) {
                return Ok(this);
            }
        }
        bail!("the agent is silent")
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
