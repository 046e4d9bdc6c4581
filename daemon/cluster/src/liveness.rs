//! The verdict on a host's liveness, from gossip, the presence in its record, and whether its kernel answers probes.

use ovl_proto::record::PeerState;
use ovl_proto::record::Presence;

/// How long an answered probe proves that the kernel is up, in milliseconds. Probes are sent every
/// [`PROBE_INTERVAL_MS`], so several must be lost in a row before a host is dead.
pub const PROBE_VALID_MS: u64 = 1600;
/// The interval between two probes of a silent host, in milliseconds.
pub const PROBE_INTERVAL_MS: u64 = 400;
/// The silence after which a host is probed, in milliseconds. It is well below the timeout of gossip, so that the
/// result is available by then.
pub const PROBE_AFTER_MS: u64 = 1200;
/// How long after the next answer to a ping was due a host is probed, in milliseconds. In large clusters, pings are rarer than
/// [`PROBE_AFTER_MS`], and a host that is not late needs no probe.
const PROBE_LATE_MS: u64 = 500;
/// The maximum number of hosts that are probed at once, several times a second. Where more are silent, this host or the
/// network is overloaded, or they are all cut off.
pub const MAX_PROBES: usize = 12;

/// Whether a host that has answered a ping this long ago is late, so that it is probed. `ping_every_ms` is the interval
/// between pings. Both are in milliseconds.
pub fn is_late(silent_ms: u64, ping_every_ms: u64) -> bool {
    silent_ms >= PROBE_AFTER_MS.max(ping_every_ms.saturating_add(PROBE_LATE_MS))
}

/// How long an announced restart is believed, in milliseconds, even if a firewall blocks the probes.
pub const RESTART_MS: u64 = 10_000;

/// The evidence about a peer's liveness. Times are milliseconds of one clock that never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signs {
    /// Whether gossip considers it alive.
    pub gossip: bool,
    /// The time since which gossip does not; meaningless while it does.
    pub silent_since: u64,
    /// The time of the last answer of its kernel to a probe.
    pub probed_at: Option<u64>,
}

/// Returns the verdict. `keep_ms` limits how long a host stays suspect if its kernel answers but its daemon does not.
pub fn judge(signs: Signs, presence: Presence, now: u64, keep_ms: u64) -> PeerState {
    if presence == Presence::Left {
        return PeerState::Left;
    }
    if signs.gossip && presence == Presence::Running {
        return PeerState::Alive;
    }
    // Gossip may consider a restarting host alive for a while.
    if signs.gossip {
        return PeerState::Suspect;
    }
    let silent = now.saturating_sub(signs.silent_since);
    let answers = signs.probed_at.is_some_and(|at| now.saturating_sub(at) <= PROBE_VALID_MS);
    let believed = presence == Presence::Restarting && silent <= RESTART_MS;
    if (answers || believed) && silent <= keep_ms { PeerState::Suspect } else { PeerState::Dead }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: u64 = 300_000;

    #[test]
    fn host_is_probed_when_an_answer_is_overdue_and_before_gossip_gives_it_up() {
        assert!(!is_late(1199, 600) && is_late(1200, 600));
        assert!(!is_late(1999, 1500) && is_late(2000, 1500));
    }

    #[test]
    fn silent_host_is_suspect_while_its_kernel_answers() {
        let mut signs = Signs { gossip: true, silent_since: 0, probed_at: None };
        assert_eq!(judge(signs, Presence::Running, 1000, KEEP), PeerState::Alive);
        signs = Signs { gossip: false, silent_since: 2000, probed_at: Some(4000) };
        assert_eq!(judge(signs, Presence::Running, 4500, KEEP), PeerState::Suspect);
        assert_eq!(judge(signs, Presence::Running, 4000 + PROBE_VALID_MS + 1, KEEP), PeerState::Dead);
    }

    #[test]
    fn announced_restart_is_believed_for_a_while() {
        let signs = Signs { gossip: false, silent_since: 1000, probed_at: None };
        assert_eq!(judge(signs, Presence::Restarting, 1000 + RESTART_MS, KEEP), PeerState::Suspect);
        assert_eq!(judge(signs, Presence::Restarting, 1001 + RESTART_MS, KEEP), PeerState::Dead);
        assert_eq!(judge(signs, Presence::Running, 1001, KEEP), PeerState::Dead);
    }

    #[test]
    fn suspect_host_is_dead_after_the_limit() {
        let signs = Signs { gossip: false, silent_since: 0, probed_at: Some(KEEP + 1) };
        assert_eq!(judge(signs, Presence::Restarting, KEEP + 1, KEEP), PeerState::Dead);
    }

    #[test]
    fn host_that_left_is_left_even_while_it_gossips() {
        let signs = Signs { gossip: true, silent_since: 0, probed_at: Some(1) };
        assert_eq!(judge(signs, Presence::Left, 1, KEEP), PeerState::Left);
    }
}
