//! Reaching an address from a namespace.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::netns::Netns;
use crate::wait::wait_until;
use crate::without_prefix_length;

/// How long one of [`Netns::ping_until`]'s pings waits for its answer.
const ATTEMPT: Duration = Duration::from_millis(250);

impl Netns {
    /// Whether one ping is answered in that time. IPv4 or IPv6 address or name; a prefix
    /// length at its end is ignored.
    pub fn ping(&self, address: impl Display, timeout: Duration) -> bool {
        self.try_ping(&address.to_string(), timeout).is_ok()
    }

    /// Pings until an answer comes and says how long that took. Mind that the kernel asks
    /// for a neighbour that does not answer only once a second.
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
