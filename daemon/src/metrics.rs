//! The metrics of the daemon, as `ovlctl metrics` and the address `metrics_listen` show them. Names are those of
//! `docs/metrics.md`.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_control::{
    DaemonState, PathDirection, PathVerdict, PeerInfo, PeerState, PeerTunnel, Problem, Severity, Status,
};
use ovl_metrics::{Durations, In, Page};

use crate::limits;

/// Durations that are counted as they occur.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    full_passes: Durations,
    quick_passes: Durations,
    /// From a change of another host's table until it is known here.
    convergence: Durations,
    /// Calls of container runtimes, by the command and whether it succeeded.
    cni: BTreeMap<(&'static str, bool), Durations>,
}

impl Measured {
    /// Counts a pass of the reconcile loop that compared with a dump of the kernel.
    pub(crate) fn full_pass(&mut self, took: Duration) {
        self.full_passes.add(took);
    }

    /// Counts a pass of the reconcile loop that carried out what had changed.
    pub(crate) fn quick_pass(&mut self, took: Duration) {
        self.quick_passes.add(took);
    }

    /// Counts a change of another host's table, by the time until it was known here.
    pub(crate) fn convergence(&mut self, took: Duration) {
        self.convergence.add(took);
    }

    /// Counts a call of a container runtime.
    pub(crate) fn cni(&mut self, command: &'static str, succeeded: bool, took: Duration) {
        self.cni.entry((command, succeeded)).or_default().add(took);
    }

    /// Adds what was counted.
    pub(crate) fn add_to(&self, page: &mut Page) {
        page.durations(
            "reconcile_duration",
            "Time of a pass of the reconcile loop",
            [(vec![("pass", "full")], &self.full_passes), (vec![("pass", "quick")], &self.quick_passes)],
        );
        let help = "Time until a change of another host's endpoints was known here";
        page.durations("convergence", help, [(Vec::new(), &self.convergence)]);
        let result = |succeeded| if succeeded { "success" } else { "error" };
        page.durations(
            "cni_duration",
            "Time of a call of a container runtime",
            self.cni.iter().map(|((command, succeeded), durations)| {
                (vec![("command", *command), ("result", result(*succeeded))], durations)
            }),
        );
    }
}

/// Adds what the status and the list of peers say.
pub(crate) fn add_status(page: &mut Page, status: &Status, peers: &[PeerInfo]) {
    let (commit, _) = ovl_proto::VERSION.split_once("\nfeatures").unwrap_or((ovl_proto::VERSION, ""));
    let commit = commit.rsplit(' ').next().unwrap_or_default();
    page.info("build", "The release", &[("version", &status.version), ("commit", commit)]);
    page.info("node", "This host", &[("name", &status.node), ("id", &status.id.to_string())]);
    page.gauge("ready", In::Numbers, "1 if the daemon is ready and nothing is wrong")
        .is(status.state == DaemonState::Ready);
    add_problems(page, &status.problems);
    page.gauge("members", In::Numbers, "Members of the cluster").is(status.members);
    page.gauge("members_alive", In::Numbers, "Members of the cluster that are alive").is(status.alive);
    page.gauge("endpoints", In::Numbers, "Endpoints on this host").is(status.endpoints);
    page.gauge("networks", In::Numbers, "Networks in the cluster").is(status.networks);
    let gossip = &status.gossip;
    page.counter("gossip_sent", In::Numbers, "Datagrams sent").is(gossip.sent);
    page.counter("gossip_received", In::Numbers, "Good datagrams received").is(gossip.received);
    page.counter("gossip_dropped", In::Numbers, "Datagrams dropped, by reason")
        .with(&[("reason", "unauthenticated")], gossip.dropped_unauthenticated)
        .with(&[("reason", "replayed")], gossip.dropped_replayed)
        .with(&[("reason", "malformed")], gossip.dropped_malformed);
    if let Some(relayed) = &status.relayed {
        page.counter("relay_sent", In::Numbers, "Datagrams of this host through members").is(relayed.sent);
        page.counter("relay_received", In::Numbers, "Datagrams for this host through members")
            .is(relayed.received);
        page.counter("relay_forwarded", In::Numbers, "Datagrams that were passed on for other hosts")
            .is(relayed.forwarded);
        page.counter("relay_dropped", In::Numbers, "Relayed datagrams dropped, by reason")
            .with(&[("reason", "unauthenticated")], relayed.dropped_unauthenticated)
            .with(&[("reason", "no_path")], relayed.dropped_no_path)
            .with(&[("reason", "limited")], relayed.dropped_limited)
            .with(&[("reason", "full")], relayed.dropped_full);
        page.gauge("relay_streams", In::Numbers, "Streams that are being passed on for other hosts")
            .is(relayed.streams);
    }
    let reconcile = &status.reconcile;
    page.counter("reconcile_operations", In::Numbers, "Changes of the kernel").is(reconcile.operations);
    page.gauge("reconcile_failing", In::Numbers, "Changes that the kernel refuses")
        .is(reconcile.failing.len());
    add_peers(page, peers);
    add_paths(page, peers);
    add_tunnels(page, peers);
}

/// Adds the number of problems of each kind. A kind without problems has no sample.
fn add_problems(page: &mut Page, problems: &[Problem]) {
    let mut counts: BTreeMap<(&str, Severity), u64> = BTreeMap::new();
    for problem in problems {
        *counts.entry((&problem.code, problem.severity)).or_default() += 1;
    }
    let family = page.gauge("problems", In::Numbers, "Problems that `ovlctl status` lists, by code");
    for ((code, severity), count) in counts {
        let severity = match severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        family.with(&[("code", code), ("severity", severity)], count);
    }
}

fn add_peers(page: &mut Page, peers: &[PeerInfo]) {
    let others: Vec<(&PeerInfo, String)> =
        peers.iter().filter(|peer| !peer.own).map(|peer| (peer, peer.id.to_string())).collect();
    let family = page.gauge("peer_up", In::Numbers, "1 if the host is alive");
    for (peer, id) in &others {
        family.with(&[("peer", &peer.name), ("id", id)], peer.state == PeerState::Alive);
    }
    let family =
        page.gauge("peer_reachable", In::Numbers, "1 if packets of gossip arrive from the host directly");
    for (peer, id) in &others {
        family.with(&[("peer", &peer.name), ("id", id)], peer.reachable);
    }
    let family = page.gauge("peer_rtt", In::Seconds, "Round trip to the host's daemon");
    for (peer, id) in &others {
        family.with_some(&[("peer", &peer.name), ("id", id)], peer.rtt_us.map(Duration::from_micros));
    }
}

/// Adds the metrics of probed paths.
fn add_paths(page: &mut Page, peers: &[PeerInfo]) {
    let paths: Vec<_> = peers
        .iter()
        .flat_map(|peer| peer.paths.iter().map(move |path| (peer, path, peer.id.to_string())))
        .collect();
    let mut each = |name, unit, help, value: &dyn Fn(&PathDirection) -> Option<f64>| {
        let family = page.gauge(name, unit, help);
        for (peer, path, id) in &paths {
            for (direction, of) in [("sent", &path.sent), ("received", &path.received)] {
                let labels = [
                    ("peer", peer.name.as_str()),
                    ("id", id),
                    ("path", &path.encapsulation),
                    ("direction", direction),
                ];
                family.with_some(&labels, value(of));
            }
        }
    };
    each("peer_path_up", In::Numbers, "1 if packets of workloads of all sizes pass", &|of| match of.state {
        PathVerdict::Works => Some(1.0),
        PathVerdict::SmallOnly | PathVerdict::Broken => Some(0.0),
        PathVerdict::Unknown => None,
    });
    each("peer_path_loss", In::Ratio, "Of the last probes of the path, those that did not arrive", &|of| {
        of.loss_percent.map(|percent| f64::from(percent) / 100.0)
    });
    let family = page.gauge("peer_path_rtt", In::Seconds, "Round trip through the path");
    for (peer, path, id) in &paths {
        let labels = [("peer", peer.name.as_str()), ("id", id), ("path", &path.encapsulation)];
        family.with_some(&labels, path.rtt_us.map(Duration::from_micros));
    }
}

/// Adds the metrics of the tunnel.
fn add_tunnels(page: &mut Page, peers: &[PeerInfo]) {
    let tunnels: Vec<_> =
        peers.iter().filter_map(|peer| Some((peer, peer.tunnel.as_ref()?, peer.id.to_string()))).collect();
    let add = |family: &mut ovl_metrics::Family,
               value: &dyn Fn(&PeerTunnel) -> Option<ovl_metrics::Value>| {
        for (peer, tunnel, id) in &tunnels {
            family.with_some(&[("peer", &peer.name), ("id", id), ("path", &peer.encryption)], value(tunnel));
        }
    };
    add(page.counter("tunnel_sent", In::Bytes, "Packets for the host, in bytes"), &|t| {
        Some(t.sent_bytes.into())
    });
    add(page.counter("tunnel_received", In::Bytes, "Packets from the host, in bytes"), &|t| {
        Some(t.received_bytes.into())
    });
    add(page.gauge("tunnel_handshake_age", In::Seconds, "Since the last handshake"), &|t| {
        t.last_handshake_s.map(Into::into)
    });
    add(page.gauge("tunnel_rtt", In::Seconds, "Round trip through the tunnel"), &|t| {
        t.rtt_us.map(|micros| Duration::from_micros(micros).into())
    });
    add(page.gauge("tunnel_loss", In::Ratio, "Of the last probes, those without an answer"), &|t| {
        t.loss_percent.map(|percent| (f64::from(percent) / 100.0).into())
    });
}

/// Adds the metrics of this process, as far as the kernel tells.
pub(crate) fn add_process(page: &mut Page) {
    let Ok(process) = own_process() else { return };
    page.process_gauge("process_resident_memory", In::Bytes, "Resident memory").is(process.resident_bytes);
    page.process_counter("process_cpu", In::Seconds, "Processor time of all threads").is(process.cpu);
    let Some((open, most)) = limits::open_files() else { return };
    page.process_gauge("process_open_fds", In::Numbers, "Open file descriptors").is(open);
    page.process_gauge("process_max_fds", In::Numbers, "The most file descriptors that may be open").is(most);
}

#[derive(Debug)]
struct Process {
    resident_bytes: u64,
    cpu: Duration,
}

fn own_process() -> anyhow::Result<Process> {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    // Pages: the second field (proc(5)).
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).unwrap_or_default().parse()?;
    let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
    Ok(Process {
        resident_bytes: pages * u64::try_from(page_size)?,
        cpu: Duration::from_micros(u64::try_from(micros)?),
    })
}
