//! Times at which the host's side of an endpoint's veth pair appears and the other side is up, by kernel
//! notifications (RTNLGRP_LINK).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use netns_lab::{Host, wait_until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockProtocol, recv};

use crate::netlink;

/// Name prefix of endpoint devices.
pub(super) const ENDPOINTS: &str = "ove-";

const LINK_GROUP: u32 = 1;
const PATIENCE: Duration = Duration::from_secs(20);
const RTM_NEWLINK: u16 = 16;
/// Offset of the flags in `struct ifinfomsg`.
const FLAGS: usize = 8;
const ATTRIBUTES: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFF_LOWER_UP: u32 = 1 << 16;

/// The host's side of a veth pair.
#[derive(Clone, Debug)]
pub(super) struct Link {
    name: String,
    pub(super) created: SystemTime,
    pub(super) up: Option<SystemTime>,
}

/// Records link notifications from `start` until it is dropped.
pub(super) struct Links {
    seen: Arc<Mutex<Vec<Link>>>,
    alive: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Links {
    /// Starts recording links whose names have this prefix.
    pub(super) fn start(host: &Host, prefix: &'static str) -> Result<Self> {
        let socket = netlink::listen(host, SockProtocol::NetlinkRoute, LINK_GROUP)?;
        let (alive, stop) = UnixStream::pair()?;
        let seen = Arc::<Mutex<Vec<Link>>>::default();
        let sink = Arc::clone(&seen);
        let thread = thread::Builder::new()
            .name("links".to_owned())
            .spawn(move || watch(&socket, &stop, &sink, prefix))?;
        Ok(Links { seen, alive: Some(alive), thread: Some(thread) })
    }

    /// Waits for the first link that appeared at or after `start`.
    pub(super) fn wait(&self, start: SystemTime) -> Result<Link> {
        self.wait_for(start, |_| true)
    }

    /// Waits for the first link that appeared at or after `start` and whose other side is up.
    pub(super) fn wait_up(&self, start: SystemTime) -> Result<Link> {
        self.wait_for(start, |link| link.up.is_some())
    }

    fn wait_for(&self, start: SystemTime, is_it: impl Fn(&Link) -> bool) -> Result<Link> {
        wait_until(PATIENCE, "a container's link", || {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.iter().find(|link| link.created >= start).filter(|link| is_it(link)).cloned()
        })
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn watch(socket: &OwnedFd, stop: &UnixStream, seen: &Mutex<Vec<Link>>, prefix: &str) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let mut fds = [socket.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        if !matches!(poll(&mut fds, PollTimeout::NONE), Ok(_) | Err(Errno::EINTR))
            || fds[1].any() == Some(true)
        {
            return;
        }
        while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            let now = SystemTime::now();
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let links = netlink::messages(&buffer[..length]).filter(|(kind, _)| *kind == RTM_NEWLINK);
            for (name, up) in links.filter_map(|(_, message)| link(message, prefix)) {
                match seen.iter_mut().find(|link| link.name == name) {
                    Some(link) if up && link.up.is_none() => link.up = Some(now),
                    Some(_) => {}
                    None => seen.push(Link { name, created: now, up: up.then_some(now) }),
                }
            }
        }
    }
}

/// Parses a link message. Returns the link's name and whether the other side is up. `None` if the name has
/// another prefix.
fn link(message: &[u8], prefix: &str) -> Option<(String, bool)> {
    let flags = u32::from_ne_bytes(message.get(FLAGS..FLAGS + 4)?.try_into().ok()?);
    let (_, name) = netlink::attributes(message.get(ATTRIBUTES..)?).find(|(kind, _)| *kind == IFLA_IFNAME)?;
    let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
    name.starts_with(prefix).then_some((name, flags & IFF_LOWER_UP != 0))
}
