//! A network namespace, and doing things in it.

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

/// Where `ip netns` mounts namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// How long [`Netns::exec`] lets a command run.
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the namespace of that name is mounted.
pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// A named network namespace. Cloning it copies the name.
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

    /// The name that `ip netns exec` takes.
    pub fn netns_name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted: `/run/netns/...`.
    pub fn path(&self) -> &Path {
        Path::new(&self.path)
    }

    /// The same path as text, for command lines.
    pub fn path_str(&self) -> &str {
        &self.path
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Runs a closure in a new thread that has entered the namespace; the sockets that it
    /// opens stay in it wherever they go. A panic in the closure is passed on.
    pub fn run<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("no network namespace {}", self.name))?;
        let name = &self.name;
        let joined = thread::scope(|scope| {
            let inside = move || -> Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter network namespace {name} (only root can)"))?;
                // An open file would keep the namespace alive for as long as the closure runs,
                // after its deletion too; the thread itself does so anyway, but says so.
                drop(file);
                Ok(closure())
            };
            let thread = thread::Builder::new().name(format!("in {name}")).spawn_scoped(scope, inside)?;
            Ok::<_, anyhow::Error>(thread.join())
        })?;
        joined.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }

    /// Enters the namespace with the calling thread, for good. For a program that is
    /// about to replace itself by another one.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(self.path()).with_context(|| format!("no network namespace {}", self.name))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter network namespace {} (only root can)", self.name))
    }

    /// Runs a command (program and arguments) to its end, at most a minute.
    /// A failed command is an `Output`, not an error.
    ///
    /// Only the network namespace is another: `/sys` still shows the machine's devices.
    pub fn exec<I>(&self, args: I) -> Result<Output>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.exec_for(EXEC_TIMEOUT, args)
    }

    /// [`exec`](Self::exec) with a time limit, after which the command is killed.
    pub fn exec_for<I>(&self, timeout: Duration, args: I) -> Result<Output>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.spawn(args)?.finish(timeout)
    }

    /// Runs a command that must succeed and gives its standard output.
    pub fn exec_ok<I>(&self, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.exec_input(args, None)
    }

    /// [`exec_ok`](Self::exec_ok) with a text on standard input.
    pub fn exec_input<I>(&self, args: I, input: Option<&str>) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let (spawned, shown) = self.begin(args, input)?;
        spawned.finish(EXEC_TIMEOUT)?.into_stdout(&shown).with_context(|| format!("in {}", self.name))
    }

    /// Starts a command and gives its guard: it is killed when that is dropped.
    pub fn spawn<I>(&self, args: I) -> Result<Spawned>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.begin(args, None).map(|(spawned, _)| spawned)
    }

    /// The same with text on its standard input.
    pub fn spawn_with<I>(&self, args: I, input: &str) -> Result<Spawned>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.begin(args, Some(input)).map(|(spawned, _)| spawned)
    }

    /// Starts a command; gives it also as it is to be named.
    fn begin<I>(&self, args: I, input: Option<&str>) -> Result<(Spawned, String)>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let (command, shown) = tool::command(args)?;
        Ok((self.start(command, &shown, input)?, shown))
    }

    pub(crate) fn start(&self, mut command: Command, shown: &str, input: Option<&str>) -> Result<Spawned> {
        // A process starts in the namespace of the thread that starts it.
        self.run(|| Spawned::start(&mut command, shown, input))?
    }

    /// `ip -j` with these arguments, such as `["-d", "link", "show"]`.
    pub fn ip_json(&self, args: &[&str]) -> Result<Value> {
        self.json_of("ip", args)
    }

    /// `bridge -j` with these arguments, such as `["fdb", "show"]`.
    pub fn bridge_json(&self, args: &[&str]) -> Result<Value> {
        self.json_of("bridge", args)
    }

    fn json_of(&self, program: &str, args: &[&str]) -> Result<Value> {
        let text = self.exec_ok([&[program, "-j"], args].concat())?;
        // Both tools print nothing at all where there is nothing to list.
        if text.trim().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_str(&text)
            .with_context(|| format!("`{program} -j {}` gave no JSON: {text}", args.join(" ")))
    }
}
