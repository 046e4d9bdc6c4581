//! `ovlctl bugreport`: everything for whoever looks into a fault, and no key.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use netns_lab::{Host, Lab, LabConfig};
use ovl_tests::{SOON, assert_contains, attach, create_network, ping_all_pairs, start_lab_with};

/// Makes a report of a host, unpacks it, and returns its directory.
fn report(lab: &Lab, host: &Host, name: &str) -> PathBuf {
    let file = lab.dir().join(format!("{name}.tar.gz"));
    let config = lab.dir().join("report.toml");
    fs::write(&config, "# the configuration\n").unwrap();
    let arguments = ["bugreport", "--file", file.to_str().unwrap(), "--config", config.to_str().unwrap()];
    let printed = host.ctl_ok(&arguments).unwrap();
    assert_contains(&printed, &[file.to_str().unwrap()]);
    let dir = lab.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    let unpacked =
        Command::new("tar").args(["-xzf", file.to_str().unwrap(), "-C"]).arg(&dir).status().unwrap();
    assert!(unpacked.success());
    let mode = host.exec_ok(["stat", "-c", "%a", file.to_str().unwrap()]).unwrap();
    assert_eq!(mode.trim(), "600");
    fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path()
}

/// All forms in which a secret could be written: bytes, hexadecimal, base64 of both alphabets.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let encoded = |alphabet: &str| {
        let mut text = String::new();
        for chunk in secret.chunks(3) {
            let bits = chunk
                .iter()
                .enumerate()
                .fold(0_u32, |bits, (n, byte)| bits | u32::from(*byte) << (16 - 8 * n));
            let count = chunk.len() + 1;
            text.extend(
                (0..count).map(|n| alphabet.as_bytes()[(bits >> (18 - 6 * n) & 63) as usize] as char),
            );
        }
        text
    };
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let base64 = ["+/", "-_"].map(|end| encoded(&format!("{letters}{end}")).into_bytes());
    [vec![secret.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes()], base64.to_vec()].concat()
}

/// The secrets in a key file: its bytes, its text, and what its words stand for in base64.
fn secrets(host: &Host) -> Vec<Vec<u8>> {
    let state = host.state_dir();
    let files = ["identity", "tunnel.key", "cluster-keys", "ui-token"].map(|name| state.join(name));
    let mut all = Vec::new();
    for path in files.into_iter().chain([host.dir().join("cluster.key")]) {
        let Ok(content) = fs::read(&path) else { continue };
        for word in content.split(|byte| byte.is_ascii_whitespace()).filter(|word| word.len() >= 16) {
            all.push(word.to_vec());
            if !word.iter().all(u8::is_ascii_graphic) {
                continue;
            }
            let decoded = Command::new("sh")
                .args([
                    "-c",
                    "printf %s \"$1\" | base64 -d 2>/dev/null",
                    "sh",
                    &String::from_utf8_lossy(word),
                ])
                .output()
                .unwrap();
            if decoded.status.success() && decoded.stdout.len() >= 16 {
                all.extend(forms(&decoded.stdout));
            }
        }
        // A binary file: each run of 32 bytes may be a key.
        all.extend(
            content.windows(32).filter(|window| window.iter().any(|byte| *byte > 127)).flat_map(forms),
        );
    }
    assert!(all.len() > 10, "{}", all.len());
    all
}

#[test]
fn report_has_states_and_logs_and_no_key() {
    let mut config = LabConfig::hosts(2);
    config.config = "ui_listen = \"127.0.0.1:9641\"\n".to_owned();
    let lab = start_lab_with(config).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--encrypted"]).unwrap();
    let all: Vec<_> = lab
        .hosts()
        .iter()
        .map(|host| attach(host, &format!("w-{}", host.name()), "blue", &[]).unwrap())
        .collect();
    ping_all_pairs(&all, SOON).unwrap();
    let h1 = &lab["h1"];
    let dir = report(&lab, h1, "running");
    let read = |dir: &PathBuf, name: &str| fs::read_to_string(dir.join(name)).unwrap();
    assert_contains(&read(&dir, "ovlctl/status.txt"), &["h1", "ready"]);
    assert_contains(&read(&dir, "ovlctl/endpoints_-o_json.txt"), &["w-h1", "w-h2"]);
    assert_contains(&read(&dir, "ovlctl/events_--since_30days_-o_json.txt"), &["w-h1", "attached"]);
    assert_contains(&read(&dir, "host/nft_-a_list_ruleset.txt"), &["ovl"]);
    assert_contains(&read(&dir, "host/ip_-d_-s_link_show.txt"), &["ovb-"]);
    assert_contains(&read(&dir, "ovld.toml"), &["# the configuration"]);
    assert_contains(&read(&dir, "version.txt"), &["commit"]);
    assert!(!read(&dir, "missing.txt").contains("ovlctl "), "{}", read(&dir, "missing.txt"));
    let mut content = Vec::new();
    for part in ["ovlctl", "host", "."] {
        let files = fs::read_dir(dir.join(part)).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file()).for_each(|path| content.extend(fs::read(path).unwrap()));
    }
    // The first bytes of a secret are enough to find it.
    let begins: HashSet<Vec<u8>> =
        lab.hosts().iter().flat_map(secrets).map(|mut secret| secret.drain(..16).collect()).collect();
    let find = |content: &[u8]| {
        let found = content.windows(16).find(|window| begins.contains(*window));
        found.map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    };
    assert_eq!(find(&content), None);
    // It would be found.
    let keys =
        [h1.dir().join("cluster.key"), h1.state_dir().join("identity"), h1.state_dir().join("ui-token")];
    for key in keys {
        assert!(find(&[&content[..], &fs::read(&key).unwrap()].concat()).is_some(), "{}", key.display());
    }

    // Without a daemon there is a report all the same, which says what is missing.
    h1.kill9().unwrap();
    let dir = report(&lab, h1, "down");
    assert_contains(&read(&dir, "missing.txt"), &["ovlctl status: ", "cannot reach ovld"]);
    assert_contains(&read(&dir, "host/ip_-d_-s_link_show.txt"), &["ovb-"]);
}
