//! What kernels notify by netlink: a socket that hears a group, and how its datagrams are made up.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use netns_lab::Host;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, setsockopt, socket,
    sockopt::RcvBufForce,
};

/// Room for thousands of notifications while the reader waits for a processor.
const RECEIVE_BUFFER: usize = 32 << 20;
/// The size of struct nlmsghdr.
const HEADER: usize = 16;

/// A socket in a host's namespace that hears the groups of a mask, and never waits. It stays there, whoever reads it.
pub(crate) fn listen(host: &Host, protocol: SockProtocol, groups: u32) -> Result<OwnedFd> {
    host.run(|| open(protocol, groups))?
        .with_context(|| format!("cannot watch the kernel of {}", host.name()))
}

fn open(protocol: SockProtocol, groups: u32) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// The messages of a datagram: the kind of each, and what follows its header.
pub(crate) fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (u32_at(rest, 0)? as usize, u16_at(rest, 4)?);
        let message = rest.get(HEADER..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind, message))
    })
}

/// Attributes one after the other (struct nlattr): the kind of each, and its value.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(u16_at(rest, 0)?), u16_at(rest, 2)?);
        let value = rest.get(4..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Messages and attributes begin at multiples of four.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// What a kernel would send, for the tests of those who read it.
#[cfg(test)]
pub(crate) mod made {
    use super::{HEADER, aligned};

    pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    pub(crate) fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        bytes
    }
}
