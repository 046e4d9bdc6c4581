//! Test hosts and networks. The tests of the subsystems use them too.
#![allow(dead_code, reason = "not each of the tests uses all of it")]

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::backends::{self, Backends, Settled};
use ovl_cluster::table::Table;
use ovl_cluster::view::{NetworkState, Node, View};
use ovl_proto::alloc::{AllocMap, Block};
use ovl_proto::clock::Stamp;
use ovl_proto::id::{EndpointId, NetworkId, NodeId, TunnelKey};
use ovl_proto::object::{Backend, Driver, Mode, Network, Subnet};
use ovl_proto::record::PeerState;
use ovl_proto::record::WireVersions;
use ovl_proto::record::{NodeRecord, Presence, Signature, Tunnel};
use ovl_proto::resource::{Kind, Labels, Name, Resource, ResourceKey};
use ovl_proto::table::{Endpoint, Entry, Key, PodIdentity};
use ovl_proto::wire::fields::Unknown;
use serde_json::{Value, json};

pub(crate) const NET: NetworkId = NetworkId([0; 5]);

pub(crate) fn id(n: u8) -> NodeId {
    NodeId([n; 10])
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn node(n: u8) -> Node {
    Node {
        record: NodeRecord {
            id: id(n),
            public_key: [n; 32],
            name: format!("h{n}"),
            generation: 1,
            revision: 1,
            cluster: 1,
            address: ([192, 168, 77, n], 7940).into(),
            vtep: [192, 168, 77, n].into(),
            vxlan_port: 4789,
            link_mtu: 1500,
            tunnel: None,
            keys: ovl_proto::record::ClusterKeys::default(),
            presence: Presence::Running,
            version: "0".to_owned(),
            wire: WireVersions::own(),
            probes: 0,
            not_built: Vec::new(),
            probe_kinds: 0,
            metrics_port: 0,
            zone: String::new(),
            mirrors: false,
            is_node: false,
            relay_port: 0,
            relays: false,
            further: Vec::new(),
            unknown: Unknown::default(),
        },
        state: PeerState::Alive,
        table: Table::new(id(n)),
    }
}

/// Creates the view of host h1 with the hosts h1 to h3 and one network, in which host n holds `block(n)`.
pub(crate) fn view_of(mode: Mode, backend: Backend, subnet: Subnet, block: impl Fn(u8) -> IpNet) -> View {
    let network = Network {
        id: NET,
        name: "blue".to_owned(),
        created: Stamp::default(),
        driver: Driver::Overlay,
        mode,
        vni: 5000,
        subnets: vec![subnet],
        mtu: None,
        encrypted: false,
        auto_encrypt: false,
        internal: false,
        backend,
        names: true,
        on_demand: false,
        external_names: false,
        unknown: Unknown::default(),
    };
    View {
        me: id(1),
        nodes: (1..=3).map(|n| (id(n), node(n))).collect(),
        networks: BTreeMap::from([(NET, NetworkState { network, removing: false })]),
        alloc: AllocMap {
            cluster: 1,
            version: 1,
            members: (1..=3).map(id).collect(),
            previous_members: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            banned: BTreeSet::new(),
            blocks: (1..=3).map(|n| (Block { network: NET, prefix: block(n) }, id(n))).collect(),
            key: None,
            origin: 0,
            unknown: Unknown::default(),
        },
        resources: Default::default(),
        elsewhere: BTreeSet::new(),
    }
}

/// Creates a view with a switched network in which host n holds the block 10.9.0.8n/29.
pub(crate) fn switched() -> View {
    let subnet = addresses::new_subnet(net("10.9.0.0/24")).unwrap();
    view_of(Mode::L2, Backend::Vxlan, subnet, |n| net(&format!("10.9.0.{}/29", 8 * n)))
}

pub(crate) fn tunnel_key(n: u8) -> TunnelKey {
    TunnelKey([100 + n; 32])
}

/// Gives every host a tunnel, and encrypts the network.
pub(crate) fn encrypt(view: &mut View, kernel: bool) {
    for (n, node) in (1..).zip(view.nodes.values_mut()) {
        node.record.tunnel =
            Some(Tunnel { key: tunnel_key(n), port: 51940, epoch: 0, rotating: false, kernel });
    }
    view.networks.get_mut(&NET).unwrap().network.encrypted = true;
}

/// As [`encrypt`], but only to hosts to which there is no path in plain text.
pub(crate) fn encrypt_if_needed(view: &mut View, kernel: bool) {
    encrypt(view, kernel);
    let network = &mut view.networks.get_mut(&NET).unwrap().network;
    (network.encrypted, network.auto_encrypt) = (false, true);
}

pub(crate) fn endpoint(n: u8, address: &str) -> Entry {
    let net = net(address);
    Entry::Endpoint(Endpoint {
        id: EndpointId([n; 5]),
        name: format!("w{n}"),
        namespace: "default".to_owned(),
        network: NET,
        mac: addresses::mac_of(NET, net.addr()),
        addresses: vec![net],
        aliases: vec![],
        labels: Labels::new(),
        ready: true,
        publish: vec![],
        allowed: vec![],
        allowed_macs: vec![],
        groups: None,
        described: None,
        pod: None,
        unknown: Unknown::default(),
    })
}

pub(crate) fn give(view: &mut View, n: u8, entries: Vec<Entry>) {
    view.nodes.get_mut(&id(n)).unwrap().table.write(1, entries, vec![], |_| Signature([0; 64]));
}

pub(crate) fn read(kind: Kind, manifest: Value) -> Resource {
    match kind {
        Kind::Namespace => Resource::Namespace(serde_json::from_value(manifest).unwrap()),
        Kind::Pod => Resource::Pod(serde_json::from_value(manifest).unwrap()),
        Kind::Service => Resource::Service(serde_json::from_value(manifest).unwrap()),
        Kind::EndpointSlice => Resource::EndpointSlice(serde_json::from_value(manifest).unwrap()),
        Kind::NetworkPolicy => Resource::NetworkPolicy(serde_json::from_value(manifest).unwrap()),
        Kind::ServiceCidr => Resource::ServiceCidr(serde_json::from_value(manifest).unwrap()),
        Kind::ClusterNetworkPolicy => {
            Resource::ClusterNetworkPolicy(serde_json::from_value(manifest).unwrap())
        }
        Kind::Node => Resource::Node(serde_json::from_value(manifest).unwrap()),
    }
}

/// A view and its backends, which are kept up to date.
pub(crate) struct World {
    pub(crate) view: View,
    pub(crate) backends: Backends,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { view: switched(), backends: Backends::default() }
    }

    pub(crate) fn put(&mut self, resource: Resource) {
        for key in self.view.resources.insert(resource) {
            self.backends.touch_resource(&self.view, &key);
        }
    }

    pub(crate) fn drop(&mut self, kind: Kind, name: &str) {
        let key = ResourceKey { kind, name: Name::new("default", name) };
        for key in self.view.resources.remove(&key) {
            self.backends.touch_resource(&self.view, &key);
        }
    }

    pub(crate) fn service(&mut self, name: &str, selector: Value) {
        self.put(read(
            Kind::Service,
            json!({
                "metadata": { "name": name, "namespace": "default" },
                "spec": { "selector": selector, "ports": [
                    { "name": "http", "port": 80, "targetPort": 8080 },
                    { "name": "named", "port": 81, "targetPort": "web" },
                ] },
            }),
        ));
    }

    pub(crate) fn attach(&mut self, host: u8, n: u8, labels: &[(&str, &str)], ready: bool) {
        let Entry::Endpoint(bare) = endpoint(n, &format!("10.9.0.{}/24", 8 * host + n)) else { panic!() };
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        give(&mut self.view, host, vec![Entry::Endpoint(Endpoint { labels, ready, ..bare })]);
        self.backends.touch_endpoint(&self.view, id(host), EndpointId([n; 5]));
    }

    /// Attaches an endpoint of a pod without labels of its own.
    pub(crate) fn attach_pod(&mut self, host: u8, n: u8, pod: PodIdentity) {
        let Entry::Endpoint(bare) = endpoint(n, &format!("10.9.0.{}/24", 8 * host + n)) else { panic!() };
        give(&mut self.view, host, vec![Entry::Endpoint(Endpoint { pod: Some(Box::new(pod)), ..bare })]);
        self.backends.touch_endpoint(&self.view, id(host), EndpointId([n; 5]));
    }

    pub(crate) fn detach(&mut self, host: u8, n: u8) {
        let key = EndpointId([n; 5]);
        let table = &mut self.view.nodes.get_mut(&id(host)).unwrap().table;
        table.write(1, vec![], vec![Key::Endpoint(key)], |_| Signature([0; 64]));
        self.backends.touch_endpoint(&self.view, id(host), key);
    }

    pub(crate) fn host(&mut self, host: u8, state: PeerState) {
        self.view.nodes.get_mut(&id(host)).unwrap().state = state;
        self.backends.touch_network(&self.view, NET);
        self.backends.touch_host(&self.view, id(host));
    }

    pub(crate) fn settle(&mut self) -> Settled {
        self.backends.settle(&self.view)
    }

    pub(crate) fn of(&self, service: &str) -> &[backends::Backend] {
        self.backends.of(&Name::new("default", service))
    }

    pub(crate) fn names(&self, service: &str) -> Vec<&str> {
        self.of(service).iter().map(|backend| backend.name.as_str()).collect()
    }
}

pub(crate) fn pod_identity(name: &str, uid: &str, created: u64) -> PodIdentity {
    PodIdentity { name: name.to_owned(), uid: uid.to_owned(), created }
}

pub(crate) const WEB: &[(&str, &str)] = &[("app", "web")];
