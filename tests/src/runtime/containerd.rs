//! containerd, driven through the CRI as the kubelet drives it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Signal, Spawned, wait_until};

use super::cri::{self, Call};
use super::image::{self, IMAGE, PAUSE_IMAGE};
use super::{Cni, CommandTarget, RuntimeDir, require_program, succeeded, tail};
use crate::SOON;

/// A containerd on one host. Its pods are removed when it is dropped.
#[derive(Debug)]
pub struct Containerd {
    daemon: Option<Spawned>,
    home: RuntimeDir,
    /// Its CNI configuration.
    pub cni: Cni,
}

/// Options of a pod.
#[derive(Clone, Debug)]
pub struct PodOptions<'a> {
    /// Kubernetes namespace.
    pub namespace: &'a str,
    /// Pairs of host port and pod port.
    pub host_ports: &'a [(u16, u16)],
    /// Annotations.
    pub annotations: &'a [(&'a str, &'a str)],
}

impl Default for PodOptions<'_> {
    fn default() -> Self {
        PodOptions { namespace: "default", host_ports: &[], annotations: &[] }
    }
}

impl Containerd {
    /// Installs its configuration, starts the daemon and imports the images.
    pub fn start(host: &Host) -> Result<Self> {
        for (program, package) in [
            ("containerd", "containerd"),
            ("containerd-shim-runc-v2", "containerd"),
            ("ctr", "containerd"),
            ("runc", "runc"),
            ("iptables", "iptables"),
        ] {
            require_program(program, package)?;
        }
        let home = RuntimeDir::new(host, "containerd")?;
        let cni = Cni::install(&home, &[])?;
        home.write("config.toml", &settings(&home, &cni))?;
        let archive = image::make(&home.dir)?;
        let mut containerd = Containerd { daemon: None, home, cni };
        containerd.start_daemon()?;
        containerd.import(&archive.to_string_lossy())?;
        Ok(containerd)
    }

    /// Starts the daemon and waits until the CRI reports it ready, its network included.
    pub fn start_daemon(&mut self) -> Result<()> {
        let config = self.home.path("config.toml");
        let daemon = self.daemon.insert(self.home.host.spawn([
            "containerd",
            "--config",
            &config,
            "--log-level",
            "warn",
        ])?);
        let ready = wait_until(SOON, "containerd to become ready", || {
            ensure!(daemon.is_running(), "containerd exited");
            let answer = cri::call(&self.home.dir.join("containerd.sock"), &cri::RuntimeStatus {})?;
            let conditions = answer.status.map(|status| status.conditions).unwrap_or_default();
            ensure!(!conditions.is_empty() && conditions.iter().all(|each| each.holds), "{conditions:?}");
            Ok(())
        });
        ready.with_context(|| daemon.stderr())
    }

    /// Stops the daemon with a signal. Its pods keep running.
    pub fn end_daemon(&mut self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.take().context("containerd is not running")?;
        daemon.signal(signal)?;
        daemon.finish(SOON).map(drop)
    }

    fn import(&self, archive: &str) -> Result<()> {
        let socket = self.home.path("containerd.sock");
        let args = [
            "ctr",
            "--address",
            &socket,
            "--namespace",
            "k8s.io",
            "images",
            "import",
            "--no-unpack",
            archive,
        ];
        succeeded(self.home.host.exec(args)?, &args.join(" "))?;
        wait_until(SOON, "the imported image", || {
            let images = self.call(&cri::ListImages {})?.images;
            ensure!(images.iter().any(|image| image.tags.iter().any(|tag| tag == IMAGE)), "{images:?}");
            Ok(())
        })
    }

    fn call<C: Call>(&self, request: &C) -> Result<C::Answer> {
        cri::call(&self.home.dir.join("containerd.sock"), request)
            .with_context(|| format!("on {}", self.home.host.name()))
    }

    /// Runs a pod with one container, which serves HTTP on [`super::PORT`].
    pub fn run(&self, name: &str, options: &PodOptions) -> Result<Pod> {
        let config = self.pod_config(name, options);
        let id = self.call(&cri::RunPodSandbox { config: Some(config.clone()) })?.id;
        let container = cri::ContainerConfig {
            metadata: Some(cri::Named { name: "serve".to_owned() }),
            image: Some(cri::Named { name: IMAGE.to_owned() }),
            log_path: format!("{name}.log"),
            linux: Some(cri::Empty {}),
        };
        let request =
            cri::CreateContainer { pod: id.clone(), config: Some(container), pod_config: Some(config) };
        let container = self.call(&request)?.id;
        self.call(&cri::StartContainer { id: container.clone() })?;
        let socket = self.home.dir.join("containerd.sock");
        Ok(Pod { called: format!("pod {name} on {}", self.home.host.name()), id, container, socket })
    }

    fn pod_config(&self, name: &str, options: &PodOptions) -> cri::PodConfig {
        let port = |&(host, pod): &(u16, u16)| cri::PortMapping {
            container_port: i32::from(pod),
            host_port: i32::from(host),
        };
        let annotation = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        cri::PodConfig {
            metadata: Some(cri::PodMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}-in-{}", options.namespace),
                namespace: options.namespace.to_owned(),
            }),
            hostname: name.to_owned(),
            log_directory: self.home.path("logs"),
            port_mappings: options.host_ports.iter().map(port).collect(),
            annotations: options.annotations.iter().map(annotation).collect(),
            linux: Some(cri::Empty {}),
        }
    }

    /// Removes all pods and stops the daemon.
    fn clear(&mut self) -> Result<()> {
        if !self.daemon.as_mut().is_some_and(Spawned::is_running) {
            self.start_daemon()?;
        }
        for cri::SandboxId { id } in self.call(&cri::ListPodSandbox {})?.items {
            self.call(&cri::StopPodSandbox { id: id.clone() })?;
            self.call(&cri::RemovePodSandbox { id })?;
        }
        self.end_daemon(Signal::SIGTERM)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if thread::panicking()
            && let Some(daemon) = &self.daemon
        {
            eprintln!(
                "--- {}: last log lines of containerd:\n{}",
                self.home.host.name(),
                tail(&daemon.stderr())
            );
        }
        if let Err(error) = self.clear() {
            eprintln!("{}: {error:#}", self.home.host.name());
        }
    }
}

/// Returns `config.toml`: it uses nothing of the machine's own containerd, and works without systemd.
fn settings(home: &RuntimeDir, cni: &Cni) -> String {
    format!(
        r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs"]

[grpc]
address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#,
        root = home.path("root"),
        state = home.path("state"),
        socket = home.path("containerd.sock"),
        plugins = cni.bin_dir.display(),
        networks = cni.conf_dir.display(),
    )
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    /// ID of its sandbox, which is also `CNI_CONTAINERID`.
    pub id: String,
    called: String,
    container: String,
    socket: PathBuf,
}

impl Pod {
    fn status(&self) -> Result<cri::PodStatus> {
        let answer = cri::call(&self.socket, &cri::PodSandboxStatus { id: self.id.clone() })?;
        answer.status.with_context(|| format!("{} has no status", self.called))
    }

    /// Whether the runtime reports it ready.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.status()?.state == 0)
    }

    /// Its addresses as the runtime reports them, sorted.
    pub fn reported_addresses(&self) -> Result<Vec<IpAddr>> {
        let network = self.status()?.network.unwrap_or_default();
        let texts = std::iter::once(&network.ip).chain(network.additional.iter().map(|each| &each.ip));
        let mut all: Vec<IpAddr> = texts.map(|text| text.parse()).collect::<Result<_, _>>()?;
        all.sort();
        Ok(all)
    }

    /// Its annotations as the runtime reports them.
    pub fn annotations(&self) -> Result<BTreeMap<String, String>> {
        Ok(self.status()?.annotations)
    }

    /// Calls `StopPodSandbox`.
    pub fn stop(&self) -> Result<()> {
        cri::call(&self.socket, &cri::StopPodSandbox { id: self.id.clone() }).map(drop)
    }

    /// Calls `RemovePodSandbox`.
    pub fn remove(&self) -> Result<()> {
        cri::call(&self.socket, &cri::RemovePodSandbox { id: self.id.clone() }).map(drop)
    }
}

impl CommandTarget for Pod {
    fn called(&self) -> String {
        self.called.clone()
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        let request = cri::ExecSync {
            container: self.container.clone(),
            command: words.iter().map(|&word| word.to_owned()).collect(),
            timeout_seconds: 20,
        };
        let answer = cri::call(&self.socket, &request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            answer.exit_code == 0,
            "`{}` in {} failed ({}): {}",
            words.join(" "),
            self.called,
            answer.exit_code,
            text(&answer.stderr)
        );
        Ok(text(&answer.stdout))
    }
}
