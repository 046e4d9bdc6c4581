//! The threads that answer queries over UDP.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arc_swap::Cache;
use ovl_udp::{ReceiveBatch, Received, SendBatch};
use tokio::sync::mpsc;

use crate::answer::{Outcome, Transport, answer};
use crate::forward::{Job, Waiter, Work};
use crate::shared::{ListenRole, Shared};
use crate::sys::wait_readable;
use crate::wire::MAX_UDP;

/// How soon a thread notices that the engine is dropped.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Queries that are received at once.
const BATCH: usize = 64;
/// The longest query in bytes. Longer ones are dropped.
const MAX_QUERY: usize = 1024;

/// Answers queries to these sockets until the engine ends.
pub(crate) fn serve(sockets: &[(Arc<UdpSocket>, ListenRole)], shared: &Shared, jobs: &mpsc::Sender<Work>) {
    let (mut queries, mut answers) = (ReceiveBatch::new(BATCH, MAX_QUERY), SendBatch::new(BATCH, MAX_UDP));
    let mut zone = Cache::new(&shared.zone);
    let all: Vec<&UdpSocket> = sockets.iter().map(|(socket, _)| &**socket).collect();
    let counters = &shared.counters;
    let mut turn = 0usize;
    while !shared.ending.load(Relaxed) {
        let mut is_busy = false;
        for (socket, role) in sockets {
            let zone = zone.load();
            let (mut answered, mut ignored) = (0, 0);
            let received = queries.receive(socket, BATCH).unwrap_or(0);
            for slot in 0..received {
                let Some(Received { from, bytes: query, is_truncated: false, .. }) = queries.get(slot) else {
                    continue;
                };
                let Some(buffer) = answers.next_slot() else { break };
                turn = turn.wrapping_add(1);
                let asker = role.client(from.ip());
                match answer(zone, asker, Transport::Udp, query, buffer, turn) {
                    Outcome::Answer(length) => {
                        answered += 1;
                        let told = buffer.get(..length).unwrap_or_default();
                        match shared.find(zone, asker, query, None, true, told) {
                            None => answers.push(from, length),
                            Some(found) => {
                                let to = Waiter::Udp(Arc::clone(socket), from);
                                let work = Work::Tell { found, asker, answer: told.to_vec(), to };
                                if jobs.try_send(work).is_err() {
                                    ignored += 1;
                                }
                            }
                        }
                    }
                    outcome @ (Outcome::Forward | Outcome::Alias(_)) => {
                        let to = Waiter::Udp(Arc::clone(socket), from);
                        let job = Job { message: query.to_vec(), alias: outcome.alias(), asker, to };
                        // If the queue is full, the client retries.
                        if jobs.try_send(Work::Forward(Box::new(job))).is_err() {
                            ignored += 1;
                        }
                    }
                    Outcome::Ignore => ignored += 1,
                }
            }
            answers.flush(socket);
            counters.answered.fetch_add(answered, Relaxed);
            counters.ignored.fetch_add(ignored, Relaxed);
            is_busy |= received == BATCH;
        }
        if !is_busy && let Err(error) = wait_readable(&all, CHECK_INTERVAL) {
            tracing::error!(%error, "cannot wait for DNS queries");
            return;
        }
    }
}
