//! `netns-lab bench` hands its arguments to the program beside it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

#[test]
fn bench_runs_the_program_beside_it() {
    let dir = std::env::temp_dir().join(format!("netns-lab-command-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let (program, bench) = (dir.join("netns-lab"), dir.join("netns-lab-bench"));
    fs::copy(env!("CARGO_BIN_EXE_netns-lab"), &program).unwrap();
    let run = |args: &[&str]| Command::new(&program).arg("bench").args(args).output().unwrap();

    let missing = run(&[]);
    let text = String::from_utf8_lossy(&missing.stderr);
    assert!(!missing.status.success() && text.contains("cargo build --release -p netns-lab-bench"), "{text}");

    fs::write(&bench, "#!/bin/sh\necho \"$@\"\nexit 3\n").unwrap();
    fs::set_permissions(&bench, PermissionsExt::from_mode(0o755)).unwrap();
    for args in [&["--help"][..], &["-h"], &["cni", "--quick", "--only", "single"], &["--quick", "cni"], &[]]
    {
        let output = run(args);
        assert_eq!(output.status.code(), Some(3), "the status is that program's: {args:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), args.join(" "));
    }
    fs::remove_dir_all(&dir).unwrap();
}
