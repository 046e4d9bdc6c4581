//! The control side of the engine: its interfaces and switched networks, and the threads that serve them.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use crate::api::{
    EngineState, FrameSource, InterfaceConfig, InterfaceState, Mac, PeerConfig, PublicKey, TapState,
    public_key,
};
use crate::backend::{Backend, DeviceKind};
use crate::interface::{Interface, Paths, run_tap};
use crate::switch::{ForwardingTable, Tap};
use crate::sys::Linux;
use ovl_udp::threads::ThreadGroup;

/// Threads per direction of an interface, on a machine that has as many cores.
const MAX_THREADS: usize = 4;

/// WireGuard interfaces and switched networks inside this process.
///
/// All operations are idempotent, and deleting an object that does not exist succeeds. Clones are handles of
/// the same engine; dropping the last one ends all threads and deletes all devices.
///
/// The type parameter is for tests of the engine without a kernel.
pub struct Engine<B: Backend = Linux>(Arc<Shared<B>>);

struct Shared<B: Backend> {
    backend: B,
    switch: Arc<Paths<B>>,
    control: Mutex<Control<B>>,
}

struct Control<B: Backend> {
    interfaces: BTreeMap<String, RunningInterface<B>>,
    taps: BTreeMap<String, RunningTap<B>>,
}

/// An interface with its threads. Dropping it ends the threads, closes the sockets and deletes the device.
struct RunningInterface<B: Backend> {
    interface: Arc<Interface<B>>,
    config: InterfaceConfig,
    /// The threads that read the device, and the one of the timers.
    device_threads: ThreadGroup,
    /// The threads that read the sockets.
    socket_threads: ThreadGroup,
    /// The queues of the device, one for each pair of threads.
    devices: Vec<Arc<B::Device>>,
}

/// A switched network with its thread. Dropping it ends the thread and deletes the device.
struct RunningTap<B: Backend> {
    tap: Arc<Tap<B>>,
    threads: ThreadGroup,
    switch: Arc<Paths<B>>,
}

impl<B: Backend> RunningInterface<B> {
    fn start(name: &str, config: &InterfaceConfig, backend: &B, switch: &Arc<Paths<B>>) -> io::Result<Self> {
        let queues = available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        let sockets = open_sockets(backend, config, queues)?;
        let devices = backend.open_device(name, DeviceKind::Tun, queues)?;
        let device_threads = ThreadGroup::new()?;
        let stop = device_threads.stop_signal();
        let interface = Arc::new(Interface::new(name, config, sockets.clone(), switch, stop)?);
        let mut running = Self {
            interface,
            config: config.clone(),
            device_threads,
            socket_threads: ThreadGroup::new()?,
            devices: devices.into_iter().map(Arc::new).collect(),
        };
        running.spawn_socket_threads(name, sockets)?;
        for (number, device) in running.devices.iter().enumerate() {
            let (interface, device) = (Arc::clone(&running.interface), Arc::clone(device));
            let work = move |stop: &_| interface.run_device(&device, stop);
            running.device_threads.spawn(format!("{name} tx{number}"), work)?;
        }
        let interface = Arc::clone(&running.interface);
        running.device_threads.spawn(format!("{name} timers"), move |stop| interface.run_timers(stop))?;
        Ok(running)
    }

    fn spawn_socket_threads(&mut self, name: &str, sockets: Vec<Arc<B::Socket>>) -> io::Result<()> {
        for (number, (socket, device)) in sockets.into_iter().zip(&self.devices).enumerate() {
            let (interface, device) = (Arc::clone(&self.interface), Arc::clone(device));
            let work = move |stop: &_| interface.run_socket(&socket, &device, stop);
            self.socket_threads.spawn(format!("{name} rx{number}"), work)?;
        }
        Ok(())
    }

    /// Returns whether the device is there and its threads run.
    fn is_alive(&self) -> bool {
        !self.interface.stop.is_set()
    }

    /// Changes the key and the listen address. The interface keeps its device.
    fn change(&mut self, name: &str, config: &InterfaceConfig, backend: &B) -> io::Result<()> {
        if self.config.listen != config.listen {
            let sockets = open_sockets(backend, config, self.devices.len())?;
            let threads = ThreadGroup::new()?;
            self.interface.set_sockets(config.listen.ip(), sockets.clone());
            // Ends the old threads, and closes the old sockets with them.
            self.socket_threads = threads;
            if let Err(error) = self.spawn_socket_threads(name, sockets) {
                // Without all its threads it counts as gone, and the next call creates it anew.
                self.interface.stop.set();
                return Err(error);
            }
        }
        if self.config.key.0 != config.key.0 {
            self.interface.set_key(config.key.0);
        }
        self.config = config.clone();
        Ok(())
    }
}

fn open_sockets<B: Backend>(
    backend: &B,
    config: &InterfaceConfig,
    count: usize,
) -> io::Result<Vec<Arc<B::Socket>>> {
    Ok(backend.open_sockets(config.listen, count)?.into_iter().map(Arc::new).collect())
}

impl<B: Backend> Drop for RunningInterface<B> {
    fn drop(&mut self) {
        // First the signal of the device threads: they end while the socket threads are joined.
        self.interface.stop.set();
        self.socket_threads.end();
        self.device_threads.end();
        self.interface.close();
    }
}

impl<B: Backend> RunningTap<B> {
    fn start(name: &str, vni: u32, backend: &B, switch: &Arc<Paths<B>>) -> io::Result<Self> {
        let device = backend.open_device(name, DeviceKind::Tap, 1)?.pop().ok_or(io::ErrorKind::NotFound)?;
        let device = Arc::new(device);
        let threads = ThreadGroup::new()?;
        let stop = Arc::clone(threads.stop_signal());
        let tap = Arc::new(Tap::new(name, vni, Arc::clone(&device), stop));
        let mut running = Self { tap, threads, switch: Arc::clone(switch) };
        let (tap, switch) = (Arc::clone(&running.tap), Arc::clone(switch));
        running.threads.spawn(name.to_owned(), move |stop| run_tap(&tap, &device, &switch, stop))?;
        running.switch.put_tap(&running.tap);
        Ok(running)
    }

    fn is_alive(&self) -> bool {
        !self.tap.stop.is_set()
    }
}

impl<B: Backend> Drop for RunningTap<B> {
    fn drop(&mut self) {
        self.switch.remove_tap(self.tap.vni);
        self.threads.end();
        self.tap.close();
    }
}

impl<B: Backend> Drop for Shared<B> {
    fn drop(&mut self) {
        let control = self.control.get_mut().unwrap_or_else(PoisonError::into_inner);
        control.interfaces.clear();
        control.taps.clear();
    }
}

impl<B: Backend> Clone for Engine<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: Backend> std::fmt::Debug for Engine<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine(..)")
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// Creates an engine without interfaces and networks.
    pub fn new() -> Self {
        Self::with_backend(Linux)
    }
}

impl<B: Backend> Engine<B> {
    pub(crate) fn with_backend(backend: B) -> Self {
        let control = Control { interfaces: BTreeMap::new(), taps: BTreeMap::new() };
        Self(Arc::new(Shared { backend, switch: Arc::default(), control: Mutex::new(control) }))
    }

    fn control(&self) -> MutexGuard<'_, Control<B>> {
        self.0.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an interface: a TUN device (in the network namespace of the calling thread, administratively
    /// down) and a socket. An existing interface gets the new key, address or port; with another key, its
    /// sessions end.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AddrInUse`] if another program has the port, and what the kernel reports.
    pub fn set_interface(&self, name: &str, config: &InterfaceConfig) -> io::Result<()> {
        let mut control = self.control();
        if let Some(running) = control.interfaces.get_mut(name)
            && running.is_alive()
            && (running.config.address, running.config.vxlan_port) == (config.address, config.vxlan_port)
        {
            return running.change(name, config, &self.0.backend);
        }
        // An interface whose device is gone, or whose inner address changes, is created anew with its peers.
        let old = control.interfaces.remove(name);
        let peers = old.as_ref().map(|old| old.interface.peers().status()).unwrap_or_default();
        drop(old);
        let running = RunningInterface::start(name, config, &self.0.backend, &self.0.switch)?;
        for peer in peers {
            running.interface.set_peer(peer.key, &peer.config);
        }
        control.interfaces.insert(name.to_owned(), running);
        Ok(())
    }

    /// Deletes an interface and its device.
    pub fn delete_interface(&self, name: &str) {
        self.control().interfaces.remove(name);
    }

    pub(crate) fn interface(&self, name: &str) -> io::Result<Arc<Interface<B>>> {
        let control = self.control();
        let running = control.interfaces.get(name).ok_or_else(|| not_found("interface", name))?;
        Ok(Arc::clone(&running.interface))
    }

    /// Adds or changes a peer. An existing peer keeps its session.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such interface.
    pub fn set_peer(&self, interface: &str, key: PublicKey, config: &PeerConfig) -> io::Result<()> {
        self.interface(interface).map(|interface| interface.set_peer(key, config))
    }

    /// Deletes a peer. Its session ends at once.
    pub fn delete_peer(&self, interface: &str, key: PublicKey) {
        if let Ok(interface) = self.interface(interface) {
            interface.delete_peer(&key);
        }
    }

    /// Sets the interface by which the tunnel address of a host is reached. Frames to a host without a path
    /// are dropped.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such interface.
    pub fn set_path(&self, to: Ipv6Addr, interface: &str) -> io::Result<()> {
        self.0.switch.put_path(to, &self.interface(interface)?);
        Ok(())
    }

    /// Deletes the path to the tunnel address of a host.
    pub fn delete_path(&self, to: Ipv6Addr) {
        self.0.switch.remove_path(to);
    }

    /// Creates a switched network: a TAP device (in the network namespace of the calling thread,
    /// administratively down) whose frames travel with this VXLAN network identifier.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AlreadyExists`] if another network has the identifier, and what the kernel reports.
    pub fn add_tap(&self, name: &str, vni: u32) -> io::Result<()> {
        let mut control = self.control();
        if control.taps.get(name).is_some_and(|running| running.tap.vni == vni && running.is_alive()) {
            return Ok(());
        }
        if let Some((other, _)) =
            control.taps.iter().find(|(other, running)| *other != name && running.tap.vni == vni)
        {
            let error = format!("network {name}: VNI {vni} is in use by network {other}");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, error));
        }
        control.taps.remove(name);
        let running = RunningTap::start(name, vni, &self.0.backend, &self.0.switch)?;
        control.taps.insert(name.to_owned(), running);
        Ok(())
    }

    /// Deletes a switched network and its device.
    pub fn delete_tap(&self, name: &str) {
        self.control().taps.remove(name);
    }

    fn change_table(&self, tap: &str, change: impl FnOnce(&mut ForwardingTable)) -> io::Result<()> {
        let control = self.control();
        let running = control.taps.get(tap).ok_or_else(|| not_found("network", tap))?;
        running.tap.change(change);
        Ok(())
    }

    /// Sets the host to which frames for a MAC address are sent.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such network.
    pub fn set_remote(&self, tap: &str, mac: Mac, to: Ipv6Addr) -> io::Result<()> {
        self.change_table(tap, |table| _ = table.remotes.insert(mac, to))
    }

    /// Deletes the forwarding entry of a MAC address.
    pub fn delete_remote(&self, tap: &str, mac: Mac) {
        let _ = self.change_table(tap, |table| _ = table.remotes.remove(&mac));
    }

    /// Adds a host to which broadcast frames are sent, and multicast frames without [`Self::add_group`].
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such network.
    pub fn add_flood(&self, tap: &str, to: Ipv6Addr) -> io::Result<()> {
        self.change_table(tap, |table| _ = table.floods.insert(to))
    }

    /// Takes back [`Self::add_flood`].
    pub fn delete_flood(&self, tap: &str, to: Ipv6Addr) {
        let _ = self.change_table(tap, |table| _ = table.floods.remove(&to));
    }

    /// Adds a host to which frames for the MAC address of a multicast group are sent. From the first one on, the others
    /// get none.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such network.
    pub fn add_group(&self, tap: &str, group: Mac, to: Ipv6Addr) -> io::Result<()> {
        self.change_table(tap, |table| _ = table.groups.entry(group).or_default().insert(to))
    }

    /// Takes back [`Self::add_group`].
    pub fn delete_group(&self, tap: &str, group: Mac, to: Ipv6Addr) {
        let _ = self.change_table(tap, |table| {
            if let Some(hosts) = table.groups.get_mut(&group) {
                hosts.remove(&to);
                if hosts.is_empty() {
                    table.groups.remove(&group);
                }
            }
        });
    }

    /// Accepts frames from a MAC address, if they match `source`. Without an entry they are dropped.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is no such network.
    pub fn set_source(&self, tap: &str, mac: Mac, source: FrameSource) -> io::Result<()> {
        self.change_table(tap, |table| drop(table.sources.insert(mac, source)))
    }

    /// Drops frames from a MAC address from now on.
    pub fn delete_source(&self, tap: &str, mac: Mac) {
        let _ = self.change_table(tap, |table| drop(table.sources.remove(&mac)));
    }

    /// Returns the interfaces and networks whose devices exist, and the counters of dropped packets.
    pub fn state(&self) -> EngineState {
        let control = self.control();
        let interfaces = control.interfaces.iter().filter(|(_, running)| running.is_alive());
        let taps = control.taps.values().filter(|running| running.is_alive());
        EngineState {
            interfaces: interfaces.map(|(name, running)| interface_state(name, running)).collect(),
            taps: taps.map(|running| tap_state(&running.tap)).collect(),
            drops: self.0.switch.counters.read(),
        }
    }
}

fn not_found(kind: &str, name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no {kind} {name} in the tunnel engine"))
}

fn interface_state<B: Backend>(name: &str, running: &RunningInterface<B>) -> InterfaceState {
    InterfaceState {
        name: name.to_owned(),
        public_key: public_key(&running.config.key),
        listen: running.config.listen,
        peers: running.interface.peers().status(),
    }
}

fn tap_state<B: Backend>(tap: &Tap<B>) -> TapState {
    let table = tap.table();
    TapState {
        name: tap.name.clone(),
        vni: tap.vni,
        remotes: table.remotes.iter().map(|(mac, to)| (*mac, *to)).collect(),
        floods: table.floods.iter().copied().collect(),
        groups: table.groups.iter().flat_map(|(mac, all)| all.iter().map(|to| (*mac, *to))).collect(),
        sources: table.sources.iter().map(|(mac, source)| (*mac, source.clone())).collect(),
    }
}
