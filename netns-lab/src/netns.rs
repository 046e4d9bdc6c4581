//! A network namespace, and execution of code and commands in it.

use std::ffi::OsStr;
use std::fs::File;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::spawned::Spawned;
use crate::tool::{self, Output};

/// Directory in which `ip netns` mounts namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Timeout of [`Netns::exec`].
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the path at which the namespace of that name is mounted.
pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// A named network namespace. Clones refer to the same namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    path: String,
}

impl Netns {
    pub(crate) fn new(name: String) -> Self {
        let path = format!("{NETNS_DIR}/{name}");
        Netns { name, path }
    }

    /// Returns the name for `ip netns exec`.
    pub fn netns_name(&self) -> &str {
        &self.name
    }

    /// Returns the path at which it is mounted: `/run/netns/...`.
    pub fn path(&self) -> &Path {
        Path::new(&self.path)
    }

    /// Returns [`path`](Self::path) as text, for command lines.
    pub fn path_str(&self) -> &str {
        &self.path
    }

    /// Returns whether it exists.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Runs a closure in a new thread inside the namespace. Sockets that it opens stay in the namespace. A
    /// panic in the closure is propagated.
    pub fn run<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("no network namespace {}", self.name))?;
        let name = &self.name;
        let joined = thread::scope(|scope| {
            let inside = move || -> Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter network namespace {name} (only root can)"))?;
                // Close the file: it would keep a deleted namespace alive while the closure runs. The thread
                // itself does so too, but is visible in /proc.
                drop(file);
                Ok(closure())
            };
            let thread = thread::Builder::new().name(format!("in {name}")).spawn_scoped(scope, inside)?;
            Ok::<_, anyhow::Error>(thread.join())
        })?;
        joined.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }

    /// Moves the calling thread into the namespace permanently. For a program that is about to exec another
    /// one.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(self.path()).with_context(|| format!("no network namespace {}", self.name))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter network namespace {} (only root can)", self.name))
    }

    /// Runs a command (program and arguments) for at most a minute. A command that fails is an `Output`, not
    /// an error.
    ///
    /// Only the network namespace differs: `/sys` still shows the machine's devices.
    pub fn exec<I>(&self, args: I) -> Result<Output>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.exec_for(EXEC_TIMEOUT, args)
    }

    /// Like [`exec`](Self::exec), with a time limit after which the command is killed.
    pub fn exec_for<I>(&self, timeout: Duration, args: I) -> Result<Output>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.spawn(args)?.finish(timeout)
    }

    /// Runs a command that must succeed, and returns its standard output.
    pub fn exec_ok<I>(&self, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.exec_input(args, None)
    }

    /// Like [`exec_ok`](Self::exec_ok), with text on standard input.
    pub fn exec_input<I>(&self, args: I, input: Option<&str>) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let (spawned, shown) = self.begin(args, input)?;
        spawned.finish(EXEC_TIMEOUT)?.into_stdout(&shown).with_context(|| format!("in {}", self.name))
    }

    /// Starts a command and returns its guard, which kills it on drop.
    pub fn spawn<I>(&self, args: I) -> Result<Spawned>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.begin(args, None).map(|(spawned, _)| spawned)
    }

    /// Like [`spawn`](Self::spawn), with text on standard input.
    pub fn spawn_with<I>(&self, args: I, input: &str) -> Result<Spawned>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.begin(args, Some(input)).map(|(spawned, _)| spawned)
    }

    /// Starts a command. Also returns the text that identifies it in errors.
    fn begin<I>(&self, args: I, input: Option<&str>) -> Result<(Spawned, String)>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let (command, shown) = tool::command(args)?;
        Ok((self.start(command, &shown, input)?, shown))
    }

    pub(crate) fn start(&self, mut command: Command, shown: &str, input: Option<&str>) -> Result<Spawned> {
        // A process inherits the namespace of the thread that starts it.
        self.run(|| Spawned::start(&mut command, shown, input))?
    }

    /// Runs `ip -j` with these arguments, such as `["-d", "link", "show"]`, and returns the parsed output.
    pub fn ip_json(&self, args: &[&str]) -> Result<Value> {
        self.json_of("ip", args)
    }

    /// Runs `bridge -j` with these arguments, such as `["fdb", "show"]`, and returns the parsed output.
    pub fn bridge_json(&self, args: &[&str]) -> Result<Value> {
        self.json_of("bridge", args)
    }

    fn json_of(&self, program: &str, args: &[&str]) -> Result<Value> {
        let text = self.exec_ok([&[program, "-j"], args].concat())?;
        // Both tools print nothing if there is nothing to list.
        if text.trim().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_str(&text)
            .with_context(|| format!("`{program} -j {}` printed no JSON: {text}", args.join(" ")))
    }
}
