//! The zone: names by network, and which networks each client may see. Snapshots share their unchanged parts.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;

use crate::name::{KeptName, Name};
use crate::pattern::NamePattern;

/// The client that sent a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// The host itself, which sees the names of all networks, by full names alone. It asks resolvers of its own for others.
    Host,
    /// A program of the host that has no other resolver, such as a pod with the host's network. It sees the names that
    /// [`Self::Host`] sees, and those of others.
    HostOnly,
    /// The endpoint with this address.
    Endpoint(IpAddr),
}

/// Identifies a network.
pub type NetworkKey = u64;

/// The number of shards of a map of names. A change copies one shard.
const SHARDS: usize = 64;

/// The records of a name. There are several of them for each endpoint of the cluster, so they are small.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// The addresses of A records.
    pub v4: Box<[Ipv4Addr]>,
    /// The addresses of AAAA records.
    pub v6: Box<[Ipv6Addr]>,
    /// The targets of PTR records, without the label of the network.
    pub names: Box<[KeptName]>,
    /// Records of types that no name of an endpoint has.
    pub others: Option<Box<OtherRecords>>,
    /// There are names below this one, so it exists even without records (RFC 8020).
    pub above: bool,
    /// The name does not exist, and is not forwarded either: a Service without ready endpoints.
    pub unready: bool,
}

/// The records of a name that has others than of types A, AAAA and PTR.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OtherRecords {
    /// The ports and targets of SRV records.
    pub services: Vec<(u16, KeptName)>,
    /// The target of a CNAME record.
    pub alias: Option<KeptName>,
    /// The text of a TXT record.
    pub text: Option<&'static str>,
}

impl From<OtherRecords> for Records {
    fn from(others: OtherRecords) -> Self {
        let others = (others != OtherRecords::default()).then(|| Box::new(others));
        Self { others, ..Self::default() }
    }
}

impl Records {
    /// Returns whether the name does not exist.
    pub fn is_empty(&self) -> bool {
        let Self { v4, v6, names, others, above, unready } = self;
        v4.is_empty() && v6.is_empty() && names.is_empty() && others.is_none() && !above && !unready
    }

    /// Returns the target of a CNAME record.
    #[inline]
    pub fn alias(&self) -> Option<&KeptName> {
        self.others.as_ref()?.alias.as_ref()
    }
}

/// A fast hash function for names. It does not resist chosen collisions: whoever can create names could only
/// slow down the DNS server of their own cluster.
#[derive(Debug, Default, Clone, Copy)]
struct NameHasher(u64);

impl Hasher for NameHasher {
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
        // The hash table uses the upper and the lower bits.
        self.0 ^ self.0 >> 32
    }
}

type Shard = HashMap<Arc<[u8]>, Arc<Records>, BuildHasherDefault<NameHasher>>;

/// Records by name.
#[derive(Clone)]
struct RecordMap(Arc<[Arc<Shard>]>);

impl Default for RecordMap {
    fn default() -> Self {
        Self((0..SHARDS).map(|_| Arc::default()).collect())
    }
}

impl RecordMap {
    #[inline]
    fn shard(name: &[u8]) -> usize {
        let mut hasher = NameHasher::default();
        hasher.write(name);
        // Other bits than the hash table of the shard uses.
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

/// The names of a network.
#[derive(Clone)]
struct Network {
    /// The label below ovl's domain, such as `blue` in `web.blue`.
    label: Name,
    /// Reverse names of addresses in these subnets are never forwarded.
    subnets: Vec<IpNet>,
    names: RecordMap,
}

impl Network {
    /// Returns the records of a name that ends with the network's label.
    fn qualified(&self, name: &Name) -> Option<&Records> {
        let name = name.strip_suffix(&self.label).filter(|name| *name != Name::ROOT)?;
        self.names.get(&name).map(|records| &**records)
    }
}

/// The context of a client: what its queries are resolved against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientContext {
    /// The networks of the client, in the order in which they are searched.
    pub networks: Arc<[NetworkKey]>,
    /// The first entry of its search list below the cluster domain, such as `default.svc`.
    pub search: Option<Name>,
    /// Names of no local domain are looked up for it at the upstream servers.
    pub external: bool,
    /// The names whose addresses are made known before it is told them: its network policies admit connections to them.
    pub watched: Arc<[NamePattern]>,
}

/// The names of the cluster domain, which all clients see.
#[derive(Clone)]
struct Cluster {
    domain: Name,
    /// Records by full name and by reverse name.
    names: RecordMap,
    /// The engine tries the search list in place of the client.
    walks: bool,
}

impl Cluster {
    /// Returns whether a name above `asked` exists, both below `search` in the cluster domain.
    fn has_above(&self, asked: &Name, search: &Name) -> bool {
        let above = |at: usize| {
            let rest = Name::from_bytes(asked.as_bytes().get(at..)?)?;
            self.names.get(&rest.join(search)?.join(&self.domain)?)
        };
        let mut at = 0;
        asked.labels().any(|label| {
            at += 1 + label.len();
            at < asked.as_bytes().len() && above(at).is_some()
        })
    }
}

/// An immutable snapshot of all names. Cloning it is cheap.
#[derive(Clone, Default)]
pub struct Zone {
    networks: BTreeMap<NetworkKey, Arc<Network>>,
    clients: Arc<HashMap<IpAddr, ClientContext>>,
    domain: Option<Name>,
    cluster: Option<Cluster>,
}

/// The key of the cluster domain among the networks.
const CLUSTER: NetworkKey = NetworkKey::MAX;

/// The records of a name that has none, but has names below it.
static ABOVE: LazyLock<Records> = LazyLock::new(|| Records { above: true, ..Records::default() });

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let networks = self.networks.len();
        f.debug_struct("Zone").field("networks", &networks).field("clients", &self.clients.len()).finish()
    }
}

/// How a name is resolved for a client.
#[derive(Debug, Clone)]
pub enum Resolution<'a> {
    /// The name is on this network, with these records.
    Found(NetworkKey, &'a Records),
    /// The name is in a local domain and does not exist.
    NotFound,
    /// The name is in no local domain, so upstream servers are asked.
    External,
    /// The query is the first step of the client's search list, and this is the name at which the search
    /// ends.
    SearchPath(Box<Name>),
}

impl Zone {
    /// Creates an empty zone. Full names are `NAME.NETWORK.DOMAIN`.
    pub fn new(domain: Option<Name>) -> Self {
        Self { domain, ..Self::default() }
    }

    /// Adds a network, or changes its label and subnets.
    pub fn set_network(&mut self, key: NetworkKey, label: Name, subnets: Vec<IpNet>) {
        let names = self.networks.get(&key).map(|known| known.names.clone()).unwrap_or_default();
        self.networks.insert(key, Arc::new(Network { label, subnets, names }));
    }

    /// Returns the number of networks.
    pub fn networks(&self) -> usize {
        self.networks.len()
    }

    /// Removes all networks but these.
    pub fn retain_networks(&mut self, keep: impl Fn(NetworkKey) -> bool) {
        self.networks.retain(|key, _| keep(*key));
    }

    /// Sets the records of a name on a network. Empty records remove the name.
    pub fn set(&mut self, network: NetworkKey, name: &Name, records: Records) {
        if let Some(network) = self.networks.get_mut(&network) {
            Arc::make_mut(network).names.set(name, records);
        }
    }

    /// Returns all names of a network.
    pub fn names(&self, network: NetworkKey) -> Vec<Name> {
        let found = self.networks.get(&network);
        found.into_iter().flat_map(|network| network.names.iter().map(|(name, _)| name)).collect()
    }

    /// Sets the contexts of all clients by address.
    pub fn set_clients(&mut self, clients: HashMap<IpAddr, ClientContext>) {
        self.clients = Arc::new(clients);
    }

    /// Returns whether a client has this address.
    pub fn has_client(&self, address: IpAddr) -> bool {
        self.clients.contains_key(&address)
    }

    /// Adds the cluster domain, without names. If `walks` is set, a client whose search list begins there
    /// gets its final answer at the first step.
    pub fn begin_cluster(&mut self, domain: Name, walks: bool) {
        self.cluster = Some(Cluster { domain, names: RecordMap::default(), walks });
    }

    /// Sets the records of a full name or a reverse name in the cluster. Empty records remove the name.
    pub fn set_cluster(&mut self, name: &Name, records: Records) {
        if let Some(cluster) = &mut self.cluster {
            cluster.names.set(name, records);
        }
    }

    /// Returns whether queries of this client are answered.
    #[inline]
    pub fn knows(&self, client: Client) -> bool {
        match client {
            Client::Host | Client::HostOnly => true,
            Client::Endpoint(address) => self.has_client(address),
        }
    }

    /// Returns whether names of no local domain are looked up for a client at the upstream servers.
    pub fn allows_external(&self, client: Client) -> bool {
        match client {
            Client::Host => false,
            Client::HostOnly => true,
            Client::Endpoint(address) => self.clients.get(&address).is_some_and(|context| context.external),
        }
    }

    /// Returns the names whose addresses are made known before a client is told them.
    #[inline]
    pub fn watched(&self, client: Client) -> &[NamePattern] {
        match client {
            Client::Host | Client::HostOnly => &[],
            Client::Endpoint(address) => self.clients.get(&address).map_or(&[], |context| &context.watched),
        }
    }

    /// Whether a name means the same to all clients: it is in a domain whose names ovl gives by network or by namespace, or in
    /// no domain of ovl. What an endpoint is called is neither: who creates it chooses that name.
    pub fn is_full(&self, client: Client, name: &Name) -> bool {
        let cluster = self.cluster.as_ref().map(|cluster| &cluster.domain);
        let mut domains = cluster.into_iter().chain(&self.domain);
        domains.any(|domain| name.strip_suffix(domain).is_some())
            || matches!(self.find(client, name), Resolution::External)
    }

    /// Resolves a name for a client.
    #[inline]
    pub fn find(&self, client: Client, name: &Name) -> Resolution<'_> {
        let (all, some);
        let networks: &mut dyn Iterator<Item = (&NetworkKey, &Network)> = match client {
            Client::Host | Client::HostOnly => {
                all = self.networks.iter().map(|(key, network)| (key, &**network));
                &mut { all }
            }
            Client::Endpoint(address) => {
                let Some(context) = self.clients.get(&address) else { return Resolution::NotFound };
                // The name that a Service gives an address comes before that of a network.
                if let Some(records) = self.reverse_in_cluster(name) {
                    return Resolution::Found(CLUSTER, records);
                }
                let on = &context.networks;
                // An endpoint that is called `web.blue` must not take the place of `web` on the network `blue`.
                if name.has_several_labels() {
                    for key in on.iter() {
                        let found = self.networks.get(key).and_then(|network| network.qualified(name));
                        if let Some(records) = found {
                            return Resolution::Found(*key, records);
                        }
                    }
                }
                for key in on.iter() {
                    if let Some(records) = self.networks.get(key).and_then(|network| network.names.get(name))
                    {
                        return Resolution::Found(*key, records);
                    }
                }
                some = on.iter().filter_map(|key| Some((key, &**self.networks.get(key)?)));
                &mut { some }
            }
        };
        self.find_in(client, networks, name)
    }

    fn find_in<'a>(
        &'a self,
        client: Client,
        networks: &mut dyn Iterator<Item = (&'a NetworkKey, &'a Network)>,
        name: &Name,
    ) -> Resolution<'a> {
        if let Some(found) = self.in_cluster(client, name) {
            return found;
        }
        let within = self.domain.as_ref().and_then(|domain| name.strip_suffix(domain));
        let reversed = name.reversed();
        let qualified = match (&within, client) {
            (Some(rest), _) => Some(rest),
            (None, Client::Endpoint(_)) => Some(name),
            // For the host, `web.blue` without ovl's domain may be a name of another domain.
            (None, Client::Host | Client::HostOnly) => None,
        };
        let mut is_local = within.is_some();
        for (key, network) in networks {
            if within.is_some_and(|rest| rest == Name::ROOT || rest == network.label) {
                return Resolution::Found(*key, &ABOVE);
            }
            let found = qualified.and_then(|name| network.qualified(name));
            let reverse = || reversed.and_then(|_| network.names.get(name)).map(|records| &**records);
            let found = found.or_else(reverse);
            if let Some(records) = found {
                return Resolution::Found(*key, records);
            }
            is_local |=
                reversed.is_some_and(|address| network.subnets.iter().any(|net| net.contains(&address)));
        }
        if is_local { Resolution::NotFound } else { Resolution::External }
    }

    /// Returns the PTR records that Services have for a reverse name.
    #[inline]
    fn reverse_in_cluster(&self, name: &Name) -> Option<&Records> {
        let cluster = self.cluster.as_ref()?;
        name.reversed()?;
        cluster.names.get(name).map(|records| &**records)
    }

    /// Resolves a name in the cluster domain. `None` if the name is in another domain.
    fn in_cluster(&self, client: Client, name: &Name) -> Option<Resolution<'_>> {
        let cluster = self.cluster.as_ref()?;
        if let Some(records) = cluster.names.get(name) {
            return Some(if records.unready {
                Resolution::NotFound
            } else {
                Resolution::Found(CLUSTER, records)
            });
        }
        let within = name.strip_suffix(&cluster.domain)?;
        let walked = self.search_result(cluster, client, &within);
        Some(walked.map_or(Resolution::NotFound, |name| Resolution::SearchPath(Box::new(name))))
    }

    /// Returns the name at which the client's search list ends, if `within` below the cluster domain is its
    /// first step: a name of the cluster, or one to forward. A name of one label or below the cluster domain
    /// is never forwarded. `None` if the query is not the first step, or if the search ends without a name.
    fn search_result(&self, cluster: &Cluster, client: Client, within: &Name) -> Option<Name> {
        let Client::Endpoint(address) = client else { return None };
        let search = self.clients.get(&address)?.search.filter(|_| cluster.walks)?;
        let asked = within.strip_suffix(&search)?;
        asked.labels().nth(1)?;
        // Each further step has a label of the search list less.
        let mut rest = search;
        loop {
            let shorter = rest.labels().next().map_or(0, |label| label.len() + 1);
            rest = Name::from_bytes(rest.as_bytes().get(shorter..)?)?;
            let step = asked.join(&rest)?.join(&cluster.domain)?;
            match cluster.names.get(&step) {
                Some(records) if records.unready => return None,
                Some(records) if !records.above => return Some(step),
                _ => {}
            }
            if rest == Name::ROOT {
                break;
            }
        }
        match asked.strip_suffix(&cluster.domain) {
            Some(_) => cluster.names.get(&asked).map(|_| asked),
            // A name below a Service of the client's namespace belongs to the cluster.
            None if cluster.has_above(&asked, &search) => None,
            None => Some(asked),
        }
    }

    /// Returns the local domain of a name, which owns the SOA record. For a name of a network without ovl's
    /// domain, it is the name above.
    pub fn apex(&self, name: &Name) -> Name {
        let cluster = self.cluster.as_ref().map(|cluster| &cluster.domain);
        let mut domains = cluster.into_iter().chain(&self.domain);
        let found = domains.find(|domain| name.strip_suffix(domain).is_some());
        let above = || name.labels().next().and_then(|label| name.as_bytes().get(label.len() + 1..));
        found.copied().or_else(|| Name::from_bytes(above()?)).unwrap_or(Name::ROOT)
    }

    /// Returns the full form of a name of a network for a client. `None` if there is no such network or the
    /// name is too long.
    pub fn full(&self, client: Client, network: NetworkKey, name: &Name) -> Option<Name> {
        if network == CLUSTER {
            return Some(*name);
        }
        let qualified = name.join(&self.networks.get(&network)?.label)?;
        match (client, &self.domain) {
            (Client::Host | Client::HostOnly, Some(domain)) => qualified.join(domain),
            _ => Some(qualified),
        }
    }
}
