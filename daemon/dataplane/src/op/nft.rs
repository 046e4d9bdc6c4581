//! Tables of nftables and their elements.

use std::fmt;
use std::sync::Arc;

use crate::nft::{BASE_TABLE, Element, Key, Set, Skeleton, Table, Value};
use crate::state::Dataplane;

/// A change of our nftables tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NftOp {
    /// Replaces the base table, given as text, in one transaction.
    SetBase(String),
    /// Deletes the base table.
    DeleteBase,
    /// Writes the skeleton of another table. Elements of sets that stay are kept.
    SetTable(Table, Arc<Skeleton>),
    /// Deletes that table, with its elements.
    DeleteTable(Table),
    /// Puts an element into a set, instead of one with the same key.
    SetElement(Element),
    /// Deletes the element with a key from a set.
    DeleteElement(Set, Key),
}

impl NftOp {
    /// The table that it changes. None for the base table.
    pub fn table(&self) -> Option<Table> {
        match self {
            Self::SetBase(_) | Self::DeleteBase => None,
            Self::SetTable(table, _) | Self::DeleteTable(table) => Some(*table),
            Self::SetElement(Element { set, .. }) | Self::DeleteElement(set, _) => Some(set.table),
        }
    }

    /// Whether it changes a single element.
    pub fn is_element(&self) -> bool {
        match self {
            Self::SetElement(_) | Self::DeleteElement(..) => true,
            Self::SetBase(_) | Self::DeleteBase | Self::SetTable(..) | Self::DeleteTable(_) => false,
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::SetBase(text) => state.filter = Some(text.clone()),
            Self::DeleteBase => state.filter = None,
            Self::SetTable(table, skeleton) => {
                state.tables.insert(*table, Arc::clone(skeleton));
            }
            Self::DeleteTable(table) => {
                state.tables.remove(table);
                state.elements.forget(*table);
            }
            Self::SetElement(Element { set, key, value }) => {
                state.elements.insert(set, key.clone(), value.clone());
            }
            Self::DeleteElement(set, key) => {
                state.elements.remove(set, key);
            }
        }
    }
}

impl fmt::Display for NftOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetBase(_) => write!(f, "nft -f - # table inet {BASE_TABLE}"),
            Self::DeleteBase => write!(f, "nft delete table inet {BASE_TABLE}"),
            Self::SetTable(table, _) => write!(f, "nft -f - # table {table}"),
            Self::DeleteTable(table) => write!(f, "nft delete table {table}"),
            Self::SetElement(element) => {
                write!(f, "nft add element {} '{{ {element} }}'", element.set.path())
            }
            Self::DeleteElement(set, key) => {
                let element = Element { set: set.clone(), key: key.clone(), value: Value::None };
                write!(f, "nft delete element {} '{{ {element} }}'", set.path())
            }
        }
    }
}
