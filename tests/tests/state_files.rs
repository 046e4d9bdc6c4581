//! Damaged, missing and read-only files: they are refused or recovered from as documented, and never silently
//! emptied.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Signal, find_binary, wait_until};
use ovl_tests::{
    SOON, assert_contains, attach, attach_workload, endpoints, ping_all_pairs, problems, rows, start_lab,
    text, wait_clean, wait_endpoints, wait_network, wait_problem,
};

/// Starts a daemon that must fail to start, and returns its log.
fn start_error(host: &Host) -> Result<String> {
    start_error_with(host, 1)
}

/// Starts a daemon that must exit with this status, and returns its log.
fn start_error_with(host: &Host, expected: i32) -> Result<String> {
    let before = host.log().len();
    host.start()?;
    host.wait_exit(SOON)?;
    let status = host.exit_status().context("no exit status")?;
    ensure!(status.code() == Some(expected), "exited with {status}: {}", host.log());
    Ok(host.log().split_off(before))
}

/// Writes these bytes to a file of the state directory and starts the daemon, which must refuse to start, name the file
/// and leave it as it is.
fn assert_file_refused(host: &Host, path: &Path, bytes: &[u8], parts: &[&str]) -> Result<()> {
    fs::write(path, bytes)?;
    // A restart would not help, so the status keeps systemd from trying.
    let log = start_error_with(host, 78)?;
    assert_contains(&log, &[&path.display().to_string()]);
    assert_contains(&log, parts);
    ensure!(fs::read(path)? == bytes, "{} was changed", path.display());
    Ok(())
}

/// Deletes a file of the state directory and starts the daemon, which must refuse to start and name the file.
fn assert_missing_refused(host: &Host, path: &Path) -> Result<()> {
    fs::remove_file(path)?;
    let log = start_error_with(host, 78)?;
    assert_contains(&log, &[&path.display().to_string(), "missing", "ovlctl peers forget"]);
    Ok(())
}

/// Returns the bytes with a bit of one of them changed.
fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 0x10;
    bytes
}

/// A lab of two hosts with a network and an endpoint on each. `h1` knows all of it, and is killed.
fn killed() -> Result<(Lab, ovl_tests::Attached, ovl_tests::Attached)> {
    let lab = start_lab(2)?;
    lab["h1"].ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"])?;
    wait_network(&lab["h2"], "demo")?;
    let a = attach(&lab["h1"], "a", "demo", &[])?;
    let b = attach(&lab["h2"], "b", "demo", &[])?;
    ping_all_pairs(&[a.clone(), b.clone()], SOON)?;
    wait_endpoints(&lab["h1"], &["a on h1 is ready", "b on h2 is ready"], SOON)?;
    lab["h1"].kill9()?;
    Ok((lab, a, b))
}

/// Starts `h1` again and checks that nothing was lost.
fn assert_recovers(lab: &Lab, a: &ovl_tests::Attached, b: &ovl_tests::Attached) -> Result<()> {
    let h1 = &lab["h1"];
    h1.start()?;
    h1.wait_ready(SOON)?;
    wait_endpoints(h1, &["a on h1 is ready", "b on h2 is ready"], SOON)?;
    lab.wait_all_alive(SOON)?;
    wait_clean(lab.hosts(), SOON)?;
    ping_all_pairs(&[a.clone(), b.clone()], SOON)
}

#[test]
fn damaged_state_file_is_refused_by_name_and_left_as_it_is() {
    let (lab, a, b) = killed().unwrap();
    let h1 = &lab["h1"];
    let id = text(&ovl_tests::peer(&lab["h2"], "h1").unwrap()["id"]);
    let path = h1.state_dir().join("state");
    let good = fs::read(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let with_flipped = |at| flipped(&good, at);
    let other_version = [b"ovl state 9\n", &good[12..]].concat();
    let longer = [&good[..], b"x"].concat();
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("garbage", vec![0x5a; 4096]),
        ("zeroes", vec![0; good.len()]),
        ("half of it", good[..good.len() / 2].to_vec()),
        ("the last byte missing", good[..good.len() - 1].to_vec()),
        ("the checksum cut", good[..20].to_vec()),
        ("one byte more", longer),
        ("a bit of the beginning", with_flipped(3)),
        ("a bit of the checksum", with_flipped(20)),
        ("a bit of the middle", with_flipped(good.len() / 2)),
        ("a bit of the end", with_flipped(good.len() - 1)),
        ("another version", other_version),
    ] {
        assert_file_refused(h1, &path, &bytes, &["state file", "ovlctl peers forget", "backup"])
            .with_context(|| what)
            .unwrap();
    }
    // A directory in its place, or a missing file, must not start an empty state either.
    assert_missing_refused(h1, &path).unwrap();
    assert!(!path.exists());
    fs::create_dir(&path).unwrap();
    assert_contains(&start_error(h1).unwrap(), &[path.to_str().unwrap()]);
    fs::remove_dir(&path).unwrap();
    // The data plane keeps working.
    a.workload.ping_until(b.address(), SOON).unwrap();

    // An incomplete temporary file of an interrupted write is ignored.
    fs::write(&path, &good).unwrap();
    fs::write(path.with_extension("new"), b"half").unwrap();
    assert_recovers(&lab, &a, &b).unwrap();
    assert_eq!(text(&ovl_tests::peer(&lab["h2"], "h1").unwrap()["id"]), id);
    assert_eq!(rows(&lab["h2"], &["peers"]).unwrap().len(), 2);
}

/// Returns the path of the journal of the state file.
fn journal(host: &Host) -> Result<std::path::PathBuf> {
    let files = fs::read_dir(host.state_dir())?.map(|file| file.map(|file| file.path()));
    let mut journals = files.collect::<std::io::Result<Vec<_>>>()?;
    journals.retain(|path| path.extension().is_some_and(|extension| extension == "journal"));
    ensure!(journals.len() == 1, "{journals:?}");
    Ok(journals.remove(0))
}

#[test]
fn journal_of_the_state_file_is_cut_where_a_crash_left_it_and_refused_if_it_is_damaged() {
    let (lab, a, b) = killed().unwrap();
    let h1 = &lab["h1"];
    let path = journal(h1).unwrap();
    let good = fs::read(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(good.len() > 200, "nothing was written to the journal");
    let with_flipped = |at| flipped(&good, at);
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("garbage", vec![0x5a; 4096]),
        ("the beginning cut", good[..30].to_vec()),
        ("a bit of the beginning", with_flipped(20)),
        ("a bit of the first record", with_flipped(120)),
    ] {
        assert_file_refused(h1, &path, &bytes, &["journal", "ovlctl peers forget", "backup"])
            .with_context(|| what)
            .unwrap();
    }
    assert_missing_refused(h1, &path).unwrap();
    // A record that was not written completely: nothing depends on it.
    fs::write(&path, [&good[..], b"ovlr half of a record"].concat()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_recovers(&lab, &a, &b).unwrap();
    // The journal of the next run continues the state file of that run, and none is left when it stops.
    h1.ctl_ok(&["network", "create", "more", "--subnet", "10.2.0.0/24"]).unwrap();
    assert_ne!(journal(h1).unwrap(), path);
    h1.stop().unwrap();
    assert!(journal(h1).is_err());
    assert_recovers(&lab, &a, &b).unwrap();
}

#[test]
fn missing_or_damaged_identity_is_refused_and_not_replaced() {
    let (lab, a, b) = killed().unwrap();
    let h1 = &lab["h1"];
    let id = text(&ovl_tests::peer(&lab["h2"], "h1").unwrap()["id"]);
    let path = h1.state_dir().join("identity");
    let good = fs::read(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    for bytes in
        [Vec::new(), b"garbage".to_vec(), good[..good.len() / 2].to_vec(), vec![0; good.len()], flipped]
    {
        assert_file_refused(h1, &path, &bytes, &["restore"]).unwrap();
    }
    fs::remove_file(&path).unwrap();
    let log = start_error_with(h1, 78).unwrap();
    assert_contains(&log, &[path.to_str().unwrap(), "missing", "backup"]);
    assert!(!path.exists(), "a new identity was created");
    fs::write(&path, &good).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let log = start_error_with(h1, 78).unwrap();
    assert_contains(&log, &[path.to_str().unwrap(), "other users", "chmod 600"]);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_recovers(&lab, &a, &b).unwrap();
    assert_eq!(text(&ovl_tests::peer(&lab["h2"], "h1").unwrap()["id"]), id);
}

#[test]
fn damaged_endpoint_files_are_set_aside_and_damaged_cached_tables_ignored() {
    let (lab, a, b) = killed().unwrap();
    let h1 = &lab["h1"];
    assert_recovers(&lab, &a, &b).unwrap();
    let c = attach(h1, "c", "demo", &[]).unwrap();
    ping_all_pairs(&[b.clone(), c.clone()], SOON).unwrap();
    let dir = h1.run_dir().join("endpoints");
    let tables = h1.run_dir().join("tables");
    wait_until(SOON, "the table of the remote host to be cached", || -> Result<bool> {
        Ok(fs::read_dir(&tables)?.count() == 1)
    })
    .unwrap();
    h1.kill9().unwrap();
    // Both names have the endpoint's id.
    let of_c = dir.join(c.device().trim_start_matches("ove-")).with_extension("json");
    let bytes = fs::read(&of_c).unwrap();
    fs::write(&of_c, &bytes[..bytes.len() / 2]).unwrap();
    for file in fs::read_dir(&tables).unwrap() {
        fs::write(file.unwrap().path(), b"garbage").unwrap();
    }
    fs::write(tables.join("no-id"), b"garbage").unwrap();

    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    let aside = of_c.with_extension("damaged");
    let problem = wait_problem(h1, &["damaged", aside.to_str().unwrap()], SOON).unwrap();
    assert_contains(&problem, &["attach it again"]);
    assert_eq!(fs::read(&aside).unwrap(), bytes[..bytes.len() / 2]);
    assert!(!of_c.exists());
    // The other endpoints are unchanged, and the table was fetched from its owner.
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    ping_all_pairs(&[a, b.clone()], SOON).unwrap();
    wait_until(SOON, "the interface without an endpoint to be deleted", || -> Result<bool> {
        Ok(c.workload.ip_json(&["link", "show"])?.as_array().is_some_and(|links| links.len() == 1))
    })
    .unwrap();
    let again = attach_workload(c.workload, "demo", &[]).unwrap();
    ping_all_pairs(&[again, b], SOON).unwrap();
}

#[test]
fn unwritable_state_directory_blocks_acknowledgements_and_is_reported() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    // A directory is in the way of the temporary file of the next state file, and there is no journal, so that there must
    // be one.
    let beside = h1.state_dir().join("state.new");
    fs::create_dir(&beside).unwrap();
    if let Ok(journal) = journal(h1) {
        fs::remove_file(journal).unwrap();
    }
    let mut create = h1.ctl_spawn(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    let problem = wait_problem(h1, &["cannot be saved"], SOON).unwrap();
    assert_contains(&problem, &[h1.state_dir().join("state").to_str().unwrap()]);
    assert_eq!(h1.ctl_json(&["status"]).unwrap()["state"], "degraded");
    assert!(
        create.is_running(),
        "acknowledged before it was on the disk: {}{}",
        create.stdout(),
        create.stderr()
    );
    fs::remove_dir(&beside).unwrap();
    assert!(create.wait(SOON).unwrap().success(), "{}", create.stderr());
    wait_until(SOON, "the problem to disappear", || -> Result<bool> { Ok(problems(h1)?.is_empty()) })
        .unwrap();
    attach(h1, "a", "demo", &[]).unwrap();
    h1.stop().unwrap();
    // ovld does not start with it.
    fs::create_dir(&beside).unwrap();
    assert_contains(&start_error(h1).unwrap(), &[h1.state_dir().join("state").to_str().unwrap()]);
    fs::remove_dir(&beside).unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    assert_eq!(endpoints(h1).unwrap(), ["a on h1 is ready"]);
}

#[test]
fn invalid_configuration_is_refused_with_its_line() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let h1 = &lab["h1"];
    let file = h1.dir().join("ovld.toml");
    for (config, parts) in [
        ("log = 'info'\nvxlan_prot = 4790\n", &["line 2", "vxlan_prot"][..]),
        ("\n\nlog = [\n", &["line 3"]),
        ("log = 'info'\nlog = 'warn'\n", &["line 2", "log"]),
        ("vxlan_port = 'many'\n", &["line 1", "vxlan_port"]),
        ("# fine\nvxlan_port = 70000\n", &["line 2", "vxlan_port"]),
        ("keep = '5 parsecs'\n", &["line 1", "keep"]),
        ("pool = '10.0.0.0'\n", &["line 1", "pool"]),
        ("[section]\n", &["section"]),
        ("log = 'loud'\n", &["log", "debug"]),
        ("vxlan_port = 0\n", &["vxlan_port"]),
        ("gossip_interval = '1ms'\n", &["gossip_interval", "50ms"]),
        ("pool = '10.0.0.0/30'\n", &["pool", "10.0.0.0/30"]),
    ] {
        h1.set_config(config).unwrap();
        // A restart would not help.
        let log = start_error_with(h1, 78).unwrap();
        assert_contains(&log, parts);
        if config.contains("fine") {
            assert_contains(&log, &[file.to_str().unwrap()]);
        }
        assert_eq!(log.lines().filter(|line| line.starts_with("ovld: ")).count(), 1, "{log}");
    }
    // A daemon that failed to start created nothing. With a valid configuration it starts.
    assert!(!h1.state_dir().join("state").exists() && !h1.state_dir().join("identity").exists());
    h1.set_config("vxlan_port = 4790\npool = '10.200.0.0/16'\n").unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    let created = h1.ctl_json(&["network", "create", "demo"]).unwrap();
    assert!(text(&created["subnets"][0]).starts_with("10.200."), "{created}");
}

/// Adds all paths below a directory, with their modes, that other users can access.
fn add_exposed(dir: &Path, exposed: &mut Vec<String>) {
    let kind_and_mode = |path: &Path| {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.file_type(), metadata.permissions().mode() & 0o7777)
    };
    let (_, mode) = kind_and_mode(dir);
    if mode != 0o700 {
        exposed.push(format!("{} {mode:04o}", dir.display()));
    }
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let (kind, mode) = kind_and_mode(&path);
        if kind.is_dir() {
            add_exposed(&path, exposed);
        } else if mode != if kind.is_socket() { 0o660 } else { 0o600 } {
            exposed.push(format!("{} {mode:04o}", path.display()));
        }
    }
}

#[test]
fn no_core_dump_has_keys_and_files_are_private_whatever_the_umask() {
    let dir = std::env::temp_dir().join(format!("ovl-umask-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let script = |name: &str, program: &str| {
        let path = dir.join(name);
        let text =
            format!("#!/bin/sh\ncd {}\numask 000\nulimit -c unlimited\nexec {program}\n", dir.display());
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let real = find_binary("ovld").unwrap();
    let ovld = script("ovld", &format!("{} \"$@\"", real.display()));
    let lab = Lab::new(LabConfig { ovld: Some(ovld), ..LabConfig::hosts(2) }).unwrap();
    let h1 = &lab["h1"];
    // Directories of an earlier release, or of an administrator.
    for dir in [h1.run_dir(), h1.state_dir(), h1.run_dir().join("tables")] {
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    lab.start_all().unwrap();
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    wait_network(&lab["h2"], "demo").unwrap();
    let a = attach(h1, "a", "demo", &[]).unwrap();
    let b = attach(&lab["h2"], "b", "demo", &[]).unwrap();
    ping_all_pairs(&[a, b], SOON).unwrap();
    wait_until(SOON, "the table of h2 on the disk of h1", || {
        fs::read_dir(h1.run_dir().join("tables")).is_ok_and(|files| files.count() > 0)
    })
    .unwrap();
    let mut exposed = Vec::new();
    add_exposed(&h1.state_dir(), &mut exposed);
    add_exposed(&h1.run_dir(), &mut exposed);
    assert!(exposed.is_empty(), "{exposed:#?}");

    // Whether this machine writes core dumps at all.
    let other = Command::new(script("other", "sh -c 'kill -ABRT $$'")).status().unwrap();
    h1.signal(Signal::SIGABRT).unwrap();
    h1.wait_exit(SOON).unwrap();
    let status = h1.exit_status().unwrap();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));
    println!("another program leaves a core dump here: {}", other.core_dumped());
    drop(lab);
    fs::remove_dir_all(&dir).unwrap();
}
