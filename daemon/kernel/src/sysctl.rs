//! Settings under /proc/sys/net. The kernel shows there what belongs to the network namespace of
//! the thread that opens the file.

use std::io;
use std::path::{Path, PathBuf};

use ovl_dataplane::device::Device;

use super::error::{KernelError, Result};

/// What a dump reads.
pub(super) const WATCHED: [&str; 2] = ["net.ipv4.ip_forward", FORWARDING_V6];

const FORWARDING_V6: &str = "net.ipv6.conf.all.forwarding";
const CONF_V6: &str = "/proc/sys/net/ipv6/conf";

/// The value; nothing if there is no such setting, as where IPv6 is off.
pub(super) fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Sets it.
pub(super) fn write(name: &str, value: &str) -> Result<()> {
    if name == FORWARDING_V6 && value != "0" {
        keep_router_advertisements();
    }
    std::fs::write(path(name), value)
        .map_err(|error| KernelError::io(format!("cannot set {name} to {value}"), &error))
}

/// Lets packets from 127.0.0.1 leave by a device, or not. A device that is gone lets none.
pub(super) fn route_localnet(device: Device, on: bool) -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv4/conf").join(device.as_str()).join("route_localnet");
    match std::fs::write(path, if on { "1" } else { "0" }) {
        Err(error) if on || error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::io(format!("cannot set route_localnet of {device}"), &error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Lets a device have IPv6 addresses.
pub(super) fn allow_v6(device: &str) -> io::Result<()> {
    std::fs::write(Path::new(CONF_V6).join(device).join("disable_ipv6"), "0")
}

/// As sysctl(8) has it: a dot within a device's name is written as a slash.
fn path(name: &str) -> PathBuf {
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    Path::new("/proc/sys").join(swapped.collect::<String>())
}

/// A host that forwards ignores router advertisements, and with them loses its default route,
/// unless it is told that it shall take them all the same.
fn keep_router_advertisements() {
    let Ok(devices) = std::fs::read_dir(CONF_V6) else { return };
    for device in devices.flatten() {
        let name = device.file_name();
        if name == "all" || name == "default" {
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
