//! Pings from a namespace.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::netns::Netns;
use crate::wait::wait_until;
use crate::without_prefix_length;

/// Timeout of each ping of [`Netns::ping_until`].
const ATTEMPT: Duration = Duration::from_millis(250);

impl Netns {
    /// Returns whether one ping is answered within the timeout. Accepts an IPv4 or IPv6 address or a name; a
    /// prefix length is ignored.
    pub fn ping(&self, address: impl Display, timeout: Duration) -> bool {
        self.try_ping(&address.to_string(), timeout).is_ok()
    }

    /// Pings until a reply arrives and returns the time that it took. Note that the kernel probes a silent
    /// neighbour only once per second.
    pub fn ping_until(&self, address: impl Display, timeout: Duration) -> Result<Duration> {
        let start = Instant::now();
        let address = address.to_string();
        let what = format!("an answer from {address} to pings from {}", self.netns_name());
        wait_until(timeout, &what, || self.try_ping(&address, ATTEMPT))?;
        Ok(start.elapsed())
    }

    fn try_ping(&self, address: &str, timeout: Duration) -> Result<()> {
        let seconds = format!("{:.3}", timeout.as_secs_f64());
        let limit = timeout + Duration::from_secs(5);
        let output = self.exec_for(
            limit,
            ["ping", "-n", "-q", "-c", "1", "-W", &seconds, without_prefix_length(address)],
        )?;
        ensure!(output.success(), "{} {}", output.stdout.trim(), output.stderr.trim());
        Ok(())
    }
}
