//! Checks what an endpoint shall be allowed to send from, beside its own addresses.
//!
//! The module owns no state and has one function.

use ipnet::IpNet;
use ovl_proto::id::Mac;
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::Endpoint;

/// Checks the prefixes and MAC addresses that an endpoint of a network shall be allowed to send from.
///
/// # Errors
///
/// A sentence: there are too many, or one that this network cannot allow.
pub fn check(network: &Network, prefixes: &[IpNet], macs: &[Mac]) -> Result<(), String> {
    let name = &network.name;
    let most = (Endpoint::MAX_ALLOWED, Endpoint::MAX_ALLOWED_MACS);
    if prefixes.len() > most.0 || macs.len() > most.1 {
        return Err(format!("at most {} allowed addresses and {} allowed MAC addresses", most.0, most.1));
    }
    if let Some(mac) = macs.iter().find(|mac| !mac.is_unicast()) {
        return Err(format!("allowed MAC address {mac}: not the address of one interface"));
    }
    if network.mode == Mode::L3 {
        if let Some(mac) = macs.first() {
            return Err(format!(
                "allowed MAC address {mac}: the network {name} is routed, and the host does not look at MAC addresses \
                 there"
            ));
        }
    } else if let Some(mac) = macs.iter().find(|mac| **mac == Mac::of_gateway(network.id)) {
        return Err(format!("allowed MAC address {mac}: it is the gateway's"));
    }
    let subnets = &network.subnets;
    let is_inside = |prefix: &&IpNet| subnets.iter().any(|subnet| subnet.prefix.contains(*prefix));
    if network.mode == Mode::L2 || network.may_be_sealed() {
        if let Some(prefix) = prefixes.iter().find(|prefix| !is_inside(prefix)) {
            let all: Vec<String> = subnets.iter().map(|subnet| subnet.prefix.to_string()).collect();
            return Err(format!(
                "allowed address {prefix}: it is in no subnet of the network {name} ({})",
                all.join(", ")
            ));
        }
        for prefix in prefixes {
            if let Some(subnet) = subnets.iter().find(|subnet| prefix.contains(&subnet.gateway)) {
                return Err(format!(
                    "allowed address {prefix}: it contains the gateway {}; give smaller prefixes without it",
                    subnet.gateway
                ));
            }
        }
    }
    if network.may_be_sealed()
        && let Some(prefix) = prefixes.iter().find(|prefix| prefix.prefix_len() < prefix.max_prefix_len())
    {
        return Err(format!(
            "allowed address {prefix}: the network {name} is encrypted, and its hosts check single addresses: give each \
             address by itself"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ovl_proto::clock::Stamp;
    use ovl_proto::id::NetworkId;
    use ovl_proto::object::{Backend, Driver, Subnet};
    use ovl_proto::wire::fields::Unknown;

    use super::*;

    fn network(mode: Mode, encrypted: bool) -> Network {
        let subnet = |prefix: &str, gateway: &str| Subnet {
            prefix: prefix.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            ..ovl_cluster::addresses::new_subnet(prefix.parse().unwrap()).unwrap()
        };
        Network {
            id: NetworkId([1; 5]),
            name: "blue".to_owned(),
            created: Stamp::default(),
            driver: Driver::Overlay,
            mode,
            vni: 5000,
            subnets: vec![subnet("10.1.0.0/16", "10.1.0.1"), subnet("fd01::/64", "fd01::1")],
            mtu: None,
            encrypted,
            auto_encrypt: false,
            internal: false,
            backend: Backend::Vxlan,
            names: true,
            on_demand: false,
            external_names: false,
            unknown: Unknown::default(),
        }
    }

    fn says(network: &Network, prefixes: &[&str], macs: &[&str]) -> String {
        let prefixes: Vec<IpNet> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
        let macs: Vec<Mac> = macs.iter().map(|mac| mac.parse().unwrap()).collect();
        check(network, &prefixes, &macs).err().unwrap_or_default()
    }

    #[test]
    fn only_what_the_network_can_carry_is_allowed() {
        let switched = network(Mode::L2, false);
        assert_eq!(
            says(&switched, &["10.1.0.9/32", "10.1.4.0/24", "fd01::9/128"], &["00:00:5e:00:01:07"]),
            ""
        );
        assert_eq!(
            says(&switched, &["192.0.2.0/24"], &[]),
            "allowed address 192.0.2.0/24: it is in no subnet of the network blue (10.1.0.0/16, fd01::/64)"
        );
        assert_eq!(
            says(&switched, &["10.1.0.0/24"], &[]),
            "allowed address 10.1.0.0/24: it contains the gateway 10.1.0.1; give smaller prefixes without it"
        );
        assert!(says(&switched, &["10.0.0.0/8"], &[]).contains("in no subnet"));
        assert!(says(&switched, &[], &["01:00:5e:00:00:01"]).contains("not the address of one interface"));
        assert!(says(&switched, &[], &[&Mac::of_gateway(switched.id).to_string()]).contains("gateway's"));
        assert!(says(&switched, &["10.1.9.9/32"; 65], &[]).starts_with("at most 64 "));
        assert!(says(&switched, &[], &["02:00:00:00:00:01"; 17]).contains("16"));
        let sealed = network(Mode::L2, true);
        assert_eq!(says(&sealed, &["10.1.0.9/32"], &["00:00:5e:00:01:07"]), "");
        assert!(says(&sealed, &["10.1.4.0/24"], &[]).contains("each address by itself"));
        let routed = network(Mode::L3, false);
        assert_eq!(says(&routed, &["192.0.2.0/24", "10.1.0.9/32"], &[]), "");
        assert!(says(&routed, &[], &["00:00:5e:00:01:07"]).contains("is routed"));
    }
}
