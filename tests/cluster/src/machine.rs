//! What scenarios ask of a machine, whoever runs it.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use netns_lab::wait_until;
use serde_json::Value;

/// How long a command may take that takes an instant: the machines are emulated, on few cores.
pub(crate) const SOON: Duration = Duration::from_secs(240);

/// What a command gave.
#[derive(Debug, Clone)]
pub(crate) struct Ran {
    /// Its exit status; 128 and the signal's number where that ended it.
    pub(crate) code: i32,
    /// Its standard output.
    pub(crate) out: String,
    /// Its standard error.
    pub(crate) err: String,
}

impl Ran {
    /// All that it wrote.
    pub(crate) fn said(&self) -> String {
        [self.out.trim(), self.err.trim()].join("\n").trim().to_owned()
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit status {}: {}", self.code, self.said())
    }
}

/// A whole machine with Debian's systemd and kernel.
pub(crate) trait Machine: Sync {
    /// Its host name.
    fn name(&self) -> &str;
    /// Its address on the underlay.
    fn address(&self) -> IpAddr;
    /// The device that has this address.
    fn link(&self) -> &str;
    /// The folder in it with the packages, see [`crate::packages`].
    fn files(&self) -> &str;
    /// Runs a script with `sh` as root. What it leaves running must not hold its output open.
    fn run_for(&self, timeout: Duration, script: &str) -> Result<Ran>;
    /// Restarts it in order, and waits until commands can be run again.
    fn reboot(&self) -> Result<()>;
    /// Pulls the plug: from one instant to the next nothing of it runs.
    fn power_off(&self) -> Result<()>;
    /// Starts it again after [`power_off`](Self::power_off), and waits until commands can be run.
    fn power_on(&self) -> Result<()>;
    /// Lets nothing pass to and from it; the link stays up.
    fn cut(&self) -> Result<()>;
    /// Undoes [`cut`](Self::cut).
    fn heal(&self) -> Result<()>;
}

impl dyn Machine + '_ {
    /// Runs a script, whatever comes of it.
    pub(crate) fn run(&self, script: &str) -> Result<Ran> {
        self.run_for(SOON, script)
    }

    /// Runs a script that must succeed, and gives its standard output without white space at its ends.
    pub(crate) fn ok(&self, script: &str) -> Result<String> {
        self.ok_for(SOON, script)
    }

    /// The same with a time-out.
    pub(crate) fn ok_for(&self, timeout: Duration, script: &str) -> Result<String> {
        let ran = self.run_for(timeout, script)?;
        if ran.code != 0 {
            bail!("on {}: `{script}`: {ran}", self.name());
        }
        Ok(ran.out.trim().to_owned())
    }

    /// Runs a script until it succeeds, and gives what it printed then. The machine looks by itself: to ask it
    /// again and again would take more of its time than what is waited for has.
    pub(crate) fn wait(&self, script: &str) -> Result<String> {
        let looks = format!(
            "end=$(($(date +%s) + {})); until seen=$( ({script}) 2>&1); do \
             [ $(date +%s) -lt $end ] || {{ echo \"$seen\"; exit 1; }}; sleep 0.5; done; echo \"$seen\"",
            SOON.as_secs()
        );
        let ran = self.run_for(SOON * 2, &looks)?;
        if ran.code != 0 {
            bail!(
                "on {}: waited {SOON:?} in vain for success of `{script}`; last seen: {}",
                self.name(),
                ran.said()
            );
        }
        Ok(ran.out.trim().to_owned())
    }

    /// What `ovlctl` with these words prints as JSON.
    pub(crate) fn ctl(&self, words: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&format!("ovlctl -o json {words}"))?)?)
    }

    /// Waits until `ovlctl` with these words shows what is looked for.
    pub(crate) fn wait_ctl<T>(
        &self,
        words: &str,
        what: &str,
        look: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        wait_until(SOON, &format!("{what} in `ovlctl {words}` on {}", self.name()), || {
            // Between two looks: see `wait`.
            self.ok("sleep 0.2")?;
            let seen = self.ctl(words)?;
            match look(&seen) {
                Some(found) => Ok(Some(found)),
                None => bail!("{seen}"),
            }
        })
    }
}
