//! Questions that others have to answer: asked once however many ask them, kept, and passed on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use crate::answer::{self, Target};
use crate::cache::{Cache, Question};
use crate::engine::Shared;
use crate::name::Name;
use crate::resolv::Follow;
use crate::servers::{Servers, Stub};
use crate::upstream::{self, Reply};
use crate::wire::{AA, AD, HEADER, QR, Query, RA, Rcode, TC, opt, u16_at};

/// A server that has not answered by then may be down: the next one is asked as well.
const NEXT_AFTER: Duration = Duration::from_millis(400);
/// Clients ask again after five seconds, so a word comes before that.
const GIVE_UP_AFTER: Duration = Duration::from_millis(4500);
/// How often the file with the servers is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// So many questions may wait for servers, and so many askers for one question.
const MAX_QUESTIONS: usize = 2_000;
const MAX_WAITING: usize = 500;

/// A query that the zone cannot answer, and where the answer goes.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) message: Vec<u8>,
    /// The name that others are asked for in its place.
    pub(crate) alias: Option<Target>,
    pub(crate) to: Waiter,
}

/// A query, and who waits for its answer.
type Waiting = (Vec<u8>, Option<Target>, Waiter);

/// Who waits.
#[derive(Debug)]
pub(crate) enum Waiter {
    Udp(Arc<UdpSocket>, SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
    /// For people: with where it comes from.
    Look(oneshot::Sender<Lookup>),
}

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// A server said so a while ago.
    Cache,
    /// It has just said so.
    Server(SocketAddr),
    /// No server answered.
    Nobody,
}

/// An answer for people.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// The message.
    pub message: Vec<u8>,
    /// See [`Via`].
    pub via: Via,
    /// Of which stub domain the name is.
    pub stub: Option<Name>,
}

pub(crate) struct Forwarder {
    servers: RefCell<Servers>,
    cache: RefCell<Cache>,
    /// Who asked what is on its way already, each with its own query.
    waiting: RefCell<HashMap<Question, Vec<Waiting>>>,
    shared: Arc<Shared>,
}

impl Forwarder {
    pub(crate) fn new(shared: Arc<Shared>, stubs: Vec<Stub>) -> Rc<Self> {
        Rc::new(Self {
            servers: RefCell::new(Servers::new(stubs)),
            cache: RefCell::default(),
            waiting: RefCell::default(),
            shared,
        })
    }

    /// Runs until nobody can send any more.
    pub(crate) async fn run(self: Rc<Self>, mut jobs: mpsc::Receiver<Job>, mut follow: Follow) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                job = jobs.recv() => match job {
                    Some(job) => self.take(job),
                    None => return,
                },
                _ = look.tick() => {
                    if let Some(servers) = follow.changed() {
                        self.set_servers(&servers);
                    }
                }
            }
        }
    }

    fn set_servers(&self, servers: &[SocketAddr]) {
        if self.servers.borrow_mut().set_others(servers) {
            tracing::info!(?servers, "the resolvers that are asked for other names");
            self.cache.borrow_mut().clear();
            self.tell_failing();
        }
    }

    fn note(&self, name: &Name, server: SocketAddr, answered: bool) {
        if self.servers.borrow_mut().note(name, server, answered) {
            self.tell_failing();
        }
    }

    fn tell_failing(&self) {
        self.shared.failing.store(Arc::new(self.servers.borrow().failing()));
    }

    fn take(self: &Rc<Self>, Job { message, alias, to }: Job) {
        // It was read once already.
        let Ok(query) = Query::read(&message) else { return };
        let name = alias.as_ref().map_or(&query.name, |target| &target.name);
        let question =
            Question::new(name, query.kind, query.wants_dnssec(), query.flags & crate::wire::CD != 0);
        let kept = self.cache.borrow_mut().get(&question, Instant::now());
        if let Some(kept) = kept {
            self.shared.counters.cached.fetch_add(1, Relaxed);
            self.deliver(&message, &query, alias, to, &kept, Via::Cache);
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        let full = waiting.len() >= MAX_QUESTIONS;
        if let Some(others) = waiting.get_mut(&question) {
            if others.len() < MAX_WAITING {
                others.push((message, alias, to));
            }
            return;
        }
        if full {
            self.shared.counters.failed.fetch_add(1, Relaxed);
            self.fail(&message, &query, to);
            return;
        }
        waiting.insert(question.clone(), vec![(message, alias, to)]);
        drop(waiting);
        let forwarder = Rc::clone(self);
        tokio::task::spawn_local(async move { forwarder.resolve(question).await });
    }

    async fn resolve(self: Rc<Self>, question: Question) {
        self.shared.counters.forwarded.fetch_add(1, Relaxed);
        let asked = tokio::time::timeout(GIVE_UP_AFTER, self.ask_all(&question)).await;
        let found = asked.ok().flatten();
        if let Some((reply, _)) = &found {
            self.cache.borrow_mut().put(&question, &reply.message, &reply.parts, Instant::now());
        } else {
            self.shared.counters.failed.fetch_add(1, Relaxed);
        }
        let waiting = self.waiting.borrow_mut().remove(&question).unwrap_or_default();
        for (message, alias, to) in waiting {
            let Ok(query) = Query::read(&message) else { continue };
            match &found {
                Some((reply, server)) => {
                    self.deliver(&message, &query, alias, to, &reply.message, Via::Server(*server))
                }
                None => self.fail(&message, &query, to),
            }
        }
    }

    /// Asks the servers one after the other, without giving up those that were asked before: the first
    /// good answer counts. What a server only could not do, the next one may. One that another overtook is not waited for
    /// next time.
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
                    self.note(&name, server, result.is_ok());
                    match result {
                        Ok(reply) if matches!(reply.parts.rcode, Rcode::NO_ERROR | Rcode::NO_NAME) => {
                            for (overtaken, _) in since.iter().filter(|(_, at)| at.elapsed() >= NEXT_AFTER) {
                                self.note(&name, *overtaken, false);
                            }
                            return Some((reply, server));
                        }
                        Ok(reply) => fallback = fallback.or(Some((reply, server))),
                        Err(error) => tracing::debug!(%server, %error, "a resolver does not answer"),
                    }
                    true
                }
                () = next, if servers.len() > 0 => true,
            };
        }
    }

    /// Says that nobody could be asked.
    fn fail(&self, message: &[u8], query: &Query, to: Waiter) {
        self.deliver(message, query, None, to, &answer::bare(message, query, Rcode::FAILED), Via::Nobody);
    }

    /// Makes the answer fit the query, and sends it.
    fn deliver(
        &self,
        message: &[u8],
        query: &Query,
        alias: Option<Target>,
        to: Waiter,
        answer: &[u8],
        via: Via,
    ) {
        let composed = alias.as_ref().map(|target| {
            let under = crate::message::under(message, query, target, answer);
            under.unwrap_or_else(|| answer::bare(message, query, Rcode::FAILED))
        });
        let answer = composed.as_deref().unwrap_or(answer);
        match to {
            Waiter::Udp(socket, address) => {
                if let Some(answer) = fitted(message, query, answer, query.udp_limit()) {
                    // Who does not take it asks again.
                    let _ = socket.send_to(&answer, address);
                }
            }
            Waiter::Tcp(sender) => {
                if let Some(answer) = fitted(message, query, answer, usize::from(u16::MAX)) {
                    let _ = sender.send(answer);
                }
            }
            Waiter::Look(sender) => {
                let asked = alias.map_or(query.name, |target| target.name);
                let stub = self.servers.borrow().stub_of(&asked);
                let _ = sender.send(Lookup { message: answer.to_vec(), via, stub });
            }
        }
    }
}

/// The answer with the query's own id, flags and question, cut to what the client takes.
fn fitted(message: &[u8], query: &Query, answer: &[u8], limit: usize) -> Option<Vec<u8>> {
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
    if !is_whole || fitted.len() > room {
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
    if query.edns.is_some() && rcode_has_opt(answer) {
        let additional = u16_at(&fitted, 10)?.checked_add(1)?;
        fitted.get_mut(10..12)?.copy_from_slice(&additional.to_be_bytes());
        fitted.extend_from_slice(&opt(Rcode(rcode), query.wants_dnssec()));
    }
    Some(fitted)
}

/// Answers of servers come without their OPT records; those that we made have one where it is due.
fn rcode_has_opt(answer: &[u8]) -> bool {
    crate::message::read(answer).is_none_or(|parts| parts.end == answer.len())
}
