//! The upstream servers by domain, and which of them failed recently.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ovl_zone::Name;

/// How long a server that failed is tried last: at first, and at most. The time doubles with each failure.
const DOWN_FIRST: Duration = Duration::from_secs(1);
const DOWN_LAST: Duration = Duration::from_secs(30);

/// A domain with servers of its own. No other server is asked for names under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StubDomain {
    /// The domain.
    pub domain: Name,
    /// The servers, in the order in which they are tried.
    pub servers: Vec<SocketAddr>,
}

/// An upstream server whose last two or more queries failed, or one if it is the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailingServer {
    /// The server.
    pub server: SocketAddr,
    /// The stub domain of the server. `None` if it comes from resolv.conf.
    pub stub: Option<Name>,
    /// It is queried because resolv.conf names no server.
    pub is_default: bool,
    /// The time of the last failure.
    pub at: Instant,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    failures: u32,
    failed_at: Option<Instant>,
    has_answered: bool,
}

impl From<SocketAddr> for Server {
    fn from(address: SocketAddr) -> Self {
        Self { address, failures: 0, failed_at: None, has_answered: false }
    }
}

impl Server {
    fn is_down(&self, now: Instant) -> bool {
        let pause = DOWN_FIRST.saturating_mul(1 << self.failures.saturating_sub(1).min(5)).min(DOWN_LAST);
        self.failed_at.is_some_and(|at| now.saturating_duration_since(at) < pause)
    }
}

/// The servers of a domain.
#[derive(Debug)]
struct Group {
    domain: Name,
    servers: Vec<Server>,
}

/// All upstream servers.
#[derive(Debug)]
pub(crate) struct Servers {
    /// The longest domain first, the root domain last.
    groups: Vec<Group>,
    /// The server of the root domain is there because resolv.conf names none.
    is_default: bool,
}

impl Servers {
    /// Creates the servers of stub domains. There are none for other names yet.
    pub(crate) fn new(stubs: Vec<StubDomain>) -> Self {
        let group = |stub: StubDomain| Group {
            domain: stub.domain,
            servers: stub.servers.into_iter().map(Server::from).collect(),
        };
        let mut groups: Vec<Group> = stubs.into_iter().map(group).collect();
        groups.push(Group { domain: Name::ROOT, servers: Vec::new() });
        groups.sort_by_key(|group| std::cmp::Reverse(group.domain.as_bytes().len()));
        Self { groups, is_default: false }
    }

    /// Sets the servers for names under no stub domain. `is_default` says that they are not configured. Returns whether
    /// anything changed.
    pub(crate) fn set_others(&mut self, servers: &[SocketAddr], is_default: bool) -> bool {
        let Some(others) = self.groups.last_mut() else { return false };
        let known = others.servers.iter().map(|server| server.address);
        let changed = !known.eq(servers.iter().copied()) || self.is_default != is_default;
        self.is_default = is_default;
        if changed {
            others.servers = servers.iter().copied().map(Server::from).collect();
        }
        changed
    }

    /// Returns the server that is there because resolv.conf names none, unless it answered its last query.
    pub(crate) fn unproved_default(&self) -> Option<SocketAddr> {
        let default = self.groups.last().filter(|_| self.is_default)?.servers.first()?;
        (!default.has_answered).then_some(default.address)
    }

    /// Returns the stub domain of a name. `None` if the name is under none.
    pub(crate) fn stub_of(&self, name: &Name) -> Option<Name> {
        self.groups.get(self.group(name)?).map(|group| group.domain).filter(|domain| *domain != Name::ROOT)
    }

    /// Returns the servers for a name in the configured order, but those that failed recently last.
    pub(crate) fn in_order(&self, name: &Name) -> Vec<SocketAddr> {
        let now = Instant::now();
        let group = self.group(name).and_then(|at| self.groups.get(at));
        let (down, up): (Vec<&Server>, Vec<&Server>) =
            group.into_iter().flat_map(|group| &group.servers).partition(|server| server.is_down(now));
        up.into_iter().chain(down).map(|server| server.address).collect()
    }

    /// Records whether a server answered a query for a name. Returns whether [`Servers::failing`] may have
    /// changed.
    pub(crate) fn record_outcome(&mut self, name: &Name, address: SocketAddr, answered: bool) -> bool {
        let group = self.group(name).and_then(|at| self.groups.get_mut(at));
        let servers = group.into_iter().flat_map(|group| &mut group.servers);
        let (now, mut changed) = (Instant::now(), false);
        for server in servers.filter(|server| server.address == address) {
            if answered {
                changed |= server.failed_at.is_some();
                *server = Server { has_answered: true, ..Server::from(address) };
            } else if !server.is_down(now) {
                // Queries that were in flight at the same time count as one failure.
                server.failures = server.failures.saturating_add(1);
                server.failed_at = Some(now);
                server.has_answered = false;
                changed = true;
            }
        }
        changed
    }

    /// Returns the servers whose last two or more queries failed. For the default one, one query is enough.
    pub(crate) fn failing(&self) -> Vec<FailingServer> {
        let of_group = |group: &Group| {
            let stub = (group.domain != Name::ROOT).then_some(group.domain);
            let is_default = self.is_default && stub.is_none();
            let enough = if is_default { 1 } else { 2 };
            let failing = |server: &Server| {
                Some(FailingServer { server: server.address, stub, is_default, at: server.failed_at? })
            };
            let all = group.servers.iter().filter(|server| server.failures >= enough);
            all.filter_map(failing).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(of_group).collect()
    }

    fn group(&self, name: &Name) -> Option<usize> {
        self.groups.iter().position(|group| name.strip_suffix(&group.domain).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 53))
    }

    fn servers() -> Servers {
        let stub = |domain, servers: &[u8]| StubDomain {
            domain: name(domain),
            servers: servers.iter().map(|last| at(*last)).collect(),
        };
        let mut servers = Servers::new(vec![stub("example", &[1, 2]), stub("lab.corp.example", &[3])]);
        assert!(servers.set_others(&[at(9)], false) && !servers.set_others(&[at(9)], false));
        servers
    }

    #[test]
    fn the_longest_stub_domain_wins() {
        let servers = servers();
        for (asked, expected) in [
            ("example", &[at(1), at(2)][..]),
            ("www.corp.example", &[at(1), at(2)]),
            ("lab.corp.example", &[at(3)]),
            ("a.b.lab.corp.example", &[at(3)]),
            ("collab.corp.example", &[at(1), at(2)]),
            ("counterexample", &[at(9)]),
            ("example.org", &[at(9)]),
        ] {
            assert_eq!(servers.in_order(&name(asked)), expected, "{asked}");
        }
        assert_eq!(servers.in_order(&Name::ROOT), [at(9)]);
        assert_eq!(servers.stub_of(&name("www.corp.example")), Some(name("example")));
        assert_eq!(servers.stub_of(&name("example.org")), None);
    }

    #[test]
    fn a_failed_server_is_tried_last_until_it_answers() {
        let mut servers = servers();
        let asked = name("www.example");
        assert!(!servers.record_outcome(&asked, at(1), true) && servers.failing().is_empty());
        // Several failures at the same time count as one.
        for _ in 0..5 {
            servers.record_outcome(&asked, at(1), false);
        }
        assert_eq!(servers.in_order(&asked), [at(2), at(1)]);
        assert!(servers.failing().is_empty());
        let server =
            &mut servers.groups.iter_mut().find(|group| group.domain == name("example")).unwrap().servers[0];
        assert_eq!(server.failures, 1);
        server.failed_at = server.failed_at.and_then(|at| at.checked_sub(DOWN_FIRST));
        assert_eq!(servers.in_order(&asked), [at(1), at(2)]);
        assert!(servers.record_outcome(&asked, at(1), false));
        let failing = servers.failing();
        assert_eq!(failing.len(), 1);
        assert_eq!((failing[0].server, failing[0].stub), (at(1), Some(name("example"))));
        assert!(servers.record_outcome(&asked, at(1), true) && servers.failing().is_empty());
        assert_eq!(servers.in_order(&asked), [at(1), at(2)]);
    }

    #[test]
    fn one_failure_of_the_default_server_is_reported() {
        let mut servers = servers();
        assert!(servers.set_others(&[at(9)], true));
        assert!(servers.record_outcome(&Name::ROOT, at(9), false));
        let failing = servers.failing();
        assert!(failing.len() == 1 && failing[0].is_default && failing[0].stub.is_none(), "{failing:?}");
        assert_eq!(servers.unproved_default(), Some(at(9)));
        servers.record_outcome(&Name::ROOT, at(9), true);
        assert_eq!(servers.unproved_default(), None);
        assert!(servers.set_others(&[at(9)], false) && servers.unproved_default().is_none());
        servers.record_outcome(&Name::ROOT, at(9), false);
        assert!(servers.failing().is_empty());
    }
}
