//! Passes the commit from the environment variable `OVL_COMMIT` on to `--version`.
//!
//! packaging/deb and tests/run set the variable. Asking git here would make every build depend on git, and every
//! commit would rebuild all crates.

fn main() {
    println!("cargo::rerun-if-env-changed=OVL_COMMIT");
    let commit = std::env::var("OVL_COMMIT").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=OVL_COMMIT={commit}");
}
