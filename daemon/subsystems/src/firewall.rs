//! Other people's firewalls on this host: what they make of packets that are forwarded to endpoints and from them.
//!
//! They decide, and are not gone around. Only where Docker drops whatever it does not know is there one rule of ours
//! among those that it leaves to users: it leads to a chain of our own with what concerns our devices. For all others
//! it is said what stops packets, and what would let them pass.

use ovl_proto::object::{Mode, Network};

use ovl_dataplane::device::Device;
use ovl_dataplane::observed::{Chain, Foreign, Iptables};

/// The chain of Docker's that belongs to users.
pub const USERS: &str = "DOCKER-USER";
/// Ours, beside it.
pub const OURS: &str = "OVL";

/// What our chain does: what comes from our devices or goes to them passes. Who may reach whose network is decided in
/// our own table, and between our networks and Docker's by Docker's rules.
const PASS: [&str; 6] = [
    "-o docker+ -j RETURN",
    "-o br-+ -j RETURN",
    "-i ovb-+ -j ACCEPT",
    "-o ovb-+ -j ACCEPT",
    "-i ove-+ -j ACCEPT",
    "-o ove-+ -j ACCEPT",
];

/// What follows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// Commands to run, each a program and its arguments.
    pub commands: Vec<Vec<String>>,
    /// What stops packets, and what would let them pass: one sentence each, with a name of its own.
    pub problems: Vec<(String, String)>,
}

/// `networks` are those that are built here. Of internal ones nothing is routed, but where Docker has the packet filter look
/// at bridges (`net.bridge.bridge-nf-call-iptables`), it sees their frames as well.
pub fn decide(foreign: &Foreign, networks: &[&Network]) -> Decision {
    let mut decision = Decision::default();
    let all = networks;
    let networks: Vec<&Network> = all.iter().copied().filter(|network| !network.internal).collect();
    let networks = &networks[..];
    for table in &foreign.iptables {
        let wanted = subnets(networks, table.v4);
        if table.has_chain(USERS) {
            door(table, !subnets(all, table.v4).is_empty() && table.drops(), &mut decision.commands);
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

/// All ranges of a family, with their networks.
fn subnets<'a>(networks: &[&'a Network], v4: bool) -> Vec<(&'a Network, String)> {
    let all = networks
        .iter()
        .flat_map(|network| network.subnets.iter().map(move |subnet| (*network, subnet.prefix)));
    let family = all.filter(|(_, prefix)| prefix.addr().is_ipv4() == v4);
    family.map(|(network, prefix)| (network, prefix.to_string())).collect()
}

/// A sentence for each network that no rule names, by its device or its range: then nobody has thought of it.
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
                "{who} drops forwarded packets that no rule allows, those of network {} ({subnet}) among them: {} would \
                 let them pass",
                network.name,
                advice(network, subnet)
            );
            (format!("firewall {who} {subnet}"), sentence)
        })
        .collect()
}

/// Puts our rule among the users', or takes it away.
fn door(iptables: &Iptables, wanted: bool, commands: &mut Vec<Vec<String>>) {
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
        // Behind what an administrator has put there, and before the rule by which Docker ends the chain.
        let before = users.iter().position(|rule| *rule == "-j RETURN");
        run(format!("-I {USERS} {} {jump}", before.unwrap_or(users.len()) + 1));
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::clock::Stamp;
    use ovl_proto::id::NetworkId;
    use ovl_proto::object::{Backend, Driver};

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
            internal: false,
            backend: Backend::Vxlan,
            names: true,
            on_demand: false,
        }
    }

    fn iptables(lines: &str) -> Foreign {
        let lines = lines.lines().map(|line| line.trim().to_owned()).collect();
        let table = Iptables { tool: "iptables-nft".to_owned(), v4: true, lines };
        Foreign { iptables: vec![table], chains: vec![] }
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
    fn our_rule_is_behind_the_administrators_and_goes_again() {
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
        // Docker that drops nothing needs no rule of ours.
        assert_eq!(commands(&iptables(&there.replace("FORWARD DROP", "FORWARD ACCEPT")), &[&network]), gone);
        assert_eq!(commands(&iptables(DOCKER), &[]), Vec::<String>::new());
    }

    #[test]
    fn what_would_have_to_be_allowed_is_said_until_it_is() {
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
            iptables: vec![],
            chains: vec![Chain {
                family: "inet".to_owned(),
                table: table.to_owned(),
                name: "forward".to_owned(),
                drops: true,
                text: text.to_owned(),
            }],
        };
        assert!(
            said(&chain("mine", ""))[0]
                .contains("nft insert rule inet mine forward ip daddr 10.1.0.0/16 accept")
        );
        assert!(said(&chain("firewalld", ""))[0].contains("--zone=trusted --add-interface=ovb-"));
        let bridge = format!("iifname \"{}\" goto filter_FWD_trusted", Device::bridge(network.id));
        assert!(said(&chain("firewalld", &bridge)).is_empty());
    }
}
