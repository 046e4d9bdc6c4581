//! A thread that answers datagrams.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arc_swap::Cache;
use tokio::sync::mpsc;

use crate::answer::{Outcome, Transport, answer, target};
use crate::engine::{Role, Shared};
use crate::forward::{Job, Waiter};
use crate::sys::{AT_ONCE, Batch, Datagram, wait};

/// How soon an engine that is dropped is noticed.
const LOOK_AROUND: Duration = Duration::from_millis(500);

/// Serves these sockets until the engine ends.
pub(crate) fn serve(sockets: &[(Arc<UdpSocket>, Role)], shared: &Shared, jobs: &mpsc::Sender<Job>) {
    let mut batch = Batch::new();
    let mut zone = Cache::new(&shared.zone);
    let all: Vec<&UdpSocket> = sockets.iter().map(|(socket, _)| &**socket).collect();
    let counters = &shared.counters;
    let mut turn = 0usize;
    while !shared.ending.load(Relaxed) {
        let mut busy = false;
        for (socket, role) in sockets {
            let zone = zone.load();
            let (mut answered, mut ignored) = (0, 0);
            let served = batch.serve(socket, |Datagram { query, answer: buffer, from }| {
                turn = turn.wrapping_add(1);
                match answer(zone, role.asker(from.ip()), Transport::Udp, query, buffer, turn) {
                    Outcome::Answer(length) => {
                        answered += 1;
                        Some(length)
                    }
                    outcome @ (Outcome::Forward | Outcome::Alias) => {
                        let to = Waiter::Udp(Arc::clone(socket), from);
                        let alias =
                            (outcome == Outcome::Alias).then(|| target(zone, role.asker(from.ip()), query));
                        // With so many waiting already, this one asks again.
                        if jobs.try_send(Job { message: query.to_vec(), alias: alias.flatten(), to }).is_err()
                        {
                            ignored += 1;
                        }
                        None
                    }
                    Outcome::Ignore => {
                        ignored += 1;
                        None
                    }
                }
            });
            counters.answered.fetch_add(answered, Relaxed);
            counters.ignored.fetch_add(ignored, Relaxed);
            busy |= served.is_ok_and(|count| count == AT_ONCE);
        }
        if !busy && let Err(error) = wait(&all, LOOK_AROUND) {
            tracing::error!(%error, "cannot wait for DNS queries");
            return;
        }
    }
}
