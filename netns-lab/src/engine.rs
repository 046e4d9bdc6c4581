//! A separate Docker Engine for a host, with ovl's plugin.
//!
//! An Engine looks for plugins in a fixed directory, and the hosts of a lab share the file system. So each
//! Engine has a mount namespace with its own copy of that directory. The namespace belongs to the Engine's
//! containerd, which keeps running while the Engine itself is stopped, killed and started again. An Engine
//! that the machine may have is not touched, and no image is pulled.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::binaries;
use crate::host::Host;
use crate::netns::Netns;
use crate::procs::ProcId;
use crate::spawned::Spawned;
use crate::tool::Output;
use crate::wait::wait_until;

/// Maximum time for an Engine to start or exit; it waits for containers that do not exit.
const PATIENCE: Duration = Duration::from_secs(60);

/// Shell script that sets up the mount namespace: `$1` is the plugin directory, the other arguments are run.
const NAMESPACE: &str = "mount -t tmpfs tmpfs /run/docker && mkdir /run/docker/plugins && \
     mount --bind \"$1\" /run/docker/plugins && mount -t tmpfs tmpfs /run/containerd && shift && exec \"$@\"";

/// A Docker Engine. It is removed with its containers and files on drop.
#[derive(Debug)]
pub struct Engine {
    host: Host,
    dir: PathBuf,
    cgroup: String,
    options: Vec<String>,
    containerd: Spawned,
    daemon: Option<Spawned>,
    plugin: Option<Spawned>,
    program: PathBuf,
}

impl Engine {
    /// Starts the plugin and the Engine. The options apply to every start of this Engine.
    pub fn start(host: &Host, options: &[&str]) -> Result<Self> {
        Self::start_with(host, options, None)
    }

    /// Like [`start`](Self::start), with the `ovl-docker` at this path.
    pub fn start_with(host: &Host, options: &[&str], program: Option<&Path>) -> Result<Self> {
        let program = binaries::find("ovl-docker", program)?;
        for program in ["/usr/sbin/dockerd", "/usr/bin/docker", "/usr/bin/containerd", "/usr/sbin/iptables"] {
            ensure!(
                Path::new(program).is_file(),
                "no {program}: apt-get install docker.io iptables (tests/run does so)"
            );
        }
        let dir = host.dir().join("docker");
        fs::create_dir_all(dir.join("plugins")).with_context(|| format!("cannot make {}", dir.display()))?;
        // Mount points for the namespace's own directories.
        for place in ["/run/docker", "/run/containerd"] {
            fs::create_dir_all(place)?;
        }
        // The setting of a host that has loaded br_netfilter.
        for what in ["iptables", "ip6tables"] {
            host.exec_ok(["sysctl", "-qw", &format!("net.bridge.bridge-nf-call-{what}=1")])?;
        }
        fs::write(dir.join("daemon.json"), "{}")?;
        fs::write(dir.join("containerd.toml"), containerd_settings(&dir))?;
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let containerd = ["unshare", "--mount", "--propagation", "private", "sh", "-c", NAMESPACE, "sh"]
            .map(str::to_owned);
        let rest = [path("plugins"), "containerd".to_owned(), "--config".to_owned(), path("containerd.toml")];
        let containerd = host.spawn(containerd.into_iter().chain(rest))?;
        let mut engine = Engine {
            cgroup: host.netns_name().to_owned(),
            host: host.clone(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            containerd,
            daemon: None,
            plugin: None,
            program,
            dir,
        };
        let socket = engine.dir.join("containerd.sock");
        wait_until(PATIENCE, "containerd", || {
            ensure!(engine.containerd.is_running(), "it has exited: {}", engine.containerd.stderr());
            Ok::<_, anyhow::Error>(socket.exists())
        })?;
        engine.start_plugin()?;
        engine.start_daemon()?;
        Ok(engine)
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Returns the host that the Engine runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Returns the path of the plugin's socket, for calls without an Engine.
    pub fn plugin_socket(&self) -> PathBuf {
        self.dir.join("plugins/ovl.sock")
    }

    /// Starts ovl's plugin.
    pub fn start_plugin(&mut self) -> Result<()> {
        let socket = self.plugin_socket();
        let mut command = Command::new(&self.program);
        command.arg("--listen").arg(&socket).arg("--socket").arg(self.host.socket());
        command.args(["--engine", &self.path("docker.sock")]);
        let plugin = Netns::start(&self.host, command, "ovl-docker", None)?;
        let plugin = self.plugin.insert(plugin);
        wait_until(PATIENCE, "ovl-docker", || {
            ensure!(plugin.is_running(), "it has exited: {}", plugin.stderr());
            Ok::<_, anyhow::Error>(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })
    }

    /// Stops the plugin with a signal.
    pub fn end_plugin(&mut self, signal: Signal) -> Result<()> {
        let mut plugin = self.plugin.take().context("ovl-docker does not run")?;
        plugin.signal(signal)?;
        plugin.finish(PATIENCE).map(drop)
    }

    /// Returns the plugin's output so far.
    pub fn plugin_log(&self) -> String {
        self.plugin.as_ref().map(Spawned::stderr).unwrap_or_default()
    }

    /// Starts the Engine itself and waits until it answers.
    pub fn start_daemon(&mut self) -> Result<()> {
        // A killed Engine leaves its pid file, and another process may have that id by now.
        fs::remove_file(self.dir.join("pid")).ok();
        let mut words: Vec<String> = vec![
            "nsenter".to_owned(),
            format!("--mount=/proc/{}/ns/mnt", self.containerd.pid()),
            "dockerd".to_owned(),
        ];
        for (flag, value) in [
            ("--config-file", self.path("daemon.json")),
            ("--host", format!("unix://{}", self.path("docker.sock"))),
            ("--containerd", self.path("containerd.sock")),
            ("--data-root", self.path("root")),
            ("--exec-root", self.path("exec")),
            ("--pidfile", self.path("pid")),
            ("--exec-opt", "native.cgroupdriver=cgroupfs".to_owned()),
            ("--cgroup-parent", format!("/{}", self.cgroup)),
            ("--storage-driver", "overlay2".to_owned()),
        ] {
            words.extend([flag.to_owned(), value]);
        }
        words.extend(self.options.iter().cloned());
        let daemon = self.host.spawn(words)?;
        self.daemon = Some(daemon);
        wait_until(PATIENCE, &format!("the Engine on {}", self.host.name()), || {
            let daemon = self.daemon.as_mut().context("no Engine")?;
            ensure!(daemon.is_running(), "it has exited: {}", daemon.stderr());
            let answer = self.try_call(&["version", "--format", "{{.Server.Version}}"])?;
            ensure!(answer.success(), "{}", answer.stderr);
            Ok(())
        })
    }

    /// Stops the Engine itself with a signal.
    pub fn end_daemon(&mut self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.take().context("the Engine does not run")?;
        daemon.signal(signal)?;
        daemon.finish(PATIENCE).map(drop)
    }

    /// Returns the Engine's output so far.
    pub fn log(&self) -> String {
        self.daemon.as_ref().map(Spawned::stderr).unwrap_or_default()
    }

    /// Builds a `docker` command line to be run on the host.
    pub fn command(&self, args: &[&str]) -> Vec<String> {
        let socket = format!("unix://{}", self.path("docker.sock"));
        let words = ["/usr/bin/docker", "--host", &socket];
        words.iter().chain(args).map(|&word| word.to_owned()).collect()
    }

    /// Runs a `docker` command, which may fail.
    pub fn try_call(&self, args: &[&str]) -> Result<Output> {
        self.host.exec(self.command(args))
    }

    /// Runs a `docker` command that must succeed, and returns its trimmed standard output.
    pub fn call(&self, args: &[&str]) -> Result<String> {
        let what = format!("docker {}", args.join(" "));
        let said = self.try_call(args)?.into_stdout(&what);
        said.map(|text| text.trim().to_owned()).with_context(|| format!("on {}", self.host.name()))
    }

    /// Runs a `docker` command that must fail, and returns its standard error.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let output = self.try_call(args)?;
        ensure!(!output.success(), "`docker {}` succeeded: {}", args.join(" "), output.stdout);
        Ok(output.stderr)
    }

    /// Returns the output of `docker KIND inspect NAME`.
    pub fn inspect(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.call(&[kind, "inspect", name])?;
        let mut all: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
        Ok(all[0].take())
    }

    /// Creates an image that contains only a static busybox.
    pub fn import_busybox(&self, image: &str) -> Result<()> {
        let root = self.dir.join("image");
        for dir in ["bin", "proc", "sys", "dev", "etc", "tmp", "run"] {
            fs::create_dir_all(root.join(dir))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .context("no /bin/busybox: apt-get install busybox-static")?;
        let archive = self.path("image.tar");
        let root = root.to_string_lossy().into_owned();
        self.host.exec_ok(["tar", "-C", &root, "-cf", &archive, "."])?;
        self.call(&["import", "--change", "ENV PATH=/bin", &archive, image]).map(drop)
    }

    /// Removes all containers, stops all processes, and removes the files.
    fn clear(&mut self) -> Result<()> {
        if !self.daemon.as_mut().is_some_and(Spawned::is_running) {
            self.start_daemon()?;
        }
        let all = self.call(&["ps", "--all", "--quiet"])?;
        let ids: Vec<&str> = all.split_whitespace().collect();
        if !ids.is_empty() {
            self.call(&[&["rm", "--force"], &ids[..]].concat())?;
        }
        self.end_daemon(Signal::SIGTERM)
    }

    /// Kills containers and their shims, which outlive a killed Engine.
    fn kill_containers(&self) -> Result<()> {
        let cgroups = self.cgroups();
        wait_until(PATIENCE, "the containers to exit", || {
            let pids: BTreeSet<i32> = cgroups.iter().flat_map(|dir| pids_below(dir)).collect();
            for pid in &pids {
                if let Some(process) = ProcId::of(*pid) {
                    process.signal(Signal::SIGKILL)?;
                }
            }
            Ok::<_, anyhow::Error>(pids.is_empty())
        })?;
        cgroups.iter().try_for_each(|dir| remove_cgroup(dir))
    }

    /// Returns the Engine's cgroup in each hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let hierarchies =
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        hierarchies
            .chain([PathBuf::from("/sys/fs/cgroup")])
            .map(|dir| dir.join(&self.cgroup))
            .filter(|dir| dir.is_dir())
            .collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if thread::panicking() {
            let tail = |text: String| text.lines().rev().take(12).collect::<Vec<_>>().join("\n");
            eprintln!("--- {}: ovl-docker, the latest first:\n{}", self.host.name(), tail(self.plugin_log()));
            eprintln!("--- {}: the Engine, the latest first:\n{}", self.host.name(), tail(self.log()));
        }
        let cleared = self.clear();
        self.daemon = None;
        let killed = self.kill_containers();
        if let Err(error) = self.containerd.signal(Signal::SIGTERM) {
            eprintln!("{}: {error:#}", self.host.name());
        }
        self.containerd.wait(PATIENCE).ok();
        self.plugin = None;
        let removed = fs::remove_dir_all(&self.dir).context("cannot remove the Engine's directory");
        for error in [cleared, killed, removed].into_iter().filter_map(Result::err) {
            eprintln!("{}: {error:#}", self.host.name());
        }
    }
}

fn pids_below(dir: &Path) -> Vec<i32> {
    let own = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let own = own.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>();
    own.into_iter().chain(children(dir).iter().flat_map(|child| pids_below(child))).collect()
}

fn remove_cgroup(dir: &Path) -> Result<()> {
    children(dir).iter().try_for_each(|child| remove_cgroup(child))?;
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", dir.display())
        }
        _ => Ok(()),
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn containerd_settings(dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\n[grpc]\naddress = \
         \"{}\"\n",
        path("containerd-root"),
        path("containerd-state"),
        path("containerd.sock")
    )
}
