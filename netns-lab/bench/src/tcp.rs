//! `tcp`: one TCP stream through ovl's overlay, compared with a manually built one in alternating rounds.

use anyhow::Result;
use serde_json::json;

use super::cluster::Cluster;
use super::report::{Bar, Figure, Row};
use super::stream::{self, Cores, Path};
use super::turns::{Turns, gbit_s, mtu_of, to_json};
use super::{Bench, by_hand};

const HOSTS: usize = 2;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    stream::check(cluster.host(0)?)?;
    let ours = cluster.one_workload_each()?;
    let [(from, _), (to, target)] = ours.as_slice() else { anyhow::bail!("not {HOSTS} workloads") };
    let mtu = mtu_of(from)?;
    // A lab without daemons beside the other one, with identical kernel settings.
    let other = bench.lab(HOSTS)?;
    let [(hand_from, _), (hand_to, hand_target)] = by_hand::build(&other, mtu)?;
    let [raw_from, raw_to] = other.hosts() else { anyhow::bail!("not {HOSTS} hosts") };

    let overlay = Path::new(from, to, *target)?;
    let hand = Path::new(&hand_from, &hand_to, hand_target)?;
    let raw = Path::new(raw_from, raw_to, raw_to.address()?)?;
    // A warm-up run that does not count.
    hand.run(bench.plan.stream, Cores::One)?;
    let one = Turns::take(&bench.plan, &overlay, &hand, Cores::One)?;
    let any = Turns::take(&bench.plan, &overlay, &hand, Cores::Any)?;
    let raw_runs = (0..bench.plan.turns.div_ceil(3))
        .map(|_| raw.run(bench.plan.stream, Cores::One))
        .collect::<Result<Vec<_>>>()?;

    for host in cluster.hosts().iter().chain(other.hosts()) {
        host.exec_ok(["sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1"])?;
    }
    let filtered = Turns::take(&bench.plan, &overlay, &hand, Cores::One)?;

    let (ours, by_hand) = (one.overlay_gbit_s().max(), one.hand_gbit_s().max());
    Ok(Figure {
        setup: format!(
            "2 hosts, underlay MTU 1500, overlay MTU {mtu}, one iperf3 stream (cubic) of {} s, {} rounds each, ovl \
             and the manual overlay alternating in two labs side by side; the best round of each, because other work can only slow a round down. Both ends on one core, so that \
             only the cost of the path matters; also without that. Manual: bridge, VXLAN (nolearning), static FDB and \
             neighbours, no daemon, no packet filter. Hosts have Debian's defaults: bridged frames do not pass \
             the packet filter (bridge-nf-call-iptables is 0); one row has it at 1, as set by Docker",
            bench.plan.stream.as_secs(),
            bench.plan.turns
        ),
        rows: vec![
            Row::with_bar(
                "ovl's overlay : manually built, best rounds",
                one.best_ratio(),
                "",
                Bar::AtLeast(0.95),
            ),
            Row::context("the same by medians", one.ratio(), ""),
            Row::context("the same with cores chosen by the scheduler", any.ratio(), ""),
            Row::context("the same with bridge-nf-call-iptables = 1", filtered.best_ratio(), ""),
            Row::context("ovl's overlay", ours, "Gbit/s"),
            Row::context("manually built", by_hand, "Gbit/s"),
            Row::context("underlay alone", gbit_s(&raw_runs).max(), "Gbit/s"),
        ],
        notes: Vec::new(),
        details: json!({
            "mtu": mtu,
            "one_core": one.to_json(),
            "any_core": any.to_json(),
            "one_core_bridge_nf": filtered.to_json(),
            "underlay": to_json(&raw_runs),
        }),
    })
}
