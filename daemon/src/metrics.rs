//! Metrics in Prometheus' text format (exposition format 0.0.4).

use std::fmt::Write as _;

use ovl_control::{DaemonState, PathDirection, PathVerdict, PeerInfo, PeerState, PeerTunnel, Status};

/// Renders all metrics except those of network policies.
pub(crate) fn render(
    status: &Status,
    peers: &[PeerInfo],
    drops: &[(&str, u64)],
    names: &[(&str, u64)],
) -> String {
    let mut text = String::new();
    let ready = u64::from(status.state == DaemonState::Ready);
    gauge(&mut text, "ovl_ready", "1 if the daemon is ready and nothing is wrong", ready);
    gauge(&mut text, "ovl_problems", "Problems that `ovlctl status` lists", status.problems.len() as u64);
    gauge(&mut text, "ovl_members", "Members of the cluster", status.members.into());
    gauge(&mut text, "ovl_endpoints", "Endpoints on this host", status.endpoints.into());
    gauge(&mut text, "ovl_networks", "Networks in the cluster", status.networks.into());
    let gossip = &status.gossip;
    counter(&mut text, "ovl_gossip_sent_total", "Datagrams sent", gossip.sent);
    counter(&mut text, "ovl_gossip_received_total", "Good datagrams received", gossip.received);
    head(&mut text, "ovl_gossip_dropped_total", "Datagrams dropped, by reason", "counter");
    for (reason, count) in [
        ("unauthenticated", gossip.dropped_unauthenticated),
        ("replayed", gossip.dropped_replayed),
        ("malformed", gossip.dropped_malformed),
    ] {
        line(&mut text, "ovl_gossip_dropped_total", &[("reason", reason)], count);
    }
    let reconcile = &status.reconcile;
    counter(&mut text, "ovl_reconcile_passes_total", "Comparisons with a kernel dump", reconcile.passes);
    counter(&mut text, "ovl_reconcile_operations_total", "Changes of the kernel", reconcile.operations);
    counter(
        &mut text,
        "ovl_reconcile_repairs_total",
        "Changes that undid somebody else's",
        reconcile.repairs,
    );
    gauge(
        &mut text,
        "ovl_reconcile_failing",
        "Changes that the kernel refuses",
        reconcile.failing.len() as u64,
    );
    let others = || peers.iter().filter(|peer| !peer.own);
    head(&mut text, "ovl_peer_alive", "1 if the host is alive", "gauge");
    for peer in others() {
        line(
            &mut text,
            "ovl_peer_alive",
            &[("peer", &peer.name), ("id", &peer.id.to_string())],
            u64::from(peer.state == PeerState::Alive),
        );
    }
    head(&mut text, "ovl_peer_reachable", "1 if packets of gossip arrive from the host directly", "gauge");
    for peer in others() {
        line(
            &mut text,
            "ovl_peer_reachable",
            &[("peer", &peer.name), ("id", &peer.id.to_string())],
            u64::from(peer.reachable),
        );
    }
    head(&mut text, "ovl_peer_rtt_microseconds", "Round trip to the host's daemon", "gauge");
    for peer in others() {
        if let Some(rtt) = peer.rtt_us {
            line(
                &mut text,
                "ovl_peer_rtt_microseconds",
                &[("peer", &peer.name), ("id", &peer.id.to_string())],
                rtt,
            );
        }
    }
    paths(&mut text, peers);
    tunnel(&mut text, peers, drops);
    head(&mut text, "ovl_dns_queries_total", "DNS queries, by what became of them", "counter");
    for (outcome, count) in names {
        line(&mut text, "ovl_dns_queries_total", &[("outcome", outcome)], *count);
    }
    text
}

/// Renders the metrics of probed paths. Adds nothing if none is.
fn paths(text: &mut String, peers: &[PeerInfo]) {
    let paths: Vec<_> =
        peers.iter().flat_map(|peer| peer.paths.iter().map(move |path| (peer, path))).collect();
    let mut each = |name: &str, help: &str, value: &dyn Fn(&PathDirection) -> Option<u64>| {
        if paths.is_empty() {
            return;
        }
        head(text, name, help, "gauge");
        for (peer, path) in &paths {
            for (direction, of) in [("sent", &path.sent), ("received", &path.received)] {
                if let Some(value) = value(of) {
                    let id = peer.id.to_string();
                    let labels = [
                        ("peer", peer.name.as_str()),
                        ("id", &id),
                        ("path", &path.encapsulation),
                        ("direction", direction),
                    ];
                    line(text, name, &labels, value);
                }
            }
        }
    };
    each("ovl_peer_path_up", "1 if packets of workloads of all sizes pass", &|of| match of.state {
        PathVerdict::Works => Some(1),
        PathVerdict::SmallOnly | PathVerdict::Broken => Some(0),
        PathVerdict::Unknown => None,
    });
    each("ovl_peer_path_loss_percent", "Of the last probes of the path, those that did not arrive", &|of| {
        of.loss_percent.map(u64::from)
    });
    let trips: Vec<_> = paths.iter().filter_map(|(peer, path)| Some((peer, path, path.rtt_us?))).collect();
    if !trips.is_empty() {
        head(text, "ovl_peer_path_rtt_microseconds", "Round trip through the path", "gauge");
    }
    for (peer, path, trip) in trips {
        let id = peer.id.to_string();
        let labels = [("peer", peer.name.as_str()), ("id", &id), ("path", &path.encapsulation)];
        line(text, "ovl_peer_path_rtt_microseconds", &labels, trip);
    }
}

/// Renders the metrics of the tunnel. Adds nothing if there is no tunnel.
fn tunnel(text: &mut String, peers: &[PeerInfo], drops: &[(&str, u64)]) {
    let tunnels: Vec<_> = peers.iter().filter_map(|peer| Some((peer, peer.tunnel.as_ref()?))).collect();
    let mut each = |name: &str, help: &str, kind: &str, value: &dyn Fn(&PeerTunnel) -> Option<u64>| {
        if tunnels.is_empty() {
            return;
        }
        head(text, name, help, kind);
        for (peer, tunnel) in &tunnels {
            if let Some(value) = value(tunnel) {
                let labels =
                    [("peer", peer.name.as_str()), ("id", &peer.id.to_string()), ("path", &peer.encryption)];
                line(text, name, &labels, value);
            }
        }
    };
    each("ovl_tunnel_sent_bytes_total", "Bytes of packets for the host", "counter", &|t| Some(t.sent_bytes));
    each("ovl_tunnel_received_bytes_total", "Bytes of packets from the host", "counter", &|t| {
        Some(t.received_bytes)
    });
    each("ovl_tunnel_handshake_age_seconds", "Since the last handshake", "gauge", &|t| t.last_handshake_s);
    each("ovl_tunnel_rtt_microseconds", "Round trip through the tunnel", "gauge", &|t| t.rtt_us);
    each("ovl_tunnel_loss_percent", "Of the last probes, those without an answer", "gauge", &|t| {
        t.loss_percent.map(u64::from)
    });
    if !drops.is_empty() {
        head(text, "ovl_tunnel_dropped_total", "Packets that the tunnel dropped, by reason", "counter");
        for (reason, count) in drops {
            line(text, "ovl_tunnel_dropped_total", &[("reason", reason)], *count);
        }
    }
}

fn gauge(text: &mut String, name: &str, help: &str, value: u64) {
    head(text, name, help, "gauge");
    line(text, name, &[], value);
}

fn counter(text: &mut String, name: &str, help: &str, value: u64) {
    head(text, name, help, "counter");
    line(text, name, &[], value);
}

// Writing into a string cannot fail.
pub(crate) fn head(text: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Renders a sample. Names of hosts need no escapes: see `is_name`.
pub(crate) fn line(text: &mut String, name: &str, labels: &[(&str, &str)], value: u64) {
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
    let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
    let _ = writeln!(text, "{name}{labels} {value}");
}
