//! `pod-tcp`: one stream from pod to pod across hosts, against the same built by hand, in turns.

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Lab, wait_until};
use serde_json::{Map, Value, json};

use super::by_hand::{self, Way};
use super::ground;
use crate::Bench;
use crate::flow::Party;
use crate::report::{Bar, Figure, Row};
use crate::stream::{self, Cores, Path};
use crate::turns::{self, Turns};

const HOSTS: usize = 2;
const WAYS: [Way; 2] = [Way::Vxlan, Way::Direct];

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let mut rows = Vec::new();
    let mut details = Map::new();
    let mut mtus = Vec::new();
    for way in WAYS {
        // A host has the one network or the other.
        let lab = bench.lab(HOSTS)?;
        stream::check(&lab["h1"])?;
        lab.start_all()?;
        // A lab without daemons, beside the other one: its hosts' kernels are alike.
        let other = bench.lab(HOSTS)?;
        let ours = pods(bench, &lab, way)?;
        let mtu = turns::mtu_of(&ours[0].0)?;
        let hand = by_hand::build(&other, way, mtu)?;
        let (ours, hand) = (path(&ours)?, path(&hand)?);
        // One that does not count: the first to run finds a cold machine.
        hand.run(bench.plan.stream, Cores::One)?;
        let bare = (0..bench.plan.turns.div_ceil(4))
            .map(|_| hand.run(bench.plan.stream, Cores::One))
            .collect::<Result<Vec<_>>>()?;
        by_hand::masquerade(&other, way)?;
        let one = Turns::take(&bench.plan, &ours, &hand, Cores::One)?;
        let name = way.name();
        rows.extend([
            Row::with_bar(&format!("{name}, ovl : by hand"), one.best_ratio(), "", Bar::AtLeast(0.95)),
            Row::context(&format!("{name}, the same by medians"), one.ratio(), ""),
            Row::context(&format!("{name}, ovl"), one.overlay_gbit_s().max(), "Gbit/s"),
            Row::context(&format!("{name}, by hand"), one.hand_gbit_s().max(), "Gbit/s"),
            Row::context(
                &format!("{name}, by hand, pods that reach nobody else"),
                turns::gbit_s(&bare).max(),
                "Gbit/s",
            ),
        ]);
        details.insert(
            name.to_owned(),
            json!({"mtu": mtu, "one_core": one.to_json(), "by_hand_bare": turns::to_json(&bare)}),
        );
        mtus.push(format!("{name} {mtu}"));
    }
    Ok(Figure {
        setup: format!(
            "2 hosts, underlay MTU 1500, pods' MTU {}, one iperf3 stream (cubic) of {} s from a pod to one on the \
             other host, {} turns each, ovl and by hand alternating in two labs that stand side by side, both ends \
             on one core; the best turn of each, because other work can only slow one down. By hand: pods on a veth \
             each with a host route, one route to the other host's pods, with vxlan also one neighbour and one FDB \
             entry; no daemon; masquerading by one rule of nft, as ovl does it and as pods need it. The last row of each \
             is without that: the path has no packet filter then, and no connection tracking",
            mtus.join(", "),
            bench.plan.stream.as_secs(),
            bench.plan.turns
        ),
        rows,
        notes: Vec::new(),
        details: Value::Object(details),
    })
}

/// A network of ovl's with a pod on each host, which is reached in the way that was asked for.
fn pods(bench: &Bench, lab: &Lab, way: Way) -> Result<[Party; 2]> {
    let name = way.name();
    ground::network(lab, name, &["--subnet", "10.60.0.0/16", "--backend", name])?;
    let pod = |host| {
        let plugin = ground::plugin(bench, &lab[host], name)?;
        ground::pod(&plugin, &lab[host], &format!("pod-{name}"))
    };
    let parties = [pod("h1")?, pod("h2")?];
    wait_until(ground::SETTLE_TIMEOUT, "the route to the other host's pod", || {
        check_way(lab, way, &parties[1])
    })?;
    Ok(parties)
}

/// Whether h1's packets to the pod on h2 go that way.
fn check_way(lab: &Lab, way: Way, (_, pod): &Party) -> Result<()> {
    let routes = lab["h1"].ip_json(&["route", "get", &pod.to_string()])?;
    let device = routes[0]["dev"].as_str().with_context(|| format!("no route to {pod}: {routes}"))?;
    let link = lab["h1"].ip_json(&["-d", "link", "show", device])?;
    let kind = link[0]["linkinfo"]["info_kind"].as_str().unwrap_or_default();
    let gateway = routes[0]["gateway"].as_str().unwrap_or_default();
    let peer = lab["h2"].address()?.to_string();
    let right = match way {
        Way::Vxlan => kind == "vxlan",
        Way::Direct => kind != "vxlan" && gateway == peer,
    };
    ensure!(right, "the route to {pod} is not {}: {routes}", way.name());
    Ok(())
}

/// The path from the first to the second, which carries packets.
fn path([from, to]: &[Party; 2]) -> Result<Path> {
    if let Err(error) = from.0.ping_until(to.1, ground::SETTLE_TIMEOUT) {
        bail!("{} does not reach {}: {error:#}", from.0.netns_name(), to.1);
    }
    Path::new(&from.0, &to.0, to.1)
}
