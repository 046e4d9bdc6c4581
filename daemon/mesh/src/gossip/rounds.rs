//! How often chitchat's rounds of gossip are sent.
//!
//! A round names all hosts to three others, and each answers with as much, so it costs more the more hosts there are.
//! Most rounds bring nothing: records seldom change, and whether a host is alive is decided by signed answers to pings.
//! So while nothing changes, a round is let through only now and then, such that what a host sends does not grow with
//! the number of hosts. After a change, all rounds are let through for a while, in a large cluster as many as are needed
//! to spread it.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long all rounds are sent after a change.
const LIVELY_FOR: Duration = Duration::from_secs(5);
/// With up to this many hosts, all rounds are sent after a change.
const LIVELY_HOSTS: usize = 10;
/// The interval between rounds after a change, for each further host. A host sends its changes to the others itself, so
/// rounds bring only what was lost, and hosts that others have heard of first.
const LIVELY_EACH: Duration = Duration::from_millis(100);
/// The maximum of that interval.
const MAX_LIVELY: Duration = Duration::from_millis(1500);
/// The interval between rounds while nothing changes, for each host of the cluster.
const CALM_EACH: Duration = Duration::from_millis(80);
/// The minimum of that interval.
const MIN_CALM: Duration = Duration::from_millis(500);
/// The time for which messages belong to one round.
const ROUND: Duration = Duration::from_millis(50);
/// The maximum number of addresses that are waited for.
const MAX_ASKED: usize = 1024;

/// Which first messages of an exchange are sent.
#[derive(Debug)]
pub(super) struct Rounds {
    /// Addresses that this host has a reason to gossip with.
    asked: HashSet<SocketAddr>,
    lively_until: Instant,
    /// The end of the round in progress.
    open_until: Instant,
    /// When the last round began.
    last: Option<Instant>,
}

impl Rounds {
    pub(super) fn new(now: Instant) -> Self {
        Self { asked: HashSet::new(), lively_until: now + LIVELY_FOR, open_until: now, last: None }
    }

    /// Notes that the record of a host has changed.
    pub(super) fn stir(&mut self, now: Instant) {
        self.lively_until = now + LIVELY_FOR;
    }

    /// Notes that the next exchange with an address is wanted at once.
    pub(super) fn ask(&mut self, to: SocketAddr) {
        if self.asked.len() >= MAX_ASKED {
            self.asked.clear();
        }
        self.asked.insert(to);
    }

    /// Whether the first message of an exchange is sent to an address now. `hosts` is the number of known hosts.
    pub(super) fn permits(&mut self, to: SocketAddr, hosts: usize, now: Instant) -> bool {
        if self.asked.remove(&to) || now < self.open_until {
            return true;
        }
        let times = |hosts: usize| u32::try_from(hosts).unwrap_or(u32::MAX);
        let every = if now < self.lively_until {
            (LIVELY_EACH * times(hosts.saturating_sub(LIVELY_HOSTS))).min(MAX_LIVELY)
        } else {
            (CALM_EACH * times(hosts)).max(MIN_CALM)
        };
        if self.last.is_some_and(|last| now < last + every) {
            return false;
        }
        self.open_until = now + ROUND;
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7940);

    /// Returns how many rounds of three messages, one each 0.2 s, are sent in a minute.
    fn rounds(rounds: &mut Rounds, hosts: usize, from: Instant) -> usize {
        let mut sent = 0;
        for number in 0..300 {
            let now = from + Duration::from_millis(200) * number;
            let permitted = (0..3).filter(|_| rounds.permits(TO, hosts, now)).count();
            assert!(permitted == 0 || permitted == 3, "a whole round or none");
            sent += permitted / 3;
        }
        sent
    }

    #[test]
    fn what_is_sent_does_not_grow_with_the_hosts_unless_something_changes() {
        let start = Instant::now();
        let mut calm = Rounds::new(start);
        assert_eq!(rounds(&mut calm, 60, start), 4 + 11, "lively at first, then every 4.8 s");
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        assert_eq!(rounds(&mut calm, 8, at(1)), 75);
        assert_eq!(rounds(&mut calm, 100, at(2)), 7);
        calm.stir(at(3));
        let soon = at(3) + MAX_LIVELY;
        assert!(calm.permits(TO, 100, soon) && calm.permits(TO, 100, soon + MAX_LIVELY));
        let mut few = Rounds::new(at(4));
        assert_eq!(rounds(&mut few, LIVELY_HOSTS, at(4)), 25 + 68, "all of them at first, then every 0.8 s");
    }

    #[test]
    fn exchange_with_a_reason_is_sent_at_once_and_only_once() {
        let start = Instant::now();
        let mut calm = Rounds::new(start - LIVELY_FOR);
        assert!(calm.permits(TO, 100, start));
        let later = start + Duration::from_millis(100);
        assert!(!calm.permits(TO, 100, later));
        calm.ask(TO);
        assert!(calm.permits(TO, 100, later) && !calm.permits(TO, 100, later));
    }
}
