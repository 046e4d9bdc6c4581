//! The addresses that workloads of this host were told for domain names which policies admit.
//!
//! [`Admitted`] owns what the kernel's sets should have: decisions alone, its caller applies the changes. The kernel ends
//! elements by itself, also while ovld is down; after a start, what is left there is adopted. Begin to read at
//! [`Admitted::admit`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ovl_zone::NamePattern;

use super::names::{MAX_ADDRESSES, NameKey};

/// The least time to live that counts: that of the names of ovl itself.
const FLOOR: Duration = Duration::from_secs(5);
/// How long an address is admitted after its time to live: clients connect some time after they were told.
const GRACE: Duration = Duration::from_secs(10);
/// The greatest time to live that counts: that of cached answers.
const LONGEST: Duration = Duration::from_secs(86_400);
/// The limit of addresses that one name has in the set of a pattern. The API demands 100.
const MAX_OF_NAME: usize = 1_024;
/// An end that is later by less than this is no news: times to live count down while an answer is in a cache.
const SAME_END: Duration = Duration::from_secs(1);

/// Returns how long an address is admitted, of a time to live in seconds.
fn life(ttl: u32) -> Duration {
    Duration::from_secs(ttl.into()).clamp(FLOOR, LONGEST) + GRACE
}

/// An address in the set of a pattern.
type Place = (NameKey, IpAddr);

/// An address that is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Admission {
    /// The name that it was told for.
    name: String,
    /// When it ends, by the clock of this run.
    ends: Duration,
}

/// A change of the kernel's sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Puts an address into the set of a pattern, for so long, in place of the same address with another end.
    Put {
        /// The pattern.
        key: NameKey,
        /// The address.
        address: IpAddr,
        /// How long it is to be there.
        left: Duration,
        /// The name that it was told for.
        name: String,
    },
    /// Takes an address out of the set of a pattern.
    Delete {
        /// The pattern.
        key: NameKey,
        /// The address.
        address: IpAddr,
    },
}

impl Change {
    /// Returns the pattern.
    pub fn key(&self) -> NameKey {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } => *key,
        }
    }
}

/// The addresses that are admitted on this host. Times are those of the clock of this run.
#[derive(Debug, Default)]
pub struct Admitted {
    all: BTreeMap<Place, Admission>,
    /// The same, by their ends.
    by_end: BTreeSet<(Duration, Place)>,
    /// The same for each name in the set of a pattern, by their ends.
    by_name: BTreeMap<(NameKey, String), BTreeSet<(Duration, IpAddr)>>,
    /// How many addresses left before their time, because there were too many.
    displaced: u64,
    /// When the last of them did.
    displaced_at: Option<Duration>,
}

impl Admitted {
    /// Admits the addresses that a workload is about to be told for a name, each with its time to live in seconds, to the sets of
    /// the patterns that match the name. Returns the changes of the kernel's sets. If there are too many addresses, those that
    /// would end first leave.
    pub fn admit(
        &mut self,
        now: Duration,
        patterns: &[NamePattern],
        name: &str,
        addresses: &[(IpAddr, u32)],
    ) -> Vec<Change> {
        self.expire(now);
        let mut changes = Vec::new();
        for key in patterns.iter().map(NameKey::of) {
            for (address, ttl) in addresses {
                let left = life(*ttl);
                let ends = now.saturating_add(left);
                let there = self.all.get(&(key, *address));
                if there.is_some_and(|there| there.ends.saturating_add(SAME_END) >= ends) {
                    continue;
                }
                self.take(key, *address);
                changes.extend(self.make_room(now, key, name));
                self.put(key, *address, Admission { name: name.to_owned(), ends });
                changes.push(Change::Put { key, address: *address, left, name: name.to_owned() });
            }
        }
        changes
    }

    /// Takes over an address that the kernel's set of a pattern has for so long.
    pub fn adopt(&mut self, now: Duration, key: NameKey, address: IpAddr, left: Duration, name: &str) {
        if self.all.len() < MAX_ADDRESSES {
            self.take(key, address);
            self.put(key, address, Admission { name: name.to_owned(), ends: now.saturating_add(left) });
        }
    }

    /// Returns the changes that put all addresses into the kernel's sets again, after those were written anew.
    pub fn again(&mut self, now: Duration) -> Vec<Change> {
        self.expire(now);
        let put = |(&(key, address), Admission { name, ends }): (&Place, &Admission)| Change::Put {
            key,
            address,
            left: ends.saturating_sub(now),
            name: name.clone(),
        };
        self.all.iter().map(put).collect()
    }

    /// Returns the name that an address was told for, and how long it is still admitted by a pattern. `None` if it is not.
    pub fn find(&self, now: Duration, key: NameKey, address: IpAddr) -> Option<(&str, Duration)> {
        let found = self.all.get(&(key, address)).filter(|found| found.ends > now)?;
        Some((&found.name, found.ends.saturating_sub(now)))
    }

    /// Returns how many addresses are admitted.
    pub fn count(&self, now: Duration) -> usize {
        self.by_end.iter().rev().take_while(|(ends, _)| *ends > now).count()
    }

    /// Returns how many addresses left before their time, because there were too many.
    pub fn displaced(&self) -> u64 {
        self.displaced
    }

    /// Returns when the last address left before its time. `None` if none did.
    pub fn displaced_at(&self) -> Option<Duration> {
        self.displaced_at
    }

    /// Forgets what the kernel has ended by itself.
    fn expire(&mut self, now: Duration) {
        while let Some((ends, (key, address))) = self.by_end.first().copied()
            && ends <= now
        {
            self.take(key, address);
        }
    }

    /// Takes out what would end first, of the name and of all, until there is room for one more.
    fn make_room(&mut self, now: Duration, key: NameKey, name: &str) -> Vec<Change> {
        let mut changes = Vec::new();
        loop {
            let of_name = self.by_name.get(&(key, name.to_owned()));
            let full = of_name.filter(|of_name| of_name.len() >= MAX_OF_NAME);
            let first = match full.and_then(BTreeSet::first) {
                Some((_, address)) => (key, *address),
                None if self.all.len() >= MAX_ADDRESSES => match self.by_end.first() {
                    Some((_, place)) => *place,
                    None => return changes,
                },
                None => return changes,
            };
            let (key, address) = first;
            self.take(key, address);
            self.displaced = self.displaced.saturating_add(1);
            self.displaced_at = Some(now);
            changes.push(Change::Delete { key, address });
        }
    }

    fn put(&mut self, key: NameKey, address: IpAddr, admission: Admission) {
        let Admission { name, ends } = &admission;
        self.by_end.insert((*ends, (key, address)));
        self.by_name.entry((key, name.clone())).or_default().insert((*ends, address));
        self.all.insert((key, address), admission);
    }

    fn take(&mut self, key: NameKey, address: IpAddr) {
        let Some(Admission { name, ends }) = self.all.remove(&(key, address)) else { return };
        self.by_end.remove(&(ends, (key, address)));
        let of_name = (key, name);
        if let Some(all) = self.by_name.get_mut(&of_name) {
            all.remove(&(ends, address));
            if all.is_empty() {
                self.by_name.remove(&of_name);
            }
        }
    }
}

/// What is admitted at one moment.
#[derive(Debug, Clone, Copy)]
pub struct AdmittedAt<'a> {
    /// The addresses.
    pub admitted: &'a Admitted,
    /// The moment, by the clock of this run.
    pub now: Duration,
}

impl<'a> AdmittedAt<'a> {
    /// Returns the name that an address was told for, and how long it is still admitted by a pattern. `None` if it is not.
    pub fn find(&self, key: NameKey, address: IpAddr) -> Option<(&'a str, Duration)> {
        self.admitted.find(self.now, key, address)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const NAME: &str = "www.ovl.test";

    fn pattern(text: &str) -> NamePattern {
        NamePattern::parse(text).unwrap()
    }

    fn ip(n: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + n).into()
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn all_hold_the_same(admitted: &Admitted) {
        assert_eq!(admitted.all.len(), admitted.by_end.len());
        assert_eq!(admitted.all.len(), admitted.by_name.values().map(BTreeSet::len).sum::<usize>());
    }

    #[test]
    fn an_address_lives_for_its_ttl_and_the_grace() {
        let mut admitted = Admitted::default();
        let www = pattern(NAME);
        let changes =
            admitted.admit(seconds(100), std::slice::from_ref(&www), NAME, &[(ip(1), 60), (ip(2), 0)]);
        let key = NameKey::of(&www);
        let put = |n, left| Change::Put { key, address: ip(n), left: seconds(left), name: NAME.to_owned() };
        assert_eq!(changes, [put(1, 70), put(2, 15)]);
        assert_eq!(admitted.find(seconds(114), key, ip(2)), Some((NAME, seconds(1))));
        assert_eq!(admitted.find(seconds(115), key, ip(2)), None);
        assert_eq!(admitted.count(seconds(115)), 1);
        assert_eq!(life(u32::MAX), seconds(86_410));
        all_hold_the_same(&admitted);
    }

    #[test]
    fn an_answer_of_a_cache_is_no_news_and_a_later_end_is() {
        let mut admitted = Admitted::default();
        let www = [pattern(NAME)];
        admitted.admit(seconds(0), &www, NAME, &[(ip(1), 60)]);
        assert!(admitted.admit(seconds(20), &www, NAME, &[(ip(1), 40)]).is_empty());
        assert!(admitted.admit(seconds(20), &www, NAME, &[(ip(1), 10)]).is_empty(), "it is never shortened");
        assert_eq!(admitted.admit(seconds(20), &www, NAME, &[(ip(1), 60)]).len(), 1);
        assert_eq!(admitted.count(seconds(89)), 1);
        all_hold_the_same(&admitted);
    }

    #[test]
    fn what_ends_first_leaves_when_a_name_has_too_many() {
        let mut admitted = Admitted::default();
        let www = [pattern("*.ovl.test")];
        let key = NameKey::of(&www[0]);
        let many: Vec<(IpAddr, u32)> = (0..MAX_OF_NAME as u32).map(|n| (ip(n), 60 + n)).collect();
        admitted.admit(seconds(0), &www, NAME, &many);
        let changes = admitted.admit(seconds(0), &www, NAME, &[(ip(5000), 60)]);
        assert_eq!(changes[0], Change::Delete { key, address: ip(0) });
        assert_eq!((changes.len(), admitted.displaced(), admitted.all.len()), (2, 1, MAX_OF_NAME));
        // Another name has room of its own.
        assert_eq!(admitted.admit(seconds(0), &www, "b.ovl.test", &[(ip(5001), 5)]).len(), 1);
        all_hold_the_same(&admitted);
    }

    #[test]
    fn what_ends_first_leaves_when_a_host_has_too_many() {
        let mut admitted = Admitted::default();
        let www = [pattern("*.ovl.test")];
        for n in 0..MAX_ADDRESSES as u32 + 10 {
            admitted.admit(seconds(0), &www, &format!("n{}.ovl.test", n / 100), &[(ip(n), 60 + n)]);
        }
        assert_eq!((admitted.all.len(), admitted.displaced()), (MAX_ADDRESSES, 10));
        assert_eq!(admitted.find(seconds(0), NameKey::of(&www[0]), ip(9)), None);
        all_hold_the_same(&admitted);
    }

    #[test]
    fn what_the_kernel_had_is_adopted_and_put_again() {
        let mut admitted = Admitted::default();
        let key = NameKey::of(&pattern(NAME));
        admitted.adopt(seconds(7), key, ip(1), seconds(30), NAME);
        admitted.adopt(seconds(7), key, ip(2), seconds(3), NAME);
        let again = admitted.again(seconds(10));
        let put = Change::Put { key, address: ip(1), left: seconds(27), name: NAME.to_owned() };
        assert_eq!(again, [put]);
        all_hold_the_same(&admitted);
    }

    #[test]
    fn the_name_of_a_set_leads_back_to_its_pattern() {
        let key = NameKey::of(&pattern("*.Ovl.Test."));
        assert_eq!(key, NameKey::of(&pattern("*.ovl.test")));
        assert_eq!(NameKey::of_set(&key.set(true)), Some(key));
        assert_eq!(NameKey::of_set(&key.set(false)), Some(key));
        for other in ["name.12.4", "pods.0123456789ab.4", "name.0123456789zz.4", "name.0123456789abcd.4"] {
            assert_eq!(NameKey::of_set(other), None, "{other}");
        }
    }
}
