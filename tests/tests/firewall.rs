//! The host's firewall decides about what is published, and about what endpoints send.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, Spawned, wait_until};
use ovl_tests::ports::{asked, make_bridge, outsider, who_asks};
use ovl_tests::{
    Attached, SOON, assert_says, attach, problems, resolver, started, strings, wait_clean, wait_problem,
};

/// A host with a bridge network, and one endpoint on it whose port 80 is published.
struct Shop {
    lab: Lab,
    outside: Netns,
    web: Attached,
    _server: Spawned,
}

const PUBLISHED: &str = "192.168.77.1:8080";
const RANGE: &str = "10.1.0.0/24";

fn shop() -> Shop {
    let lab = started(1).unwrap();
    let outside = outsider(&lab).unwrap();
    let host = &lab["h1"];
    make_bridge(host, "blue", &["--subnet", RANGE]).unwrap();
    let web = attach(host, "web", "blue", &["--publish", "8080:80"]).unwrap();
    let server = who_asks(&web.workload, 80).unwrap();
    Shop { lab, outside, web, _server: server }
}

impl Shop {
    fn host(&self) -> &Host {
        &self.lab["h1"]
    }

    fn asks(&self) -> Result<()> {
        let seen = asked(&self.outside, PUBLISHED.parse::<SocketAddr>()?)?;
        ensure!(seen.to_string() == "192.168.77.250", "it sees {seen}");
        Ok(())
    }

    fn opens(&self) {
        wait_until(SOON, "the published port to answer", || self.asks()).unwrap();
        self.web.workload.ping_until("192.168.77.250", SOON).unwrap();
    }

    fn stays_shut(&self) {
        assert!(self.asks().is_err());
    }

    fn run(&self, line: &str) -> String {
        self.host().exec_ok(["sh", "-c", line]).unwrap()
    }

    fn without_problems(&self) {
        wait_until(SOON, "no problem", || {
            let problems = problems(self.host())?;
            ensure!(problems.is_empty(), "{problems:?}");
            Ok(())
        })
        .unwrap();
    }

    /// The commands, between backquotes, that a problem names.
    fn advice(&self, parts: &[&str]) -> Vec<String> {
        let sentence = wait_problem(self.host(), parts, SOON).unwrap();
        sentence.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    fn users(&self) -> Vec<String> {
        let listed = self.run("iptables -S DOCKER-USER 2>/dev/null || true");
        listed.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }
}

#[test]
fn an_administrators_drop_decides_about_a_published_port() {
    let shop = shop();
    shop.opens();
    // By the port that was asked for, and by who asks; as docs/docker.md shows it.
    shop.run(
        "nft -f - <<'X'
table inet mine {
    chain forward {
        type filter hook forward priority filter; policy accept;
        ct status dnat meta l4proto tcp ct original proto-dst 8080 ip saddr != 192.0.2.0/24 drop
    }
}
X",
    );
    shop.stays_shut();
    shop.run("nft delete table inet mine");
    shop.opens();
    let rule = "FORWARD -p tcp -m conntrack --ctorigdstport 8080 --ctdir ORIGINAL ! -s 192.0.2.0/24 -j DROP";
    shop.run(&format!("iptables -I {rule}"));
    shop.stays_shut();
    shop.run(&format!("iptables -D {rule}"));
    shop.opens();
    // Rules for the host's own programs are not asked.
    shop.run("iptables -P INPUT ACCEPT && iptables -A INPUT -p tcp --dport 8080 -j DROP");
    shop.opens();
    wait_clean(shop.lab.hosts(), SOON).unwrap();
}

#[test]
fn where_docker_drops_one_rule_of_ours_is_in_the_chain_that_it_leaves_to_users() {
    let shop = shop();
    shop.run(
        "iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER && iptables -A DOCKER-USER -j RETURN \
         && iptables -P FORWARD DROP",
    );
    shop.opens();
    let ours = "-A DOCKER-USER -j OVL";
    assert_eq!(shop.users(), [ours, "-A DOCKER-USER -j RETURN"]);
    assert_eq!(problems(shop.host()).unwrap(), Vec::<String>::new());
    // What an administrator has put there is asked before.
    shop.run("iptables -I DOCKER-USER -d 10.1.0.0/24 -p tcp --dport 80 -j DROP");
    shop.stays_shut();
    shop.run("iptables -D DOCKER-USER -d 10.1.0.0/24 -p tcp --dport 80 -j DROP");
    shop.opens();
    // Kept there.
    shop.run("iptables -F DOCKER-USER && iptables -F OVL && iptables -A DOCKER-USER -j RETURN");
    shop.opens();
    assert_eq!(shop.users(), [ours, "-A DOCKER-USER -j RETURN"]);
    // Docker's own containers are not opened to ours, nor ours to them.
    let passes = shop.run("iptables -S OVL");
    assert_says(
        &passes,
        &["-A OVL -o docker+ -j RETURN\n-A OVL -o br-+ -j RETURN\n-A OVL -i ovb-+ -j ACCEPT"],
    );
    // And taken away again, with the last network.
    shop.host().ctl_ok(&["detach", "web"]).unwrap();
    shop.host().ctl_ok(&["network", "rm", "blue"]).unwrap();
    wait_until(SOON, "our rule to go", || {
        let left = shop.run("iptables-save -t filter");
        ensure!(!left.contains("OVL"), "{left}");
        Ok(())
    })
    .unwrap();
    assert_eq!(shop.users(), ["-A DOCKER-USER -j RETURN"]);
    // A teardown does not wait for the next look.
    make_bridge(shop.host(), "blue", &["--subnet", RANGE]).unwrap();
    wait_until(SOON, "our rule to come", || {
        ensure!(shop.users().len() == 2, "{:?}", shop.users());
        Ok(())
    })
    .unwrap();
    shop.host().ctl_ok(&["teardown", "--yes"]).unwrap();
    assert!(!shop.run("iptables-save -t filter").contains("OVL"));
}

#[test]
fn what_would_have_to_be_allowed_is_named_and_helps() {
    let shop = shop();
    shop.run(
        "nft -f - <<'X'
table inet strict {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
    }
}
X",
    );
    let commands = shop.advice(&["chain forward of the nftables table inet strict", "network blue", RANGE]);
    shop.stays_shut();
    // Who publishes a port hears of it at once.
    let more = shop.host().workload("more").unwrap();
    let args = ["attach", "more", "--network", "blue", "--netns", more.path_str(), "--publish", "8081:80"];
    let told = shop.host().ctl(&args).unwrap();
    assert!(told.status.success());
    assert_says(&told.stderr, &["warning: the chain forward", &commands[0]]);
    assert_eq!(commands[0], "nft insert rule inet strict forward ip daddr 10.1.0.0/24 accept");
    shop.run(&commands[0]);
    shop.run(&commands[0].replace("daddr", "saddr"));
    shop.opens();
    shop.without_problems();
    // The same with iptables, and with a last rule in place of a policy.
    shop.run("nft delete table inet strict && iptables -P FORWARD DROP");
    let commands = shop.advice(&["FORWARD of iptables", RANGE]);
    shop.stays_shut();
    commands.iter().for_each(|command| drop(shop.run(command)));
    shop.opens();
    shop.without_problems();
}

#[test]
fn what_is_flushed_under_us_is_repaired() {
    let shop = shop();
    shop.opens();
    shop.run("nft flush ruleset");
    shop.opens();
    shop.run("nft flush table inet ovl-publish");
    shop.opens();
    shop.run("nft delete element inet ovl-publish any4 '{ tcp . 8080 }'");
    shop.opens();
    shop.run("nft delete table inet ovl-publish");
    shop.opens();
    wait_clean(shop.lab.hosts(), SOON).unwrap();
}

/// Runs a script in a host's network namespace, with copies of these files and directories in their places.
fn with_copies(shop: &Shop, name: &str, copied: &[&str], script: &str) -> Spawned {
    let dir = shop.lab.dir().join(name);
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
    let netns = format!("--net={}", shop.host().path_str());
    shop.host().spawn(["nsenter", &netns, "unshare", "--mount", "bash", "-c", &script]).unwrap()
}

#[test]
fn ufws_rules_decide() {
    let shop = shop();
    let ufw = |script: &str| {
        let copied = ["/etc/ufw", "/etc/default/ufw"];
        let output = with_copies(&shop, "ufw", &copied, script).finish(SOON).unwrap();
        assert!(output.status.success(), "{script}: {}{}", output.stdout, output.stderr);
    };
    ufw("ufw --force enable");
    let commands = shop.advice(&["ufw drops forwarded packets", "network blue"]);
    shop.stays_shut();
    names_resolve(&shop);
    assert_eq!(commands, ["ufw route allow to 10.1.0.0/24", "ufw route allow from 10.1.0.0/24"]);
    ufw(&commands.join("; "));
    shop.opens();
    shop.without_problems();
    names_resolve(&shop);
    ufw("ufw route insert 1 deny to any port 80");
    shop.stays_shut();
}

/// Queries for the resolver are for the host, where such a firewall lets nobody in.
fn names_resolve(shop: &Shop) {
    for how in ["+notcp", "+tcp"] {
        let found = resolver::dig(&shop.web.workload, "127.0.0.11", &["web", how]).unwrap();
        assert_eq!(found, [shop.web.address()], "{how}");
        let version = ["dns-version.cluster.local", "TXT", how];
        for at in ["169.254.79.53", "10.96.0.10"] {
            assert_eq!(resolver::dig(&shop.web.workload, at, &version).unwrap(), ["\"1.1.0\""], "{at} {how}");
        }
    }
}

#[test]
fn names_resolve_where_the_host_lets_nobody_in() {
    let shop = shop();
    names_resolve(&shop);
    for (family, address) in [("ip", "10.0.0.0/8"), ("ip6", "fc00::/7")] {
        shop.run(&format!(
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
    names_resolve(&shop);
    shop.without_problems();
    wait_clean(shop.lab.hosts(), SOON).unwrap();
    // As all else: repaired, and gone with the last network.
    shop.run("nft flush table ip ovl-resolver");
    wait_until(SOON, "queries to get past it again", || {
        resolver::dig(&shop.web.workload, "127.0.0.11", &["web", "+time=1"]).map(drop)
    })
    .unwrap();
    shop.host().ctl_ok(&["teardown", "--yes"]).unwrap();
    let left = shop.run("nft list tables");
    assert!(!left.contains("ovl"), "{left}");
}

#[test]
fn firewallds_rules_decide() {
    let shop = shop();
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
    let commands = shop.lab.dir().join("firewalld").join("commands");
    fs::create_dir_all(commands.parent().unwrap()).unwrap();
    fs::write(&commands, "").unwrap();
    let firewalld = with_copies(&shop, "firewalld", &["/etc/firewalld"], &script);
    let says = |what: &str| {
        wait_until(SOON, &format!("firewalld: {what}"), || {
            ensure!(firewalld.stdout().contains(what), "{}{}", firewalld.stdout(), firewalld.stderr());
            Ok(())
        })
        .unwrap();
    };
    let ask = |line: &str| {
        let before = fs::read_to_string(&commands).unwrap();
        fs::write(&commands, format!("{before}{line}\n")).unwrap();
        says(&format!("done: {line}"));
    };
    says("up");
    names_resolve(&shop);
    // It lets translated packets pass, and refuses what endpoints send; that is named.
    wait_until(SOON, "the published port to answer", || shop.asks()).unwrap();
    let advice = shop.advice(&["firewalld drops forwarded packets", "network blue"]);
    assert!(
        !shop.web.workload.exec(["ping", "-n", "-c1", "-W1", "192.168.77.250"]).unwrap().status.success()
    );
    let command = advice[0].replace("--permanent ", "");
    assert_says(&command, &["firewall-cmd --zone=trusted --add-interface=ovb-"]);
    ask(&command);
    shop.opens();
    shop.without_problems();
    names_resolve(&shop);
    // What its administrator refuses is refused.
    let drop = "firewall-cmd --direct --add-rule ipv4 filter FORWARD 0 -p tcp --dport 80 -j DROP";
    ask(drop);
    shop.stays_shut();
    ask(&drop.replace("--add-rule", "--remove-rule"));
    shop.opens();
    drop_all(firewalld);
}

/// Ends what a script started, by ending its shell in an orderly way.
fn drop_all(mut script: Spawned) {
    script.signal(netns_lab::Signal::SIGTERM).unwrap();
    script.wait(SOON).unwrap();
}

#[test]
fn publishing_shows_in_plan_and_verify_like_all_else() {
    let shop = shop();
    let verify = || -> Result<String> { Ok(shop.host().ctl(&["verify"])?.stdout) };
    wait_clean(shop.lab.hosts(), SOON).unwrap();
    let events = || -> Result<Vec<String>> {
        let all = shop.host().ctl_json(&["events"])?;
        Ok(all.as_array().context("events")?.iter().map(|event| event["message"].to_string()).collect())
    };
    shop.run("nft delete element inet ovl-publish any4 '{ tcp . 8080 }'");
    wait_until(SOON, "the repair to be told", || {
        let told = events()?;
        ensure!(told.iter().any(|event| event.contains("any4")), "{told:?} {}", verify()?);
        Ok(())
    })
    .unwrap();
    shop.opens();
    let row = shop.host().ctl_json(&["endpoints"]).unwrap();
    assert_eq!(row[0]["publish"][0]["host"], 8080);
    assert_eq!(strings(&row[0]["addresses"]), ["10.1.0.2/24"]);
}
