//! Whom to ask about which names, and who of them failed lately.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::name::Name;

/// A server that failed is asked last for this long, twice as long each time.
const DOWN_FIRST: Duration = Duration::from_secs(1);
const DOWN_LAST: Duration = Duration::from_secs(30);

/// A domain with servers of its own: nobody else is asked about it and the names under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    /// The domain.
    pub domain: Name,
    /// In the order in which they are asked.
    pub servers: Vec<SocketAddr>,
}

/// A resolver that did not answer, or not in time, more than once in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// Which one.
    pub server: SocketAddr,
    /// The stub domain that it is of.
    pub stub: Option<Name>,
    /// When it was the last time.
    pub at: Instant,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    failures: u32,
    failed_at: Option<Instant>,
}

impl From<SocketAddr> for Server {
    fn from(address: SocketAddr) -> Self {
        Self { address, failures: 0, failed_at: None }
    }
}

impl Server {
    fn is_down(&self, now: Instant) -> bool {
        let pause = DOWN_FIRST.saturating_mul(1 << self.failures.saturating_sub(1).min(5)).min(DOWN_LAST);
        self.failed_at.is_some_and(|at| now.saturating_duration_since(at) < pause)
    }
}

#[derive(Debug)]
struct Group {
    domain: Name,
    servers: Vec<Server>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Servers {
    /// The longest domain first; the root's is the last.
    groups: Vec<Group>,
}

impl Servers {
    /// Those of stub domains; for all other names there are none yet.
    pub(crate) fn new(stubs: Vec<Stub>) -> Self {
        let group = |stub: Stub| Group {
            domain: stub.domain,
            servers: stub.servers.into_iter().map(Server::from).collect(),
        };
        let mut groups: Vec<Group> = stubs.into_iter().map(group).collect();
        groups.push(Group { domain: Name::ROOT, servers: Vec::new() });
        groups.sort_by_key(|group| std::cmp::Reverse(group.domain.as_bytes().len()));
        Self { groups }
    }

    /// From now on these are asked about what is under no stub domain. Says whether they are others than before.
    pub(crate) fn set_others(&mut self, servers: &[SocketAddr]) -> bool {
        let Some(others) = self.groups.last_mut() else { return false };
        let known = others.servers.iter().map(|server| server.address);
        let changed = !known.eq(servers.iter().copied());
        if changed {
            others.servers = servers.iter().copied().map(Server::from).collect();
        }
        changed
    }

    /// The stub domain that a name is under.
    pub(crate) fn stub_of(&self, name: &Name) -> Option<Name> {
        self.groups.get(self.group(name)?).map(|group| group.domain).filter(|domain| *domain != Name::ROOT)
    }

    /// Whom to ask about a name: as they were given, but those that failed lately come last.
    pub(crate) fn in_order(&self, name: &Name) -> Vec<SocketAddr> {
        let now = Instant::now();
        let group = self.group(name).and_then(|at| self.groups.get(at));
        let (down, up): (Vec<&Server>, Vec<&Server>) =
            group.into_iter().flat_map(|group| &group.servers).partition(|server| server.is_down(now));
        up.into_iter().chain(down).map(|server| server.address).collect()
    }

    /// Takes note of how a server did that was asked about a name. Says whether [`Servers::failing`] may be another then.
    pub(crate) fn note(&mut self, name: &Name, address: SocketAddr, answered: bool) -> bool {
        let group = self.group(name).and_then(|at| self.groups.get_mut(at));
        let servers = group.into_iter().flat_map(|group| &mut group.servers);
        let (now, mut changed) = (Instant::now(), false);
        for server in servers.filter(|server| server.address == address) {
            if answered {
                changed |= server.failed_at.is_some();
                *server = Server::from(address);
            } else if !server.is_down(now) {
                // Of several questions that were put to it at once the first counts.
                server.failures = server.failures.saturating_add(1);
                server.failed_at = Some(now);
                changed = true;
            }
        }
        changed
    }

    /// Those that failed when they were asked last, and the time before.
    pub(crate) fn failing(&self) -> Vec<Failing> {
        let of_group = |group: &Group| {
            let stub = (group.domain != Name::ROOT).then_some(group.domain);
            let failing =
                |server: &Server| Some(Failing { server: server.address, stub, at: server.failed_at? });
            group.servers.iter().filter(|server| server.failures > 1).filter_map(failing).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(of_group).collect()
    }

    fn group(&self, name: &Name) -> Option<usize> {
        self.groups.iter().position(|group| name.before(&group.domain).is_some())
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
        let stub = |domain, servers: &[u8]| Stub {
            domain: name(domain),
            servers: servers.iter().map(|last| at(*last)).collect(),
        };
        let mut servers = Servers::new(vec![stub("example", &[1, 2]), stub("lab.corp.example", &[3])]);
        assert!(servers.set_others(&[at(9)]) && !servers.set_others(&[at(9)]));
        servers
    }

    #[test]
    fn the_longest_stub_domain_decides_by_whole_labels() {
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
    fn who_failed_is_asked_last_until_it_answers() {
        let mut servers = servers();
        let asked = name("www.example");
        assert!(!servers.note(&asked, at(1), true) && servers.failing().is_empty());
        // Several questions that it fails at once are one failure.
        for _ in 0..5 {
            servers.note(&asked, at(1), false);
        }
        assert_eq!(servers.in_order(&asked), [at(2), at(1)]);
        assert!(servers.failing().is_empty());
        let server =
            &mut servers.groups.iter_mut().find(|group| group.domain == name("example")).unwrap().servers[0];
        assert_eq!(server.failures, 1);
        server.failed_at = server.failed_at.and_then(|at| at.checked_sub(DOWN_FIRST));
        assert_eq!(servers.in_order(&asked), [at(1), at(2)]);
        assert!(servers.note(&asked, at(1), false));
        let failing = servers.failing();
        assert_eq!(failing.len(), 1);
        assert_eq!((failing[0].server, failing[0].stub), (at(1), Some(name("example"))));
        assert!(servers.note(&asked, at(1), true) && servers.failing().is_empty());
        assert_eq!(servers.in_order(&asked), [at(1), at(2)]);
    }
}
