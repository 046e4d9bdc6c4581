//! The state of a lab, saved in its directory for the next call of `netns-lab` and the next sweep.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::addresses::{MOST_HOSTS, Underlay, underlay_v4, underlay_v6};
use crate::config::LabConfig;
use crate::faults::Faults;
use crate::nat::{Access, Nat};
use crate::procs::ProcId;

const STATE_FILE: &str = "state.json";

/// The saved state of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LabState {
    pub(crate) name: String,
    /// The process that the lab belongs to. `None` if the lab exists until it is removed explicitly.
    pub(crate) owner: Option<ProcId>,
    pub(crate) underlay: Underlay,
    #[serde(default)]
    pub(crate) all_addresses: bool,
    pub(crate) mtu: u32,
    pub(crate) ovld: Option<PathBuf>,
    pub(crate) ovlctl: Option<PathBuf>,
    pub(crate) config: String,
    pub(crate) tcx: bool,
    pub(crate) args: Vec<String>,
    pub(crate) ready_timeout: Duration,
    pub(crate) hosts: Vec<HostState>,
    /// The NAT boxes, in the order in which they depend on each other: carriers' first.
    #[serde(default)]
    pub(crate) boxes: Vec<BoxState>,
    pub(crate) faults: Faults,
}

/// The saved state of a NAT box.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BoxState {
    /// `n3` for the box of `h3`, `c1` and so on for those of carriers.
    pub(crate) name: String,
    /// The number in its MAC address and its own IPv6 address, unique among the lab's boxes.
    pub(crate) number: u8,
    pub(crate) nat: Nat,
    /// The box that its cable leads to. `None`: the switch.
    pub(crate) uplink: Option<String>,
    /// Its address towards its uplink, which hosts behind it seem to have if it translates.
    pub(crate) v4: Option<Ipv4Addr>,
}

/// The saved state of a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HostState {
    pub(crate) name: String,
    /// The host's number, counted from 1.
    pub(crate) number: u8,
    #[serde(default)]
    pub(crate) access: Access,
    /// The NAT box that its cable leads to. `None`: the switch.
    #[serde(default)]
    pub(crate) behind: Option<String>,
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
    /// The address to advertise. If `None`: the IPv4 address if there is one, else the IPv6 address.
    pub(crate) advertise: Option<IpAddr>,
    pub(crate) mtu: u32,
    pub(crate) port_mtu: u32,
    pub(crate) link_up: bool,
    /// False while the host is destroyed.
    pub(crate) present: bool,
    pub(crate) bootstrap: bool,
    /// The addresses to join. If `None`: the first host's, and none for the first host itself.
    pub(crate) join: Option<Vec<String>>,
    pub(crate) config: String,
    pub(crate) args: Vec<String>,
    /// Environment variables of the daemon.
    #[serde(default)]
    pub(crate) env: Vec<(String, String)>,
    pub(crate) daemon: Option<ProcId>,
    pub(crate) workloads: Vec<String>,
}

impl BoxState {
    /// Returns the address that it translates to. `None` if it does not translate.
    pub(crate) fn outer_v4(&self) -> Option<Ipv4Addr> {
        self.v4.filter(|_| self.nat.translates)
    }
}

impl LabState {
    pub(crate) fn new(config: &LabConfig, name: String) -> Result<Self> {
        let hosts = u8::try_from(config.hosts).ok().filter(|hosts| (1..=MOST_HOSTS).contains(hosts));
        let Some(hosts) = hosts else {
            bail!("invalid number of hosts {}: must be 1 to {MOST_HOSTS}", config.hosts);
        };
        if !(1280..=65535).contains(&config.mtu) {
            bail!("invalid MTU {}: must be 1280 (the minimum of IPv6) to 65535", config.mtu);
        }
        // A lab without daemons is valid, so missing binaries are reported at the first start.
        let ovld = crate::binaries::find("ovld", config.ovld.as_deref()).ok();
        let ovlctl = crate::binaries::find("ovlctl", config.ovlctl.as_deref()).ok();
        let mut lab = LabState {
            name,
            owner: if config.persistent { None } else { ProcId::own() },
            underlay: config.underlay,
            all_addresses: config.all_addresses,
            mtu: config.mtu,
            ovld: ovld.or_else(|| config.ovld.clone()),
            ovlctl: ovlctl.or_else(|| config.ovlctl.clone()),
            config: config.config.clone(),
            tcx: config.tcx,
            args: config.args.clone(),
            ready_timeout: config.ready_timeout,
            hosts: (1..=hosts).map(|number| HostState::new(config, number)).collect(),
            boxes: Vec::new(),
            faults: Faults::default(),
        };
        for (host, access) in &config.accesses {
            lab.connect(host, access)?;
        }
        // A cluster begins on a host that the others can join.
        let first = lab.first_public().map_or(0, |host| host.number - 1);
        for (host, index) in lab.hosts.iter_mut().zip(0..) {
            host.bootstrap = index == first;
        }
        Ok(lab)
    }

    /// Returns the first host that is on the switch.
    pub(crate) fn first_public(&self) -> Option<&HostState> {
        self.hosts.iter().find(|host| host.behind.is_none())
    }

    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE_FILE);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged or of another version", path.display()))
    }

    /// Saves the state. The file is replaced atomically, so that a reader never sees a partial one.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let temporary = dir.join(".state.json.new");
        let write = || -> Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            fs::rename(&temporary, &path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn is_saved_in(dir: &Path) -> bool {
        dir.join(STATE_FILE).exists()
    }

    /// Returns whether links have different MTUs.
    pub(crate) fn mtus_differ(&self) -> bool {
        self.hosts.iter().any(|host| host.mtu != self.mtu || host.port_mtu != self.mtu)
    }
}

impl HostState {
    fn new(config: &LabConfig, number: u8) -> Self {
        HostState {
            name: format!("h{number}"),
            number,
            access: Access::PUBLIC,
            behind: None,
            v4: config.underlay.has_v4().then(|| underlay_v4(number)),
            v6: config.underlay.has_v6().then(|| underlay_v6(number)),
            advertise: None,
            mtu: config.mtu,
            port_mtu: config.mtu,
            link_up: true,
            present: true,
            bootstrap: false,
            join: None,
            config: String::new(),
            args: Vec::new(),
            env: Vec::new(),
            daemon: None,
            workloads: Vec::new(),
        }
    }

    /// Returns the addresses that the daemon advertises, the one that other hosts join through first: all, or that one alone.
    pub(crate) fn advertised(&self, all: bool) -> Result<Vec<IpAddr>> {
        let main = self.address()?;
        let others = [self.v4.map(IpAddr::V4), self.v6.map(IpAddr::V6)].into_iter().flatten();
        Ok([main].into_iter().chain(others.filter(|other| all && *other != main)).collect())
    }

    /// Returns the address that the daemon advertises first and that other hosts join through.
    pub(crate) fn address(&self) -> Result<IpAddr> {
        self.advertise
            .or(self.v4.map(IpAddr::V4))
            .or(self.v6.map(IpAddr::V6))
            .with_context(|| format!("{} has no address", self.name))
    }
}

/// The state of a lab, shared by its handles and saved after each change.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    state: Mutex<LabState>,
    /// Held while the cluster key is generated.
    pub(crate) making_key: Mutex<()>,
}

impl Shared {
    pub(crate) fn new(dir: PathBuf, state: LabState) -> Self {
        Shared { name: state.name.clone(), dir, state: Mutex::new(state), making_key: Mutex::new(()) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, LabState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and saves it, one change at a time. If the change fails, the state stays unchanged.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut LabState) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        let mut changed = state.clone();
        let value = change(&mut changed)?;
        changed.save(&self.dir)?;
        *state = changed;
        Ok(value)
    }
}
