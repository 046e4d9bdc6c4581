//! A fake daemon that sends fixed replies and records the requests.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use ovl_control::{Reply, Request};

/// A temporary directory that is deleted on drop. Its path is short enough for a Unix socket.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ovlctl-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The fake daemon. It answers each request with all replies, then closes the connection.
pub struct FakeDaemon {
    dir: Dir,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl FakeDaemon {
    /// Starts a daemon that answers with these replies.
    pub fn new(replies: &[Reply]) -> Self {
        Self::raw(replies.iter().map(|reply| serde_json::to_string(reply).unwrap() + "\n").collect())
    }

    /// Starts a daemon that answers with this text.
    pub fn raw(answer: String) -> Self {
        let dir = Dir::new();
        let listener = UnixListener::bind(dir.0.join("s")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        // The thread ends with the test process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                heard.lock().unwrap().push(serde_json::from_str(&line).unwrap());
                // The client may have exited already, as in the test of a closed output pipe.
                let _ = stream.get_mut().write_all(answer.as_bytes());
            }
        });
        Self { dir, asked }
    }

    /// Builds an ovlctl command that connects to this daemon.
    pub fn command(&self, line: &str) -> Command {
        let mut command = ovlctl(line);
        command.env("OVL_SOCKET", self.dir.0.join("s"));
        command
    }

    /// Runs a command and collects its output.
    pub fn run(&self, line: &str) -> Finished {
        run(&mut self.command(line))
    }

    /// Returns the requests received so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

/// Builds an ovlctl command without a daemon.
pub fn ovlctl(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovlctl"));
    command.args(line.split_whitespace()).env_remove("OVL_SOCKET").stdin(Stdio::null());
    command
}

/// The exit status and output of a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Finished {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs a command and collects its output.
pub fn run(command: &mut Command) -> Finished {
    let Output { status, stdout, stderr } = command.output().unwrap();
    Finished {
        code: status.code(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

impl Finished {
    /// Asserts that the command succeeded and printed exactly `out`.
    #[track_caller]
    pub fn prints(&self, out: &str) {
        assert_eq!((self.code, self.out.as_str(), self.err.as_str()), (Some(0), out, ""));
    }

    /// Asserts that the command succeeded and printed this JSON.
    #[track_caller]
    pub fn prints_json(&self, expected: &serde_json::Value) {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""));
        assert_eq!(&serde_json::from_str::<serde_json::Value>(&self.out).unwrap(), expected);
    }

    /// Asserts that the command failed with this status, an error that starts with `message`, and no output.
    #[track_caller]
    pub fn fails(&self, code: i32, message: &str) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""));
        let text = self.err.strip_prefix("ovlctl: ");
        assert!(text.is_some_and(|text| text.starts_with(message)), "{}", self.err);
    }
}
