//! A cluster in one process: daemons on tokio's virtual clock, a network and kernels in memory, and the invariants that
//! every schedule of faults must keep.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`network`] | datagrams and streams in memory, with latency, loss and partitions |
//! | [`world`] | hosts, faults and invariants |
//! | [`random`] | the generator that a seed starts |

#![warn(missing_docs)]

pub mod network;
pub mod random;
pub mod world;
