//! What the machines find: two packages that differ by their version alone.

/// The one that is installed.
pub(crate) const FIRST: &str = "first.deb";
/// The one that is upgraded to.
pub(crate) const NEXT: &str = "next.deb";
