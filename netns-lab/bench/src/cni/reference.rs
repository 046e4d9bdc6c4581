//! What ovl is held against: the reference plugins `bridge` and `host-local`, as Debian packages them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use netns_lab::Host;
use serde_json::json;

use super::plugin::{CNI_VERSION, Plugin};

const DIR: &str = "/usr/lib/cni";
const BRIDGE: &str = "cni0";
const SUBNET: &str = "10.68.0.0/16";

/// Whether they are here, and what to do if not. Gives the package and its version.
pub(crate) fn check() -> Result<String> {
    for name in ["bridge", "host-local"] {
        let path = Path::new(DIR).join(name);
        ensure!(
            path.is_file(),
            "no {}, which this figure is held against: apt-get install containernetworking-plugins",
            path.display()
        );
    }
    // The plugins themselves do not know their version.
    let query = ["-W", "-f", "${Package} ${Version}", "containernetworking-plugins"];
    let output = Command::new("dpkg-query").args(query).output().context("cannot run dpkg-query")?;
    ensure!(output.status.success(), "containernetworking-plugins is not Debian's: no version to report");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A bridge with a gateway address and host-local addresses, and nothing beyond that: the least that
/// gives pods on a host a network; `masquerade` adds what leaves it.
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
                // Not the machine's own: hosts of a lab share its disk.
                "dataDir": host.dir().join("host-local"),
            },
        }),
    }
}

/// Takes away what the plugins leave on a host: the bridge, the chains of iptables, forwarding.
pub(crate) fn clear(host: &Host) -> Result<()> {
    if host.exec(["ip", "link", "show", BRIDGE])?.success() {
        host.exec_ok(["ip", "link", "del", BRIDGE])?;
    }
    host.exec_ok(["nft", "flush", "ruleset"])?;
    host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=0"]).map(drop)
}
