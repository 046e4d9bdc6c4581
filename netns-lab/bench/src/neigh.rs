//! Watches kernels: tells when a VXLAN device's forwarding entry (FDB) comes or goes, by the
//! kernel's own notification (RTNLGRP_NEIGH), in many namespaces at once.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use netns_lab::Host;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockProtocol, recv};

use super::client::Mac;
use super::netlink;

/// The bit of RTNLGRP_NEIGH in the mask that a netlink socket is bound to.
const NEIGH_GROUP: u32 = 1 << 2;

/// A VXLAN device's entry that came (or was replaced) or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) added: bool,
    pub(crate) mac: Mac,
    /// The host that the entry sends to.
    pub(crate) destination: IpAddr,
}

/// A change, and where and when the watcher was told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// The host's place among those that are watched.
    pub(crate) host: usize,
    pub(crate) at: Instant,
    pub(crate) change: Change,
}

/// Listens from `start` until it is dropped.
pub(crate) struct Watcher {
    seen: Receiver<Result<Seen>>,
    /// Its other end sees that this one is gone.
    alive: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub(crate) fn start(hosts: &[&Host]) -> Result<Self> {
        let sockets = hosts
            .iter()
            .map(|host| netlink::listen(host, SockProtocol::NetlinkRoute, NEIGH_GROUP))
            .collect::<Result<Vec<OwnedFd>>>()?;
        let (alive, stop) = UnixStream::pair()?;
        let (sender, seen) = channel();
        // One thread for all: to wake one per host would take processor time from the daemons.
        let thread = thread::Builder::new().name("watcher".to_owned()).spawn(move || {
            if let Err(error) = watch(&sockets, &stop, &sender) {
                // Nobody listens any more: then nobody misses it.
                sender.send(Err(error)).ok();
            }
        })?;
        Ok(Watcher { seen, alive: Some(alive), thread: Some(thread) })
    }

    /// The next change, or `None` when the deadline is over.
    pub(crate) fn next(&self, deadline: Instant) -> Result<Option<Seen>> {
        match self.seen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(seen) => seen.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the watcher has ended"),
        }
    }

    /// Forgets what was seen so far.
    pub(crate) fn drain(&self) -> Result<()> {
        self.seen.try_iter().try_for_each(|seen| seen.map(drop))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn watch(sockets: &[OwnedFd], stop: &UnixStream, seen: &Sender<Result<Seen>>) -> Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let mut fds: Vec<PollFd> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for notifications"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready.last() == Some(&true) {
            // Nothing is ever sent here: it is the other end's end.
            return Ok(());
        }
        for (host, socket) in sockets.iter().enumerate().filter(|(host, _)| ready[*host]) {
            read_all(host, socket, &mut buffer, seen)?;
        }
    }
}

/// Reads what has come to one socket.
fn read_all(host: usize, socket: &OwnedFd, buffer: &mut [u8], seen: &Sender<Result<Seen>>) -> Result<()> {
    loop {
        let length = match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(Errno::EINTR) => continue,
            // ENOBUFS above all: notifications were lost, so nothing after this is certain.
            Err(error) => return Err(error).context("cannot receive notifications"),
        };
        let at = Instant::now();
        for change in changes(&buffer[..length]) {
            seen.send(Ok(Seen { host, at, change })).ok();
        }
    }
}

/// The changes of VXLAN entries in a datagram.
fn changes(datagram: &[u8]) -> Vec<Change> {
    let found = netlink::messages(datagram).filter_map(|(kind, message)| match kind {
        RTM_NEWNEIGH | RTM_DELNEIGH => change(kind == RTM_NEWNEIGH, message),
        _ => None,
    });
    found.collect()
}

/// struct ndmsg.
const NDMSG: usize = 12;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const AF_BRIDGE: u8 = 7;

/// An entry with a destination is a VXLAN device's own; a bridge's has none.
fn change(added: bool, message: &[u8]) -> Option<Change> {
    if *message.first()? != AF_BRIDGE {
        return None;
    }
    let (mut mac, mut destination) = (None, None);
    for (kind, value) in netlink::attributes(message.get(NDMSG..)?) {
        match kind {
            NDA_LLADDR => mac = Mac::try_from(value).ok(),
            NDA_DST => destination = address(value),
            _ => {}
        }
    }
    Some(Change { added, mac: mac?, destination: destination? })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4.or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::made::{self, attribute};

    fn message(kind: u16, family: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![family];
        body.resize(NDMSG, 0);
        body.extend(attributes.concat());
        made::message(kind, &body)
    }

    #[test]
    fn entries_of_vxlan_devices_are_seen() {
        let mac = attribute(NDA_LLADDR, &[2, 0, 0, 0, 0, 9]);
        let destination = attribute(NDA_DST, &[192, 168, 77, 3]);
        let datagram = [
            message(RTM_NEWNEIGH, AF_BRIDGE, &[mac.clone(), destination.clone()]),
            message(RTM_NEWNEIGH, AF_BRIDGE, std::slice::from_ref(&mac)),
            message(RTM_NEWNEIGH, 2, &[mac.clone(), destination.clone()]),
            message(RTM_DELNEIGH, AF_BRIDGE, &[destination, mac]),
        ]
        .concat();
        let expected =
            Change { added: true, mac: [2, 0, 0, 0, 0, 9], destination: IpAddr::from([192, 168, 77, 3]) };
        assert_eq!(changes(&datagram), [expected, Change { added: false, ..expected }]);
    }

    #[test]
    fn damaged_messages_end_the_datagram() {
        assert!(changes(&[1, 2, 3]).is_empty());
        // A length of nothing must not be read for ever.
        assert!(changes(&[0; 64]).is_empty());
        let mut truncated = message(RTM_NEWNEIGH, AF_BRIDGE, &[attribute(NDA_LLADDR, &[0; 6])]);
        truncated.truncate(30);
        assert!(changes(&truncated).is_empty());
    }
}
