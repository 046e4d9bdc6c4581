//! Judges the other hosts: which are down, and which run another release.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_control::PeerState;

use super::Found;
use crate::problems::Code;

/// How long a host that announced a restart may be silent.
const RESTART: Duration = Duration::from_secs(15);

/// A member of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub state: PeerState,
    /// Whether it announced a restart.
    pub restarting: bool,
    /// The time since it was last heard. `None`: never in this run of ovld.
    pub silent: Option<Duration>,
    /// Its release.
    pub version: String,
}

/// Returns the members that are down, and whether too many are.
pub(crate) fn down(members: &[Member]) -> Vec<Found> {
    let mut found: Vec<Found> = members.iter().filter_map(of_member).collect();
    let alive = members.iter().filter(|member| member.state == PeerState::Alive).count();
    let needed = members.len() / 2 + 1;
    if alive < needed {
        let gone: Vec<&str> =
            members.iter().filter(|it| it.state != PeerState::Alive).map(|it| &*it.name).collect();
        found.push(Found::new(
            Code::NoMajority,
            "",
            format!(
                "{alive} of {} members are alive and {needed} are needed: no host can join, and no block of addresses can be \
                 claimed. Missing: {}",
                members.len(),
                gone.join(", ")
            ),
            "bring them back; if they are lost for good: `ovlctl recover --from-majority-loss --dry-run`",
        ));
    }
    found
}

fn of_member(member: &Member) -> Option<Found> {
    let Member { name, state, restarting, silent, .. } = member;
    let ago = silent.map_or_else(String::new, |silent| format!(", for {} s", silent.as_secs()));
    let (cause, fix) = match state {
        PeerState::Alive | PeerState::Left => return None,
        PeerState::Suspect if *restarting && silent.is_some_and(|silent| silent < RESTART) => return None,
        PeerState::Suspect => (
            format!(
                "ovld on host {name} does not answer{ago}, and the kernel of the host does: its endpoints are reached as before, and nothing changes on it"
            ),
            format!("on {name}: `systemctl status ovld` and `journalctl -u ovld`"),
        ),
        PeerState::Dead => (
            format!("host {name} is down or cut off{ago}: its endpoints are not reached"),
            format!(
                "see whether it runs and whether this host reaches it (`ping`); if it is lost for good: `ovlctl peers forget {name}`"
            ),
        ),
    };
    Some(Found::new(Code::HostDown, name, cause, fix))
}

/// Returns the finding that live hosts run different releases.
pub(crate) fn versions(members: &[Member]) -> Option<Found> {
    let mut releases: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for member in members.iter().filter(|member| member.state == PeerState::Alive) {
        releases.entry(&member.version).or_default().push(&member.name);
    }
    if releases.len() < 2 {
        return None;
    }
    let listed: Vec<String> =
        releases.iter().map(|(version, hosts)| format!("{version} on {}", brief(hosts))).collect();
    Some(Found::new(
        Code::VersionsDiffer,
        "",
        format!("hosts run different releases of ovld: {}", listed.join("; ")),
        "finish the upgrade: docs/upgrades.md. What only the later release knows has no effect on the others until then",
    ))
}

/// Lists up to three names, and the number of the others.
fn brief(names: &[&str]) -> String {
    let more = names.len().saturating_sub(3);
    let shown = names.iter().take(3).copied().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, state: PeerState) -> Member {
        Member {
            name: name.to_owned(),
            state,
            restarting: false,
            silent: Some(Duration::from_secs(4)),
            version: "0.1.0".to_owned(),
        }
    }

    #[test]
    fn silent_members_are_down_and_those_that_left_or_restart_are_not() {
        let [a, b, c] =
            [PeerState::Alive, PeerState::Suspect, PeerState::Dead].map(|state| member("h", state));
        let codes =
            |members: &[Member]| down(members).into_iter().map(|found| found.code).collect::<Vec<_>>();
        assert_eq!(codes(&[a.clone(), a.clone(), b.clone()]), [Code::HostDown]);
        assert_eq!(codes(&[a.clone(), b.clone(), c]), [Code::HostDown, Code::HostDown, Code::NoMajority]);
        assert_eq!(codes(&[a.clone(), a.clone(), member("h", PeerState::Left)]), []);
        let restarts = Member { restarting: true, ..b };
        assert_eq!(codes(&[a.clone(), a.clone(), restarts.clone()]), []);
        assert_eq!(codes(&[a.clone(), a, Member { silent: Some(RESTART), ..restarts }]), [Code::HostDown]);
    }

    #[test]
    fn releases_of_live_hosts_are_compared() {
        let (a, b) = (member("h1", PeerState::Alive), member("h2", PeerState::Alive));
        assert_eq!(versions(&[a.clone(), b.clone()]), None);
        let later = Member { version: "0.2.0".to_owned(), ..b };
        assert!(versions(&[a.clone(), later.clone()]).unwrap().cause.ends_with("0.1.0 on h1; 0.2.0 on h2"));
        assert_eq!(versions(&[a, Member { state: PeerState::Dead, ..later }]), None);
        assert_eq!(brief(&["a", "b", "c", "d"]), "a, b, c and 1 more");
    }
}
