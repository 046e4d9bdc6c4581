//! A stream of pings, to see whether any of them is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::machine::{Machine, SOON};
use crate::world::{Workload, joined};

/// So many pings a flow sends.
pub(crate) const PINGS_A_SECOND: u32 = 25;

/// Pings from one workload to another, from the start to [`none_lost`] or [`at_most_lost`].
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
    /// Begins several, each once its way is open.
    pub(crate) fn start(ways: &[(&Workload<'a>, &Workload<'a>)]) -> Result<Vec<Self>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut flows: Vec<Self> = ways
            .iter()
            .map(|(from, to)| Self {
                machine: from.machine,
                shown: format!("{} to {}", from.name, to.name),
                pid: String::new(),
                file: format!("/run/flow-{}", COUNT.fetch_add(1, Ordering::Relaxed)),
            })
            .collect();
        let pids = each(&flows, |number, flow| {
            let (from, to) = ways[number];
            format!(
                "{}; {} ping -n -i {} {} >{} 2>&1 </dev/null & echo $!",
                from.pinged(to),
                from.exec(),
                1.0 / f64::from(PINGS_A_SECOND),
                to.address,
                flow.file
            )
        })?;
        for (flow, pid) in flows.iter_mut().zip(pids) {
            flow.pid = pid;
        }
        go_on(&flows)?;
        Ok(flows)
    }
}

/// Lets them go on for a second and more.
pub(crate) fn go_on(flows: &[Flow<'_>]) -> Result<()> {
    each(flows, |_, Flow { file, shown, .. }| {
        format!(
            "count() {{ grep -c icmp_seq= {file} || true; }}; want=$(($(count) + {PINGS_A_SECOND})); end=$(($(date +%s) + {})); \
             until [ $(count) -ge $want ]; do \
             [ $(date +%s) -lt $end ] || {{ echo 'no more answers from {shown}' >&2; exit 1; }}; sleep 0.3; done; echo",
            SOON.as_secs()
        )
    })
    .map(drop)
}

/// Ends them.
fn finish(flows: &[Flow<'_>]) -> Result<Vec<Report>> {
    // SIGINT does not reach what a shell has put into the background; ping sets a handler all the same.
    // The last ones are on their way when ping is told to end, for less than a second; and one may be answered twice.
    let told = each(flows, |_, Flow { pid, file, .. }| {
        format!(
            "kill -INT {pid}; while [ -e /proc/{pid} ]; do sleep 0.05; done; \
             awk '/bytes from/ {{ split($0, a, \"icmp_seq=\"); n = a[2] + 0; if (n > last) last = n; if (!seen[n]++) got++ }} \
             / packets transmitted/ {{ sent = $1 }} \
             END {{ if (last < sent - {PINGS_A_SECOND}) last = sent; print sent + 0, last - got }}' {file}; rm {file}"
        )
    })?;
    told.iter()
        .map(|line| {
            let (sent, lost) = line.split_once(' ').with_context(|| format!("{line:?} of a flow"))?;
            let report = Report { sent: sent.parse()?, lost: lost.parse()? };
            ensure!(report.sent > 0, "ping said no sum");
            Ok(report)
        })
        .collect()
}

/// What one machine does: the numbers of its flows, and a script for each.
type Work<'a> = (&'a dyn Machine, Vec<usize>, Vec<String>);

/// Runs a script for each flow, in one go on each machine; each must print one line.
fn each(flows: &[Flow<'_>], script: impl Fn(usize, &Flow<'_>) -> String) -> Result<Vec<String>> {
    let mut machines: BTreeMap<&str, Work<'_>> = BTreeMap::new();
    for (number, flow) in flows.iter().enumerate() {
        let (_, numbers, scripts) =
            machines.entry(flow.machine.name()).or_insert_with(|| (flow.machine, Vec::new(), Vec::new()));
        numbers.push(number);
        scripts.push(script(number, flow));
    }
    let told = thread::scope(|scope| {
        let threads: Vec<_> = machines
            .values()
            .map(|(machine, _, scripts)| scope.spawn(|| machine.ok_for(SOON * 2, &scripts.join("\n"))))
            .collect();
        threads.into_iter().map(joined).collect::<Result<Vec<_>>>()
    })?;
    let mut lines = vec![String::new(); flows.len()];
    for ((machine, numbers, _), told) in machines.values().zip(told) {
        // What is empty at the ends was trimmed away.
        let mut all = told.lines().map(str::to_owned);
        for number in numbers {
            lines[*number] = all.next().unwrap_or_default();
        }
        ensure!(all.next().is_none(), "more lines than flows from {}: {told}", machine.name());
    }
    Ok(lines)
}

/// Ends all of them, fails if a ping was lost, and says how many pings that were.
pub(crate) fn none_lost(flows: Vec<Flow<'_>>) -> Result<String> {
    let mut sent = 0;
    at_most_lost(flows, 0, &mut sent)?;
    Ok(format!("0 of {sent} lost"))
}

/// Ends all of them, and fails if any has lost more than that; gives the most that one has lost.
pub(crate) fn at_most_lost(flows: Vec<Flow<'_>>, limit: usize, sent: &mut usize) -> Result<usize> {
    go_on(&flows)?;
    let (mut most, mut wrong) = (0, Vec::new());
    for (Flow { shown, .. }, report) in flows.iter().zip(finish(&flows)?) {
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
        let Self { file, pid, .. } = self;
        self.machine.run(&format!("[ ! -e {file} ] || {{ kill -9 {pid}; rm {file}; }}")).ok();
    }
}
