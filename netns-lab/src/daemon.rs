//! A host's daemon: starting, ending and asking it.

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
use crate::host::Host;
use crate::netns::Netns;
use crate::procs::ProcId;
use crate::spawned::Spawned;
use crate::tool::Output;
use crate::wait::wait_until;

/// How long a daemon may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the kernel may take to end a process.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long [`Host::ctl`] waits.
const CTL_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of the log the error about a daemon that is not ready shows.
const LOG_LINES: usize = 15;

/// A started daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    id: ProcId,
    /// `None` if another process started it, so that we cannot wait for it.
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

    /// The daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("ovld.sock")
    }

    /// Where the daemon's standard output and error go.
    pub fn log_path(&self) -> PathBuf {
        self.dir().join("ovld.log")
    }

    /// Everything that the daemon wrote, over all its starts.
    pub fn log(&self) -> String {
        fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The error, then the end of the log: what went wrong first.
    pub(crate) fn with_log(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}\n{}", self.log_tail(LOG_LINES))
    }

    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        let tail = all[all.len().saturating_sub(lines)..].join("\n");
        format!("{}'s log ({}) ends:\n{tail}", self.name(), self.log_path().display())
    }

    /// TOML for this host's `ovld.toml`, after the lab's own, from the next start on.
    pub fn set_config(&self, toml: &str) -> Result<()> {
        self.update(|host| host.config = toml.to_owned())
    }

    /// Arguments for this host's daemon after the lab's own, from the next start on.
    pub fn set_args(&self, args: &[&str]) -> Result<()> {
        self.update(|host| host.args = args.iter().map(|&arg| arg.to_owned()).collect())
    }

    /// Which addresses the daemon joins from its next start on, instead of the first host's.
    pub fn set_join(&self, addresses: &[&str]) -> Result<()> {
        self.update(|host| host.join = Some(addresses.iter().map(|&each| each.to_owned()).collect()))
    }

    /// Whether the daemon gets `--bootstrap`, from its next start on. By default only the
    /// first host's does, at every start.
    pub fn set_bootstrap(&self, bootstrap: bool) -> Result<()> {
        self.update(|host| host.bootstrap = bootstrap)
    }

    /// Starts the daemon; does not wait until it is ready.
    pub fn start(&self) -> Result<()> {
        let mut daemon = self.daemon();
        ensure!(self.is_present(), "{} is lost: `restore` it before its daemon can start", self.name());
        ensure!(!daemon.as_mut().is_some_and(Daemon::is_running), "ovld runs on {} already", self.name());
        let mut command = self.daemon_command()?;
        let program = command.get_program().to_owned();
        // A process starts in the namespace of the thread that starts it.
        let child = self
            .run(|| command.spawn())?
            .with_context(|| format!("cannot start {} on {}", program.display(), self.name()))?;
        let pid = child.id().cast_signed();
        // A child that has ended already is a zombie and has no more than its number.
        let id = ProcId::of(pid).unwrap_or(ProcId { pid, start: 0 });
        *daemon = Some(Daemon { id, child: Some(child), exit: None });
        drop(daemon);
        self.update(|host| host.daemon = Some(id))
    }

    fn daemon_command(&self) -> Result<Command> {
        let key = self.cluster_key()?;
        let (binary, lab_config, lab_args, first, persistent) = {
            let lab = self.shared.state();
            let first = lab.hosts.first().map(|host| host.address()).transpose()?;
            (lab.ovld.clone(), lab.config.clone(), lab.args.clone(), first, lab.owner.is_none())
        };
        let host = self.read(Clone::clone);
        let config = self.dir().join("ovld.toml");
        fs::write(&config, lab_config + &host.config)
            .with_context(|| format!("cannot write {}", config.display()))?;

        let mut command = Command::new(binaries::find("ovld", binary.as_deref())?);
        command.arg("--config").arg(config).args(["--node", self.name()]);
        command.arg("--state-dir").arg(self.state_dir()).arg("--run-dir").arg(self.run_dir());
        command.arg("--advertise").arg(host.address()?.to_string());
        let first = first.filter(|_| host.number != 1).map(|address| address.to_string());
        for address in host.join.unwrap_or_else(|| first.into_iter().collect()) {
            command.arg("--join").arg(address);
        }
        if host.bootstrap {
            command.arg("--bootstrap");
        }
        command.arg("--cluster-key").arg(key).args(lab_args).args(host.args);

        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if persistent {
            // Out of the reach of the terminal's interrupts: it outlives the script.
            command.process_group(0);
        }
        Ok(command)
    }

    /// The file with this host's cluster key. At its first start it gets the one that all hosts of the
    /// lab begin with; a file that is there already stays as it is.
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

    /// The lab's cluster key, made at the first start of any daemon.
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

    /// The daemon's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.running().map(|id| id.pid.cast_unsigned())
    }

    /// Whether the daemon runs.
    pub fn is_running(&self) -> bool {
        self.running().is_some()
    }

    /// How the daemon ended, if this process started it and it has.
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
            Some(status) => self.with_log(&anyhow!("ovld on {} has ended ({status})", self.name())),
            None => anyhow!("ovld does not run on {}", self.name()),
        })
    }

    /// Sends the daemon a signal, such as `SIGSTOP` and `SIGCONT` to freeze and thaw it.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.must_run()?.signal(signal).map(drop)
    }

    /// Kills the daemon with SIGKILL and waits until it is gone.
    pub fn kill9(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_exit(KILL_TIMEOUT)
    }

    pub(crate) fn kill_if_running(&self) -> Result<()> {
        if self.is_running() { self.kill9() } else { Ok(()) }
    }

    /// Stops the daemon with SIGTERM and says how long it took. After five seconds that is
    /// an error, and it goes on running.
    pub fn stop(&self) -> Result<Duration> {
        let start = Instant::now();
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(STOP_TIMEOUT)?;
        Ok(start.elapsed())
    }

    /// Waits until the daemon has ended, by itself or by a signal.
    pub fn wait_exit(&self, timeout: Duration) -> Result<()> {
        wait_until(timeout, &format!("the end of ovld on {}", self.name()), || !self.is_running())
            .map_err(|error| self.with_log(&error))?;
        self.update(|host| host.daemon = None)
    }

    /// Stops the daemon if it runs, and starts it; does not wait until it is ready.
    pub fn restart(&self) -> Result<()> {
        if self.is_running() {
            self.stop()?;
        }
        self.start()
    }

    /// Waits until the daemon's status is no longer `starting`. Fails at once if it ends.
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

    /// The command `ovlctl --socket ... args`, to be run in the host's namespace.
    pub fn ctl_command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.ovlctl()?);
        command.arg("--socket").arg(self.socket()).args(args);
        Ok(command)
    }

    /// Runs `ovlctl` with the host's socket, for at most half a minute.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        self.ctl_spawn(args)?.finish(CTL_TIMEOUT)
    }

    /// Starts an `ovlctl` that goes on, such as `events --follow`.
    pub fn ctl_spawn(&self, args: &[&str]) -> Result<Spawned> {
        let shown = format!("ovlctl {}", args.join(" "));
        Netns::start(self, self.ctl_command(args)?, &shown, None)
    }

    /// Runs an `ovlctl` that must succeed, and gives its standard output.
    pub fn ctl_ok(&self, args: &[&str]) -> Result<String> {
        let shown = format!("ovlctl {}", args.join(" "));
        self.ctl(args)?.into_stdout(&shown).with_context(|| format!("on {}", self.name()))
    }

    /// Runs an `ovlctl` that must succeed with `-o json`, and gives what it printed.
    pub fn ctl_json(&self, args: &[&str]) -> Result<Value> {
        let text = self.ctl_ok(&[args, &["-o", "json"]].concat())?;
        match serde_json::from_str(&text) {
            Ok(value) => Ok(value),
            Err(error) => {
                bail!("`ovlctl {} -o json` on {} gave no JSON ({error}): {text}", args.join(" "), self.name())
            }
        }
    }

    /// The daemon's resident memory.
    pub fn rss_kib(&self) -> Result<u64> {
        self.must_run()?.rss_kib()
    }

    /// The processor time that the daemon has used since its start.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.must_run()?.cpu_time()
    }
}
