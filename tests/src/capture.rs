//! Packet capture in a namespace.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use netns_lab::Netns;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Captures every frame of every interface of a namespace until it is dropped.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Captured>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

/// What a capture has seen.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    frames: u64,
    /// Number of frames that contain each text.
    with: BTreeMap<String, u64>,
}

impl Captured {
    /// Number of frames that contain a text.
    pub fn count(&self, text: &str) -> u64 {
        self.with.get(text).copied().unwrap_or(0)
    }

    /// Number of frames.
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

impl Capture {
    /// Starts a capture that counts the frames with each of these texts.
    pub fn start(at: &Netns, texts: &[&str]) -> Result<Self> {
        let fd: OwnedFd = at.run(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })??;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &(16 << 20));
        let with = texts.iter().map(|text| ((*text).to_owned(), 0)).collect();
        let seen = Arc::new(Mutex::new(Captured { frames: 0, with }));
        let stop = Arc::new(AtomicBool::new(false));
        let (store, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let reader = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            loop {
                // After the stop, read what is queued and no more. A frame is queued while it passes, so that is
                // every frame from before the stop.
                let stopping = stopped.load(Ordering::Relaxed);
                let flags = if stopping { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
                match recv(fd.as_raw_fd(), &mut frame, flags) {
                    Ok(length) => count(&mut locked(&store), &frame[..length]),
                    Err(Errno::EAGAIN) if stopping => return,
                    Err(_) => {}
                }
            }
        });
        Ok(Self { seen, stop, reader: Some(reader) })
    }

    /// Number of frames so far that contain a text. It can lag behind the traffic: it proves what was seen, and
    /// only [`finish`](Self::finish) proves what was not.
    pub fn count(&self, text: &str) -> u64 {
        locked(&self.seen).count(text)
    }

    /// Number of frames so far.
    pub fn frames(&self) -> u64 {
        locked(&self.seen).frames
    }

    /// Stops the capture, and returns the counts of all frames until now.
    pub fn finish(mut self) -> Result<Captured> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader.join().map_err(|_| anyhow!("the capture's thread panicked"))?;
        }
        Ok(locked(&self.seen).clone())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
    }
}

fn count(seen: &mut Captured, frame: &[u8]) {
    seen.frames += 1;
    for (text, count) in &mut seen.with {
        *count += u64::from(frame.windows(text.len()).any(|part| part == text.as_bytes()));
    }
}

fn locked(seen: &Mutex<Captured>) -> MutexGuard<'_, Captured> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
