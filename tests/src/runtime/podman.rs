//! Podman as root, with its CNI back end.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use netns_lab::{Host, Output};
use serde_json::Value;

use super::image::{self, IMAGE, PAUSE_IMAGE};
use super::{Cni, Home, NETWORK, Place, need, succeeded};

/// Podman on one host. Its containers and pods go with it.
#[derive(Debug)]
pub struct Podman {
    home: Home,
    /// What it is told to use.
    pub cni: Cni,
}

impl Podman {
    /// Everything that it needs, and the image.
    pub fn new(host: &Host) -> Result<Self> {
        for (program, package) in
            [("podman", "podman"), ("runc", "runc"), ("conmon", "conmon"), ("iptables", "iptables")]
        {
            need(program, package)?;
        }
        let home = Home::new(host, "podman")?;
        let cni = Cni::install(&home)?;
        home.write("containers.conf", &settings(&cni))?;
        let archive = image::make(&home.dir)?;
        let podman = Podman { home, cni };
        podman.call(&["load", "--quiet", "--input", &archive.to_string_lossy()])?;
        Ok(podman)
    }

    /// `podman` with these arguments, however it ends.
    pub fn try_call(&self, args: &[&str]) -> Result<Output> {
        let settings = format!("CONTAINERS_CONF={}", self.home.path("containers.conf"));
        let [root, run, tmp] = ["root", "run", "tmp"].map(|name| self.home.path(name));
        let podman = ["env", &settings, "podman", "--storage-driver", "vfs"];
        let places = ["--root", &root, "--runroot", &run, "--tmpdir", &tmp];
        self.home.host.exec([&podman[..], &places, args].concat())
    }

    /// `podman` with these arguments, which must succeed: its standard output.
    pub fn call(&self, args: &[&str]) -> Result<String> {
        succeeded(self.try_call(args)?, &format!("podman {}", args.join(" ")))
            .with_context(|| format!("on {}", self.home.host.name()))
    }

    /// Starts a container of the image under that name in the network, with further arguments.
    pub fn run(&self, name: &str, more: &[&str]) -> Result<Container<'_>> {
        self.start(name, &[&["--network", NETWORK], more].concat(), &[])
    }

    /// Makes a pod in the network, with further arguments.
    pub fn pod(&self, name: &str, more: &[&str]) -> Result<()> {
        self.call(&[&["pod", "create", "--name", name, "--network", NETWORK], more].concat()).map(drop)
    }

    /// Starts a container in a pod, whose program serves on that port.
    pub fn run_in_pod(&self, pod: &str, name: &str, port: u16) -> Result<Container<'_>> {
        self.start(name, &["--pod", pod], &["/bin/serve", &port.to_string()])
    }

    fn start(&self, name: &str, options: &[&str], command: &[&str]) -> Result<Container<'_>> {
        self.call(&[&["run", "--detach", "--name", name], options, &[IMAGE], command].concat())?;
        Ok(Container { podman: self, name: name.to_owned() })
    }

    /// Removes everything.
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

/// `containers.conf`: nothing of the machine's own, and what a build machine without systemd needs.
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

/// A container that runs.
#[derive(Debug)]
pub struct Container<'podman> {
    podman: &'podman Podman,
    name: String,
}

impl Container<'_> {
    /// What `podman inspect` says of its network.
    pub fn inspect(&self) -> Result<Value> {
        let text = self.podman.call(&["inspect", "--type", "container", &self.name])?;
        let mut all: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
        Ok(all[0]["NetworkSettings"]["Networks"][NETWORK].take())
    }

    /// Removes it, and gives the addresses that it had.
    pub fn remove(self) -> Result<Vec<IpAddr>> {
        let addresses = self.addresses()?;
        self.podman.call(&["rm", "--force", "--time", "0", &self.name])?;
        Ok(addresses)
    }
}

impl Place for Container<'_> {
    fn called(&self) -> String {
        format!("container {} on {}", self.name, self.podman.home.host.name())
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.podman.call(&[&["exec", &self.name], words].concat())
    }
}
