//! Which parts of the work for Kubernetes a host does: translation of Services, DNS, network policies.

use ovl_dataplane::observed::Foreign;
use ovl_subsystems::services::cluster_dns::ClusterDns;
use serde::Deserialize;

/// Whether Services are translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProxyMode {
    /// Unless a kube-proxy does it.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl ProxyMode {
    /// Whether ovl translates. `kube_proxy`: whether a kube-proxy translates on this host.
    pub(crate) fn translates(self, kube_proxy: bool) -> bool {
        match self {
            Self::Auto => !kube_proxy,
            Self::On => true,
            Self::Off => false,
        }
    }
}

/// Whether endpoints have a resolver of ovl, and who is the cluster DNS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DnsMode {
    /// They have one. It is also the cluster DNS, unless a Service of an API server is.
    #[default]
    Auto,
    /// They have one, which is also the cluster DNS.
    On,
    /// They have none.
    Off,
}

impl DnsMode {
    /// Returns who answers at the address of the cluster DNS.
    pub(crate) fn cluster_dns(self) -> ClusterDns {
        match self {
            Self::Auto => ClusterDns::Auto,
            Self::On => ClusterDns::Own,
            Self::Off => ClusterDns::Elsewhere,
        }
    }
}

/// Whether something is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Switch {
    /// It is.
    #[default]
    On,
    /// It is not.
    Off,
}

impl Switch {
    /// Whether it is done.
    pub(crate) fn is_on(self) -> bool {
        self == Self::On
    }
}

/// Whether packets take the fast path past the host's IP stack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FastPathMode {
    /// Where nothing stands in the way.
    Auto,
    /// The same, and it is a problem if something does.
    On,
    /// None do.
    #[default]
    Off,
}

/// The chain that kube-proxy has in its modes iptables and ipvs. The kubelet has others.
const CHAIN: &str = "KUBE-FORWARD";
/// The nftables table of its mode nftables.
const TABLE: &str = "kube-proxy";

/// Whether a kube-proxy translates Services on this host, by its rules.
pub(crate) fn has_kube_proxy(foreign: &Foreign) -> bool {
    foreign.iptables.iter().any(|table| table.has_chain(CHAIN))
        || foreign.chains.iter().any(|chain| is_of_kube_proxy(&chain.table, &chain.name))
}

/// Whether a chain of nftables is one of a kube-proxy, in any of its modes.
pub(crate) fn is_of_kube_proxy(table: &str, chain: &str) -> bool {
    table == TABLE || chain == CHAIN
}

#[cfg(test)]
mod tests {
    use ovl_dataplane::observed::{Chain, Iptables};

    use super::*;

    #[test]
    fn kube_proxy_is_known_by_its_rules() {
        let iptables = |chain: &str| Iptables {
            tool: "iptables-nft".to_owned(),
            v4: true,
            lines: vec![":FORWARD ACCEPT [0:0]".to_owned(), format!(":{chain} - [0:0]")],
        };
        let of = |iptables, chains| has_kube_proxy(&Foreign { iptables, chains, ..Foreign::default() });
        assert!(!of(Vec::new(), Vec::new()));
        assert!(!of(vec![iptables("KUBE-FIREWALL")], Vec::new()));
        assert!(of(vec![iptables("KUBE-FORWARD")], Vec::new()));
        let chain = Chain {
            family: "ip".to_owned(),
            table: "kube-proxy".to_owned(),
            name: "filter-forward".to_owned(),
            drops: false,
            text: String::new(),
        };
        assert!(of(Vec::new(), vec![chain]));
    }

    #[test]
    fn only_auto_gives_way() {
        let all = [ProxyMode::Auto, ProxyMode::On, ProxyMode::Off]
            .map(|mode| (mode.translates(false), mode.translates(true)));
        assert_eq!(all, [(true, false), (true, true), (false, false)]);
    }
}
