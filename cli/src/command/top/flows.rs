//! The flows of `ovlctl top`: what the hosts saw in the last seconds, together. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ovl_control::{Flow, FlowVerdict, Flows};
use serde::Serialize;

use crate::command::flows::{backend, end, port};

/// The maximum number of flows that are kept.
const MOST: usize = 2000;
/// How long a flow is kept that no host sees.
const KEPT: Duration = Duration::from_secs(30);

/// What was seen of a flow, a second. Bytes that were not counted are 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct FlowRates {
    /// Connections that began.
    pub(crate) opened: f64,
    /// Bytes from the source.
    pub(crate) sent_bytes: f64,
    /// Bytes back to it.
    pub(crate) received_bytes: f64,
    /// Packets that policies dropped.
    pub(crate) drops: f64,
}

impl FlowRates {
    fn plus(self, other: Self) -> Self {
        Self {
            opened: self.opened + other.opened,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            received_bytes: self.received_bytes + other.received_bytes,
            drops: self.drops + other.drops,
        }
    }

    /// A flow between two hosts is counted by both, so the larger count is that of the flow.
    fn larger(self, other: Self) -> Self {
        Self {
            opened: self.opened.max(other.opened),
            sent_bytes: self.sent_bytes.max(other.sent_bytes),
            received_bytes: self.received_bytes.max(other.received_bytes),
            drops: self.drops.max(other.drops),
        }
    }
}

/// A flow.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct FlowRow {
    /// The source: its name, or else its address.
    pub(crate) from: String,
    /// The destination that the source knows.
    pub(crate) to: String,
    /// The destination port and the protocol.
    pub(crate) port: String,
    /// The backend of a Service or a published port. Empty if there is none.
    pub(crate) backend: String,
    /// What became of it.
    pub(crate) verdict: FlowVerdict,
    /// The hosts that saw it.
    pub(crate) hosts: Vec<String>,
    /// What decides. Empty: no policy is about it.
    pub(crate) why: String,
    /// What was seen of it last.
    pub(crate) per_second: FlowRates,
    /// Connections that began, or packets that were dropped, since flows are watched.
    pub(crate) total: u64,
}

/// Source, destination, port and whether it was dropped. Addresses of both families of one endpoint are one end.
type Key = (String, String, String, bool);

#[derive(Debug)]
struct Seen {
    flow: Flow,
    at: Instant,
    by: BTreeMap<String, Counted>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counted {
    total: u64,
    rates: FlowRates,
    /// The number of the second of its host in which it was counted.
    second: u64,
}

#[derive(Debug, Default)]
struct Watched {
    time_ms: u64,
    second: u64,
    note: Option<String>,
}

/// The flows of the last seconds.
#[derive(Debug, Default)]
pub(crate) struct FlowTable {
    flows: BTreeMap<Key, Seen>,
    hosts: BTreeMap<String, Watched>,
}

impl FlowTable {
    /// Takes what a host saw since it last said something.
    pub(crate) fn take(&mut self, seen: Flows, at: Instant) {
        let Flows { host, time_ms, flows, incomplete, error } = seen;
        self.flows.retain(|_, seen| at.saturating_duration_since(seen.at) < KEPT);
        let watched = self.hosts.entry(host.clone()).or_default();
        let passed_ms = time_ms.saturating_sub(watched.time_ms);
        // The first time is not known; a host says something each second, or later if a client is slow.
        let seconds = if watched.time_ms == 0 { 1.0 } else { (passed_ms as f64 / 1e3).clamp(0.5, 60.0) };
        watched.time_ms = time_ms;
        watched.second += 1;
        watched.note = error.or_else(|| incomplete.then(|| "more flows than are shown".to_owned()));
        let second = watched.second;
        for flow in flows {
            let is_dropped = flow.verdict == FlowVerdict::Dropped;
            let name = |name: &Option<String>, address: IpAddr| end(name.as_ref(), address);
            let key =
                (name(&flow.from_name, flow.from), name(&flow.to_name, flow.to), port(&flow), is_dropped);
            if self.flows.len() >= MOST && !self.flows.contains_key(&key) {
                watched.note = Some("more flows than are shown".to_owned());
                continue;
            }
            let rate = |count: u64| count as f64 / seconds;
            let rates = FlowRates {
                opened: rate(flow.opened),
                sent_bytes: rate(flow.sent_bytes.unwrap_or(0)),
                received_bytes: rate(flow.received_bytes.unwrap_or(0)),
                drops: rate(flow.dropped),
            };
            let count = if is_dropped { flow.dropped } else { flow.opened };
            let seen =
                self.flows.entry(key).or_insert_with(|| Seen { flow: flow.clone(), at, by: BTreeMap::new() });
            (seen.flow, seen.at) = (flow, at);
            let counted = seen.by.entry(host.clone()).or_default();
            let others = if counted.second == second { counted.rates } else { FlowRates::default() };
            let total = counted.total.saturating_add(count);
            *counted = Counted { total, rates: others.plus(rates), second };
        }
    }

    /// Returns the rows, and what is to be said of hosts.
    pub(crate) fn rows(&self) -> (Vec<FlowRow>, String) {
        let rows = self.flows.values().map(|Seen { flow, by, .. }| {
            // What a host did not see in its last second is 0 now.
            let is_new = |host: &str, counted: &Counted| {
                self.hosts.get(host).is_some_and(|watched| watched.second == counted.second)
            };
            let now = by.iter().filter(|(host, counted)| is_new(host, counted));
            FlowRow {
                from: end(flow.from_name.as_ref(), flow.from),
                to: end(flow.to_name.as_ref(), flow.to),
                port: port(flow),
                backend: backend(flow),
                verdict: flow.verdict,
                hosts: by.keys().cloned().collect(),
                why: flow.why.clone().unwrap_or_default(),
                per_second: now.fold(FlowRates::default(), |sum, (_, counted)| sum.larger(counted.rates)),
                total: by.values().map(|counted| counted.total).max().unwrap_or(0),
            }
        });
        let notes = self
            .hosts
            .iter()
            .filter_map(|(host, watched)| Some(format!("{host}: {}", watched.note.as_ref()?)));
        (rows.collect(), notes.collect::<Vec<_>>().join("; "))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a host saw of a connection from `a` to `b`, and of one that was dropped.
    pub(crate) fn seen(host: &str, time_ms: u64) -> Flows {
        let flow = Flow {
            from: [10, 1, 0, 2].into(),
            from_name: Some("default/a".to_owned()),
            to: [10, 1, 0, 3].into(),
            to_name: Some("default/b".to_owned()),
            protocol: "TCP".to_owned(),
            port: Some(80),
            backend: None,
            backend_name: None,
            verdict: FlowVerdict::Passed,
            policies: Vec::new(),
            why: None,
            opened: 4,
            closed: 4,
            dropped: 0,
            sent_bytes: Some(2000),
            received_bytes: Some(500_000),
        };
        let dropped = Flow {
            verdict: FlowVerdict::Dropped,
            port: Some(81),
            why: Some("no ingress rule of default/only-api lets it pass".to_owned()),
            opened: 0,
            dropped: 6,
            sent_bytes: None,
            received_bytes: None,
            ..flow.clone()
        };
        Flows { host: host.to_owned(), time_ms, flows: vec![flow, dropped], ..Flows::default() }
    }

    #[test]
    fn flow_that_two_hosts_see_is_one_row_with_the_rate_of_its_last_second() {
        let mut table = FlowTable::default();
        let at = Instant::now();
        for time_ms in [1_000, 3_000] {
            table.take(seen("h1", time_ms), at);
            table.take(seen("h2", time_ms), at);
        }
        let (rows, note) = table.rows();
        assert_eq!((rows.len(), note.as_str()), (2, ""));
        assert_eq!((rows[0].hosts.len(), rows[0].total), (2, 8));
        let expected = FlowRates { opened: 2.0, sent_bytes: 1000.0, received_bytes: 250_000.0, drops: 0.0 };
        assert_eq!(rows[0].per_second, expected);
        assert_eq!((rows[1].per_second.drops, rows[1].total), (3.0, 12));
        // Addresses of both families are one row.
        let mut both = seen("h1", 4_000);
        let first = both.flows[0].clone();
        both.flows = vec![Flow { from: "fd01::2".parse().unwrap(), ..first.clone() }, first];
        let mut other = FlowTable::default();
        other.take(both, at);
        assert_eq!((other.rows().0.len(), other.rows().0[0].per_second.opened), (1, 8.0));
        // A second without it.
        for host in ["h1", "h2"] {
            table.take(Flows { flows: Vec::new(), ..seen(host, 4_000) }, at);
        }
        let (rows, _) = table.rows();
        assert_eq!((rows[0].per_second, rows[0].total), (FlowRates::default(), 8));
        table.take(Flows { flows: Vec::new(), ..seen("h1", 5_000) }, at + KEPT);
        assert!(table.rows().0.is_empty());
    }

    #[test]
    fn flows_are_bounded_and_hosts_without_any_are_named() {
        let mut table = FlowTable::default();
        let mut flows = seen("h1", 1_000);
        let first = flows.flows[0].clone();
        flows.flows = (0..3000).map(|port| Flow { port: Some(port), ..first.clone() }).collect();
        table.take(flows, Instant::now());
        let gone = Flows { host: "h2".to_owned(), error: Some("gone".to_owned()), ..Flows::default() };
        table.take(gone, Instant::now());
        let (rows, note) = table.rows();
        assert_eq!((rows.len(), note.as_str()), (MOST, "h1: more flows than are shown; h2: gone"));
    }
}
