//! Watches kernels: tells when a transaction on elements of the table of Services is committed, by nftables' own
//! notification, in many namespaces at once.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_lab::Host;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt::RcvBufForce,
};

/// The bit of NFNLGRP_NFTABLES in the mask that a netlink socket is bound to.
const NFTABLES_GROUP: u32 = 1 << 6;
/// NFT_MSG_NEWSETELEM and NFT_MSG_DELSETELEM of NFNL_SUBSYS_NFTABLES.
const ELEMENTS: [u16; 2] = [10 << 8 | 12, 10 << 8 | 14];
const TABLE: &[u8] = b"ovl-services\0";
/// struct nlmsghdr, struct nfgenmsg.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// NFTA_SET_ELEM_LIST_TABLE.
const LIST_TABLE: u16 = 1;
const RECEIVE_BUFFER: usize = 32 << 20;

/// Hears of the commits of some hosts.
pub(super) struct Commits(Vec<OwnedFd>);

impl Commits {
    pub(super) fn watch<'a>(hosts: impl IntoIterator<Item = &'a Host>) -> Result<Self> {
        let listen = |host: &Host| -> Result<OwnedFd> {
            host.run(listen)?.with_context(|| format!("cannot watch the kernel of {}", host.name()))
        };
        hosts.into_iter().map(listen).collect::<Result<_>>().map(Self)
    }

    /// Forgets what was committed so far.
    pub(super) fn drain(&self) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        self.0.iter().try_for_each(|socket| read_all(socket, &mut buffer).map(drop))
    }

    /// When the last of the hosts had committed something, each for the first time from now on.
    pub(super) fn all(&self, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0; 1 << 16];
        let mut missing: Vec<&OwnedFd> = self.0.iter().collect();
        loop {
            let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now()))?;
            let mut fds: Vec<PollFd> =
                missing.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, left) {
                Ok(0) => {
                    bail!("{} of {} hosts committed nothing in {patience:?}", missing.len(), self.0.len())
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for notifications"),
            }
            let at = Instant::now();
            let mut still = Vec::new();
            for socket in missing {
                if !read_all(socket, &mut buffer)? {
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

/// Of the calling thread's namespace.
fn listen() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES_GROUP))?;
    Ok(socket)
}

/// Reads what waits; says whether it was about our elements.
fn read_all(socket: &OwnedFd, buffer: &mut [u8]) -> Result<bool> {
    let mut found = false;
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => found |= is_ours(&buffer[..length]),
            Err(Errno::EAGAIN) => return Ok(found),
            Err(Errno::EINTR) => {}
            // Of a load of all of them: what was lost was ours.
            Err(Errno::ENOBUFS) => found = true,
            Err(error) => return Err(error).context("cannot receive notifications"),
        }
    }
}

fn is_ours(mut rest: &[u8]) -> bool {
    let u16_at = |bytes: &[u8], at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
    let u32_at = |bytes: &[u8], at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    while let (Some(length), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
        let Some(message) = rest.get(HEADER..length as usize) else { break };
        if ELEMENTS.contains(&kind) {
            let mut attributes = message.get(NFGENMSG..).unwrap_or_default();
            while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
                let Some(value) = attributes.get(4..usize::from(length)) else { break };
                if kind == LIST_TABLE {
                    return value == TABLE;
                }
                attributes = attributes.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
            }
        }
        rest = rest.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, table: &[u8]) -> Vec<u8> {
        let mut body = vec![1, 0, 0, 0];
        body.extend((4 + table.len() as u16).to_ne_bytes());
        body.extend(LIST_TABLE.to_ne_bytes());
        body.extend(table);
        body.resize(body.len().next_multiple_of(4), 0);
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn elements_of_the_table_of_services_are_seen() {
        assert!(is_ours(&message(ELEMENTS[0], TABLE)));
        assert!(is_ours(&[message(10 << 8 | 15, TABLE), message(ELEMENTS[1], TABLE)].concat()));
        assert!(!is_ours(&message(ELEMENTS[0], b"ovl-policy\0")));
        assert!(!is_ours(&message(10 << 8 | 15, TABLE)));
        assert!(!is_ours(&[0; 40]) && !is_ours(&[1, 2]));
    }
}
