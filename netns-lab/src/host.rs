//! A host: its link, its addresses, destruction and restoration. Its daemon is in `daemon.rs`.

use std::fs;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};

use crate::bpf;
use crate::daemon::Daemon;
use crate::nat::Access;
use crate::netns::Netns;
use crate::state::{HostState, LabState, Shared};
use crate::switch::{self, box_namespace, host_namespace, host_socket, workload_namespace};
use crate::tool::ip_batch;
use crate::wiring;
use crate::workload::Workload;

/// The MTU of the switch port when a host's MTU changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortMtu {
    /// The port gets the same MTU.
    Follow,
    /// The port keeps its MTU, so that the two sides of the link differ.
    Keep,
}

/// A simulated host. It dereferences to its namespace: `host.exec(["ip", "route"])`. Clones are handles to
/// the same host.
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

    /// Returns the host's name: `h1`, `h2`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the address that its daemon advertises and that other hosts join through.
    pub fn address(&self) -> Result<IpAddr> {
        self.read(HostState::address)
    }

    /// Returns the addresses of its link: of the underlay, or of the LAN behind a NAT box.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.read(|host| [host.v4.map(IpAddr::V4), host.v6.map(IpAddr::V6)]).into_iter().flatten().collect()
    }

    /// Returns the directory of its daemon's files.
    pub fn dir(&self) -> PathBuf {
        self.shared.dir.join(&self.name)
    }

    /// Returns the daemon's `--state-dir`, which survives [`destroy`](Self::destroy).
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Returns the daemon's `--run-dir`, which [`destroy`](Self::destroy) empties.
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// Returns the folder in which the daemon has pinned the programs of its fast path. `None` if it has never used it.
    pub fn fast_path_pins(&self) -> Option<PathBuf> {
        bpf::pins_of(&self.run_dir())
    }

    /// Returns the MTUs of the host's and of the switch's side of its link.
    pub fn mtus(&self) -> (u32, u32) {
        self.read(|host| (host.mtu, host.port_mtu))
    }

    /// Returns whether its link is up.
    pub fn is_link_up(&self) -> bool {
        self.read(|host| host.link_up)
    }

    /// Returns whether the host exists, that is, is not destroyed.
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

    /// Changes the MTU of the host's side. If MTUs differ in a lab, segmentation offload is off on all hosts,
    /// so that no packet is larger than its link's MTU.
    pub fn set_mtu(&self, mtu: u32, port: PortMtu) -> Result<()> {
        self.change_mtu(|host| {
            host.mtu = mtu;
            if port == PortMtu::Follow {
                host.port_mtu = mtu;
            }
        })
    }

    /// Changes only the MTU of the switch port: larger frames are dropped silently in both directions, as on
    /// a path with a smaller MTU. (The kernel accepts four bytes more, for a VLAN tag.)
    pub fn set_port_mtu(&self, mtu: u32) -> Result<()> {
        self.change_mtu(|host| host.port_mtu = mtu)
    }

    fn change_mtu(&self, change: impl FnOnce(&mut HostState)) -> Result<()> {
        self.shared.update(|lab| {
            change(&mut lab.hosts[self.index]);
            switch::apply_mtu(lab, &lab.hosts[self.index])
        })
    }

    /// Replaces the host's address of that family (/24 or /64, as before). A running daemon is not notified;
    /// a daemon that starts later advertises the new address.
    ///
    /// # Errors
    ///
    /// If the host is behind a NAT box, whose LAN has an address for each host.
    pub fn set_address(&self, address: IpAddr) -> Result<()> {
        self.change_topology(|lab, index| {
            let host = &mut lab.hosts[index];
            ensure!(host.behind.is_none(), "{} is behind a NAT box: use `renumber`", host.name);
            match address {
                IpAddr::V4(new) => host.v4 = Some(new),
                IpAddr::V6(new) => host.v6 = Some(new),
            }
            host.advertise = host.advertise.filter(|advertised| advertised.is_ipv4() != address.is_ipv4());
            Ok(())
        })
    }

    /// Returns how it is connected to the underlay.
    pub fn access(&self) -> Access {
        self.read(|host| host.access.clone())
    }

    /// Connects it to the underlay in another way, as if its cable was plugged in elsewhere: its addresses change. A
    /// running daemon is not notified.
    ///
    /// # Errors
    ///
    /// If another host shares its NAT box, which would go.
    pub fn set_access(&self, access: &Access) -> Result<()> {
        self.change_topology(|lab, _| lab.connect(&self.name, access))
    }

    /// Returns the addresses at which the other hosts see it: of the outermost NAT box that translates, otherwise its own.
    pub fn outer_addresses(&self) -> Vec<IpAddr> {
        let lab = self.shared.state();
        lab.outer_addresses(&lab.hosts[self.index])
    }

    /// Gives it other outer addresses, as a provider or a DHCP server does, and returns them. Mappings of the NAT box that had
    /// the old ones are forgotten, and other hosts behind that box change as well.
    pub fn renumber(&self) -> Result<Vec<IpAddr>> {
        self.change_topology(|lab, index| lab.renumber(index))?;
        Ok(self.outer_addresses())
    }

    /// Makes its NAT boxes forget all mappings and tracked connections, as if they were switched off and on.
    pub fn forget_mappings(&self) -> Result<()> {
        let lab = self.shared.state();
        let boxes = lab.boxes_of(&lab.hosts[self.index]);
        ensure!(!boxes.is_empty(), "{} is not behind a NAT box", self.name);
        boxes.into_iter().try_for_each(|each| wiring::forget(&lab, each))
    }

    /// Returns the namespaces of its NAT boxes, the inner one first, for inspection.
    pub fn nat_boxes(&self) -> Vec<Netns> {
        let lab = self.shared.state();
        let boxes = lab.boxes_of(&lab.hosts[self.index]);
        boxes.into_iter().map(|each| Netns::new(box_namespace(&lab.name, &each.name))).collect()
    }

    /// Changes addresses and NAT boxes in the state, then in the kernel.
    fn change_topology(&self, decide: impl FnOnce(&mut LabState, usize) -> Result<()>) -> Result<()> {
        self.shared.update(|lab| {
            let old = lab.clone();
            decide(lab, self.index)?;
            wiring::change(&old, lab)?;
            lab.inject_faults()
        })
    }

    /// Sets the address that the daemon advertises, effective at the next start.
    pub fn set_advertise(&self, address: IpAddr) -> Result<()> {
        self.update(|host| host.advertise = Some(address))
    }

    /// Unplugs the cable: the host's side loses its carrier and keeps its addresses.
    pub fn link_down(&self) -> Result<()> {
        self.set_link(false)
    }

    /// Plugs the cable in again.
    pub fn link_up(&self) -> Result<()> {
        self.set_link(true)
    }

    fn set_link(&self, up: bool) -> Result<()> {
        self.shared.update(|lab| {
            lab.hosts[self.index].link_up = up;
            let host = &lab.hosts[self.index];
            if !host.present {
                return Ok(());
            }
            let line = format!("link set {} {}", self.name, if up { "up" } else { "down" });
            ip_batch(Some(&host_socket(lab, host).namespace), &[line])?;
            switch::wait_connected(lab, &[host])
        })
    }

    /// Destroys the host: its daemon, workloads and all other processes are killed, and its namespaces,
    /// devices and run directory are deleted. Its disk (the state directory) stays.
    pub fn destroy(&self) -> Result<()> {
        ensure!(self.is_present(), "{} is destroyed already: `restore` brings it back", self.name);
        self.kill_if_running()?;
        self.shared.update(|lab| {
            // Delete the port first: the devices of a deleted namespace linger for a moment.
            let port = format!("link del {}", self.name);
            ip_batch(Some(&host_socket(lab, &lab.hosts[self.index]).namespace), &[port])?;
            switch::remove_namespaces(&standing_namespaces(lab, &lab.hosts[self.index]))?;
            let host = &mut lab.hosts[self.index];
            host.workloads.clear();
            host.present = false;
            host.daemon = None;
            Ok(())
        })?;
        let run_dir = self.run_dir();
        bpf::remove_pins(&run_dir);
        fs::remove_dir_all(&run_dir)
            .and_then(|()| fs::create_dir_all(&run_dir))
            .with_context(|| format!("cannot empty {}", run_dir.display()))
    }

    /// Restores a destroyed host with its previous addresses. Its daemon is not started.
    pub fn restore(&self) -> Result<()> {
        ensure!(!self.is_present(), "{} is not destroyed: `destroy` it first", self.name);
        self.shared.update(|lab| {
            switch::rebuild_host(lab, &lab.hosts[self.index])?;
            lab.hosts[self.index].present = true;
            Ok(())
        })
    }

    /// Creates a workload: a namespace with only a loopback interface.
    pub fn workload(&self, name: &str) -> Result<Workload> {
        self.add_workloads(&[name.to_owned()])?;
        let workload = Workload::new(self.clone(), name);
        switch::build_workload(workload.netns_name())
            .with_context(|| format!("cannot create workload {name} on {}", self.name))?;
        Ok(workload)
    }

    /// Registers a workload whose namespace the daemon will create with the name [`Netns::netns_name`]. The
    /// lab only records it, and removes it at the end.
    pub fn promised_workload(&self, name: &str) -> Result<Workload> {
        self.add_workloads(&[name.to_owned()])?;
        Ok(Workload::new(self.clone(), name))
    }

    /// Creates many workloads at once, named `stem1`, `stem2` and so on. Their loopback interfaces stay down.
    pub fn bare_workloads(&self, stem: &str, count: usize) -> Result<Vec<Workload>> {
        let names: Vec<String> = (1..=count).map(|number| format!("{stem}{number}")).collect();
        self.add_workloads(&names)?;
        let workloads: Vec<Workload> = names.iter().map(|name| Workload::new(self.clone(), name)).collect();
        let namespaces: Vec<String> =
            workloads.iter().map(|workload| workload.netns_name().to_owned()).collect();
        switch::add_namespaces(&namespaces)
            .with_context(|| format!("cannot create {count} workloads on {}", self.name))?;
        Ok(workloads)
    }

    /// Records the names before the namespaces are created, so that they are removed in any case.
    fn add_workloads(&self, names: &[String]) -> Result<()> {
        for name in names {
            let proper = !name.is_empty()
                && name.len() <= 40
                && name.chars().all(|each| each.is_ascii_lowercase() || each.is_ascii_digit() || each == '-');
            ensure!(
                proper,
                "invalid workload name {name:?}: at most 40 lower-case letters, digits and hyphens"
            );
        }
        self.shared.update(|lab| {
            let host = &mut lab.hosts[self.index];
            ensure!(host.present, "{} is destroyed: no workload can run there", self.name);
            for name in names {
                if host.workloads.iter().any(|each| each == name) {
                    bail!("workload {name} exists already on {}", self.name);
                }
                host.workloads.push(name.clone());
            }
            Ok(())
        })
    }

    /// Returns an existing workload.
    pub fn find_workload(&self, name: &str) -> Result<Workload> {
        let names = self.workloads();
        ensure!(
            names.iter().any(|each| each == name),
            "no workload {name} on {} ({})",
            self.name,
            if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) }
        );
        Ok(Workload::new(self.clone(), name))
    }

    /// Returns the names of its workloads.
    pub fn workloads(&self) -> Vec<String> {
        self.read(|host| host.workloads.clone())
    }
}

/// Returns the existing namespaces of a host and its workloads. A program in a workload may have deleted its
/// namespace, as container runtimes do.
fn standing_namespaces(lab: &LabState, host: &HostState) -> Vec<String> {
    let workloads = host.workloads.iter().map(|workload| workload_namespace(&lab.name, &host.name, workload));
    let mut names: Vec<String> = workloads.filter(|name| crate::netns::path_of(name).exists()).collect();
    names.push(host_namespace(&lab.name, &host.name));
    names
}
