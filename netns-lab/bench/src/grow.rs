//! `grow`: what hosts cost each other as a cluster grows: the time until many that start at once are one cluster, the
//! resources of an idle daemon among them, and the bytes that a change costs on all links.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Lab, wait_until};
use serde_json::{Value, json};

use super::Bench;
use super::idle::Use;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, round};

/// Timeout for forming a cluster and for a change to reach all hosts.
const PATIENCE: Duration = Duration::from_secs(180);
/// Time after which idle streams rest, with a margin.
const RESTED: Duration = Duration::from_secs(75);
/// Number of hosts when the bytes of a change are measured.
const SIZES: [usize; 3] = [8, 16, 24];

/// Measures `forming`: hosts that start at once, and then do nothing.
pub(crate) fn measure_forming(bench: &Bench) -> Result<Figure> {
    let hosts = bench.plan.grow_hosts;
    let (lab, took) = form(bench, hosts)?;
    thread::sleep(if bench.plan.quick { bench.plan.settle } else { RESTED });
    let (daemons, sent) = idle(&lab, bench.plan.idle)?;
    let [processor, descriptors, resident] = [
        daemons.iter().map(|idle| idle.percent).collect(),
        daemons.iter().map(|idle| idle.descriptors).collect(),
        daemons.iter().map(|idle| idle.rss_mib).collect(),
    ]
    .map(Samples::new);
    Ok(Figure {
        setup: format!(
            "{hosts} hosts on this machine, started one after another without a wait, until each lists all others as \
             alive; then idle for {} s, without networks, measured over {} s, medians of all daemons",
            RESTED.as_secs(),
            bench.plan.idle.as_secs()
        ),
        rows: vec![
            Row::with_bar(&format!("{hosts} hosts become one cluster"), took, "s", Bar::AtMost(15.0)),
            Row::with_bar("idle: processor", processor.median(), "% of a core", Bar::AtMost(0.6)),
            Row::with_bar("idle: sent by each host", sent / 1000.0, "KB/s", Bar::AtMost(30.0)),
            Row::with_bar("idle: descriptors, maximum", descriptors.max(), "", Bar::AtMost(140.0)),
            Row::context("idle: resident memory, maximum", resident.max(), "MiB"),
        ],
        notes: Vec::new(),
        details: json!({ "hosts": hosts, "formed_s": round(took), "sent_bytes_per_s": round(sent) }),
    })
}

/// Measures `hundred`: the same time for more hosts.
pub(crate) fn measure_hundred(bench: &Bench) -> Result<Figure> {
    let hosts = bench.plan.grow_hosts * 5 / 3;
    let (lab, took) = form(bench, hosts)?;
    drop(lab);
    Ok(Figure {
        setup: format!("as `forming`, {hosts} hosts"),
        rows: vec![Row::context(&format!("{hosts} hosts become one cluster"), took, "s")],
        notes: Vec::new(),
        details: json!({ "hosts": hosts, "formed_s": round(took) }),
    })
}

/// Measures `bytes`: what one host applies or creates, in bytes that all hosts send for it.
pub(crate) fn measure_bytes(bench: &Bench) -> Result<Figure> {
    let (mut rows, mut details) = (Vec::new(), Vec::new());
    for hosts in SIZES {
        let (lab, _) = form(bench, hosts)?;
        thread::sleep(bench.plan.settle);
        let first = lab.hosts().first().context("no host")?;
        let manifest = manifest(first, bench.plan.grow_services)?;
        let path = manifest.display().to_string();
        let needed = fs::metadata(&manifest)?.len() as f64 * (hosts - 1) as f64;
        let applied = cost(&lab, || {
            first.ctl_ok(&["apply", "-f", &path])?;
            for host in lab.hosts() {
                let what = format!("all Services on {}", host.name());
                wait_until(PATIENCE, &what, || has_services(host, bench.plan.grow_services))?;
            }
            Ok(())
        })?;
        let created = cost(&lab, || {
            let network = ["network", "create", "grow", "--mode", "l3", "--subnet", "10.98.0.0/16"];
            first.ctl_ok(&network)?;
            for host in lab.hosts() {
                let inspect = || host.ctl_ok(&["network", "inspect", "grow"]).map(drop);
                wait_until(PATIENCE, &format!("the network on {}", host.name()), inspect)?;
            }
            Ok(())
        })?;
        let ratio = applied / needed;
        let what = format!("{hosts} hosts: bytes for {} Services, of those needed", bench.plan.grow_services);
        rows.push(Row::with_bar(&what, ratio, "times", Bar::AtMost(3.0)));
        rows.push(Row::context(&format!("{hosts} hosts: a routed network"), created / 1e6, "MB"));
        details.push(json!({
            "hosts": hosts, "needed_bytes": needed, "applied_bytes": round(applied), "created_bytes": round(created),
        }));
    }
    Ok(Figure {
        setup: format!(
            "bytes that all hosts send in the {} s from the request, less what they send in as much time afterwards. Needed \
             is the size of the manifest once for each other host",
            WINDOW.as_secs()
        ),
        rows,
        notes: Vec::new(),
        details: Value::Array(details),
    })
}

/// Starts hosts at once. Returns the seconds until all list each other as alive.
fn form(bench: &Bench, hosts: usize) -> Result<(Lab, f64)> {
    let lab = bench.patient_lab(hosts, PATIENCE)?;
    let took = lab.start_all()?;
    Ok((lab, took.as_secs_f64()))
}

/// What a daemon used while it was idle.
struct Idle {
    percent: f64,
    descriptors: f64,
    rss_mib: f64,
}

/// Measures idle daemons. Also returns the bytes that each host sends in a second.
fn idle(lab: &Lab, length: Duration) -> Result<(Vec<Idle>, f64)> {
    let look = || lab.hosts().iter().map(Use::of).collect::<Result<Vec<_>>>();
    let (before, sent, start) = (look()?, sent(lab)?, Instant::now());
    thread::sleep(length);
    let (after, window) = (look()?, start.elapsed().as_secs_f64());
    let sent = (self::sent(lab)? - sent) / window / lab.hosts().len() as f64;
    let daemons = before.iter().zip(&after).map(|(before, after)| Idle {
        percent: (after.cpu_s - before.cpu_s) / window * 100.0,
        descriptors: after.descriptors as f64,
        rss_mib: after.rss_mib,
    });
    Ok((daemons.collect(), sent))
}

/// The time in which the bytes of a change are counted: several rounds of hints.
const WINDOW: Duration = Duration::from_secs(10);

/// Returns the bytes that all hosts send because of a change.
fn cost(lab: &Lab, change: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (before, start) = (sent(lab)?, Instant::now());
    change()?;
    thread::sleep(WINDOW.saturating_sub(start.elapsed()));
    let (after, windows) = (sent(lab)?, start.elapsed().as_secs_f64() / WINDOW.as_secs_f64());
    // Afterwards, because hosts that build a network begin to probe the paths in it.
    thread::sleep(WINDOW);
    let idle = sent(lab)? - after;
    Ok((after - before - idle * windows).max(0.0))
}

/// Returns the bytes that all hosts have sent: what arrived at the ports of the switch.
fn sent(lab: &Lab) -> Result<f64> {
    let ports = lab.switch().ip_json(&["-s", "link", "show"])?;
    let hosts: Vec<&str> = lab.hosts().iter().map(Host::name).collect();
    let ports = ports.as_array().into_iter().flatten();
    let ports = ports.filter(|port| port["ifname"].as_str().is_some_and(|name| hosts.contains(&name)));
    let bytes: Vec<f64> = ports.filter_map(|port| port["stats64"]["rx"]["bytes"].as_f64()).collect();
    ensure!(bytes.len() == hosts.len(), "{} of {} ports have counters", bytes.len(), hosts.len());
    Ok(bytes.iter().sum())
}

/// Writes a manifest of Services.
fn manifest(host: &Host, count: usize) -> Result<std::path::PathBuf> {
    let service = |number: usize| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": format!("s{number}") },
            "spec": { "ports": [{ "port": 80, "targetPort": 8080 }], "selector": { "app": format!("a{number}") } },
        })
    };
    let items: Vec<Value> = (0..count).map(service).collect();
    let path = host.dir().join("grow.json");
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    fs::write(&path, list.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn has_services(host: &Host, count: usize) -> Result<()> {
    let list = host.ctl_ok(&["get", "services", "-o", "name"])?;
    let found = list.lines().count();
    ensure!(found >= count, "{} has {found} of {count} Services", host.name());
    Ok(())
}
