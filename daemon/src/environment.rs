//! The environment of a daemon: the clock, random bytes, the network, the kernel and the disk.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use ovl_kernel::{KernelEvent, KernelHandle, PathSocket, Prober};
use ovl_mesh::gossip::WallClock;
use ovl_mesh::keys::TunnelSecret;
use ovl_mesh::transport::{HostTransport, SOCKET_MARK, Transport};
use ovl_subsystems::marks::{FROM_HOST, OWN_SOCKET};
use tokio::sync::mpsc;

// Rules pass over packets with the mark that the sockets set.
const _: () = assert!(SOCKET_MARK == OWN_SOCKET);

/// The environment of one daemon. Durations are measured by tokio's clock.
///
/// Keys, nonces and the ids of gossip runs do not come from here: ring and snow draw them from the system. A
/// test that needs the same run for the same seed has to replace `getrandom`.
pub trait Environment {
    /// Returns the wall clock, which gossip reads on threads of its own.
    fn wall_clock(&self) -> WallClock;

    /// Returns the wall-clock time in milliseconds since 1970.
    fn wall_ms(&self) -> u64 {
        (self.wall_clock())()
    }

    /// Fills a buffer with random bytes.
    fn fill_random(&self, bytes: &mut [u8]);

    /// Returns the network that carries gossip and streams.
    fn transport(&self) -> Arc<dyn Transport>;

    /// Connects to the kernel. The secret holds the private keys of the tunnel.
    ///
    /// # Errors
    ///
    /// The kernel worker cannot open its netlink sockets.
    fn start_kernel(
        &self,
        events: mpsc::Sender<KernelEvent>,
        secret: &TunnelSecret,
    ) -> ovl_kernel::Result<KernelHandle>;

    /// Creates the prober, which sends ICMP probes.
    fn prober(&self) -> ovl_kernel::Result<Prober>;

    /// Opens the sockets of path probes, one of which has a UDP port. `None` if this daemon sends none.
    ///
    /// # Errors
    ///
    /// The process may not open packet sockets.
    fn path_socket(&self, port: u16) -> ovl_kernel::Result<Option<PathSocket>>;

    /// Returns the id of this boot of the kernel. The files in the run directory are valid only for one boot.
    ///
    /// # Errors
    ///
    /// The kernel does not tell it.
    fn boot_id(&self) -> anyhow::Result<String>;

    /// Returns how the state file and the copy of the cluster keys are written.
    fn disk(&self) -> Disk;

    /// Whether this daemon has the host to itself. If so, it serves DNS and the control socket, and checks
    /// the packet filters of other programs and the settings of the host.
    fn owns_host(&self) -> bool;
}

/// Way in which the state file and the copy of the cluster keys are written.
#[derive(Clone)]
pub enum Disk {
    /// A thread writes and syncs the file.
    Synced,
    /// A task waits for as long as the function says, which it asks before each write. Then it writes the file.
    /// A daemon that ends before that leaves the file as it was.
    Simulated(Rc<dyn Fn() -> Duration>),
}

/// Returns the milliseconds since 1970 of the system's clock.
///
/// Debug builds add what the file says that `OVL_TEST_CLOCK` names, in milliseconds, so that tests can set the clock of
/// one host.
fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    #[cfg(debug_assertions)]
    {
        static FILE: std::sync::OnceLock<Option<std::ffi::OsString>> = std::sync::OnceLock::new();
        let file = FILE.get_or_init(|| std::env::var_os("OVL_TEST_CLOCK"));
        let ahead = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        let ahead = ahead.and_then(|text| text.trim().parse().ok()).unwrap_or_default();
        wall_ms.saturating_add_signed(ahead)
    }
    #[cfg(not(debug_assertions))]
    wall_ms
}

/// The environment of the real host.
#[derive(Debug, Clone, Default)]
pub struct Host {
    transport: Arc<HostTransport>,
}

impl Environment for Host {
    fn wall_clock(&self) -> WallClock {
        Arc::new(wall_ms)
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        use ring::rand::SecureRandom as _;
        if ring::rand::SystemRandom::new().fill(bytes).is_err() {
            // The kernel's generator cannot fail once it is seeded, which it is long before a daemon starts.
            // Ids that collide are rejected anyway.
            tracing::error!("the system gives no random numbers");
        }
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::clone(&self.transport) as Arc<dyn Transport>
    }

    fn start_kernel(
        &self,
        events: mpsc::Sender<KernelEvent>,
        secret: &TunnelSecret,
    ) -> ovl_kernel::Result<KernelHandle> {
        ovl_kernel::start(events, secret.private())
    }

    fn prober(&self) -> ovl_kernel::Result<Prober> {
        Prober::new()
    }

    fn path_socket(&self, port: u16) -> ovl_kernel::Result<Option<PathSocket>> {
        PathSocket::open(FROM_HOST, port).map(Some)
    }

    fn boot_id(&self) -> anyhow::Result<String> {
        let path = "/proc/sys/kernel/random/boot_id";
        Ok(std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?.trim().to_owned())
    }

    fn disk(&self) -> Disk {
        Disk::Synced
    }

    fn owns_host(&self) -> bool {
        true
    }
}
