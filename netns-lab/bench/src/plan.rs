//! How much is measured.

use std::time::Duration;

use serde_json::{Value, json};

/// Counts and durations of all figures.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) quick: bool,
    /// How long each TCP stream runs.
    pub stream: Duration,
    /// How often each path gets its turn.
    pub(crate) turns: usize,
    pub(crate) announces: usize,
    pub(crate) bulk: usize,
    pub(crate) bulk_rounds: usize,
    pub(crate) attaches: usize,
    /// Those by `ovlctl`.
    pub(crate) attach_processes: usize,
    pub(crate) deaths: usize,
    /// How long gossip loses datagrams.
    pub loss: Duration,
    pub(crate) settle: Duration,
    pub(crate) idle: Duration,
    /// How long the daemon is away, in each round.
    pub(crate) away: Vec<Duration>,
    /// Of `bench cni`: pods that stand at the same time when they come one by one, and how often
    /// they come and go.
    pub(crate) pods: usize,
    pub(crate) pod_rounds: usize,
    /// Those that come eight at once: no more than an empty host's first block holds.
    pub(crate) at_once_pods: usize,
    pub(crate) at_once_rounds: usize,
    /// The reference plugins take their time.
    pub(crate) reference_rounds: usize,
    pub(crate) versions: usize,
    /// Pods that come and go in a row.
    pub(crate) soak: usize,
    /// Of `bench tunnel`: how often each contender gets its turn.
    pub(crate) tunnel_turns: usize,
    /// In each of those turns.
    pub(crate) round_trips: usize,
    /// Of a stream under which memory is looked at, and how many there are.
    pub(crate) load: Duration,
    pub(crate) load_turns: usize,
    /// Of `bench docker`: containers by turns, containers whose links are watched, addresses that are
    /// pinged, and cuts.
    pub(crate) docker_runs: usize,
    pub(crate) docker_links: usize,
    pub(crate) docker_pings: usize,
    pub(crate) docker_cuts: usize,
    /// Of `bench publish`: ports that are there, those that come one by one, and connections each way.
    pub(crate) published: u16,
    pub(crate) publishes: usize,
    pub(crate) connects: usize,
    /// Of `bench policy`: pods on all hosts, groups of them with policies of their own, rounds with and without, and
    /// attaches in each.
    pub(crate) policy_pods: usize,
    pub(crate) policy_groups: usize,
    pub(crate) policy_rounds: usize,
    pub(crate) policy_attaches: usize,
    /// Of `bench services`: Services that are there, how often they are loaded, and backends that come or go.
    pub(crate) services: usize,
    pub(crate) service_loads: usize,
    pub(crate) service_changes: usize,
}

impl Plan {
    /// What the figures are to be taken with.
    pub fn full() -> Self {
        Plan {
            quick: false,
            stream: Duration::from_secs(2),
            turns: 16,
            announces: 240,
            bulk: 1000,
            bulk_rounds: 3,
            attaches: 300,
            attach_processes: 30,
            deaths: 5,
            loss: Duration::from_secs(300),
            settle: Duration::from_secs(20),
            idle: Duration::from_secs(30),
            // Longer than a host is silent before it is judged, too.
            away: [0, 200, 1000, 3000, 8000].map(Duration::from_millis).to_vec(),
            pods: 100,
            pod_rounds: 6,
            at_once_pods: 240,
            at_once_rounds: 10,
            reference_rounds: 1,
            versions: 300,
            soak: 10_000,
            tunnel_turns: 9,
            round_trips: 10_000,
            load: Duration::from_secs(10),
            load_turns: 3,
            docker_runs: 30,
            docker_links: 40,
            docker_pings: 25,
            docker_cuts: 6,
            published: 1000,
            publishes: 200,
            connects: 2000,
            policy_pods: 10_000,
            policy_groups: 340,
            policy_rounds: 3,
            policy_attaches: 100,
            services: 10_000,
            service_loads: 3,
            service_changes: 200,
        }
    }

    /// All of it once, in less than a minute: whether it works, not how well.
    pub fn quick() -> Self {
        Plan {
            quick: true,
            stream: Duration::from_secs(1),
            turns: 1,
            announces: 16,
            bulk: 50,
            bulk_rounds: 1,
            attaches: 20,
            attach_processes: 3,
            deaths: 1,
            loss: Duration::from_secs(5),
            settle: Duration::from_secs(1),
            idle: Duration::from_secs(2),
            away: vec![Duration::from_millis(200)],
            pods: 20,
            pod_rounds: 1,
            at_once_pods: 40,
            at_once_rounds: 1,
            reference_rounds: 1,
            versions: 20,
            soak: 200,
            tunnel_turns: 1,
            round_trips: 500,
            load: Duration::from_secs(1),
            load_turns: 1,
            docker_runs: 2,
            docker_links: 3,
            docker_pings: 2,
            docker_cuts: 1,
            published: 100,
            publishes: 10,
            connects: 100,
            policy_pods: 160,
            policy_groups: 30,
            policy_rounds: 1,
            policy_attaches: 10,
            services: 500,
            service_loads: 1,
            service_changes: 10,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "quick": self.quick,
            "stream_s": self.stream.as_secs_f64(),
            "turns": self.turns,
            "announces": self.announces,
            "bulk_endpoints": self.bulk,
            "bulk_rounds": self.bulk_rounds,
            "attaches": self.attaches,
            "attach_processes": self.attach_processes,
            "deaths": self.deaths,
            "loss_s": self.loss.as_secs_f64(),
            "settle_s": self.settle.as_secs_f64(),
            "idle_s": self.idle.as_secs_f64(),
            "away_s": self.away.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
            "pods": self.pods,
            "pod_rounds": self.pod_rounds,
            "at_once_pods": self.at_once_pods,
            "at_once_rounds": self.at_once_rounds,
            "reference_rounds": self.reference_rounds,
            "versions": self.versions,
            "soak": self.soak,
            "tunnel_turns": self.tunnel_turns,
            "round_trips": self.round_trips,
            "load_s": self.load.as_secs_f64(),
            "load_turns": self.load_turns,
            "docker_runs": self.docker_runs,
            "docker_links": self.docker_links,
            "docker_pings": self.docker_pings,
            "docker_cuts": self.docker_cuts,
            "published": self.published,
            "publishes": self.publishes,
            "connects": self.connects,
            "policy_pods": self.policy_pods,
            "policy_groups": self.policy_groups,
            "policy_rounds": self.policy_rounds,
            "policy_attaches": self.policy_attaches,
            "services": self.services,
            "service_loads": self.service_loads,
            "service_changes": self.service_changes,
        })
    }
}
