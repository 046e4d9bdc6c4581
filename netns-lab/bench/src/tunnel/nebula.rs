//! nebula on two hosts, which know each other's addresses and need no lighthouse.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use netns_lab::Lab;

use super::MTU;
use super::peers::End;

const PORT: u16 = 4242;
const CERT: &str = "nebula-cert";

pub(crate) fn address(host: usize) -> IpAddr {
    IpAddr::from([10, 91, 0, host as u8 + 1])
}

pub(crate) fn start(program: &Path, lab: &Lab) -> Result<Vec<End>> {
    let dir = lab.dir().join("nebula");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let cert = program.with_file_name(CERT);
    let make = |args: &[&str]| -> Result<()> {
        // It writes to the working directory by default.
        let output = std::process::Command::new(&cert).current_dir(&dir).args(args).output();
        let output = output.with_context(|| format!("cannot run {}", cert.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "`{CERT} {}` failed: {said}", args.join(" "));
        Ok(())
    };
    make(&["ca", "-name", "lab"])?;
    let start = |index: usize| -> Result<End> {
        let (host, other) = (&lab.hosts()[index], &lab.hosts()[1 - index]);
        let name = host.name();
        make(&["sign", "-name", name, "-ip", &format!("{}/24", address(index))])?;
        let config = config(&dir, name, (address(1 - index), other.address()?));
        let path = dir.join(format!("{name}.yml"));
        fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(host.spawn([program.as_os_str(), "-config".as_ref(), path.as_os_str()])?.into())
    };
    (0..2).map(start).collect()
}

fn config(dir: &Path, name: &str, (inner, outer): (IpAddr, IpAddr)) -> String {
    let dir = dir.display();
    format!(
        "pki: {{ca: {dir}/ca.crt, cert: {dir}/{name}.crt, key: {dir}/{name}.key}}\n\
         static_host_map: {{'{inner}': ['{outer}:{PORT}']}}\n\
         lighthouse: {{am_lighthouse: false, hosts: []}}\n\
         listen: {{host: 0.0.0.0, port: {PORT}}}\n\
         cipher: aes\n\
         tun: {{dev: nebula1, mtu: {MTU}}}\n\
         logging: {{level: warning, format: text}}\n\
         firewall:\n\
         \x20 outbound: [{{port: any, proto: any, host: any}}]\n\
         \x20 inbound: [{{port: any, proto: any, host: any}}]\n"
    )
}
