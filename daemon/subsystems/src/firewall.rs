//! Firewalls of other programs on this host, and whether they drop packets that are forwarded to or from endpoints.
//!
//! ovld does not bypass them. Only where Docker drops all packets that it does not know does ovld add one rule to the
//! chain that Docker leaves to users; it jumps to a chain of ovld that accepts packets of ovld's devices. For every
//! other firewall, `status` names the firewall that drops packets and the command that would allow them. The module
//! owns no state. Begin to read at [`decide`].

use ovl_proto::object::{Mode, Network};

use ovl_dataplane::device::Device;
use ovl_dataplane::observed::{Chain, Foreign, Iptables};

/// Docker's chain for rules of the administrator.
pub const USERS: &str = "DOCKER-USER";
/// The chain of ovld to which [`USERS`] jumps.
pub const OURS: &str = "OVL";

/// The rules of [`OURS`]: packets from or to devices of ovld are accepted. Isolation between networks is enforced in
/// ovld's own table, and isolation between networks of ovld and of Docker by Docker's rules.
const PASS: [&str; 6] = [
    "-o docker+ -j RETURN",
    "-o br-+ -j RETURN",
    "-i ovb-+ -j ACCEPT",
    "-o ovb-+ -j ACCEPT",
    "-i ove-+ -j ACCEPT",
    "-o ove-+ -j ACCEPT",
];

/// The commands to run and the problems to report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// Commands to run, each a program and its arguments.
    pub commands: Vec<Vec<String>>,
    /// Problems: a unique key, and a sentence that says what drops packets and which command would allow them.
    pub problems: Vec<(String, String)>,
}

/// Decides what to do about the firewalls of other programs. `networks` are the networks with devices on this host.
///
/// Packets of internal networks are not routed. But where Docker passes bridged frames to the packet filter
/// (`net.bridge.bridge-nf-call-iptables`), Docker's chains see them too.
pub fn decide(foreign: &Foreign, networks: &[&Network]) -> Decision {
    let mut decision = Decision::default();
    let all = networks;
    let networks: Vec<&Network> = all.iter().copied().filter(|network| !network.internal).collect();
    let networks = &networks[..];
    for table in &foreign.iptables {
        let wanted = subnets(networks, table.v4);
        if table.has_chain(USERS) {
            user_chain(table, !subnets(all, table.v4).is_empty() && table.drops(), &mut decision.commands);
        } else if table.drops() {
            let text = table.lines.join("\n");
            let (ufw, tool) = (table.lines.iter().any(|line| line.starts_with(":ufw")), table.command());
            let advice = |network: &Network, subnet: &str| {
                let _ = network;
                if ufw {
                    format!("`ufw route allow to {subnet}` and `ufw route allow from {subnet}`")
                } else {
                    format!(
                        "`{tool} -I FORWARD -d {subnet} -j ACCEPT` and `{tool} -I FORWARD -s {subnet} -j ACCEPT`"
                    )
                }
            };
            let who = if ufw { "ufw".to_owned() } else { format!("the chain FORWARD of {tool}") };
            decision.problems.extend(stopped(&wanted, &text, &who, advice));
        }
    }
    for chain in foreign.chains.iter().filter(|chain| chain.drops) {
        let firewalld = chain.table == "firewalld";
        let who = if firewalld {
            "firewalld".to_owned()
        } else {
            format!("the chain {} of the nftables table {} {}", chain.name, chain.family, chain.table)
        };
        for v4 in [true, false] {
            if (chain.family == "ip" && !v4) || (chain.family == "ip6" && v4) {
                continue;
            }
            let advice = |network: &Network, subnet: &str| {
                if firewalld {
                    let device = match network.mode {
                        Mode::L2 => Device::bridge(network.id).to_string(),
                        Mode::L3 => "ove-+".to_owned(),
                    };
                    return format!(
                        "`firewall-cmd --permanent --zone=trusted --add-interface={device}` and a reload"
                    );
                }
                let ip = if v4 { "ip" } else { "ip6" };
                let Chain { family, table, name, .. } = chain;
                format!(
                    "`nft insert rule {family} {table} {name} {ip} daddr {subnet} accept` and the same with saddr"
                )
            };
            decision.problems.extend(stopped(&subnets(networks, v4), &chain.text, &who, advice));
        }
    }
    decision.problems.dedup();
    decision
}

/// Returns which rules of other programs packets on the fast path would bypass, as a sentence. `None` if there are none.
///
/// What the rules say is not looked at: any rule that forwarded packets pass may be about them.
pub fn bypassed(foreign: &Foreign) -> Option<String> {
    let iptables =
        foreign.iptables.iter().filter(|table| table.drops() || !table.rules("FORWARD").is_empty());
    let iptables = iptables.map(|table| format!("the chain FORWARD of {}", table.command()));
    let chains =
        foreign.chains.iter().chain(&foreign.others).filter(|chain| chain.drops || chain.has_rules());
    let chains = chains.map(|Chain { family, table, name, .. }| {
        format!("the chain {name} of the nftables table {family} {table}")
    });
    if let Some(first) = iptables.chain(chains).next() {
        return Some(format!(
            "{first} has rules for forwarded packets, which packets on the fast path would bypass"
        ));
    }
    let ipsec = "the host has IPsec policies (`ip xfrm policy`), which packets on the fast path would bypass";
    foreign.ipsec.then(|| ipsec.to_owned())
}

/// Returns all subnets of one address family, with their networks.
fn subnets<'a>(networks: &[&'a Network], v4: bool) -> Vec<(&'a Network, String)> {
    let all = networks
        .iter()
        .flat_map(|network| network.subnets.iter().map(move |subnet| (*network, subnet.prefix)));
    let family = all.filter(|(_, prefix)| prefix.addr().is_ipv4() == v4);
    family.map(|(network, prefix)| (network, prefix.to_string())).collect()
}

/// Returns a problem for each network that no rule names by its device or its subnet. If a rule names it, the
/// administrator has already decided about it.
fn stopped(
    wanted: &[(&Network, String)],
    rules: &str,
    who: &str,
    advice: impl Fn(&Network, &str) -> String,
) -> Vec<(String, String)> {
    let unnamed = wanted.iter().filter(|(network, subnet)| {
        let names = match network.mode {
            Mode::L2 => [Device::bridge(network.id).to_string(), "ovb-".to_owned()],
            Mode::L3 => ["ove-".to_owned(), "ove-".to_owned()],
        };
        let any = |name: &String| ["+", "*"].iter().any(|end| rules.contains(&format!("{name}{end}")));
        !rules.contains(subnet.as_str()) && !rules.contains(names[0].as_str()) && !names.iter().any(any)
    });
    unnamed
        .map(|(network, subnet)| {
            let sentence = format!(
                "network {}: {who} drops forwarded packets of subnet {subnet}, because no rule allows them: allow them \
                 with {}",
                network.name,
                advice(network, subnet)
            );
            (format!("firewall {who} {subnet}"), sentence)
        })
        .collect()
}

/// Adds the jump to [`OURS`] to Docker's user chain, or removes it.
fn user_chain(iptables: &Iptables, wanted: bool, commands: &mut Vec<Vec<String>>) {
    let mut run = |line: String| {
        let words = [&iptables.tool, "-w", "5"].into_iter().map(str::to_owned);
        commands.push(words.chain(line.split(' ').map(str::to_owned)).collect());
    };
    let jump = format!("-j {OURS}");
    let users = iptables.rules(USERS);
    let jumps = users.iter().filter(|rule| **rule == jump).count();
    if !wanted {
        for _ in 0..jumps {
            run(format!("-D {USERS} {jump}"));
        }
        if iptables.has_chain(OURS) {
            run(format!("-F {OURS}"));
            run(format!("-X {OURS}"));
        }
        return;
    }
    if !iptables.has_chain(OURS) {
        run(format!("-N {OURS}"));
    }
    if iptables.rules(OURS) != PASS {
        run(format!("-F {OURS}"));
        for rule in PASS {
            run(format!("-A {OURS} {rule}"));
        }
    }
    if jumps == 0 {
        // After the administrator's rules, which decide first, and before the RETURN by which Docker ends the chain.
        let before = users.iter().position(|rule| *rule == "-j RETURN");
        run(format!("-I {USERS} {} {jump}", before.unwrap_or(users.len()) + 1));
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::clock::Stamp;
    use ovl_proto::id::NetworkId;
    use ovl_proto::object::{Backend, Driver};
    use ovl_proto::wire::fields::Unknown;

    use super::*;
    use ovl_cluster::addresses;

    fn network() -> Network {
        Network {
            id: NetworkId([7; 5]),
            name: "blue".to_owned(),
            created: Stamp::default(),
            driver: Driver::Bridge,
            mode: Mode::L2,
            vni: 0,
            subnets: vec![addresses::new_subnet("10.1.0.0/16".parse().unwrap()).unwrap()],
            mtu: None,
            encrypted: false,
            auto_encrypt: false,
            internal: false,
            backend: Backend::Vxlan,
            names: true,
            on_demand: false,
            external_names: false,
            unknown: Unknown::default(),
        }
    }

    fn iptables(lines: &str) -> Foreign {
        let lines = lines.lines().map(|line| line.trim().to_owned()).collect();
        let table = Iptables { tool: "iptables-nft".to_owned(), v4: true, lines };
        Foreign { iptables: vec![table], ..Foreign::default() }
    }

    fn commands(foreign: &Foreign, networks: &[&Network]) -> Vec<String> {
        let decision = decide(foreign, networks);
        assert_eq!(decision.problems, []);
        decision.commands.iter().map(|words| words.join(" ")).collect()
    }

    const DOCKER: &str = ":FORWARD DROP [0:0]
        :DOCKER-USER - [0:0]
        -A FORWARD -j DOCKER-USER
        -A DOCKER-USER -s 192.0.2.7/32 -j DROP
        -A DOCKER-USER -j RETURN";

    #[test]
    fn the_jump_follows_the_administrators_rules_and_is_removed_when_not_needed() {
        let network = network();
        let made = commands(&iptables(DOCKER), &[&network]);
        assert_eq!(made.first().unwrap(), "iptables-nft -w 5 -N OVL");
        assert_eq!(made.last().unwrap(), "iptables-nft -w 5 -I DOCKER-USER 2 -j OVL");
        assert_eq!(made.len(), 3 + PASS.len());
        let pass: Vec<String> = PASS.iter().map(|rule| format!("-A OVL {rule}")).collect();
        let there =
            DOCKER.replace("-A DOCKER-USER -j RETURN", "-A DOCKER-USER -j OVL\n-A DOCKER-USER -j RETURN");
        let there = format!("{there}\n:OVL - [0:0]\n{}", pass.join("\n"));
        assert_eq!(commands(&iptables(&there), &[&network]), Vec::<String>::new());
        let gone =
            ["-D DOCKER-USER -j OVL", "-F OVL", "-X OVL"].map(|line| format!("iptables-nft -w 5 {line}"));
        assert_eq!(commands(&iptables(&there), &[]), gone);
        // The rule is not needed where Docker drops nothing.
        assert_eq!(commands(&iptables(&there.replace("FORWARD DROP", "FORWARD ACCEPT")), &[&network]), gone);
        assert_eq!(commands(&iptables(DOCKER), &[]), Vec::<String>::new());
    }

    #[test]
    fn a_problem_advises_a_rule_until_a_rule_names_the_network() {
        let network = network();
        let said = |foreign: &Foreign| -> Vec<String> {
            let decision = decide(foreign, &[&network]);
            assert!(decision.commands.is_empty());
            decision.problems.into_iter().map(|(_, sentence)| sentence).collect()
        };
        let own = ":FORWARD DROP [0:0]";
        assert!(said(&iptables(own))[0].contains("iptables -I FORWARD -d 10.1.0.0/16 -j ACCEPT"));
        let ufw = format!("{own}\n:ufw-before-forward - [0:0]");
        assert!(said(&iptables(&ufw))[0].contains("`ufw route allow to 10.1.0.0/16`"));
        assert!(said(&iptables(&format!("{ufw}\n-A ufw-user-forward -d 10.1.0.0/16 -j ACCEPT"))).is_empty());
        assert!(said(&iptables(&format!("{own}\n-A FORWARD -i ovb-+ -j ACCEPT"))).is_empty());
        assert!(said(&iptables(":FORWARD ACCEPT [0:0]")).is_empty());
        let chain = |table: &str, text: &str| Foreign {
            chains: vec![Chain {
                family: "inet".to_owned(),
                table: table.to_owned(),
                name: "forward".to_owned(),
                drops: true,
                text: text.to_owned(),
            }],
            ..Foreign::default()
        };
        assert!(
            said(&chain("mine", ""))[0]
                .contains("nft insert rule inet mine forward ip daddr 10.1.0.0/16 accept")
        );
        assert!(said(&chain("firewalld", ""))[0].contains("--zone=trusted --add-interface=ovb-"));
        let bridge = format!("iifname \"{}\" goto filter_FWD_trusted", Device::bridge(network.id));
        assert!(said(&chain("firewalld", &bridge)).is_empty());
    }

    #[test]
    fn any_rule_for_forwarded_packets_would_be_bypassed() {
        assert_eq!(bypassed(&Foreign::default()), None);
        let chain = |rules: &str| {
            Chain {
            family: "inet".to_owned(),
            table: "mine".to_owned(),
            name: "passing".to_owned(),
            drops: false,
            text: "table inet mine {\n\tchain passing {\n\t\ttype filter hook forward priority filter; policy accept;\n\
                 RULES\t}\n\tchain other {\n\t\tdrop\n\t}\n}\n"
                .replace("RULES", rules),
        }
        };
        let with = |chain: Chain| Foreign { chains: vec![chain], ..Foreign::default() };
        assert_eq!(bypassed(&with(chain(""))), None);
        let said = bypassed(&with(chain("\t\ttcp dport 80 accept\n"))).unwrap();
        assert!(said.contains("chain passing of the nftables table inet mine"), "{said}");
        assert!(bypassed(&with(Chain { drops: true, ..chain("") })).is_some());
        let elsewhere = Foreign { others: vec![chain("\t\tcounter\n")], ..Foreign::default() };
        assert!(bypassed(&elsewhere).is_some());
        let said = bypassed(&iptables(":FORWARD ACCEPT [0:0]\n-A FORWARD -j ACCEPT")).unwrap();
        assert!(said.contains("FORWARD of iptables"), "{said}");
        assert_eq!(bypassed(&iptables(":FORWARD ACCEPT [0:0]\n-A INPUT -j ACCEPT")), None);
        assert!(bypassed(&Foreign { ipsec: true, ..Foreign::default() }).unwrap().contains("IPsec"));
    }
}
