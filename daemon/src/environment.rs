//! What a daemon takes from outside: the clock, random bytes, the network, the kernel and the disk.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ovl_kernel::{KernelEvent, KernelHandle, Prober};
use ovl_mesh::keys::TunnelSecret;
use ovl_mesh::transport::{HostTransport, Transport};
use tokio::sync::mpsc;

/// The world around one daemon. Durations are measured by tokio's clock.
///
/// Keys, nonces and the ids of gossip runs do not come from here: ring and snow draw them from the system. A test that
/// needs the same run for the same seed has to replace `getrandom`.
pub trait Environment {
    /// Milliseconds since 1970.
    fn wall_ms(&self) -> u64;

    /// Fills a buffer with random bytes.
    fn fill_random(&self, bytes: &mut [u8]);

    /// The network under gossip and streams.
    fn transport(&self) -> Arc<dyn Transport>;

    /// Connects to the kernel. The secret holds the private keys of the tunnel.
    fn start_kernel(
        &self,
        events: mpsc::Sender<KernelEvent>,
        secret: &TunnelSecret,
    ) -> ovl_kernel::Result<KernelHandle>;

    /// Sends ICMP probes.
    fn prober(&self) -> ovl_kernel::Result<Prober>;

    /// How the state file is written.
    fn disk(&self) -> Disk;

    /// Whether this host is the daemon's alone: it serves DNS and the control socket, and checks the packet filters of
    /// other programs.
    fn owns_host(&self) -> bool;
}

/// How the state file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Synced, by a thread.
    Synced,
    /// Not synced, by a task that takes this long.
    Simulated(Duration),
}

/// This host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl Environment for Host {
    fn wall_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        use ring::rand::SecureRandom as _;
        if ring::rand::SystemRandom::new().fill(bytes).is_err() {
            // The kernel's generator cannot fail once it is seeded, which it is long before any daemon
            // starts; ids that collide are refused anyway.
            tracing::error!("the system gives no random numbers");
        }
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(HostTransport)
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

    fn disk(&self) -> Disk {
        Disk::Synced
    }

    fn owns_host(&self) -> bool {
        true
    }
}
