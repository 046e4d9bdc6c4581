//! A stream of pings, to detect packet loss.

use std::collections::BTreeMap;
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::machine::{Machine, SOON};
use crate::world::{Workload, fresh_id, joined};

/// Number of pings in a second.
pub(crate) const PINGS_A_SECOND: u32 = 25;

/// Pings from one workload to another, from [`Flow::start`] to [`none_lost`] or [`at_most_lost`].
pub(crate) struct Flow<'a> {
    machine: &'a dyn Machine,
    shown: String,
    pid: String,
    file: String,
}

/// Result of a flow.
struct Report {
    sent: usize,
    lost: usize,
    /// The first lost pings, each with the time of the reply before it, and other output of ping.
    details: String,
}

impl<'a> Flow<'a> {
    /// Starts several flows, each once a ping gets through.
    ///
    /// That first ping has the identifier of the flow, so that the kernels on the path already track it. Otherwise
    /// connection tracking drops all but one of the first packets of an ICMP flow that arrive together (`insert_failed`
    /// in `conntrack -S`), because each is looked up before any is entered.
    pub(crate) fn start(pairs: &[(&Workload<'a>, &Workload<'a>)]) -> Result<Vec<Self>> {
        let ids: Vec<u16> = pairs.iter().map(|_| fresh_id()).collect();
        let mut flows: Vec<Self> = pairs
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
            let ((from, to), id) = (pairs[number], ids[number]);
            format!(
                "{}; {} ping -n -D -e {id} -i {} {} >{} 2>&1 </dev/null & echo $!",
                from.ping_script(to, id),
                from.exec(),
                1.0 / f64::from(PINGS_A_SECOND),
                to.address,
                flow.file
            )
        })?;
        for (flow, pid) in flows.iter_mut().zip(pids) {
            flow.pid = pid;
        }
        run_for_a_second(&flows)?;
        Ok(flows)
    }
}

/// Waits until the flows have run for a second or more.
pub(crate) fn run_for_a_second(flows: &[Flow<'_>]) -> Result<()> {
    each(flows, |_, Flow { file, shown, .. }| {
        format!(
            "count() {{ grep -c icmp_seq= {file} || true; }}; want=$(($(count) + {PINGS_A_SECOND})); end=$(($(date +%s) + {})); \
             until [ $(count) -ge $want ]; do \
             [ $(date +%s) -lt $end ] || {{ echo 'no more replies from {shown}' >&2; exit 1; }}; sleep 0.3; done; echo",
            SOON.as_secs()
        )
    })
    .map(drop)
}

/// Stops the flows.
fn finish(flows: &[Flow<'_>]) -> Result<Vec<Report>> {
    // Background jobs of a shell ignore SIGINT, but ping sets a handler for it. The last pings may still be in flight
    // when ping is told to stop, for less than a second, and a ping may get two replies.
    let output = each(flows, |_, Flow { pid, file, .. }| {
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
    output
        .iter()
        .map(|line| {
            let (sent, rest) =
                line.split_once(' ').with_context(|| format!("unexpected summary of a flow: {line:?}"))?;
            let (lost, details) = rest.split_once(' ').unwrap_or((rest, ""));
            let report = Report { sent: sent.parse()?, lost: lost.parse()?, details: details.to_owned() };
            ensure!(report.sent > 0, "ping printed no summary");
            Ok(report)
        })
        .collect()
}

/// Work of one machine: the numbers of its flows, and a script for each.
type Work<'a> = (&'a dyn Machine, Vec<usize>, Vec<String>);

/// Runs a script for each flow, all at once on each machine. Each script must print one line.
fn each(flows: &[Flow<'_>], script: impl Fn(usize, &Flow<'_>) -> String) -> Result<Vec<String>> {
    let mut machines: BTreeMap<&str, Work<'_>> = BTreeMap::new();
    for (number, flow) in flows.iter().enumerate() {
        let (_, numbers, scripts) =
            machines.entry(flow.machine.name()).or_insert_with(|| (flow.machine, Vec::new(), Vec::new()));
        numbers.push(number);
        scripts.push(script(number, flow));
    }
    let outputs = thread::scope(|scope| {
        let threads: Vec<_> = machines
            .values()
            .map(|(machine, _, scripts)| scope.spawn(|| machine.ok_for(SOON * 2, &scripts.join("\n"))))
            .collect();
        threads.into_iter().map(joined).collect::<Result<Vec<_>>>()
    })?;
    let mut lines = vec![String::new(); flows.len()];
    for ((machine, numbers, _), output) in machines.values().zip(outputs) {
        // Empty lines at the ends were trimmed.
        let mut all = output.lines().map(str::to_owned);
        for number in numbers {
            lines[*number] = all.next().unwrap_or_default();
        }
        ensure!(all.next().is_none(), "more lines than flows from {}: {output}", machine.name());
    }
    Ok(lines)
}

/// Stops the flows, fails if a ping was lost, and returns a summary.
pub(crate) fn none_lost(flows: Vec<Flow<'_>>) -> Result<String> {
    let mut sent = 0;
    at_most_lost(flows, 0, &mut sent)?;
    Ok(format!("0 of {sent} lost"))
}

/// Stops the flows, fails if one lost more than `limit` pings, and returns the highest number that one lost.
pub(crate) fn at_most_lost(flows: Vec<Flow<'_>>, limit: usize, sent: &mut usize) -> Result<usize> {
    run_for_a_second(&flows)?;
    let (mut most, mut wrong) = (0, Vec::new());
    for (Flow { shown, .. }, report) in flows.iter().zip(finish(&flows)?) {
        *sent += report.sent;
        most = most.max(report.lost);
        if report.lost > limit {
            wrong.push(format!("{} of {} pings from {shown}:{}", report.lost, report.sent, report.details));
        }
    }
    ensure!(wrong.is_empty(), "more than {limit} lost: {}", wrong.join(", "));
    Ok(most)
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        // The flow has been stopped already, unless the scenario failed.
        let Self { file, pid, .. } = self;
        self.machine.run(&format!("[ ! -e {file} ] || {{ kill -9 {pid}; rm {file}; }}")).ok();
    }
}
