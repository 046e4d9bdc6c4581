//! The programs of the fast path in the kernel: loads them, attaches them to devices, and fills their maps.
//!
//! The programs are C (`daemon/bpf`), compiled ahead; docs/fast-path.md says what they do. Everything is pinned in a
//! folder of the BPF file system, so packets take the fast path while no daemon runs. A later run adopts the maps and
//! replaces the programs, one link at a time. Maps of another layout are not adopted: they are made anew, empty, and what
//! is not in them takes the stack.
//!
//! The crate knows nothing of networks and decides nothing. [`FastPath`] owns the maps. Begin to read at
//! [`FastPath::open`].

#![warn(missing_docs)]

mod error;
mod hooks;
mod layout;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path as FilePath, PathBuf};

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap};
use aya::{Ebpf, EbpfLoader};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use self::hooks::Hooks;
use self::layout::{AddressKey, CounterValue, HostValue, LAYOUT, PathValue, PodValue};

pub use self::error::{Error, Result};
pub use self::hooks::{DeviceKind, Filters, Program, has_tcx};
pub use self::layout::{Host, Path, Pod, VxlanPath};

/// Where the BPF file system is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/bpf";

/// The compiled programs. `tests/bpf` compares them with a fresh build.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/fastpath.bpf.o");

/// The maps, by their names in the object.
const MAPS: [&str; 6] = ["host", "pods", "paths", "flows", "counters", "delivered"];

/// Packets and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets. A GSO packet is one.
    pub packets: u64,
    /// Their length with the Ethernet header, in bytes.
    pub bytes: u64,
}

impl Counter {
    fn add(&mut self, [packets, bytes]: CounterValue) {
        self.packets = self.packets.wrapping_add(packets);
        self.bytes = self.bytes.wrapping_add(bytes);
    }
}

/// What the programs count, in the order of `enum count` in `daemon/bpf/maps.h`.
pub const COUNTERS: [&str; 12] = [
    "local",
    "direct_out",
    "vxlan_out",
    "direct_in",
    "vxlan_in",
    "new_flow",
    "translated",
    "source",
    "too_big",
    "hop_limit",
    "next_hop",
    "policy",
];

/// How many of [`COUNTERS`] are packets that took the fast path. The others were left to the stack.
pub const FAST_COUNTERS: usize = 5;

/// The loaded programs and their maps.
pub struct FastPath {
    folder: PathBuf,
    host: Array<MapData, HostValue>,
    pods: HashMap<MapData, AddressKey, PodValue>,
    paths: LpmTrie<MapData, AddressKey, PathValue>,
    counters: PerCpuArray<MapData, CounterValue>,
    delivered: PerCpuHashMap<MapData, u32, CounterValue>,
    hooks: Hooks,
}

impl fmt::Debug for FastPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FastPath").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// Returns the folder for the programs of one network namespace, by its cookie.
pub fn folder_of(netns_cookie: u64) -> PathBuf {
    FilePath::new(MOUNT_POINT).join("ovl").join(format!("{netns_cookie:x}"))
}

/// Whether an earlier run has left something in a folder.
pub fn is_there(folder: &FilePath) -> bool {
    folder.join("links").exists()
}

/// Deletes what an earlier run has left in a folder: programs with links are detached, and the maps end with the last
/// program.
pub fn remove(folder: &FilePath) {
    for inner in fs::read_dir(folder).into_iter().flatten().flatten() {
        remove_all(&inner.path());
    }
    let _ = fs::remove_dir(folder);
}

/// Deletes a folder with files in it.
fn remove_all(folder: &FilePath) {
    for file in fs::read_dir(folder).into_iter().flatten().flatten() {
        let _ = fs::remove_file(file.path());
    }
    let _ = fs::remove_dir(folder);
}

fn map_error(error: MapError) -> Error {
    Error::new("cannot use a map of the fast path", error)
}

fn take<T>(object: &mut Ebpf, name: &'static str) -> Result<T>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = object
        .take_map(name)
        .ok_or_else(|| Error::of("cannot load the programs", format!("the map {name} is missing")))?;
    T::try_from(map).map_err(map_error)
}

impl FastPath {
    /// Loads the programs, with the maps and attachments that an earlier run has left in `folder`. `filters` attach them;
    /// if there are none, links of tcx do.
    ///
    /// # Errors
    ///
    /// There is no BPF file system, the process may not load programs, or the kernel is too old for them.
    pub fn open(folder: PathBuf, filters: Option<Box<dyn Filters>>) -> Result<Self> {
        let mounted = statfs(MOUNT_POINT).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
        if !mounted {
            return Err(Error::of(
                "no BPF file system",
                format!("mount it: `mount -t bpf bpf {MOUNT_POINT}`"),
            ));
        }
        let maps = folder.join(format!("maps-{LAYOUT}"));
        let links = folder.join("links");
        for each in [&maps, &links] {
            fs::create_dir_all(each)
                .map_err(|error| Error::new("cannot create a folder for the programs", error))?;
        }
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for name in MAPS {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut object =
            loader.load(OBJECT).map_err(|error| Error::new("cannot load the programs", error))?;
        let (host, pods, paths) =
            (take(&mut object, "host")?, take(&mut object, "pods")?, take(&mut object, "paths")?);
        let (counters, delivered) = (take(&mut object, "counters")?, take(&mut object, "delivered")?);
        let hooks = Hooks::start(object, links, filters)?;
        // No link leads to maps of another layout now.
        for other in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = other.file_name();
            if name.to_string_lossy().starts_with("maps-") && other.path() != maps {
                remove_all(&other.path());
            }
        }
        Ok(Self { folder, host, pods, paths, counters, delivered, hooks })
    }

    /// Ends the thread that attaches the programs, and deletes everything but filters.
    pub fn close(self) {
        let Self { folder, hooks, .. } = self;
        // Its thread may be about to attach something.
        drop(hooks);
        remove(&folder);
    }

    /// Returns what the programs know of this host. `None` if nothing was set yet.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn host(&self) -> Result<Option<Host>> {
        let (host, _) = Host::decode(self.host.get(&0, 0).map_err(map_error)?);
        Ok(Some(host).filter(|host| host.underlay != 0))
    }

    /// Tells the programs of this host. If they were off, nothing that they remember of flows holds any more.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn set_host(&mut self, host: Host) -> Result<()> {
        let (before, generations) = Host::decode(self.host.get(&0, 0).map_err(map_error)?);
        let generations = if host.on && !before.on { generations.next() } else { generations };
        self.host.set(0, host.encode(generations), 0).map_err(map_error)
    }

    /// Has the stack judge the flows of selected endpoints again: network policies have changed, and the new ones are in
    /// force.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn judge_again(&mut self) -> Result<()> {
        let (host, generations) = Host::decode(self.host.get(&0, 0).map_err(map_error)?);
        self.host.set(0, host.encode(generations.judged_again()), 0).map_err(map_error)
    }

    /// Returns the endpoints by their addresses.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn pods(&self) -> Result<BTreeMap<IpAddr, Pod>> {
        self.pods
            .iter()
            .map(|entry| entry.map(|(key, value)| (layout::address_of(key), Pod::decode(value))))
            .collect::<std::result::Result<_, _>>()
            .map_err(map_error)
    }

    /// Adds or replaces an endpoint.
    ///
    /// # Errors
    ///
    /// The kernel refuses; the map may be full.
    pub fn set_pod(&mut self, address: IpAddr, pod: Pod) -> Result<()> {
        if self.delivered.get(&pod.ifindex, 0).is_err() {
            let cpus = aya::util::nr_cpus()
                .map_err(|(_, error)| Error::new("cannot count the processors", error))?;
            let none = aya::maps::PerCpuValues::try_from(vec![[0; 2]; cpus])
                .map_err(|error| Error::new("cannot count the processors", error))?;
            self.delivered.insert(pod.ifindex, none, 0).map_err(map_error)?;
        }
        self.pods.insert(layout::address_key(address), pod.encode(), 0).map_err(map_error)
    }

    /// Deletes an endpoint. It is no error if there is none.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn delete_pod(&mut self, address: IpAddr) -> Result<()> {
        absent_is_fine(self.pods.remove(&layout::address_key(address)))
    }

    /// Returns the paths by their prefixes.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn paths(&self) -> Result<BTreeMap<(IpAddr, u8), Path>> {
        self.paths
            .iter()
            .map(|entry| {
                entry.map(|(key, value)| {
                    (layout::prefix_of((key.prefix_len(), key.data())), Path::decode(value))
                })
            })
            .collect::<std::result::Result<_, _>>()
            .map_err(map_error)
    }

    /// Adds or replaces the path to a prefix.
    ///
    /// # Errors
    ///
    /// The kernel refuses; the map may be full.
    pub fn set_path(&mut self, (address, length): (IpAddr, u8), path: Path) -> Result<()> {
        let (length, address) = layout::prefix_key(address, length);
        self.paths.insert(&Key::new(length, address), path.encode(), 0).map_err(map_error)
    }

    /// Deletes the path to a prefix. It is no error if there is none.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn delete_path(&mut self, (address, length): (IpAddr, u8)) -> Result<()> {
        let (length, address) = layout::prefix_key(address, length);
        absent_is_fine(self.paths.remove(&Key::new(length, address)))
    }

    /// Attaches the programs to a device, soon: on a thread of its own.
    ///
    /// # Errors
    ///
    /// The last attempt failed; another one is made.
    pub fn attach(&self, ifindex: u32, device: &str, kind: DeviceKind) -> Result<()> {
        self.hooks.attach(ifindex, device, kind)
    }

    /// Detaches the programs from a device, soon, and forgets what was delivered to it.
    pub fn detach(&mut self, ifindex: u32) {
        let _ = self.delivered.remove(&ifindex);
        self.hooks.detach(ifindex);
    }

    /// Returns the indexes of the devices to which programs are attached, or are about to be.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn devices(&self) -> Result<Vec<u32>> {
        self.hooks.devices()
    }

    /// Whether a device has all programs for its kind, or is about to. [`Self::devices`] looks.
    pub fn is_complete(&self, ifindex: u32, kind: DeviceKind) -> bool {
        self.hooks.is_complete(ifindex, kind)
    }

    /// Returns what the programs counted, in the order of [`COUNTERS`].
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn counters(&self) -> Result<[Counter; COUNTERS.len()]> {
        let mut all = [Counter::default(); COUNTERS.len()];
        for (index, counter) in (0..).zip(&mut all) {
            let values = self.counters.get(&index, 0).map_err(map_error)?;
            values.iter().for_each(|value| counter.add(*value));
        }
        Ok(all)
    }

    /// Returns what went to endpoints past the counters of the host's interfaces, by the index of that interface.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn delivered(&self) -> Result<BTreeMap<u32, Counter>> {
        let mut all = BTreeMap::new();
        for entry in self.delivered.iter() {
            let (ifindex, values) = entry.map_err(map_error)?;
            let counter: &mut Counter = all.entry(ifindex).or_default();
            values.iter().for_each(|value| counter.add(*value));
        }
        Ok(all)
    }
}

fn absent_is_fine(result: std::result::Result<(), MapError>) -> Result<()> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(map_error(error)),
    }
}
