//! Judges names: how long resolvers take, and how many questions workloads ask.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::Found;
use crate::problems::Code;

/// The time from which on an upstream resolver is slow. Clients try again after five seconds, and a page asks for many names.
const SLOW: Duration = Duration::from_millis(500);

/// How a resolver answered a question of this check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answered {
    /// The resolver.
    pub server: SocketAddr,
    /// How long its best answer took. `None`: there was none.
    pub took: Option<Duration>,
}

/// Returns the upstream resolvers that do not answer or are slow.
pub(crate) fn upstreams(answered: &[Answered]) -> Vec<Found> {
    let bad = answered.iter().filter_map(|Answered { server, took }| match took {
        None => Some(Found::new(
            Code::UpstreamResolver,
            server.to_string(),
            format!("the resolver {server}, to which this host sends questions for names outside of the cluster, does not answer"),
            "start it, or correct the host's resolv.conf; `dig @SERVER .` asks it by hand",
        )),
        Some(took) if *took >= SLOW => Some(Found::new(
            Code::ResolverSlow,
            server.to_string(),
            format!("the resolver {server} took {} ms for an answer: names outside of the cluster resolve slowly", took.as_millis()),
            "see what slows it or the path to it, or name a nearer one in the host's resolv.conf",
        )),
        Some(_) => None,
    });
    bad.collect()
}

/// Returns the finding about ovl's own resolver. `took` is how long it took for an answer; `None`: there was none.
pub(crate) fn own(took: Option<Duration>) -> Option<Found> {
    match took {
        None => Some(Found::new(
            Code::ResolverDown,
            "",
            "the resolver of this host does not answer: names do not resolve in workloads",
            "`journalctl -u ovld` says why; restart ovld",
        )),
        Some(took) if took >= SLOW => Some(Found::new(
            Code::ResolverSlow,
            "ovld",
            format!(
                "the resolver of this host took {} ms for an answer that it knows: the host is overloaded",
                took.as_millis()
            ),
            "see what uses the processors: `top`",
        )),
        Some(_) => None,
    }
}

/// What a workload's resolv.conf(5) says of questions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ClientSettings {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    ndots: u32,
}

impl ClientSettings {
    /// Reads a resolv.conf(5) as the C library does: the last `search` or `domain` counts.
    pub(crate) fn parse(text: &str) -> Self {
        let mut settings = Self { ndots: 1, ..Self::default() };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    settings.servers.extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()))
                }
                Some("search" | "domain") => settings.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let mut ndots = words.filter_map(|word| word.strip_prefix("ndots:")?.parse().ok());
                    settings.ndots = ndots.next_back().unwrap_or(settings.ndots);
                }
                _ => {}
            }
        }
        settings
    }
}

/// Returns the finding that a workload asks several questions for each name outside of the cluster. `own` are the addresses
/// at which ovl's resolver answers, which answers the first of these questions as the last one (`walks`).
pub(crate) fn search_lists(
    workload: &str,
    settings: &ClientSettings,
    own: &[IpAddr],
    walks: bool,
) -> Option<Found> {
    let ClientSettings { servers, search, ndots } = settings;
    let asks_ovl = servers.first().is_some_and(|server| own.contains(server));
    if *ndots < 2 || search.is_empty() || (asks_ovl && walks) {
        return None;
    }
    let count = search.len();
    Some(Found::new(
        Code::SearchLists,
        workload,
        format!(
            "{workload} asks up to {count} more questions for each name outside of the cluster: its resolv.conf has ndots:{ndots} and \
             a search list of {count}, so `example.com` is first looked up below each of them"
        ),
        if asks_ovl {
            "set `walk_search_lists = true` in ovld.toml, write such names with a dot at the end, or set ndots:1".to_owned()
        } else {
            "let the workload use ovl's resolver (127.0.0.11), write such names with a dot at the end, or set ndots:1".to_owned()
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_and_slow_resolvers_are_named() {
        let server: SocketAddr = "192.0.2.53:53".parse().unwrap();
        let codes = |took| {
            upstreams(&[Answered { server, took }]).into_iter().map(|found| found.code).collect::<Vec<_>>()
        };
        assert_eq!(codes(None), [Code::UpstreamResolver]);
        assert_eq!(codes(Some(SLOW)), [Code::ResolverSlow]);
        assert_eq!(codes(Some(Duration::from_millis(40))), []);
        assert!(own(Some(Duration::ZERO)).is_none() && own(None).is_some() && own(Some(SLOW)).is_some());
    }

    #[test]
    fn search_list_is_wasteful_unless_ovls_resolver_walks_it() {
        let text = "nameserver 10.0.0.1\nsearch a b\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 edns0\n";
        let settings = ClientSettings::parse(text);
        assert_eq!((settings.search.len(), settings.ndots), (3, 5));
        let own = ["127.0.0.11".parse().unwrap()];
        assert!(search_lists("web", &settings, &own, true).unwrap().cause.contains("up to 3 more"));
        let ovl = ClientSettings::parse(&text.replace("10.0.0.1", "127.0.0.11"));
        assert_eq!(search_lists("web", &ovl, &own, true), None);
        assert!(search_lists("web", &ovl, &own, false).unwrap().fix.contains("walk_search_lists"));
        for harmless in
            ["nameserver 10.0.0.1\n", "nameserver 10.0.0.1\nsearch a b\n", "options ndots:5\n", ""]
        {
            assert_eq!(search_lists("web", &ClientSettings::parse(harmless), &own, true), None, "{harmless}");
        }
    }
}
