//! What goes over a wire: a capture in a namespace.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use netns_lab::Netns;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Looks at every frame of every interface of a namespace until it is dropped.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    frames: u64,
    /// Frames with each of the texts that are looked for.
    with: BTreeMap<String, u64>,
}

impl Capture {
    /// Looks for these texts in what passes from now on.
    pub fn start(at: &Netns, texts: &[&str]) -> Result<Self> {
        let fd: OwnedFd = at.run(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })??;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &(16 << 20));
        let with = texts.iter().map(|text| ((*text).to_owned(), 0)).collect();
        let seen = Arc::new(Mutex::new(Seen { frames: 0, with }));
        let stop = Arc::new(AtomicBool::new(false));
        let (store, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let reader = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            while !stopped.load(Ordering::Relaxed) {
                let Ok(length) = recv(fd.as_raw_fd(), &mut frame, MsgFlags::empty()) else { continue };
                let mut seen = locked(&store);
                seen.frames += 1;
                for (text, count) in &mut seen.with {
                    *count +=
                        u64::from(frame[..length].windows(text.len()).any(|part| part == text.as_bytes()));
                }
            }
        });
        Ok(Self { seen, stop, reader: Some(reader) })
    }

    /// In how many frames a text was.
    pub fn count(&self, text: &str) -> u64 {
        locked(&self.seen).with.get(text).copied().unwrap_or(0)
    }

    /// How many frames there were.
    pub fn frames(&self) -> u64 {
        locked(&self.seen).frames
    }

    /// Ends it.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let reader = self.reader.take();
        reader.map_or(Ok(()), |reader| reader.join().map_err(|_| anyhow!("the capture's thread panicked")))
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

fn locked(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
