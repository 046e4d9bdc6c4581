//! Notifications of nftables: detects changes of ovl's tables by other programs.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use ovl_dataplane::nft::BASE_TABLE;
use ovl_dataplane::nft::Table;

use super::attribute::{Message, attributes, messages, text, u8_at};
use super::nftables::{FIXED, IN_TABLE, SUBSYSTEM, is_in};

/// The message that ends a transaction.
const NEW_GENERATION: u8 = libc::NFT_MSG_NEWGEN as u8;

/// The receive buffer, in bytes: enough for the notifications of forty thousand elements that are changed at once.
const RECEIVE_BUFFER: usize = 64 << 20;

/// The changed tables.
#[derive(Debug, Default)]
struct Touched {
    filter: bool,
    tables: BTreeSet<Table>,
}

/// A socket that receives the notifications.
#[derive(Debug)]
pub(super) struct Watch {
    socket: Option<Socket>,
    buffer: Vec<u8>,
    /// The port ids of ovld's sockets that change tables.
    own: Vec<u32>,
    /// The tables that the transaction being read has changed.
    reading: Touched,
    /// The tables that other programs have changed.
    touched: Touched,
}

impl Watch {
    /// Opens the socket in the network namespace of the calling thread. `own` are the port ids of ovld's sockets that
    /// change tables.
    pub(super) fn new(own: Vec<u32>) -> Self {
        let socket = match open() {
            Ok(socket) => Some(socket),
            Err(error) => {
                // The kernel has no nftables. `nft` will report it when it is needed.
                tracing::debug!(%error, "cannot subscribe to nftables notifications");
                None
            }
        };
        let buffer = Vec::with_capacity(64 * 1024);
        Self { socket, buffer, own, reading: Touched::default(), touched: Touched::default() }
    }

    /// The descriptor of the socket, to be polled. `None` if the kernel has no nftables.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether other programs have changed the base table since the last call.
    pub(super) fn take_filter(&mut self) -> bool {
        std::mem::take(&mut self.touched.filter)
    }

    /// Whether [`Self::take_filter`] would return true.
    pub(super) fn is_filter_touched(&self) -> bool {
        self.touched.filter
    }

    /// Whether other programs have changed a table since the last call of [`Self::take_tables`].
    pub(super) fn is_touched(&self, table: Table) -> bool {
        self.touched.tables.contains(&table)
    }

    /// The tables, except the base table, that other programs have changed since the last call.
    pub(super) fn take_tables(&mut self) -> BTreeSet<Table> {
        std::mem::take(&mut self.touched.tables)
    }

    /// Reads all waiting notifications. `own` is the id of an `nft` process that ovld has run, or 0.
    pub(super) fn drain(&mut self, own: u32) {
        let Some(socket) = &self.socket else { return };
        loop {
            self.buffer.clear();
            match socket.recv(&mut self.buffer, nix::libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    self.touched = Touched { filter: true, tables: Table::ALL.into() };
                    continue;
                }
                Err(_) => return,
            }
            for message in messages(&self.buffer) {
                let [kind, subsystem] = message.kind.to_le_bytes();
                if u16::from(subsystem) != SUBSYSTEM {
                    continue;
                }
                if kind == NEW_GENERATION {
                    let Touched { filter, tables } = std::mem::take(&mut self.reading);
                    // In another PID namespace the process id differs from the port id of its socket, which is derived
                    // from the id that ovld sees.
                    let is_own = self.own.contains(&message.sender)
                        || message.sender == own
                        || process(&message) == Some(own);
                    if !is_own {
                        self.touched.filter |= filter;
                        self.touched.tables.extend(tables);
                    }
                } else {
                    self.reading.filter |= is_filter(&message);
                    self.reading
                        .tables
                        .extend(Table::ALL.iter().find(|table| is_in(**table, message.payload)));
                }
            }
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER);
    socket.add_membership(libc::NFNLGRP_NFTABLES as u32)?;
    Ok(socket)
}

/// Whether a message is about the base table: the first attribute of all objects is the name of their table.
fn is_filter(message: &Message<'_>) -> bool {
    u8_at(message.payload, 0).map(i32::from) == Some(libc::NFPROTO_INET)
        && attributes(message.payload, FIXED)
            .any(|(kind, value)| kind == IN_TABLE && text(value) == BASE_TABLE)
}

/// The id of the process that committed a transaction.
fn process(message: &Message<'_>) -> Option<u32> {
    /// Not defined by `libc`.
    const NFTA_GEN_PROC_PID: u16 = 2;
    let (_, value) = attributes(message.payload, FIXED).find(|(kind, _)| *kind == NFTA_GEN_PROC_PID)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}
