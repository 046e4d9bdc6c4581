//! Counts and durations of the measurements.

use std::time::Duration;

use serde_json::{Value, json};

/// Counts and durations of all figures.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) quick: bool,
    /// Length of one TCP stream.
    pub stream: Duration,
    /// Number of rounds of each path.
    pub(crate) turns: usize,
    pub(crate) announces: usize,
    pub(crate) bulk: usize,
    pub(crate) bulk_rounds: usize,
    pub(crate) attaches: usize,
    /// Number of attaches with `ovlctl`.
    pub(crate) attach_processes: usize,
    pub(crate) deaths: usize,
    /// How long gossip loses datagrams.
    pub loss: Duration,
    pub(crate) settle: Duration,
    pub(crate) idle: Duration,
    /// How long the daemon is down in each round.
    pub(crate) away: Vec<Duration>,
    /// `bench cni`: number of pods that are added one by one, and the number of rounds.
    pub(crate) pods: usize,
    pub(crate) pod_rounds: usize,
    /// `bench cni`: number of pods added eight at a time, at most the size of a host's first block.
    pub(crate) at_once_pods: usize,
    pub(crate) at_once_rounds: usize,
    /// `bench cni`: number of rounds of the reference plugins, which are slow.
    pub(crate) reference_rounds: usize,
    pub(crate) versions: usize,
    /// `bench cni`: number of pods added and deleted in sequence.
    pub(crate) soak: usize,
    /// `bench tunnel`: number of rounds of each contender.
    pub(crate) tunnel_turns: usize,
    /// `bench tunnel`: number of round trips in each round.
    pub(crate) round_trips: usize,
    /// `bench tunnel`: length and number of the streams during which memory is measured.
    pub(crate) load: Duration,
    pub(crate) load_turns: usize,
    /// `bench docker`: number of alternating containers, of containers whose links are watched, of pinged
    /// addresses, and of disconnections.
    pub(crate) docker_runs: usize,
    pub(crate) docker_links: usize,
    pub(crate) docker_pings: usize,
    pub(crate) docker_cuts: usize,
    /// `bench publish`: number of existing ports, of ports added one by one, and of connections of each kind.
    pub(crate) published: u16,
    pub(crate) publishes: usize,
    pub(crate) connects: usize,
    /// `bench policy`: number of pods on all hosts, of groups with their own policies, of rounds with and
    /// without policies, and of attaches in each round.
    pub(crate) policy_pods: usize,
    pub(crate) policy_groups: usize,
    pub(crate) policy_rounds: usize,
    pub(crate) policy_attaches: usize,
    /// `bench services`: number of Services, of loads, and of backend changes.
    pub(crate) services: usize,
    pub(crate) service_loads: usize,
    pub(crate) service_changes: usize,
    /// `bench path`: number of rounds, and length of a turn.
    pub(crate) path_rounds: usize,
    pub(crate) path_turn: Duration,
    /// `bench grow`: number of hosts, and of Services applied.
    pub(crate) grow_hosts: usize,
    pub(crate) grow_services: usize,
    /// `bench kube`: number of Services, each with ten endpoints.
    pub(crate) kube_services: usize,
}

impl Plan {
    /// Returns the plan of a full measurement.
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
            // Including more than the time after which a silent host is judged.
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
            path_rounds: 6,
            path_turn: Duration::from_millis(700),
            grow_hosts: 60,
            grow_services: 2000,
            kube_services: 5000,
        }
    }

    /// Returns the plan of a smoke test: every figure once, in less than a minute.
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
            path_rounds: 1,
            path_turn: Duration::from_millis(200),
            grow_hosts: 6,
            grow_services: 50,
            kube_services: 100,
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
            "grow_hosts": self.grow_hosts,
            "grow_services": self.grow_services,
            "kube_services": self.kube_services,
        })
    }
}
