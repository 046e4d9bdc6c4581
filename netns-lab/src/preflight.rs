//! Checks whether a lab can run on this machine.

use std::ffi::OsStr;
use std::path::Path;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, unshare};

use crate::tool;

const TOOLS: [(&str, &str); 4] =
    [("ip", "iproute2"), ("bridge", "iproute2"), ("nft", "nftables"), ("ping", "iputils-ping")];

/// Commands that are tried in a scratch namespace: the command, its input, and the advice if it fails.
const FEATURES: [(&str, &str, &str); 4] = [
    (
        "ip link add pf0 type veth peer name pf1",
        "",
        "the kernel does not support veth devices: load the module (modprobe veth) or use a kernel with CONFIG_VETH",
    ),
    (
        "ip link add pf2 type bridge",
        "",
        "the kernel does not support bridges: load the module (modprobe bridge) or use a kernel with CONFIG_BRIDGE",
    ),
    (
        "ip link add pf3 type vxlan id 1 dstport 4789",
        "",
        "the kernel does not support VXLAN devices: load the module (modprobe vxlan) or use a kernel with CONFIG_VXLAN",
    ),
    (
        "nft -f -",
        "table bridge pf { chain pf { type filter hook forward priority 0; udp dport 1 numgen random mod 2 < 1 drop; }; }",
        "nftables does not work in the bridge family with numgen: load the modules (modprobe -a nf_tables nft_numgen \
         nft_meta_bridge) or use a kernel with CONFIG_NF_TABLES_BRIDGE and CONFIG_NFT_NUMGEN",
    ),
];

/// Checks that a lab can be built on this machine, by trying each feature. Each failure includes advice.
pub fn preflight() -> Result<(), Vec<String>> {
    let mut failures: Vec<String> = TOOLS
        .iter()
        .filter(|(name, _)| tool::find(OsStr::new(name)).is_none())
        .map(|(name, package)| format!("the program {name} is missing: apt-get install {package}"))
        .collect();
    if !Path::new("/proc/sys/net/ipv6").exists() {
        failures.push("the kernel's IPv6 is off: boot without ipv6.disable=1".to_owned());
    }
    // Without the tools no feature can be tried.
    if failures.is_empty() {
        failures.extend(try_features());
    }
    if failures.is_empty() {
        failures.extend(try_named_namespace());
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// Returns the result of the check, which runs once per process.
pub(crate) fn once() -> Result<(), Vec<String>> {
    static RESULT: OnceLock<Result<(), Vec<String>>> = OnceLock::new();
    RESULT.get_or_init(preflight).clone()
}

/// Tries the features in a thread with its own unnamed namespace, which ends with the thread.
fn try_features() -> Vec<String> {
    let inside = || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            return vec![format!(
                "cannot create a network namespace ({error}): run this as root (sudo), in a container with \
                 --privileged, on a kernel with CONFIG_NET_NS"
            )];
        }
        let tried = FEATURES.iter().map(|(command, input, advice)| {
            let said = tool::run(command.split(' '), Some(input)).err()?;
            Some(format!("{advice} ({said:#})"))
        });
        tried.flatten().collect()
    };
    thread::spawn(inside).join().unwrap_or_else(|_| vec!["the check itself panicked".to_owned()])
}

/// Tries to create a named namespace. This needs a mount, which a container may forbid.
fn try_named_namespace() -> Option<String> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let name = format!("netns-lab-preflight-{}-{}", process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let made = tool::run(["ip", "netns", "add", &name], None);
    let removed = made.and_then(|_| tool::run(["ip", "netns", "del", &name], None));
    removed.err().map(|error| {
        format!("cannot create a named network namespace: mounting needs CAP_SYS_ADMIN ({error:#})")
    })
}
