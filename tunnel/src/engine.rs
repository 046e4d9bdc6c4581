//! The engine's control side: what there is, and the threads that serve it.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::api::{
    EngineState, FrameSource, InterfaceConfig, InterfaceState, Mac, PeerConfig, PublicKey, TapState,
    public_key,
};
use crate::interface::{Interface, run_tap};
use crate::switch::{Switch, Table, Tap};
use crate::sys::{self, Kind, interrupt};

/// How often sessions are looked after.
const TICK: Duration = Duration::from_millis(250);

/// Interfaces and switched networks. All that it is asked can be repeated, and deleting what is gone
/// succeeds. Clones are handles of the same engine; with the last one its devices go.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    switch: Arc<Switch>,
    control: Mutex<Control>,
}

#[derive(Default)]
struct Control {
    interfaces: BTreeMap<String, Served<Interface>>,
    taps: BTreeMap<String, Served<Tap>>,
    /// The thread that looks after sessions; it ends with the engine.
    ticks: bool,
}

/// With its threads.
struct Served<T> {
    it: Arc<T>,
    config: Option<InterfaceConfig>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine(..)")
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let control = self.control.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The interfaces' threads hold networks, and not the other way round.
        for (_, served) in std::mem::take(&mut control.interfaces) {
            end_interface(served);
        }
        for (_, served) in std::mem::take(&mut control.taps) {
            self.switch.remove_tap(served.it.vni);
            end(served, |tap| &tap.stopped);
        }
    }
}

/// Stops its threads and waits until nobody has it any more: then its device and socket are free.
fn end<T>(served: Served<T>, stopped: impl Fn(&T) -> &AtomicBool) {
    stopped(&served.it).store(true, Ordering::Relaxed);
    served.threads.into_iter().for_each(interrupt::join);
    // Others hold it for a packet, or a round of the timers.
    while Arc::strong_count(&served.it) > 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn end_interface(served: Served<Interface>) {
    end(served, |interface| &interface.stopped);
}

fn start(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name).spawn(work)
}

impl Engine {
    /// One without anything.
    pub fn new() -> Self {
        Self(Arc::new(Shared { switch: Arc::default(), control: Mutex::default() }))
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.0.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a TUN device of this name (in the network namespace of the calling thread, administratively
    /// down) and a socket, and serves them. One that is there gets another key, address or port; with
    /// another key, its sessions end.
    pub fn set_interface(&self, name: &str, config: &InterfaceConfig) -> io::Result<()> {
        let mut control = self.control();
        let there = control.interfaces.get_mut(name);
        if let Some(served) = there
            && let Some(old) = served.config.clone()
            && !served.it.stopped.load(Ordering::Relaxed)
            && (old.address, old.vxlan_port) == (config.address, config.vxlan_port)
        {
            if old.listen != config.listen {
                let sockets = served.it.listen_at(config.listen)?;
                let threads = served.threads.iter().collect::<Vec<_>>();
                sockets.iter().for_each(|socket| release(socket, 1, &threads));
            }
            if old.key.0 != config.key.0 {
                served.it.set_key(config.key.0);
            }
            served.config = Some(config.clone());
            return Ok(());
        }
        // What is left of one whose device is gone.
        let old = control.interfaces.remove(name);
        let peers = old.as_ref().map(|served| served.it.peers().status()).unwrap_or_default();
        old.into_iter().for_each(end_interface);
        let interface = Arc::new(Interface::open(name, config, &self.0.switch)?);
        let mut served =
            Served { it: Arc::clone(&interface), config: Some(config.clone()), threads: Vec::new() };
        type Work = fn(&Interface, usize);
        let both = [("tx", Interface::run_device as Work), ("rx", Interface::run_socket)];
        for (number, (what, work)) in (0..interface.threads()).flat_map(|n| both.map(|it| (n, it))) {
            let it = Arc::clone(&interface);
            match start(format!("{name} {what}{number}"), move || work(&it, number)) {
                Ok(thread) => served.threads.push(thread),
                Err(error) => {
                    end_interface(served);
                    return Err(error);
                }
            }
        }
        for peer in peers {
            interface.set_peer(peer.key, &peer.config);
        }
        control.interfaces.insert(name.to_owned(), served);
        if !control.ticks {
            let shared = Arc::downgrade(&self.0);
            start("tunnel timers".to_owned(), move || tick(&shared))?;
            control.ticks = true;
        }
        Ok(())
    }

    /// Ends it; its device goes.
    pub fn delete_interface(&self, name: &str) {
        let served = self.control().interfaces.remove(name);
        served.into_iter().for_each(end_interface);
    }

    fn interface(&self, name: &str) -> io::Result<Arc<Interface>> {
        let control = self.control();
        let found = control.interfaces.get(name).map(|served| Arc::clone(&served.it));
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Sets the other end. Its sessions stay as long as its key does.
    ///
    /// Fails with [`io::ErrorKind::NotFound`] where there is no such interface.
    pub fn set_peer(&self, interface: &str, key: PublicKey, config: &PeerConfig) -> io::Result<()> {
        self.interface(interface).map(|interface| interface.set_peer(key, config))
    }

    /// Its sessions end at once.
    pub fn delete_peer(&self, interface: &str, key: PublicKey) {
        if let Ok(interface) = self.interface(interface) {
            interface.delete_peer(&key);
        }
    }

    /// By which interface a host's tunnel address is reached; without one, frames to it are dropped.
    ///
    /// Fails with [`io::ErrorKind::NotFound`] where there is no such interface.
    pub fn set_path(&self, to: Ipv6Addr, interface: &str) -> io::Result<()> {
        self.0.switch.put_path(to, &self.interface(interface)?);
        Ok(())
    }

    /// No way leads there any more.
    pub fn delete_path(&self, to: Ipv6Addr) {
        self.0.switch.remove_path(to);
    }

    /// Makes a TAP device of this name, administratively down, and serves it.
    ///
    /// Fails with [`io::ErrorKind::AlreadyExists`] where the network identifier belongs to another.
    pub fn add_tap(&self, name: &str, vni: u32) -> io::Result<()> {
        let control = self.control();
        if let Some(served) = control.taps.get(name)
            && served.it.vni == vni
            && !served.it.stopped.load(Ordering::Relaxed)
        {
            return Ok(());
        }
        if control.taps.iter().any(|(other, served)| other != name && served.it.vni == vni) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        drop(control);
        self.delete_tap(name);
        let mut control = self.control();
        let file = sys::open_device(name, Kind::Tap, 1)?.pop().ok_or(io::ErrorKind::NotFound)?;
        let tap = Arc::new(Tap::new(name, vni, file));
        let (it, switch) = (Arc::clone(&tap), Arc::clone(&self.0.switch));
        let thread = start(name.to_owned(), move || run_tap(&it, &switch))?;
        self.0.switch.put_tap(&tap);
        control.taps.insert(name.to_owned(), Served { it: tap, config: None, threads: vec![thread] });
        Ok(())
    }

    /// Ends it; its device goes.
    pub fn delete_tap(&self, name: &str) {
        let mut control = self.control();
        if let Some(served) = control.taps.remove(name) {
            self.0.switch.remove_tap(served.it.vni);
            served.it.stopped.store(true, Ordering::Relaxed);
            // Receiving threads may hold it, and its own thread does.
            let receivers = control.interfaces.values().flat_map(|served| &served.threads);
            release(&served.it, 2, &receivers.collect::<Vec<_>>());
            end(served, |tap| &tap.stopped);
        }
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Table)) -> io::Result<()> {
        let control = self.control();
        let served = control.taps.get(name).ok_or(io::ErrorKind::NotFound)?;
        served.it.change(change);
        Ok(())
    }

    /// Frames for a MAC address go to this host.
    pub fn set_remote(&self, tap: &str, mac: Mac, to: Ipv6Addr) -> io::Result<()> {
        self.change(tap, |table| _ = table.remotes.insert(mac, to))
    }

    /// No more.
    pub fn delete_remote(&self, tap: &str, mac: Mac) {
        let _ = self.change(tap, |table| _ = table.remotes.remove(&mac));
    }

    /// Broadcast and multicast go to this host too.
    pub fn add_flood(&self, tap: &str, to: Ipv6Addr) -> io::Result<()> {
        self.change(tap, |table| _ = table.floods.insert(to))
    }

    /// No more.
    pub fn delete_flood(&self, tap: &str, to: Ipv6Addr) {
        let _ = self.change(tap, |table| _ = table.floods.remove(&to));
    }

    /// Frames from this MAC address are taken, if they are what `source` says. Without one they are not.
    pub fn set_source(&self, tap: &str, mac: Mac, source: FrameSource) -> io::Result<()> {
        self.change(tap, |table| drop(table.sources.insert(mac, source)))
    }

    /// No more.
    pub fn delete_source(&self, tap: &str, mac: Mac) {
        let _ = self.change(tap, |table| drop(table.sources.remove(&mac)));
    }

    /// All of it, to be compared with what is wanted and to be shown. What lost its device is left out.
    pub fn state(&self) -> EngineState {
        let control = self.control();
        let interfaces = control.interfaces.iter().filter_map(|(name, served)| {
            let config = served.config.as_ref()?;
            (!served.it.stopped.load(Ordering::Relaxed)).then(|| InterfaceState {
                name: name.clone(),
                public_key: public_key(&config.key),
                listen: config.listen,
                peers: served.it.peers().status(),
            })
        });
        let taps = control.taps.iter().filter(|(_, served)| !served.it.stopped.load(Ordering::Relaxed));
        EngineState {
            interfaces: interfaces.collect(),
            taps: taps.map(|(_, served)| tap_state(&served.it)).collect(),
            drops: self.0.switch.counters.read(),
        }
    }
}

fn tap_state(tap: &Tap) -> TapState {
    let table = tap.table();
    TapState {
        name: tap.name.clone(),
        vni: tap.vni,
        remotes: table.remotes.iter().map(|(mac, to)| (*mac, *to)).collect(),
        floods: table.floods.iter().copied().collect(),
        sources: table.sources.iter().map(|(mac, source)| (*mac, source.clone())).collect(),
    }
}

/// Until only so many hold it as are left when these threads, which let go of it when they are interrupted,
/// do not.
fn release<T>(it: &Arc<T>, left: usize, threads: &[&JoinHandle<()>]) {
    while Arc::strong_count(it) > left && threads.iter().any(|thread| !thread.is_finished()) {
        threads.iter().copied().for_each(interrupt::wake);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn tick(shared: &Weak<Shared>) {
    loop {
        std::thread::sleep(TICK);
        let Some(shared) = shared.upgrade() else { return };
        let interfaces: Vec<Arc<Interface>> = {
            let control = shared.control.lock().unwrap_or_else(PoisonError::into_inner);
            control.interfaces.values().map(|served| Arc::clone(&served.it)).collect()
        };
        interfaces.iter().for_each(|interface| interface.tick());
    }
}
