//! The configuration protocol of userspace WireGuard: a few lines over a Unix socket
//! (wireguard.com/xplatform). Implemented here, so that `wg` is not needed.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Directory of the sockets of all three implementations, each named after its interface.
const DIR: &str = "/var/run/wireguard";
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum length of a reply to `set`, which is one line and an empty line.
const LONGEST_ANSWER: usize = 4096;

/// A WireGuard key pair in hexadecimal. Used only in the lab, so it need not be secret.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyPair {
    pub(crate) private: &'static str,
    pub(crate) public: &'static str,
}

/// Key pairs of the first and of the second host.
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
    /// Allowed IPs of the peer: address and prefix length.
    pub(crate) allowed_ip: (IpAddr, u8),
}

impl Interface<'_> {
    fn request(&self) -> String {
        let (address, length) = self.allowed_ip;
        let mut text = String::from("set=1\n");
        // Writing to a String cannot fail.
        writeln!(text, "private_key={}", self.private_key).ok();
        writeln!(text, "listen_port={}", self.listen_port).ok();
        writeln!(text, "replace_peers=true\npublic_key={}", self.peer_key).ok();
        writeln!(text, "endpoint={}", self.endpoint).ok();
        writeln!(text, "replace_allowed_ips=true\nallowed_ip={address}/{length}\n").ok();
        text
    }

    /// Configures the interface. Fails if its process is not running yet.
    pub(crate) fn set(&self, name: &str) -> Result<()> {
        let path = socket(name);
        let context = || format!("cannot configure {name} at {}", path.display());
        let mut stream = UnixStream::connect(&path).with_context(context)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.write_all(self.request().as_bytes()).with_context(context)?;
        let mut answer = String::new();
        let mut buffer = [0; 256];
        // The implementation may leave the connection open: an empty line ends its reply.
        while !answer.ends_with("\n\n") && answer.len() <= LONGEST_ANSWER {
            match stream.read(&mut buffer).with_context(context)? {
                0 => break,
                read => answer.push_str(&String::from_utf8_lossy(&buffer[..read])),
            }
        }
        check(&answer).with_context(context)
    }
}

/// Returns the path of an interface's configuration socket.
pub(crate) fn socket(name: &str) -> PathBuf {
    Path::new(DIR).join(format!("{name}.sock"))
}

fn check(answer: &str) -> Result<()> {
    let Some(errno) = answer.lines().find_map(|line| line.strip_prefix("errno=")) else {
        bail!("the reply {answer:?} is without an errno");
    };
    ensure!(errno.trim() == "0", "the configuration was rejected with errno {errno}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_matches_the_protocol() {
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
    fn replies_are_checked() {
        check("errno=0\n\n").unwrap();
        for (answer, said) in [("errno=22\n\n", "errno 22"), ("", "without an errno"), ("what\n", "without")]
        {
            let error = check(answer).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
