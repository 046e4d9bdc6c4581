//! `ovl-kube` on a host, and a connection to ovld in its place.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Result, ensure};
use netns_lab::{Host, Signal, Spawned, find_binary};
use serde_json::Value;

use super::{ApiServer, kubeconfig};
use crate::SOON;

/// A connection to ovld's control socket, for what `ovl-kube` never says: an API server's earlier states.
#[derive(Debug)]
pub struct Control(BufReader<UnixStream>);

impl Control {
    /// Connects to the ovld of a host.
    pub fn open(host: &Host) -> Result<Self> {
        let stream = UnixStream::connect(host.socket())?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request and returns the reply.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.0.get_mut(), "{request}")?;
        self.next_reply()
    }

    /// Returns the next reply.
    pub fn next_reply(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// `ovl-kube` on a host. It is killed when dropped.
#[derive(Debug)]
pub struct Kube(Spawned);

impl Kube {
    /// Starts it. The Node object has the host's name.
    pub fn start(api: &mut ApiServer, host: &Host) -> Result<Self> {
        Self::start_with(api, host, &[])
    }

    /// As [`Self::start`], with more arguments.
    pub fn start_with(api: &mut ApiServer, host: &Host, more: &[&str]) -> Result<Self> {
        Self::start_program(&find_binary("ovl-kube")?, api, host, more)
    }

    /// As [`Self::start_with`], with this program.
    pub fn start_program(program: &Path, api: &mut ApiServer, host: &Host, more: &[&str]) -> Result<Self> {
        let config = api.listen(host)?;
        Self::spawn(program, &config, host, more)
    }

    /// As [`Self::start`], with this URL of the API server.
    pub fn start_at(server: &str, host: &Host) -> Result<Self> {
        Self::spawn(&find_binary("ovl-kube")?, &kubeconfig(server), host, &[])
    }

    fn spawn(program: &Path, config: &str, host: &Host, more: &[&str]) -> Result<Self> {
        let path = host.dir().join("kubeconfig");
        std::fs::write(&path, config)?;
        let words = [
            program.as_os_str(),
            "--kubeconfig".as_ref(),
            path.as_os_str(),
            "--node".as_ref(),
            host.name().as_ref(),
            "--socket".as_ref(),
            host.socket().as_os_str(),
        ]
        .map(|word| word.to_string_lossy().into_owned());
        Ok(Self(host.spawn(words.into_iter().chain(more.iter().map(|&word| word.to_owned())))?))
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.0.signal(Signal::SIGKILL)
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Returns its log so far.
    pub fn log(&self) -> String {
        self.0.stderr()
    }

    /// Fails if it has exited.
    pub fn check_running(&mut self) -> Result<()> {
        ensure!(self.0.is_running(), "ovl-kube has exited: {}", self.0.stderr());
        Ok(())
    }

    /// Returns how often it began to mirror the cluster's objects.
    pub fn turns(&self) -> usize {
        self.log().matches("this host mirrors the cluster").count()
    }

    /// Whether it mirrors the cluster's objects, by its log.
    pub fn mirrors(&self) -> bool {
        let log = self.log();
        let last = |what: &str| log.rfind(what);
        last("this host mirrors the cluster") > last("another host mirrors the cluster")
    }
}
