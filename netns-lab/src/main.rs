//! `netns-lab`: simulated hosts for people. Each command is in a file of its own.

mod commands;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use netns_lab::Underlay;

/// Hosts simulated in Linux network namespaces, each with its ovld.
#[derive(Parser)]
#[command(name = "netns-lab", version, disable_help_subcommand = true)]
struct Cli {
    /// Which lab, where there are several
    #[arg(long, global = true, default_value = "lab", env = "NETNS_LAB")]
    lab: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a lab of N hosts and start the daemons; it stays until `down`
    Up {
        /// How many hosts
        #[arg(default_value_t = 3)]
        hosts: usize,
        /// The hosts' addresses
        #[arg(long, value_enum, default_value_t = UnderlayArg::V4)]
        underlay: UnderlayArg,
        /// The MTU of every link
        #[arg(long, default_value_t = 1500)]
        mtu: u32,
        /// TOML for every daemon's configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Make the hosts alone
        #[arg(long)]
        no_start: bool,
    },
    /// Remove the lab with everything in it
    Down {
        /// All labs but those of running tests
        #[arg(long)]
        all: bool,
    },
    /// Show hosts, daemons, links and faults
    Status,
    /// Run a command in the network namespace of a host, a workload (h1/web) or the switch (sw)
    Exec {
        /// HOST, HOST/WORKLOAD or sw
        place: String,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Run ovlctl against a host's daemon
    Ctl {
        /// Which host
        host: String,
        /// What ovlctl is to do
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Add or remove a workload: a network namespace on a host
    #[command(subcommand)]
    Workload(WorkloadCommand),
    /// Ping and TCP between all workloads, each attached under its own name
    Pairs,
    /// Start a host's daemon and wait until it is ready
    Start { host: String },
    /// Stop a host's daemon with SIGTERM
    Stop { host: String },
    /// Kill a host's daemon with SIGKILL
    Kill { host: String },
    /// Lose a machine: its daemon, workloads and namespace go at once
    Destroy { host: String },
    /// Bring a lost machine back, with its disk; start its daemon yourself
    Restore { host: String },
    /// Plug a host's cable in, or pull it
    Link {
        host: String,
        #[arg(value_enum)]
        state: LinkState,
    },
    /// Change the MTU of a host's link
    Mtu {
        host: String,
        mtu: u32,
        /// Leave the host's end as it is: larger packets vanish
        #[arg(long)]
        port_only: bool,
    },
    /// Cut groups of hosts off from each other: `partition h1,h2 h3`
    Partition {
        #[arg(required = true, value_name = "HOST,HOST...")]
        groups: Vec<String>,
    },
    /// End the partition
    Heal,
    /// Lose a share of all frames, or of the datagrams to one UDP port; 0 ends it
    Loss {
        percent: f64,
        #[arg(long, value_name = "PORT")]
        udp_port: Option<u16>,
    },
    /// Take the figures that ovl is measured by, in labs of their own
    #[command(disable_help_flag = true)]
    Bench {
        /// Arguments of netns-lab-bench: see `netns-lab bench --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Check that this machine can hold a lab
    Preflight,
    /// Remove the labs of processes that died
    Sweep,
}

#[derive(Subcommand)]
enum WorkloadCommand {
    /// Make one and print the path of its namespace
    Add { host: String, name: String },
    /// Delete one
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.lab, cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("netns-lab: {error:#}");
            if !nix::unistd::geteuid().is_root() {
                eprintln!("netns-lab: you are not root; try again with sudo");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(lab: &str, command: Command) -> Result<ExitCode> {
    use commands::{bench, control, exec, fault, pairs, status, updown};
    match command {
        Command::Up { hosts, underlay, mtu, config, no_start } => {
            let wanted = updown::Wanted { hosts, underlay: underlay.into(), mtu, config, start: !no_start };
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
        Command::Heal => fault::heal(lab)?,
        Command::Loss { percent, udp_port } => fault::loss(lab, percent, udp_port)?,
    }
    Ok(ExitCode::SUCCESS)
}
