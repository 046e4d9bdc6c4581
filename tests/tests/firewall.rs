//! The host's firewall decides about published ports and about traffic of endpoints.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, Spawned, wait_until};
use ovl_tests::ports::{create_bridge_network, outsider, seen_client, start_address_server};
use ovl_tests::{
    Attached, SOON, assert_contains, attach, problems, resolver, start_lab, strings, wait_clean,
    wait_no_problem, wait_problem,
};

/// A host with a bridge network and one endpoint, whose port 80 is published.
struct FirewallLab {
    lab: Lab,
    outside: Netns,
    web: Attached,
    _server: Spawned,
}

const PUBLISHED: &str = "192.168.77.1:8080";
const SUBNET: &str = "10.1.0.0/24";

fn firewall_lab() -> FirewallLab {
    let lab = start_lab(1).unwrap();
    let outside = outsider(&lab).unwrap();
    let host = &lab["h1"];
    create_bridge_network(host, "blue", &["--subnet", SUBNET]).unwrap();
    let web = attach(host, "web", "blue", &["--publish", "8080:80"]).unwrap();
    let server = start_address_server(&web.workload, 80).unwrap();
    FirewallLab { lab, outside, web, _server: server }
}

impl FirewallLab {
    fn host(&self) -> &Host {
        &self.lab["h1"]
    }

    fn connect(&self) -> Result<()> {
        let seen = seen_client(&self.outside, PUBLISHED.parse::<SocketAddr>()?)?;
        ensure!(seen.to_string() == "192.168.77.250", "the server sees {seen}");
        Ok(())
    }

    fn assert_open(&self) {
        wait_until(SOON, "the published port to answer", || self.connect()).unwrap();
        self.web.workload.ping_until("192.168.77.250", SOON).unwrap();
    }

    /// Checks that a connection to the published port fails. A dropped SYN leaves no event to wait for, so this waits
    /// until the client times out. Callers show with [`Self::assert_open`] that only the rule under test blocks it.
    fn assert_closed(&self) {
        assert!(self.connect().is_err());
    }

    fn run(&self, line: &str) -> String {
        self.host().exec_ok(["sh", "-c", line]).unwrap()
    }

    fn wait_no_problem(&self) {
        wait_no_problem(self.host(), SOON).unwrap();
    }

    /// Commands in backquotes in the problem that contains these parts.
    fn advice(&self, parts: &[&str]) -> Vec<String> {
        let problem = wait_problem(self.host(), parts, SOON).unwrap();
        problem.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    fn docker_user_rules(&self) -> Vec<String> {
        let listed = self.run("iptables -S DOCKER-USER 2>/dev/null || true");
        listed.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }
}

#[test]
fn administrators_drop_rule_applies_to_a_published_port() {
    let lab = firewall_lab();
    lab.assert_open();
    // By original destination port and source, as in docs/docker.md.
    lab.run(
        "nft -f - <<'X'
table inet mine {
    chain forward {
        type filter hook forward priority filter; policy accept;
        ct status dnat meta l4proto tcp ct original proto-dst 8080 ip saddr != 192.0.2.0/24 drop
    }
}
X",
    );
    lab.assert_closed();
    lab.run("nft delete table inet mine");
    lab.assert_open();
    let rule = "FORWARD -p tcp -m conntrack --ctorigdstport 8080 --ctdir ORIGINAL ! -s 192.0.2.0/24 -j DROP";
    lab.run(&format!("iptables -I {rule}"));
    lab.assert_closed();
    lab.run(&format!("iptables -D {rule}"));
    lab.assert_open();
    // INPUT rules do not apply to forwarded traffic.
    lab.run("iptables -P INPUT ACCEPT && iptables -A INPUT -p tcp --dport 8080 -j DROP");
    lab.assert_open();
    wait_clean(lab.lab.hosts(), SOON).unwrap();
}

#[test]
fn rule_in_docker_user_passes_overlay_traffic_where_docker_drops_it() {
    let lab = firewall_lab();
    lab.run(
        "iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER && iptables -A DOCKER-USER -j RETURN \
         && iptables -P FORWARD DROP",
    );
    lab.assert_open();
    let ours = "-A DOCKER-USER -j OVL";
    assert_eq!(lab.docker_user_rules(), [ours, "-A DOCKER-USER -j RETURN"]);
    assert_eq!(problems(lab.host()).unwrap(), Vec::<String>::new());
    // An administrator's rule before it takes precedence.
    lab.run("iptables -I DOCKER-USER -d 10.1.0.0/24 -p tcp --dport 80 -j DROP");
    lab.assert_closed();
    lab.run("iptables -D DOCKER-USER -d 10.1.0.0/24 -p tcp --dport 80 -j DROP");
    lab.assert_open();
    // The rule is restored after a flush.
    lab.run("iptables -F DOCKER-USER && iptables -F OVL && iptables -A DOCKER-USER -j RETURN");
    lab.assert_open();
    assert_eq!(lab.docker_user_rules(), [ours, "-A DOCKER-USER -j RETURN"]);
    // No traffic between Docker's own containers and ovl's endpoints is allowed.
    let passes = lab.run("iptables -S OVL");
    assert_contains(
        &passes,
        &["-A OVL -o docker+ -j RETURN\n-A OVL -o br-+ -j RETURN\n-A OVL -i ovb-+ -j ACCEPT"],
    );
    // The rule is deleted with the last network.
    lab.host().ctl_ok(&["detach", "web"]).unwrap();
    lab.host().ctl_ok(&["network", "rm", "blue"]).unwrap();
    wait_until(SOON, "the rule to be deleted", || {
        let left = lab.run("iptables-save -t filter");
        ensure!(!left.contains("OVL"), "{left}");
        Ok(())
    })
    .unwrap();
    assert_eq!(lab.docker_user_rules(), ["-A DOCKER-USER -j RETURN"]);
    // A teardown deletes it at once.
    create_bridge_network(lab.host(), "blue", &["--subnet", SUBNET]).unwrap();
    wait_until(SOON, "the rule to be added", || {
        ensure!(lab.docker_user_rules().len() == 2, "{:?}", lab.docker_user_rules());
        Ok(())
    })
    .unwrap();
    lab.host().ctl_ok(&["teardown", "--yes"]).unwrap();
    assert!(!lab.run("iptables-save -t filter").contains("OVL"));
}

#[test]
fn reported_commands_open_a_restrictive_firewall() {
    let lab = firewall_lab();
    lab.run(
        "nft -f - <<'X'
table inet strict {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
    }
}
X",
    );
    let commands = lab.advice(&["chain forward of the nftables table inet strict", "network blue", SUBNET]);
    lab.assert_closed();
    // An attach that publishes a port prints the warning at once.
    let more = lab.host().workload("more").unwrap();
    let args = ["attach", "more", "--network", "blue", "--netns", more.path_str(), "--publish", "8081:80"];
    let attached = lab.host().ctl(&args).unwrap();
    assert!(attached.status.success());
    assert_contains(&attached.stderr, &["warning: network blue: the chain forward", &commands[0]]);
    assert_eq!(commands[0], "nft insert rule inet strict forward ip daddr 10.1.0.0/24 accept");
    lab.run(&commands[0]);
    lab.run(&commands[0].replace("daddr", "saddr"));
    lab.assert_open();
    lab.wait_no_problem();
    // The same with a DROP policy of iptables.
    lab.run("nft delete table inet strict && iptables -P FORWARD DROP");
    let commands = lab.advice(&["FORWARD of iptables", SUBNET]);
    lab.assert_closed();
    commands.iter().for_each(|command| drop(lab.run(command)));
    lab.assert_open();
    lab.wait_no_problem();
}

#[test]
fn flushed_rules_are_repaired() {
    let lab = firewall_lab();
    lab.assert_open();
    lab.run("nft flush ruleset");
    lab.assert_open();
    lab.run("nft flush table inet ovl-publish");
    lab.assert_open();
    lab.run("nft delete element inet ovl-publish any4 '{ tcp . 8080 }'");
    lab.assert_open();
    lab.run("nft delete table inet ovl-publish");
    lab.assert_open();
    wait_clean(lab.lab.hosts(), SOON).unwrap();
}

/// Runs a script in a host's network namespace, with private copies of these files mounted over the originals.
fn with_copies(lab: &FirewallLab, name: &str, copied: &[&str], script: &str) -> Spawned {
    let dir = lab.lab.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    let mut prelude = "set -e\nmount --make-rprivate /\n".to_owned();
    for (number, path) in copied.iter().enumerate() {
        let copy = dir.join(number.to_string());
        prelude += &format!(
            "[ -e {copy} ] || cp -a {path} {copy}\nmount --bind {copy} {path}\n",
            copy = copy.display()
        );
    }
    let script = format!("{prelude}cd {}\n{script}", dir.display());
    let netns = format!("--net={}", lab.host().path_str());
    lab.host().spawn(["nsenter", &netns, "unshare", "--mount", "bash", "-c", &script]).unwrap()
}

#[test]
fn ufw_rules_apply() {
    let lab = firewall_lab();
    let ufw = |script: &str| {
        let copied = ["/etc/ufw", "/etc/default/ufw"];
        let output = with_copies(&lab, "ufw", &copied, script).finish(SOON).unwrap();
        assert!(output.status.success(), "{script}: {}{}", output.stdout, output.stderr);
    };
    ufw("ufw --force enable");
    let commands = lab.advice(&["ufw drops forwarded packets", "network blue"]);
    lab.assert_closed();
    assert_names_resolve(&lab);
    assert_eq!(commands, ["ufw route allow to 10.1.0.0/24", "ufw route allow from 10.1.0.0/24"]);
    ufw(&commands.join("; "));
    lab.assert_open();
    lab.wait_no_problem();
    assert_names_resolve(&lab);
    ufw("ufw route insert 1 deny to any port 80");
    lab.assert_closed();
}

/// Checks that names resolve. Queries go to the host itself, where such a firewall drops incoming traffic.
fn assert_names_resolve(lab: &FirewallLab) {
    for how in ["+notcp", "+tcp"] {
        let found = resolver::dig(&lab.web.workload, "127.0.0.11", &["web", how]).unwrap();
        assert_eq!(found, [lab.web.address()], "{how}");
        let version = ["dns-version.cluster.local", "TXT", how];
        for at in ["169.254.79.53", "10.96.0.10"] {
            assert_eq!(resolver::dig(&lab.web.workload, at, &version).unwrap(), ["\"1.1.0\""], "{at} {how}");
        }
    }
}

#[test]
fn names_resolve_where_the_host_drops_incoming_traffic() {
    let lab = firewall_lab();
    assert_names_resolve(&lab);
    for (family, address) in [("ip", "10.0.0.0/8"), ("ip6", "fc00::/7")] {
        lab.run(&format!(
            "nft -f - <<'X'
table {family} strict {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname lo accept
        ct state established,related accept
        {family} saddr {address} counter drop
    }}
}}
X"
        ));
    }
    assert_names_resolve(&lab);
    lab.wait_no_problem();
    wait_clean(lab.lab.hosts(), SOON).unwrap();
    // The resolver's rules are repaired too, and deleted by a teardown.
    lab.run("nft flush table ip ovl-resolver");
    wait_until(SOON, "queries to pass again", || {
        resolver::dig(&lab.web.workload, "127.0.0.11", &["web", "+time=1"]).map(drop)
    })
    .unwrap();
    lab.host().ctl_ok(&["teardown", "--yes"]).unwrap();
    let left = lab.run("nft list tables");
    assert!(!left.contains("ovl"), "{left}");
}

#[test]
fn firewalld_rules_apply() {
    let lab = firewall_lab();
    let bus = "<busconfig><type>system</type><listen>unix:path=BUS</listen><auth>EXTERNAL</auth><policy context=\"default\">\
               <allow user=\"*\"/><allow own=\"*\"/><allow send_type=\"method_call\"/><allow own=\"*\"/><allow send_destination=\"*\" eavesdrop=\"true\"/><allow receive_type=\"method_return\"/><allow receive_type=\"error\"/>\
               <allow receive_type=\"method_call\"/><allow receive_type=\"signal\"/><allow send_type=\"signal\"/></policy></busconfig>";
    let script = format!(
        "export DBUS_SYSTEM_BUS_ADDRESS=unix:path=$PWD/bus
        echo '{bus}' | sed s,BUS,$PWD/bus, > bus.conf
        dbus-daemon --config-file=bus.conf --nofork --nopidfile & bus=$!
        trap 'kill $bus $firewalld 2>/dev/null; wait' EXIT
        until [ -S bus ]; do sleep 0.1; done
        firewalld --nofork --nopid & firewalld=$!
        until firewall-cmd --state; do sleep 0.2; done
        echo up
        while read -r line; do $line && echo \"done: $line\"; done < <(tail -f -n +1 --pid=$$ commands)"
    );
    let commands = lab.lab.dir().join("firewalld").join("commands");
    fs::create_dir_all(commands.parent().unwrap()).unwrap();
    fs::write(&commands, "").unwrap();
    let firewalld = with_copies(&lab, "firewalld", &["/etc/firewalld"], &script);
    let wait_output = |what: &str| {
        wait_until(SOON, &format!("firewalld: {what}"), || {
            ensure!(firewalld.stdout().contains(what), "{}{}", firewalld.stdout(), firewalld.stderr());
            Ok(())
        })
        .unwrap();
    };
    let run_command = |line: &str| {
        let before = fs::read_to_string(&commands).unwrap();
        fs::write(&commands, format!("{before}{line}\n")).unwrap();
        wait_output(&format!("done: {line}"));
    };
    wait_output("up");
    assert_names_resolve(&lab);
    // firewalld accepts DNATed packets, but rejects packets from endpoints, which is reported.
    wait_until(SOON, "the published port to answer", || lab.connect()).unwrap();
    let advice = lab.advice(&["firewalld drops forwarded packets", "network blue"]);
    assert!(!lab.web.workload.exec(["ping", "-n", "-c1", "-W1", "192.168.77.250"]).unwrap().status.success());
    let command = advice[0].replace("--permanent ", "");
    assert_contains(&command, &["firewall-cmd --zone=trusted --add-interface=ovb-"]);
    run_command(&command);
    lab.assert_open();
    lab.wait_no_problem();
    assert_names_resolve(&lab);
    // An administrator's rule takes precedence.
    let drop = "firewall-cmd --direct --add-rule ipv4 filter FORWARD 0 -p tcp --dport 80 -j DROP";
    run_command(drop);
    lab.assert_closed();
    run_command(&drop.replace("--add-rule", "--remove-rule"));
    lab.assert_open();
    stop_script(firewalld);
}

/// Stops a script with SIGTERM, so that its trap stops what it started.
fn stop_script(mut script: Spawned) {
    script.signal(netns_lab::Signal::SIGTERM).unwrap();
    script.wait(SOON).unwrap();
}

#[test]
fn publish_drift_is_reported_in_events() {
    let lab = firewall_lab();
    let verify = || -> Result<String> { Ok(lab.host().ctl(&["verify"])?.stdout) };
    wait_clean(lab.lab.hosts(), SOON).unwrap();
    let events = || -> Result<Vec<String>> {
        let all = lab.host().ctl_json(&["events"])?;
        Ok(all.as_array().context("events")?.iter().map(|event| event["message"].to_string()).collect())
    };
    lab.run("nft delete element inet ovl-publish any4 '{ tcp . 8080 }'");
    wait_until(SOON, "the repair in the events", || {
        let messages = events()?;
        ensure!(messages.iter().any(|event| event.contains("any4")), "{messages:?} {}", verify()?);
        Ok(())
    })
    .unwrap();
    lab.assert_open();
    let row = lab.host().ctl_json(&["endpoints"]).unwrap();
    assert_eq!(row[0]["publish"][0]["host"], 8080);
    assert_eq!(strings(&row[0]["addresses"]), ["10.1.0.2/24"]);
}
