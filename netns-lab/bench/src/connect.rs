//! Measurement of TCP connection times.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Netns, wait_until};

use super::stats::{Samples, ms};

const PATIENCE: Duration = Duration::from_secs(30);

/// Accepts connections at a port until the process exits.
pub(crate) fn serve(at: &Netns, port: u16) -> Result<()> {
    let listener = at.run(|| TcpListener::bind(("0.0.0.0", port)))??;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
        }
    });
    Ok(())
}

/// Opens one connection from the calling thread's namespace, and returns the time in milliseconds.
pub(crate) fn connect(to: SocketAddr, patience: Duration) -> Result<f64> {
    let start = Instant::now();
    let stream = TcpStream::connect_timeout(&to, patience)?;
    let took = ms(start.elapsed());
    drop(stream);
    Ok(took)
}

/// Measures connections to two destinations, alternating.
pub(crate) fn in_turns(
    from: &Netns,
    first: SocketAddr,
    second: SocketAddr,
    count: usize,
) -> Result<(Samples, Samples)> {
    let once = |to: SocketAddr| connect(to, Duration::from_secs(5));
    for to in [first, second] {
        wait_until(PATIENCE, &format!("{to} to answer"), || from.run(|| once(to).map(drop))?)?;
    }
    from.run(move || {
        let (mut to_first, mut to_second) = (Vec::new(), Vec::new());
        for _ in 0..count {
            to_first.push(once(first)?);
            to_second.push(once(second)?);
        }
        ensure!(!to_first.is_empty(), "no connections");
        Ok((Samples::new(to_first), Samples::new(to_second)))
    })?
}
