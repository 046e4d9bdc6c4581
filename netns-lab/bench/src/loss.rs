//! `loss`: gossip loses datagrams, and no host may be declared dead.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use netns_lab::Host;
use serde_json::{Value, json};

use super::Bench;
use super::client::Client;
use super::cluster::Cluster;
use super::report::{Bar, Figure, Row};

const HOSTS: usize = 5;
const PERCENT: f64 = 30.0;
const GOSSIP_PORT: u16 = 7940;
const POLL: Duration = Duration::from_secs(1);

/// The verdicts of one host about the other hosts.
#[derive(Default)]
struct Verdicts {
    /// Polls of `peers` that showed a host as dead.
    seen_dead: usize,
    seen_suspect: usize,
    looks: usize,
    /// Events that declared a host dead.
    dead: Vec<String>,
    suspect: usize,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let began_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    cluster.lab.loss_udp_port(PERCENT, GOSSIP_PORT)?;
    let before = datagrams(&cluster)?;

    let (length, hosts) = (bench.plan.loss, cluster.hosts());
    let verdicts = thread::scope(|scope| {
        let threads: Vec<_> =
            hosts.iter().map(|host| scope.spawn(move || observe(host, length, began_ms))).collect();
        let joined = threads.into_iter().map(|each| each.join().unwrap_or_else(|_| Err(anyhow!("panicked"))));
        joined.collect::<Result<Vec<Verdicts>>>()
    })?;
    let after = datagrams(&cluster)?;
    cluster.lab.clear_faults()?;

    let arrived = (after.1 - before.1) / (after.0 - before.0) * 100.0;
    let sum = |of: fn(&Verdicts) -> usize| verdicts.iter().map(of).sum::<usize>();
    let events: Vec<&String> = verdicts.iter().flat_map(|each| &each.dead).collect();
    // Events and polls may each miss what the other one shows.
    let dead = events.len().max(sum(|each| each.seen_dead));
    let suspect = sum(|each| each.suspect).max(sum(|each| each.seen_suspect));
    let notes = events.iter().take(10).map(|event| (*event).clone()).collect();
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with an endpoint each, default settings; {} s in which {PERCENT} % of the datagrams to \
             UDP port {GOSSIP_PORT} are lost, in both directions between all hosts; verdicts of any host about any other, \
             by its events and by `peers` polled once per second ({} polls)",
            length.as_secs(),
            sum(|each| each.looks)
        ),
        rows: vec![
            Row::with_bar("hosts declared dead", dead as f64, "times", Bar::AtMost(0.0)),
            Row::context("hosts suspected", suspect as f64, "times"),
            // Proves that there was loss, by the daemons' own counters.
            Row::context("datagrams of gossip that arrived", arrived, "%"),
        ],
        notes,
        details: json!({
            "dead_events": events,
            "suspect_events": sum(|each| each.suspect),
            "looks": sum(|each| each.looks),
            "dead_in_looks": sum(|each| each.seen_dead),
            "suspect_in_looks": sum(|each| each.seen_suspect),
        }),
    })
}

/// Returns the gossip datagrams that all hosts have sent and received so far.
fn datagrams(cluster: &Cluster) -> Result<(f64, f64)> {
    let (mut sent, mut received) = (0.0, 0.0);
    for index in 0..HOSTS {
        let gossip = cluster.client(index)?.ask(&json!({"request": "status"}))?["gossip"].take();
        sent += gossip["sent"].as_f64().unwrap_or(f64::NAN);
        received += gossip["received"].as_f64().unwrap_or(f64::NAN);
    }
    Ok((sent, received))
}

/// Follows a daemon's events and polls its peers for `length`.
fn observe(host: &Host, length: Duration, began_ms: u64) -> Result<Verdicts> {
    let mut follower = Client::connect(&host.socket())?;
    follower.send(&json!({"request": "events", "follow": true}))?;
    let handle = follower.handle()?;
    // No timeout: a host may have no events for minutes.
    handle.set_read_timeout(None)?;
    let mut asker = Client::connect(&host.socket())?;
    let verdicts = Mutex::new(Verdicts::default());
    thread::scope(|scope| {
        scope.spawn(|| {
            // The connection is closed below, which causes this error.
            while let Ok(events) = follower.next_reply() {
                note_events(host, &events, began_ms, &verdicts);
            }
        });
        let ending = Ending(handle);
        let end = Instant::now() + length;
        while Instant::now() < end {
            note_peers(&asker.ask(&json!({"request": "peers"}))?, &verdicts);
            thread::sleep(POLL.min(end.saturating_duration_since(Instant::now())));
        }
        drop(ending);
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(verdicts.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Closes a connection on drop, also if the polling thread fails: its scope waits for the reading thread.
struct Ending(UnixStream);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Both).ok();
    }
}

fn note_events(host: &Host, events: &Value, began_ms: u64, verdicts: &Mutex<Verdicts>) {
    let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
    for event in events.as_array().into_iter().flatten() {
        let text = |field: &str| event[field].as_str().unwrap_or_default();
        if event["kind"] != "peer" || event["time_ms"].as_u64().unwrap_or(0) < began_ms {
            continue;
        }
        if declares(text("message"), "dead") {
            verdicts.dead.push(format!("{} said: {} {}", host.name(), text("object"), text("message")));
        } else if declares(text("message"), "suspect") {
            verdicts.suspect += 1;
        }
    }
}

/// Returns whether an event says that a host is in this state now. `dead -> alive` says that it was.
fn declares(message: &str, state: &str) -> bool {
    message.ends_with(&format!("-> {state}")) || message.contains(&format!("is {state}"))
}

fn note_peers(peers: &Value, verdicts: &Mutex<Verdicts>) {
    let count =
        |state: &str| peers.as_array().into_iter().flatten().filter(|peer| peer["state"] == state).count();
    let mut verdicts = verdicts.lock().unwrap_or_else(PoisonError::into_inner);
    verdicts.looks += 1;
    verdicts.seen_dead += count("dead");
    verdicts.seen_suspect += count("suspect");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaving_the_dead_state_does_not_declare_a_host_dead() {
        assert!(declares("alive -> dead", "dead") && declares("is dead: its VTEP does not answer", "dead"));
        assert!(!declares("dead -> alive", "dead") && !declares("alive -> suspect", "dead"));
    }
}
