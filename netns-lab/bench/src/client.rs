//! A client of ovld's control socket: one line of JSON per request and reply. Not `ovlctl`, whose start would
//! be measured too.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The timeout of `ovlctl attach`.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a daemon.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach ovld at {}", socket.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// Sends a request and returns the value of its reply. An error reply of ovld is an error.
    pub(crate) fn ask(&mut self, request: &Value) -> Result<Value> {
        self.send(request)?;
        self.next_reply().with_context(|| format!("request {request}"))
    }

    pub(crate) fn send(&mut self, request: &Value) -> Result<()> {
        // One write, so that the daemon wakes up once.
        let line = format!("{request}\n");
        self.stream.get_mut().write_all(line.as_bytes()).context("cannot write to ovld's socket")
    }

    /// Reads the next reply, including each further one of `events` with `follow`.
    pub(crate) fn next_reply(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("no reply from ovld")? == 0 {
            bail!("ovld closed the connection");
        }
        let mut reply: Value =
            serde_json::from_str(&line).with_context(|| format!("ovld answered {line:?}"))?;
        if reply["reply"] == "error" {
            let message = reply["value"]["message"].as_str().unwrap_or(&line).to_owned();
            bail!("ovld rejected the request: {message}");
        }
        Ok(reply["value"].take())
    }

    /// Returns another handle to the connection, through which another thread can close it.
    pub(crate) fn handle(&self) -> Result<UnixStream> {
        Ok(self.stream.get_ref().try_clone()?)
    }
}

/// Builds the request that attaches an endpoint. ovld chooses the MAC address if `None`.
pub(crate) fn attach(name: &str, network: &str, netns: &Path, mac: Option<Mac>) -> Value {
    let mut request =
        json!({"request": "attach", "name": name, "network": network, "netns": {"path": netns}});
    if let Some(mac) = mac {
        request["mac"] = mac_text(mac).into();
    }
    request
}

pub(crate) fn detach(name: &str) -> Value {
    json!({"request": "detach", "name": name})
}

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

pub(crate) fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Parses a MAC address as replies and tools print it.
pub(crate) fn parse_mac(text: &str) -> Option<Mac> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_match_the_protocol() {
        let mac = [2, 0xbe, 0, 0, 1, 0xff];
        assert_eq!(
            attach("a", "n", Path::new("/run/netns/x"), Some(mac)).to_string(),
            r#"{"mac":"02:be:00:00:01:ff","name":"a","netns":{"path":"/run/netns/x"},"network":"n","request":"attach"}"#
        );
        assert_eq!(parse_mac(&mac_text(mac)), Some(mac));
        assert_eq!(parse_mac("02:be"), None);
    }
}
