//! Notifications of what changes in the kernel.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

use super::attribute::messages;
use super::error::{KernelError, Result};
use super::known::Known;

/// RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV4_NETCONF,
/// _IPV6_NETCONF.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 9, 11, 24, 25];

/// Room for the notifications of a device that is deleted with ten thousand entries. The kernel
/// counts about 1.3 KiB for each, and takes the memory only while they wait.
const ROOM: usize = 32 << 20;

/// A socket that hears of changes.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// In the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            if setsockopt(&socket, sockopt::RcvBufForce, &ROOM).is_err() {
                setsockopt(&socket, sockopt::RcvBuf, &ROOM)?;
            }
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(socket)
        };
        let socket = open().map_err(|error| KernelError::io("cannot watch the kernel's devices", &error))?;
        Ok(Self { socket, buffer: Vec::with_capacity(64 * 1024) })
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads all that waits; gives true if something was lost.
    pub(super) fn drain(&mut self, known: &mut Known) -> bool {
        let mut lost = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, nix::libc::MSG_DONTWAIT) {
                Ok(_) => messages(&self.buffer).for_each(|message| known.note(&message)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => lost = true,
                Err(_) => return lost,
            }
        }
    }

    #[cfg(test)]
    pub(super) fn shrink(&self) {
        let _ = setsockopt(&self.socket, sockopt::RcvBuf, &1);
    }
}
