//! Rotation of the cluster key under traffic and failures.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use nix::sys::signal::Signal;
use ovl_tests::{
    Flow, SOON, assert_contains, attach, create_network, ctl_error, peer, rows, run_concurrently, start_lab,
    strings, text, wait_endpoints, wait_problem,
};
use serde_json::Value;

/// Timeout of a rotation, which waits for restarts and timeouts of several hosts.
const LATER: Duration = Duration::from_secs(60);

/// Creates a file with a new key.
fn new_key(lab: &Lab, name: &str) -> Result<PathBuf> {
    let path = lab.dir().join(name);
    fs::write(&path, lab["h1"].ctl_ok(&["key", "generate"])?)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(path)
}

fn key_status(host: &Host) -> Result<Value> {
    host.ctl_json(&["key", "status"])
}

/// Number of keys that a host accepts, and the one that it encrypts with, as another host reports them.
fn keys_of(host: &Host, name: &str) -> Result<(usize, String)> {
    let status = key_status(host)?;
    let row = status["hosts"].as_array().into_iter().flatten().find(|row| row["name"] == name);
    let row = row.with_context(|| format!("{name} is not in {status}"))?;
    Ok((1 + row["opens"].as_array().map_or(0, Vec::len), text(&row["seals"])))
}

fn wait_keys(on: &Host, name: &str, what: &str, fits: impl Fn(usize, &str) -> bool) -> Result<()> {
    wait_until(LATER, &format!("{} to report that {name} {what}", on.name()), || {
        let (opens, seals) = keys_of(on, name)?;
        ensure!(fits(opens, &seals), "{}", key_status(on)?);
        Ok(())
    })
}

/// Waits until these hosts have the same single key and no rotation is in progress. Returns the key.
fn wait_done(hosts: &[&Host]) -> Result<String> {
    wait_until(LATER, "all hosts to have one key", || {
        let (_, key) = keys_of(hosts[0], hosts[0].name())?;
        for on in hosts {
            let status = key_status(on)?;
            ensure!(status["rotation"].is_null(), "on {}: {status}", on.name());
            for of in hosts {
                ensure!(keys_of(on, of.name())? == (1, key.clone()), "on {}: {status}", on.name());
            }
        }
        Ok(Some(key))
    })
}

fn wait_file(host: &Host, key: &PathBuf) -> Result<()> {
    wait_until(SOON, &format!("{} to have the new key in its file", host.name()), || -> Result<bool> {
        Ok(fs::read(host.key_path())? == fs::read(key)?
            && fs::metadata(host.key_path())?.permissions().mode() & 0o777 == 0o600)
    })
}

fn wait_alive(host: &Host, name: &str) -> Result<()> {
    wait_until(LATER, &format!("{name} to be alive on {}", host.name()), || {
        let row = peer(host, name)?;
        ensure!(row["state"] == "alive" && row["member"] == true && row["reachable"] == true, "{row}");
        Ok(())
    })
}

#[test]
fn rotation_loses_no_packet_and_no_gossip() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let a = attach(&lab["h1"], "a", "blue", &[]).unwrap();
    let b = attach(&lab["h2"], "b", "blue", &[]).unwrap();
    wait_endpoints(&lab["h3"], &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    let flow = Flow::start(&a, &b).unwrap();
    let new = new_key(&lab, "new.key").unwrap();
    let (_, before) = keys_of(&lab["h1"], "h1").unwrap();

    let done = lab["h1"].ctl(&["key", "rotate", "--cluster", new.to_str().unwrap()]).unwrap();
    assert!(done.status.success(), "{}", done.stderr);
    assert_contains(&done.stderr, &["of 3 hosts"]);
    assert_contains(&done.stdout, &["No rotation in progress", "h1 *", "h2", "h3"]);
    let hosts: Vec<&Host> = lab.hosts().iter().collect();
    let key = wait_done(&hosts).unwrap();
    assert_ne!(key, before);
    for host in &hosts {
        wait_file(host, &new).unwrap();
    }
    // Another rotation, during which an attach is announced.
    let next = new_key(&lab, "next.key").unwrap();
    lab["h2"].ctl_ok(&["key", "rotate", "--no-wait", "--cluster", next.to_str().unwrap()]).unwrap();
    let c = attach(&lab["h3"], "c", "blue", &[]).unwrap();
    a.workload.ping_until(c.address(), SOON).unwrap();
    wait_done(&hosts).unwrap();
    // Two concurrent rotations: all hosts settle on one key, and the other client gets an error.
    let two = [("h1", new_key(&lab, "one.key").unwrap()), ("h3", new_key(&lab, "other.key").unwrap())];
    let outcome = run_concurrently(
        two.iter()
            .map(|(host, file)| {
                let args = ["key", "rotate", "--no-wait", "--cluster", file.to_str().unwrap()];
                let host = &lab[*host];
                move || host.ctl(&args).unwrap()
            })
            .collect(),
    );
    let won: Vec<bool> = outcome.iter().map(|output| output.status.success()).collect();
    assert!(won.contains(&true) && won.contains(&false), "{outcome:?}");
    for lost in outcome.iter().filter(|output| !output.status.success()) {
        assert_contains(&lost.stderr, &["being changed to another one", "key status"]);
    }
    wait_done(&hosts).unwrap();
    let winner = two.iter().zip(&won).find(|(_, won)| **won).unwrap().0;
    for host in &hosts {
        wait_file(host, &winner.1).unwrap();
    }

    flow.finish_without_loss().unwrap();
    for host in &hosts {
        let status = host.ctl_json(&["status"]).unwrap();
        assert_eq!(status["gossip"]["dropped_unauthenticated"], 0, "on {}: {status}", host.name());
        assert_eq!(ovl_tests::problems(host).unwrap(), [""; 0], "on {}", host.name());
        let suspected: Vec<Value> = rows(host, &["events"])
            .unwrap()
            .into_iter()
            .filter(|event| text(&event["message"]).starts_with("alive ->"))
            .collect();
        assert!(suspected.is_empty(), "on {}: {suspected:?}", host.name());
        for file in [&new, &next, &two[0].1, &two[1].1] {
            let key = fs::read_to_string(file).unwrap();
            assert!(!host.log().contains(key.trim()), "a key is in the log of {}", host.name());
        }
    }
}

#[test]
fn hosts_killed_in_any_phase_recover_and_a_joining_host_gets_the_keys() {
    let lab = Lab::new(LabConfig::hosts(4)).unwrap();
    let (h1, h2, h3, h4) = (&lab["h1"], &lab["h2"], &lab["h3"], &lab["h4"]);
    for host in [h1, h2, h3] {
        host.start().unwrap();
    }
    for (on, of) in [(h1, "h2"), (h1, "h3"), (h2, "h1"), (h2, "h3"), (h3, "h1"), (h3, "h2")] {
        wait_alive(on, of).unwrap();
    }
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let a = attach(h1, "a", "blue", &[]).unwrap();
    let b = attach(h2, "b", "blue", &[]).unwrap();
    let flow = Flow::start(&a, &b).unwrap();
    let new = new_key(&lab, "new.key").unwrap();
    let file = new.to_str().unwrap();
    let (_, old) = keys_of(h1, "h1").unwrap();

    // Phase 1, distribution: h3 is frozen, so not all hosts have the new key.
    h3.signal(Signal::SIGSTOP).unwrap();
    h1.ctl_ok(&["key", "rotate", "--no-wait", "--cluster", file]).unwrap();
    wait_keys(h1, "h2", "has both keys", |opens, _| opens == 2).unwrap();
    let other = new_key(&lab, "other.key").unwrap();
    let second = ctl_error(h2, &["key", "rotate", "--cluster", other.to_str().unwrap()]).unwrap();
    assert_contains(&second, &["being changed to another one", "key status"]);
    for killed in [h2, h1] {
        killed.kill9().unwrap();
        killed.start().unwrap();
        killed.wait_ready(LATER).unwrap();
        assert_eq!(keys_of(killed, killed.name()).unwrap(), (2, old.clone()));
    }
    wait_alive(h1, "h2").unwrap();
    let status = h1.ctl_json(&["status"]).unwrap();
    assert_eq!(strings(&status["rotation"]["waits_for"]), ["h3"], "{status}");
    wait_problem(h1, &["being changed", "h3", "key status"], LATER).unwrap();
    attach(h2, "in-phase-1", "blue", &[]).unwrap();
    wait_endpoints(h1, &["a on h1 is ready", "b on h2 is ready", "in-phase-1 on h2 is ready"], SOON).unwrap();

    // Phase 2, switching: h2 cannot store that it encrypts with the new key.
    let (copy, aside) = (h2.state_dir().join("cluster-keys"), h2.state_dir().join("aside"));
    fs::rename(&copy, &aside).unwrap();
    fs::create_dir_all(copy.join("full")).unwrap();
    // h3 is killed while frozen, so it does not have the new key yet.
    h3.kill9().unwrap();
    h3.start().unwrap();
    for host in [h1, h3] {
        wait_keys(host, host.name(), "seals with the new key", |_, seals| seals != old).unwrap();
    }
    wait_problem(h2, &["rotation", "disk"], LATER).unwrap();
    assert_eq!(keys_of(h2, "h2").unwrap(), (2, old.clone()));
    for killed in [h1, h3] {
        killed.kill9().unwrap();
        killed.start().unwrap();
        killed.wait_ready(LATER).unwrap();
        let (opens, seals) = keys_of(killed, killed.name()).unwrap();
        assert!(opens == 2 && seals != old, "{opens} {seals}");
    }
    for (on, of) in [(h1, "h2"), (h2, "h1"), (h2, "h3"), (h3, "h2")] {
        wait_alive(on, of).unwrap();
    }
    // A host that joins now has only the old key, while most others encrypt with the new one.
    h4.start().unwrap();
    h4.wait_ready(LATER).unwrap();
    for on in [h1, h2, h3] {
        wait_alive(on, "h4").unwrap();
    }
    wait_keys(h4, "h4", "got the new key", |opens, _| opens == 2).unwrap();
    attach(h4, "in-phase-2", "blue", &[]).unwrap();
    let all =
        ["a on h1 is ready", "b on h2 is ready", "in-phase-1 on h2 is ready", "in-phase-2 on h4 is ready"];
    for host in [h1, h2, h3] {
        wait_endpoints(host, &all, SOON).unwrap();
    }

    // Phase 3, cleanup: h2 cannot write its key file.
    fs::set_permissions(h2.key_path(), Permissions::from_mode(0o400)).unwrap();
    fs::remove_dir_all(&copy).unwrap();
    fs::rename(&aside, &copy).unwrap();
    wait_done(&[h1, h2, h3, h4]).unwrap();
    for host in [h1, h3, h4] {
        wait_file(host, &new).unwrap();
    }
    assert_contains(&wait_problem(h2, &["key was rotated"], LATER).unwrap(), &["read-only", "0600"]);
    assert_ne!(fs::read(h2.key_path()).unwrap(), fs::read(&new).unwrap());
    for killed in [h2, h1] {
        killed.kill9().unwrap();
        killed.start().unwrap();
        killed.wait_ready(LATER).unwrap();
        let (opens, seals) = keys_of(killed, killed.name()).unwrap();
        assert!(opens == 1 && seals != old, "{opens} {seals}");
    }
    for (on, of) in [(h1, "h2"), (h2, "h1"), (h2, "h4"), (h4, "h2")] {
        wait_alive(on, of).unwrap();
    }
    fs::set_permissions(h2.key_path(), Permissions::from_mode(0o600)).unwrap();
    wait_file(h2, &new).unwrap();
    wait_until(SOON, "h2 to have no problem", || -> Result<()> {
        let problems = ovl_tests::problems(h2)?;
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    })
    .unwrap();
    assert!(!copy.exists());
    flow.finish_without_loss().unwrap();
}

#[test]
fn host_that_missed_a_rotation_reports_it_and_rejoins_with_the_new_file() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h3.kill9().unwrap();
    h3.link_down().unwrap();
    for host in [h1, h2] {
        wait_until(SOON, "h3 to be dead", || -> Result<bool> { Ok(peer(host, "h3")?["state"] == "dead") })
            .unwrap();
    }
    let new = new_key(&lab, "new.key").unwrap();
    h1.ctl_ok(&["key", "rotate", "--cluster", new.to_str().unwrap()]).unwrap();
    wait_done(&[h1, h2]).unwrap();
    h3.link_up().unwrap();
    h3.start().unwrap();
    let file = h3.key_path();
    let problem = wait_problem(h3, &["another key", "h1"], LATER).unwrap();
    assert_contains(&problem, &[file.to_str().unwrap(), "0600", "restart ovld"]);
    assert_contains(
        &wait_problem(h1, &["h3", "another cluster key"], LATER).unwrap(),
        &["restart ovld there"],
    );
    assert_ne!(peer(h1, "h3").unwrap()["state"], "alive");
    // As the problem advises.
    fs::copy(&new, &file).unwrap();
    h3.restart().unwrap();
    for host in [h1, h2] {
        wait_alive(host, "h3").unwrap();
    }
    h3.wait_ready(LATER).unwrap();
    for host in [h1, h3] {
        wait_until(LATER, "no problem", || -> Result<()> {
            let problems = ovl_tests::problems(host)?;
            ensure!(problems.is_empty(), "on {}: {problems:?}", host.name());
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn forgotten_host_gets_no_new_key_and_is_excluded() {
    let lab = start_lab(4).unwrap();
    let (h1, h2, h3, h4) = (&lab["h1"], &lab["h2"], &lab["h3"], &lab["h4"]);
    lab.partition(&[&["h1", "h2", "h4"], &["h3"]]).unwrap();
    wait_until(SOON, "h3 to be dead", || -> Result<bool> { Ok(peer(h1, "h3")?["state"] == "dead") }).unwrap();
    let forgotten = h1.ctl(&["peers", "forget", "h3"]).unwrap();
    assert!(forgotten.status.success(), "{}", forgotten.stderr);
    assert_contains(&forgotten.stderr, &["still knows the cluster key", "ovlctl key rotate --cluster FILE"]);
    // h4 is frozen and holds the rotation up, so that h3 returns during it.
    h4.signal(Signal::SIGSTOP).unwrap();
    let new = new_key(&lab, "new.key").unwrap();
    h1.ctl_ok(&["key", "rotate", "--no-wait", "--cluster", new.to_str().unwrap()]).unwrap();
    wait_keys(h1, "h2", "has both keys", |opens, _| opens == 2).unwrap();
    lab.heal().unwrap();
    // It may hear first that it was taken out, and of the rotation a round later.
    let file = h3.key_path();
    wait_problem(h3, &["not admitted", "taken out", "new key", file.to_str().unwrap()], LATER).unwrap();
    wait_keys(h1, "h3", "has one key", |opens, _| opens == 1).unwrap();
    h4.signal(Signal::SIGCONT).unwrap();
    wait_done(&[h1, h2, h4]).unwrap();
    for host in [h1, h2, h4] {
        wait_until(LATER, "h3 to be excluded", || -> Result<()> {
            // h3 is listed as long as its kernel answers.
            if let Ok(row) = peer(host, "h3") {
                ensure!(row["state"] != "alive" && row["member"] == false, "{row}");
            }
            let status = host.ctl_json(&["status"])?;
            ensure!(status["members"] == 3, "{status}");
            let strangers = strings(&status["gossip"]["strangers"]);
            ensure!(strangers.contains(&h3.address()?.to_string()), "{strangers:?}");
            Ok(())
        })
        .unwrap();
    }
    assert_eq!(keys_of(h3, "h3").unwrap().0, 1);
    assert_ne!(fs::read(h3.key_path()).unwrap(), fs::read(&new).unwrap());
    // With the new key it is admitted again.
    fs::copy(&new, h3.key_path()).unwrap();
    h3.restart().unwrap();
    wait_alive(h1, "h3").unwrap();
}

#[test]
fn invalid_key_files_are_refused_and_standard_input_is_accepted() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    let file = new_key(&lab, "new.key").unwrap();
    let path = file.to_str().unwrap();
    let rotate = ["key", "rotate", "--cluster", path];
    let good = fs::read(&file).unwrap();
    let (_, before) = keys_of(h1, "h1").unwrap();

    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    assert_contains(&ctl_error(h1, &rotate).unwrap(), &["accessible to other users", "0644", "key generate"]);
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    for bad in [&good[..40], b"", b"\xff\xfe", &[b'A'; 5000]] {
        fs::write(&file, bad).unwrap();
        let error = ctl_error(h1, &rotate).unwrap();
        assert!(!error.contains("AAAA"), "{error}");
    }
    fs::write(&file, &good[..40]).unwrap();
    assert_contains(&ctl_error(h1, &rotate).unwrap(), &["not a cluster key", "44 characters"]);
    fs::copy(h1.key_path(), &file).unwrap();
    assert_contains(&ctl_error(h1, &rotate).unwrap(), &["in use", "key generate"]);
    let missing = ["key", "rotate", "--cluster", "/nowhere/key"];
    assert_contains(&ctl_error(h1, &missing).unwrap(), &["/nowhere/key"]);
    assert_eq!(keys_of(h1, "h1").unwrap(), (1, before.clone()));

    fs::write(&file, &good).unwrap();
    let socket = h1.socket();
    let ovlctl = netns_lab::find_binary("ovlctl").unwrap();
    let line = format!("{} --socket {} key rotate --cluster - < {path}", ovlctl.display(), socket.display());
    h1.exec_ok(["sh", "-c", &line]).unwrap();
    wait_file(h1, &file).unwrap();
    assert_ne!(wait_done(&[h1]).unwrap(), before);
}
