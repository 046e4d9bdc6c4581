//! The configuration of a lab.

use std::path::PathBuf;
use std::time::Duration;

use crate::addresses::Underlay;
use crate::nat::Access;

/// The environment variable with TOML for the `ovld.toml` of every host of every lab, such as `fast_path = "auto"`: whole
/// test programs then run with it.
const MORE: &str = "OVL_LAB_CONFIG";

/// The environment variable that hides tcx from the daemons of every lab if it is `off`: whole test programs then run as on
/// a kernel before 6.6.
const TCX: &str = "OVL_LAB_TCX";

/// The configuration of a lab. [`LabConfig::hosts`] returns the defaults.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// The number of hosts, 1 to 250.
    pub hosts: usize,
    /// The lab's name: a lower-case letter, then lower-case letters and digits, at most 12. Generated if
    /// `None`.
    pub name: Option<String>,
    /// The hosts' underlay addresses.
    pub underlay: Underlay,
    /// How hosts are connected to the underlay, if not to the switch: the host's name and its access, in the order in
    /// which they are set.
    pub accesses: Vec<(String, Access)>,
    /// Whether daemons advertise all addresses of their hosts, and not one alone.
    pub all_addresses: bool,
    /// MTU of every host's link and of the switch, in bytes.
    pub mtu: u32,
    /// Path of the daemon. If `None`: `$OVLD`, else next to the current executable or in PATH.
    pub ovld: Option<PathBuf>,
    /// Path of its command-line client. If `None`: `$OVLCTL`, else as for the daemon.
    pub ovlctl: Option<PathBuf>,
    /// TOML for every host's `ovld.toml`. A host's own TOML is appended.
    pub config: String,
    /// Whether daemons find that the kernel has tcx. If not, the system calls about it are refused to them.
    pub tcx: bool,
    /// Additional arguments of every daemon.
    pub args: Vec<String>,
    /// Timeout of [`crate::Lab::start_all`].
    pub ready_timeout: Duration,
    /// The lab outlives this process: it is not removed on drop or by a sweep.
    pub persistent: bool,
}

impl LabConfig {
    /// Returns the default configuration with this number of hosts.
    pub fn hosts(hosts: usize) -> Self {
        LabConfig {
            hosts,
            name: None,
            underlay: Underlay::default(),
            accesses: Vec::new(),
            all_addresses: false,
            mtu: 1500,
            ovld: None,
            ovlctl: None,
            config: std::env::var(MORE).map(|toml| toml + "\n").unwrap_or_default(),
            tcx: std::env::var(TCX).map_or(true, |value| value != "off"),
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

    /// Connects a host in another way than to the switch. Daemons join through the first host that is on the switch,
    /// which also begins the cluster.
    pub fn access(mut self, host: &str, access: Access) -> Self {
        self.accesses.push((host.to_owned(), access));
        self
    }

    /// Has daemons advertise all addresses of their hosts.
    pub fn all_addresses(mut self) -> Self {
        self.all_addresses = true;
        self
    }

    /// Has an underlay of both address families, on which h2 has IPv4 only and h3 IPv6 only. The others have both, and advertise both.
    pub fn families(self) -> Self {
        let one = [("h2", Underlay::V4), ("h3", Underlay::V6)];
        let lab = self.underlay(Underlay::Dual).all_addresses();
        one.into_iter().fold(lab, |lab, (host, family)| lab.access(host, Access::Switch(family)))
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

    /// Hides tcx from every daemon, as on a kernel before 6.6.
    pub fn without_tcx(mut self) -> Self {
        self.tcx = false;
        self
    }

    /// Adds arguments to every daemon's command line.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}
