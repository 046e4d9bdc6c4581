//! Notifications of what changes in nftables: whether somebody else has touched a table of ours.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use ovl_dataplane::nft::BASE_TABLE;
use ovl_dataplane::nft::Table;

use super::attribute::{Message, attributes, messages, text, u8_at};
use super::nftables::{FIXED, is_in};

const NFNLGRP_NFTABLES: u32 = 7;
const NFPROTO_INET: u8 = 1;
/// NFNL_SUBSYS_NFTABLES, and NFT_MSG_NEWGEN, which ends a transaction.
const SUBSYSTEM: u8 = 10;
const NEW_GENERATION: u8 = 15;

/// Room for the notifications of forty thousand elements of ours that are changed at once.
const ROOM: usize = 64 << 20;

/// Tables of ours.
#[derive(Debug, Default)]
struct Touched {
    filter: bool,
    tables: BTreeSet<Table>,
}

/// A socket that hears of changes.
#[derive(Debug)]
pub(super) struct Watch {
    socket: Option<Socket>,
    buffer: Vec<u8>,
    /// Sockets of ours that change tables.
    own: Vec<u32>,
    /// By the transaction that is being read.
    reading: Touched,
    /// By others.
    touched: Touched,
}

impl Watch {
    /// In the network namespace of the calling thread; `own` are the ports of our sockets that change
    /// tables.
    pub(super) fn new(own: Vec<u32>) -> Self {
        let socket = match open() {
            Ok(socket) => Some(socket),
            Err(error) => {
                // A kernel without nftables: `nft` will say so when it is needed.
                tracing::debug!("cannot watch nftables: {error}");
                None
            }
        };
        let buffer = Vec::with_capacity(64 * 1024);
        Self { socket, buffer, own, reading: Touched::default(), touched: Touched::default() }
    }

    /// Becomes readable when somebody changes tables.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether others have touched the base table, since the last time.
    pub(super) fn take_filter(&mut self) -> bool {
        std::mem::take(&mut self.touched.filter)
    }

    /// Whether [`Self::take_filter`] would say so.
    pub(super) fn is_filter_touched(&self) -> bool {
        self.touched.filter
    }

    /// The same of another table.
    pub(super) fn is_touched(&self, table: Table) -> bool {
        self.touched.tables.contains(&table)
    }

    /// Which of the other tables others have touched, since the last time.
    pub(super) fn take_tables(&mut self) -> BTreeSet<Table> {
        std::mem::take(&mut self.touched.tables)
    }

    /// Reads all that waits; `own` is a process of ours that changes tables, or 0.
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
                if subsystem != SUBSYSTEM {
                    continue;
                }
                if kind == NEW_GENERATION {
                    let Touched { filter, tables } = std::mem::take(&mut self.reading);
                    // Seen from another process namespace the process has another number than its
                    // socket, which is named after the number that it has for us.
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
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &ROOM);
    socket.add_membership(NFNLGRP_NFTABLES)?;
    Ok(socket)
}

/// All objects name their table in their first attribute.
fn is_filter(message: &Message<'_>) -> bool {
    u8_at(message.payload, 0) == Some(NFPROTO_INET)
        && attributes(message.payload, FIXED).any(|(kind, value)| kind == 1 && text(value) == BASE_TABLE)
}

/// Who made a generation.
fn process(message: &Message<'_>) -> Option<u32> {
    let (_, value) = attributes(message.payload, FIXED).find(|(kind, _)| *kind == 2)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}
