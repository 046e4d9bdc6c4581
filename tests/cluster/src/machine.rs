//! Interface to a machine, which QEMU and Vagrant implement.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use netns_lab::wait_until;
use serde_json::Value;

/// Timeout of a short command. It is long because the machines are emulated, on few cores.
pub(crate) const SOON: Duration = Duration::from_secs(240);

/// Output and exit status of a command.
#[derive(Debug, Clone)]
pub(crate) struct CommandOutput {
    /// Exit status; 128 plus the signal's number if a signal ended the command.
    pub(crate) code: i32,
    /// Its standard output.
    pub(crate) out: String,
    /// Its standard error.
    pub(crate) err: String,
}

impl CommandOutput {
    /// Standard output and standard error.
    pub(crate) fn text(&self) -> String {
        [self.out.trim(), self.err.trim()].join("\n").trim().to_owned()
    }
}

impl fmt::Display for CommandOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit status {}: {}", self.code, self.text())
    }
}

/// A whole machine with Debian's systemd and kernel.
pub(crate) trait Machine: Sync {
    /// Its host name.
    fn name(&self) -> &str;
    /// Its address on the underlay.
    fn address(&self) -> IpAddr;
    /// Network device with this address.
    fn link(&self) -> &str;
    /// Directory on the machine with the packages, see [`crate::packages`].
    fn files(&self) -> &str;
    /// Runs a script with `sh` as root. Processes that it leaves running must not keep its output open.
    fn run_for(&self, timeout: Duration, script: &str) -> Result<CommandOutput>;
    /// Reboots the machine gracefully, and waits until it accepts commands again.
    fn reboot(&self) -> Result<()>;
    /// Stops the machine at once, like a power failure.
    fn power_off(&self) -> Result<()>;
    /// Starts the machine after [`power_off`](Self::power_off), and waits until it accepts commands.
    fn power_on(&self) -> Result<()>;
    /// Blocks all traffic to and from the machine, while its link stays up.
    fn cut(&self) -> Result<()>;
    /// Undoes [`cut`](Self::cut).
    fn heal(&self) -> Result<()>;
}

impl dyn Machine + '_ {
    /// Runs a script, and returns its result whether or not it succeeded.
    pub(crate) fn run(&self, script: &str) -> Result<CommandOutput> {
        self.run_for(SOON, script)
    }

    /// Runs a script that must succeed, and returns its trimmed standard output.
    pub(crate) fn ok(&self, script: &str) -> Result<String> {
        self.ok_for(SOON, script)
    }

    /// Runs a script that must succeed within a timeout, and returns its trimmed standard output.
    pub(crate) fn ok_for(&self, timeout: Duration, script: &str) -> Result<String> {
        let ran = self.run_for(timeout, script)?;
        if ran.code != 0 {
            bail!("on {}: `{script}`: {ran}", self.name());
        }
        Ok(ran.out.trim().to_owned())
    }

    /// Runs a script until it succeeds, and returns its output. The loop runs on the machine: separate commands would
    /// take more of its time than what is waited for.
    pub(crate) fn wait(&self, script: &str) -> Result<String> {
        let script_loop = format!(
            "end=$(($(date +%s) + {})); until seen=$( ({script}) 2>&1); do \
             [ $(date +%s) -lt $end ] || {{ echo \"$seen\"; exit 1; }}; sleep 0.5; done; echo \"$seen\"",
            SOON.as_secs()
        );
        let ran = self.run_for(SOON * 2, &script_loop)?;
        if ran.code != 0 {
            bail!(
                "on {}: waited {SOON:?} in vain for success of `{script}`; last seen: {}",
                self.name(),
                ran.text()
            );
        }
        Ok(ran.out.trim().to_owned())
    }

    /// JSON output of `ovlctl` with these arguments.
    pub(crate) fn ctl(&self, words: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&format!("ovlctl -o json {words}"))?)?)
    }

    /// Waits until the JSON output of `ovlctl` with these arguments is as expected.
    pub(crate) fn wait_ctl<T>(
        &self,
        words: &str,
        what: &str,
        look: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        wait_until(SOON, &format!("{what} in `ovlctl {words}` on {}", self.name()), || {
            // A pause between two attempts, because each one takes time on an emulated machine.
            self.ok("sleep 0.2")?;
            let seen = self.ctl(words)?;
            match look(&seen) {
                Some(found) => Ok(Some(found)),
                None => bail!("{seen}"),
            }
        })
    }
}
