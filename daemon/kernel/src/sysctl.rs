//! Sysctls under /proc/sys/net. The kernel shows those of the network namespace of the thread that opens the
//! file.

use std::io;
use std::path::{Path, PathBuf};

use ovl_dataplane::device::Device;

use super::error::{KernelError, Result};

/// The sysctls that a dump contains.
pub(super) const WATCHED: [&str; 3] =
    ["net.ipv4.ip_forward", FORWARDING_V6, "net.netfilter.nf_conntrack_tcp_be_liberal"];

const FORWARDING_V6: &str = "net.ipv6.conf.all.forwarding";
const CONF_V6: &str = "/proc/sys/net/ipv6/conf";

/// Reads a sysctl. `None` if there is no such sysctl, for example of IPv6 on a kernel without IPv6.
pub(super) fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Writes a sysctl.
pub(super) fn write(name: &str, value: &str) -> Result<()> {
    if name == FORWARDING_V6 && value != "0" {
        keep_router_advertisements();
    }
    std::fs::write(path(name), value)
        .map_err(|error| KernelError::io(format!("cannot set {name} to {value}"), &error))
}

/// Turns IPv6 on for the interface of a workload.
pub(super) fn allow_v6(device: &str) -> io::Result<()> {
    std::fs::write(Path::new(CONF_V6).join(device).join("disable_ipv6"), "0")
}

/// Turns IPv6 off for a device of the host, or on. While it is on, the host ignores router advertisements and redirects
/// from the device: a workload could send them, and the host would take it for a router. Does nothing on a kernel
/// without IPv6, and on a device whose MTU is too small for it.
pub(super) fn set_host_v6(device: Device, on: bool) -> Result<()> {
    let dir = Path::new(CONF_V6).join(device.as_str());
    let set = |name: &str, value: &str| match std::fs::write(dir.join(name), value) {
        Err(error) if dir.exists() => {
            Err(KernelError::io(format!("cannot set net.ipv6.conf.{device}.{name} to {value}"), &error))
        }
        Ok(()) | Err(_) => Ok(()),
    };
    if on {
        set("accept_ra", "0")?;
        set("accept_redirects", "0")?;
    }
    set("disable_ipv6", if on { "0" } else { "1" })
}

/// Makes the host ignore router advertisements and redirects from a device on which IPv6 is on.
pub(super) fn distrust(device: Device) -> Result<()> {
    let file = Path::new(CONF_V6).join(device.as_str()).join("disable_ipv6");
    match std::fs::read_to_string(file) {
        Ok(value) if value.trim() == "0" => set_host_v6(device, true),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The file of a sysctl. As for sysctl(8), a dot in the name of a device is written as a slash.
fn path(name: &str) -> PathBuf {
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    Path::new("/proc/sys").join(swapped.collect::<String>())
}

/// Sets `accept_ra` to 2 on all devices that have 1 and are not devices of ovl. Otherwise a host that forwards IPv6
/// ignores router advertisements, and loses its default route.
fn keep_router_advertisements() {
    let Ok(devices) = std::fs::read_dir(CONF_V6) else { return };
    for device in devices.flatten() {
        let name = device.file_name();
        let is_ours = name.to_str().and_then(Device::new).is_some_and(|device| device.role().is_some());
        if name == "all" || name == "default" || is_ours {
            continue;
        }
        let setting = device.path().join("accept_ra");
        if std::fs::read_to_string(&setting).is_ok_and(|value| value.trim() == "1")
            && let Err(error) = std::fs::write(&setting, "2")
        {
            tracing::warn!("cannot set {}: {error}", setting.display());
        }
    }
}
