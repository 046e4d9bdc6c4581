//! Exports the symbols of test programs, so that a crate that looks `getrandom` up at run time finds theirs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-tests=-rdynamic");
}
