//! A host's daemon: start, stop and requests.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::binaries;
use crate::bpf;
use crate::host::Host;
use crate::netns::Netns;
use crate::procs::ProcId;
use crate::spawned::Spawned;
use crate::tcx;
use crate::tool::Output;
use crate::wait::wait_until;

/// Maximum time for a daemon to exit after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for the kernel to end a killed process.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of [`Host::ctl`].
const CTL_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of log lines in the error about a daemon that is not ready.
const LOG_LINES: usize = 15;

/// A started daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    id: ProcId,
    /// `None` if another process started it, because only its parent can wait for it.
    child: Option<Child>,
    exit: Option<ExitStatus>,
}

impl Daemon {
    pub(crate) fn of_another_process(id: ProcId) -> Self {
        Daemon { id, child: None, exit: None }
    }

    fn is_running(&mut self) -> bool {
        match &mut self.child {
            Some(child) => {
                self.exit = child.try_wait().ok().flatten().or(self.exit);
                self.exit.is_none()
            }
            None => self.id.is_alive(),
        }
    }
}

impl Host {
    fn daemon(&self) -> MutexGuard<'_, Option<Daemon>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the path of the daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("ovld.sock")
    }

    /// Returns the path of the file with the daemon's standard output and error.
    pub fn log_path(&self) -> PathBuf {
        self.dir().join("ovld.log")
    }

    /// Returns the daemon's output since the lab was created, over all its starts.
    pub fn log(&self) -> String {
        fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Appends the end of the log to an error.
    pub(crate) fn with_log(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}\n{}", self.log_tail(LOG_LINES))
    }

    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        let tail = all[all.len().saturating_sub(lines)..].join("\n");
        format!("{}'s log ({}) ends:\n{tail}", self.name(), self.log_path().display())
    }

    /// Sets TOML that is appended to the lab's in this host's `ovld.toml`, effective at the next start.
    pub fn set_config(&self, toml: &str) -> Result<()> {
        self.update(|host| host.config = toml.to_owned())
    }

    /// Sets arguments that are appended to the lab's for this host's daemon, effective at the next start.
    pub fn set_args(&self, args: &[&str]) -> Result<()> {
        self.update(|host| host.args = args.iter().map(|&arg| arg.to_owned()).collect())
    }

    /// Sets the environment variables that this host's daemon gets besides those of the lab, effective at the next
    /// start.
    pub fn set_env(&self, variables: &[(&str, &str)]) -> Result<()> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.update(|host| host.env = variables.iter().map(own).collect())
    }

    /// Sets the addresses to join through instead of the first host's that is on the switch, effective at the next start.
    pub fn set_join(&self, addresses: &[&str]) -> Result<()> {
        self.update(|host| host.join = Some(addresses.iter().map(|&each| each.to_owned()).collect()))
    }

    /// Sets whether the daemon gets `--bootstrap`, effective at the next start. By default only the daemon of the first
    /// host that was on the switch when the lab was created does, at every start.
    pub fn set_bootstrap(&self, bootstrap: bool) -> Result<()> {
        self.update(|host| host.bootstrap = bootstrap)
    }

    /// Starts the daemon without waiting until it is ready.
    pub fn start(&self) -> Result<()> {
        let mut daemon = self.daemon();
        ensure!(self.is_present(), "{} is destroyed: `restore` it before starting its daemon", self.name());
        ensure!(
            !daemon.as_mut().is_some_and(Daemon::is_running),
            "ovld is running on {} already",
            self.name()
        );
        let mut command = self.daemon_command()?;
        let program = command.get_program().to_owned();
        // A process inherits the namespace of the thread that starts it.
        let hides_tcx = !self.shared.state().tcx;
        let child = self
            .run(|| {
                if hides_tcx {
                    tcx::hide()?;
                }
                Ok::<_, anyhow::Error>(command.spawn()?)
            })?
            .with_context(|| format!("cannot start {} on {}", program.display(), self.name()))?;
        let pid = child.id().cast_signed();
        // A child that has exited already is a zombie, of which only the process id is left.
        let id = ProcId::of(pid).unwrap_or(ProcId { pid, start: 0 });
        *daemon = Some(Daemon { id, child: Some(child), exit: None });
        drop(daemon);
        self.update(|host| host.daemon = Some(id))
    }

    fn daemon_command(&self) -> Result<Command> {
        let key = self.cluster_key()?;
        let (binary, lab_config, lab_args, join, persistent, all_addresses) = {
            let lab = self.shared.state();
            let join = lab.join_address(&lab.hosts[self.index])?;
            (
                lab.ovld.clone(),
                lab.config.clone(),
                lab.args.clone(),
                join,
                lab.owner.is_none(),
                lab.all_addresses,
            )
        };
        let host = self.read(Clone::clone);
        let config = self.dir().join("ovld.toml");
        let toml = lab_config + &host.config;
        if toml.contains("fast_path") {
            bpf::mount()?;
        }
        fs::write(&config, toml).with_context(|| format!("cannot write {}", config.display()))?;

        let mut command = Command::new(binaries::find("ovld", binary.as_deref())?);
        command.arg("--config").arg(config).args(["--node", self.name()]);
        command.arg("--state-dir").arg(self.state_dir()).arg("--run-dir").arg(self.run_dir());
        for address in host.advertised(all_addresses)? {
            command.arg("--advertise").arg(address.to_string());
        }
        let join = join.map(|address| address.to_string());
        for address in host.join.unwrap_or_else(|| join.into_iter().collect()) {
            command.arg("--join").arg(address);
        }
        if host.bootstrap {
            command.arg("--bootstrap");
        }
        command.arg("--cluster-key").arg(key).args(lab_args).args(host.args).envs(host.env);

        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if persistent {
            // A process group of its own: an interrupt at the terminal must not reach the daemon.
            command.process_group(0);
        }
        Ok(command)
    }

    /// Returns the path of this host's cluster key file. The first start writes the lab's initial key to it,
    /// unless the file exists.
    pub fn key_path(&self) -> PathBuf {
        self.dir().join("cluster.key")
    }

    fn cluster_key(&self) -> Result<PathBuf> {
        let own = self.key_path();
        if !own.exists() {
            let text = fs::read(self.first_cluster_key()?)?;
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own)?;
            file.write_all(&text)?;
        }
        Ok(own)
    }

    /// Returns the path of the lab's initial cluster key. It is generated at the first start of any daemon.
    fn first_cluster_key(&self) -> Result<PathBuf> {
        let _making = self.shared.making_key.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.shared.dir.join("cluster.key");
        if !path.exists() {
            let text = self.exec_ok([self.ovlctl()?.as_os_str(), "key".as_ref(), "generate".as_ref()])?;
            let temporary = path.with_extension("new");
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            fs::rename(temporary, &path)?;
        }
        Ok(path)
    }

    fn ovlctl(&self) -> Result<PathBuf> {
        binaries::find("ovlctl", self.shared.state().ovlctl.as_deref())
    }

    /// Returns the daemon's process id. `None` if it is not running.
    pub fn pid(&self) -> Option<u32> {
        self.running().map(|id| id.pid.cast_unsigned())
    }

    /// Returns whether the daemon is running.
    pub fn is_running(&self) -> bool {
        self.running().is_some()
    }

    /// Returns the daemon's exit status. `None` if it is running or another process started it.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        let mut daemon = self.daemon();
        let daemon = daemon.as_mut()?;
        if daemon.is_running() { None } else { daemon.exit }
    }

    fn running(&self) -> Option<ProcId> {
        self.daemon().as_mut().and_then(|daemon| daemon.is_running().then_some(daemon.id))
    }

    fn must_run(&self) -> Result<ProcId> {
        self.running().ok_or_else(|| match self.exit_status() {
            Some(status) => self.with_log(&anyhow!("ovld on {} has exited ({status})", self.name())),
            None => anyhow!("ovld is not running on {}", self.name()),
        })
    }

    /// Sends a signal to the daemon, such as `SIGSTOP` and `SIGCONT` to freeze and thaw it.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.must_run()?.signal(signal).map(drop)
    }

    /// Kills the daemon with SIGKILL and waits until it has exited.
    pub fn kill9(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_exit(KILL_TIMEOUT)
    }

    pub(crate) fn kill_if_running(&self) -> Result<()> {
        if self.is_running() { self.kill9() } else { Ok(()) }
    }

    /// Stops the daemon with SIGTERM and returns the time that it took.
    ///
    /// # Errors
    ///
    /// If the daemon does not exit within five seconds. It is left running.
    pub fn stop(&self) -> Result<Duration> {
        let start = Instant::now();
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(STOP_TIMEOUT)?;
        Ok(start.elapsed())
    }

    /// Waits until the daemon has exited.
    pub fn wait_exit(&self, timeout: Duration) -> Result<()> {
        wait_until(timeout, &format!("ovld on {} to exit", self.name()), || !self.is_running())
            .map_err(|error| self.with_log(&error))?;
        self.update(|host| host.daemon = None)
    }

    /// Stops the daemon if it is running, and starts it without waiting until it is ready.
    pub fn restart(&self) -> Result<()> {
        if self.is_running() {
            self.stop()?;
        }
        self.start()
    }

    /// Waits until the daemon's status is no longer `starting`. Fails immediately if the daemon exits.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let what = format!("ovld on {} to be ready", self.name());
        let ended = wait_until(timeout, &what, || -> Result<Option<Result<()>>> {
            if let Err(error) = self.must_run() {
                return Ok(Some(Err(error)));
            }
            let status = self.ctl_json(&["status"])?;
            let state = status["state"].as_str().unwrap_or_default();
            ensure!(!matches!(state, "" | "starting"), "status is {status}");
            Ok(Some(Ok(())))
        });
        ended.map_err(|error| self.with_log(&error))?
    }

    /// Builds the command `ovlctl --socket ... args`, to be run in the host's namespace.
    pub fn ctl_command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.ovlctl()?);
        command.arg("--socket").arg(self.socket()).args(args);
        Ok(command)
    }

    /// Runs `ovlctl` with the host's socket, for at most 30 seconds.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        self.ctl_spawn(args)?.finish(CTL_TIMEOUT)
    }

    /// Starts a long-running `ovlctl`, such as `events --follow`.
    pub fn ctl_spawn(&self, args: &[&str]) -> Result<Spawned> {
        let shown = format!("ovlctl {}", args.join(" "));
        Netns::start(self, self.ctl_command(args)?, &shown, None)
    }

    /// Runs an `ovlctl` command that must succeed, and returns its standard output.
    pub fn ctl_ok(&self, args: &[&str]) -> Result<String> {
        let shown = format!("ovlctl {}", args.join(" "));
        self.ctl(args)?.into_stdout(&shown).with_context(|| format!("on {}", self.name()))
    }

    /// Runs an `ovlctl` command that must succeed with `-o json`, and returns the parsed output.
    pub fn ctl_json(&self, args: &[&str]) -> Result<Value> {
        let text = self.ctl_ok(&[args, &["-o", "json"]].concat())?;
        match serde_json::from_str(&text) {
            Ok(value) => Ok(value),
            Err(error) => {
                bail!(
                    "`ovlctl {} -o json` on {} printed no JSON ({error}): {text}",
                    args.join(" "),
                    self.name()
                )
            }
        }
    }

    /// Returns the daemon's resident memory in KiB.
    pub fn rss_kib(&self) -> Result<u64> {
        self.must_run()?.rss_kib()
    }

    /// Returns the CPU time that the daemon has used since its start.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.must_run()?.cpu_time()
    }
}
