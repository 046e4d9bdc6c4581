//! Parses the calls of a Docker Engine.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Encrypt, Mode};
use ovl_proto::publish::{Ports, Publish, Transport};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{EngineEndpoint, Pool, SPACE, foreign};

/// The maximum length of a container name.
pub const MAX_NAME: usize = 253;

const GENERIC: &str = "com.docker.network.generic";
const INTERNAL: &str = "com.docker.network.internal";
const PORTMAP: &str = "com.docker.network.portmap";
const MAC: &str = "com.docker.network.endpoint.macaddress";
const DRIVER_MTU: &str = "com.docker.network.driver.mtu";
const GATEWAY: &str = "com.docker.network.gateway";
const ADDRESS_TYPE: &str = "RequestAddressType";

/// A parsed call.
#[derive(Debug, PartialEq)]
pub enum Call {
    /// Requests the protocols of the plugin.
    Activate,
    /// Requests the capabilities of the network driver.
    DriverCapabilities,
    /// Requests the capabilities of the IPAM driver.
    IpamCapabilities,
    /// Requests the names of the address spaces.
    AddressSpaces,
    /// Requests a pool for a network that is to be created.
    RequestPool(PoolWish),
    /// Requests an address of a pool.
    RequestAddress(AddressWish),
    /// Releases an address.
    ReleaseAddress {
        /// The pool of the address.
        pool: Pool,
        /// The address.
        address: IpAddr,
    },
    /// Creates or joins a network.
    CreateNetwork(Box<NetworkWish>),
    /// Leaves a network, by the Engine's id.
    DeleteNetwork(String),
    /// Creates an endpoint.
    CreateEndpoint(Box<EndpointWish>),
    /// Deletes an endpoint.
    DeleteEndpoint(EngineEndpoint),
    /// Requests the interface and routes for a container.
    Join(EngineEndpoint),
    /// Reports that a container was disconnected from the network.
    Leave(EngineEndpoint),
    /// Publishes ports of an endpoint.
    Publish(EngineEndpoint, Vec<Publish>),
    /// Unpublishes all ports of an endpoint.
    Revoke(EngineEndpoint),
    /// Requests a description of an endpoint.
    Describe(EngineEndpoint),
    /// Requires no action.
    Nothing,
}

/// A request for a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolWish {
    /// The requested prefix.
    pub prefix: Option<IpNet>,
    /// The network of the cluster whose subnet is requested.
    pub network: Option<String>,
    /// Whether the pool is for IPv6.
    pub v6: bool,
}

/// A request for an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressWish {
    /// The gateway, which the Engine shows: a given address, or any.
    Gateway(Pool, Option<IpAddr>),
    /// An address for an endpoint: a given address, or any.
    Endpoint(Pool, Option<IpAddr>),
}

/// A request to create or join a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkWish {
    /// The Engine's id of the network.
    pub id: String,
    /// The name in the cluster.
    pub name: Option<String>,
    /// The subnets, at most one of each family.
    pub prefixes: Vec<IpNet>,
    /// Whether the network has no gateway.
    pub internal: bool,
    /// Whether names outside of the cluster resolve on it although it is internal. `None`: as the existing network, or
    /// not.
    pub external_names: Option<bool>,
    /// When it is encrypted. `None`: as the existing network, or never.
    pub encrypt: Option<Encrypt>,
    /// The mode. `None`: as the existing network, or switched.
    pub mode: Option<Mode>,
    /// The VNI. `None`: as the existing network, or a free one.
    pub vni: Option<u32>,
    /// The MTU in bytes. `None`: as the existing network, or derived from the path MTUs.
    pub mtu: Option<u16>,
    /// The backend. `None`: as the existing network, or VXLAN.
    pub backend: Option<Backend>,
}

/// A request to create an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointWish {
    /// The Engine's ids.
    pub id: EngineEndpoint,
    /// The addresses, one of each family, all assigned by ovl's IPAM.
    pub addresses: Vec<IpAddr>,
    /// The MAC address of the interface.
    pub mac: Mac,
    /// The name in the cluster.
    pub name: String,
    /// Further names that resolve to it.
    pub aliases: Vec<String>,
    /// The Kubernetes namespace.
    pub namespace: Option<String>,
    /// The labels that selectors match.
    pub labels: BTreeMap<String, String>,
    /// Prefixes that it may send from, beside its own addresses.
    pub allowed: Vec<IpNet>,
    /// MAC addresses that it may send from, beside its own.
    pub allowed_macs: Vec<Mac>,
}

/// Parses a call from its path without the slash, and its body.
///
/// # Errors
///
/// A message for the user if the call is unknown or invalid.
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
        // A subnet belongs to its network and is deleted with it. ovld itself knows the other hosts.
        "IpamDriver.ReleasePool" | "NetworkDriver.DiscoverNew" | "NetworkDriver.DiscoverDelete" => {
            Call::Nothing
        }
        other => return Err(format!("unknown call {other}: ovl does not support it")),
    })
}

/// Whether a call can be completed later. This applies to deletions: an Engine goes on even if they fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Later {
    /// It cannot be completed later.
    No,
    /// Another call, which the Engine sends too, has the same effect.
    Follows,
    /// It must be stored under this name.
    Keep(String),
}

/// Returns whether a call can be completed later if ovld is unavailable.
pub fn later(call: &Call) -> Later {
    match call {
        Call::DeleteEndpoint(id) | Call::Leave(id) => Later::Keep(format!("endpoint-{}", id.endpoint)),
        Call::DeleteNetwork(id) => Later::Keep(format!("network-{id}")),
        Call::Revoke(id) => Later::Keep(format!("revoke-{}", id.endpoint)),
        Call::ReleaseAddress { .. } => Later::Follows,
        _ => Later::No,
    }
}

/// Deserializes a body; null is a body without fields.
fn read<T: DeserializeOwned>(body: &Value) -> Result<T, String> {
    let empty = Value::Object(Map::new());
    let body = if body.is_null() { &empty } else { body };
    T::deserialize(body).map_err(|error| format!("invalid body of the call: {error}"))
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
        return Err(format!("address space {:?} is not supported: ovl has only {SPACE}", raw.address_space));
    }
    if !raw.sub_pool.is_empty() {
        return Err(format!(
            "ovl itself divides a network's subnet among the hosts: omit --ip-range {}",
            raw.sub_pool
        ));
    }
    let mut network = None;
    for (key, value) in raw.options.into_iter().flatten() {
        match key.as_str() {
            "ovl.network" => network = Some(value),
            _ => return Err(format!("--ipam-opt {key} is not supported: ovl has only ovl.network=NAME")),
        }
    }
    let prefix = match raw.pool.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| format!("invalid subnet {text:?}"))?),
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
            "ovl does not support --aux-address{}: reserve the address for an endpoint outside of Docker with `ovlctl attach --ip`",
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
                "ovl allocates the addresses of a network for all hosts together: add --ipam-driver ovl"
                    .to_owned(),
            );
        }
        let prefix: IpNet = range.pool.parse().map_err(|_| format!("invalid subnet {:?}", range.pool))?;
        if prefixes.iter().any(|other| other.addr().is_ipv4() == prefix.addr().is_ipv4()) {
            return Err(format!(
                "{prefix} is a second subnet of its family: a network has at most one IPv4 and one IPv6 subnet"
            ));
        }
        prefixes.push(prefix);
    }
    if prefixes.is_empty() {
        return Err("the network has no subnet: add --ipam-driver ovl".to_owned());
    }
    let options = raw.options.unwrap_or_default();
    let mut wish = NetworkWish {
        id: engine_id(raw.id)?,
        name: None,
        prefixes,
        internal: options.get(INTERNAL).and_then(Value::as_bool).unwrap_or_default(),
        external_names: None,
        encrypt: None,
        mode: None,
        vni: None,
        mtu: None,
        backend: None,
    };
    let generic = options.get(GENERIC).and_then(Value::as_object);
    for (key, value) in generic.into_iter().flatten() {
        match value {
            Value::String(text) => set(&mut wish, key, text)?,
            Value::Null => set(&mut wish, key, "")?,
            other => set(&mut wish, key, &other.to_string())?,
        }
    }
    Ok(wish)
}

/// Applies one `-o KEY=VALUE`.
fn set(wish: &mut NetworkWish, key: &str, value: &str) -> Result<(), String> {
    let wrong = |wanted: &str| format!("-o {key}={value}: expected {wanted}");
    match key {
        "ovl.network" => wish.name = Some(value.to_owned()),
        "ovl.encrypted" | "encrypted" => {
            wish.encrypt = Some(match truth(value) {
                Some(true) => Encrypt::Yes,
                Some(false) => Encrypt::No,
                None if value == "auto" => Encrypt::Auto,
                None => return Err(wrong("true, false or auto")),
            });
        }
        "ovl.external-names" => {
            wish.external_names = Some(truth(value).ok_or_else(|| wrong("true or false"))?);
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
        _ if key.starts_with("com.docker.") => foreign::set(&mut wish.vni, key, value)?,
        _ => {
            return Err(format!(
                "unknown option -o {key}: ovl has ovl.network, ovl.encrypted, ovl.mode, ovl.backend, ovl.vni, \
                 ovl.external-names and ovl.mtu"
            ));
        }
    }
    Ok(())
}

/// Parses the value of an option that is on or off. `None` if it is neither.
fn truth(value: &str) -> Option<bool> {
    match value {
        "" | "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
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
        let net: IpNet =
            text.parse().map_err(|_| format!("invalid address {text:?}: expected ADDRESS/LENGTH"))?;
        addresses.push(net.addr());
    }
    // The Engine sends one because of `RequiresMACAddress` in the capabilities.
    let mac = interface.mac.parse().map_err(|_| format!("invalid MAC address {:?}", interface.mac))?;
    if addresses.is_empty() {
        return Err("the endpoint has no address".to_owned());
    }
    let mut wish = EndpointWish {
        name: id.endpoint.chars().take(12).collect(),
        id,
        addresses,
        mac,
        aliases: Vec::new(),
        namespace: None,
        labels: BTreeMap::new(),
        allowed: Vec::new(),
        allowed_macs: Vec::new(),
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
                "allow-address" => {
                    let prefix = |text: &str| {
                        let single = || text.parse::<IpAddr>().ok().map(IpNet::from);
                        text.parse()
                            .ok()
                            .or_else(single)
                            .ok_or_else(|| format!("{key}: invalid prefix {text:?}"))
                    };
                    wish.allowed = value.split(',').map(prefix).collect::<Result<_, _>>()?;
                }
                "allow-mac" => {
                    let mac =
                        |text: &str| text.parse().map_err(|_| format!("{key}: invalid MAC address {text:?}"));
                    wish.allowed_macs = value.split(',').map(mac).collect::<Result<_, _>>()?;
                }
                _ => {
                    return Err(format!(
                        "unknown endpoint option {key}: ovl has ovl.name, ovl.alias, ovl.namespace, \
                         ovl.allow-address, ovl.allow-mac and ovl.label.KEY"
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

/// Parses a published port. An Engine sends a first and a last port of the host even for a single one, and 0 for any.
fn port(raw: RawPort) -> Result<Publish, String> {
    let transports = [Transport::Tcp, Transport::Udp, Transport::Sctp];
    let transport = transports.into_iter().find(|transport| transport.number() == raw.proto);
    let last = raw.host_port_end.max(raw.host_port);
    Ok(Publish {
        address: if raw.host_ip.is_empty() { None } else { Some(ip(&raw.host_ip)?) },
        host: (raw.host_port > 0).then_some(Ports { first: raw.host_port, last }),
        container: Ports::one(raw.port),
        transport: transport.ok_or_else(|| format!("cannot publish ports of protocol {}", raw.proto))?,
    })
}

/// Parses an address with or without a prefix length.
fn ip(text: &str) -> Result<IpAddr, String> {
    let alone = text.split_once('/').map_or(text, |(address, _)| address);
    alone.parse().map_err(|_| format!("invalid address {text:?}"))
}

/// Checks an id of an Engine, which becomes a file name.
fn engine_id(id: String) -> Result<String, String> {
    let proper = (1..=128).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric());
    if proper { Ok(id) } else { Err(format!("invalid id of an Engine {id:?}")) }
}
