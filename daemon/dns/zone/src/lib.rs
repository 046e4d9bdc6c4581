//! Domain names, their records, and which client sees which names.
//!
//! A [`Zone`] is an immutable snapshot that shares its unchanged parts with the snapshot before it. Who decides on names
//! makes one; the DNS server of `ovl-dns` answers from it. The crate does no I/O. Begin to read at [`Zone::find`].

mod name;
mod pattern;
mod zone;

pub use name::{KeptName, Name};
pub use pattern::NamePattern;
pub use zone::{Client, ClientContext, NetworkKey, OtherRecords, Records, Resolution, Zone};
