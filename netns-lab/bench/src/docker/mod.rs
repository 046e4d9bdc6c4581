//! `bench docker`: the Docker Engine figures.

pub(crate) mod cut;
mod ground;
pub(crate) mod link;
mod links;
pub(crate) mod pinging;
pub(crate) mod run;
