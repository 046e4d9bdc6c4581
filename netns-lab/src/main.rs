//! `netns-lab`: the command-line tool for simulated hosts. The commands are in `commands`.

mod commands;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use netns_lab::{Access, Underlay};

/// Simulate hosts in Linux network namespaces, each with its own ovld.
#[derive(Parser)]
#[command(name = "netns-lab", version, disable_help_subcommand = true)]
struct Cli {
    /// Name of the lab
    #[arg(long, global = true, default_value = "lab", env = "NETNS_LAB")]
    lab: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a lab of N hosts and start their daemons; it exists until `down`
    Up {
        /// Number of hosts
        #[arg(default_value_t = 3)]
        hosts: usize,
        /// Address families of the underlay
        #[arg(long, value_enum, default_value_t = UnderlayArg::V4)]
        underlay: UnderlayArg,
        /// Connect a host through a NAT box: `--nat h2=full-cone`, or that of another host: `--nat h3=h2`
        #[arg(long, value_name = "HOST=PRESET", value_parser = host_and_access)]
        nat: Vec<(String, Access)>,
        /// Give h2 IPv4 only, h3 IPv6 only and the others both, which they advertise
        #[arg(long, conflicts_with = "underlay")]
        families: bool,
        /// MTU of every link
        #[arg(long, default_value_t = 1500)]
        mtu: u32,
        /// File with TOML for every daemon's configuration
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Create the hosts without starting their daemons
        #[arg(long)]
        no_start: bool,
    },
    /// Remove the lab and everything in it
    Down {
        /// Remove all labs, except those of running tests
        #[arg(long)]
        all: bool,
    },
    /// Show the hosts, daemons, links and faults
    Status,
    /// Run a command in the network namespace of a host, a workload (h1/web), a NAT box (n1) or the switch (sw)
    Exec {
        /// The namespace: HOST, HOST/WORKLOAD, sw, or a NAT box: nN of host N, c1 of a carrier
        place: String,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Run ovlctl with a host's daemon
    Ctl {
        /// Name of the host
        host: String,
        /// Arguments of ovlctl
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Add or remove workloads: network namespaces on a host
    #[command(subcommand)]
    Workload(WorkloadCommand),
    /// Test ping and TCP between all workloads, each attached under its own name
    Pairs,
    /// Start a host's daemon and wait until it is ready
    Start { host: String },
    /// Stop a host's daemon with SIGTERM
    Stop { host: String },
    /// Kill a host's daemon with SIGKILL
    Kill { host: String },
    /// Destroy a host with its daemon, workloads and namespace
    Destroy { host: String },
    /// Restore a destroyed host with its disk, without starting its daemon
    Restore { host: String },
    /// Plug or unplug a host's cable
    Link {
        host: String,
        #[arg(value_enum)]
        state: LinkState,
    },
    /// Change the MTU of a host's link
    Mtu {
        host: String,
        mtu: u32,
        /// Change only the switch port: larger packets are dropped silently
        #[arg(long)]
        port_only: bool,
    },
    /// Partition the hosts into groups: `partition h1,h2 h3`
    Partition {
        #[arg(required = true, value_name = "HOST,HOST...")]
        groups: Vec<String>,
    },
    /// Cut the links between pairs of hosts: `cut h1,h2 h1,h3`
    Cut {
        #[arg(required = true, value_name = "HOST,HOST")]
        pairs: Vec<String>,
        /// Only what the first host of each pair sends to the second one
        #[arg(long)]
        one_way: bool,
    },
    /// Connect a host through a NAT box, or show or change what it does
    ///
    /// The host gets other addresses. Its daemon is not notified.
    Nat {
        /// Name of the host
        #[arg(required_unless_present = "list")]
        host: Option<String>,
        /// A preset, `none`, or the host whose NAT box is to be shared
        #[arg(conflicts_with = "forget")]
        preset: Option<Access>,
        /// Show the presets
        #[arg(long, conflicts_with_all = ["host", "preset", "forget"])]
        list: bool,
        /// Make the host's NAT boxes forget their mappings
        #[arg(long)]
        forget: bool,
    },
    /// Give a host another outer address, as a provider or DHCP server does
    Renumber { host: String },
    /// End the partition, and all cuts
    Heal,
    /// Drop a percentage of all frames, or of the datagrams to one UDP port; 0 ends it
    Loss {
        percent: f64,
        #[arg(long, value_name = "PORT")]
        udp_port: Option<u16>,
    },
    /// Measure ovl's performance figures in separate labs
    #[command(disable_help_flag = true)]
    Bench {
        /// Arguments of netns-lab-bench: see `netns-lab bench --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Check that this machine can hold a lab
    Preflight,
    /// Remove the labs of dead processes
    Sweep,
}

#[derive(Subcommand)]
enum WorkloadCommand {
    /// Create a workload and print the path of its namespace
    Add { host: String, name: String },
    /// Delete a workload
    Rm { host: String, name: String },
}

#[derive(Clone, Copy, ValueEnum)]
enum UnderlayArg {
    V4,
    V6,
    Dual,
}

impl From<UnderlayArg> for Underlay {
    fn from(arg: UnderlayArg) -> Self {
        match arg {
            UnderlayArg::V4 => Underlay::V4,
            UnderlayArg::V6 => Underlay::V6,
            UnderlayArg::Dual => Underlay::Dual,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LinkState {
    Up,
    Down,
}

/// Parses `h2=full-cone`.
fn host_and_access(text: &str) -> Result<(String, Access)> {
    let (host, access) = text.split_once('=').context("must be HOST=PRESET, such as h2=full-cone")?;
    Ok((host.to_owned(), access.parse()?))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.lab, cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("netns-lab: {error:#}");
            if !nix::unistd::geteuid().is_root() {
                eprintln!("netns-lab: this needs root: try again with sudo");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(lab: &str, command: Command) -> Result<ExitCode> {
    use commands::{bench, control, exec, fault, nat, pairs, status, updown};
    match command {
        Command::Up { hosts, underlay, nat, families, mtu, config, no_start } => {
            let underlay = underlay.into();
            let wanted = updown::Wanted { hosts, underlay, nat, families, mtu, config, start: !no_start };
            updown::up(lab, &wanted)?;
        }
        Command::Down { all } => updown::down(lab, all)?,
        Command::Bench { args } => bench::bench(&args)?,
        Command::Preflight => updown::preflight()?,
        Command::Sweep => updown::sweep()?,
        Command::Status => status::status(lab)?,
        Command::Exec { place, command } => exec::exec(lab, &place, &command)?,
        Command::Ctl { host, args } => exec::ctl(lab, &host, &args)?,
        Command::Workload(WorkloadCommand::Add { host, name }) => control::workload_add(lab, &host, &name)?,
        Command::Workload(WorkloadCommand::Rm { host, name }) => control::workload_rm(lab, &host, &name)?,
        Command::Pairs => return pairs::pairs(lab),
        Command::Start { host } => control::start(lab, &host)?,
        Command::Stop { host } => control::stop(lab, &host)?,
        Command::Kill { host } => control::kill(lab, &host)?,
        Command::Destroy { host } => control::destroy(lab, &host)?,
        Command::Restore { host } => control::restore(lab, &host)?,
        Command::Link { host, state } => control::link(lab, &host, matches!(state, LinkState::Up))?,
        Command::Mtu { host, mtu, port_only } => control::mtu(lab, &host, mtu, port_only)?,
        Command::Partition { groups } => fault::partition(lab, &groups)?,
        Command::Cut { pairs, one_way } => fault::cut(lab, &pairs, one_way)?,
        Command::Nat { host: None, .. } => nat::list(),
        Command::Nat { host: Some(host), forget: true, .. } => nat::forget(lab, &host)?,
        Command::Nat { host: Some(host), preset: None, .. } => nat::show(lab, &host)?,
        Command::Nat { host: Some(host), preset: Some(access), .. } => nat::change(lab, &host, &access)?,
        Command::Renumber { host } => nat::renumber(lab, &host)?,
        Command::Heal => fault::heal(lab)?,
        Command::Loss { percent, udp_port } => fault::loss(lab, percent, udp_port)?,
    }
    Ok(ExitCode::SUCCESS)
}
