//! Hosts simulated in Linux network namespaces.
//!
//! A [`Lab`] has a name, N [`Host`]s `h1..hN` and one underlay switch. Everything is
//! a network namespace that `ip netns exec` can enter: `<lab>-sw` holds the switch's
//! bridge, `<lab>-h1` a host, `<lab>-h1-web` a [`Workload`] on it. Faults (partitions,
//! loss) are injected in the switch's namespace, so that the hosts' namespaces belong
//! to the daemon under test alone.
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
//! A lab is removed when it is dropped. One whose process died without that is swept
//! by the next lab that is made. `NETNS_LAB_KEEP=1` keeps every lab, and
//! `NETNS_LAB_KEEP_FAILED=1` those whose test panicked.
//!
//! The crate knows nothing of ovl's insides: it speaks to `ovld` by its command line
//! and to `ovlctl` by its JSON output.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod binaries;
mod config;
mod daemon;
mod echo;
mod engine;
mod faults;
mod host;
mod lab;
mod netns;
mod ping;
mod preflight;
mod procs;
mod registry;
mod spawned;
mod state;
mod switch;
mod tool;
mod wait;
mod workload;

pub use binaries::find_binary;
pub use config::{LabConfig, Underlay};
pub use echo::EchoServer;
pub use engine::Engine;
pub use faults::Faults;
pub use host::{Host, PortMtu};
pub use lab::Lab;
pub use netns::Netns;
pub use nix::sys::signal::Signal;
pub use preflight::preflight;
pub use procs::cpu_time;
pub use registry::{Swept, lab_names, remove, sweep};
pub use spawned::Spawned;
pub use tool::Output;
pub use wait::{Outcome, wait_until};
pub use workload::Workload;

/// An address as tools print it, without the prefix length: `10.0.0.1/24` is `10.0.0.1`.
pub fn without_prefix_length(address: &str) -> &str {
    address.split('/').next().unwrap_or(address).trim()
}
