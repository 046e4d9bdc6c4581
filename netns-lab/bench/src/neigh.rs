//! A watcher of the FDB entries of VXLAN devices in many namespaces, by kernel notifications (RTNLGRP_NEIGH).

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

/// Bit of RTNLGRP_NEIGH in the group mask of a netlink socket.
const NEIGH_GROUP: u32 = 1 << 2;

/// An entry of a VXLAN device that was added (or replaced) or deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) added: bool,
    pub(crate) mac: Mac,
    /// Destination of the entry.
    pub(crate) destination: IpAddr,
}

/// A change, with the host and the time of its notification.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Index of the host among the watched ones.
    pub(crate) host: usize,
    pub(crate) at: Instant,
    pub(crate) change: Change,
}

/// Records notifications from `start` until it is dropped.
pub(crate) struct Watcher {
    seen: Receiver<Result<Seen>>,
    /// Dropping this half of a socket pair stops the watcher thread.
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
        // One thread for all hosts: waking one per host would take CPU time from the daemons.
        let thread = thread::Builder::new().name("watcher".to_owned()).spawn(move || {
            if let Err(error) = watch(&sockets, &stop, &sender) {
                // A send fails only if the receiver is dropped.
                sender.send(Err(error)).ok();
            }
        })?;
        Ok(Watcher { seen, alive: Some(alive), thread: Some(thread) })
    }

    /// Waits for the next change. `None` if the deadline has passed.
    pub(crate) fn next(&self, deadline: Instant) -> Result<Option<Seen>> {
        match self.seen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(seen) => seen.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the watcher has stopped"),
        }
    }

    /// Discards the changes seen so far.
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
            // Nothing is sent here: readable means that the other end is closed.
            return Ok(());
        }
        for (host, socket) in sockets.iter().enumerate().filter(|(host, _)| ready[*host]) {
            read_all(host, socket, &mut buffer, seen)?;
        }
    }
}

/// Reads the pending notifications of one socket.
fn read_all(host: usize, socket: &OwnedFd, buffer: &mut [u8], seen: &Sender<Result<Seen>>) -> Result<()> {
    loop {
        let length = match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(Errno::EINTR) => continue,
            // In particular ENOBUFS: notifications were lost, so later results would be wrong.
            Err(error) => return Err(error).context("cannot receive notifications"),
        };
        let at = Instant::now();
        for change in changes(&buffer[..length]) {
            seen.send(Ok(Seen { host, at, change })).ok();
        }
    }
}

/// Parses the changes of VXLAN entries in a datagram.
fn changes(datagram: &[u8]) -> Vec<Change> {
    let found = netlink::messages(datagram).filter_map(|(kind, message)| match kind {
        RTM_NEWNEIGH | RTM_DELNEIGH => change(kind == RTM_NEWNEIGH, message),
        _ => None,
    });
    found.collect()
}

/// Size of `struct ndmsg`.
const NDMSG: usize = 12;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const AF_BRIDGE: u8 = 7;

/// Parses a change. `None` for entries without a destination, which belong to bridges.
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
    fn entries_of_vxlan_devices_are_parsed() {
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
    fn malformed_messages_end_the_datagram() {
        assert!(changes(&[1, 2, 3]).is_empty());
        // A length of zero must not cause an endless loop.
        assert!(changes(&[0; 64]).is_empty());
        let mut truncated = message(RTM_NEWNEIGH, AF_BRIDGE, &[attribute(NDA_LLADDR, &[0; 6])]);
        truncated.truncate(30);
        assert!(changes(&truncated).is_empty());
    }
}
