//! Fair shares of the resolver's places for its askers: TCP connections, and queries that wait for upstream servers.
//!
//! [`Places`] decides which connection is admitted and which is closed for it; [`Limited`] remembers which askers used up
//! their shares. Nothing here does I/O.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use ovl_zone::Client;

/// The limit of open connections.
pub(crate) const MAX_CONNECTIONS: usize = 200;
/// The limit of open connections of one asker.
pub(crate) const MAX_CONNECTIONS_EACH: usize = MAX_CONNECTIONS / 8;
/// How long an asker counts as limited after it was last refused a place.
const LIMITED_FOR: Duration = Duration::from_secs(30);
/// The limit of askers that are remembered as limited.
const MAX_LIMITED: usize = 64;

/// The number of a connection, unique in one run of the engine.
pub(crate) type Connection = u64;

/// A connection in a place.
#[derive(Debug)]
struct Place {
    asker: Client,
    /// A number that grows with time, of the moment since which no query is being answered. `None` while one is.
    idle_since: Option<u64>,
}

/// The decision about a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It has a place.
    Admitted(Connection),
    /// It has the place of another connection, which must be closed.
    InPlaceOf {
        /// The new connection.
        admitted: Connection,
        /// The connection to close.
        closed: Connection,
        /// The asker who lost a place.
        of: Client,
    },
    /// There is no place: all that it could get are in use.
    Refused,
}

/// The places of open connections.
#[derive(Debug, Default)]
pub(crate) struct Places {
    open: BTreeMap<Connection, Place>,
    /// The last number that was given to a connection or a moment.
    last: u64,
}

impl Places {
    /// Decides about a new connection. An asker whose share is used up loses its connection that was idle for the longest
    /// time. If all places are taken, the asker with the most idle connections loses such a one.
    pub(crate) fn admit(&mut self, asker: Client) -> Admission {
        let own = self.open.values().filter(|place| place.asker == asker).count();
        let loser = if own >= MAX_CONNECTIONS_EACH {
            Some(self.longest_idle(asker))
        } else if self.open.len() >= MAX_CONNECTIONS {
            Some(self.with_most_idle().and_then(|loser| self.longest_idle(loser)))
        } else {
            None
        };
        let closed = match loser {
            Some(None) => return Admission::Refused,
            Some(Some(closed)) => self.open.remove(&closed).map(|place| (closed, place.asker)),
            None => None,
        };
        self.last = self.last.wrapping_add(1);
        let admitted = self.last;
        self.open.insert(admitted, Place { asker, idle_since: Some(admitted) });
        match closed {
            Some((closed, of)) => Admission::InPlaceOf { admitted, closed, of },
            None => Admission::Admitted(admitted),
        }
    }

    /// Records that a query of a connection is being answered, or that none is.
    pub(crate) fn set_busy(&mut self, connection: Connection, busy: bool) {
        self.last = self.last.wrapping_add(1);
        if let Some(place) = self.open.get_mut(&connection) {
            place.idle_since = (!busy).then_some(self.last);
        }
    }

    /// Frees the place of a connection that was closed.
    pub(crate) fn free(&mut self, connection: Connection) {
        self.open.remove(&connection);
    }

    fn idle(&self) -> impl Iterator<Item = (u64, Connection, Client)> {
        self.open.iter().filter_map(|(connection, place)| Some((place.idle_since?, *connection, place.asker)))
    }

    fn longest_idle(&self, asker: Client) -> Option<Connection> {
        let own = self.idle().filter(|(_, _, of)| *of == asker);
        own.min_by_key(|(since, ..)| *since).map(|(_, connection, _)| connection)
    }

    fn with_most_idle(&self) -> Option<Client> {
        let mut counts: HashMap<Client, usize> = HashMap::new();
        for (_, _, asker) in self.idle() {
            let count = counts.entry(asker).or_default();
            *count = count.saturating_add(1);
        }
        counts.into_iter().max_by_key(|(_, count)| *count).map(|(asker, _)| asker)
    }
}

/// What an asker has used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Its TCP connections.
    Connections,
    /// Its queries that wait for upstream servers.
    Queries,
}

/// The askers that used up their shares lately.
#[derive(Debug, Default)]
pub(crate) struct Limited(Vec<(Client, Share, Instant)>);

impl Limited {
    /// Records that an asker was refused a place.
    pub(crate) fn note(&mut self, asker: Client, share: Share, now: Instant) {
        match self.0.iter_mut().find(|(of, what, _)| (*of, *what) == (asker, share)) {
            Some((_, _, last)) => *last = now,
            None => {
                self.0.retain(|(_, _, last)| now.saturating_duration_since(*last) < LIMITED_FOR);
                if self.0.len() < MAX_LIMITED {
                    self.0.push((asker, share, now));
                }
            }
        }
    }

    /// Returns the askers, each with what it has used up.
    pub(crate) fn lately(&self, now: Instant) -> Vec<(Client, Share)> {
        let lately = self.0.iter().filter(|(_, _, last)| now.saturating_duration_since(*last) < LIMITED_FOR);
        lately.map(|(asker, share, _)| (*asker, *share)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(n: u8) -> Client {
        Client::Endpoint([10, 0, 0, n].into())
    }

    fn admit(places: &mut Places, n: u8) -> Connection {
        match places.admit(asker(n)) {
            Admission::Admitted(connection) => connection,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_asker_replaces_its_own_connections_beyond_its_share() {
        let mut places = Places::default();
        let first = admit(&mut places, 1);
        let second = admit(&mut places, 1);
        for _ in 2..MAX_CONNECTIONS_EACH {
            admit(&mut places, 1);
        }
        // The first one was used last.
        places.set_busy(first, true);
        places.set_busy(first, false);
        let replaced = places.admit(asker(1));
        assert!(
            matches!(replaced, Admission::InPlaceOf { closed, of, .. } if closed == second && of == asker(1))
        );
        assert!(matches!(places.admit(asker(2)), Admission::Admitted(_)));
        assert_eq!(places.open.len(), MAX_CONNECTIONS_EACH + 1);
    }

    #[test]
    fn busy_connections_are_not_closed() {
        let mut places = Places::default();
        for _ in 0..MAX_CONNECTIONS_EACH {
            let connection = admit(&mut places, 1);
            places.set_busy(connection, true);
        }
        assert_eq!(places.admit(asker(1)), Admission::Refused);
        let connection = *places.open.keys().next().unwrap();
        places.free(connection);
        assert!(matches!(places.admit(asker(1)), Admission::Admitted(_)));
    }

    #[test]
    fn when_all_places_are_taken_the_asker_with_the_most_idle_ones_loses_one() {
        let mut places = Places::default();
        // Eight askers take all places. The connections of all but the third are busy, but for a few.
        for n in 1..=8 {
            for number in 0..MAX_CONNECTIONS_EACH {
                let connection = admit(&mut places, n);
                places.set_busy(connection, n != 3 && number > 2);
            }
        }
        assert_eq!(places.open.len(), MAX_CONNECTIONS);
        let replaced = places.admit(asker(9));
        assert!(matches!(replaced, Admission::InPlaceOf { of, .. } if of == asker(3)), "{replaced:?}");
        assert_eq!(places.open.len(), MAX_CONNECTIONS);
        places.open.values_mut().for_each(|place| place.idle_since = None);
        assert_eq!(places.admit(asker(10)), Admission::Refused);
    }

    #[test]
    fn limited_askers_are_forgotten_after_a_while() {
        let (mut limited, start) = (Limited::default(), Instant::now());
        limited.note(asker(1), Share::Queries, start);
        limited.note(asker(1), Share::Queries, start + Duration::from_secs(20));
        limited.note(asker(1), Share::Connections, start);
        let at = |seconds| limited.lately(start + Duration::from_secs(seconds));
        assert_eq!(at(29).len(), 2);
        assert_eq!(at(31), [(asker(1), Share::Queries)]);
        assert!(at(51).is_empty());
        for n in 0..=u8::MAX {
            limited.note(asker(n), Share::Queries, start);
        }
        assert_eq!(limited.0.len(), MAX_LIMITED);
    }
}
