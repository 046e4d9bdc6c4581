//! A watcher of transactions on elements of one of ovl's tables in many namespaces, by nftables notifications.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_lab::Host;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockProtocol, recv};

use crate::netlink;

/// Bit of NFNLGRP_NFTABLES in the group mask of a netlink socket.
const NFTABLES_GROUP: u32 = 1 << 6;
/// NFT_MSG_NEWSETELEM and NFT_MSG_DELSETELEM of NFNL_SUBSYS_NFTABLES.
const ELEMENTS: [u16; 2] = [10 << 8 | 12, 10 << 8 | 14];
/// The table of Services, as notifications name it.
pub(crate) const SERVICES: &[u8] = b"ovl-services\0";
/// The tables of policies.
pub(crate) const POLICY: &[u8] = b"ovl-policy\0";
/// Size of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// NFTA_SET_ELEM_LIST_TABLE.
const LIST_TABLE: u16 = 1;

/// Watches the commits of hosts.
pub(crate) struct Commits {
    sockets: Vec<OwnedFd>,
    table: &'static [u8],
}

impl Commits {
    /// Watches those to a table: [`SERVICES`] or [`POLICY`].
    pub(crate) fn watch<'a>(hosts: impl IntoIterator<Item = &'a Host>, table: &'static [u8]) -> Result<Self> {
        let listen = |host| netlink::listen(host, SockProtocol::NetlinkNetFilter, NFTABLES_GROUP);
        let sockets = hosts.into_iter().map(listen).collect::<Result<_>>()?;
        Ok(Self { sockets, table })
    }

    /// Discards the commits so far.
    pub(crate) fn drain(&self) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        self.sockets.iter().try_for_each(|socket| read_all(socket, self.table, &mut buffer).map(drop))
    }

    /// Waits for the first commit of every host from now on, and returns the time of the last of them.
    pub(crate) fn all(&self, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 1 << 16];
        let mut missing: Vec<&OwnedFd> = self.sockets.iter().collect();
        loop {
            let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now()))?;
            let mut fds: Vec<PollFd> =
                missing.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, left) {
                Ok(0) => {
                    bail!(
                        "{} of {} hosts committed nothing in {patience:?}",
                        missing.len(),
                        self.sockets.len()
                    )
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for notifications"),
            }
            let at = Instant::now();
            let mut still = Vec::new();
            for socket in missing {
                if !read_all(socket, self.table, &mut buffer)? {
                    still.push(socket);
                }
            }
            if still.is_empty() {
                return Ok(at);
            }
            missing = still;
        }
    }
}

/// Reads pending notifications, and returns whether any concerns the table.
fn read_all(socket: &OwnedFd, table: &[u8], buffer: &mut [u8]) -> Result<bool> {
    let mut found = false;
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => found |= is_about(table, &buffer[..length]),
            Err(Errno::EAGAIN) => return Ok(found),
            Err(Errno::EINTR) => {}
            // Notifications were lost while all Services were loaded, so they concerned their table.
            Err(Errno::ENOBUFS) => found = true,
            Err(error) => return Err(error).context("cannot receive notifications"),
        }
    }
}

fn is_about(table: &[u8], datagram: &[u8]) -> bool {
    let names = |message: &[u8]| {
        let attributes = message.get(NFGENMSG..).unwrap_or_default();
        netlink::attributes(attributes).any(|(kind, value)| kind == LIST_TABLE && value == table)
    };
    netlink::messages(datagram).any(|(kind, message)| ELEMENTS.contains(&kind) && names(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::made::{self, attribute};

    fn message(kind: u16, table: &[u8]) -> Vec<u8> {
        made::message(kind, &[&[1, 0, 0, 0][..], &attribute(LIST_TABLE, table)].concat())
    }

    #[test]
    fn elements_of_the_table_are_recognised() {
        let is_ours = |datagram: &[u8]| is_about(SERVICES, datagram);
        assert!(is_ours(&message(ELEMENTS[0], SERVICES)));
        assert!(is_ours(&[message(10 << 8 | 15, SERVICES), message(ELEMENTS[1], SERVICES)].concat()));
        assert!(!is_ours(&message(ELEMENTS[0], POLICY)));
        assert!(!is_ours(&message(10 << 8 | 15, SERVICES)));
        assert!(!is_ours(&[0; 40]) && !is_ours(&[1, 2]));
    }
}
