//! What calls of container runtimes mean, what is decided for them, and what is answered. ovld uses it, and the
//! plugin of Docker Engines does too, so it depends on nothing that only a daemon needs. No I/O.

pub mod cni;
pub mod docker;
