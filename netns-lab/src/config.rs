//! What a lab is asked to be.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which addresses the hosts have on the underlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Underlay {
    /// 192.168.77.i/24.
    #[default]
    V4,
    /// fd77::i/64.
    V6,
    /// Both; a host advertises the IPv4 address unless told otherwise.
    Dual,
}

impl Underlay {
    /// Whether hosts have an IPv4 address.
    pub fn has_v4(self) -> bool {
        self != Underlay::V6
    }

    /// Whether hosts have an IPv6 address.
    pub fn has_v6(self) -> bool {
        self != Underlay::V4
    }
}

/// How to make a lab. All fields may be set; [`LabConfig::hosts`] gives the defaults.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// The number of hosts, 1 to 250.
    pub hosts: usize,
    /// A letter, then letters and digits, at most 12 (lower case). Made up if `None`.
    pub name: Option<String>,
    /// The hosts' underlay addresses.
    pub underlay: Underlay,
    /// The MTU of every host's link and of the switch.
    pub mtu: u32,
    /// The daemon. `None`: `$OVLD`, else found beside the current executable or in PATH.
    pub ovld: Option<PathBuf>,
    /// Its command line client. `None`: `$OVLCTL`, else found likewise.
    pub ovlctl: Option<PathBuf>,
    /// TOML for every host's `ovld.toml`; what a host adds comes after it.
    pub config: String,
    /// Further arguments for every daemon.
    pub args: Vec<String>,
    /// How long [`crate::Lab::start_all`] waits.
    pub ready_timeout: Duration,
    /// The lab outlives this process: nothing is removed on drop, and no sweep takes it.
    pub persistent: bool,
}

impl LabConfig {
    /// A lab of that many hosts, and otherwise the defaults.
    pub fn hosts(hosts: usize) -> Self {
        LabConfig {
            hosts,
            name: None,
            underlay: Underlay::default(),
            mtu: 1500,
            ovld: None,
            ovlctl: None,
            config: String::new(),
            args: Vec::new(),
            ready_timeout: Duration::from_secs(20),
            persistent: false,
        }
    }

    /// Sets the name.
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Sets the underlay.
    pub fn underlay(mut self, underlay: Underlay) -> Self {
        self.underlay = underlay;
        self
    }

    /// Sets the MTU.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Adds TOML to every host's `ovld.toml`.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        if !toml.ends_with('\n') {
            self.config.push('\n');
        }
        self
    }

    /// Adds arguments to every daemon's command line.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}
