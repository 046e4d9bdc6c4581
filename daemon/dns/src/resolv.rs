//! The upstream servers in the host's resolv.conf(5).

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The limit of servers; more are ignored.
const MAX_SERVERS: usize = 8;
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 64 << 10;
const PORT: u16 = 53;
/// The addresses of systemd-resolved's stub listeners.
const RESOLVED_STUBS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];
/// The file with the servers that systemd-resolved uses itself.
const RESOLVED_CONF: &str = "/run/systemd/resolve/resolv.conf";

/// The version of a file: inode, modification time and length. `None` if it does not exist.
type FileVersion = Option<(u64, i64, i64, u64)>;

/// Reads the servers of a resolv.conf(5) whenever the file changes.
#[derive(Debug)]
pub struct ResolvConfWatcher {
    path: PathBuf,
    /// The engine's own listening addresses: to query them would be a loop.
    own: Vec<SocketAddr>,
    seen: Option<(FileVersion, FileVersion)>,
}

impl ResolvConfWatcher {
    /// Begins with the file at `path`. Servers at the addresses `own` are left out.
    pub fn new(path: PathBuf, own: Vec<SocketAddr>) -> Self {
        Self { path, own, seen: None }
    }

    /// Returns the servers in order. `None` if the files have not changed since the last call.
    pub fn changed(&mut self) -> Option<Vec<SocketAddr>> {
        let now = (file_version(&self.path), file_version(Path::new(RESOLVED_CONF)));
        if self.seen == Some(now) {
            return None;
        }
        self.seen = Some(now);
        let mut servers = parse(&read(&self.path));
        if servers.iter().any(|server| RESOLVED_STUBS.contains(&server.ip())) {
            // The stub may be configured to forward to this engine.
            servers.retain(|server| !RESOLVED_STUBS.contains(&server.ip()));
            let behind = parse(&read(Path::new(RESOLVED_CONF)));
            servers.extend(behind.into_iter().filter(|server| !RESOLVED_STUBS.contains(&server.ip())));
        }
        servers.retain(|server| !self.is_own(*server));
        servers.truncate(MAX_SERVERS);
        Some(servers)
    }

    /// Returns whether a query to this server would come back. Port 53 of a listening address is redirected
    /// to its port, so the port matters only for loopback addresses.
    fn is_own(&self, server: SocketAddr) -> bool {
        self.own
            .iter()
            .any(|own| own.ip() == server.ip() && (own.port() == server.port() || !own.ip().is_loopback()))
    }
}

fn file_version(path: &Path) -> FileVersion {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

/// Reads a file. A file that is unreadable or too large counts as empty.
fn read(path: &Path) -> String {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() <= MAX_FILE => fs::read_to_string(path).unwrap_or_default(),
        _ => String::new(),
    }
}

/// Parses the servers of a resolv.conf.
pub(crate) fn parse(text: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(server) = words.next().and_then(server) else { continue };
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// Parses `192.0.2.1`, `2001:db8::1` or `fe80::1%eth0`.
fn server(text: &str) -> Option<SocketAddr> {
    if let Some((address, device)) = text.split_once('%') {
        let scope = device.parse().or_else(|_| nix::net::if_::if_nametoindex(device)).ok()?;
        return Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, scope).into());
    }
    Some(SocketAddr::new(text.parse().ok()?, PORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_in_order_and_once() {
        let text = "# nameserver 192.0.2.9\nsearch a b\nnameserver 192.0.2.1\n nameserver 2001:db8::1 \n\
                    nameserver 192.0.2.1\nnameserver nonsense\nnameserver fe80::1%1\n";
        let found: Vec<String> = parse(text).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%1]:53"]);
    }

    #[test]
    fn own_addresses_and_stub_listeners_are_never_queried() {
        let dir = std::env::temp_dir().join(format!("ovl-dns-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("resolv.conf");
        fs::write(
            &path,
            "nameserver 169.254.79.53\nnameserver 127.0.0.53\nnameserver 127.0.0.1\nnameserver 192.0.2.7\n",
        )
        .unwrap();
        let own = vec!["169.254.79.53:7953".parse().unwrap(), "127.0.0.1:5300".parse().unwrap()];
        let servers = ResolvConfWatcher::new(path, own).changed().unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let expected = |ip: &str| servers.contains(&SocketAddr::new(ip.parse().unwrap(), 53));
        assert!(expected("192.0.2.7") && expected("127.0.0.1"), "{servers:?}");
        assert!(!expected("169.254.79.53") && !expected("127.0.0.53"), "{servers:?}");
    }
}
