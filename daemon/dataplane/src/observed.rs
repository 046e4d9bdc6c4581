//! What a kernel holds beside the data plane: interfaces inside namespaces, and the packet filters of other programs.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::Mac;

/// An interface inside a network namespace, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// Its MAC address.
    pub mac: Mac,
    /// In bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, without link-local ones.
    pub addresses: Vec<IpNet>,
    /// The gateways of default routes through it.
    pub gateways: Vec<IpAddr>,
}

/// The table `filter` of iptables, for one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iptables {
    /// The program that manages it: `iptables-nft`, `ip6tables-legacy`, ...
    pub tool: String,
    /// Whether it is for IPv4.
    pub v4: bool,
    /// The lines that `iptables-save` prints.
    pub lines: Vec<String>,
}

impl Iptables {
    /// Whether it has a chain of this name.
    pub fn has_chain(&self, name: &str) -> bool {
        self.lines.iter().any(|line| {
            line.strip_prefix(':')
                .and_then(|rest| rest.strip_prefix(name))
                .is_some_and(|rest| rest.starts_with(' '))
        })
    }

    /// Whether forwarded packets that no rule decides about are dropped.
    pub fn drops(&self) -> bool {
        self.lines.iter().any(|line| line.starts_with(":FORWARD DROP"))
    }

    /// The name that people use for the program.
    pub fn command(&self) -> &'static str {
        if self.v4 { "iptables" } else { "ip6tables" }
    }

    /// The rules of a chain, in their order.
    pub fn rules(&self, chain: &str) -> Vec<&str> {
        let prefix = format!("-A {chain} ");
        self.lines.iter().filter_map(|line| line.strip_prefix(&prefix)).collect()
    }
}

/// An nftables chain of another program that sees forwarded packets, iptables' own aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub name: String,
    /// Whether a packet that no rule decides about is dropped or rejected.
    pub drops: bool,
    /// The whole table, as `nft` prints it.
    pub text: String,
}

impl Chain {
    /// Whether it has rules, as `nft` prints it.
    pub fn has_rules(&self) -> bool {
        let begin = format!("chain {} {{", self.name);
        let mut lines = self.text.lines().map(str::trim).skip_while(|line| *line != begin).skip(1);
        lines
            .by_ref()
            .take_while(|line| *line != "}")
            .any(|line| !line.starts_with("type ") && !line.is_empty())
    }
}

/// The packet filters of other programs on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Foreign {
    /// The tables of iptables that are in use.
    pub iptables: Vec<Iptables>,
    /// The chains of nftables.
    pub chains: Vec<Chain>,
    /// Chains of nftables, iptables' included, that see forwarded packets before or after the hook `forward`, and do not
    /// translate.
    pub others: Vec<Chain>,
    /// Whether the host has IPsec policies.
    pub ipsec: bool,
}
