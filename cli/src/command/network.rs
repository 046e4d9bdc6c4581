//! `ovlctl network`

use std::str::FromStr;

use clap::{ArgGroup, Subcommand, ValueEnum};
use ovl_control::{NetworkCreate, NetworkInfo, Reply, Request};
use ovl_proto::object::{Backend, Driver, Mode};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{Table, block, list, maybe, yes};

/// Arguments of `network`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a network, known to all hosts at once, or one of this host alone
    Create(CreateArgs),
    /// Show all networks
    #[command(visible_alias = "list")]
    Ls,
    /// Show all that is known of one network
    Inspect {
        /// Name or id
        name: String,
    },
    /// Enlarge a network's ranges, or fix its MTU
    #[command(group = ArgGroup::new("change").args(["subnets", "mtu"]).required(true).multiple(true))]
    Update {
        /// Name or id
        name: String,
        /// A larger range that holds one that the network has; may be repeated
        #[arg(long = "subnet", value_name = "LARGER")]
        subnets: Vec<String>,
        /// Bytes; 0: what the paths carry
        #[arg(long, value_name = "N")]
        mtu: Option<u16>,
    },
    /// Remove a network that has no endpoints
    #[command(visible_alias = "remove")]
    Rm {
        /// Name or id
        name: String,
    },
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// Letters, digits, `-`, `_` and `.`, at most 63
    name: String,
    /// How it is built
    #[arg(long, value_enum, default_value_t = DriverArg::Overlay)]
    driver: DriverArg,
    /// What it carries
    #[arg(long, value_enum, default_value_t = ModeArg::L2)]
    mode: ModeArg,
    /// A range of addresses, for instance one for IPv4 and one for IPv6 [default: a free one]
    #[arg(long = "subnet", value_name = "CIDR")]
    subnets: Vec<String>,
    /// With --mode l3: the prefix length of each host's block; once for each --subnet, in their order
    /// [default: 24, or 64 for IPv6, where that leaves room for 16 hosts]
    #[arg(long = "block", value_name = "LENGTH")]
    block_lengths: Vec<u8>,
    /// With --mode l3: how packets reach other hosts [default: vxlan]
    #[arg(long, value_enum)]
    backend: Option<BackendArg>,
    /// VXLAN network identifier [default: a free one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    vni: Option<u32>,
    /// Send nothing between hosts but through the tunnel
    #[arg(long)]
    encrypted: bool,
    /// No gateway: endpoints reach each other and nothing else
    #[arg(long)]
    internal: bool,
    /// Bytes [default: what the paths carry]
    #[arg(long, value_name = "N")]
    mtu: Option<u16>,
    /// Let names resolve also on a bridge network that is called `default` or `bridge`
    #[arg(long)]
    dns: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DriverArg {
    // Stretched over hosts.
    Overlay,
    // On this host alone.
    Bridge,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeArg {
    // Ethernet: one subnet on all hosts.
    L2,
    // IP: each host has blocks of its own, and routes to those of the others.
    L3,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendArg {
    // In VXLAN.
    Vxlan,
    // As they are.
    Direct,
    // The one for hosts on our segment, the other for the rest.
    Auto,
}

/// Asks and prints.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Create(args) => changed(context, &Request::NetworkCreate(args.request()?)),
        Action::Update { name, subnets, mtu } => {
            changed(context, &Request::NetworkUpdate { name, subnets: ranges(&subnets)?, mtu })
        }
        Action::Rm { name } => context.ask_done(&Request::NetworkRm { name }),
        Action::Ls => {
            let Reply::Networks(networks) = context.ask(&Request::NetworkLs)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&networks, |networks| rows(networks))
        }
        Action::Inspect { name } => {
            context.print(&network(context, &Request::NetworkInspect { name })?, inspect)
        }
    }
}

/// A network that was made or changed is shown as its row of `network ls`.
fn changed(context: &Context, request: &Request) -> Result<()> {
    context.print(&network(context, request)?, |network| rows(std::slice::from_ref(network)))
}

fn network(context: &Context, request: &Request) -> Result<NetworkInfo> {
    let Reply::Network(network) = context.ask(request)? else { return Err(Error::unexpected_reply()) };
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
            encrypted: self.encrypted,
            internal: self.internal,
            mtu: self.mtu,
            backend: self.backend.map(|backend| match backend {
                BackendArg::Vxlan => Backend::Vxlan,
                BackendArg::Direct => Backend::Direct,
                BackendArg::Auto => Backend::Auto,
            }),
            block_lengths: self.block_lengths,
            dns: self.dns,
        })
    }
}

/// Ranges of addresses. Generic because `proto` does not pass on the name of its type.
fn ranges<T: FromStr>(texts: &[String]) -> Result<Vec<T>> {
    let range = |text: &String| {
        text.parse().map_err(|_| {
            Error::Usage(format!(
                "'{text}' is not a range of addresses. Write it like 10.1.0.0/16 or fd00:1::/64"
            ))
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

/// What was asked for beside the usual, and whether it is on its way out.
fn options(network: &NetworkInfo) -> String {
    let options = [
        (network.encrypted, "encrypted"),
        (network.internal, "internal"),
        (!network.dns, "no-dns"),
        (network.removing, "removing"),
    ];
    list(options.iter().filter(|(set, _)| *set).map(|(_, name)| name))
}

fn rows(networks: &[NetworkInfo]) -> String {
    Table::new()
        .column("NAME", networks.iter().map(|network| &network.name))
        .column("DRIVER", networks.iter().map(driver))
        .column("MODE", networks.iter().map(mode))
        .column("VNI", networks.iter().map(|network| network.vni))
        .column("SUBNETS", networks.iter().map(|network| list(&network.subnets)))
        .column("MTU", networks.iter().map(|network| network.mtu))
        .column("ENDPOINTS", networks.iter().map(|network| network.endpoints))
        .column("NODES", networks.iter().map(|network| network.nodes.len()))
        .unusual("OPTIONS", "", networks.iter().map(options))
        .render()
}

fn inspect(network: &NetworkInfo) -> String {
    block(&[
        ("Name", network.name.clone()),
        ("Id", network.id.to_string()),
        ("Driver", driver(network).to_owned()),
        ("Mode", mode(network).to_owned()),
        ("Backend", maybe(backend(network))),
        ("VNI", network.vni.to_string()),
        ("Subnets", list(&network.subnets)),
        ("Gateways", list(&network.gateways)),
        ("MTU", network.mtu.to_string()),
        ("Encrypted", yes(network.encrypted)),
        ("Internal", yes(network.internal)),
        ("Removing", yes(network.removing)),
        ("Endpoints", network.endpoints.to_string()),
        ("Nodes", list(&network.nodes)),
        ("Bridge", maybe(network.bridge.as_ref())),
        ("DNS", yes(network.dns)),
    ])
}

#[cfg(test)]
mod tests;
