//! Temporary: `ovl-proto` with the modules that are crates of their own now, under their old paths.

pub use ovl_proto::*;

pub use ovl_control as control;
pub use ovl_manifest::yaml as manifest;
