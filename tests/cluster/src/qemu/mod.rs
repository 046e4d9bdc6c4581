//! Machines under plain QEMU, without hardware virtualisation, on a switch in a network namespace. Everything ends with
//! this process: the machines are killed with it, and the next run removes what is left of a namespace.

mod agent;
mod clock;
mod qmp;

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::wait_until;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use self::agent::Agent;
use crate::machine::{CommandOutput, Machine};

/// Timeout from the start of a machine to its first command. It takes 20 s on an idle host.
const BOOT: Duration = Duration::from_secs(180);
/// Prefix of the namespace names, before the process ID.
const NAMESPACE: &str = "ovl-cluster-";
/// Directory where the second disk is unpacked.
const FILES: &str = "/opt/ovl";
const BRIDGE: &str = "switch";

/// The switch. It is removed with the last machine on it.
#[derive(Debug)]
struct Switch {
    namespace: String,
}

/// A machine under QEMU.
#[derive(Debug)]
pub(crate) struct Qemu {
    name: String,
    address: IpAddr,
    tap: String,
    qmp: PathBuf,
    agent: Agent,
    child: Child,
    booted: Mutex<String>,
    // Dropped after the child.
    switch: std::sync::Arc<Switch>,
}

/// Starts machines from an image, and waits until all of them accept commands.
///
/// `files` is a tar archive, which is unpacked on the machines. `dir` is for sockets and consoles.
pub(crate) fn start(count: u8, image: &Path, files: &Path, dir: &Path) -> Result<Vec<Qemu>> {
    let switch = std::sync::Arc::new(Switch::new()?);
    let machines = (1..=count)
        .map(|number| Qemu::start(number, image, files, dir, &switch))
        .collect::<Result<Vec<_>>>()?;
    for machine in &machines {
        machine.wait_boot("")?;
        let unpack = format!("mkdir -p {FILES} && tar -xf /dev/vdb -C {FILES}");
        (machine as &dyn Machine).ok(&unpack)?;
    }
    Ok(machines)
}

impl Switch {
    fn new() -> Result<Self> {
        sweep()?;
        let this = Self { namespace: format!("{NAMESPACE}{}", std::process::id()) };
        ip(&["netns", "add", &this.namespace])?;
        this.ip(&["link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"])?;
        this.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(this)
    }

    fn ip(&self, words: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.namespace], words].concat())
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // On an error, the next run tries again.
        ip(&["netns", "del", &self.namespace]).ok();
    }
}

/// Deletes the namespaces of runs that were killed. Their machines were killed with them.
fn sweep() -> Result<()> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(()) };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(NAMESPACE).and_then(|pid| pid.parse().ok()) else { continue };
        if kill(Pid::from_raw(pid), None).is_err() {
            ip(&["netns", "del", &name])?;
        }
    }
    Ok(())
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("cannot run ip")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {}` failed: {}", words.join(" "), stderr.trim());
    Ok(())
}

impl Qemu {
    fn start(
        number: u8,
        image: &Path,
        files: &Path,
        dir: &Path,
        switch: &std::sync::Arc<Switch>,
    ) -> Result<Self> {
        let name = format!("vm{number}");
        let address = Ipv4Addr::new(192, 168, 96, number);
        let tap = format!("tap{number}");
        switch.ip(&["tuntap", "add", &tap, "mode", "tap"])?;
        switch.ip(&["link", "set", &tap, "master", BRIDGE, "up"])?;
        let (qmp, socket) = (dir.join(format!("{name}.qmp")), dir.join(format!("{name}.agent")));
        let console = dir.join(format!("{name}.console"));
        let clock = clock::parameters();
        let kernel_line = format!(
            "console=ttyS0 quiet root=/dev/vda rw net.ifnames=0 mitigations=off no_timer_check \
             {clock} panic=-1 systemd.hostname={name} systemd.machine_id={:032x} ip={address}:::255.255.255.0::eth0:none",
            u128::from(number) + (u128::from(std::process::id()) << 32) + (0x6f76_6c00_u128 << 96)
        );
        let mut command = Command::new("ip");
        // QEMU is killed with this process, however this ends.
        command.args(["netns", "exec", &switch.namespace, "setpriv", "--pdeathsig", "KILL"]).args([
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg,thread=multi,tb-size=256",
            "-cpu",
            "qemu64",
            "-M",
            "q35,hpet=off,smbus=off,sata=off,usb=off,graphics=off,vmport=off",
            "-bios",
            "qboot.rom",
            "-m",
            "384",
            // A machine that powers itself off is only stopped, and can be started again with its disk.
            "-no-shutdown",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ]);
        let mut pair = |option: &str, value: String| {
            command.arg(option).arg(value);
        };
        pair("-kernel", image.join("kernel").display().to_string());
        pair("-initrd", image.join("initrd").display().to_string());
        pair("-append", kernel_line);
        pair("-serial", format!("file:{}", console.display()));
        pair("-qmp", format!("unix:{},server=on,wait=off", qmp.display()));
        pair("-chardev", format!("socket,id=agent,path={},server=on,wait=off", socket.display()));
        // All machines share one image. Their writes go to a temporary file.
        let disk = image.join("disk");
        pair("-drive", format!("file={},format=raw,if=virtio,snapshot=on", disk.display()));
        pair("-drive", format!("file={},format=raw,if=virtio,readonly=on", files.display()));
        pair("-netdev", format!("tap,id=net,ifname={tap},script=no,downscript=no"));
        pair("-device", format!("virtio-net-pci,netdev=net,romfile=,mac=52:54:00:96:00:{number:02x}"));
        let log = File::create(dir.join(format!("{name}.qemu")))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start QEMU")?;
        Ok(Self {
            name,
            address: address.into(),
            tap,
            qmp,
            agent: Agent::new(socket),
            child,
            booted: Mutex::default(),
            switch: std::sync::Arc::clone(switch),
        })
    }

    /// Waits for a boot with another boot ID than `last`.
    fn wait_boot(&self, last: &str) -> Result<()> {
        let id = wait_until(BOOT, &format!("{} to boot", self.name), || {
            let id = self.agent.boot_id()?;
            ensure!(id != last, "not rebooted yet");
            Ok(Some(id))
        })?;
        *self.booted.lock().unwrap_or_else(PoisonError::into_inner) = id;
        Ok(())
    }

    fn boot(&self) -> String {
        self.booted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Machine for Qemu {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> IpAddr {
        self.address
    }

    fn link(&self) -> &str {
        "eth0"
    }

    fn files(&self) -> &str {
        FILES
    }

    fn run_for(&self, timeout: Duration, script: &str) -> Result<CommandOutput> {
        self.agent.run(timeout, script).with_context(|| format!("on {}", self.name))
    }

    fn reboot(&self) -> Result<()> {
        let last = self.boot();
        // Delayed, so that the agent can answer before it is stopped.
        let script = "(sleep 0.5; systemctl reboot) >/dev/null 2>&1 </dev/null &";
        self.run_for(crate::machine::SOON, script)?;
        self.wait_boot(&last)
    }

    fn power_off(&self) -> Result<()> {
        qmp::run(&self.qmp, &["stop"])?;
        self.agent.reset();
        Ok(())
    }

    fn power_on(&self) -> Result<()> {
        qmp::run(&self.qmp, &["system_reset", "cont"])?;
        self.wait_boot(&self.boot())
    }

    fn cut(&self) -> Result<()> {
        self.switch.ip(&["link", "set", &self.tap, "nomaster"])
    }

    fn heal(&self) -> Result<()> {
        self.switch.ip(&["link", "set", &self.tap, "master", BRIDGE])
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Errors mean that QEMU has exited already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
