//! `ovlctl status`: shows the state of this host's daemon.

use std::fmt::Write as _;

use ovl_control::{
    DaemonState, FastPathStatus, GossipCounters, KeyRotation, Problem, ReconcileStatus, Reply, Request,
    Severity, Status,
};
use ovl_proto::clock::timestamp;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{comma_separated, key_value_block, plural, prefixed_lines};
use crate::time::seconds;

/// Requests the status and prints it.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Status(status) = context.request(&Request::Status)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&*status, render)
}

fn render(status: &Status) -> String {
    let state = match status.state {
        DaemonState::Starting => "starting",
        DaemonState::Ready => "ready",
        DaemonState::Degraded => "degraded",
    };
    let mut rows = vec![
        ("Node", format!("{} ({})", status.node, status.id)),
        ("State", state.to_owned()),
        ("Version", status.version.clone()),
        ("Address", status.address.to_string()),
        ("VTEP", status.vtep.to_string()),
        ("Uptime", seconds(status.uptime_s)),
        ("Members", format!("{}, {} alive", status.members, status.alive)),
        ("Endpoints", format!("{} on this host", status.endpoints)),
        ("Networks", status.networks.to_string()),
        ("Gossip", gossip(&status.gossip)),
        ("Reconcile", reconcile(&status.reconcile)),
    ];
    rows.push(("Fast path", fast_path(&status.fast_path)));
    rows.extend(status.rotation.as_ref().map(|it| ("Cluster key", rotation(it))));
    let mut text = key_value_block(&rows);
    section(&mut text, "Refused by the kernel", &status.reconcile.failing);
    let problems: Vec<String> = status.problems.iter().map(problem).collect();
    section(&mut text, "Problems", &problems);
    text
}

/// A problem in one line; `docs/problems.md` has more by its code.
fn problem(problem: &Problem) -> String {
    let severity = match problem.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    format!("{} {severity}: {}", problem.code, problem.message)
}

fn fast_path(status: &FastPathStatus) -> String {
    let FastPathStatus { in_use, why_not, paused, attached_by, fast, slow } = status;
    if !in_use {
        return format!("not used: {}", why_not.as_deref().unwrap_or("this release of ovld has none"));
    }
    let [fast, slow] = [fast, slow].map(|all| plural(all.values().sum(), "packet"));
    let pause = if *paused { "; it pauses, because packets are followed" } else { "" };
    let by = attached_by.as_deref().map(|how| format!("attached by {how}: ")).unwrap_or_default();
    format!("{by}{fast}, {slow} left to the stack{pause}")
}

fn section(text: &mut String, title: &str, items: &[String]) {
    if !items.is_empty() {
        let _ = write!(text, "{title}:\n{}", prefixed_lines("  - ", items));
    }
}

fn rotation(rotation: &KeyRotation) -> String {
    format!(
        "changing to {} since {}: {} of {} hosts have it, {} seal with it; waits for {}",
        rotation.key,
        timestamp(rotation.since_ms),
        rotation.have,
        rotation.hosts,
        rotation.seal,
        comma_separated(&rotation.waits_for)
    )
}

fn gossip(counters: &GossipCounters) -> String {
    let mut text = format!("{} sent, {} received", counters.sent, counters.received);
    for (number, what) in [
        (counters.dropped_unauthenticated, "unauthenticated"),
        (counters.dropped_replayed, "replayed"),
        (counters.dropped_malformed, "malformed"),
    ] {
        if number > 0 {
            let _ = write!(text, ", {number} {what}");
        }
    }
    if !counters.strangers.is_empty() {
        let _ = write!(text, " (strangers: {})", comma_separated(&counters.strangers));
    }
    text
}

fn reconcile(status: &ReconcileStatus) -> String {
    let passes = if status.passes == 1 { "1 pass".to_owned() } else { format!("{} passes", status.passes) };
    format!("{passes}, {}, {}", plural(status.operations, "operation"), plural(status.repairs, "repair"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            node: "host1".into(),
            id: "0410c3g8kt7o2s00".parse().unwrap(),
            version: "0.1.0".into(),
            state: DaemonState::Ready,
            problems: Vec::new(),
            address: "192.0.2.1:7940".parse().unwrap(),
            vtep: "192.0.2.1".parse().unwrap(),
            uptime_s: 11_520,
            members: 3,
            alive: 3,
            endpoints: 4,
            networks: 2,
            rotation: None,
            gossip: GossipCounters { sent: 1204, received: 1187, ..GossipCounters::default() },
            relayed: None,
            fast_path: FastPathStatus {
                in_use: true,
                fast: [("local".to_owned(), 40), ("direct_out".to_owned(), 2)].into(),
                slow: [("new_flow".to_owned(), 1)].into(),
                ..FastPathStatus::default()
            },
            reconcile: ReconcileStatus { passes: 31, operations: 42, repairs: 1, failing: Vec::new() },
        }
    }

    #[test]
    fn healthy_daemon_is_rendered_without_problems() {
        assert_eq!(
            render(&status()),
            "\
Node       host1 (0410c3g8kt7o2s00)
State      ready
Version    0.1.0
Address    192.0.2.1:7940
VTEP       192.0.2.1
Uptime     3h12m
Members    3, 3 alive
Endpoints  4 on this host
Networks   2
Gossip     1204 sent, 1187 received
Reconcile  31 passes, 42 operations, 1 repair
Fast path  42 packets, 1 packet left to the stack
"
        );
    }

    #[test]
    fn rotation_of_the_cluster_key_is_shown() {
        let rotation = KeyRotation {
            key: "0410c3g".parse().unwrap(),
            since_ms: 0,
            hosts: 3,
            have: 2,
            seal: 0,
            majority: true,
            waits_for: vec!["host3".into()],
        };
        let text = render(&Status { rotation: Some(rotation), ..status() });
        assert!(
            text.ends_with(
                "\nCluster key  changing to 0410c3g since 1970-01-01T00:00:00.000Z: 2 of 3 hosts have it, 0 seal \
                 with it; waits for host3\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn problems_are_shown_last() {
        let mut status = status();
        status.state = DaemonState::Degraded;
        status.alive = 2;
        status.gossip.dropped_unauthenticated = 5;
        status.gossip.strangers = vec!["192.0.2.9".parse().unwrap()];
        status.reconcile.failing = vec!["link ovb-04gc3g8k: operation not supported".into()];
        let problem = |code: &str, severity, message: &str| Problem {
            code: code.into(),
            severity,
            object: "host2".into(),
            message: message.into(),
        };
        status.problems = vec![
            problem("OVL-E024", Severity::Error, "host2 cannot be reached"),
            problem("OVL-E031", Severity::Warning, "The key of 192.0.2.9 is another."),
        ];
        let text = render(&status);
        assert!(text.contains("\nMembers    3, 2 alive\n"), "{text}");
        assert!(text.contains("received, 5 unauthenticated (strangers: 192.0.2.9)\n"), "{text}");
        assert!(
            text.ends_with(
                "
Refused by the kernel:
  - link ovb-04gc3g8k: operation not supported
Problems:
  - OVL-E024 error: host2 cannot be reached
  - OVL-E031 warning: The key of 192.0.2.9 is another.
"
            ),
            "{text}"
        );
    }
}
