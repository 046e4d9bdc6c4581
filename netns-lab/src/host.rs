//! A host: its link, its addresses, its loss and return. Its daemon is in `daemon.rs`.

use std::fs;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};

use crate::daemon::Daemon;
use crate::netns::Netns;
use crate::state::{HostState, LabState, Shared};
use crate::switch::{self, NIC, host_namespace, switch_namespace, workload_namespace};
use crate::tool::ip_batch;
use crate::workload::Workload;

/// What becomes of the switch's end when a host's MTU changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortMtu {
    /// It takes the same MTU.
    Follow,
    /// It stays: the host alone has another idea of the link.
    Keep,
}

/// A simulated host. It can be used like its namespace: `host.exec(["ip", "route"])`.
/// Clones are handles to the same host.
#[derive(Clone, Debug)]
pub struct Host {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: usize,
    pub(crate) daemon: Arc<Mutex<Option<Daemon>>>,
    name: String,
    netns: Netns,
}

impl Deref for Host {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Host {
    pub(crate) fn new(shared: Arc<Shared>, index: usize) -> Self {
        let (name, daemon) = {
            let state = shared.state();
            let host = &state.hosts[index];
            (host.name.clone(), host.daemon.map(Daemon::of_another_process))
        };
        let netns = Netns::new(host_namespace(&shared.name, &name));
        Host { shared, index, daemon: Arc::new(Mutex::new(daemon)), name, netns }
    }

    /// `h1`, `h2`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address that its daemon advertises and others join.
    pub fn address(&self) -> Result<IpAddr> {
        self.read(HostState::address)
    }

    /// Its underlay addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.read(|host| [host.v4.map(IpAddr::V4), host.v6.map(IpAddr::V6)]).into_iter().flatten().collect()
    }

    /// The directory of its daemon's files.
    pub fn dir(&self) -> PathBuf {
        self.shared.dir.join(&self.name)
    }

    /// The daemon's `--state-dir`; it outlives the machine's loss.
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// The daemon's `--run-dir`; emptied by the machine's loss.
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// The MTUs of the host's and the switch's end of its link.
    pub fn mtus(&self) -> (u32, u32) {
        self.read(|host| (host.mtu, host.port_mtu))
    }

    /// Whether its link is up.
    pub fn is_link_up(&self) -> bool {
        self.read(|host| host.link_up)
    }

    /// Whether the machine is there, not lost.
    pub fn is_present(&self) -> bool {
        self.read(|host| host.present)
    }

    pub(crate) fn read<T>(&self, read: impl FnOnce(&HostState) -> T) -> T {
        read(&self.shared.state().hosts[self.index])
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut HostState)) -> Result<()> {
        self.shared.update(|lab| {
            change(&mut lab.hosts[self.index]);
            Ok(())
        })
    }

    /// Changes the MTU of the host's end. Where MTUs differ in a lab, no host leaves the
    /// cutting of TCP's data to its link: large packets really are as large as they claim.
    pub fn set_mtu(&self, mtu: u32, port: PortMtu) -> Result<()> {
        self.change_mtu(|host| {
            host.mtu = mtu;
            if port == PortMtu::Follow {
                host.port_mtu = mtu;
            }
        })
    }

    /// Changes the MTU of the switch's end alone: larger frames, both ways, vanish without
    /// a word, as on a path with a narrow link somewhere. (The kernel lets four bytes more
    /// pass, the room of a VLAN tag.)
    pub fn set_port_mtu(&self, mtu: u32) -> Result<()> {
        self.change_mtu(|host| host.port_mtu = mtu)
    }

    fn change_mtu(&self, change: impl FnOnce(&mut HostState)) -> Result<()> {
        self.shared.update(|lab| {
            change(&mut lab.hosts[self.index]);
            switch::apply_mtu(lab, &lab.hosts[self.index])
        })
    }

    /// Replaces the host's address of that family (/24 or /64, as before). A running daemon
    /// is told nothing; one that starts later advertises the new address.
    pub fn set_address(&self, address: IpAddr) -> Result<()> {
        self.shared.update(|lab| {
            let host = &mut lab.hosts[self.index];
            let old = match address {
                IpAddr::V4(new) => host.v4.replace(new).map(|old| format!("{old}/24")),
                IpAddr::V6(new) => host.v6.replace(new).map(|old| format!("{old}/64")),
            };
            host.advertise = host.advertise.filter(|advertised| advertised.is_ipv4() != address.is_ipv4());
            // The old one first: it would take a second one of its subnet with it.
            let mut lines: Vec<String> =
                old.into_iter().map(|old| format!("addr del {old} dev {NIC}")).collect();
            lines.push(switch::address_line(address));
            if host.present { ip_batch(Some(self.netns_name()), &lines) } else { Ok(()) }
        })
    }

    /// Which address the daemon advertises from its next start on.
    pub fn set_advertise(&self, address: IpAddr) -> Result<()> {
        self.update(|host| host.advertise = Some(address))
    }

    /// Pulls the cable: the host's end loses its carrier and keeps its addresses.
    pub fn link_down(&self) -> Result<()> {
        self.set_link(false)
    }

    /// Plugs it in again.
    pub fn link_up(&self) -> Result<()> {
        self.set_link(true)
    }

    fn set_link(&self, up: bool) -> Result<()> {
        self.shared.update(|lab| {
            let host = &mut lab.hosts[self.index];
            host.link_up = up;
            if !host.present {
                return Ok(());
            }
            let line = format!("link set {} {}", self.name, if up { "up" } else { "down" });
            ip_batch(Some(&switch_namespace(&lab.name)), &[line])?;
            switch::wait_connected(lab, &[&lab.hosts[self.index]])
        })
    }

    /// Loses the machine: the daemon and everything else in it ends at once, its workloads
    /// too; its namespaces, devices and `/run` are gone. Its disk (the state directory) stays.
    pub fn destroy(&self) -> Result<()> {
        ensure!(self.is_present(), "{} is lost already: `restore` brings it back", self.name);
        self.kill_if_running()?;
        self.shared.update(|lab| {
            // The port first: the devices of a deleted namespace linger for a moment.
            let port = format!("link del {}", self.name);
            ip_batch(Some(&switch_namespace(&lab.name)), &[port])?;
            switch::remove_namespaces(&standing_namespaces(lab, &lab.hosts[self.index]))?;
            let host = &mut lab.hosts[self.index];
            host.workloads.clear();
            host.present = false;
            host.daemon = None;
            Ok(())
        })?;
        let run_dir = self.run_dir();
        fs::remove_dir_all(&run_dir)
            .and_then(|()| fs::create_dir_all(&run_dir))
            .with_context(|| format!("cannot empty {}", run_dir.display()))
    }

    /// Brings a lost machine back, with the addresses it had. Its daemon is not started.
    pub fn restore(&self) -> Result<()> {
        ensure!(!self.is_present(), "{} is not lost: `destroy` loses it", self.name);
        self.shared.update(|lab| {
            switch::rebuild_host(lab, &lab.hosts[self.index])?;
            lab.hosts[self.index].present = true;
            Ok(())
        })
    }

    /// Makes a workload: a namespace with nothing but a loopback interface.
    pub fn workload(&self, name: &str) -> Result<Workload> {
        self.add_workloads(&[name.to_owned()])?;
        let workload = Workload::new(self.clone(), name);
        switch::build_workload(workload.netns_name())
            .with_context(|| format!("cannot make workload {name} on {}", self.name))?;
        Ok(workload)
    }

    /// A workload whose namespace the daemon makes, under the name [`Netns::netns_name`]: the lab only
    /// takes note of it, and removes it in the end.
    pub fn promised_workload(&self, name: &str) -> Result<Workload> {
        self.add_workloads(&[name.to_owned()])?;
        Ok(Workload::new(self.clone(), name))
    }

    /// Makes many workloads at once, named `stem1`, `stem2` and so on. Their loopback interfaces
    /// stay down: nothing is done in them.
    pub fn bare_workloads(&self, stem: &str, count: usize) -> Result<Vec<Workload>> {
        let names: Vec<String> = (1..=count).map(|number| format!("{stem}{number}")).collect();
        self.add_workloads(&names)?;
        let workloads: Vec<Workload> = names.iter().map(|name| Workload::new(self.clone(), name)).collect();
        let namespaces: Vec<String> =
            workloads.iter().map(|workload| workload.netns_name().to_owned()).collect();
        switch::add_namespaces(&namespaces)
            .with_context(|| format!("cannot make {count} workloads on {}", self.name))?;
        Ok(workloads)
    }

    /// Notes the names, before there is anything to be removed.
    fn add_workloads(&self, names: &[String]) -> Result<()> {
        for name in names {
            let proper = !name.is_empty()
                && name.len() <= 40
                && name.chars().all(|each| each.is_ascii_lowercase() || each.is_ascii_digit() || each == '-');
            ensure!(
                proper,
                "a workload's name has lower-case letters, digits and hyphens, at most 40: not {name:?}"
            );
        }
        self.shared.update(|lab| {
            let host = &mut lab.hosts[self.index];
            ensure!(host.present, "{} is lost: no workload can run there", self.name);
            for name in names {
                if host.workloads.iter().any(|each| each == name) {
                    bail!("there is a workload {name} on {} already", self.name);
                }
                host.workloads.push(name.clone());
            }
            Ok(())
        })
    }

    /// A workload that was made before.
    pub fn find_workload(&self, name: &str) -> Result<Workload> {
        let names = self.workloads();
        ensure!(
            names.iter().any(|each| each == name),
            "there is no workload {name} on {} ({})",
            self.name,
            if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) }
        );
        Ok(Workload::new(self.clone(), name))
    }

    /// The names of its workloads.
    pub fn workloads(&self) -> Vec<String> {
        self.read(|host| host.workloads.clone())
    }
}

/// The namespaces of a host and its workloads, as far as they are there: a workload's may
/// have been deleted by what runs there, as a container's is.
fn standing_namespaces(lab: &LabState, host: &HostState) -> Vec<String> {
    let workloads = host.workloads.iter().map(|workload| workload_namespace(&lab.name, &host.name, workload));
    let mut names: Vec<String> = workloads.filter(|name| crate::netns::path_of(name).exists()).collect();
    names.push(host_namespace(&lab.name, &host.name));
    names
}
