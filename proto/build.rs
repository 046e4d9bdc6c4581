//! The commit goes into `--version`. Whoever builds for others says it (packaging/deb and tests/run do): asking
//! git here would make every build depend on it, and every commit build everything anew.

fn main() {
    println!("cargo::rerun-if-env-changed=OVL_COMMIT");
    let commit = std::env::var("OVL_COMMIT").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=OVL_COMMIT={commit}");
}
