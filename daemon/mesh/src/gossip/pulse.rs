//! The timer of gossip: sends pings and path MTU probes, and dials hosts that are not alive.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::cluster::Cluster;
use super::hub::Hub;

const TICK: Duration = Duration::from_millis(200);
/// The interval during a path MTU search, and the shortest one while pings are repeated.
const SHORT_TICK: Duration = Duration::from_millis(20);
/// The maximum number of dials in one tick: 20 a second.
const MAX_DIALS: usize = 4;
const DIAL_EVERY: Duration = Duration::from_secs(1);
/// How often each host to join is asked where it sees this host, after it was named, and the interval. Some are lost.
const ASKS: u32 = 8;
const ASK_EVERY: Duration = Duration::from_millis(400);
/// The interval at which names are resolved again, because their addresses may change.
const RESOLVE_EVERY: Duration = Duration::from_secs(30);
/// The interval after a failed resolution.
const RESOLVE_AGAIN: Duration = Duration::from_secs(3);
/// The maximum number of addresses of a name.
const MAX_ADDRESSES: usize = 16;

/// The configured addresses of hosts to join.
pub(super) struct Seeds {
    /// The addresses that this host listens on.
    own: Vec<SocketAddr>,
    addresses: Mutex<Vec<Seed>>,
    changed: Notify,
}

struct Seed {
    name: String,
    addr: SocketAddr,
    next_dial: Instant,
    /// How often it is yet to be asked where it sees this host, and when next.
    asks: u32,
    next_ask: Instant,
}

impl Seeds {
    pub(super) fn new(listen: SocketAddr, also: Option<SocketAddr>) -> Self {
        Self {
            own: [listen].into_iter().chain(also).collect(),
            addresses: Mutex::new(Vec::new()),
            changed: Notify::new(),
        }
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let seeds = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        seeds.iter().map(|seed| seed.addr).collect()
    }

    /// The addresses to dial now. Addresses of live peers are skipped.
    fn due(&self, hub: &Hub, now: Instant, most: usize) -> Vec<SocketAddr> {
        let mut seeds = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let state = hub.lock();
        let due = seeds.iter_mut().filter(|seed| now >= seed.next_dial && !state.is_alive_at(seed.addr));
        let mut due: Vec<&mut Seed> = due.collect();
        due.sort_by_key(|seed| seed.next_dial);
        let dial = |seed: &mut Seed| {
            seed.next_dial = now + DIAL_EVERY;
            seed.addr
        };
        due.into_iter().take(most).map(dial).collect()
    }

    /// The addresses to ask now where they see this host.
    fn asked(&self, now: Instant) -> Vec<SocketAddr> {
        let mut seeds = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let due = seeds.iter_mut().filter(|seed| seed.asks > 0 && now >= seed.next_ask).take(MAX_DIALS);
        due.map(|seed| {
            (seed.asks, seed.next_ask) = (seed.asks - 1, now + ASK_EVERY);
            seed.addr
        })
        .collect()
    }

    fn set(&self, name: &str, found: impl Iterator<Item = SocketAddr>) {
        let mut seeds = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        seeds.retain(|seed| seed.name != name);
        let now = Instant::now();
        let mut found =
            found.filter(|addr| self.own.iter().any(|own| addr.is_ipv4() == own.is_ipv4())).peekable();
        if found.peek().is_none() && !name.is_empty() {
            let family = if self.own.iter().any(SocketAddr::is_ipv4) { "IPv4" } else { "IPv6" };
            warn!(%name, "ignored an address to join: it is not {family}, the family of this host's address");
        }
        let usable = found.filter(|addr| !self.own.contains(addr));
        seeds.extend(usable.take(MAX_ADDRESSES).map(|addr| Seed {
            name: name.to_owned(),
            addr,
            next_dial: now,
            asks: ASKS,
            next_ask: now,
        }));
        drop(seeds);
        self.changed.notify_one();
    }

    /// Sets the hosts that were found otherwise than by a name. Of many, the first ones are used.
    pub(super) fn set_found(&self, found: &[SocketAddr]) {
        self.set("", found.iter().copied());
    }

    /// Resolves an entry repeatedly. Returns at once for an address.
    pub(super) async fn resolve(self: Arc<Self>, name: String) {
        loop {
            let wait = match tokio::net::lookup_host(&name).await {
                Ok(found) => {
                    self.set(&name, found);
                    RESOLVE_EVERY
                }
                Err(error) => {
                    // The earlier addresses remain in use.
                    warn!(%name, %error, "cannot resolve an address to join; retrying");
                    RESOLVE_AGAIN
                }
            };
            if name.parse::<SocketAddr>().is_ok() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// Runs the timer forever.
pub(super) async fn run(hub: Arc<Hub>, cluster: Arc<Cluster>, seeds: Arc<Seeds>) {
    let mut next_tick = Instant::now();
    loop {
        let now = Instant::now();
        let (due, searching) = {
            let mut state = hub.lock();
            (state.book.due(now), state.book.is_searching())
        };
        if !due.is_empty() {
            hub.send_due(due);
        }
        if now >= next_tick {
            hub.lock().book.note_lateness(now - next_tick);
            next_tick = now + TICK;
            dial(&hub, &cluster, &seeds, now);
            hub.try_others(now);
            hub.lock().expire(now);
            hub.news.notify_one();
        }
        let tick = next_tick.saturating_duration_since(now);
        let hurry = hub.lock().book.next_hurry().map(|at| at.saturating_duration_since(now).max(SHORT_TICK));
        let wait = if searching { SHORT_TICK } else { hurry.map_or(tick, |hurry| hurry.min(tick)) };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = seeds.changed.notified() => {}
        }
    }
}

fn dial(hub: &Hub, cluster: &Cluster, seeds: &Seeds, now: Instant) {
    // Once a second or so: chitchat chooses its partners by heartbeats, which any host with the cluster key can forge.
    let partner = hub.lock().book.next_known();
    partner.into_iter().for_each(|to| cluster.gossip(to));
    let known = hub.lock().book.dials(now, MAX_DIALS);
    let more = seeds.due(hub, now, MAX_DIALS.saturating_sub(known.len()));
    for to in more {
        debug!(%to, "dialling");
        // It challenges the sender. Gossip with it begins when it has proved to be live itself, and not once for each time
        // that it is dialled: what it knows may be much.
        hub.introduce_self(to);
    }
    hub.send_due(known);
    seeds.asked(now).into_iter().for_each(|to| hub.ask_where(to));
}

/// The host and port of an entry, with the default port if it has none.
pub(super) fn with_port(entry: &str) -> String {
    use std::net::IpAddr;
    let default = ovl_proto::DEFAULT_PORT;
    if let Ok(addr) = entry.parse::<SocketAddr>() {
        return addr.to_string();
    }
    if let Ok(ip) = entry.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return SocketAddr::new(ip, default).to_string();
    }
    match entry.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => entry.to_owned(),
        _ => format!("{entry}:{default}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_get_the_default_port() {
        for (entry, expected) in [
            ("10.0.0.1", "10.0.0.1:7940"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("fd00::1", "[fd00::1]:7940"),
            ("[fd00::1]", "[fd00::1]:7940"),
            ("[fd00::1]:80", "[fd00::1]:80"),
            ("host.example", "host.example:7940"),
            ("host.example:80", "host.example:80"),
        ] {
            assert_eq!(with_port(entry), expected);
        }
    }
}
