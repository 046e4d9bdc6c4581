//! Stub domains: domains that are forwarded to resolvers of their own.

use anyhow::{Context as _, Result, bail};
use ovl_dns::{Name, StubDomain};

use super::{Config, OWN_DOMAIN, parse_address};

/// Default port of a DNS server (RFC 1035, section 4.2).
const PORT: u16 = 53;
/// Maximum number of servers of one domain, the same as for a `resolv.conf`.
const MAX_SERVERS: usize = 8;

pub(super) fn parse((domain, servers): (&String, &Vec<String>)) -> Result<StubDomain> {
    let setting = format!("stub_domains: {domain}");
    let name = Name::parse(domain).filter(|_| domain.is_ascii() && !domain.contains(char::is_whitespace));
    Ok(StubDomain {
        domain: name.with_context(|| format!("{setting} is no DNS name"))?,
        servers: servers.iter().map(|text| parse_address(&setting, text, PORT)).collect::<Result<_>>()?,
    })
}

/// Checks that all stub domains can be forwarded.
///
/// # Errors
///
/// A domain is served by ovld itself or is given twice, or it has no server that can be queried.
pub(super) fn check(config: &Config) -> Result<()> {
    let ours = [config.cluster_domain.as_str(), OWN_DOMAIN].map(Name::parse);
    for (n, StubDomain { domain, servers }) in config.stub_domains.iter().enumerate() {
        if let Some(own) = ours.iter().flatten().find(|own| domain.strip_suffix(own).is_some()) {
            bail!("stub_domains: {domain}: nobody else is ever asked for names under {own}");
        }
        if config.stub_domains.iter().take(n).any(|other| other.domain == *domain) {
            bail!("stub_domains: {domain} is there twice");
        }
        if servers.is_empty() || servers.len() > MAX_SERVERS {
            bail!("stub_domains: {domain}: 1 to {MAX_SERVERS} addresses are needed");
        }
        for server in servers {
            if server.ip().is_unspecified() || server.ip().is_multicast() || server.port() == 0 {
                bail!("stub_domains: {domain}: {server} is not where one host listens");
            }
            if config.dns_listen.contains(server) {
                bail!("stub_domains: {domain}: {server} is ovld's own: see dns_listen");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::load;

    #[test]
    fn stub_domains_have_addresses_and_are_nobody_elses() {
        let stubs = |table: &str| {
            let file = format!("insecure = true\nadvertise = '10.0.0.1'\n{table}");
            load(&[], &file).map(|config| config.stub_domains)
        };
        let found =
            stubs("[stub_domains]\n'Corp.Example.' = ['10.0.0.53', '10.0.0.54:5353', 'fd00::53']").unwrap();
        let servers = ["10.0.0.53:53", "10.0.0.54:5353", "[fd00::53]:53"].map(|at| at.parse().unwrap());
        assert_eq!(
            found,
            [StubDomain { domain: Name::parse("corp.example").unwrap(), servers: servers.into() }]
        );
        for (table, expected) in [
            ("'corp.example' = []", "1 to 8 addresses"),
            ("'corp.example' = ['ns.corp.example']", "host names are not taken here"),
            ("'corp.example' = ['0.0.0.0']", "0.0.0.0:53 is not where one host listens"),
            ("'corp..example' = ['10.0.0.53']", "corp..example is no DNS name"),
            ("'corp.example' = ['10.0.0.53']\n'CORP.example' = ['10.0.0.54']", "corp.example is there twice"),
            ("'x.cluster.local' = ['10.0.0.53']", "nobody else is ever asked for names under cluster.local"),
            ("'ovl.internal' = ['10.0.0.53']", "nobody else is ever asked for names under ovl.internal"),
        ] {
            let error = stubs(&format!("[stub_domains]\n{table}")).unwrap_err().to_string();
            assert!(error.contains(expected), "{table}: {error}");
        }
        let own = "dns_listen = ['127.0.0.1:5300']\n[stub_domains]\n'corp.example' = ['127.0.0.1:5300']";
        assert!(stubs(own).unwrap_err().to_string().contains("is ovld's own"));
    }
}
