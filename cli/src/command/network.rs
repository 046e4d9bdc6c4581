//! `ovlctl network`: manages networks.

use std::str::FromStr;

use clap::{ArgGroup, Subcommand, ValueEnum};
use ovl_control::{NetworkCreate, NetworkInfo, Reply, Request};
use ovl_proto::object::{Backend, Driver, Encrypt, Mode};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, key_value_block, optional, yes_no};

/// Arguments of `network`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create an overlay network on all hosts, or a bridge network on this host
    Create(CreateArgs),
    /// List all networks
    #[command(visible_alias = "list")]
    Ls,
    /// Show the details of a network
    Inspect {
        /// Name or id of the network
        name: String,
    },
    /// Enlarge a network's subnets, or set its MTU
    #[command(group = ArgGroup::new("change").args(["subnets", "mtu"]).required(true).multiple(true))]
    Update {
        /// Name or id of the network
        name: String,
        /// A larger subnet that contains a subnet of the network; may be repeated
        #[arg(long = "subnet", value_name = "LARGER")]
        subnets: Vec<String>,
        /// MTU in bytes; 0 follows the path MTU between the network's hosts
        #[arg(long, value_name = "N")]
        mtu: Option<u16>,
    },
    /// Remove a network that has no endpoints
    #[command(visible_alias = "remove")]
    Rm {
        /// Name or id of the network
        name: String,
    },
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// Name: at most 63 letters, digits, `-`, `_` and `.`
    name: String,
    /// Driver: overlay spans all hosts, bridge is local to this host
    #[arg(long, value_enum, default_value_t = DriverArg::Overlay)]
    driver: DriverArg,
    /// Mode: l2 carries Ethernet frames, l3 routes IP packets between the hosts
    #[arg(long, value_enum, default_value_t = ModeArg::L2)]
    mode: ModeArg,
    /// A subnet; may be repeated, for instance for IPv4 and IPv6 [default: a free one]
    #[arg(long = "subnet", value_name = "CIDR")]
    subnets: Vec<String>,
    /// With --mode l3: prefix length of each host's block; one for each --subnet, in their order
    /// [default: 24, or 64 for IPv6, if that leaves room for 16 hosts]
    #[arg(long = "block", value_name = "LENGTH")]
    block_lengths: Vec<u8>,
    /// With --mode l3: how packets reach other hosts [default: vxlan]
    #[arg(long, value_enum)]
    backend: Option<BackendArg>,
    /// VXLAN network identifier [default: a free one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    vni: Option<u32>,
    /// Encrypt all traffic between hosts
    #[arg(long, conflicts_with = "encrypt")]
    encrypted: bool,
    /// Encrypt traffic between hosts: yes, as --encrypted; auto only to hosts to which there is no path in plain text
    #[arg(long, value_enum, value_name = "WHEN")]
    encrypt: Option<EncryptArg>,
    /// Create no gateway: endpoints reach only each other and their resolver
    #[arg(long)]
    internal: bool,
    /// With --internal: resolve also names outside of the cluster, through the host's resolvers
    #[arg(long, requires = "internal")]
    external_names: bool,
    /// MTU in bytes [default: follows the path MTU between the network's hosts]
    #[arg(long, value_name = "N")]
    mtu: Option<u16>,
    /// Resolve names also on a bridge network named `default` or `bridge`
    #[arg(long)]
    dns: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DriverArg {
    // Spans all hosts.
    Overlay,
    // Local to this host.
    Bridge,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeArg {
    // Ethernet: all hosts share one subnet.
    L2,
    // IP: each host has its own blocks, and routes to the blocks of other hosts.
    L3,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendArg {
    // Encapsulated in VXLAN.
    Vxlan,
    // Without encapsulation, routed by the underlay.
    Direct,
    // Direct to hosts on the same link, VXLAN to other hosts.
    Auto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EncryptArg {
    // All traffic, and nothing is sent or accepted in plain text.
    Yes,
    // No traffic, unless ovld is configured otherwise.
    No,
    // To hosts behind NAT, and to those that are reached through members or over TCP.
    Auto,
}

/// Runs a subcommand.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Create(args) => changed(context, &Request::NetworkCreate(args.request()?)),
        Action::Update { name, subnets, mtu } => {
            changed(context, &Request::NetworkUpdate { name, subnets: ranges(&subnets)?, mtu })
        }
        Action::Rm { name } => context.request_done(&Request::NetworkRm { name }),
        Action::Ls => {
            let Reply::Networks(networks) = context.request(&Request::NetworkLs)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&networks, |networks| rows(networks))
        }
        Action::Inspect { name } => {
            context.print(&network(context, &Request::NetworkInspect { name })?, inspect)
        }
    }
}

/// Creates or changes a network and prints its row of `network ls`.
fn changed(context: &Context, request: &Request) -> Result<()> {
    context.print(&network(context, request)?, |network| rows(std::slice::from_ref(network)))
}

fn network(context: &Context, request: &Request) -> Result<NetworkInfo> {
    let Reply::Network(network) = context.request(request)? else { return Err(Error::unexpected_reply()) };
    Ok(*network)
}

impl CreateArgs {
    fn request(self) -> Result<NetworkCreate> {
        Ok(NetworkCreate {
            name: self.name,
            driver: match self.driver {
                DriverArg::Overlay => Driver::Overlay,
                DriverArg::Bridge => Driver::Bridge,
            },
            mode: match self.mode {
                ModeArg::L2 => Mode::L2,
                ModeArg::L3 => Mode::L3,
            },
            subnets: ranges(&self.subnets)?,
            vni: self.vni,
            encrypted: self.encrypted || self.encrypt == Some(EncryptArg::Yes),
            auto_encrypt: self.encrypt == Some(EncryptArg::Auto),
            internal: self.internal,
            mtu: self.mtu,
            backend: self.backend.map(|backend| match backend {
                BackendArg::Vxlan => Backend::Vxlan,
                BackendArg::Direct => Backend::Direct,
                BackendArg::Auto => Backend::Auto,
            }),
            block_lengths: self.block_lengths,
            dns: self.dns,
            external_names: self.external_names,
        })
    }
}

/// Parses subnets. Generic because `proto` does not re-export the type.
fn ranges<T: FromStr>(texts: &[String]) -> Result<Vec<T>> {
    let range = |text: &String| {
        text.parse().map_err(|_| {
            Error::Usage(format!("'{text}' is not a subnet. Write it like 10.1.0.0/16 or fd00:1::/64"))
        })
    };
    texts.iter().map(range).collect()
}

fn driver(network: &NetworkInfo) -> &'static str {
    match network.driver {
        Driver::Overlay => "overlay",
        Driver::Bridge => "bridge",
    }
}

fn mode(network: &NetworkInfo) -> &'static str {
    match network.mode {
        Mode::L2 => "l2",
        Mode::L3 => "l3",
    }
}

fn backend(network: &NetworkInfo) -> Option<&'static str> {
    network.backend.map(|backend| match backend {
        Backend::Vxlan => "vxlan",
        Backend::Direct => "direct",
        Backend::Auto => "auto",
    })
}

/// Lists the options that differ from the default, and `removing` if the network is being removed.
fn options(network: &NetworkInfo) -> String {
    let options = [
        (network.encrypted, "encrypted"),
        (network.encrypt == Encrypt::Auto, "encrypt-auto"),
        (network.internal, "internal"),
        (network.internal && network.external_names, "external-names"),
        (!network.dns, "no-dns"),
        (network.removing, "removing"),
    ];
    comma_separated(options.iter().filter(|(set, _)| *set).map(|(_, name)| name))
}

fn rows(networks: &[NetworkInfo]) -> String {
    TextTable::new()
        .column("NAME", networks.iter().map(|network| &network.name))
        .column("DRIVER", networks.iter().map(driver))
        .column("MODE", networks.iter().map(mode))
        .column("VNI", networks.iter().map(|network| network.vni))
        .column("SUBNETS", networks.iter().map(|network| comma_separated(&network.subnets)))
        .column("MTU", networks.iter().map(|network| network.mtu))
        .column("ENDPOINTS", networks.iter().map(|network| network.endpoints))
        .column("NODES", networks.iter().map(|network| network.nodes.len()))
        .optional_column("OPTIONS", "", networks.iter().map(options))
        .render()
}

fn inspect(network: &NetworkInfo) -> String {
    let mut pairs = vec![
        ("Name", network.name.clone()),
        ("Id", network.id.to_string()),
        ("Driver", driver(network).to_owned()),
        ("Mode", mode(network).to_owned()),
        ("Backend", optional(backend(network))),
        ("VNI", network.vni.to_string()),
        ("Subnets", comma_separated(&network.subnets)),
        ("Gateways", comma_separated(&network.gateways)),
        ("MTU", network.mtu.to_string()),
        ("Encrypted", network.encrypt.to_string()),
        ("Internal", yes_no(network.internal)),
        ("Removing", yes_no(network.removing)),
        ("Endpoints", network.endpoints.to_string()),
        ("Nodes", comma_separated(&network.nodes)),
        ("Bridge", optional(network.bridge.as_ref())),
        ("DNS", yes_no(network.dns)),
        ("External names", yes_no(network.external_names)),
    ];
    if network.encrypt == Encrypt::Auto {
        pairs.push(("Sealed to", comma_separated(&network.sealed_to)));
    }
    if !network.all_groups.is_empty() {
        pairs.push(("All groups", comma_separated(&network.all_groups)));
    }
    let block = key_value_block(&pairs);
    if network.groups.is_empty() {
        return block;
    }
    let groups = TextTable::new()
        .column("GROUP", network.groups.iter().map(|joined| joined.group))
        .column("NODES", network.groups.iter().map(|joined| comma_separated(&joined.nodes)))
        .render();
    format!("{block}\n{groups}")
}

#[cfg(test)]
mod tests;
