//! Queries over TCP (RFC 7766). A connection may carry several.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::answer::{Outcome, Transport, answer, target};
use crate::forward::{Job, Waiter};
use crate::shared::{ListenRole, Shared};

/// The limit of open connections. Further ones are closed at once.
const MAX_CONNECTIONS: usize = 200;
/// A connection without a query for this time is closed.
const IDLE: Duration = Duration::from_secs(10);
/// A connection whose client does not read an answer within this time is closed.
const SEND: Duration = Duration::from_secs(5);

/// Accepts connections until it is cancelled.
pub(crate) async fn serve(
    listener: TcpListener,
    role: ListenRole,
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    open: Rc<Cell<usize>>,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Most likely out of file descriptors, which is temporary.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        if open.get() >= MAX_CONNECTIONS {
            continue;
        }
        open.set(open.get() + 1);
        let (shared, jobs, open) = (Arc::clone(&shared), jobs.clone(), Rc::clone(&open));
        tokio::task::spawn_local(async move {
            // An error concerns this client alone.
            let _ = connection(stream, role, &shared, &jobs).await;
            open.set(open.get() - 1);
        });
    }
}

async fn connection(
    mut stream: TcpStream,
    role: ListenRole,
    shared: &Shared,
    jobs: &mpsc::Sender<Job>,
) -> io::Result<()> {
    let client = role.client(stream.peer_addr()?.ip());
    if !shared.zone.load().knows(client) {
        return Ok(());
    }
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut turn = 0usize;
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut message = vec![0; usize::from(length)];
        timeout(IDLE, stream.read_exact(&mut message)).await??;
        turn = turn.wrapping_add(1);
        let outcome = answer(&shared.zone.load(), client, Transport::Tcp, &message, &mut buffer, turn);
        let forwarded;
        let reply = match outcome {
            Outcome::Answer(length) => {
                shared.counters.answered.fetch_add(1, Relaxed);
                buffer.get(..length).unwrap_or_default()
            }
            Outcome::Forward | Outcome::Alias => {
                let (sender, receiver) = oneshot::channel();
                let alias =
                    (outcome == Outcome::Alias).then(|| target(&shared.zone.load(), client, &message));
                let job = Job { message, alias: alias.flatten(), to: Waiter::Tcp(sender) };
                jobs.send(job).await.map_err(io::Error::other)?;
                forwarded = receiver.await.map_err(io::Error::other)?;
                &forwarded
            }
            Outcome::Ignore => return Ok(()),
        };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        timeout(SEND, stream.write_all(&[&length.to_be_bytes()[..], reply].concat())).await??;
    }
}
