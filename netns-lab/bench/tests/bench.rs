//! The `netns-lab bench` command with the fake ovld of `netns-lab/tests/fake`. Needs root.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use netns_lab::{lab_names, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A temporary directory with an ovld and an ovlctl, deleted on drop.
struct Binaries(PathBuf);

impl Binaries {
    fn new(name: &str, ovlctl: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("netns-lab-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let fake = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fake");
        fs::copy(fake.join("ovld"), dir.join("ovld")).unwrap();
        fs::write(dir.join("ovlctl"), ovlctl).unwrap();
        fs::set_permissions(dir.join("ovlctl"), PermissionsExt::from_mode(0o755)).unwrap();
        Binaries(dir)
    }

    fn bench(&self, figure: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_netns-lab-bench"));
        command.args(["--quick", "--only", figure, "--release-dir"]).arg(&self.0);
        command.arg("--json").arg(self.0.join("out/bench.json"));
        command
    }

    /// Returns the labs that use these binaries, which are those of this test.
    fn labs(&self) -> Vec<String> {
        let ours = |name: &String| {
            let state = fs::read_to_string(format!("/run/netns-lab/{name}/state.json"));
            state.is_ok_and(|state| state.contains(self.0.to_str().unwrap()))
        };
        lab_names().unwrap().into_iter().filter(ours).collect()
    }
}

impl Drop for Binaries {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn failed_figure_is_reported() {
    let fake = include_str!("../../tests/fake/ovlctl");
    let binaries = Binaries::new("mute", fake);
    let output = binaries.bench("attach").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("attach: failed") && text.contains("cannot reach ovld at"), "{text}");
    assert!(text.contains("WARNING") && text.contains("not known to be a release build"), "{text}");
    let json = fs::read(binaries.0.join("out/bench.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["figures"][0]["name"], &json["figures_failed"]), (&"attach".into(), &1.into()));
    assert!(binaries.labs().is_empty());
}

#[test]
fn interrupt_removes_all_labs() {
    // The hosts never become ready, which leaves time to interrupt the benchmark.
    let never_ready = "#!/bin/sh\n[ \"$1\" = key ] && echo secret && exit\nexit 1\n";
    let binaries = Binaries::new("slow", never_ready);
    let mut child = binaries.bench("dead").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let second = Duration::from_secs(1);
    wait_until(second * 10, "a daemon in the lab", || {
        binaries
            .labs()
            .iter()
            .any(|lab| Path::new(&format!("/run/netns-lab/{lab}/h3/run/ovld.sock")).exists())
    })
    .unwrap();
    let lab = binaries.labs().remove(0);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let status = wait_until(second * 10, "the end of the benchmark", || child.try_wait()).unwrap();
    assert_eq!((status.code(), status.signal()), (Some(130), None));
    assert!(binaries.labs().is_empty());
    assert!(!Path::new(&format!("/run/netns/{lab}-h1")).exists());
}

#[test]
fn invalid_options_are_rejected() {
    let binaries = Binaries::new("wrong", "");
    for wrong in [["--only", "nonsense"], ["--seconds", "0"], ["--release-dir", "/nowhere"]] {
        let output = binaries.bench("tcp").args(wrong).output().unwrap();
        assert!(!output.status.success(), "{wrong:?}");
        assert!(binaries.labs().is_empty());
    }
}
