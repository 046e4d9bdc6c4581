//! The resolvers of the host, as resolv.conf(5) names them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// More are not asked.
const MAX_SERVERS: usize = 8;
const MAX_FILE: u64 = 64 << 10;
const PORT: u16 = 53;
/// systemd-resolved's stubs, and where it writes whom it asks itself.
const STUBS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// Which state of a file was read.
type Seen = Option<(u64, i64, i64, u64)>;

/// Follows the file.
#[derive(Debug)]
pub(crate) struct Follow {
    path: PathBuf,
    /// Addresses on which we ourselves listen, with their ports: to ask these would be a loop.
    own: Vec<SocketAddr>,
    seen: Option<(Seen, Seen)>,
}

impl Follow {
    pub(crate) fn new(path: PathBuf, own: Vec<SocketAddr>) -> Self {
        Self { path, own, seen: None }
    }

    /// The servers, in order, if anything changed since the last call.
    pub(crate) fn changed(&mut self) -> Option<Vec<SocketAddr>> {
        let now = (look(&self.path), look(Path::new(RESOLVED)));
        if self.seen == Some(now) {
            return None;
        }
        self.seen = Some(now);
        let mut servers = parse(&read(&self.path));
        if servers.iter().any(|server| STUBS.contains(&server.ip())) {
            // The stub would ask whom it is told to ask, and that can be us.
            servers.retain(|server| !STUBS.contains(&server.ip()));
            let behind = parse(&read(Path::new(RESOLVED)));
            servers.extend(behind.into_iter().filter(|server| !STUBS.contains(&server.ip())));
        }
        servers.retain(|server| !self.is_own(*server));
        servers.truncate(MAX_SERVERS);
        Some(servers)
    }

    /// An address of ours is never asked, whatever the port: what comes to its port 53 is led to ours.
    fn is_own(&self, server: SocketAddr) -> bool {
        self.own
            .iter()
            .any(|own| own.ip() == server.ip() && (own.port() == server.port() || !own.ip().is_loopback()))
    }
}

fn look(path: &Path) -> Seen {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

/// What cannot be read names no servers.
fn read(path: &Path) -> String {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() <= MAX_FILE => fs::read_to_string(path).unwrap_or_default(),
        _ => String::new(),
    }
}

/// The servers that a resolv.conf names.
fn parse(text: &str) -> Vec<SocketAddr> {
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

/// `192.0.2.1`, `2001:db8::1` or `fe80::1%eth0`.
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
    fn the_own_addresses_and_stubs_are_never_asked() {
        let dir = std::env::temp_dir().join(format!("ovl-dns-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("resolv.conf");
        fs::write(
            &path,
            "nameserver 169.254.79.53\nnameserver 127.0.0.53\nnameserver 127.0.0.1\nnameserver 192.0.2.7\n",
        )
        .unwrap();
        let own = vec!["169.254.79.53:7953".parse().unwrap(), "127.0.0.1:5300".parse().unwrap()];
        let servers = Follow::new(path, own).changed().unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let expected = |ip: &str| servers.contains(&SocketAddr::new(ip.parse().unwrap(), 53));
        assert!(expected("192.0.2.7") && expected("127.0.0.1"), "{servers:?}");
        assert!(!expected("169.254.79.53") && !expected("127.0.0.53"), "{servers:?}");
    }
}
