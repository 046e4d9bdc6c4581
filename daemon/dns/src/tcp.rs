//! Queries by TCP (RFC 7766): one connection may carry several.

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
use crate::engine::{Role, Shared};
use crate::forward::{Job, Waiter};

/// So many connections at once; further ones are closed.
const MAX_CONNECTIONS: usize = 200;
/// Without a query for so long, a connection is closed.
const IDLE: Duration = Duration::from_secs(10);
/// An answer is taken within this.
const SEND: Duration = Duration::from_secs(5);

/// Takes connections for ever.
pub(crate) async fn serve(
    listener: TcpListener,
    role: Role,
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    open: Rc<Cell<usize>>,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: there will be some again.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        if open.get() >= MAX_CONNECTIONS {
            continue;
        }
        open.set(open.get() + 1);
        let (shared, jobs, open) = (Arc::clone(&shared), jobs.clone(), Rc::clone(&open));
        tokio::task::spawn_local(async move {
            // How it ends is the client's business.
            let _ = connection(stream, role, &shared, &jobs).await;
            open.set(open.get() - 1);
        });
    }
}

async fn connection(
    mut stream: TcpStream,
    role: Role,
    shared: &Shared,
    jobs: &mpsc::Sender<Job>,
) -> io::Result<()> {
    let asker = role.asker(stream.peer_addr()?.ip());
    if !shared.zone.load().knows(asker) {
        return Ok(());
    }
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut turn = 0usize;
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut message = vec![0; usize::from(length)];
        timeout(IDLE, stream.read_exact(&mut message)).await??;
        turn = turn.wrapping_add(1);
        let outcome = answer(&shared.zone.load(), asker, Transport::Tcp, &message, &mut buffer, turn);
        let forwarded;
        let reply = match outcome {
            Outcome::Answer(length) => {
                shared.counters.answered.fetch_add(1, Relaxed);
                buffer.get(..length).unwrap_or_default()
            }
            Outcome::Forward | Outcome::Alias => {
                let (sender, receiver) = oneshot::channel();
                let alias = (outcome == Outcome::Alias).then(|| target(&shared.zone.load(), asker, &message));
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
