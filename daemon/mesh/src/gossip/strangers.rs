//! Remembers the sources of unauthenticated datagrams and connections with bounded memory, and limits the log lines
//! about them.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

const LOG_EVERY: Duration = Duration::from_secs(60);
const MAX_SOURCES: usize = 1024;
const MAX_RECENT: usize = 16;

/// The sources of datagrams or connections that did not authenticate.
#[derive(Debug, Default)]
pub(crate) struct Strangers {
    logged: HashMap<IpAddr, Instant>,
    recent: VecDeque<IpAddr>,
}

impl Strangers {
    /// Remembers a source. Returns whether to log it: at most once a minute.
    pub(crate) fn note(&mut self, source: IpAddr, now: Instant) -> bool {
        if self.recent.back() != Some(&source) {
            self.recent.retain(|known| *known != source);
            if self.recent.len() >= MAX_RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(source);
        }
        if self.logged.get(&source).is_some_and(|&last| now.saturating_duration_since(last) < LOG_EVERY) {
            return false;
        }
        if self.logged.len() >= MAX_SOURCES {
            self.logged.retain(|_, last| now.saturating_duration_since(*last) < LOG_EVERY);
            if self.logged.len() >= MAX_SOURCES {
                // So many sources are forged, and a line for each would flood the log.
                return false;
            }
        }
        self.logged.insert(source, now);
        true
    }

    /// The latest sources, without duplicates.
    pub(crate) fn recent(&self) -> Vec<IpAddr> {
        self.recent.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute_and_bounded_memory() {
        let mut strangers = Strangers::default();
        let now = Instant::now();
        let source = IpAddr::from([10, 0, 0, 1]);
        assert!(strangers.note(source, now));
        assert!(!strangers.note(source, now + LOG_EVERY / 2));
        assert!(strangers.note(source, now + LOG_EVERY));
        let lines = (0..10_000_u32).filter(|n| strangers.note(IpAddr::from(n.to_be_bytes()), now)).count();
        assert!(lines < MAX_SOURCES);
        assert_eq!(strangers.recent().len(), MAX_RECENT);
        assert!(strangers.logged.len() <= MAX_SOURCES);
    }
}
