//! What is answered here: names by network, and who may see which networks. Snapshots share what did not
//! change between them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::answer::Asker;
use crate::name::Name;

/// Names a network to the engine.
pub type NetworkKey = u64;

/// So many parts a network's names are in: a change copies one of them.
const SHARDS: usize = 64;

/// What there is of a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// IPv4 addresses.
    pub v4: Vec<Ipv4Addr>,
    /// IPv6 addresses.
    pub v6: Vec<Ipv6Addr>,
    /// Of a reverse name: the names on the network, which the network's own label follows in an answer.
    pub names: Vec<Name>,
    /// Where a service is: port and name.
    pub services: Vec<(u16, Name)>,
    /// Another name, under which all of it is found.
    pub alias: Option<Name>,
    /// Text.
    pub text: Option<&'static str>,
    /// There are names beneath it, so it is there even with nothing (RFC 8020).
    pub above: bool,
    /// There is no such name, nor anybody else's with it.
    pub unready: bool,
}

impl Records {
    /// Whether the name has nothing and need not be there.
    pub fn is_empty(&self) -> bool {
        let Self { v4, v6, names, services, alias, text, above, unready } = self;
        let bare = v4.is_empty() && v6.is_empty() && names.is_empty() && services.is_empty();
        bare && alias.is_none() && text.is_none() && !above && !unready
    }
}

/// Quick for the short keys of names. Who chooses names that collide slows down the resolver of its own cluster.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Quick(u64);

impl Hasher for Quick {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        const ODD: u64 = 0x517c_c1b7_2722_0a95;
        let mut chunks = bytes.chunks_exact(8);
        let mut mix = |word: u64| self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(ODD);
        for chunk in &mut chunks {
            mix(chunk.try_into().map_or(0, u64::from_le_bytes));
        }
        let rest = chunks.remainder();
        let last = rest.iter().fold(rest.len() as u64, |word, byte| word << 8 | u64::from(*byte));
        mix(last);
    }

    #[inline]
    fn finish(&self) -> u64 {
        // The table takes the upper and the lower bits.
        self.0 ^ self.0 >> 32
    }
}

type Shard = HashMap<Arc<[u8]>, Arc<Records>, BuildHasherDefault<Quick>>;

/// Names with their records.
#[derive(Clone)]
struct Names(Arc<[Arc<Shard>]>);

impl Default for Names {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| Arc::default()).collect())
    }
}

impl Names {
    #[inline]
    fn shard(name: &[u8]) -> usize {
        let mut hasher = Quick::default();
        hasher.write(name);
        // Other bits than the shard itself looks at.
        (hasher.finish() >> 20) as usize % SHARDS
    }

    #[inline]
    fn get(&self, name: &Name) -> Option<&Arc<Records>> {
        self.0.get(Self::shard(name.as_bytes()))?.get(name.as_bytes())
    }

    fn set(&mut self, name: &Name, records: Records) {
        let key = name.as_bytes();
        let known = self.get(name).is_some_and(|known| **known == records);
        if known || (records.is_empty() && self.get(name).is_none()) {
            return;
        }
        let Some(shard) = Arc::make_mut(&mut self.0).get_mut(Self::shard(key)) else { return };
        let shard = Arc::make_mut(shard);
        if records.is_empty() {
            shard.remove(key);
        } else {
            shard.insert(key.into(), Arc::new(records));
        }
    }

    fn iter(&self) -> impl Iterator<Item = (Name, &Arc<Records>)> {
        let all = self.0.iter().flat_map(|shard| shard.iter());
        all.filter_map(|(key, records)| Some((Name::from_bytes(key)?, records)))
    }
}

/// One network.
#[derive(Clone)]
pub(crate) struct Network {
    /// What follows its names where they are told apart from another network's: `blue` in `web.blue`.
    label: Name,
    /// Of addresses in these there is no other name than ours.
    subnets: Vec<IpNet>,
    names: Names,
}

/// Who asks from an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The networks that it is on, in the order in which they are looked through.
    pub networks: Arc<[NetworkKey]>,
    /// What comes first in its search list, under the cluster's domain, such as `default.svc`.
    pub search: Option<Name>,
}

/// Names that all see, whichever network they are on.
#[derive(Clone)]
struct Cluster {
    domain: Name,
    /// Full names, and reverse ones.
    names: Names,
    /// Whether a search list is walked here, in place of the client.
    walks: bool,
}

impl Cluster {
    /// Whether there is a name above `asked`, both under `search` in the cluster's domain.
    fn has_above(&self, asked: &Name, search: &Name) -> bool {
        let above = |at: usize| {
            let rest = Name::from_bytes(asked.as_bytes().get(at..)?)?;
            self.names.get(&rest.with(search)?.with(&self.domain)?)
        };
        let mut at = 0;
        asked.labels().any(|label| {
            at += 1 + label.len();
            at < asked.as_bytes().len() && above(at).is_some()
        })
    }
}

/// A snapshot; cheap to clone.
#[derive(Clone, Default)]
pub struct Zone {
    networks: BTreeMap<NetworkKey, Arc<Network>>,
    askers: Arc<HashMap<IpAddr, Standing>>,
    domain: Option<Name>,
    cluster: Option<Cluster>,
}

/// Stands for the cluster's names among the networks.
const CLUSTER: NetworkKey = NetworkKey::MAX;

/// Of a name that has others beneath it, and nothing itself.
static ABOVE: Records = Records {
    v4: Vec::new(),
    v6: Vec::new(),
    names: Vec::new(),
    services: Vec::new(),
    alias: None,
    text: None,
    above: true,
    unready: false,
};

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let networks = self.networks.len();
        f.debug_struct("Zone").field("networks", &networks).field("askers", &self.askers.len()).finish()
    }
}

/// Where a name belongs.
#[derive(Debug, Clone)]
pub enum Place<'a> {
    /// On this network, with these records.
    Here(NetworkKey, &'a Records),
    /// Where only we would know it, and do not.
    Nowhere,
    /// Somebody else may know it.
    Elsewhere,
    /// It is the first step of a walk through a search list, which ends at this name.
    Walked(Box<Name>),
}

impl Zone {
    /// Nothing, under this domain: full names are `NAME.NETWORK.DOMAIN`.
    pub fn new(domain: Option<Name>) -> Self {
        Self { domain, ..Self::default() }
    }

    /// Adds a network, or changes how it is called.
    pub fn set_network(&mut self, key: NetworkKey, label: Name, subnets: Vec<IpNet>) {
        let names = self.networks.get(&key).map(|known| known.names.clone()).unwrap_or_default();
        self.networks.insert(key, Arc::new(Network { label, subnets, names }));
    }

    /// How many networks there are.
    pub fn networks(&self) -> usize {
        self.networks.len()
    }

    /// Takes away all but these networks.
    pub fn retain_networks(&mut self, keep: impl Fn(NetworkKey) -> bool) {
        self.networks.retain(|key, _| keep(*key));
    }

    /// Sets what there is of a name on a network; nothing takes it away.
    pub fn set(&mut self, network: NetworkKey, name: &Name, records: Records) {
        if let Some(network) = self.networks.get_mut(&network) {
            Arc::make_mut(network).names.set(name, records);
        }
    }

    /// All names of a network.
    pub fn names(&self, network: NetworkKey) -> Vec<Name> {
        let found = self.networks.get(&network);
        found.into_iter().flat_map(|network| network.names.iter().map(|(name, _)| name)).collect()
    }

    /// Sets who asks from which address: what networks it is on, in the order in which they are looked
    /// through.
    pub fn set_askers(&mut self, askers: HashMap<IpAddr, Standing>) {
        self.askers = Arc::new(askers);
    }

    /// Whether anybody asks from this address.
    pub fn has_asker(&self, address: IpAddr) -> bool {
        self.askers.contains_key(&address)
    }

    /// Answers for the cluster's domain, with nothing in it yet. `walks`: a client whose search list begins there
    /// gets its final answer at the first step.
    pub fn begin_cluster(&mut self, domain: Name, walks: bool) {
        self.cluster = Some(Cluster { domain, names: Names::default(), walks });
    }

    /// Sets what there is of a full name, or of a reverse one; nothing takes it away.
    pub fn set_cluster(&mut self, name: &Name, records: Records) {
        if let Some(cluster) = &mut self.cluster {
            cluster.names.set(name, records);
        }
    }

    /// Whether a query from this address is answered at all.
    #[inline]
    pub(crate) fn knows(&self, asker: Asker) -> bool {
        match asker {
            Asker::Host => true,
            Asker::At(address) => self.has_asker(address),
        }
    }

    /// Where a name belongs, for this asker.
    #[inline]
    pub fn find(&self, asker: Asker, name: &Name) -> Place<'_> {
        let (all, some);
        let networks: &mut dyn Iterator<Item = (&NetworkKey, &Network)> = match asker {
            Asker::Host => {
                all = self.networks.iter().map(|(key, network)| (key, &**network));
                &mut { all }
            }
            Asker::At(address) => {
                let Some(standing) = self.askers.get(&address) else { return Place::Nowhere };
                let on = &standing.networks;
                for key in on.iter() {
                    if let Some(records) = self.networks.get(key).and_then(|network| network.names.get(name))
                    {
                        return Place::Here(*key, records);
                    }
                }
                some = on.iter().filter_map(|key| Some((key, &**self.networks.get(key)?)));
                &mut { some }
            }
        };
        self.find_in(asker, networks, name)
    }

    fn find_in<'a>(
        &'a self,
        asker: Asker,
        networks: &mut dyn Iterator<Item = (&'a NetworkKey, &'a Network)>,
        name: &Name,
    ) -> Place<'a> {
        if let Some(found) = self.in_cluster(asker, name) {
            return found;
        }
        let within = self.domain.as_ref().and_then(|domain| name.before(domain));
        let reversed = name.reversed();
        let qualified = match (&within, asker) {
            (Some(rest), _) => Some(rest),
            (None, Asker::At(_)) => Some(name),
            // The host has names of its own, and `web.blue` may be one of them.
            (None, Asker::Host) => None,
        };
        let mut ours = within.is_some();
        for (key, network) in networks {
            if within.is_some_and(|rest| rest == Name::ROOT || rest == network.label) {
                return Place::Here(*key, &ABOVE);
            }
            let named = qualified.and_then(|name| name.before(&network.label));
            let found = named.filter(|name| *name != Name::ROOT).and_then(|name| network.names.get(&name));
            let found = found.or_else(|| network.names.get(name).filter(|_| reversed.is_some()));
            if let Some(records) = found {
                return Place::Here(*key, records);
            }
            ours |= reversed.is_some_and(|address| network.subnets.iter().any(|net| net.contains(&address)));
        }
        if ours { Place::Nowhere } else { Place::Elsewhere }
    }

    /// Nothing where the cluster's names have no say.
    fn in_cluster(&self, asker: Asker, name: &Name) -> Option<Place<'_>> {
        let cluster = self.cluster.as_ref()?;
        if let Some(records) = cluster.names.get(name) {
            return Some(if records.unready { Place::Nowhere } else { Place::Here(CLUSTER, records) });
        }
        let within = name.before(&cluster.domain)?;
        let walked = self.walked(cluster, asker, &within);
        Some(walked.map_or(Place::Nowhere, |name| Place::Walked(Box::new(name))))
    }

    /// Where the walk ends that a query begins for `within` under the cluster's domain, if it is the first step of
    /// the asker's own search list: at a name of the cluster, or at one that others may know. A name of one
    /// label is never taken for somebody else's, and one under the cluster's domain neither.
    fn walked(&self, cluster: &Cluster, asker: Asker, within: &Name) -> Option<Name> {
        let Asker::At(address) = asker else { return None };
        let search = self.askers.get(&address)?.search.filter(|_| cluster.walks)?;
        let asked = within.before(&search)?;
        asked.labels().nth(1)?;
        // What comes after the first step: a label fewer of the search list each time.
        let mut rest = search;
        loop {
            let shorter = rest.labels().next().map_or(0, |label| label.len() + 1);
            rest = Name::from_bytes(rest.as_bytes().get(shorter..)?)?;
            let step = asked.with(&rest)?.with(&cluster.domain)?;
            match cluster.names.get(&step) {
                Some(records) if records.unready => return None,
                Some(records) if !records.above => return Some(step),
                _ => {}
            }
            if rest == Name::ROOT {
                break;
            }
        }
        match asked.before(&cluster.domain) {
            Some(_) => cluster.names.get(&asked).map(|_| asked),
            // Beneath a Service of its namespace there is nobody else's name.
            None if cluster.has_above(&asked, &search) => None,
            None => Some(asked),
        }
    }

    /// The domain of ours that a name is in: it is what a start of authority is about. A name of a network that is
    /// asked for without our domain has the one above it.
    pub(crate) fn apex(&self, name: &Name) -> Name {
        let cluster = self.cluster.as_ref().map(|cluster| &cluster.domain);
        let mut domains = cluster.into_iter().chain(&self.domain);
        let found = domains.find(|domain| name.before(domain).is_some());
        let above = || name.labels().next().and_then(|label| name.as_bytes().get(label.len() + 1..));
        found.copied().or_else(|| Name::from_bytes(above()?)).unwrap_or(Name::ROOT)
    }

    /// The full form of a name of a network, for this asker.
    pub fn full(&self, asker: Asker, network: NetworkKey, name: &Name) -> Option<Name> {
        if network == CLUSTER {
            return Some(*name);
        }
        let qualified = name.with(&self.networks.get(&network)?.label)?;
        match (asker, &self.domain) {
            (Asker::Host, Some(domain)) => qualified.with(domain),
            _ => Some(qualified),
        }
    }
}
