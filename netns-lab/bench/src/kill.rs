//! `kill`: packet loss while a daemon is killed or restarted.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use netns_lab::Host;
use serde_json::{Value, json};

use super::Bench;
use super::cluster::Cluster;
use super::flow::{self, Datagrams, PERIOD, Party, Traffic};
use super::report::{Bar, Figure, Row};
use super::stats::ms;

const HOSTS: usize = 3;
const READY: Duration = Duration::from_secs(20);
/// How long to watch after the daemon is ready, so that late pruning is noticed.
const AFTER: Duration = Duration::from_secs(2);
/// Length of the control run, in which nothing happens.
const CONTROL: Duration = Duration::from_secs(3);

#[derive(Clone, Copy)]
enum End {
    Kill,
    Terminate,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Kill => "kill -9 and start",
            End::Terminate => "SIGTERM and start",
        }
    }

    fn end(self, host: &Host) -> Result<()> {
        match self {
            End::Kill => host.kill9(),
            End::Terminate => host.stop().map(drop),
        }
    }
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    let workloads = cluster.one_workload_each()?;
    let [a, b, _] = workloads.as_slice() else { anyhow::bail!("not {HOSTS} workloads") };
    // Loss in the control run is caused by the measurement, not by the daemon.
    let (control, ()) = flow::run(a, b, || {
        thread::sleep(CONTROL.min(bench.plan.settle));
        Ok(())
    })?;

    let mut rows = Vec::new();
    let mut rounds = Vec::new();
    let mut notes = Vec::new();
    if lost(&control) > 0 {
        notes.push(format!("{} packets were lost in the control run: the machine is busy", lost(&control)));
    }
    for end in [End::Kill, End::Terminate] {
        let mut total = 0;
        let mut longest = Duration::ZERO;
        for away in &bench.plan.away {
            let traffic = round(cluster.host(0)?, a, b, end, *away)?;
            total += lost(&traffic);
            longest = longest.max(traffic.stream.longest_gap);
            if lost(&traffic) > 0 {
                let sent = traffic.there.sent + traffic.back.sent;
                notes.push(format!(
                    "{}, down for {away:?}: {} of {sent} packets lost",
                    end.name(),
                    lost(&traffic)
                ));
            }
            rounds.push(to_json(end.name(), Some(*away), &traffic));
        }
        rows.push(Row::with_bar(
            &format!("packets lost, {}", end.name()),
            total as f64,
            "",
            Bar::AtMost(0.0),
        ));
        rows.push(Row::context(&format!("longest pause of TCP, {}", end.name()), ms(longest), "ms"));
    }
    rounds.push(to_json("nothing happens", None, &control));
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with an endpoint each; 1,000 numbered datagrams per second in each direction between h1's and \
             h2's, and TCP of 4 KiB every {PERIOD:?}; h1's daemon is down for {:?} and is watched for {AFTER:?} \
             after it is ready again",
            bench.plan.away
        ),
        rows,
        notes,
        details: json!({"rounds": rounds}),
    })
}

fn round(host: &Host, a: &Party, b: &Party, end: End, away: Duration) -> Result<Traffic> {
    let (traffic, ()) = flow::run(a, b, || {
        end.end(host)?;
        thread::sleep(away);
        host.start()?;
        host.wait_ready(READY)?;
        thread::sleep(AFTER);
        Ok(())
    })?;
    Ok(traffic)
}

fn lost(traffic: &Traffic) -> usize {
    traffic.there.lost + traffic.back.lost
}

fn to_json(what: &str, away: Option<Duration>, traffic: &Traffic) -> Value {
    let one = |datagrams: &Datagrams| {
        json!({
            "sent": datagrams.sent,
            "refused": datagrams.refused,
            "lost": datagrams.lost,
            "duplicates": datagrams.duplicates,
            "longest_gap_ms": ms(datagrams.longest_gap),
        })
    };
    json!({
        "what": what,
        "away_s": away.map(|away| away.as_secs_f64()),
        "h1_to_h2": one(&traffic.there),
        "h2_to_h1": one(&traffic.back),
        "tcp_longest_pause_ms": ms(traffic.stream.longest_gap),
        "tcp_retransmits": traffic.stream.retransmits,
        "tcp_bytes": traffic.stream.bytes,
    })
}
