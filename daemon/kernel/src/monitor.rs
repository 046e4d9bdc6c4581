//! Notifications of changes of links, neighbours, addresses, routes and forwarding (rtnetlink groups).

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use super::attribute::messages;
use super::error::{KernelError, Result};
use super::known::KernelModel;

const GROUPS: [u32; 8] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_NETCONF,
    libc::RTNLGRP_IPV6_NETCONF,
];

/// The receive buffer, in bytes: enough for the notifications of a device that is deleted with ten thousand
/// entries. The kernel counts about 1.3 KiB for each, and uses the memory only while they wait.
const RECEIVE_BUFFER: usize = 32 << 20;

/// A socket that receives the notifications.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Opens the socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
                setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
            }
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(socket)
        };
        let socket =
            open().map_err(|error| KernelError::io("cannot subscribe to rtnetlink notifications", &error))?;
        Ok(Self { socket, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// The descriptor of the socket, to be polled.
    pub(super) fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads all waiting notifications into `known`. Returns whether notifications were lost.
    pub(super) fn drain(&mut self, known: &mut KernelModel) -> bool {
        let mut lost = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => messages(&self.buffer).for_each(|message| known.note(&message)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(_) => return lost,
            }
        }
    }

    /// Gives the socket the smallest receive buffer, so that notifications are lost.
    #[cfg(test)]
    pub(super) fn shrink(&self) {
        let _ = setsockopt(&self.socket, sockopt::RcvBuf, &1);
    }
}
