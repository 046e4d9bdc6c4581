//! Faults on the underlay: an nftables table in the switch's namespace, replaced atomically.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter, Write as _};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::lab::Lab;
use crate::netns::Netns;
use crate::state::LabState;
use crate::switch::switch_namespace;

const TABLE: &str = "bridge netns_lab";

/// Resolution of loss rates: 0.01 %.
const STEPS: f64 = 10_000.0;

/// The active faults of the underlay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Faults {
    /// Partition: hosts of different groups do not reach each other.
    pub groups: Vec<Vec<String>>,
    /// Cut links: nothing that the first host sends reaches the second one.
    #[serde(default)]
    pub cuts: BTreeSet<(String, String)>,
    /// Loss rate of all frames, in percent.
    pub loss: f64,
    /// Loss rate of the datagrams to each UDP port, in percent.
    pub udp_loss: BTreeMap<u16, f64>,
}

impl Lab {
    /// Drops all traffic between hosts of different groups. A host in no group reaches all hosts. Replaces an
    /// earlier partition. Faults are on the switch: hosts behind one NAT box suffer them together, and reach each other.
    pub fn partition(&self, groups: &[&[&str]]) -> Result<()> {
        let groups: Vec<Vec<String>> =
            groups.iter().map(|group| group.iter().map(|&name| name.to_owned()).collect()).collect();
        let mut seen = Vec::new();
        for name in groups.iter().flatten() {
            self.host(name)?;
            ensure!(!seen.contains(&name), "{name} is in two groups: a host is in one or in none");
            seen.push(name);
        }
        self.change_faults(|faults| faults.groups = groups)
    }

    /// Drops all traffic from the first to the second host of each pair, and back unless `one_way`. Earlier cuts stay.
    pub fn cut(&self, pairs: &[(&str, &str)], one_way: bool) -> Result<()> {
        for (from, to) in pairs {
            self.host(from)?;
            self.host(to)?;
            ensure!(from != to, "{from} is both ends of a link");
        }
        let name = |(from, to): (&str, &str)| (from.to_owned(), to.to_owned());
        self.change_faults(|faults| {
            faults.cuts.extend(pairs.iter().map(|pair| name(*pair)));
            if !one_way {
                faults.cuts.extend(pairs.iter().map(|(from, to)| name((to, from))));
            }
        })
    }

    /// Ends the partition and all cuts. Loss stays active: see [`clear_faults`](Self::clear_faults).
    pub fn heal(&self) -> Result<()> {
        self.change_faults(|faults| {
            faults.groups.clear();
            faults.cuts.clear();
        })
    }

    /// Drops a random share of all frames (including ARP) between hosts, in percent. 0 ends the loss.
    ///
    /// A frame may be a TCP segment of 64 KiB that was left to segmentation offload.
    pub fn loss(&self, percent: f64) -> Result<()> {
        check_percent(percent)?;
        self.change_faults(|faults| faults.loss = percent)
    }

    /// Drops a random share of the datagrams to one UDP port, in percent, in addition to
    /// [`loss`](Self::loss). 0 ends it.
    pub fn loss_udp_port(&self, percent: f64, port: u16) -> Result<()> {
        check_percent(percent)?;
        self.change_faults(|faults| {
            if percent > 0.0 {
                faults.udp_loss.insert(port, percent);
            } else {
                faults.udp_loss.remove(&port);
            }
        })
    }

    /// Ends the partition, all cuts and all loss.
    pub fn clear_faults(&self) -> Result<()> {
        self.change_faults(|faults| *faults = Faults::default())
    }

    /// Returns the active faults of the underlay.
    pub fn faults(&self) -> Faults {
        self.shared().state().faults.clone()
    }

    fn change_faults(&self, change: impl FnOnce(&mut Faults)) -> Result<()> {
        self.shared().update(|state: &mut LabState| {
            let mut faults = state.faults.clone();
            change(&mut faults);
            state.faults = faults;
            state.inject_faults()
        })
    }
}

impl LabState {
    /// Replaces the faults in the switch's namespace by those of the state.
    pub(crate) fn inject_faults(&self) -> Result<()> {
        let ports: BTreeMap<&str, &str> =
            self.hosts.iter().map(|host| (host.name.as_str(), self.port_of(host))).collect();
        let switch = Netns::new(switch_namespace(&self.name));
        switch.exec_input(["nft", "-f", "-"], Some(&self.faults.script(&ports))).map(drop)
    }
}

fn check_percent(percent: f64) -> Result<()> {
    if !(0.0..=100.0).contains(&percent) {
        bail!("invalid loss {percent} %: must be 0 to 100");
    }
    Ok(())
}

impl Faults {
    /// Renders the table as one transaction, for hosts that have these ports of the switch. The first line ensures that there
    /// is a table to delete.
    fn script(&self, ports: &BTreeMap<&str, &str>) -> String {
        let rules: Vec<String> = [
            self.partition_rules(ports),
            self.cut_rules(ports),
            self.udp_rules(),
            drop_rule("", self.loss).into_iter().collect(),
        ]
        .concat();
        let mut script = format!("add table {TABLE}\ndelete table {TABLE}\n");
        if !rules.is_empty() {
            let chain = "type filter hook forward priority 0; policy accept;";
            // Writing to a String does not fail.
            writeln!(script, "table {TABLE} {{\nchain forward {{ {chain}\n{}\n}}\n}}", rules.join("\n")).ok();
        }
        script
    }

    fn partition_rules(&self, ports: &BTreeMap<&str, &str>) -> Vec<String> {
        let set = |hosts: &[&String]| {
            // Hosts behind one box have one port.
            let ports: BTreeSet<String> = hosts
                .iter()
                .filter_map(|host| ports.get(host.as_str()))
                .map(|port| format!("\"{port}\""))
                .collect();
            format!("{{ {} }}", ports.into_iter().collect::<Vec<_>>().join(", "))
        };
        let mut rules = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            let own: Vec<&String> = group.iter().collect();
            let others: Vec<&String> = self
                .groups
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
                .flat_map(|(_, group)| group)
                .collect();
            if !own.is_empty() && !others.is_empty() {
                rules.push(format!("iifname {} oifname {} drop", set(&own), set(&others)));
            }
        }
        rules
    }

    fn cut_rules(&self, ports: &BTreeMap<&str, &str>) -> Vec<String> {
        let rule = |(from, to): &(String, String)| {
            let (from, to) = (ports.get(from.as_str())?, ports.get(to.as_str())?);
            Some(format!("iifname \"{from}\" oifname \"{to}\" drop"))
        };
        self.cuts.iter().filter_map(rule).collect()
    }

    fn udp_rules(&self) -> Vec<String> {
        self.udp_loss
            .iter()
            .filter_map(|(port, percent)| drop_rule(&format!("udp dport {port} "), *percent))
            .collect()
    }
}

fn drop_rule(condition: &str, percent: f64) -> Option<String> {
    let steps = (percent / 100.0 * STEPS).round();
    if steps <= 0.0 {
        return None;
    }
    // nft rejects a comparison that is always true.
    let share = if steps < STEPS { format!("numgen random mod {STEPS} < {steps} ") } else { String::new() };
    Some(format!("{condition}{share}drop"))
}

impl Display for Faults {
    fn fmt(&self, out: &mut Formatter) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.groups.is_empty() {
            let groups: Vec<String> = self.groups.iter().map(|group| group.join(",")).collect();
            parts.push(format!("partition {}", groups.join(" | ")));
        }
        if !self.cuts.is_empty() {
            let is_both = |(from, to): &(String, String)| self.cuts.contains(&(to.clone(), from.clone()));
            let shown = self.cuts.iter().filter(|pair| pair.0 < pair.1 || !is_both(pair));
            let cuts: Vec<String> = shown
                .map(|pair| format!("{} {} {}", pair.0, if is_both(pair) { "-" } else { "->" }, pair.1))
                .collect();
            parts.push(format!("cut {}", cuts.join(", ")));
        }
        if self.loss > 0.0 {
            parts.push(format!("loss {} %", self.loss));
        }
        parts.extend(
            self.udp_loss.iter().map(|(port, percent)| format!("loss {percent} % to UDP port {port}")),
        );
        out.write_str(if parts.is_empty() { "none" } else { "" })?;
        out.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_compose_into_one_table() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let faults = Faults {
            groups: vec![names(&["h1", "h2"]), names(&["h3"])],
            cuts: [("h1", "h2"), ("h2", "h1"), ("h3", "h1")]
                .map(|(from, to)| (from.to_owned(), to.to_owned()))
                .into(),
            loss: 2.5,
            udp_loss: BTreeMap::from([(4789, 100.0)]),
        };
        let ports = BTreeMap::from([("h1", "h1"), ("h2", "h2"), ("h3", "n3")]);
        let script = faults.script(&ports);
        for rule in [
            "iifname { \"h1\", \"h2\" } oifname { \"n3\" } drop",
            "iifname { \"n3\" } oifname { \"h1\", \"h2\" } drop",
            "iifname \"h2\" oifname \"h1\" drop",
            "iifname \"n3\" oifname \"h1\" drop",
            "udp dport 4789 drop",
            "\nnumgen random mod 10000 < 250 drop",
        ] {
            assert!(script.contains(rule), "{rule} in {script}");
        }
        let text = "partition h1,h2 | h3, cut h1 - h2, h3 -> h1, loss 2.5 %, loss 100 % to UDP port 4789";
        assert_eq!(faults.to_string(), text);
    }

    #[test]
    fn no_faults_produce_no_chain() {
        assert!(!Faults::default().script(&BTreeMap::new()).contains("chain"));
    }
}
