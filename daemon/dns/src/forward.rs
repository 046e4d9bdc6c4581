//! Forwards queries to upstream servers. Equal questions in flight are sent once, and answers are cached.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use ovl_zone::{Client, Name};
use tokio::sync::{mpsc, oneshot};

use crate::answer::{self, Target};
use crate::cache::{Cache, Question};
use crate::message::{self, Fitting};
use crate::resolv::{ResolvConfWatcher, Upstreams};
use crate::servers::{Servers, StubDomain};
use crate::share::Share;
use crate::shared::Shared;
use crate::told::Found;
use crate::upstream::{self, Reply};
use crate::wire::{AA, AD, HEADER, QR, Query, RA, Rcode, RecordType, TC, opt, u16_at};

/// If a server does not answer within this time, the next one is queried in parallel.
const NEXT_AFTER: Duration = Duration::from_millis(400);
/// The time after which a query fails. Clients retry after five seconds, so the error comes before.
const GIVE_UP_AFTER: Duration = Duration::from_millis(4500);
/// How often resolv.conf is checked for changes.
const RESOLV_CONF_INTERVAL: Duration = Duration::from_secs(1);
/// How often the default server is queried until it answers.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// The limits of questions in flight, and of clients that wait for one question.
const MAX_QUESTIONS: usize = 2_000;
const MAX_WAITING: usize = 500;
/// The limit of queries of one client that wait. One client alone must not take all questions in flight.
const MAX_WAITING_EACH: usize = MAX_QUESTIONS / 8;
/// The limit of answers for one client that wait until their addresses are noted.
const MAX_TELLING_EACH: usize = 32;

/// A query to forward.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) message: Vec<u8>,
    /// The name to ask for in place of the one in the query.
    pub(crate) alias: Option<Target>,
    /// The client, whose share the query counts against.
    pub(crate) asker: Client,
    pub(crate) to: Waiter,
}

/// What the forwarding thread has to do.
#[derive(Debug)]
pub(crate) enum Work {
    /// To forward a query.
    Forward(Box<Job>),
    /// To make addresses known, and then to send an answer of the zone with them to a client over UDP.
    Tell { found: Found, asker: Client, answer: Vec<u8>, to: Waiter },
}

/// The receiver of an answer.
#[derive(Debug)]
pub(crate) enum Waiter {
    Udp(Arc<UdpSocket>, SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
    /// A lookup by `ovlctl`.
    Lookup(oneshot::Sender<Lookup>),
}

/// The origin of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerOrigin {
    /// The cache.
    Cache,
    /// An upstream server.
    Server(SocketAddr),
    /// None: no server answered, and the answer is SERVFAIL.
    Unanswered,
}

/// The result of a lookup.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// The DNS message.
    pub message: Vec<u8>,
    /// The origin of the message.
    pub origin: AnswerOrigin,
    /// The stub domain of the name. `None` if the name is under none.
    pub stub: Option<Name>,
}

pub(crate) struct Forwarder {
    servers: RefCell<Servers>,
    cache: RefCell<Cache>,
    /// The questions in flight, with the queries that wait for each.
    waiting: RefCell<HashMap<Question, Vec<Job>>>,
    /// The number of queries of each client that wait.
    shares: RefCell<HashMap<Client, usize>>,
    /// The number of answers for each client that wait until their addresses are noted.
    telling: RefCell<HashMap<Client, usize>>,
    shared: Arc<Shared>,
}

impl Forwarder {
    pub(crate) fn new(shared: Arc<Shared>, stubs: Vec<StubDomain>) -> Rc<Self> {
        Rc::new(Self {
            servers: RefCell::new(Servers::new(stubs)),
            cache: RefCell::default(),
            waiting: RefCell::default(),
            shares: RefCell::default(),
            telling: RefCell::default(),
            shared,
        })
    }

    /// Runs until all senders of `jobs` are dropped.
    pub(crate) async fn run(
        self: Rc<Self>,
        mut jobs: mpsc::Receiver<Work>,
        mut resolv_conf: ResolvConfWatcher,
    ) {
        let mut check = tokio::time::interval(RESOLV_CONF_INTERVAL);
        let mut probe = tokio::time::interval(PROBE_INTERVAL);
        loop {
            tokio::select! {
                job = jobs.recv() => match job {
                    Some(Work::Forward(job)) => self.take(*job),
                    Some(Work::Tell { found, asker, answer, to }) => {
                        self.send(Some(found), asker, to, answer);
                    }
                    None => return,
                },
                _ = check.tick() => {
                    if let Some(upstreams) = resolv_conf.changed() {
                        self.set_servers(upstreams);
                    }
                }
                _ = probe.tick() => self.probe_default(),
            }
        }
    }

    fn set_servers(self: &Rc<Self>, upstreams: Upstreams) {
        let Upstreams { servers, is_default, .. } = &upstreams;
        if self.servers.borrow_mut().set_others(servers, *is_default) {
            tracing::info!(?servers, "upstream DNS servers changed");
            self.cache.borrow_mut().clear();
            self.publish_failing();
            self.probe_default();
        }
        self.shared.upstreams.store(Some(Arc::new(upstreams)));
    }

    /// Queries the default server until it has answered. So users learn before the first client asks
    /// that there is none.
    fn probe_default(self: &Rc<Self>) {
        let Some(server) = self.servers.borrow().unproved_default() else { return };
        let forwarder = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let question = Question::new(&Name::ROOT, RecordType::SOA, false, false);
            let answered = upstream::ask(server, &question).await.is_ok();
            forwarder.record_outcome(&Name::ROOT, server, answered);
        });
    }

    fn record_outcome(&self, name: &Name, server: SocketAddr, answered: bool) {
        if self.servers.borrow_mut().record_outcome(name, server, answered) {
            self.publish_failing();
        }
    }

    fn publish_failing(&self) {
        self.shared.failing.store(Arc::new(self.servers.borrow().failing()));
    }

    fn take(self: &Rc<Self>, job: Job) {
        // It was valid before it was queued.
        let Ok(query) = Query::read(&job.message) else { return };
        let name = job.alias.as_ref().map_or(&query.name, |target| &target.name);
        let question =
            Question::new(name, query.kind, query.wants_dnssec(), query.flags & crate::wire::CD != 0);
        let kept = self.cache.borrow_mut().get(&question, Instant::now());
        if let Some(kept) = kept {
            self.shared.counters.cached.fetch_add(1, Relaxed);
            self.deliver(&job.message, &query, (job.alias, job.asker), job.to, &kept, AnswerOrigin::Cache);
            return;
        }
        if self.shares.borrow().get(&job.asker).is_some_and(|count| *count >= MAX_WAITING_EACH) {
            self.shared.note_limited(job.asker, Share::Queries);
            self.fail(&job.message, &query, job.asker, job.to);
            return;
        }
        let asker = job.asker;
        let mut waiting = self.waiting.borrow_mut();
        let full = waiting.len() >= MAX_QUESTIONS;
        if let Some(others) = waiting.get_mut(&question) {
            if others.len() < MAX_WAITING {
                others.push(job);
                self.count(asker);
            }
            return;
        }
        if full {
            self.shared.counters.failed.fetch_add(1, Relaxed);
            self.fail(&job.message, &query, job.asker, job.to);
            return;
        }
        waiting.insert(question.clone(), vec![job]);
        drop(waiting);
        self.count(asker);
        let forwarder = Rc::clone(self);
        tokio::task::spawn_local(async move { forwarder.resolve(question).await });
    }

    /// Counts a query of a client that waits.
    fn count(&self, asker: Client) {
        let mut shares = self.shares.borrow_mut();
        let count = shares.entry(asker).or_default();
        *count = count.saturating_add(1);
    }

    async fn resolve(self: Rc<Self>, question: Question) {
        self.shared.counters.forwarded.fetch_add(1, Relaxed);
        let started = Instant::now();
        let asked = tokio::time::timeout(GIVE_UP_AFTER, self.ask_all(&question)).await;
        self.shared.waits.lock().unwrap_or_else(PoisonError::into_inner).add(started.elapsed());
        let found = asked.ok().flatten();
        if let Some((reply, _)) = &found {
            self.cache.borrow_mut().put(&question, &reply.message, &reply.parts, Instant::now());
        } else {
            self.shared.counters.failed.fetch_add(1, Relaxed);
        }
        let waiting = self.waiting.borrow_mut().remove(&question).unwrap_or_default();
        for Job { message, alias, asker, to } in waiting {
            discount(&mut self.shares.borrow_mut(), asker);
            let Ok(query) = Query::read(&message) else { continue };
            match &found {
                Some((reply, server)) => {
                    let origin = AnswerOrigin::Server(*server);
                    self.deliver(&message, &query, (alias, asker), to, &reply.message, origin);
                }
                None => self.fail(&message, &query, asker, to),
            }
        }
    }

    /// Queries the servers in order. If a server does not answer within [`NEXT_AFTER`], the next one is
    /// queried in parallel, and the first good answer wins. A server that fails, or that lost that race, is
    /// tried last for a while.
    async fn ask_all(&self, question: &Question) -> Option<(Reply, SocketAddr)> {
        let name = question.name();
        let mut servers = self.servers.borrow().in_order(&name).into_iter();
        let mut asked = FuturesUnordered::new();
        let mut since: Vec<(SocketAddr, Instant)> = Vec::new();
        let mut fallback = None;
        let mut ask_next = true;
        loop {
            if ask_next && let Some(server) = servers.next() {
                since.push((server, Instant::now()));
                asked.push(async move { (server, upstream::ask(server, question).await) });
            }
            if asked.is_empty() {
                return fallback;
            }
            let next = tokio::time::sleep(NEXT_AFTER);
            ask_next = tokio::select! {
                Some((server, result)) = asked.next() => {
                    since.retain(|(asked, _)| *asked != server);
                    self.record_outcome(&name, server, result.is_ok());
                    match result {
                        Ok(reply) if matches!(reply.parts.rcode, Rcode::NO_ERROR | Rcode::NAME_ERROR) => {
                            for (slower, _) in since.iter().filter(|(_, at)| at.elapsed() >= NEXT_AFTER) {
                                self.record_outcome(&name, *slower, false);
                            }
                            return Some((reply, server));
                        }
                        Ok(reply) => fallback = fallback.or(Some((reply, server))),
                        Err(error) => tracing::debug!(%server, %error, "upstream DNS server does not answer"),
                    }
                    true
                }
                () = next, if servers.len() > 0 => true,
            };
        }
    }

    /// Answers SERVFAIL, because no server answered.
    fn fail(self: &Rc<Self>, message: &[u8], query: &Query, asker: Client, to: Waiter) {
        self.deliver(
            message,
            query,
            (None, asker),
            to,
            &answer::empty_response(message, query, Rcode::SERVER_FAILURE),
            AnswerOrigin::Unanswered,
        );
    }

    /// Sends an answer, after what it tells of watched names is known.
    fn send(self: &Rc<Self>, found: Option<Found>, asker: Client, to: Waiter, answer: Vec<u8>) {
        let Some(found) = found else { return hand_over(to, answer) };
        {
            let mut telling = self.telling.borrow_mut();
            let count = telling.entry(asker).or_default();
            if *count >= MAX_TELLING_EACH {
                // The client retries.
                return self.shared.note_limited(asker, Share::Queries);
            }
            *count = count.saturating_add(1);
        }
        let forwarder = Rc::clone(self);
        tokio::task::spawn_local(async move {
            forwarder.shared.tell(found).await;
            discount(&mut forwarder.telling.borrow_mut(), asker);
            hand_over(to, answer);
        });
    }

    /// Adapts the answer to the query and sends it.
    fn deliver(
        self: &Rc<Self>,
        message: &[u8],
        query: &Query,
        (alias, asker): (Option<Target>, Client),
        to: Waiter,
        answer: &[u8],
        origin: AnswerOrigin,
    ) {
        let composed = alias.as_ref().map(|target| {
            let composed = crate::message::compose_alias_answer(message, query, target, answer);
            composed.unwrap_or_else(|| answer::empty_response(message, query, Rcode::SERVER_FAILURE))
        });
        let answer = composed.as_deref().unwrap_or(answer);
        let zone = self.shared.zone.load();
        let found = self.shared.find(&zone, asker, message, alias.as_ref(), false, answer);
        match to {
            Waiter::Udp(socket, address) => {
                if let Some(answer) = fit_to_query(message, query, answer, query.udp_limit()) {
                    self.send(found, asker, Waiter::Udp(socket, address), answer);
                }
            }
            Waiter::Tcp(sender) => {
                if let Some(answer) = fit_to_query(message, query, answer, usize::from(u16::MAX)) {
                    self.send(found, asker, Waiter::Tcp(sender), answer);
                }
            }
            Waiter::Lookup(sender) => {
                let asked = alias.map_or(query.name, |target| target.name);
                let stub = self.servers.borrow().stub_of(&asked);
                let _ = sender.send(Lookup { message: answer.to_vec(), origin, stub });
            }
        }
    }
}

/// Counts one less for a client.
fn discount(counts: &mut HashMap<Client, usize>, asker: Client) {
    let left = counts.get(&asker).map_or(0, |count| count.saturating_sub(1));
    if left == 0 {
        counts.remove(&asker);
    } else {
        counts.insert(asker, left);
    }
}

/// Hands an answer to its receiver.
fn hand_over(to: Waiter, answer: Vec<u8>) {
    match to {
        Waiter::Udp(socket, address) => {
            // A client that misses the answer retries.
            let _ = socket.send_to(&answer, address);
        }
        Waiter::Tcp(sender) => {
            let _ = sender.send(answer);
        }
        Waiter::Lookup(_) => {}
    }
}

/// Adapts an answer to a query: its id, flags and question, and the records that fit into the client's limit. `None` if
/// the answer is malformed.
fn fit_to_query(message: &[u8], query: &Query, answer: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut fitted = answer.to_vec();
    let question = message.get(HEADER..query.end)?;
    let rcode = u16_at(answer, 2)? & 15;
    let is_whole = u16_at(answer, 4)? == 1 && answer.get(HEADER..query.end).is_some();
    let room = limit.saturating_sub(if query.edns.is_some() { crate::wire::OPT } else { 0 });
    let mut kept = u16_at(answer, 2)? & (AD | AA);
    if !query.wants_dnssec() && query.flags & AD == 0 {
        kept &= !AD;
    }
    let mut flags = QR | RA | query.flags & 0x0110 | kept & !AA | rcode;
    let fitting = if is_whole && fitted.len() > room { message::fitting(answer, room) } else { None };
    if let Some(Fitting { end, counts, truncated }) = fitting {
        fitted.truncate(end);
        for (place, count) in fitted.get_mut(6..HEADER)?.chunks_exact_mut(2).zip(counts) {
            place.copy_from_slice(&count.to_be_bytes());
        }
        if truncated {
            flags |= TC;
        }
    } else if !is_whole || fitted.len() > room {
        if is_whole {
            flags |= TC;
        }
        fitted.truncate(HEADER);
        fitted.extend_from_slice(question);
        fitted.get_mut(4..HEADER)?.copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    }
    fitted.get_mut(..2)?.copy_from_slice(&query.id.to_be_bytes());
    fitted.get_mut(2..4)?.copy_from_slice(&flags.to_be_bytes());
    fitted.get_mut(HEADER..query.end)?.copy_from_slice(question);
    if query.edns.is_some() && needs_opt(answer) {
        let additional = u16_at(&fitted, 10)?.checked_add(1)?;
        fitted.get_mut(10..12)?.copy_from_slice(&additional.to_be_bytes());
        fitted.extend_from_slice(&opt(Rcode(rcode), query.wants_dnssec()));
    }
    Some(fitted)
}

/// Returns whether an OPT record must be added. Upstream answers have lost theirs; responses built here have
/// one already.
fn needs_opt(answer: &[u8]) -> bool {
    crate::message::parse_answer(answer).is_none_or(|parts| parts.end == answer.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer to a query for `big` with this number of A records, and one record in each other section.
    fn big(records: u16) -> Vec<u8> {
        let name = Name::parse("big").unwrap();
        let mut answer = crate::wire::question(7, &name, RecordType::A, 0, None);
        answer[2] |= 0x80;
        answer[6..8].copy_from_slice(&records.to_be_bytes());
        answer[9] = 1;
        answer[11] = 1;
        for i in 0..records + 2 {
            answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0]);
            answer.extend_from_slice(&i.to_be_bytes());
        }
        answer
    }

    fn fitted(answer: &[u8], edns: Option<bool>) -> Vec<u8> {
        let name = Name::parse("BIG").unwrap();
        let message = crate::wire::question(9, &name, RecordType::A, 0, edns);
        let query = Query::read(&message).unwrap();
        let fitted = fit_to_query(&message, &query, answer, query.udp_limit()).unwrap();
        assert!(fitted.len() <= query.udp_limit() && u16_at(&fitted, 0) == Some(9));
        message::parse_answer(&fitted).unwrap();
        fitted
    }

    fn counts(message: &[u8]) -> [u16; 3] {
        [6, 8, 10].map(|at| u16_at(message, at).unwrap())
    }

    fn is_truncated(message: &[u8]) -> bool {
        u16_at(message, 2).unwrap() & TC != 0
    }

    #[test]
    fn answer_that_is_too_large_carries_the_records_that_fit() {
        let cut = fitted(&big(60), None);
        // 512 bytes: 12 of the header, 9 of the question, 16 for each record.
        assert_eq!((counts(&cut), is_truncated(&cut), cut.len()), ([30, 0, 0], true, 501));
        let (_, records) = message::records(&cut).unwrap();
        assert_eq!(records.len(), 30);
        let cut = fitted(&big(100), Some(false));
        assert_eq!((counts(&cut), is_truncated(&cut)), ([75, 0, 1], true));
        let whole = fitted(&big(60), Some(false));
        assert_eq!((counts(&whole), is_truncated(&whole)), ([60, 1, 2], false));
        // Additional records may be missing without notice.
        let cut = fitted(&big(29), None);
        assert_eq!((counts(&cut), is_truncated(&cut)), ([29, 1, 0], false));
        let cut = fitted(&big(30), None);
        assert_eq!((counts(&cut), is_truncated(&cut)), ([30, 0, 0], true));
    }
}
