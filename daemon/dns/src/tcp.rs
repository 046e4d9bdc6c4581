//! Queries over TCP (RFC 7766). A connection may carry several.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use ovl_zone::Client;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use crate::answer::{Outcome, Transport, answer};
use crate::forward::{Job, Waiter, Work};
use crate::share::{Admission, Connection, Places, Share};
use crate::shared::{ListenRole, Shared};

/// A connection without a query for this time is closed.
const IDLE: Duration = Duration::from_secs(10);
/// A connection whose client does not read an answer within this time is closed.
const SEND: Duration = Duration::from_secs(5);

/// The open connections of all listeners.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    places: Places,
    /// Tells each connection that it has lost its place.
    closing: HashMap<Connection, Rc<Notify>>,
}

impl Connections {
    /// Gives a connection of an asker a place, and closes another one for it if necessary. `None` if there is no place.
    fn admit(&mut self, asker: Client, shared: &Shared) -> Option<(Connection, Rc<Notify>)> {
        let admitted = match self.places.admit(asker) {
            Admission::Admitted(admitted) => admitted,
            Admission::InPlaceOf { admitted, closed, of } => {
                shared.note_limited(of, Share::Connections);
                if let Some(closing) = self.closing.remove(&closed) {
                    closing.notify_one();
                }
                admitted
            }
            Admission::Refused => {
                shared.note_limited(asker, Share::Connections);
                return None;
            }
        };
        let closing = Rc::new(Notify::new());
        self.closing.insert(admitted, Rc::clone(&closing));
        Some((admitted, closing))
    }

    fn free(&mut self, connection: Connection) {
        self.places.free(connection);
        self.closing.remove(&connection);
    }
}

/// Accepts connections until it is cancelled.
pub(crate) async fn serve(
    listener: TcpListener,
    role: ListenRole,
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Work>,
    open: Rc<RefCell<Connections>>,
) {
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            // Most likely out of file descriptors, which is temporary.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let asker = role.client(from.ip());
        if !shared.zone.load().knows(asker) {
            continue;
        }
        let Some((connection, closing)) = open.borrow_mut().admit(asker, &shared) else { continue };
        let (shared, jobs, open) = (Arc::clone(&shared), jobs.clone(), Rc::clone(&open));
        tokio::task::spawn_local(async move {
            let set_busy = |busy| open.borrow_mut().places.set_busy(connection, busy);
            tokio::select! {
                // An error concerns this client alone.
                _ = converse(stream, asker, &shared, &jobs, set_busy) => {}
                () = closing.notified() => {}
            }
            open.borrow_mut().free(connection);
        });
    }
}

/// Answers the queries of a connection. `set_busy` is told when a query has arrived and when it is answered.
async fn converse(
    mut stream: TcpStream,
    asker: Client,
    shared: &Shared,
    jobs: &mpsc::Sender<Work>,
    set_busy: impl Fn(bool),
) -> io::Result<()> {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut turn = 0usize;
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut message = vec![0; usize::from(length)];
        timeout(IDLE, stream.read_exact(&mut message)).await??;
        set_busy(true);
        turn = turn.wrapping_add(1);
        let outcome = answer(&shared.zone.load(), asker, Transport::Tcp, &message, &mut buffer, turn);
        let forwarded;
        let reply = match outcome {
            Outcome::Answer(length) => {
                shared.counters.answered.fetch_add(1, Relaxed);
                let reply = buffer.get(..length).unwrap_or_default();
                let found = shared.find(&shared.zone.load(), asker, &message, None, true, reply);
                if let Some(found) = found {
                    shared.tell(found).await;
                }
                reply
            }
            Outcome::Forward | Outcome::Alias(_) => {
                let (sender, receiver) = oneshot::channel();
                let job = Job { message, alias: outcome.alias(), asker, to: Waiter::Tcp(sender) };
                jobs.send(Work::Forward(Box::new(job))).await.map_err(io::Error::other)?;
                forwarded = receiver.await.map_err(io::Error::other)?;
                &forwarded
            }
            Outcome::Ignore => return Ok(()),
        };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        timeout(SEND, stream.write_all(&[&length.to_be_bytes()[..], reply].concat())).await??;
        set_busy(false);
    }
}
