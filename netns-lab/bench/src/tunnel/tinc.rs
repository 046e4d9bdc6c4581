//! tinc on two hosts, which connect to each other.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Lab, wait_until};

use super::MTU;
use super::peers::End;

const DEVICE: &str = "tinc1";
const START_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn address(host: usize) -> IpAddr {
    IpAddr::from([10, 92, 0, host as u8 + 1])
}

pub(crate) fn start(program: &Path, lab: &Lab) -> Result<Vec<End>> {
    let dirs: Vec<PathBuf> =
        lab.hosts().iter().map(|host| lab.dir().join("tinc").join(host.name())).collect();
    for (index, dir) in dirs.iter().enumerate() {
        prepare(program, lab, index, dir)?;
    }
    for (from, to) in [(0, 1), (1, 0)] {
        let file = Path::new("hosts").join(lab.hosts()[from].name());
        fs::copy(dirs[from].join(&file), dirs[to].join(&file)).context("cannot copy a host's key")?;
    }
    (0..2).map(|index| start_one(program, &lab.hosts()[index], index, &dirs[index])).collect()
}

/// Writes the files of a host, with its own keys.
fn prepare(program: &Path, lab: &Lab, index: usize, dir: &Path) -> Result<()> {
    let (host, other) = (&lab.hosts()[index], &lab.hosts()[1 - index]);
    let name = host.name();
    let own = format!("Address = {}\nSubnet = {}/32\n", host.address()?, address(index));
    let config =
        format!("Name = {name}\nConnectTo = {}\nInterface = {DEVICE}\nMode = router\n", other.name());
    let context = || format!("cannot write into {}", dir.display());
    fs::create_dir_all(dir.join("hosts")).with_context(context)?;
    fs::write(dir.join("tinc.conf"), config).with_context(context)?;
    fs::write(dir.join("hosts").join(name), own).with_context(context)?;
    // tincd asks for the paths, and uses the defaults without an answer.
    let made = Command::new(program).arg("-c").arg(dir).arg("-K2048").stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success(), "`{} -K` failed: {said}", program.display());
    Ok(())
}

fn start_one(program: &Path, host: &Host, index: usize, dir: &Path) -> Result<End> {
    let pid_file = format!("--pidfile={}", dir.join("pid").display());
    let args = [program.as_os_str(), "-c".as_ref(), dir.as_os_str(), "-D".as_ref(), pid_file.as_ref()];
    let process = host.spawn(args)?;
    wait_until(START_TIMEOUT, "tinc's interface", || host.exec_ok(["ip", "link", "show", DEVICE]).map(drop))
        .with_context(|| format!("tinc wrote: {}", process.stderr()))?;
    let lines = format!("addr add {}/24 dev {DEVICE}\nlink set {DEVICE} mtu {MTU} up\n", address(index));
    host.exec_input(["ip", "-batch", "-"], Some(&lines))?;
    Ok(process.into())
}
