//! The program `ovld`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovld::main()
}
