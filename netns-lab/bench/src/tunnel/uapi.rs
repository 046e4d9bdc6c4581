//! What `wg` says to a WireGuard in a process: a few lines over a Unix socket
//! (wireguard.com/xplatform). By hand, so that no tool of WireGuard's is needed.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Where all three of them make their sockets, each named after its interface.
const DIR: &str = "/var/run/wireguard";
const TIMEOUT: Duration = Duration::from_secs(5);
/// An answer to `set` is a line and an empty one.
const LONGEST_ANSWER: usize = 4096;

/// The key pair of an end, in hexadecimal. Made for the lab and of no use elsewhere, so it may be known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyPair {
    pub(crate) private: &'static str,
    pub(crate) public: &'static str,
}

/// Of the first host and of the second.
pub(crate) const KEYS: [KeyPair; 2] = [
    KeyPair {
        private: "4848484848484848484848484848484848484848484848484848484848484848",
        public: "9177b23278cbf0f3d17c36f2acc9b55e9c85f87b220a5386ec370d663e20e337",
    },
    KeyPair {
        private: "5050505050505050505050505050505050505050505050505050505050505050",
        public: "ef38b4abd14b0a919cbe6839f6185b97d32607bee359c6c53c12cc7597867d59",
    },
];

/// An interface with one peer.
pub(crate) struct Interface<'a> {
    pub(crate) private_key: &'a str,
    pub(crate) listen_port: u16,
    pub(crate) peer_key: &'a str,
    pub(crate) endpoint: SocketAddr,
    /// What the peer may send and gets: address and prefix length.
    pub(crate) allowed_ip: (IpAddr, u8),
}

impl Interface<'_> {
    fn request(&self) -> String {
        let (address, length) = self.allowed_ip;
        let mut text = String::from("set=1\n");
        // Writing to a String does not fail.
        writeln!(text, "private_key={}", self.private_key).ok();
        writeln!(text, "listen_port={}", self.listen_port).ok();
        writeln!(text, "replace_peers=true\npublic_key={}", self.peer_key).ok();
        writeln!(text, "endpoint={}", self.endpoint).ok();
        writeln!(text, "replace_allowed_ips=true\nallowed_ip={address}/{length}\n").ok();
        text
    }

    /// Sets the interface up. An error if its process is not there yet.
    pub(crate) fn set(&self, name: &str) -> Result<()> {
        let path = socket(name);
        let context = || format!("cannot configure {name} at {}", path.display());
        let mut stream = UnixStream::connect(&path).with_context(context)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.write_all(self.request().as_bytes()).with_context(context)?;
        let mut answer = String::new();
        let mut buffer = [0; 256];
        // It may leave the connection open: an empty line ends its answer.
        while !answer.ends_with("\n\n") && answer.len() <= LONGEST_ANSWER {
            match stream.read(&mut buffer).with_context(context)? {
                0 => break,
                read => answer.push_str(&String::from_utf8_lossy(&buffer[..read])),
            }
        }
        check(&answer).with_context(context)
    }
}

/// Where an interface is configured.
pub(crate) fn socket(name: &str) -> PathBuf {
    Path::new(DIR).join(format!("{name}.sock"))
}

fn check(answer: &str) -> Result<()> {
    let Some(errno) = answer.lines().find_map(|line| line.strip_prefix("errno=")) else {
        bail!("it answered {answer:?}, without an errno");
    };
    ensure!(errno.trim() == "0", "it refused, with errno {errno}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_that_of_the_protocol() {
        let interface = Interface {
            private_key: "aa",
            listen_port: 51820,
            peer_key: "bb",
            endpoint: "[fd77::2]:51820".parse().unwrap(),
            allowed_ip: ("10.90.2.0".parse().unwrap(), 24),
        };
        assert_eq!(
            interface.request(),
            "set=1\nprivate_key=aa\nlisten_port=51820\nreplace_peers=true\npublic_key=bb\n\
             endpoint=[fd77::2]:51820\nreplace_allowed_ips=true\nallowed_ip=10.90.2.0/24\n\n"
        );
    }

    #[test]
    fn answers() {
        check("errno=0\n\n").unwrap();
        for (answer, said) in [("errno=22\n\n", "errno 22"), ("", "without an errno"), ("what\n", "without")]
        {
            let error = check(answer).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
