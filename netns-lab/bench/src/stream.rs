//! One TCP stream between two namespaces, measured with iperf3.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Netns, Spawned, wait_until};
use serde_json::Value;

const PORT: u16 = 5201;
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// Additional time for iperf3 beyond the length of the stream.
const GRACE: Duration = Duration::from_secs(20);

/// Two namespaces, with an iperf3 server in the second one.
pub(crate) struct Path {
    client: Netns,
    target: IpAddr,
    /// The server, which runs until this is dropped.
    _server: Spawned,
}

/// The CPU cores of iperf3's two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cores {
    /// Both on the first core, so that only the cost of the path matters.
    One,
    /// Chosen by the scheduler, which changes a run's speed by up to half.
    Any,
}

/// The result of one run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    pub(crate) gbit_s: f64,
    pub(crate) retransmits: u64,
}

/// Checks that iperf3 is installed.
pub(crate) fn check(netns: &Netns) -> Result<()> {
    let advice = "iperf3 is needed for this figure: apt-get install iperf3";
    let output = netns.exec(["iperf3", "--version"]).context(advice)?;
    ensure!(output.success(), "`iperf3 --version` failed; {advice}");
    Ok(())
}

impl Path {
    pub(crate) fn new(client: &Netns, server: &Netns, target: IpAddr) -> Result<Self> {
        let address = target.to_string();
        let spawned = server.spawn(["iperf3", "-s", "-B", &address, "-p", &PORT.to_string()])?;
        // Do not probe with a connection: iperf3 would treat it as a test.
        wait_until(START_TIMEOUT, "the iperf3 server to listen", || server.run(listens)?)?;
        Ok(Path { client: client.clone(), target, _server: spawned })
    }

    /// Runs one stream. Always uses `cubic`, so that figures of different machines are comparable.
    pub(crate) fn run(&self, length: Duration, cores: Cores) -> Result<Speed> {
        let seconds = length.as_secs().max(1).to_string();
        let (target, port) = (self.target.to_string(), PORT.to_string());
        let mut args = vec!["iperf3", "-c", &target, "-p", &port, "-C", "cubic", "-t", &seconds, "-J"];
        if cores == Cores::One {
            // The client's core and the server's core.
            args.extend(["-A", "0,0"]);
        }
        let output = self.client.exec_for(length + GRACE, args)?;
        let report: Value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("iperf3 printed no JSON: {}{}", output.stdout, output.stderr))?;
        if let Some(error) = report["error"].as_str() {
            bail!("iperf3 from {} to {target}: {error}", self.client.netns_name());
        }
        speed_of(&report)
    }
}

fn speed_of(report: &Value) -> Result<Speed> {
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().context("no speed from iperf3")?;
    let retransmits =
        report["end"]["sum_sent"]["retransmits"].as_u64().context("no retransmits from iperf3")?;
    Ok(Speed { gbit_s: bits / 1e9, retransmits })
}

/// Returns whether a process listens on the port in the calling thread's namespace.
fn listens() -> Result<bool> {
    // "local_address rem_address st": 0A is LISTEN.
    let wanted = format!(":{PORT:04X}");
    for file in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        let listening = text.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(1).is_some_and(|local| local.ends_with(&wanted)) && fields.get(3) == Some(&"0A")
        });
        if listening {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reports_of_iperf3_are_parsed() {
        let report = json!({"end": {
            "sum_sent": {"bits_per_second": 4e9, "retransmits": 7},
            "sum_received": {"bits_per_second": 3.5e9},
        }});
        let speed = speed_of(&report).unwrap();
        assert_eq!((speed.gbit_s, speed.retransmits), (3.5, 7));

        for broken in [json!({}), json!({"end": {"sum_received": {"bits_per_second": 1}}})] {
            speed_of(&broken).unwrap_err();
        }
    }
}
