//! Spellings of names: which of them are one name, and which name has two meanings.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use anyhow::{Result, ensure};
use netns_lab::{Netns, wait_until};
use ovl_tests::resolver::dig;
use ovl_tests::{
    SOON, assert_contains, attach, attach_workload, create_network, ctl_error, problems, start_lab,
    wait_clean, wait_endpoints, wait_problem,
};

const AT: &str = "127.0.0.11";

fn wait_name(from: &Netns, name: &str, expected: &[String]) -> Result<()> {
    wait_until(SOON, &format!("{name} to resolve to {expected:?}"), || {
        let found = dig(from, AT, &[name])?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
}

#[test]
fn names_that_are_one_name_in_dns_are_one_name_everywhere() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let client = attach(h1, "client", "blue", &[]).unwrap();
    let web = attach(h1, "web", "blue", &[]).unwrap();
    wait_endpoints(h2, &["client on h1 is ready", "web on h1 is ready"], SOON).unwrap();
    let other = h2.workload("other").unwrap();
    let refused = |name: &str, more: &[&str]| {
        let args = [&["attach", name, "--network", "blue", "--netns", other.path_str()], more].concat();
        ctl_error(h2, &args).unwrap()
    };
    // Another spelling of a name is in conflict with it on all hosts.
    assert_contains(&refused("WEB", &[]), &["network blue has an endpoint web already, on host h1"]);
    for name in ["web.", "a..b", ".", "web.."] {
        assert_contains(&refused(name, &[]), &[&format!("invalid name '{name}'")]);
        assert_contains(&refused("x", &["--alias", name]), &[&format!("invalid name '{name}'")]);
    }
    assert_contains(
        &ctl_error(h2, &["network", "create", "BLUE", "--subnet", "10.71.0.0/24"]).unwrap(),
        &["network blue exists already", "in DNS, these are one name"],
    );
    assert_contains(
        &ctl_error(h2, &["network", "create", "blue.", "--subnet", "10.71.0.0/24"]).unwrap(),
        &["invalid name 'blue.'"],
    );
    assert_eq!(dig(&client.workload, AT, &["web"]).unwrap(), [web.address()]);
    // An alias in another spelling is the same alias, and goes without the name.
    let mut both = [web.address(), attach_workload(other, "blue", &["--alias", "Web"]).unwrap().address()];
    both.sort();
    wait_name(&client.workload, "web", &both).unwrap();
    h2.ctl_ok(&["detach", "OTHER"]).unwrap();
    wait_name(&client.workload, "web", &[web.address()]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn endpoint_that_is_called_like_a_full_name_is_reported_and_does_not_take_its_place() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.71.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h1, "web", "blue", &[]).unwrap();
    let client = attach(h1, "client", "red", &[]).unwrap();
    let client = attach_workload(client.workload.clone(), "blue", &[]).unwrap();
    wait_name(&client.workload, "web.blue", &[web.address()]).unwrap();
    let thief = attach(h2, "thief", "red", &["--alias", "web.blue"]).unwrap();
    wait_name(&client.workload, "web.blue.red", &[thief.address()]).unwrap();
    assert_eq!(dig(&client.workload, AT, &["web.blue"]).unwrap(), [web.address()]);
    assert_eq!(dig(&client.workload, AT, &["web.blue.ovl.internal"]).unwrap(), [web.address()]);
    for host in [h1, h2] {
        let parts = [
            "web.blue has two meanings",
            "endpoint thief on network red (host h2)",
            "web on network blue (host h1)",
        ];
        wait_problem(host, &parts, SOON).unwrap();
    }
    // Without the other one, the name is its own.
    h1.ctl_ok(&["detach", "web"]).unwrap();
    wait_name(&client.workload, "web.blue", &[thief.address()]).unwrap();
    wait_until(SOON, "no problem", || {
        for host in [h1, h2] {
            ensure!(problems(host)?.is_empty(), "{:?}", problems(host)?);
        }
        Ok(())
    })
    .unwrap();
}
