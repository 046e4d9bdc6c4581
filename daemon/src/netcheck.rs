//! What kind of NAT this host is behind, what is blocked, and what follows: decided from what its probes saw.
//!
//! The tests are those of RFC 5780, with members in place of its server. Two members, and two ports of one of them, are told from
//! where a probe came: that gives the mapping. One that was sent to answers from another port, and has another member answer: what
//! arrives gives the filtering. `node::netcheck` sends the probes.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ovl_control::{Dependence, Family, NatKind, Netcheck, NetcheckFinding, NetcheckMember, Severity};

/// What the probes saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observations {
    /// The addresses of this host.
    pub own: Vec<IpAddr>,
    /// The MTU of its underlay device.
    pub link_mtu: u16,
    /// The members that were asked, the nearest first.
    pub members: Vec<NetcheckMember>,
    /// Where the other port of the first member that answered saw the same socket.
    pub at_other_port: Option<SocketAddr>,
    /// Whether an answer from the other port of the one member that was sent to arrived. `None` if none was asked for.
    pub from_other_port: Option<bool>,
    /// Whether an answer of a member that was not sent to arrived. `None` if none was asked for.
    pub from_other_host: Option<bool>,
    /// Whether a datagram to the outer address of another socket of this host arrived there. `None` if there is no such address.
    pub hairpin: Option<bool>,
    /// Where members see streams of this host, as gossip last heard. It may be all that is known where UDP is blocked.
    pub seen_by_tcp: Option<SocketAddr>,
    /// The number of members that are behind NAT, and were not asked.
    pub hidden: usize,
}

/// Decides on everything.
pub(crate) fn judge(seen: &Observations) -> Netcheck {
    let nat = kind(seen);
    let outer = outer(seen);
    let families = [("ipv4", true), ("ipv6", false)].map(|(name, is_v4)| family(seen, name, is_v4)).into();
    let findings = findings(seen, &nat);
    let clear = findings.iter().all(|finding| finding.severity.is_none());
    Netcheck { clear, nat, outer, families, members: seen.members.clone(), findings }
}

fn outer(seen: &Observations) -> Vec<SocketAddr> {
    let all: BTreeSet<SocketAddr> = seen.members.iter().filter_map(|member| member.seen_at).collect();
    if all.is_empty() { seen.seen_by_tcp.into_iter().collect() } else { all.into_iter().collect() }
}

fn family(seen: &Observations, name: &str, is_v4: bool) -> Family {
    let asked = || seen.members.iter().filter(|member| member.address.is_ipv4() == is_v4);
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    Family {
        family: name.to_owned(),
        has_address: seen.own.iter().any(|address| address.is_ipv4() == is_v4),
        asked: count(asked().count()),
        udp: count(asked().filter(|member| member.udp).count()),
        tcp: count(asked().filter(|member| member.tcp).count()),
    }
}

/// The mapping, of where members and another port of the first of them see one socket.
fn mapping(seen: &Observations) -> Option<Dependence> {
    let mut answers = seen.members.iter().filter_map(|member| Some((member.address.ip(), member.seen_at?)));
    let (first, at) = answers.next()?;
    let other = answers.filter(|(address, _)| *address != first).map(|(_, other)| other);
    let others: Vec<SocketAddr> = other.collect();
    let differs_by_port = seen.at_other_port.map(|other| other != at);
    if differs_by_port == Some(true) {
        return Some(Dependence::AddressAndPortDependent);
    }
    match others.iter().any(|other| *other != at) {
        true => differs_by_port.map(|_| Dependence::AddressDependent),
        false => (!others.is_empty()).then_some(Dependence::EndpointIndependent),
    }
}

fn filtering(seen: &Observations) -> Option<Dependence> {
    match (seen.from_other_host, seen.from_other_port) {
        (Some(true), _) => Some(Dependence::EndpointIndependent),
        (Some(false), Some(true)) => Some(Dependence::AddressDependent),
        (_, Some(false)) => Some(Dependence::AddressAndPortDependent),
        (None, _) | (_, None) => None,
    }
}

fn kind(seen: &Observations) -> NatKind {
    use Dependence::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
    let has_udp = seen.members.iter().any(|member| member.udp);
    let has_tcp = seen.members.iter().any(|member| member.tcp);
    let at = outer(seen).first().copied();
    let translates = at.map(|at| !seen.own.contains(&at.ip()));
    let mapping = mapping(seen).filter(|_| translates == Some(true));
    let filtering = if has_udp { filtering(seen) } else { None };
    let kind = match (translates, mapping, filtering) {
        _ if !has_udp && has_tcp => "udp-blocked",
        _ if !has_udp => "unknown",
        (Some(false), _, Some(EndpointIndependent)) => "none",
        (Some(false), _, Some(_)) => "firewall",
        (Some(true), Some(AddressAndPortDependent), _) => "symmetric",
        (Some(true), Some(AddressDependent), _) => "address-dependent",
        (Some(true), Some(EndpointIndependent), Some(EndpointIndependent)) => "full-cone",
        (Some(true), Some(EndpointIndependent), Some(AddressDependent)) => "restricted",
        (Some(true), Some(EndpointIndependent), Some(AddressAndPortDependent)) => "port-restricted",
        _ => "unknown",
    };
    let hairpin = seen.hairpin.filter(|_| translates == Some(true) && has_udp);
    NatKind { kind: kind.to_owned(), translates, mapping, filtering, hairpin }
}

fn findings(seen: &Observations, nat: &NatKind) -> Vec<NetcheckFinding> {
    let mut findings = Vec::new();
    let mut add = |severity: Option<Severity>, finding: String, advice: &str| {
        findings.push(NetcheckFinding { severity, finding, advice: advice.to_owned() });
    };
    let names = |which: &dyn Fn(&&NetcheckMember) -> bool| {
        let names: Vec<&str> = seen.members.iter().filter(which).map(|member| member.name.as_str()).collect();
        names.join(", ")
    };
    if seen.members.is_empty() {
        add(
            Some(Severity::Warning),
            "no member can be asked: none is alive that others can dial".to_owned(),
            "see 'ovlctl peers'; one member needs an address that the others can dial",
        );
        return findings;
    }
    let (no_udp, no_tcp) =
        (names(&|member| !member.udp && member.tcp), names(&|member| member.udp && !member.tcp));
    let nothing = names(&|member| !member.udp && !member.tcp);
    if !nothing.is_empty() {
        add(
            Some(Severity::Error),
            format!("neither UDP nor TCP passes to {nothing}"),
            "check routes and firewalls on the way; other members pass on what is for them",
        );
    }
    if !no_udp.is_empty() {
        add(
            Some(Severity::Warning),
            format!("UDP does not pass to {no_udp}: encrypted networks go over TCP, which is slower"),
            "let UDP pass to the ports of advertise (7940) and relay_port (7942) of members",
        );
    }
    if !no_tcp.is_empty() {
        add(
            Some(Severity::Warning),
            format!("TCP does not pass to {no_tcp}: tables and agreement go through other members"),
            "let TCP pass to the port of advertise (7940) of members",
        );
    }
    let narrow: Vec<String> = seen
        .members
        .iter()
        .filter_map(|member| {
            Some((member, member.path_mtu.filter(|mtu| member.udp && *mtu < seen.link_mtu)?))
        })
        .map(|(member, mtu)| format!("{} ({mtu})", member.name))
        .collect();
    if !narrow.is_empty() {
        add(
            Some(Severity::Warning),
            format!("datagrams of {} bytes are lost on the way to {}", seen.link_mtu, narrow.join(", ")),
            "networks use shorter packets already; a link on the way carries less than its ends say",
        );
    }
    let relays = names(&|member| member.relays && (member.udp || member.tcp));
    let needs_relay = matches!(
        nat.kind.as_str(),
        "port-restricted" | "address-dependent" | "symmetric" | "udp-blocked" | "firewall"
    );
    match relays.is_empty() {
        false => add(None, format!("these members would pass on for this host: {relays}"), ""),
        true if needs_relay || seen.hidden > 0 => add(
            Some(Severity::Warning),
            "no member would pass on for this host, so it may not reach hosts behind NAT".to_owned(),
            "leave 'relay' on at a member that others can dial",
        ),
        true => {}
    }
    let (finding, advice) = match nat.kind.as_str() {
        "none" => ("others can dial this host: there is no NAT", ""),
        "firewall" => (
            "a firewall lets in only what this host asked for, so others cannot dial it",
            "nothing need be done; if others are to dial it, open UDP and TCP 7940 and UDP 7942",
        ),
        "full-cone" => ("all hosts behind NAT are reached directly", ""),
        "restricted" => ("hosts behind NAT are reached directly, symmetric ones too", ""),
        "port-restricted" => (
            "hosts behind symmetric NAT are reached through members, others directly",
            "nothing need be done; full-cone NAT or a forwarded port would avoid it",
        ),
        "address-dependent" | "symmetric" => (
            "hosts behind NAT that filters by port are reached through members",
            "nothing need be done; NAT with endpoint-independent mapping would avoid it",
        ),
        "udp-blocked" => ("hosts behind NAT are reached over TCP, through members", ""),
        _ => (
            "the kind of NAT is not known",
            "two members that answer by UDP and that others can dial are needed to tell; see the table",
        ),
    };
    add(None, finding.to_owned(), advice);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dependence::{AddressAndPortDependent, AddressDependent, EndpointIndependent};

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn member(number: u8, seen_at: &str) -> NetcheckMember {
        NetcheckMember {
            name: format!("h{number}"),
            address: at(&format!("192.0.2.{number}:7940")),
            rtt_us: Some(400),
            udp: !seen_at.is_empty(),
            tcp: true,
            path_mtu: Some(1500),
            relays: true,
            seen_at: seen_at.parse().ok(),
        }
    }

    /// What is seen through NAT with these two outer ports at two members, and this one at the other port of the first.
    fn seen(first: u16, other: u16, at_other_port: u16, from: (bool, bool)) -> Observations {
        let outer = |port: u16| format!("198.51.100.1:{port}");
        Observations {
            own: vec!["10.0.0.2".parse().unwrap()],
            link_mtu: 1500,
            members: vec![member(1, &outer(first)), member(3, &outer(other))],
            at_other_port: Some(at(&outer(at_other_port))),
            from_other_host: Some(from.0),
            from_other_port: Some(from.1),
            hairpin: Some(false),
            ..Observations::default()
        }
    }

    fn kind_of(seen: &Observations) -> (String, Option<Dependence>, Option<Dependence>) {
        let nat = judge(seen).nat;
        (nat.kind, nat.mapping, nat.filtering)
    }

    #[test]
    fn each_kind_of_nat_is_told_from_the_others() {
        for (seen, kind, mapping, filtering) in [
            (seen(1, 1, 1, (true, true)), "full-cone", EndpointIndependent, EndpointIndependent),
            (seen(1, 1, 1, (false, true)), "restricted", EndpointIndependent, AddressDependent),
            (seen(1, 1, 1, (false, false)), "port-restricted", EndpointIndependent, AddressAndPortDependent),
            (seen(1, 2, 1, (false, true)), "address-dependent", AddressDependent, AddressDependent),
            (seen(1, 2, 3, (false, false)), "symmetric", AddressAndPortDependent, AddressAndPortDependent),
        ] {
            assert_eq!(kind_of(&seen), (kind.to_owned(), Some(mapping), Some(filtering)));
        }
        let mut open = seen(1, 1, 1, (true, true));
        open.own = vec!["198.51.100.1".parse().unwrap()];
        assert_eq!(kind_of(&open), ("none".to_owned(), None, Some(EndpointIndependent)));
        let closed = Observations { from_other_host: Some(false), ..open };
        assert_eq!(kind_of(&closed).0, "firewall");
    }

    #[test]
    fn with_one_member_only_a_mapping_that_depends_on_the_port_is_known() {
        let mut one = seen(1, 1, 2, (false, false));
        one.members.truncate(1);
        assert_eq!(kind_of(&one).0, "symmetric");
        one.at_other_port = one.members[0].seen_at;
        one.from_other_host = None;
        assert_eq!(kind_of(&one), ("unknown".to_owned(), None, Some(AddressAndPortDependent)));
        one.at_other_port = None;
        assert_eq!(kind_of(&one).1, None);
    }

    #[test]
    fn what_is_blocked_is_a_finding_with_advice() {
        let has = |seen: &Observations, text: &str| {
            let found = judge(seen);
            let finding = found.findings.iter().find(|finding| finding.finding.contains(text));
            let finding = finding.unwrap_or_else(|| panic!("no {text} in {:?}", found.findings));
            assert!(!found.clear && finding.severity.is_some() && !finding.advice.is_empty(), "{finding:?}");
        };
        let good = seen(1, 1, 1, (true, true));
        assert!(judge(&good).clear, "{:?}", judge(&good).findings);
        let no_udp = Observations {
            members: vec![member(1, ""), member(3, "")],
            seen_by_tcp: Some(at("198.51.100.1:999")),
            ..good.clone()
        };
        has(&no_udp, "UDP does not pass to h1, h3");
        let found = judge(&no_udp);
        assert_eq!((found.nat.kind.as_str(), found.nat.translates), ("udp-blocked", Some(true)));
        assert_eq!(found.outer, [at("198.51.100.1:999")]);
        let mut bad = good.clone();
        bad.members[0].tcp = false;
        has(&bad, "TCP does not pass to h1");
        bad.members[1].path_mtu = Some(1400);
        has(&bad, "1500 bytes are lost on the way to h3 (1400)");
        (bad.members[0].udp, bad.members[0].seen_at) = (false, None);
        has(&bad, "neither UDP nor TCP passes to h1");
        let mut alone = seen(1, 2, 3, (false, false));
        alone.members.iter_mut().for_each(|member| member.relays = false);
        has(&alone, "no member would pass on");
        has(&Observations::default(), "no member can be asked");
    }

    #[test]
    fn families_are_counted_by_members_that_were_asked() {
        let mut seen = seen(1, 1, 1, (true, true));
        seen.members[1].address = at("[2001:db8::1]:7940");
        seen.members[1].udp = false;
        let [v4, v6] = &judge(&seen).families[..] else { panic!("two families") };
        assert_eq!((v4.has_address, v4.asked, v4.udp, v4.tcp), (true, 1, 1, 1));
        assert_eq!((v6.has_address, v6.asked, v6.udp, v6.tcp), (false, 1, 0, 1));
    }
}
