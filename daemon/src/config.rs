//! The flags and the configuration file of ovld. A flag overrides the file, except that `--join` adds to it.

mod stubs;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use crate::modes::{DnsMode, FastPathMode, ProxyMode, Switch};
use anyhow::{Context, Result, bail};
use clap::Parser;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ovl_cluster::networks::overlaps;
use ovl_dataplane::device::Device;
use ovl_dns::StubDomain;
use ovl_proto::object::Encrypt;
use ovl_proto::record::{MAX_FURTHER, MAX_ZONE, is_zone};
use ovl_proto::{
    DEFAULT_PORT, DEFAULT_RELAY_PORT, DEFAULT_TUNNEL_PORT, DEFAULT_VXLAN_PORT, SEALED_VXLAN_PORT,
};
use ovl_subsystems::services::allocation::{NodePortRange, Ranges};
use serde::Deserialize;

use crate::web::Listen;

/// Path of the configuration file if `--config` is absent.
const DEFAULT_CONFIG: &str = "/etc/ovl/ovld.toml";

/// Domain under which the host resolves endpoints, as `NAME.NETWORK.ovl.internal`. The top-level domain
/// `internal` is reserved for private use.
pub(crate) const OWN_DOMAIN: &str = "ovl.internal";

/// Default address ranges of Services. Kubernetes clusters often use these.
const DEFAULT_SERVICE_RANGES: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112)),
];

/// Returns the long version: with the hashes of the eBPF programs, which are compiled apart.
fn long_version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let hash = |(name, object): (&str, &[u8])| {
            let digest = ring::digest::digest(&ring::digest::SHA256, object);
            let bytes = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
            format!("\n{name}: sha256:{}", bytes.collect::<String>())
        };
        ovl_proto::VERSION.to_owned() + &ovl_kernel::ebpf_objects().map(hash).concat()
    });
    &TEXT
}

/// The ovl daemon: builds overlay networks on this host and shares them with its peers by gossip.
#[derive(Debug, Parser)]
#[command(name = "ovld", version, long_version = long_version())]
pub(crate) struct Args {
    /// Configuration file; the default one may be missing
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This host's name in the cluster [default: the host name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// What must outlive a reboot [default: /var/lib/ovl]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Socket, lock, and what ends with the kernel [default: /run/ovl]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The address that peers reach this host by; repeat it for further ones: of the other family, or a forwarded port [default: the one
    /// that leads to the first --join, and that of the other family]
    #[arg(long, value_name = "ADDR[:PORT]")]
    advertise: Vec<String>,
    /// A host to join by; may be repeated. `kubernetes`: the Nodes of the API server, which ovl-kube names
    #[arg(long, value_name = "ADDR[:PORT]")]
    join: Vec<String>,
    /// Begin a new cluster if this host is in none, even with --join
    #[arg(long)]
    bootstrap: bool,
    /// The key that all hosts of the cluster share; `ovlctl key generate` makes one
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<PathBuf>,
    /// Run without a cluster key: anybody who reaches the port can join and listen
    #[arg(long)]
    insecure: bool,
    /// Who carries encrypted networks [default: auto]
    #[arg(long, value_name = "KIND")]
    tunnel: Option<TunnelMode>,
    /// UDP port of the tunnel [default: 51940]
    #[arg(long, value_name = "PORT")]
    tunnel_port: Option<u16>,
    /// UDP port of datagrams between hosts that reach each other only through others; 0: none [default: 7942]
    #[arg(long, value_name = "PORT")]
    relay_port: Option<u16>,
    /// Whether others cannot dial this host, which is reached where its datagrams come from then [default: as hosts to join see it]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    behind_nat: Option<bool>,
    /// Networks that are made by this host are encrypted; auto: where hosts have no path in plain text [default: no]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_missing_value = "yes")]
    encrypt: Option<Encrypt>,
    /// The file that names the resolvers for all names but ovl's [default: /etc/resolv.conf]
    #[arg(long, value_name = "FILE")]
    resolv_conf: Option<PathBuf>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
    /// Print the manual page, for packages
    #[arg(long, hide = true, exclusive = true)]
    pub(crate) man: bool,
}

/// The value of `advertise`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected an address or a list of addresses")]
enum Advertised {
    One(String),
    Several(Vec<String>),
}

impl From<Advertised> for Vec<String> {
    fn from(advertised: Advertised) -> Self {
        match advertised {
            Advertised::One(address) => vec![address],
            Advertised::Several(addresses) => addresses,
        }
    }
}

/// In place of a host to join through: the Nodes of a Kubernetes API server.
const JOIN_NODES: &str = "kubernetes";

/// In place of a range of Services: the ServiceCIDRs of a Kubernetes API server.
const FOLLOW_CIDRS: &str = "kubernetes";

/// The value of `relay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Relaying {
    /// Whether this host relays.
    Any(bool),
    /// It does, at most so many megabits a second for each pair of hosts.
    UpTo(NonZeroU32),
}

impl Relaying {
    /// Whether this host relays.
    pub(crate) fn is_on(self) -> bool {
        self != Self::Any(false)
    }

    /// The limit of each pair of hosts, in bytes a second. `None` if there is none.
    pub(crate) fn limit(self) -> Option<u64> {
        match self {
            Self::Any(_) => None,
            Self::UpTo(megabits) => Some(u64::from(megabits.get()) * 1_000_000 / 8),
        }
    }
}

/// The value of `encrypt`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"auto\"")]
enum Encrypting {
    Any(bool),
    When(Encrypt),
}

impl From<Encrypting> for Encrypt {
    fn from(encrypting: Encrypting) -> Self {
        match encrypting {
            Encrypting::Any(true) => Self::Yes,
            Encrypting::Any(false) => Self::No,
            Encrypting::When(when) => when,
        }
    }
}

/// An item of `service_range`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ServiceRange {
    Range(IpNet),
    Word(String),
}

/// Returns the configured ranges of Services, and whether those of ServiceCIDRs are followed.
fn service_ranges(items: Option<Vec<ServiceRange>>) -> Result<(Vec<IpNet>, bool)> {
    let Some(items) = items else { return Ok((DEFAULT_SERVICE_RANGES.to_vec(), false)) };
    let (mut ranges, mut follows) = (Vec::new(), false);
    for item in items {
        match item {
            ServiceRange::Range(range) => ranges.push(range),
            ServiceRange::Word(word) if word == FOLLOW_CIDRS => follows = true,
            ServiceRange::Word(word) => {
                bail!(
                    "service_range: '{word}' is neither a prefix such as 10.96.0.0/16 nor \"{FOLLOW_CIDRS}\""
                )
            }
        }
    }
    Ok((ranges, follows))
}

/// The configuration file. Its keys have the names of the flags.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    node: Option<String>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    advertise: Option<Advertised>,
    #[serde(default)]
    join: Vec<String>,
    #[serde(default)]
    bootstrap: bool,
    cluster_key: Option<PathBuf>,
    #[serde(default)]
    insecure: bool,
    log: Option<String>,
    vxlan_port: Option<u16>,
    #[serde(default, with = "humantime_serde::option")]
    gossip_interval: Option<Duration>,
    #[serde(default, with = "humantime_serde::option")]
    keep: Option<Duration>,
    #[serde(default, with = "humantime_serde::option")]
    forget_after: Option<Duration>,
    pool: Option<IpNet>,
    service_range: Option<Vec<ServiceRange>>,
    load_balancer_pool: Option<Vec<IpNet>>,
    external_ranges: Option<Vec<IpNet>>,
    node_port_range: Option<String>,
    load_balancer_device: Option<String>,
    #[serde(default)]
    zone: String,
    cluster_domain: Option<String>,
    masquerade: Option<bool>,
    #[serde(default)]
    tunnel: TunnelMode,
    tunnel_port: Option<u16>,
    relay_port: Option<u16>,
    relay: Option<Relaying>,
    behind_nat: Option<bool>,
    encrypt: Option<Encrypting>,
    resolv_conf: Option<PathBuf>,
    #[serde(default)]
    dns_listen: Vec<SocketAddr>,
    walk_search_lists: Option<bool>,
    #[serde(default)]
    proxy: ProxyMode,
    #[serde(default)]
    dns: DnsMode,
    #[serde(default)]
    policy: Switch,
    #[serde(default)]
    fast_path: FastPathMode,
    metrics_listen: Option<String>,
    ui_listen: Option<String>,
    ui_token_file: Option<PathBuf>,
    #[serde(default)]
    stub_domains: BTreeMap<String, Vec<String>>,
}

/// Implementation of the tunnel that carries encrypted networks between hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TunnelMode {
    /// The kernel, if it can; found out once, at the start.
    #[default]
    Auto,
    /// The kernel, or nobody.
    Kernel,
    /// This process.
    Userspace,
}

/// The address of this host cannot be determined. This error may be temporary, unlike all other errors of
/// [`Config::load`], which last until the configuration is changed.
#[derive(Debug, thiserror::Error)]
#[error("the address of this host is not clear")]
pub(crate) struct NoAddress;

/// All settings, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this host in the cluster.
    pub(crate) node: String,
    /// State directory: the files that must outlive a reboot.
    pub(crate) state_dir: PathBuf,
    /// Run directory: the control socket, the lock and the state that ends with the kernel.
    pub(crate) run_dir: PathBuf,
    /// Main address at which peers reach this host.
    pub(crate) advertise: SocketAddr,
    /// Further addresses at which peers reach it. `None`: that of the other family, if it has one.
    pub(crate) further: Option<Vec<SocketAddr>>,
    /// Hosts through which to join, as `host:port`.
    pub(crate) join: Vec<String>,
    /// Whether to join through the Nodes of a Kubernetes API server, which `ovl-kube` names.
    pub(crate) join_nodes: bool,
    /// Whether to begin a new cluster if this host is in none.
    pub(crate) bootstrap: bool,
    /// File with the cluster key. `None` if `insecure` is set.
    pub(crate) cluster_key: Option<PathBuf>,
    /// Least severe level that is logged.
    pub(crate) log: tracing::Level,
    /// UDP port of the VXLAN devices.
    pub(crate) vxlan_port: u16,
    /// Time between two rounds of gossip.
    pub(crate) gossip_interval: Duration,
    /// How long the entries of a suspect host stay in use: its daemon is silent, but its kernel answers.
    pub(crate) keep: Duration,
    /// Time after which a dead host is forgotten and its blocks are free. Zero means never.
    pub(crate) forget_after: Duration,
    /// Pool from which a network gets its subnet if `--subnet` is absent.
    pub(crate) pool: IpNet,
    /// Ranges from which Services get their addresses.
    pub(crate) ranges: Ranges,
    /// Device on which the addresses of LoadBalancers are announced. `None` means the device with this host's
    /// own address.
    pub(crate) load_balancer_device: Option<Device>,
    /// Zone that this host is in: Services can prefer backends of a zone. May be empty.
    pub(crate) zone: String,
    /// DNS domain under which the names of Services are resolved.
    pub(crate) cluster_domain: String,
    /// Whether traffic that leaves the cluster is masqueraded with this host's address.
    pub(crate) masquerade: bool,
    /// Implementation of the tunnel that carries encrypted networks.
    pub(crate) tunnel: TunnelMode,
    /// UDP port of the tunnel.
    pub(crate) tunnel_port: u16,
    /// UDP port of relayed datagrams; 0 if this host takes no part in them.
    pub(crate) relay_port: u16,
    /// Whether this host relays for hosts that do not reach each other.
    pub(crate) relay: Relaying,
    /// Whether others cannot dial this host, because it is behind NAT. `None`: as hosts to join see it.
    pub(crate) behind_nat: Option<bool>,
    /// How every network that this host creates is encrypted at least, even if the request does not ask for it.
    pub(crate) encrypt: Encrypt,
    /// File with the upstream resolvers for all names that ovl does not serve.
    pub(crate) resolv_conf: PathBuf,
    /// Addresses at which the resolver listens for queries of the host itself.
    pub(crate) dns_listen: Vec<SocketAddr>,
    /// Whether the resolver walks the search list of a pod on its behalf.
    pub(crate) walk_search_lists: bool,
    /// Whether this host translates addresses of Services.
    pub(crate) proxy: ProxyMode,
    /// Whether endpoints of this host have a resolver.
    pub(crate) dns: DnsMode,
    /// Whether network policies are in force on this host.
    pub(crate) policy: Switch,
    /// Whether packets take the fast path.
    pub(crate) fast_path: FastPathMode,
    /// Where metrics are served over HTTP. `None` if they are not.
    pub(crate) metrics_listen: Option<Listen>,
    /// Where the page is served over HTTP: on loopback, or at a Unix socket. `None` if it is not.
    pub(crate) ui_listen: Option<Listen>,
    /// File with the token that browsers must send. `None` if they need none.
    pub(crate) ui_token_file: Option<PathBuf>,
    /// Domains that are forwarded to resolvers of their own.
    pub(crate) stub_domains: Vec<StubDomain>,
}

impl Config {
    /// Reads the configuration from command-line arguments and the file that they name. The first argument is
    /// the name of the program.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        Self::load(Args::try_parse_from(args)?)
    }

    /// Reads the file that the flags name and merges it with the flags.
    pub(crate) fn load(args: Args) -> Result<Self> {
        let file = read_file(args.config.as_deref())?;
        let mut join: Vec<&String> = file.join.iter().chain(&args.join).collect();
        let all = join.len();
        join.retain(|peer| *peer != JOIN_NODES);
        let join_nodes = join.len() < all;
        let join: Vec<String> =
            join.into_iter().map(|peer| with_port("join", peer, DEFAULT_PORT)).collect::<Result<_>>()?;
        let advertised = match args.advertise.is_empty() {
            true => file.advertise.map(Vec::from).unwrap_or_default(),
            false => args.advertise,
        };
        let parse = |text: &String| parse_address("advertise", text, DEFAULT_PORT);
        let advertised: Vec<SocketAddr> = advertised.iter().map(parse).collect::<Result<_>>()?;
        let (advertise, further) = match advertised.split_first() {
            Some((main, further)) => (*main, Some(further.to_vec())),
            None => (SocketAddr::new(own_address(&join).context(NoAddress)?, DEFAULT_PORT), None),
        };
        let (services, follows_cidrs) = service_ranges(file.service_range)?;
        let listen = |key: &str, text: Option<String>| {
            text.map(|text| Listen::parse(&text).map_err(|why| anyhow::anyhow!("{key}: {why}"))).transpose()
        };
        let state_dir = args.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/ovl".into());
        let ui_listen = listen("ui_listen", file.ui_listen)?;
        let insecure = args.insecure || file.insecure;
        let cluster_key = args.cluster_key.or(file.cluster_key);
        match (&cluster_key, insecure) {
            (None, false) => bail!(
                "no cluster key: make one with `ovlctl key generate`, give the same file to all hosts with \
                 --cluster-key FILE, or say --insecure to run without protection"
            ),
            (Some(_), true) => bail!("both a cluster key and --insecure are given: choose one"),
            (Some(_), false) | (None, true) => {}
        }
        let config = Self {
            node: match args.node.or(file.node) {
                Some(name) => name,
                None => nix::unistd::gethostname()
                    .context("reading the host name")?
                    .into_string()
                    .map_err(|name| anyhow::anyhow!("the host name {name:?} is not UTF-8: use --node"))?,
            },
            run_dir: args.run_dir.or(file.run_dir).unwrap_or_else(|| "/run/ovl".into()),
            advertise,
            further,
            bootstrap: args.bootstrap || file.bootstrap || (join.is_empty() && !join_nodes),
            join,
            join_nodes,
            cluster_key,
            log: args
                .log
                .or(file.log)
                .as_deref()
                .unwrap_or("info")
                .parse()
                .map_err(|_| anyhow::anyhow!("log: use error, warn, info, debug or trace"))?,
            vxlan_port: file.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT),
            gossip_interval: file.gossip_interval.unwrap_or(Duration::from_millis(500)),
            keep: file.keep.unwrap_or(Duration::from_secs(300)),
            forget_after: file.forget_after.unwrap_or(Duration::from_secs(7 * 24 * 3600)),
            pool: match file.pool {
                Some(pool) => pool,
                None => "10.128.0.0/9".parse().context("the default pool")?,
            },
            ranges: Ranges {
                services,
                dns: file.dns.cluster_dns(),
                follows_cidrs,
                load_balancers: file.load_balancer_pool.unwrap_or_default(),
                external: file.external_ranges.unwrap_or_default(),
                node_ports: match file.node_port_range {
                    Some(text) => text.parse().context("node_port_range")?,
                    None => NodePortRange::default(),
                },
            },
            load_balancer_device: file
                .load_balancer_device
                .map(|name| {
                    Device::new(&name)
                        .with_context(|| format!("load_balancer_device: '{name}' is no name of a device"))
                })
                .transpose()?,
            zone: file.zone,
            cluster_domain: file.cluster_domain.unwrap_or_else(|| "cluster.local".to_owned()),
            masquerade: file.masquerade.unwrap_or(true),
            tunnel: args.tunnel.unwrap_or(file.tunnel),
            tunnel_port: args.tunnel_port.or(file.tunnel_port).unwrap_or(DEFAULT_TUNNEL_PORT),
            relay_port: args.relay_port.or(file.relay_port).unwrap_or(DEFAULT_RELAY_PORT),
            relay: file.relay.unwrap_or(Relaying::Any(true)),
            behind_nat: args.behind_nat.or(file.behind_nat),
            encrypt: args.encrypt.or(file.encrypt.map(Encrypt::from)).unwrap_or_default(),
            resolv_conf: args.resolv_conf.or(file.resolv_conf).unwrap_or_else(|| "/etc/resolv.conf".into()),
            dns_listen: file.dns_listen,
            walk_search_lists: file.walk_search_lists.unwrap_or(true),
            proxy: file.proxy,
            dns: file.dns,
            policy: file.policy,
            fast_path: file.fast_path,
            metrics_listen: listen("metrics_listen", file.metrics_listen)?,
            // All users of the host reach loopback. A Unix socket is for root alone.
            ui_token_file: file
                .ui_token_file
                .or_else(|| matches!(ui_listen, Some(Listen::Tcp(_))).then(|| state_dir.join("ui-token"))),
            ui_listen,
            state_dir,
            stub_domains: file.stub_domains.iter().map(stubs::parse).collect::<Result<_>>()?,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if !is_name(&self.node) {
            bail!("node: '{}' is no name: letters, digits, '-', '_' and '.', at most 63", self.node);
        }
        if !is_zone(&self.zone) {
            bail!(
                "zone: '{}' is no name of a zone: letters, digits, '-', '_' and '.', at most {MAX_ZONE}",
                self.zone
            );
        }
        let further = self.further.as_deref().unwrap_or_default();
        for (n, address) in [self.advertise].iter().chain(further).enumerate() {
            if address.ip().is_unspecified() || address.ip().is_multicast() || (n > 0 && address.port() == 0)
            {
                bail!("advertise: {address} is not an address of one host");
            }
            if [self.advertise].iter().chain(further).take(n).any(|other| other == address) {
                bail!("advertise: {address} is there twice");
            }
        }
        if further.len() > MAX_FURTHER {
            bail!("advertise: {} addresses, and at most {} are used", further.len() + 1, MAX_FURTHER + 1);
        }
        if self.vxlan_port == 0 {
            bail!("vxlan_port: 0 is not a port");
        }
        if self.vxlan_port == SEALED_VXLAN_PORT {
            bail!("vxlan_port: {SEALED_VXLAN_PORT} is for VXLAN inside the tunnel");
        }
        if self.tunnel_port & 1 == 1 {
            bail!(
                "tunnel_port: {} is odd: the tunnel has an even port, and the next one too while keys are rotated",
                self.tunnel_port
            );
        }
        if self.tunnel_port == 0 {
            bail!("tunnel_port: 0 is not a port");
        }
        let others = [self.vxlan_port, self.advertise.port(), SEALED_VXLAN_PORT];
        if others.iter().any(|other| *other & !1 == self.tunnel_port) {
            bail!("tunnel_port: {} is in use by ovld for something else", self.tunnel_port);
        }
        if others.contains(&self.relay_port) || self.relay_port & !1 == self.tunnel_port {
            bail!("relay_port: {} is in use by ovld for something else", self.relay_port);
        }
        if !(Duration::from_millis(50)..=Duration::from_secs(5)).contains(&self.gossip_interval) {
            bail!("gossip_interval: between 50ms and 5s");
        }
        if let Some(address) = self.dns_listen.iter().find(|address| !address.ip().is_loopback()) {
            bail!("dns_listen: {address} is not on loopback: who asks there sees the names of all networks");
        }
        if let Some(listen) = self.ui_listen.as_ref().filter(|listen| !listen.is_local()) {
            bail!(
                "ui_listen: {listen} is not on loopback: docs/page.md says how to reach the page from elsewhere"
            );
        }
        if self.pool.prefix_len() > if self.pool.addr().is_ipv4() { 24 } else { 64 } {
            bail!("pool: {} is too small to cut networks from", self.pool);
        }
        let labels: Vec<&str> = self.cluster_domain.split('.').collect();
        let is_label = |label: &&str| is_name(label) && !label.contains('_') && !label.ends_with('-');
        if self.cluster_domain.len() > 200 || !labels.iter().all(is_label) {
            bail!("cluster_domain: '{}' is no DNS name", self.cluster_domain);
        }
        stubs::check(self)?;
        self.check_ranges()
    }

    fn check_ranges(&self) -> Result<()> {
        let Ranges { services, load_balancers, external, .. } = &self.ranges;
        let families = services.iter().filter(|range| range.addr().is_ipv4()).count();
        if families > 1 || services.len() - families > 1 {
            bail!("service_range: at most one range of IPv4 and one of IPv6");
        }
        for range in services {
            if range.prefix_len() > if range.addr().is_ipv4() { 27 } else { 123 } {
                bail!("service_range: {range} is too small");
            }
        }
        let all: Vec<(&str, IpNet)> = services
            .iter()
            .map(|range| ("service_range", *range))
            .chain(load_balancers.iter().map(|pool| ("load_balancer_pool", *pool)))
            .chain(external.iter().map(|range| ("external_ranges", *range)))
            .collect();
        for (n, (name, range)) in all.iter().enumerate() {
            if *range != range.trunc() {
                bail!("{name}: {range} has bits behind its prefix; {} is meant", range.trunc());
            }
            if let Some((other, taken)) = all.iter().take(n).find(|(_, other)| overlaps(*range, *other)) {
                bail!("{name}: {range} overlaps {other} {taken}");
            }
        }
        Ok(())
    }
}

/// Longest name of a host, network or endpoint, in bytes. It fits a DNS label and a column of a listing.
pub(crate) const MAX_NAME: usize = 63;

/// Whether a string is a valid name of a host, network or endpoint.
pub(crate) fn is_name(name: &str) -> bool {
    is_name_within(name, MAX_NAME)
}

/// Like [`is_name`], with another maximum length. Kubernetes gives pods longer names.
///
/// A dot at the end is refused, because `web.` and `web` are one name in DNS; so are two dots in a row, which no name in
/// DNS has.
pub(crate) fn is_name_within(name: &str, longest: usize) -> bool {
    is_known_name(name, longest) && name.split('.').all(|label| !label.is_empty())
}

/// Whether a host of any release may have written a name. Earlier ones accepted a dot at the end and two in a row.
pub(crate) fn is_known_name(name: &str, longest: usize) -> bool {
    (1..=longest).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

fn read_file(path: Option<&Path>) -> Result<File> {
    let (path, required) = path.map_or((Path::new(DEFAULT_CONFIG), false), |path| (path, true));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return Ok(File::default()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    // The error of the TOML reader shows the line.
    toml::from_str(&text).with_context(|| format!("in {}", path.display()))
}

/// Adds the default port to an address that has none. Accepts `host`, `host:port`, `addr`, `[addr]:port` and
/// a bare IPv6 address.
fn with_port(setting: &str, text: &str, port: u16) -> Result<String> {
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port).to_string());
    }
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let full = if has_port { text.to_owned() } else { format!("{text}:{port}") };
    if text.is_empty() || full.contains(char::is_whitespace) {
        bail!("{setting}: '{text}' is not ADDR[:PORT]");
    }
    Ok(full)
}

fn parse_address(setting: &str, text: &str, port: u16) -> Result<SocketAddr> {
    with_port(setting, text, port)?
        .parse()
        .map_err(|_| anyhow::anyhow!("{setting}: '{text}' is not ADDR[:PORT]; host names are not taken here"))
}

/// Returns the source address that this host would use for the first peer of `join`, or for the default route
/// if there is none. Connecting a UDP socket consults the routing table and sends nothing.
///
/// # Errors
///
/// The first peer cannot be resolved, or there is no route to it.
fn own_address(join: &[String]) -> Result<IpAddr> {
    let target = match join.first() {
        // A name that cannot be resolved yet must not select another route: its source address could be
        // wrong.
        Some(peer) => peer
            .to_socket_addrs()
            .ok()
            .and_then(|mut found| found.next())
            .with_context(|| format!("join: {peer} cannot be resolved, and --advertise is not given"))?,
        None => SocketAddr::from(([192, 0, 2, 1], DEFAULT_PORT)),
    };
    source_to(target).with_context(|| {
        format!("no route to {target}, so the address of this host is not clear: give it with --advertise")
    })
}

/// Returns the source address that this host would use for a destination.
fn source_to(target: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr =
        if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// Returns the address of this host that it would use for the default route of an address family. `None` if it has no such route.
pub(crate) fn default_source(ipv4: bool) -> Option<IpAddr> {
    // Of the ranges for documentation, to which no other routes lead.
    let target: IpAddr = match ipv4 {
        true => Ipv4Addr::new(192, 0, 2, 1).into(),
        false => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    source_to(SocketAddr::new(target, DEFAULT_PORT)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn load(args: &[&str], file: &str) -> Result<Config> {
        let dir = std::env::temp_dir().join(format!("ovl-config-{}-{:p}", std::process::id(), &args));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("ovld.toml");
        std::fs::write(&path, file).unwrap();
        let mut all = vec!["ovld", "--config", path.to_str().unwrap()];
        all.extend(args);
        let result = Config::load(Args::parse_from(all));
        std::fs::remove_dir_all(&dir).unwrap();
        result
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = "node = 'a'\nadvertise = '10.0.0.1'\njoin = ['10.0.0.2']\ninsecure = true\nkeep = '1m'\n";
        let config = load(&["--node", "b", "--join", "c:7000"], file).unwrap();
        assert_eq!(config.node, "b");
        assert_eq!(config.join, ["10.0.0.2:7940", "c:7000"]);
        assert_eq!(config.advertise, "10.0.0.1:7940".parse().unwrap());
        assert_eq!(config.keep, Duration::from_secs(60));
        assert!(!config.bootstrap);
    }

    #[test]
    fn further_addresses_are_given_as_a_list_or_by_repeated_flags() {
        let addresses = |args: &[&str], file: &str| {
            let config = load(&[&["--insecure"], args].concat(), file)?;
            Ok::<_, anyhow::Error>((config.advertise, config.further))
        };
        let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let both = (at("10.0.0.1:7940"), Some(vec![at("[fd00::1]:7940"), at("203.0.113.1:4000")]));
        let file = "advertise = ['10.0.0.1', 'fd00::1', '203.0.113.1:4000']";
        assert_eq!(addresses(&[], file).unwrap(), both);
        let flags = ["10.0.0.1", "fd00::1", "203.0.113.1:4000"].map(|address| ["--advertise", address]);
        assert_eq!(addresses(&flags.concat(), "advertise = '10.0.0.9'").unwrap(), both);
        assert_eq!(addresses(&[], "advertise = '10.0.0.1'").unwrap(), (at("10.0.0.1:7940"), Some(vec![])));
        for bad in ["'10.0.0.1', '10.0.0.1:7940'", "'10.0.0.1', '::'", "'10.0.0.1', '10.0.0.2:0'"] {
            assert!(addresses(&[], &format!("advertise = [{bad}]")).is_err(), "{bad}");
        }
        let many: Vec<String> = (1..7).map(|n| format!("'10.0.0.{n}'")).collect();
        assert!(addresses(&[], &format!("advertise = [{}]", many.join(","))).is_err());
    }

    #[test]
    fn encryption_is_configured_as_a_flag_or_by_a_word() {
        let encrypt = |args: &[&str], file: &str| {
            let all = [&["--insecure", "--advertise", "10.0.0.1"], args].concat();
            load(&all, file).map(|config| config.encrypt)
        };
        assert_eq!(encrypt(&[], "").unwrap(), Encrypt::No);
        assert_eq!(encrypt(&[], "encrypt = true").unwrap(), Encrypt::Yes);
        assert_eq!(encrypt(&["--encrypt"], "encrypt = 'auto'").unwrap(), Encrypt::Yes);
        assert_eq!(encrypt(&["--encrypt", "auto"], "encrypt = false").unwrap(), Encrypt::Auto);
        let error = format!("{:#}", encrypt(&[], "encrypt = 'sometimes'").unwrap_err());
        assert!(error.contains("expected true, false or \"auto\""), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = format!("{:#}", load(&[], "insecure = true\nnodes = 'a'\n").unwrap_err());
        assert!(error.contains("line 2") && error.contains("nodes"), "{error}");
        let error = format!("{:#}", load(&[], "insecure = true\n\nvxlan_port = 'x'\n").unwrap_err());
        assert!(error.contains("line 3"), "{error}");
    }

    #[test]
    fn no_key_is_refused_with_advice() {
        let error = load(&["--advertise", "10.0.0.1"], "").unwrap_err().to_string();
        assert!(error.contains("ovlctl key generate") && error.contains("--insecure"), "{error}");
    }

    #[test]
    fn bad_values_are_refused() {
        for args in [
            ["--advertise", "0.0.0.0"],
            ["--advertise", "host"],
            ["--node", "a b"],
            ["--log", "loud"],
            ["--join", ""],
        ] {
            let mut all = vec!["--insecure"];
            all.extend(args);
            if args[0] != "--advertise" {
                all.extend(["--advertise", "10.0.0.1"]);
            }
            assert!(load(&all, "").is_err(), "{args:?}");
        }
    }

    #[test]
    fn join_addresses_get_the_port() {
        let with_port = |text| with_port("join", text, DEFAULT_PORT).unwrap();
        assert_eq!(with_port("fd00::1"), "[fd00::1]:7940");
        assert_eq!(with_port("[fd00::1]:80"), "[fd00::1]:80");
        assert_eq!(with_port("host"), "host:7940");
    }
}
