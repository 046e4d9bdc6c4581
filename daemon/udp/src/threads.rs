//! Threads that wait for packets, and how they are ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Tells threads to end, and wakes those that wait.
///
/// A busy thread looks at a flag. A waiting thread polls an eventfd beside its own descriptor, so the signal
/// costs no system call where packets follow each other.
#[derive(Debug)]
pub struct StopSignal {
    is_set: AtomicBool,
    event: EventFd,
}

impl StopSignal {
    /// A signal that is not set.
    ///
    /// # Errors
    ///
    /// What `eventfd(2)` reports.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { is_set: AtomicBool::new(false), event })
    }

    /// Tells all threads to end. Nothing reads the eventfd, so it stays readable and wakes all of them.
    pub fn set(&self) {
        self.is_set.store(true, Ordering::Relaxed);
        if let Err(error) = self.event.write(1) {
            // The counter is at its maximum only after 2^64 - 2 calls.
            tracing::error!(%error, "cannot wake the threads of a data path");
        }
    }

    /// Whether the threads must end.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// Waits until the source is readable. Returns false if the thread must end.
    pub fn wait_readable(&self, source: &impl AsFd) -> bool {
        self.wait(Some((source.as_fd(), PollFlags::POLLIN)), PollTimeout::NONE)
    }

    /// Waits until the source is readable, for so long at most. Returns false if the thread must end.
    pub fn wait_readable_for(&self, source: &impl AsFd, timeout: Duration) -> bool {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        self.wait(Some((source.as_fd(), PollFlags::POLLIN)), timeout)
    }

    /// Waits until the socket is writable. Returns false if the thread must end.
    pub fn wait_writable(&self, socket: &impl AsFd) -> bool {
        self.wait(Some((socket.as_fd(), PollFlags::POLLOUT)), PollTimeout::NONE)
    }

    /// Sleeps. Returns false if the thread must end.
    pub fn sleep(&self, duration: Duration) -> bool {
        self.wait(None, PollTimeout::try_from(duration).unwrap_or(PollTimeout::MAX))
    }

    fn wait(&self, source: Option<(BorrowedFd<'_>, PollFlags)>, timeout: PollTimeout) -> bool {
        let stop = PollFd::new(self.event.as_fd(), PollFlags::POLLIN);
        let polled = match source {
            Some((source, flags)) => poll(&mut [PollFd::new(source, flags), stop], timeout),
            None => poll(&mut [stop], timeout),
        };
        match polled {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for packets of a data path");
                self.set();
            }
        }
        !self.is_set()
    }
}

/// Threads that end together: dropping the group ends and joins them.
pub struct ThreadGroup {
    stop: Arc<StopSignal>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadGroup {
    /// A group without threads.
    ///
    /// # Errors
    ///
    /// What `eventfd(2)` reports.
    pub fn new() -> io::Result<Self> {
        Ok(Self { stop: Arc::new(StopSignal::new()?), threads: Vec::new() })
    }

    /// The signal that ends the threads.
    pub fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.stop
    }

    /// Starts a thread, which must return soon after the signal is set.
    ///
    /// # Errors
    ///
    /// The thread cannot be created.
    pub fn spawn(&mut self, name: String, work: impl FnOnce(&StopSignal) + Send + 'static) -> io::Result<()> {
        let stop = Arc::clone(&self.stop);
        self.threads.push(Builder::new().name(name).spawn(move || work(&stop))?);
        Ok(())
    }

    /// Ends all threads and waits for them.
    pub fn end(&mut self) {
        self.stop.set();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                // The panic hook has reported why.
                tracing::error!("a thread of a data path panicked");
            }
        }
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_waiting_thread_ends_at_once() {
        let mut group = ThreadGroup::new().unwrap();
        for n in 0..4 {
            let (socket, other) = UnixDatagram::pair().unwrap();
            group
                .spawn(format!("wait{n}"), move |stop| {
                    assert!(!stop.wait_readable(&socket));
                    drop(other);
                })
                .unwrap();
        }
        group.spawn("sleep".to_owned(), |stop| assert!(!stop.sleep(Duration::from_secs(60)))).unwrap();
        let before = Instant::now();
        drop(group);
        assert!(before.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_wait_ends_with_data_and_a_sleep_with_its_time() {
        let stop = StopSignal::new().unwrap();
        let (socket, other) = UnixDatagram::pair().unwrap();
        assert!(stop.wait_writable(&socket));
        other.send(b"data").unwrap();
        assert!(stop.wait_readable(&socket));
        assert!(stop.sleep(Duration::from_millis(1)));
        stop.set();
        assert!(!stop.wait_readable(&socket) && !stop.sleep(Duration::from_secs(60)));
    }
}
