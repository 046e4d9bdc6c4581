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
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt::RcvBufForce,
};

use super::client::Mac;

/// The bit of RTNLGRP_NEIGH in the mask that a netlink socket is bound to.
const NEIGH_GROUP: u32 = 1 << 2;

/// Room for the notifications of thousands of entries while the reader waits for a processor.
const RECEIVE_BUFFER: usize = 32 << 20;

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
        // A socket stays in the namespace that it was opened in.
        let sockets = hosts
            .iter()
            .map(|host| {
                host.run(listen)?.with_context(|| format!("cannot watch the kernel of {}", host.name()))
            })
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

/// Of the calling thread's namespace.
fn listen() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NEIGH_GROUP))?;
    Ok(socket)
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

/// The changes of VXLAN entries in a datagram of netlink messages (struct nlmsghdr).
fn changes(mut rest: &[u8]) -> Vec<Change> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
        let Some(message) = rest.get(HEADER..length as usize) else { break };
        if let RTM_NEWNEIGH | RTM_DELNEIGH = kind {
            found.extend(change(kind == RTM_NEWNEIGH, message));
        }
        rest = rest.get(aligned(length as usize)..).unwrap_or_default();
    }
    found
}

/// struct nlmsghdr, struct ndmsg.
const HEADER: usize = 16;
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
    let mut rest = message.get(NDMSG..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(value) = rest.get(4..length as usize) else { break };
        match kind {
            NDA_LLADDR => mac = Mac::try_from(value).ok(),
            NDA_DST => destination = address(value),
            _ => {}
        }
        rest = rest.get(aligned(length as usize)..).unwrap_or_default();
    }
    Some(Change { added, mac: mac?, destination: destination? })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4.or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn message(kind: u16, family: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![family];
        body.resize(NDMSG, 0);
        body.extend(attributes.concat());
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        bytes
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
