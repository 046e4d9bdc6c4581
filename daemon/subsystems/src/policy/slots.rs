//! How many policies the tables can look up for one endpoint.

use super::members::Membership;

/// How many policies can select one endpoint in one direction: those of the tier Admin, and what is asked after them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Slots {
    /// Those of the tier Admin.
    pub(super) admin: usize,
    /// The others.
    pub(super) others: usize,
}

impl Slots {
    /// Whether there are at least these slots.
    pub(super) fn have(self, needed: Self) -> bool {
        needed.admin <= self.admin && needed.others <= self.others
    }

    /// Returns the larger number of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self { admin: self.admin.max(other.admin), others: self.others.max(other.others) }
    }
}

/// Returns how many slots the memberships of an address take.
pub(super) fn slots_of(members: &[Membership]) -> Slots {
    members.iter().fold(Slots::default(), |slots, member| match member {
        Membership::Slot(_, slot, _) => slots.max(Slots { others: *slot, admin: 0 }),
        Membership::Admin(_, slot, _) => slots.max(Slots { admin: *slot, others: 0 }),
        _ => slots,
    })
}
