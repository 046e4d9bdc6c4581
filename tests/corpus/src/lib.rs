//! Inputs that the fuzzer found, and their replay by the unit tests of the code that they are for.
//!
//! Each folder beside `src` has the name of a fuzz target. `tests/fuzz/run` adds to it what reaches new code.

#![warn(missing_docs)]

use std::fs;
use std::path::Path;

/// Runs a fuzz target with each of its inputs.
///
/// # Panics
///
/// If there is no input, if one cannot be read, or if the target panics. Before that, the name of the input is printed.
#[allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests")]
pub fn replay(target: &str, run: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "{} is empty", folder.display());
}
