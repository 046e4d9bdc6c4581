//! Names of endpoints and Services, and how endpoints reach the resolver of their host.

pub mod cluster_names;
pub mod resolver;
pub mod zone;
