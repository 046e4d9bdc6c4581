//! The reference: the CNI plugins `bridge` and `host-local` of Debian.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use netns_lab::Host;
use serde_json::json;

use super::plugin::{CNI_VERSION, Plugin};

const DIR: &str = "/usr/lib/cni";
const BRIDGE: &str = "cni0";
const SUBNET: &str = "10.68.0.0/16";

/// Checks that the plugins are installed. Returns the package and its version.
pub(crate) fn check() -> Result<String> {
    for name in ["bridge", "host-local"] {
        let path = Path::new(DIR).join(name);
        ensure!(
            path.is_file(),
            "no {}, the reference of this figure: apt-get install containernetworking-plugins",
            path.display()
        );
    }
    // The plugins do not report their own version.
    let query = ["-W", "-f", "${Package} ${Version}", "containernetworking-plugins"];
    let output = Command::new("dpkg-query").args(query).output().context("cannot run dpkg-query")?;
    ensure!(output.status.success(), "containernetworking-plugins is not Debian's: no version to report");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Returns a minimal configuration: a bridge with a gateway address and host-local addresses. `masquerade`
/// adds NAT for outgoing traffic.
pub(crate) fn plugin(host: &Host, masquerade: bool) -> Plugin {
    Plugin {
        host: (**host).clone(),
        program: Path::new(DIR).join("bridge"),
        dir: DIR.into(),
        config: json!({
            "cniVersion": CNI_VERSION,
            "name": "reference",
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "ipMasq": masquerade,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": SUBNET}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                // A separate directory for each host: the hosts of a lab share the disk.
                "dataDir": host.dir().join("host-local"),
            },
        }),
    }
}

/// Removes what the plugins leave on a host: the bridge, the iptables chains, the forwarding setting.
pub(crate) fn clear(host: &Host) -> Result<()> {
    if host.exec(["ip", "link", "show", BRIDGE])?.success() {
        host.exec_ok(["ip", "link", "del", BRIDGE])?;
    }
    host.exec_ok(["nft", "flush", "ruleset"])?;
    host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=0"]).map(drop)
}
