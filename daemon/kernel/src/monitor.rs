//! Notifications of changes of links, neighbours, addresses, routes, forwarding and multicast groups (rtnetlink groups).

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use super::attribute::messages;
use super::error::{KernelError, Result};
use super::known::KernelModel;
use super::sys;

const GROUPS: [u32; 9] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_NETCONF,
    libc::RTNLGRP_IPV6_NETCONF,
    libc::RTNLGRP_MDB,
];

/// The receive buffer, in bytes: enough for the notifications of a device that is deleted with ten thousand
/// entries. The kernel counts about 1.3 KiB for each, and uses the memory only while they wait.
const RECEIVE_BUFFER: usize = 32 << 20;

/// The receive buffer for notifications about links of workloads, in bytes: enough for those of a thousand attaches.
const PEER_BUFFER: usize = 8 << 20;

/// The length of the largest notification about a link that is read whole, in bytes.
const LARGEST: usize = 64 * 1024;

/// A socket that receives notifications about links in other namespaces: those that have an id in the namespace of the
/// socket, as the namespace of each endpoint has.
#[derive(Debug)]
pub(super) struct PeerMonitor {
    /// `None` if the kernel refuses it.
    socket: Option<Socket>,
    buffer: Vec<u8>,
}

impl PeerMonitor {
    /// Opens the socket in the network namespace of the calling thread. Without `CAP_NET_BROADCAST` it receives nothing.
    pub(super) fn open() -> Self {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_listen_all_namespaces(true)?;
            let _ = setsockopt(&socket, sockopt::RcvBufForce, &PEER_BUFFER);
            socket.add_membership(libc::RTNLGRP_LINK)?;
            Ok(socket)
        };
        let socket = match open() {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, "cannot watch the interfaces of workloads");
                None
            }
        };
        Self { socket, buffer: vec![0; LARGEST] }
    }

    /// The descriptor of the socket, to be polled. `None` if there is none.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Reads all waiting notifications of other namespaces into `known`. If some were lost, an interface stays as its
    /// workload left it until it is set up again.
    pub(super) fn drain(&mut self, known: &mut KernelModel) {
        let Some(socket) = &self.socket else { return };
        loop {
            match sys::receive_with_namespace(socket.as_fd(), &mut self.buffer) {
                Ok((length, Some(_))) => {
                    messages(self.buffer.get(..length).unwrap_or_default())
                        .for_each(|message| known.note_peer(&message));
                }
                // Of the own namespace: `Monitor` receives the same.
                Ok((_, None)) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

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
