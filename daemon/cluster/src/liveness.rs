//! Whether a host is alive, expected back, or gone: out of gossip, of what the host said when it
//! stopped, and of whether its kernel still answers a probe.

use ovl_proto::record::PeerState;
use ovl_proto::record::Presence;

/// A probe that succeeded within this time says that the kernel is there, in milliseconds. Probes
/// go out every [`PROBE_INTERVAL_MS`], so several must be lost in a row before a host is dead.
pub const PROBE_VALID_MS: u64 = 1600;
/// Between two probes of a host that is silent, in milliseconds.
pub const PROBE_INTERVAL_MS: u64 = 400;
/// A host that was not heard for this long is probed, in milliseconds: well before gossip gives it
/// up, so that the answer is at hand then.
pub const PROBE_AFTER_MS: u64 = 1200;

/// A host that said it restarts is believed for this long, in milliseconds, even where a firewall
/// keeps its kernel from answering probes.
pub const RESTART_MS: u64 = 10_000;

/// What is known about one peer. Times are in milliseconds of one clock that never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signs {
    /// Gossip counts it among the living.
    pub gossip: bool,
    /// Since when gossip does not; meaningless while it does.
    pub silent_since: u64,
    /// When its kernel last answered a probe.
    pub probed_at: Option<u64>,
}

/// The verdict. `keep_ms` bounds how long a host is kept whose kernel answers and whose daemon
/// does not.
pub fn judge(signs: Signs, presence: Presence, now: u64, keep_ms: u64) -> PeerState {
    if presence == Presence::Left {
        return PeerState::Left;
    }
    if signs.gossip && presence == Presence::Running {
        return PeerState::Alive;
    }
    // A host that says it restarts may be counted among the living by gossip for a while more.
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
    fn a_daemon_that_is_gone_is_suspect_while_its_kernel_answers() {
        let mut signs = Signs { gossip: true, silent_since: 0, probed_at: None };
        assert_eq!(judge(signs, Presence::Running, 1000, KEEP), PeerState::Alive);
        signs = Signs { gossip: false, silent_since: 2000, probed_at: Some(4000) };
        assert_eq!(judge(signs, Presence::Running, 4500, KEEP), PeerState::Suspect);
        assert_eq!(judge(signs, Presence::Running, 4000 + PROBE_VALID_MS + 1, KEEP), PeerState::Dead);
    }

    #[test]
    fn a_restart_that_was_announced_is_believed_for_a_while() {
        let signs = Signs { gossip: false, silent_since: 1000, probed_at: None };
        assert_eq!(judge(signs, Presence::Restarting, 1000 + RESTART_MS, KEEP), PeerState::Suspect);
        assert_eq!(judge(signs, Presence::Restarting, 1001 + RESTART_MS, KEEP), PeerState::Dead);
        assert_eq!(judge(signs, Presence::Running, 1001, KEEP), PeerState::Dead);
    }

    #[test]
    fn it_is_not_kept_for_ever() {
        let signs = Signs { gossip: false, silent_since: 0, probed_at: Some(KEEP + 1) };
        assert_eq!(judge(signs, Presence::Restarting, KEEP + 1, KEEP), PeerState::Dead);
    }

    #[test]
    fn a_host_that_left_is_gone_whatever_gossip_says() {
        let signs = Signs { gossip: true, silent_since: 0, probed_at: Some(1) };
        assert_eq!(judge(signs, Presence::Left, 1, KEEP), PeerState::Left);
    }
}
