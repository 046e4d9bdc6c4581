//! File names of the packages on the machines, which differ only in their version.

/// The package that is installed first.
pub(crate) const FIRST: &str = "first.deb";
/// The package that is upgraded to.
pub(crate) const NEXT: &str = "next.deb";
