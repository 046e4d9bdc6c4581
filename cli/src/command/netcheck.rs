//! `ovlctl netcheck`: what kind of NAT this host is behind, and what is blocked.

use std::fmt::Write as _;
use std::process::ExitCode;

use ovl_control::{Dependence, Family, NatKind, Netcheck, NetcheckFinding, Reply, Request, Severity};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, key_value_block, optional, printable, yes_no};
use crate::time::micros;

/// Prints what was found to standard output. Exit status 1 if there is a warning or an error.
pub(crate) fn run(context: &Context) -> Result<ExitCode> {
    let Reply::Netcheck(found) = context.request(&Request::Netcheck)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&*found, render)?;
    Ok(if found.clear { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(found: &Netcheck) -> String {
    let Netcheck { clear: _, nat, outer, families, members, findings } = found;
    let mut text = key_value_block(&[
        ("NAT", kind(nat)),
        ("Mapping", nat.mapping.map(dependence).unwrap_or_default().to_owned()),
        ("Filtering", nat.filtering.map(dependence).unwrap_or_default().to_owned()),
        ("Hairpin", nat.hairpin.map(yes_no).unwrap_or_default()),
        ("Seen at", comma_separated(outer).replace(',', ", ")),
    ]);
    let family = |family: &Family| if family.family == "ipv4" { "IPv4" } else { "IPv6" };
    let of = |number: u32, family: &Family| match family.asked {
        0 => String::new(),
        asked => format!("{number} of {asked}"),
    };
    let table = TextTable::new()
        .column("FAMILY", families.iter().map(family))
        .column("ADDRESS", families.iter().map(|family| yes_no(family.has_address)))
        .column("UDP", families.iter().map(|family| of(family.udp, family)))
        .column("TCP", families.iter().map(|family| of(family.tcp, family)));
    let _ = write!(text, "\n{}", table.render());
    if !members.is_empty() {
        let table = TextTable::new()
            .column("MEMBER", members.iter().map(|member| &member.name))
            .column("ADDRESS", members.iter().map(|member| member.address))
            .column("RTT", members.iter().map(|member| optional(member.rtt_us.map(micros))))
            .column("UDP", members.iter().map(|member| yes_no(member.udp)))
            .column("TCP", members.iter().map(|member| yes_no(member.tcp)))
            .column("MTU", members.iter().map(|member| optional(member.path_mtu)))
            .column("RELAYS", members.iter().map(|member| yes_no(member.relays)));
        let _ = write!(text, "\n{}", table.render());
    }
    for NetcheckFinding { severity, finding, advice } in findings {
        let severity = match severity {
            Some(Severity::Error) => "error",
            Some(Severity::Warning) => "warning",
            None => "note",
        };
        let _ = writeln!(text, "\n{severity}: {}", printable(finding));
        if !advice.is_empty() {
            let _ = writeln!(text, "  {}", printable(advice));
        }
    }
    text
}

fn kind(nat: &NatKind) -> String {
    let hairpins = nat.hairpin == Some(true);
    if hairpins { format!("{}, with hairpinning", nat.kind) } else { nat.kind.clone() }
}

const fn dependence(dependence: Dependence) -> &'static str {
    match dependence {
        Dependence::EndpointIndependent => "endpoint-independent",
        Dependence::AddressDependent => "address-dependent",
        Dependence::AddressAndPortDependent => "address and port-dependent",
    }
}

#[cfg(test)]
mod tests {
    use ovl_control::NetcheckMember;

    use super::*;

    #[test]
    fn findings_and_tables_are_shown_within_80_columns() {
        let member = |number: u8, udp: bool| NetcheckMember {
            name: format!("host{number}"),
            address: format!("192.0.2.{number}:7940").parse().unwrap(),
            rtt_us: Some(9200),
            udp,
            tcp: true,
            path_mtu: Some(1500),
            relays: true,
            seen_at: None,
        };
        let family = |family: &str, asked| Family {
            family: family.to_owned(),
            has_address: true,
            asked,
            udp: asked / 2,
            tcp: asked,
        };
        let found = Netcheck {
            clear: false,
            nat: NatKind {
                kind: "port-restricted".to_owned(),
                translates: Some(true),
                mapping: Some(Dependence::EndpointIndependent),
                filtering: Some(Dependence::AddressAndPortDependent),
                hairpin: Some(false),
            },
            outer: vec!["198.51.100.7:40123".parse().unwrap()],
            families: vec![family("ipv4", 2), family("ipv6", 0)],
            members: vec![member(1, true), member(3, false)],
            findings: vec![
                NetcheckFinding {
                    severity: Some(Severity::Warning),
                    finding: "UDP does not pass to host3".to_owned(),
                    advice: "let it pass".to_owned(),
                },
                NetcheckFinding {
                    severity: None,
                    finding: "all is well\u{1b}".to_owned(),
                    advice: String::new(),
                },
            ],
        };
        let text = render(&found);
        assert_eq!(
            text,
            "\
NAT        port-restricted
Mapping    endpoint-independent
Filtering  address and port-dependent
Hairpin    no
Seen at    198.51.100.7:40123

FAMILY  ADDRESS  UDP     TCP
IPv4    yes      1 of 2  2 of 2
IPv6    yes      -       -

MEMBER  ADDRESS         RTT    UDP  TCP  MTU   RELAYS
host1   192.0.2.1:7940  9.2ms  yes  yes  1500  yes
host3   192.0.2.3:7940  9.2ms  no   yes  1500  yes

warning: UDP does not pass to host3
  let it pass

note: all is well\\u{1b}
"
        );
        assert!(text.lines().all(|line| line.len() <= 80));
    }
}
