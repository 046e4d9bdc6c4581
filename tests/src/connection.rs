//! A TCP connection between workloads that stays open.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_lab::EchoServer;

use crate::{Attached, SOON};

/// A connection of a workload to an echo server of another one.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    _echo: EchoServer,
}

impl Connection {
    /// Opens a connection whose reads fail after `patience`.
    pub fn open(from: &Attached, to: &Attached, patience: Duration) -> Result<Self> {
        let address: IpAddr = to.address().parse()?;
        let echo = to.workload.tcp_echo_on(SocketAddr::new(address, 0))?;
        let to = SocketAddr::new(address, echo.port());
        let stream = from.workload.run(|| TcpStream::connect_timeout(&to, SOON))??;
        stream.set_read_timeout(Some(patience))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, _echo: echo })
    }

    /// Sends bytes and reads them back. Returns how long that took.
    pub fn echo(&mut self, length: usize) -> Result<Duration> {
        let start = Instant::now();
        let sent: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
        let mut back = vec![0; length];
        let mut writer = self.stream.try_clone()?;
        let result = thread::scope(|scope| {
            let writing = scope.spawn(|| writer.write_all(&sent));
            let read = self.stream.read_exact(&mut back).context("cannot read what was sent");
            let written = writing.join().map_err(|_| anyhow!("the writer panicked"))?;
            read.and(written.context("cannot write"))
        });
        result?;
        ensure!(sent == back, "what came back differs");
        Ok(start.elapsed())
    }
}
