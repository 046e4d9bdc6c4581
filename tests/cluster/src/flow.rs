//! A stream of pings, to see whether any of them is lost.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use netns_lab::wait_until;

use crate::machine::{Machine, SOON};
use crate::world::Workload;

/// Pings from one workload to another, 25 a second, from the start to [`finish`](Flow::finish).
pub(crate) struct Flow<'a> {
    machine: &'a dyn Machine,
    shown: String,
    pid: String,
    file: String,
}

/// What became of it.
struct Report {
    sent: usize,
    lost: usize,
}

impl<'a> Flow<'a> {
    /// Begins once the way is open.
    pub(crate) fn start(from: &Workload<'a>, to: &Workload<'_>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let file = format!("/run/flow-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        from.ping(to)?;
        let machine = from.machine;
        let pid = machine.ok(&format!(
            "{} ping -n -i 0.04 {} >{file} 2>&1 </dev/null & echo $!",
            from.exec(),
            to.address
        ))?;
        let flow = Self { machine, shown: format!("{} to {}", from.name, to.name), pid, file };
        flow.go_on()?;
        Ok(flow)
    }

    /// Lets it go on for a second and more.
    pub(crate) fn go_on(&self) -> Result<()> {
        let enough = self.answers()? + 25;
        wait_until(SOON, "more answers to pings", || Ok::<_, anyhow::Error>(self.answers()? >= enough))
    }

    fn answers(&self) -> Result<usize> {
        Ok(self.machine.ok(&format!("grep -c icmp_seq= {} || true", self.file))?.parse()?)
    }

    /// Ends it.
    fn finish(self) -> Result<Report> {
        // SIGINT does not reach what a shell has put into the background; ping sets a handler all the same.
        let text = self.machine.ok(&format!(
            "kill -INT {pid}; while [ -e /proc/{pid} ]; do sleep 0.05; done; cat {file}; rm {file}",
            pid = self.pid,
            file = self.file
        ))?;
        let numbers: BTreeSet<usize> = text
            .lines()
            .filter(|line| line.contains("bytes from"))
            .filter_map(|line| line.split_once("icmp_seq=")?.1.split(' ').next()?.parse().ok())
            .collect();
        let sent: usize = text
            .lines()
            .find_map(|line| line.split_once(" packets transmitted")?.0.parse().ok())
            .with_context(|| format!("ping said no sum: {text}"))?;
        // The last one may be on its way when ping is told to end.
        let last = numbers.last().copied().unwrap_or(0).max(sent - 1);
        Ok(Report { sent, lost: last - numbers.len() })
    }
}

/// Ends all of them, fails if a ping was lost, and says how many pings that were.
pub(crate) fn none_lost(flows: Vec<Flow<'_>>) -> Result<String> {
    let mut sent = 0;
    at_most_lost(flows, 0, &mut sent)?;
    Ok(format!("0 of {sent} lost"))
}

/// Ends all of them, and fails if any has lost more than that; gives the most that one has lost.
pub(crate) fn at_most_lost(flows: Vec<Flow<'_>>, limit: usize, sent: &mut usize) -> Result<usize> {
    for flow in &flows {
        flow.go_on()?;
    }
    let (mut most, mut wrong) = (0, Vec::new());
    for flow in flows {
        let shown = flow.shown.clone();
        let report = flow.finish()?;
        *sent += report.sent;
        most = most.max(report.lost);
        if report.lost > limit {
            wrong.push(format!("{} of {} pings from {shown}", report.lost, report.sent));
        }
    }
    ensure!(wrong.is_empty(), "lost, where {limit} may be: {}", wrong.join(", "));
    Ok(most)
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        // It has ended already, unless the scenario failed.
        self.machine.run(&format!("[ ! -e {file} ] || kill -9 {pid}", file = self.file, pid = self.pid)).ok();
    }
}
