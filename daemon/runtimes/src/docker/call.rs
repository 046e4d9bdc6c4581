//! What a call means.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Mode};
use ovl_proto::publish::{Ports, Publish, Transport};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{EngineEndpoint, Pool, SPACE};

/// The longest name that the Engine gives a container.
pub const MAX_NAME: usize = 253;

const GENERIC: &str = "com.docker.network.generic";
const INTERNAL: &str = "com.docker.network.internal";
const PORTMAP: &str = "com.docker.network.portmap";
const MAC: &str = "com.docker.network.endpoint.macaddress";
const DRIVER_MTU: &str = "com.docker.network.driver.mtu";
const GATEWAY: &str = "com.docker.network.gateway";
const ADDRESS_TYPE: &str = "RequestAddressType";

/// A call that makes sense.
#[derive(Debug, PartialEq)]
pub enum Call {
    /// What is this plugin?
    Activate,
    /// What does the driver do?
    DriverCapabilities,
    /// What does the IPAM need?
    IpamCapabilities,
    /// What are the address spaces called?
    AddressSpaces,
    /// A range for a network that is to be made.
    RequestPool(PoolWish),
    /// An address of a pool.
    RequestAddress(AddressWish),
    /// It is not used any more.
    ReleaseAddress {
        /// The pool it came from.
        pool: Pool,
        /// The address.
        address: IpAddr,
    },
    /// Make or join a network.
    CreateNetwork(Box<NetworkWish>),
    /// Leave it: the Engine's id.
    DeleteNetwork(String),
    /// Make an endpoint.
    CreateEndpoint(Box<EndpointWish>),
    /// Remove it.
    DeleteEndpoint(EngineEndpoint),
    /// Tell what is to be put into the container.
    Join(EngineEndpoint),
    /// The container is off the network.
    Leave(EngineEndpoint),
    /// Publish ports.
    Publish(EngineEndpoint, Vec<Publish>),
    /// Publish none any more.
    Revoke(EngineEndpoint),
    /// What is there to say about it?
    Describe(EngineEndpoint),
    /// Nothing that we would have to do.
    Nothing,
}

/// A range of addresses that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolWish {
    /// This one.
    pub prefix: Option<IpNet>,
    /// That of this network of the cluster.
    pub network: Option<String>,
    /// Of IPv6.
    pub v6: bool,
}

/// An address that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressWish {
    /// The gateway's, for the Engine to show: this one, or any.
    Gateway(Pool, Option<IpAddr>),
    /// An endpoint's: this one, or any.
    Endpoint(Pool, Option<IpAddr>),
}

/// A network that is to be made or joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkWish {
    /// The Engine's id.
    pub id: String,
    /// The name in the cluster.
    pub name: Option<String>,
    /// At most one of each family.
    pub prefixes: Vec<IpNet>,
    /// Without a way out.
    pub internal: bool,
    /// Only ever through the tunnel; nothing: as it is, or not.
    pub encrypted: Option<bool>,
    /// Nothing: as it is, or switched.
    pub mode: Option<Mode>,
    /// Nothing: as it is, or a free one.
    pub vni: Option<u32>,
    /// Nothing: as it is, or what the paths carry.
    pub mtu: Option<u16>,
    /// Nothing: as it is, or VXLAN.
    pub backend: Option<Backend>,
}

/// An endpoint that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointWish {
    /// Which.
    pub id: EngineEndpoint,
    /// One of each family, all out of our hands.
    pub addresses: Vec<IpAddr>,
    /// The interface's.
    pub mac: Mac,
    /// What the cluster calls it.
    pub name: String,
    /// More names.
    pub aliases: Vec<String>,
    /// The Kubernetes namespace.
    pub namespace: Option<String>,
    /// What selectors match.
    pub labels: BTreeMap<String, String>,
}

/// Reads a call: its path without the slash, and its body. The error is for people.
pub fn parse(method: &str, body: &Value) -> Result<Call, String> {
    Ok(match method {
        "Plugin.Activate" => Call::Activate,
        "NetworkDriver.GetCapabilities" => Call::DriverCapabilities,
        "IpamDriver.GetCapabilities" => Call::IpamCapabilities,
        "IpamDriver.GetDefaultAddressSpaces" => Call::AddressSpaces,
        "IpamDriver.RequestPool" => Call::RequestPool(pool(read(body)?)?),
        "IpamDriver.RequestAddress" => Call::RequestAddress(address(read(body)?)?),
        "IpamDriver.ReleaseAddress" => {
            let raw: RawAddress = read(body)?;
            Call::ReleaseAddress { pool: raw.pool.parse()?, address: ip(&raw.address)? }
        }
        "NetworkDriver.CreateNetwork" => Call::CreateNetwork(Box::new(network(read(body)?)?)),
        "NetworkDriver.DeleteNetwork" => Call::DeleteNetwork(engine_id(read::<RawId>(body)?.network)?),
        "NetworkDriver.CreateEndpoint" => Call::CreateEndpoint(Box::new(endpoint(read(body)?)?)),
        "NetworkDriver.DeleteEndpoint" => Call::DeleteEndpoint(which(read(body)?)?),
        "NetworkDriver.Join" => Call::Join(which(read(body)?)?),
        "NetworkDriver.Leave" => Call::Leave(which(read(body)?)?),
        "NetworkDriver.ProgramExternalConnectivity" => {
            let raw: RawId = read(body)?;
            let ports = ports(&raw.options)?;
            Call::Publish(which(raw)?, ports)
        }
        "NetworkDriver.RevokeExternalConnectivity" => Call::Revoke(which(read(body)?)?),
        "NetworkDriver.EndpointOperInfo" => Call::Describe(which(read(body)?)?),
        // Ranges belong to networks and go with them; who else is there, we know ourselves.
        "IpamDriver.ReleasePool" | "NetworkDriver.DiscoverNew" | "NetworkDriver.DiscoverDelete" => {
            Call::Nothing
        }
        other => return Err(format!("ovl does not know the call {other}")),
    })
}

/// Whether a call takes something away. An Engine that is told that it failed goes on all the same, so
/// it can as well be done later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Later {
    /// It does not.
    No,
    /// It follows from others that come with it.
    Follows,
    /// It has to be kept, under this name.
    Keep(String),
}

/// What can be done with a call while ovld is not there.
pub fn later(call: &Call) -> Later {
    match call {
        Call::DeleteEndpoint(id) | Call::Leave(id) => Later::Keep(format!("endpoint-{}", id.endpoint)),
        Call::DeleteNetwork(id) => Later::Keep(format!("network-{id}")),
        Call::Revoke(id) => Later::Keep(format!("revoke-{}", id.endpoint)),
        Call::ReleaseAddress { .. } => Later::Follows,
        _ => Later::No,
    }
}

/// Nothing stands for a body without fields.
fn read<T: DeserializeOwned>(body: &Value) -> Result<T, String> {
    let empty = Value::Object(Map::new());
    let body = if body.is_null() { &empty } else { body };
    T::deserialize(body).map_err(|error| format!("ovl does not understand the call: {error}"))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawPool {
    #[serde(default)]
    address_space: String,
    #[serde(default)]
    pool: String,
    #[serde(default)]
    sub_pool: String,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
    #[serde(default)]
    v6: bool,
}

fn pool(raw: RawPool) -> Result<PoolWish, String> {
    if raw.address_space != SPACE {
        return Err(format!("the address space {:?} is not ovl's, which is {SPACE}", raw.address_space));
    }
    if !raw.sub_pool.is_empty() {
        return Err(format!(
            "ovl divides a network's range among the hosts itself: leave --ip-range {} out",
            raw.sub_pool
        ));
    }
    let mut network = None;
    for (key, value) in raw.options.into_iter().flatten() {
        match key.as_str() {
            "ovl.network" => network = Some(value),
            _ => return Err(format!("--ipam-opt {key}: ovl knows only ovl.network=NAME there")),
        }
    }
    let prefix = match raw.pool.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| format!("{text:?} is no range of addresses"))?),
    };
    Ok(PoolWish { prefix, network, v6: raw.v6 })
}

#[derive(Deserialize)]
struct RawAddress {
    #[serde(rename = "PoolID")]
    pool: String,
    #[serde(rename = "Address", default)]
    address: String,
    #[serde(rename = "Options", default)]
    options: Option<BTreeMap<String, String>>,
}

fn address(raw: RawAddress) -> Result<AddressWish, String> {
    let pool = raw.pool.parse()?;
    let address = if raw.address.is_empty() { None } else { Some(ip(&raw.address)?) };
    let options = raw.options.unwrap_or_default();
    if options.get(ADDRESS_TYPE).is_some_and(|kind| kind == GATEWAY) {
        return Ok(AddressWish::Gateway(pool, address));
    }
    if !options.contains_key(MAC) {
        return Err(format!(
            "ovl sets no address aside for --aux-address{}: give endpoints outside of Docker one with `ovlctl attach --ip`",
            address.map(|address| format!(" {address}")).unwrap_or_default()
        ));
    }
    Ok(AddressWish::Endpoint(pool, address))
}

#[derive(Deserialize)]
struct RawNetwork {
    #[serde(rename = "NetworkID")]
    id: String,
    #[serde(rename = "Options", default)]
    options: Option<Map<String, Value>>,
    #[serde(rename = "IPv4Data", default)]
    v4: Option<Vec<RawRange>>,
    #[serde(rename = "IPv6Data", default)]
    v6: Option<Vec<RawRange>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRange {
    #[serde(default)]
    address_space: String,
    #[serde(default)]
    pool: String,
}

fn network(raw: RawNetwork) -> Result<NetworkWish, String> {
    let mut prefixes: Vec<IpNet> = Vec::new();
    for range in raw.v4.into_iter().chain(raw.v6).flatten() {
        if range.address_space != SPACE {
            return Err(
                "the addresses of an ovl network are given out for all hosts together: add --ipam-driver ovl"
                    .to_owned(),
            );
        }
        let prefix: IpNet =
            range.pool.parse().map_err(|_| format!("{:?} is no range of addresses", range.pool))?;
        if prefixes.iter().any(|other| other.addr().is_ipv4() == prefix.addr().is_ipv4()) {
            return Err(format!(
                "{prefix} is a second range of its family: a container has one address of each on a network"
            ));
        }
        prefixes.push(prefix);
    }
    if prefixes.is_empty() {
        return Err("a network without a range of addresses: add --ipam-driver ovl".to_owned());
    }
    let options = raw.options.unwrap_or_default();
    let mut wish = NetworkWish {
        id: engine_id(raw.id)?,
        name: None,
        prefixes,
        internal: options.get(INTERNAL).and_then(Value::as_bool).unwrap_or_default(),
        encrypted: None,
        mode: None,
        vni: None,
        mtu: None,
        backend: None,
    };
    let generic = options.get(GENERIC).and_then(Value::as_object);
    for (key, value) in generic.into_iter().flatten() {
        set(&mut wish, key, value.as_str().unwrap_or_default())?;
    }
    Ok(wish)
}

/// Takes in one `-o KEY=VALUE`.
fn set(wish: &mut NetworkWish, key: &str, value: &str) -> Result<(), String> {
    let wrong = |wanted: &str| format!("-o {key}={value}: {wanted}");
    match key {
        "ovl.network" => wish.name = Some(value.to_owned()),
        "ovl.encrypted" | "encrypted" => {
            wish.encrypted = Some(match value {
                "" | "true" | "1" => true,
                "false" | "0" => false,
                _ => return Err(wrong("true or false")),
            });
        }
        "ovl.mode" | "mode" => {
            wish.mode = Some(match value {
                "l2" => Mode::L2,
                "l3" => Mode::L3,
                _ => return Err(wrong("l2 or l3")),
            });
        }
        "ovl.backend" => {
            wish.backend = Some(match value {
                "vxlan" => Backend::Vxlan,
                "direct" => Backend::Direct,
                "auto" => Backend::Auto,
                _ => return Err(wrong("vxlan, direct or auto")),
            });
        }
        "ovl.vni" => wish.vni = Some(value.parse().map_err(|_| wrong("a number"))?),
        "ovl.mtu" | DRIVER_MTU => wish.mtu = Some(value.parse().map_err(|_| wrong("a number of bytes"))?),
        // Tools hand other drivers' options to all.
        _ if key.starts_with("com.docker.") => {}
        _ => {
            return Err(format!(
                "-o {key} is no option of ovl, which are ovl.network, ovl.encrypted, ovl.mode, ovl.backend, ovl.vni and \
                 ovl.mtu"
            ));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawId {
    #[serde(rename = "NetworkID")]
    network: String,
    #[serde(rename = "EndpointID", default)]
    endpoint: String,
    #[serde(rename = "Options", default)]
    options: Option<Map<String, Value>>,
}

fn which(raw: RawId) -> Result<EngineEndpoint, String> {
    Ok(EngineEndpoint { network: engine_id(raw.network)?, endpoint: engine_id(raw.endpoint)? })
}

#[derive(Deserialize)]
struct RawEndpoint {
    #[serde(flatten)]
    id: RawId,
    #[serde(rename = "Interface", default)]
    interface: Option<RawInterface>,
}

#[derive(Default, Deserialize)]
struct RawInterface {
    #[serde(rename = "Address", default)]
    v4: String,
    #[serde(rename = "AddressIPv6", default)]
    v6: String,
    #[serde(rename = "MacAddress", default)]
    mac: String,
}

fn endpoint(mut raw: RawEndpoint) -> Result<EndpointWish, String> {
    let options = raw.id.options.take().unwrap_or_default();
    let interface = raw.interface.unwrap_or_default();
    let id = which(raw.id)?;
    let mut addresses = Vec::new();
    for text in [&interface.v4, &interface.v6].into_iter().filter(|text| !text.is_empty()) {
        let net: IpNet = text.parse().map_err(|_| format!("{text:?} is no address with its length"))?;
        addresses.push(net.addr());
    }
    // We ask for one with our capabilities.
    let mac = interface.mac.parse().map_err(|_| format!("{:?} is no MAC address", interface.mac))?;
    if addresses.is_empty() {
        return Err("an endpoint without an address".to_owned());
    }
    let mut wish = EndpointWish {
        name: id.endpoint.chars().take(12).collect(),
        id,
        addresses,
        mac,
        aliases: Vec::new(),
        namespace: None,
        labels: BTreeMap::new(),
    };
    for (key, value) in &options {
        let Some(option) = key.strip_prefix("ovl.") else { continue };
        let value = value.as_str().unwrap_or_default();
        match option.split_once('.') {
            Some(("label", label)) if !label.is_empty() => {
                wish.labels.insert(label.to_owned(), value.to_owned());
            }
            _ => match option {
                "name" => wish.name = value.to_owned(),
                "alias" => wish.aliases = value.split(',').map(str::to_owned).collect(),
                "namespace" => wish.namespace = Some(value.to_owned()),
                _ => {
                    return Err(format!(
                        "{key} is no option of ovl for an endpoint, which are ovl.name, ovl.alias, ovl.namespace and \
                         ovl.label.KEY"
                    ));
                }
            },
        }
    }
    Ok(wish)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawPort {
    proto: u8,
    port: u16,
    #[serde(rename = "HostIP", default)]
    host_ip: String,
    #[serde(default)]
    host_port: u16,
    #[serde(default)]
    host_port_end: u16,
}

fn ports(options: &Option<Map<String, Value>>) -> Result<Vec<Publish>, String> {
    let Some(list) = options.as_ref().and_then(|options| options.get(PORTMAP)) else { return Ok(Vec::new()) };
    let raw: Option<Vec<RawPort>> = read(list)?;
    raw.unwrap_or_default().into_iter().map(port).collect()
}

/// An Engine gives a first and a last port of the host also where it means one, and 0 for any.
fn port(raw: RawPort) -> Result<Publish, String> {
    let transports = [Transport::Tcp, Transport::Udp, Transport::Sctp];
    let transport = transports.into_iter().find(|transport| transport.number() == raw.proto);
    let last = raw.host_port_end.max(raw.host_port);
    Ok(Publish {
        address: if raw.host_ip.is_empty() { None } else { Some(ip(&raw.host_ip)?) },
        host: (raw.host_port > 0).then_some(Ports { first: raw.host_port, last }),
        container: Ports::one(raw.port),
        transport: transport.ok_or_else(|| format!("ports of protocol {} cannot be published", raw.proto))?,
    })
}

/// With a length or without.
fn ip(text: &str) -> Result<IpAddr, String> {
    let alone = text.split_once('/').map_or(text, |(address, _)| address);
    alone.parse().map_err(|_| format!("{text:?} is no address"))
}

/// Ids become names of files.
fn engine_id(id: String) -> Result<String, String> {
    let proper = (1..=128).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric());
    if proper { Ok(id) } else { Err(format!("{id:?} is no id of an Engine")) }
}
