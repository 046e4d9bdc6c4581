//! Hosts simulated in Linux network namespaces.
//!
//! A [`Lab`] has a name, N [`Host`]s `h1..hN` and one underlay switch. Each is a network namespace that `ip
//! netns exec` can enter: `<lab>-sw` for the switch's bridge, `<lab>-h1` for a host, `<lab>-h1-web` for a
//! [`Workload`] on it. Faults (partitions, loss) are injected in the switch's namespace, so that only the
//! daemon under test changes the hosts' namespaces.
//!
//! ```no_run
//! use netns_lab::{Lab, LabConfig};
//! use std::time::Duration;
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::new(LabConfig::hosts(3))?;
//! lab.start_all()?;
//! let a = lab["h1"].workload("a")?;
//! lab["h1"].ctl_ok(&["attach", "a", "--network", "demo", "--netns", a.path_str()])?;
//! lab.partition(&[&["h1", "h2"], &["h3"]])?;
//! a.ping_until("10.99.0.3", Duration::from_secs(5))?;
//! # Ok(())
//! # }
//! ```
//!
//! A lab is removed on drop. A lab whose process was killed is removed by the next lab that is created.
//! `NETNS_LAB_KEEP=1` keeps every lab, and `NETNS_LAB_KEEP_FAILED=1` keeps those whose test panicked.
//!
//! The crate does not depend on ovl's code: it uses the command line of `ovld` and the JSON output of
//! `ovlctl`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod addresses;
mod binaries;
mod bpf;
mod config;
mod conntrack;
mod daemon;
mod echo;
mod engine;
mod faults;
mod host;
mod lab;
mod nat;
mod netns;
mod ping;
mod preflight;
mod procs;
mod registry;
mod ruleset;
mod spawned;
mod state;
mod switch;
mod tcx;
mod tool;
mod topology;
mod wait;
mod wiring;
mod workload;

pub use addresses::Underlay;
pub use binaries::find_binary;
pub use config::LabConfig;
pub use echo::EchoServer;
pub use engine::Engine;
pub use faults::Faults;
pub use host::{Host, PortMtu};
pub use lab::Lab;
pub use nat::{Access, Behavior, Nat, Preset, presets};
pub use netns::Netns;
pub use nix::sys::signal::Signal;
pub use preflight::preflight;
pub use procs::cpu_time;
pub use registry::{Swept, lab_names, remove, sweep};
pub use spawned::Spawned;
pub use tool::Output;
pub use wait::{Outcome, uninterrupted, wait_until};
pub use workload::Workload;

/// Removes the prefix length from an address: `10.0.0.1/24` becomes `10.0.0.1`.
pub fn without_prefix_length(address: &str) -> &str {
    address.split('/').next().unwrap_or(address).trim()
}
