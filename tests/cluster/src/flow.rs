//! A stream of pings, to see whether any of them is lost.

use std::collections::BTreeMap;
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::machine::{Machine, SOON};
use crate::world::{Workload, fresh_id, joined};

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
    /// The first that were lost, each with the time of the answer before it, and what ping said besides.
    details: String,
}

impl<'a> Flow<'a> {
    /// Begins several, each once its way is open.
    ///
    /// The ping that finds the way open has the identifier of those that are counted: the kernels on the way know them
    /// then. Of the first packets of an ICMP flow that come at once, Linux's connection tracking keeps one and drops the
    /// others (`insert_failed` of `conntrack -S`): each is looked up before any is entered.
    pub(crate) fn start(ways: &[(&Workload<'a>, &Workload<'a>)]) -> Result<Vec<Self>> {
        let ids: Vec<u16> = ways.iter().map(|_| fresh_id()).collect();
        let mut flows: Vec<Self> = ways
            .iter()
            .zip(&ids)
            .map(|((from, to), id)| Self {
                machine: from.machine,
                shown: format!("{} to {}", from.name, to.name),
                pid: String::new(),
                file: format!("/run/flow-{id}"),
            })
            .collect();
        let pids = each(&flows, |number, flow| {
            let ((from, to), id) = (ways[number], ids[number]);
            format!(
                "{}; {} ping -n -D -e {id} -i {} {} >{} 2>&1 </dev/null & echo $!",
                from.pinged(to, id),
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
             awk '/bytes from/ {{ split($0, a, \"icmp_seq=\"); n = a[2] + 0; if (n > last) last = n; \
             if (!(n in at)) got++; at[n] = $1; next }} \
             / packets transmitted/ {{ sent = $1; next }} \
             /^(PING|---|rtt|$)/ {{ next }} \
             ++others <= 5 {{ said = said \"; \" $0 }} \
             END {{ if (last < sent - {PINGS_A_SECOND}) last = sent; printf \"%d %d \", sent, last - got; \
             for (n = 1; n <= last && shown < 5; n++) if (!(n in at)) {{ \
             shown++; printf \" %d after %s\", n, (n - 1 in at) ? at[n - 1] : \"another\" }}; print said }}' {file}; rm {file}"
        )
    })?;
    told.iter()
        .map(|line| {
            let (sent, rest) = line.split_once(' ').with_context(|| format!("{line:?} of a flow"))?;
            let (lost, details) = rest.split_once(' ').unwrap_or((rest, ""));
            let report = Report { sent: sent.parse()?, lost: lost.parse()?, details: details.to_owned() };
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
            wrong.push(format!("{} of {} pings from {shown}:{}", report.lost, report.sent, report.details));
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
