//! Podman as root, with the CNI network backend.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use netns_lab::{Host, Output};
use serde_json::Value;

use super::image::{self, IMAGE, PAUSE_IMAGE};
use super::{Cni, CommandTarget, NETWORK, RuntimeDir, require_program, succeeded};

/// A Podman on one host. Its containers and pods are removed when it is dropped.
#[derive(Debug)]
pub struct Podman {
    home: RuntimeDir,
    /// Its CNI configuration.
    pub cni: Cni,
}

impl Podman {
    /// Installs its configuration and loads the images.
    pub fn new(host: &Host) -> Result<Self> {
        for (program, package) in
            [("podman", "podman"), ("runc", "runc"), ("conmon", "conmon"), ("iptables", "iptables")]
        {
            require_program(program, package)?;
        }
        let home = RuntimeDir::new(host, "podman")?;
        let cni = Cni::install(&home, &["--portmap"])?;
        home.write("containers.conf", &settings(&cni))?;
        let archive = image::make(&home.dir)?;
        let podman = Podman { home, cni };
        podman.call(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        Ok(podman)
    }

    /// Runs `podman` with these arguments, and returns its output and exit status.
    pub fn try_call(&self, args: &[&str]) -> Result<Output> {
        let settings = format!("CONTAINERS_CONF={}", self.home.path("containers.conf"));
        let [root, run, tmp] = ["root", "run", "tmp"].map(|name| self.home.path(name));
        let podman = ["env", &settings, "podman", "--storage-driver", "vfs"];
        let dirs = ["--root", &root, "--runroot", &run, "--tmpdir", &tmp];
        self.home.host.exec([&podman[..], &dirs, args].concat())
    }

    /// Runs `podman` with these arguments, which must succeed, and returns its standard output.
    pub fn call(&self, args: &[&str]) -> Result<String> {
        succeeded(self.try_call(args)?, &format!("podman {}", args.join(" ")))
            .with_context(|| format!("on {}", self.home.host.name()))
    }

    /// Starts a container of the image on [`NETWORK`], with further arguments.
    pub fn run(&self, name: &str, more: &[&str]) -> Result<Container<'_>> {
        self.start(name, &[&["--network", NETWORK], more].concat(), &[])
    }

    /// Creates a pod on [`NETWORK`], with further arguments.
    pub fn pod(&self, name: &str, more: &[&str]) -> Result<()> {
        self.call(&[&["pod", "create", "--name", name, "--network", NETWORK], more].concat()).map(drop)
    }

    /// Starts a container in a pod, whose HTTP server listens on this port.
    pub fn run_in_pod(&self, pod: &str, name: &str, port: u16) -> Result<Container<'_>> {
        self.start(name, &["--pod", pod], &["/bin/serve", &port.to_string()])
    }

    fn start(&self, name: &str, options: &[&str], command: &[&str]) -> Result<Container<'_>> {
        self.call(&[&["run", "--detach", "--name", name], options, &[IMAGE], command].concat())?;
        Ok(Container { podman: self, name: name.to_owned() })
    }

    /// Removes all pods and containers.
    fn clear(&self) -> Result<()> {
        self.call(&["pod", "rm", "--all", "--force", "--time", "0"])?;
        self.call(&["rm", "--all", "--force", "--time", "0"]).map(drop)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("{}: {error:#}", self.home.host.name());
        }
    }
}

/// Returns `containers.conf`: it uses nothing of the machine's own Podman, and works without systemd.
fn settings(cni: &Cni) -> String {
    format!(
        r#"[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
infra_image = "{PAUSE_IMAGE}"
lock_type = "file"
num_locks = 64
runtime = "runc"

[network]
network_backend = "cni"
cni_plugin_dirs = ["{plugins}"]
network_config_dir = "{networks}"
"#,
        plugins = cni.bin_dir.display(),
        networks = cni.conf_dir.display(),
    )
}

/// A running container.
#[derive(Debug)]
pub struct Container<'podman> {
    podman: &'podman Podman,
    name: String,
}

impl Container<'_> {
    /// The part of `podman inspect` about [`NETWORK`].
    pub fn inspect(&self) -> Result<Value> {
        let text = self.podman.call(&["inspect", "--type", "container", &self.name])?;
        let mut all: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        Ok(all[0]["NetworkSettings"]["Networks"][NETWORK].take())
    }

    /// Removes it, and returns the addresses that it had.
    pub fn remove(self) -> Result<Vec<IpAddr>> {
        let addresses = self.addresses()?;
        self.podman.call(&["rm", "--force", "--time", "0", &self.name])?;
        Ok(addresses)
    }
}

impl CommandTarget for Container<'_> {
    fn called(&self) -> String {
        format!("container {} on {}", self.name, self.podman.home.host.name())
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.podman.call(&[&["exec", &self.name], words].concat())
    }
}
