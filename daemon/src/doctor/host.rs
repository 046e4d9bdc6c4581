//! Judges what was read of the host: forwarding, features, ports, tables, leftovers, traffic control, firewalls.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_kernel::{BoundSocket, NeighbourUse, Survey, SurveyedChain, has_own_name, is_own};
use ovl_proto::id::Mac;

use super::Found;
use crate::problems::Code;

/// Queueing disciplines that delay or drop on purpose. Nothing has one by accident.
const EMULATORS: [&str; 1] = ["netem"];
/// Those that limit a rate. On devices of the host they are the administrator's, on devices of ovl no one needs them.
const LIMITERS: [&str; 5] = ["tbf", "htb", "hfsc", "cake", "ets"];

/// Returns the devices that do not forward IPv4 packets while the host as a whole does.
pub(crate) fn forwarding(survey: &Survey, needed: &BTreeSet<String>) -> Vec<Found> {
    if survey.sysctls.get("net.ipv4.ip_forward").map(String::as_str) != Some("1") {
        // ovld sets it, and says if it cannot.
        return Vec::new();
    }
    let settings = needed
        .iter()
        .map(|device| (device, format!("net.ipv4.conf.{}.forwarding", device.replace('.', "/"))));
    let off = settings.filter(|(_, setting)| survey.sysctls.get(setting).is_some_and(|value| value == "0"));
    off.map(|(device, setting)| {
        Found::new(
            Code::Forwarding,
            device,
            format!("{setting} is 0: the host does not forward IPv4 packets that arrive by {device}, while it does by others"),
            format!("`sysctl -w {setting}=1`, and find what turns it off: files in /etc/sysctl.d, a hardening tool"),
        )
    })
    .collect()
}

/// Returns what the host lacks. `bridges` are the devices of networks with IPv6 subnets; `refused` are sentences of operations
/// that the kernel refuses.
pub(crate) fn features(
    survey: &Survey,
    bridges: &BTreeSet<String>,
    refused: &[(String, String)],
) -> Vec<Found> {
    let mut found = Vec::new();
    if !bridges.is_empty() {
        let setting = "net.ipv6.conf.all.disable_ipv6";
        match survey.sysctls.get(setting).map(String::as_str) {
            None => found.push(Found::new(
                Code::KernelFeature,
                "IPv6",
                "the kernel has no IPv6, and networks of this host have IPv6 subnets",
                "remove `ipv6.disable=1` from the kernel's command line, or create the networks without IPv6 subnets",
            )),
            Some("1") => found.push(Found::new(
                Code::KernelFeature,
                "IPv6",
                format!("{setting} is 1: IPv6 is off on this host, and networks of it have IPv6 subnets"),
                format!("`sysctl -w {setting}=0`, and find what sets it: files in /etc/sysctl.d"),
            )),
            Some(_) => found.extend(bridges.iter().filter_map(|bridge| {
                let setting = format!("net.ipv6.conf.{bridge}.disable_ipv6");
                let is_off = survey.sysctls.get(&setting).is_some_and(|value| value == "1");
                is_off.then(|| {
                    Found::new(
                        Code::KernelFeature,
                        bridge,
                        format!("{setting} is 1: IPv6 is off on the bridge of a network with an IPv6 subnet"),
                        format!("`sysctl -w {setting}=0`, and find what sets it"),
                    )
                })
            })),
        }
    }
    if survey.tables.is_none() {
        found.push(Found::new(
            Code::KernelFeature,
            "nft",
            "`nft` does not run, so rules cannot be written or read: it is not installed, not in the PATH of ovld, or the \
             kernel has no nftables",
            "install the package nftables, and try `nft list tables`",
        ));
    }
    for (operation, sentence) in refused {
        if sentence.contains("this kernel has no") {
            let cause = format!("`{operation}` fails: {sentence}");
            found.push(Found::new(
                Code::KernelFeature,
                operation,
                cause,
                "install the module, or allow it to be loaded",
            ));
        }
    }
    found
}

/// A UDP port that ovl needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NeededPort {
    /// The port.
    pub port: u16,
    /// What for.
    pub purpose: &'static str,
    /// The setting of ovld that changes it.
    pub setting: &'static str,
}

/// Returns the ports and VNIs that something else has, if the kernel refuses an operation for that.
pub(crate) fn taken(survey: &Survey, needed: &[NeededPort], refused: &[(String, String)]) -> Vec<Found> {
    let mut found = Vec::new();
    for NeededPort { port, purpose, setting } in needed {
        let text = format!("UDP port {port} ");
        if !refused.iter().any(|(_, sentence)| sentence.contains(&text)) {
            continue;
        }
        let who = survey.sockets.iter().find(|socket| socket.udp && socket.port == *port);
        let device = survey.devices.iter().find(|(_, device)| {
            !device.by_ovl && device.vxlan.is_some_and(|(_, its_port)| its_port == *port)
        });
        let (who, stop) = match (who, device) {
            (Some(BoundSocket { owner: (name, pid), .. }), _) => (
                format!("the program {name} (process {pid})"),
                format!("stop it (`kill {pid}`, or its unit)"),
            ),
            (None, Some((name, _))) => {
                (format!("the VXLAN device {name}"), format!("delete it (`ip link delete {name}`)"))
            }
            (None, None) => (
                "another program".to_owned(),
                format!("find it with `ss -ulnp sport = :{port}` in all namespaces, and stop it"),
            ),
        };
        found.push(Found::new(
            Code::PortTaken,
            format!("UDP {port}"),
            format!("UDP port {port}, which ovl needs for {purpose}, is taken by {who}"),
            format!("{stop}, or set another {setting} on all hosts"),
        ));
    }
    for (_, sentence) in
        refused.iter().filter(|(_, it)| it.contains("VNI ") && it.contains("is in use by device"))
    {
        let device = sentence.rsplit(' ').next().unwrap_or_default();
        found.push(Found::new(
            Code::PortTaken,
            device,
            format!("a VXLAN device of another program has the VNI of a network: {sentence}"),
            format!(
                "delete the device (`ip link delete {device}`), or create the network with another `--vni`"
            ),
        ));
    }
    found
}

/// Returns what delays, drops or limits packets of ovl by traffic control. `underlay` is the device to other hosts.
pub(crate) fn traffic_control(survey: &Survey, underlay: &str) -> Vec<Found> {
    let ours = |device: &str| survey.devices.get(device).is_some_and(|it| it.by_ovl);
    let concerned = survey.disciplines.iter().filter(|(device, kind)| {
        let emulates = EMULATORS.contains(&&**kind);
        // ovl limits the rate of endpoints by itself.
        let limits = LIMITERS.contains(&&**kind) && ours(device) && !device.starts_with("ove-");
        emulates && (device == underlay || ours(device)) || limits
    });
    concerned
        .map(|(device, kind)| {
            let does = if EMULATORS.contains(&&**kind) {
                "delays, drops or changes packets on purpose"
            } else {
                "limits the rate of all packets of a network"
            };
            Found::new(
                Code::TrafficControl,
                device,
                format!("the queueing discipline `{kind}` on {device} {does}"),
                format!(
                    "`tc -s qdisc show dev {device}` shows it; `tc qdisc del dev {device} root` deletes it"
                ),
            )
        })
        .collect()
}

/// Returns objects with names of ovl that belong to nothing. ovld deletes what it knows to be its own, and leaves what it does
/// not.
pub(crate) fn leftovers(survey: &Survey) -> Vec<Found> {
    let devices = survey.devices.iter().filter(|(name, device)| has_own_name(name) && !device.by_ovl);
    let devices = devices.map(|(name, _)| {
        Found::new(
            Code::Leftover,
            name,
            format!("device {name} has a name of ovl and is none of its devices: it has no alias of ovl, or another kind"),
            format!("`ip -d link show {name}` shows it; `ip link delete {name}` deletes it"),
        )
    });
    let tables = survey.tables.iter().flatten();
    let tables = tables
        // Traces, captures and followed flows have tables for as long as they run, and ovld deletes what a killed one has left.
        .filter(|(_, table)| !table.starts_with("ovl-trace-"))
        .filter(|(family, table)| (table == "ovl" || table.starts_with("ovl-")) && !is_own(family, table));
    let tables = tables.map(|(family, table)| {
        Found::new(
            Code::Leftover,
            format!("table {family} {table}"),
            format!(
                "the nftables table {family} {table} has a name of ovl, and this release has no such table"
            ),
            format!(
                "`nft list table {family} {table}` shows it; `nft delete table {family} {table}` deletes it"
            ),
        )
    });
    let routes = survey.stray_routes.iter().map(|route| {
        Found::new(
            Code::Leftover,
            format!("route {route}"),
            format!("the route `{route}` has the protocol of ovl, which has routes in the main table alone"),
            format!("`ip route del {route}` deletes it"),
        )
    });
    devices.chain(tables).chain(routes).collect()
}

/// Judges the neighbour tables, as they were twice.
pub(crate) fn neighbours(before: &Survey, after: &Survey) -> Vec<Found> {
    let families = [("arp_cache", "ipv4"), ("ndisc_cache", "ipv6")];
    let of = |survey: &Survey, table| survey.neighbours.get(table).copied().unwrap_or_default();
    families
        .into_iter()
        .filter_map(|(table, family)| {
            let NeighbourUse { refused: was, .. } = of(before, table);
            let NeighbourUse { entries, refused } = of(after, table);
            let setting = format!("net.{family}.neigh.default.gc_thresh3");
            let most = after.sysctls.get(&setting).map_or("?", |value| value);
            (refused > was).then(|| {
                Found::new(
                    Code::NeighbourTable,
                    "",
                    format!(
                        "the kernel's neighbour table of {family} is full: it has {entries} entries, {setting} is {most}, and {} \
                         more were refused just now. Packets to other neighbours are dropped",
                        refused - was
                    ),
                    format!("raise {setting} (and gc_thresh2) in /etc/sysctl.d, or find what scans the network"),
                )
            })
        })
        .collect()
}

/// Returns the finding that another machine has an address of this host.
pub(crate) fn duplicate(device: &str, address: IpAddr, other: Mac) -> Found {
    let family = if address.is_ipv4() { "arping -I" } else { "ndisc6 -1" };
    Found::new(
        Code::DuplicateAddress,
        address.to_string(),
        format!(
            "the machine with the MAC address {other} answers for {address} on the link of {device} too: packets of other \
             hosts go to the one or the other"
        ),
        format!("give one of the two another address; `{family} {device} {address}` shows who answers"),
    )
}

/// A port at which other hosts reach this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenPort {
    /// The port.
    pub port: u16,
    /// What it is for.
    pub purpose: &'static str,
}

/// Returns the rules of other programs' chains that drop what other hosts send to `ports`, or that drop all that is
/// forwarded to or from `subnets`. `hosts` are the addresses of the cluster's hosts. `is_cut_off` says that something does
/// not arrive, so chains that drop what no rule allows are suspects too.
pub(crate) fn dropping_rules(
    chains: &[SurveyedChain],
    ports: &[OpenPort],
    subnets: &[String],
    hosts: &[String],
    is_cut_off: bool,
) -> Vec<Found> {
    let mut found = Vec::new();
    for chain in chains.iter().filter(|chain| !chain.rules.is_empty()) {
        let SurveyedChain { family, table, name, hook, rules } = chain;
        let object = format!("chain {family} {table} {name}");
        for rule in rules.iter().filter(|rule| drops(rule)) {
            if let Some(OpenPort { port, purpose }) =
                ports.iter().find(|it| is_about_port(rule, it.port, hosts))
            {
                found.push(Found::new(
                    Code::Firewall,
                    &object,
                    format!("the rule `{rule}` of the {object} drops {purpose} of other hosts, UDP port {port}"),
                    format!("delete the rule (`nft -a list chain {family} {table} {name}` shows its handle), or accept the hosts before it"),
                ));
            } else if let Some(subnet) = subnets.iter().find(|subnet| is_about_subnet(rule, subnet)) {
                found.push(Found::new(
                    Code::Firewall,
                    &object,
                    format!("the rule `{rule}` of the {object} drops all packets of subnet {subnet}"),
                    format!("delete the rule (`nft -a list chain {family} {table} {name}` shows its handle) if it is not meant"),
                ));
            }
        }
        let is_base = matches!(&**hook, "input" | "output");
        let denies = rules.first().is_some_and(|head| head.contains("policy drop"));
        if is_cut_off && is_base && denies {
            let missing =
                ports.iter().find(|it| !rules.iter().any(|rule| has_word(rule, &it.port.to_string())));
            found.extend(missing.map(|OpenPort { port, purpose }| {
                Found::new(
                    Code::Firewall,
                    &object,
                    format!(
                        "the {object} drops what no rule of it accepts, and no rule names UDP port {port} ({purpose}), \
                         while packets of other hosts are missing"
                    ),
                    format!("`nft insert rule {family} {table} {name} udp dport {port} accept`, for each port in docs/operations.md"),
                )
            }));
        }
    }
    found
}

/// Whether a rule drops what it matches, always.
fn drops(rule: &str) -> bool {
    let last = rule.split_whitespace().next_back();
    let ends = last == Some("drop") || has_word(rule, "reject");
    // What is limited, or decides by other connections, is no plain drop.
    ends && !["limit", "ct", "meter", "policy", "quota"].iter().any(|word| has_word(rule, word))
}

/// Whether a rule is about packets to a UDP port, from all hosts or from one of these.
fn is_about_port(rule: &str, port: u16, hosts: &[String]) -> bool {
    let port = port.to_string();
    let words: Vec<&str> = rule.split([' ', ',', '{', '}']).filter(|word| !word.is_empty()).collect();
    let Some(at) = words.iter().position(|word| *word == "dport") else { return false };
    let udp = words.contains(&"udp") || words.contains(&"th") || words.contains(&"17");
    let named =
        words.iter().skip(at + 1).take_while(|word| word.parse::<u16>().is_ok()).any(|word| *word == port);
    udp && named && is_about_hosts(&words, hosts)
}

/// Whether the addresses in a rule, if there are any, are those of hosts.
fn is_about_hosts(words: &[&str], hosts: &[String]) -> bool {
    if words.contains(&"!=") || words.contains(&"iifname") || words.contains(&"oifname") {
        return false;
    }
    words.windows(2).all(|pair| match pair {
        ["saddr" | "daddr", address] => hosts.iter().any(|host| host == address),
        _ => true,
    })
}

/// Whether a rule is about all packets of a subnet.
fn is_about_subnet(rule: &str, subnet: &str) -> bool {
    let words: Vec<&str> = rule.split_whitespace().collect();
    let narrowed =
        ["dport", "sport", "!=", "iifname", "oifname", "l4proto", "protocol", "icmp", "icmpv6", "mark"];
    let is_named =
        words.windows(2).any(|pair| matches!(pair, ["saddr" | "daddr", named] if *named == subnet));
    is_named && !words.iter().any(|word| narrowed.contains(word))
}

fn has_word(text: &str, word: &str) -> bool {
    text.split([' ', ',', '{', '}', ';']).any(|it| it == word)
}

#[cfg(test)]
mod tests {
    use ovl_kernel::SurveyedDevice;

    use super::*;

    fn sysctls(all: &[(&str, &str)]) -> Survey {
        let sysctls = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Survey { sysctls, tables: Some(BTreeSet::new()), ..Survey::default() }
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn device_that_does_not_forward_is_named_while_the_host_forwards() {
        let of = |all: &str, eth: &str| {
            let survey = sysctls(&[("net.ipv4.ip_forward", all), ("net.ipv4.conf.eth0/1.forwarding", eth)]);
            forwarding(&survey, &set(&["eth0.1"])).into_iter().map(|found| found.object).collect::<Vec<_>>()
        };
        assert_eq!(of("1", "0"), ["eth0.1"]);
        assert!(of("1", "1").is_empty() && of("0", "0").is_empty());
    }

    #[test]
    fn ipv6_is_missed_only_by_networks_that_use_it() {
        let off = sysctls(&[("net.ipv6.conf.all.disable_ipv6", "1")]);
        assert_eq!(features(&off, &set(&["ovb-a"]), &[])[0].object, "IPv6");
        assert!(features(&off, &set(&[]), &[]).is_empty());
        let one =
            sysctls(&[("net.ipv6.conf.all.disable_ipv6", "0"), ("net.ipv6.conf.ovb-a.disable_ipv6", "1")]);
        assert_eq!(features(&one, &set(&["ovb-a"]), &[])[0].object, "ovb-a");
        assert!(features(&one, &set(&["ovb-b"]), &[]).is_empty());
        assert_eq!(features(&Survey::default(), &set(&[]), &[])[0].object, "nft");
        let refused = [("ip link add".to_owned(), "this kernel has no VXLAN: install".to_owned())];
        assert_eq!(features(&sysctls(&[]), &set(&[]), &refused).len(), 1);
    }

    #[test]
    fn program_with_a_port_is_named_only_if_the_kernel_refuses_for_it() {
        let mut survey = sysctls(&[]);
        survey.sockets.push(BoundSocket { udp: true, port: 4789, owner: ("nc".to_owned(), 12) });
        let needed = [NeededPort { port: 4789, purpose: "VXLAN", setting: "vxlan_port" }];
        let refused = [("x".to_owned(), "UDP port 4789 of VXLAN is in use by another program".to_owned())];
        let found = taken(&survey, &needed, &refused);
        assert!(found[0].cause.ends_with("taken by the program nc (process 12)"), "{found:?}");
        assert!(taken(&survey, &needed, &[]).is_empty());
        survey.sockets.clear();
        let device = SurveyedDevice { vxlan: Some((None, 4789)), ..SurveyedDevice::default() };
        survey.devices.insert("vx0".to_owned(), device);
        assert!(taken(&survey, &needed, &refused)[0].cause.contains("device vx0"));
        let refused = [("x".to_owned(), "VNI 7 on port 4789 is in use by device vx1".to_owned())];
        assert_eq!(taken(&survey, &needed, &refused)[0].object, "vx1");
    }

    #[test]
    fn emulators_and_limits_on_devices_of_ovl_are_named() {
        let mut survey = sysctls(&[]);
        for (name, by_ovl) in [("eth0", false), ("eth1", false), ("ovx-a", true), ("ove-b", true)] {
            survey.devices.insert(name.to_owned(), SurveyedDevice { by_ovl, ..SurveyedDevice::default() });
        }
        for (name, kind) in [
            ("eth0", "fq_codel"),
            ("eth0", "htb"),
            ("eth1", "netem"),
            ("ovx-a", "noqueue"),
            ("ovx-a", "clsact"),
            ("ove-b", "tbf"),
        ] {
            survey.disciplines.insert((name.to_owned(), kind.to_owned()));
        }
        assert!(traffic_control(&survey, "eth0").is_empty());
        survey.disciplines.insert(("eth0".to_owned(), "netem".to_owned()));
        survey.disciplines.insert(("ovx-a".to_owned(), "tbf".to_owned()));
        let found = traffic_control(&survey, "eth0");
        assert_eq!(found.iter().map(|found| &*found.object).collect::<Vec<_>>(), ["eth0", "ovx-a"]);
    }

    #[test]
    fn objects_with_names_of_ovl_that_are_not_its_own_are_leftovers() {
        let mut survey = sysctls(&[]);
        let device = |by_ovl| SurveyedDevice { by_ovl, ..SurveyedDevice::default() };
        survey.devices.insert("ovt-0".to_owned(), device(true));
        survey.devices.insert("ovt-1".to_owned(), device(false));
        survey.devices.insert("ovl0".to_owned(), device(false));
        let tables = [
            ("inet", "ovl"),
            ("inet", "ovl-old"),
            ("bridge", "ovl"),
            ("inet", "overlay"),
            ("inet", "ovl-trace-capture-1"),
        ];
        survey.tables = Some(tables.map(|(family, name)| (family.to_owned(), name.to_owned())).into());
        survey.stray_routes.insert("10.1.0.0/16 dev ovb-a table 100".to_owned());
        let found: Vec<String> = leftovers(&survey).into_iter().map(|found| found.object).collect();
        assert_eq!(
            found,
            ["ovt-1", "table bridge ovl", "table inet ovl-old", "route 10.1.0.0/16 dev ovb-a table 100"]
        );
    }

    #[test]
    fn full_neighbour_table_is_one_that_refuses_now() {
        let survey = |refused| {
            let mut survey = sysctls(&[("net.ipv4.neigh.default.gc_thresh3", "1024")]);
            survey.neighbours.insert("arp_cache", NeighbourUse { entries: 1024, refused });
            survey
        };
        assert!(neighbours(&survey(7), &survey(7)).is_empty());
        assert!(neighbours(&survey(7), &survey(9))[0].cause.contains("gc_thresh3 is 1024, and 2 more"));
    }

    #[test]
    fn rules_that_drop_ports_or_subnets_of_ovl_are_named_and_others_are_not() {
        let ports = [OpenPort { port: 4789, purpose: "VXLAN" }];
        let (subnets, hosts) = (["10.1.0.0/16".to_owned()], ["192.0.2.2".to_owned()]);
        let found = |hook: &str, rules: &[&str], is_cut_off| {
            let chain = SurveyedChain {
                family: "inet".to_owned(),
                table: "mine".to_owned(),
                name: "c".to_owned(),
                hook: hook.to_owned(),
                rules: rules.iter().map(|rule| (*rule).to_owned()).collect(),
            };
            dropping_rules(&[chain], &ports, &subnets, &hosts, is_cut_off).len()
        };
        for rule in [
            "udp dport 4789 drop",
            "udp dport { 53, 4789 } counter drop",
            "ip saddr 192.0.2.2 udp dport 4789 drop",
            "udp dport 4789 reject with icmp port-unreachable",
            "ip daddr 10.1.0.0/16 drop",
            "ip saddr 10.1.0.0/16 counter drop",
        ] {
            assert_eq!(found("input", &[rule], false), 1, "{rule}");
        }
        for rule in [
            "udp dport 4789 accept",
            "udp dport 47890 drop",
            "tcp dport 4789 drop",
            "ip saddr != 192.0.2.2 udp dport 4789 drop",
            "ip saddr 203.0.113.0/24 udp dport 4789 drop",
            "iifname \"wan0\" udp dport 4789 drop",
            "udp dport 4789 limit rate over 10/second drop",
            "ip daddr 10.1.0.0/16 tcp dport 22 drop",
            "ip daddr 10.2.0.0/16 drop",
            "ct state invalid drop",
        ] {
            assert_eq!(found("input", &[rule], false), 0, "{rule}");
        }
        let head = "type filter hook input priority 0; policy drop;";
        assert_eq!(found("input", &[head, "tcp dport 22 accept"], false), 0);
        assert_eq!(found("input", &[head, "tcp dport 22 accept"], true), 1);
        assert_eq!(found("input", &[head, "udp dport 4789 accept"], true), 0);
        assert_eq!(found("forward", &[head], true), 0);
    }
}
