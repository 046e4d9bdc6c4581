//! The connections that the kernel tracks in a namespace.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`, of `linux/netfilter/nfnetlink.h`.
const DELETE: u16 = 1 << 8 | 2;

/// `NLM_F_REQUEST | NLM_F_ACK`
const FLAGS: u16 = 1 | 4;

/// Length of the headers of netlink (16 bytes) and of nfnetlink (4 bytes).
const LENGTH: u32 = 20;

/// `NLMSG_ERROR`: also the type of an acknowledgement, whose error is 0.
const ERROR: u16 = 2;

/// Deletes all tracked connections of the calling thread's namespace: a request to delete that names none is for all
/// (`ctnetlink_del_conntrack`). `conntrack -F` does the same, but is seldom installed.
pub(crate) fn flush() -> Result<()> {
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
            .context("no netlink socket for connection tracking")?;
    let mut request = Vec::new();
    request.extend(LENGTH.to_ne_bytes());
    request.extend(DELETE.to_ne_bytes());
    request.extend(FLAGS.to_ne_bytes());
    // Sequence number, port; then any address family, version 0, resource 0.
    request.extend([0; 12]);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())
        .context("cannot flush the tracked connections")?;
    let mut reply = [0; 64];
    let length = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty())?;
    let (kind, error) = (
        u16::from_ne_bytes([reply[4], reply[5]]),
        i32::from_ne_bytes([reply[16], reply[17], reply[18], reply[19]]),
    );
    ensure!(
        length >= 20 && kind == ERROR && error == 0,
        "the kernel refused to flush the tracked connections: error {error}"
    );
    Ok(())
}
