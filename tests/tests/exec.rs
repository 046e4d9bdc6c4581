//! `ovlctl exec` and `ovlctl shell`: programs of the host in the network of an endpoint.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use ovl_tests::{SOON, assert_contains, attach, create_network, ctl_error, ping_all_pairs, start_lab};

#[test]
fn program_runs_in_the_network_of_the_endpoint_with_its_names() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.2.0.0/24"]).unwrap();
    let web = attach(h1, "web", "blue", &[]).unwrap();
    let api = attach(h2, "api", "blue", &[]).unwrap();
    ping_all_pairs(&[web.clone(), api.clone()], SOON).unwrap();
    let resolv_conf = h1.exec_ok(["cat", "/etc/resolv.conf"]).unwrap();
    // Other labs mount and unmount namespaces meanwhile.
    let mounts = || {
        let all = h1.exec_ok(["cat", "/proc/self/mountinfo"]).unwrap();
        let lines = all.lines().filter(|line| line.contains(" /etc/resolv.conf ") || line.contains(" /sys "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let mounts_before = mounts();

    let addresses = h1.ctl_ok(&["exec", "web", "--", "ip", "-br", "addr", "show", "eth0"]).unwrap();
    assert_contains(&addresses, &[&web.addresses()[0], &web.addresses()[1]]);
    // Another host's endpoint by its name: the C library asks ovl's resolver.
    let found = h1.ctl_ok(&["exec", "--network", "blue", "web", "--", "getent", "hosts", "api"]).unwrap();
    assert!(api.addresses().iter().any(|address| found.contains(address.as_str())), "{found}");
    let devices = h1.ctl_ok(&["exec", "web", "--", "ls", "/sys/class/net"]).unwrap();
    assert!(devices.contains("eth0") && !devices.contains("ovb-"), "{devices}");
    let name = h1.ctl_ok(&["exec", "web", "--", "sh", "-c", "echo $OVL_ENDPOINT"]).unwrap();
    assert_eq!(name, "web\n");
    let shown = h1.exec_input(
        [
            "env",
            "SHELL=/bin/sh",
            find_ovlctl().as_str(),
            "--socket",
            h1.socket().to_str().unwrap(),
            "shell",
            "web",
        ],
        Some("ip -br link show eth0\n"),
    );
    assert_contains(&shown.unwrap(), &["eth0", &web.mac()]);

    // The program's own exit status, and those of shells.
    let status = |command: &[&str]| {
        let output = h1.ctl(&[&["exec", "web", "--"], command].concat()).unwrap();
        output.code()
    };
    assert_eq!(status(&["sh", "-c", "exit 7"]), Some(7));
    assert_eq!(status(&["no-such-program"]), Some(127));
    assert_eq!(status(&["/etc/passwd"]), Some(126));
    let error = ctl_error(h1, &["exec", "api", "--", "true"]).unwrap();
    assert_contains(&error, &["endpoint api is on host h2", "run the command there"]);
    let error = ctl_error(h1, &["exec", "nobody", "--", "true"]).unwrap();
    assert_contains(&error, &["there is no endpoint nobody", "ovlctl endpoints"]);
    attach(h1, "other", "red", &[]).unwrap();
    let error = ctl_error(h1, &["exec", "other", "--namespace", "shop", "--", "true"]).unwrap();
    assert_contains(&error, &["no endpoint other in namespace shop"]);

    // The host is as it was.
    assert_eq!(h1.exec_ok(["cat", "/etc/resolv.conf"]).unwrap(), resolv_conf);
    assert_eq!(mounts(), mounts_before);
    let left = h1.exec_ok(["sh", "-c", "ls -A /run | grep ovl-exec || true"]).unwrap();
    assert_eq!(left, "");
}

fn find_ovlctl() -> String {
    netns_lab::find_binary("ovlctl").unwrap().to_string_lossy().into_owned()
}
