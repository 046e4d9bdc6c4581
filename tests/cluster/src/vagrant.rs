//! Machines that `vagrant up` has started. Commands go through ssh with Vagrant's settings, because `vagrant ssh -c`
//! takes seconds for each.

use std::fs::{self, File};
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::wait_until;

use crate::machine::{CommandOutput, Machine, SOON};

/// Timeout from the start of a machine to its first command.
const BOOT: Duration = Duration::from_secs(600);
/// Directory where the packages are unpacked.
const FILES: &str = "/opt/ovl";
/// Exit status of ssh when the connection failed.
const NO_CONNECTION: i32 = 255;

/// A machine of Vagrant.
#[derive(Debug)]
pub(crate) struct Vagrant {
    name: String,
    /// Directory of the Vagrantfile.
    folder: PathBuf,
    /// Configuration file for `ssh -F`.
    settings: PathBuf,
    address: IpAddr,
    link: String,
    booted: Mutex<String>,
}

/// Connects to the machines of the Vagrantfile in this directory, which must be running.
///
/// `files` is a tar archive, which is unpacked on the machines. `dir` is for the files of ssh.
pub(crate) fn connect(folder: &Path, files: &Path, dir: &Path) -> Result<Vec<Vagrant>> {
    let status = vagrant(folder, &["status", "--machine-readable"])?;
    // Fields: time, machine, kind, data; see Vagrant's "Machine Readable Output".
    let states = status.lines().filter_map(|line| {
        let mut fields = line.split(',').skip(1);
        let (name, kind, state) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "state").then_some((name, state))
    });
    let mut machines = Vec::new();
    for (name, state) in states {
        ensure!(state == "running", "{name} is {state}: `vagrant up` in {} first", folder.display());
        machines.push(Vagrant::connect(name, folder, files, dir)?);
    }
    ensure!(machines.len() >= 3, "{} machines, but the scenarios need three", machines.len());
    Ok(machines)
}

fn vagrant(folder: &Path, words: &[&str]) -> Result<String> {
    let output = Command::new("vagrant")
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .context("cannot run vagrant")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`vagrant {}`: {}", words.join(" "), stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Vagrant {
    fn connect(name: &str, folder: &Path, files: &Path, dir: &Path) -> Result<Self> {
        let mut this = Self {
            name: name.to_owned(),
            folder: folder.to_owned(),
            settings: dir.join(format!("{name}.ssh")),
            address: IpAddr::from([0, 0, 0, 0]),
            link: String::new(),
            booted: Mutex::default(),
        };
        this.read_settings()?;
        this.wait_boot("")?;
        let machine: &dyn Machine = &this;
        // The private network is the underlay, and the last network that the Vagrantfile gives a machine.
        let shown = machine.ok("ip -o -4 address show scope global | grep -v ' ov.-' | tail -n 1")?;
        let mut words = shown.split_whitespace().skip(1);
        let link = words.next().context("no device with an address")?.to_owned();
        let address =
            words.nth(1).and_then(|prefix| prefix.split('/').next()).context("no address")?.parse()?;
        (this.link, this.address) = (link, address);
        let script = format!("rm -rf {FILES}; mkdir -p {FILES} && tar -xf - -C {FILES}");
        let ran = this.ssh(SOON, &script, Stdio::from(File::open(files)?))?;
        ensure!(ran.code == 0, "copying the packages to {name}: {ran}");
        Ok(this)
    }

    /// Reads the ssh configuration. Port and address may change with a start.
    fn read_settings(&self) -> Result<()> {
        let settings = vagrant(&self.folder, &["ssh-config", &self.name])?;
        let control = self.settings.with_extension("control");
        // All commands share one connection, and a connection that hangs is closed.
        let more = format!(
            "  ControlMaster auto\n  ControlPath {}\n  ControlPersist 60\n  ServerAliveInterval 5\n  ServerAliveCountMax 12\n  \
             ConnectTimeout 20\n",
            control.display()
        );
        Ok(fs::write(&self.settings, format!("{}\n{more}", settings.trim_end()))?)
    }

    fn ssh(&self, timeout: Duration, script: &str, stdin: Stdio) -> Result<CommandOutput> {
        let quoted = script.replace('\'', r"'\''");
        let child = Command::new("ssh")
            .arg("-F")
            .arg(&self.settings)
            .args([&self.name, &format!("sudo -n sh -c '{quoted}'")])
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ssh")?;
        finish(child, timeout).with_context(|| format!("`{script}`"))
    }

    /// Closes the shared connection, whose other end is gone.
    fn hang_up(&self) {
        // This fails if there is no connection, which is fine.
        Command::new("ssh").arg("-F").arg(&self.settings).args(["-O", "exit", &self.name]).output().ok();
    }

    /// Waits for a boot with another boot ID than `last`.
    fn wait_boot(&self, last: &str) -> Result<()> {
        let id = wait_until(BOOT, &format!("{} to boot", self.name), || {
            // A pause between two attempts, because each one starts processes at both ends.
            thread::sleep(Duration::from_millis(500));
            let ran =
                self.ssh(Duration::from_secs(60), "cat /proc/sys/kernel/random/boot_id", Stdio::null())?;
            let id = ran.out.trim().to_owned();
            if ran.code != 0 || id == last {
                self.hang_up();
                bail!("not up again yet: {ran}");
            }
            Ok(Some(id))
        })?;
        *self.booted.lock().unwrap_or_else(PoisonError::into_inner) = id;
        Ok(())
    }

    fn boot(&self) -> String {
        self.booted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Script that drops all packets at the underlay's device, before ovl and firewalls see them.
    fn barrier(&self) -> String {
        let chain = |name: &str| {
            format!(
                "add chain netdev barrier {name} {{ type filter hook {name} device {} priority -500; policy drop; }}",
                self.link
            )
        };
        format!("nft 'add table netdev barrier; {}; {}'", chain("ingress"), chain("egress"))
    }
}

/// Waits for a process to exit, and reads its output meanwhile.
fn finish(mut child: Child, timeout: Duration) -> Result<CommandOutput> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read = |stream: Option<Box<dyn std::io::Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(stdout.map(|stream| Box::new(stream) as _));
    let err = read(stderr.map(|stream| Box::new(stream) as _));
    let deadline = Instant::now() + timeout;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("not finished within {timeout:?}");
        }
        thread::sleep(Duration::from_millis(10));
    };
    let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
    Ok(CommandOutput { code: status.code().unwrap_or(NO_CONNECTION), out: text(out), err: text(err) })
}

impl Machine for Vagrant {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> IpAddr {
        self.address
    }

    fn link(&self) -> &str {
        &self.link
    }

    fn files(&self) -> &str {
        FILES
    }

    fn run_for(&self, timeout: Duration, script: &str) -> Result<CommandOutput> {
        let ran = self.ssh(timeout, script, Stdio::null()).with_context(|| format!("on {}", self.name))?;
        if ran.code == NO_CONNECTION {
            self.hang_up();
        }
        Ok(ran)
    }

    fn reboot(&self) -> Result<()> {
        let last = self.boot();
        self.run_for(SOON, "(sleep 0.5; systemctl reboot) >/dev/null 2>&1 </dev/null &")?;
        self.wait_boot(&last)
    }

    fn power_off(&self) -> Result<()> {
        vagrant(&self.folder, &["halt", "--force", &self.name])?;
        self.hang_up();
        Ok(())
    }

    fn power_on(&self) -> Result<()> {
        let last = self.boot();
        vagrant(&self.folder, &["up", "--no-provision", &self.name])?;
        self.read_settings()?;
        self.wait_boot(&last)
    }

    fn cut(&self) -> Result<()> {
        (self as &dyn Machine).ok(&self.barrier()).map(drop)
    }

    fn heal(&self) -> Result<()> {
        (self as &dyn Machine).ok("nft delete table netdev barrier").map(drop)
    }
}

impl Drop for Vagrant {
    fn drop(&mut self) {
        self.hang_up();
    }
}
