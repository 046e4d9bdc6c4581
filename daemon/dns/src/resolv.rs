//! The upstream servers in the host's resolv.conf(5), read as glibc reads it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The limit of servers; more are ignored.
const MAX_SERVERS: usize = 8;
/// The part of a file that is read, in bytes.
const MAX_FILE: u64 = 64 << 10;
/// The limit of lines that are reported.
const MAX_UNUSED: usize = 8;
/// The longest part of a line that is reported, in bytes.
const MAX_SHOWN: usize = 80;
const PORT: u16 = 53;
/// The server if the file names none.
const DEFAULT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The addresses of systemd-resolved's stub listeners.
const RESOLVED_STUBS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 54))];
/// The file with the servers that systemd-resolved uses itself.
const RESOLVED_CONF: &str = "/run/systemd/resolve/resolv.conf";

/// The version of a file: inode, modification time and length. `None` if it does not exist.
type FileVersion = Option<(u64, i64, i64, u64)>;

/// What a resolv.conf(5) says of servers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upstreams {
    /// The servers, in the order in which they are queried. Empty if the file names only ovld itself.
    pub servers: Vec<SocketAddr>,
    /// The file names no server, so the server is 127.0.0.1.
    pub is_default: bool,
    /// The lines for a server that are not used, at most 8.
    pub unused: Vec<UnusedLine>,
}

/// A line for a server that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusedLine {
    /// The number of the line, from 1.
    pub number: usize,
    /// The line, at most 80 bytes of it, with escapes for what is not ASCII.
    pub text: String,
    /// Why it is not used.
    pub reason: UnusedReason,
}

/// Why a line for a server is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnusedReason {
    /// The line does not begin with `nameserver` in lower case and a blank.
    Keyword,
    /// The address is not valid.
    Address,
    /// The host has no device of this name.
    NoDevice(String),
}

impl fmt::Display for UnusedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keyword => f.write_str(
                "a line must begin with `nameserver`, in lower case and without a blank before it",
            ),
            Self::Address => f.write_str("this is not an address"),
            Self::NoDevice(device) => write!(f, "the host has no device {device} at present"),
        }
    }
}

/// A server in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nameserver {
    address: IpAddr,
    /// The device of a link-local address, by name or index. It may come later, or be made anew.
    scope: Option<String>,
    line: (usize, String),
}

impl Nameserver {
    /// Returns the server with the present index of its device.
    fn resolve(&self) -> Result<SocketAddr, UnusedLine> {
        let (IpAddr::V6(address), Some(scope)) = (self.address, &self.scope) else {
            return Ok(SocketAddr::new(self.address, PORT));
        };
        let index = nix::net::if_::if_nametoindex(scope.as_str()).ok().or_else(|| scope.parse().ok());
        index.map(|index| SocketAddrV6::new(address, PORT, 0, index).into()).ok_or_else(|| {
            let (number, text) = self.line.clone();
            UnusedLine { number, text, reason: UnusedReason::NoDevice(scope.clone()) }
        })
    }
}

/// The content of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Content {
    servers: Vec<Nameserver>,
    unused: Vec<UnusedLine>,
}

/// Reads the servers of a resolv.conf(5) whenever the file changes, or a device that it names.
#[derive(Debug)]
pub struct ResolvConfWatcher {
    path: PathBuf,
    /// The engine's own listening addresses: to query them would be a loop.
    own: Vec<SocketAddr>,
    seen: Option<(FileVersion, FileVersion)>,
    /// The content of the file, and of that of systemd-resolved.
    content: (Content, Content),
    /// What was returned last.
    last: Option<Upstreams>,
}

impl ResolvConfWatcher {
    /// Begins with the file at `path`. Servers at the addresses `own` are left out.
    pub fn new(path: PathBuf, own: Vec<SocketAddr>) -> Self {
        Self { path, own, seen: None, content: Default::default(), last: None }
    }

    /// Returns the servers. `None` if neither the files nor the devices in them have changed since the last call.
    pub fn changed(&mut self) -> Option<Upstreams> {
        let now = (file_version(&self.path), file_version(Path::new(RESOLVED_CONF)));
        if self.seen != Some(now) {
            self.seen = Some(now);
            let content = parse(&read(&self.path));
            let is_stub = |server: &Nameserver| RESOLVED_STUBS.contains(&server.address);
            let behind = if content.servers.iter().any(is_stub) {
                parse(&read(Path::new(RESOLVED_CONF)))
            } else {
                Content::default()
            };
            self.content = (content, behind);
            self.last = None;
        }
        let upstreams = self.upstreams();
        if self.last.as_ref() == Some(&upstreams) {
            return None;
        }
        self.last = Some(upstreams.clone());
        Some(upstreams)
    }

    fn upstreams(&self) -> Upstreams {
        let (file, behind) = &self.content;
        let mut unused: BTreeMap<usize, UnusedLine> =
            file.unused.iter().map(|line| (line.number, line.clone())).collect();
        let mut servers = Vec::new();
        let is_default = file.servers.is_empty();
        if is_default {
            servers.push(SocketAddr::new(DEFAULT, PORT));
        }
        for server in &file.servers {
            match server.resolve() {
                Ok(server) => servers.push(server),
                Err(line) => drop(unused.insert(line.number, line)),
            }
        }
        servers.extend(behind.servers.iter().filter_map(|server| server.resolve().ok()));
        // The stub may be configured to forward to this engine.
        servers.retain(|server| !RESOLVED_STUBS.contains(&server.ip()) && !self.is_own(*server));
        let mut once: Vec<SocketAddr> = Vec::new();
        for server in servers {
            if !once.contains(&server) && once.len() < MAX_SERVERS {
                once.push(server);
            }
        }
        Upstreams { servers: once, is_default, unused: unused.into_values().take(MAX_UNUSED).collect() }
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

/// Reads the first 64 KiB of a file, up to the end of a line. A file that is unreadable, or no regular one, counts as
/// empty.
fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
        && let Ok(file) = File::open(path)
    {
        // What could be read before an error counts.
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    if bytes.len() as u64 == MAX_FILE {
        let end = bytes.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        bytes.truncate(end);
    }
    bytes
}

/// Parses the servers of a resolv.conf(5).
pub(crate) fn parse(bytes: &[u8]) -> Content {
    let mut content = Content::default();
    for (before, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let number = before.saturating_add(1);
        // A C string ends at a zero.
        let line = line.split(|byte| *byte == 0).next().unwrap_or_default();
        let mut unused = |reason| {
            if content.unused.len() < MAX_UNUSED {
                content.unused.push(UnusedLine { number, text: shown(line), reason });
            }
        };
        match line.strip_prefix(b"nameserver") {
            Some(rest @ [b' ' | b'\t', ..]) => match server(rest) {
                Some((address, scope)) if content.servers.len() < MAX_SERVERS => {
                    content.servers.push(Nameserver { address, scope, line: (number, shown(line)) });
                }
                Some(_) => {}
                None => unused(UnusedReason::Address),
            },
            _ if looks_like_a_server(line) => unused(UnusedReason::Keyword),
            _ => {}
        }
    }
    content
}

/// Whether a line was probably meant as one for a server.
fn looks_like_a_server(line: &[u8]) -> bool {
    let word = line.trim_ascii_start();
    word.get(..10).is_some_and(|word| word.eq_ignore_ascii_case(b"nameserver"))
}

fn shown(line: &[u8]) -> String {
    line.get(..MAX_SHOWN).unwrap_or(line).trim_ascii().escape_ascii().to_string()
}

/// Parses what follows the keyword: `192.0.2.1`, `2001:db8::1` or `fe80::1%eth0`. The address ends at a blank, `#` or
/// `;`. Also returns the device of a link-local address.
fn server(rest: &[u8]) -> Option<(IpAddr, Option<String>)> {
    let word = rest.split(|byte| matches!(byte, b' ' | b'\t' | b'\r')).find(|word| !word.is_empty())?;
    let word = word.split(|byte| matches!(byte, b'#' | b';')).next()?;
    let text = std::str::from_utf8(word).ok()?;
    if let Some(address) = inet_aton(text) {
        // The kernel takes the unspecified address for the loopback address.
        let address = if address.is_unspecified() { Ipv4Addr::LOCALHOST } else { address };
        return Some((address.into(), None));
    }
    let (address, scope) =
        text.split_once('%').map_or((text, None), |(address, scope)| (address, Some(scope)));
    let address: Ipv6Addr = address.parse().ok()?;
    let address = if address.is_unspecified() { Ipv6Addr::LOCALHOST } else { address };
    // glibc ignores the device of other addresses.
    let scope = scope.filter(|_| address.is_unicast_link_local());
    Some((IpAddr::from(address).to_canonical(), scope.map(str::to_owned)))
}

/// Parses an IPv4 address as inet_aton(3) does: one to four numbers, decimal, octal after `0` or hexadecimal after `0x`,
/// of which the last one fills the remaining bytes.
fn inet_aton(text: &str) -> Option<Ipv4Addr> {
    let mut numbers = text.split('.').map(|part| {
        let (digits, radix) = match part.strip_prefix("0x").or_else(|| part.strip_prefix("0X")) {
            Some(digits) => (digits, 16),
            None if part.len() > 1 && part.starts_with('0') => (part, 8),
            None => (part, 10),
        };
        // A sign is not a digit.
        if digits.starts_with('+') { None } else { u32::from_str_radix(digits, radix).ok() }
    });
    let mut address: u32 = 0;
    let mut room: u32 = 32;
    let mut number = numbers.next()??;
    for next in numbers {
        room = room.checked_sub(8).filter(|room| *room > 0)?;
        let byte = u8::try_from(number).ok()?;
        address |= u32::from(byte).checked_shl(room)?;
        number = next?;
    }
    if room < 32 && number >= 1u32.checked_shl(room)? {
        return None;
    }
    Some(Ipv4Addr::from(address | number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(text: impl AsRef<[u8]>) -> Vec<String> {
        let content = parse(text.as_ref());
        let found = content.servers.iter().map(|server| match &server.scope {
            Some(scope) => format!("{}%{scope}", server.address),
            None => server.address.to_string(),
        });
        found.collect()
    }

    #[test]
    fn addresses_are_read_as_glibc_reads_them() {
        for (text, expected) in [
            (&b"# B\xfcro\nnameserver 192.0.2.53\n"[..], &["192.0.2.53"][..]),
            (b"nameserver 192.0.2.53#53\nnameserver 2001:db8::1;office\n", &["192.0.2.53", "2001:db8::1"]),
            (b"nameserver 192.0.2.53 # office", &["192.0.2.53"]),
            (b"nameserver\t192.0.2.1\r\nnameserver \t 192.0.2.2\n", &["192.0.2.1", "192.0.2.2"]),
            (b"nameserver 172.29.253\n", &["172.29.0.253"]),
            (
                b"nameserver 0x7f.1\nnameserver 010.0.0.1\nnameserver 3232235777\n",
                &["127.0.0.1", "8.0.0.1", "192.168.1.1"],
            ),
            (
                b"nameserver 0.0.0.0\nnameserver ::\nnameserver ::ffff:192.0.2.1\n",
                &["127.0.0.1", "::1", "192.0.2.1"],
            ),
            (b"nameserver fe80::1%eth0\nnameserver 2001:db8::1%eth0\n", &["fe80::1%eth0", "2001:db8::1"]),
            (b"nameserver 192.0.2.1\0x\nnameserver 192.0.2.2\n", &["192.0.2.1", "192.0.2.2"]),
            (b"; nameserver 192.0.2.1\nsearch nameserver\noptions ndots:2\n", &[]),
        ] {
            assert_eq!(servers(text), expected, "{}", text.escape_ascii());
            assert!(parse(text).unused.is_empty());
        }
    }

    #[test]
    fn lines_that_are_not_used_are_reported() {
        let address = UnusedReason::Address;
        for (text, reason) in [
            (&b"nameserver 256.1"[..], &address),
            (b"nameserver 1.2.3.08", &address),
            (b"nameserver 1.2.3.4.", &address),
            (b"nameserver 1.2.3.4.5", &address),
            (b"nameserver 1.65536.1", &address),
            (b"nameserver +1.2.3.4", &address),
            (b"nameserver 192.0.2.53:53", &address),
            (b"nameserver [2001:db8::1]", &address),
            (b"nameserver dns.example", &address),
            (b"nameserver  ", &address),
            (b" nameserver 192.0.2.1", &UnusedReason::Keyword),
            (b"NameServer 192.0.2.1", &UnusedReason::Keyword),
            (b"nameservers 192.0.2.1", &UnusedReason::Keyword),
        ] {
            let content = parse(&[b"# \xff\n", text].concat());
            assert!(content.servers.is_empty(), "{}", text.escape_ascii());
            let [line] = &content.unused[..] else { panic!("{}", text.escape_ascii()) };
            assert_eq!((line.number, &line.reason), (2, reason), "{}", text.escape_ascii());
        }
        let long = [b"nameserver \xff".as_slice(), &[b'x'; 1000]].concat();
        assert!(parse(&long).unused[0].text.len() <= 4 * MAX_SHOWN);
        assert_eq!(parse(&b"nameserver x\n".repeat(100)).unused.len(), MAX_UNUSED);
    }

    /// A file of one test in a directory of its own.
    fn file(name: &str, text: &str) -> (PathBuf, PathBuf) {
        let dir = std::env::temp_dir().join(format!("ovl-dns-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("resolv.conf");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn own_addresses_and_stub_listeners_are_never_queried() {
        let (dir, path) = file(
            "own",
            "nameserver 169.254.79.53\nnameserver 127.0.0.53\nnameserver 127.0.0.1\nnameserver 192.0.2.7\n",
        );
        let own = vec!["169.254.79.53:7953".parse().unwrap(), "127.0.0.1:5300".parse().unwrap()];
        let servers = ResolvConfWatcher::new(path, own).changed().unwrap().servers;
        fs::remove_dir_all(&dir).unwrap();
        let expected = |ip: &str| servers.contains(&SocketAddr::new(ip.parse().unwrap(), 53));
        assert!(expected("192.0.2.7") && expected("127.0.0.1"), "{servers:?}");
        assert!(!expected("169.254.79.53") && !expected("127.0.0.53"), "{servers:?}");
    }

    #[test]
    fn without_a_file_or_a_server_in_it_the_server_is_localhost() {
        let (dir, path) = file("none", "search a b\n");
        let mut watcher = ResolvConfWatcher::new(path.clone(), vec![]);
        let localhost =
            Upstreams { servers: vec!["127.0.0.1:53".parse().unwrap()], is_default: true, unused: vec![] };
        assert_eq!(watcher.changed().as_ref(), Some(&localhost));
        assert_eq!(watcher.changed(), None);
        fs::remove_dir_all(&dir).unwrap();
        // The file is another one, but says the same.
        assert_eq!(watcher.changed().as_ref(), Some(&localhost));
        assert_eq!(ResolvConfWatcher::new(path, vec![]).changed(), Some(localhost));
        let own = vec!["127.0.0.1:53".parse().unwrap()];
        let upstreams = ResolvConfWatcher::new("/nonexistent".into(), own).changed().unwrap();
        assert!(upstreams.servers.is_empty() && upstreams.is_default);
    }

    #[test]
    fn server_on_a_device_that_does_not_exist_is_left_out_and_reported() {
        let (dir, path) = file("scope", "nameserver fe80::53%ovl-none\nnameserver fe80::53%lo\n");
        let upstreams = ResolvConfWatcher::new(path, vec![]).changed().unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(upstreams.servers, ["[fe80::53%1]:53".parse().unwrap()]);
        let [line] = &upstreams.unused[..] else { panic!("{upstreams:?}") };
        assert_eq!((line.number, &line.reason), (1, &UnusedReason::NoDevice("ovl-none".to_owned())));
    }
}
