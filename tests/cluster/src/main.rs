//! Scenarios on whole machines: Debian's kernel and systemd, the package, and nothing simulated.
//!
//! | module | content |
//! | --- | --- |
//! | [`machine`] | interface to a machine |
//! | [`qemu`] | machines under plain QEMU |
//! | [`vagrant`] | machines that `vagrant up` has started |
//! | [`scenario`] | the scenarios |
//! | [`world`], [`flow`] | helpers of the scenarios |
//!
//! `tests/cluster/qemu` and `tests/cluster/vagrant` build what this program needs, and run it.

mod flow;
mod machine;
mod packages;
mod qemu;
mod scenario;
mod vagrant;
mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use crate::machine::Machine;
use crate::scenario::{ALL, NEEDED, Scenario};
use crate::world::World;

/// Commands whose output is saved from every machine when a scenario fails.
const STATE: &[(&str, &str)] = &[
    ("journal", "journalctl --no-pager -b -o short-precise"),
    (
        "ovlctl",
        "for each in status peers 'network ls' endpoints subnets fdb routes plan verify 'events'; do echo \"# $each\"; timeout 20 ovlctl $each; done 2>&1",
    ),
    ("units", "systemctl --no-pager status ovld systemd-networkd 2>&1; systemctl --failed --no-pager"),
    ("links", "ip -d -s -s link; ip address; ip netns; networkctl --no-pager"),
    (
        "counters",
        "nstat -as; for each in $(ip netns list | cut -d ' ' -f 1); do echo \"# $each\"; ip netns exec $each nstat -as; done; \
         cat /proc/net/softnet_stat; conntrack -S; tc -s qdisc",
    ),
    ("routes", "ip route show table all; ip -6 route show table all; ip neigh; ip -6 neigh; bridge fdb"),
    ("rules", "nft list ruleset"),
    ("tunnel", "wg show all"),
];

/// Runs the scenarios on machines that it starts, or on those that Vagrant has started.
#[derive(Debug, Parser)]
struct Args {
    /// Directory with disk, kernel and initrd, made by tests/cluster/image
    #[arg(long, required_unless_present = "vagrant", conflicts_with = "vagrant")]
    image: Option<PathBuf>,
    /// Directory with a Vagrantfile whose machines are running
    #[arg(long)]
    vagrant: Option<PathBuf>,
    /// Tar archive with the packages
    #[arg(long)]
    files: PathBuf,
    /// Directory for consoles, sockets and the state of failed scenarios
    #[arg(long)]
    dir: PathBuf,
    /// Number of machines
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=9))]
    machines: u8,
    /// Run only scenarios whose name contains this, besides those that create the cluster
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Run only the scenarios for CI
    #[arg(long, conflicts_with = "only")]
    ci: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the scenarios. Returns whether all passed.
fn run(args: &Args) -> Result<bool> {
    fs::create_dir_all(&args.dir)?;
    let begin = Instant::now();
    let machines =
        start(args).with_context(|| format!("starting the machines (see {})", args.dir.display()))?;
    println!("{:<16} {:>6.1} s  {} machines", "(boot)", begin.elapsed().as_secs_f64(), machines.len());
    let world = World { machines: machines.iter().map(AsRef::as_ref).collect(), brief: args.ci };
    let (mut passed, mut failed) = (0, Vec::new());
    for (number, Scenario { name, run, ci }) in ALL.iter().enumerate() {
        let named = args.only.is_empty() || args.only.iter().any(|part| name.contains(part.as_str()));
        let chosen = named && (*ci || !args.ci);
        if number >= NEEDED && !chosen {
            continue;
        }
        let start = Instant::now();
        let result = run(&world);
        let seconds = start.elapsed().as_secs_f64();
        let (word, note) = match result {
            Ok(note) => {
                passed += 1;
                ("passed", note)
            }
            Err(error) => {
                failed.push(*name);
                let kept = args.dir.join(format!("failed-{name}"));
                let note = match keep_state(&world, &kept) {
                    Ok(()) => format!("{error:#}\n  state of the machines: {}", kept.display()),
                    Err(also) => {
                        format!("{error:#}\n  the state of the machines could not be saved: {also:#}")
                    }
                };
                ("FAILED", note)
            }
        };
        println!("{name:<16} {seconds:>6.1} s  {word}  {note}");
        if number < NEEDED && !failed.is_empty() {
            println!("the other scenarios are skipped, because they need the cluster");
            break;
        }
    }
    drop(world);
    drop(machines);
    let seconds = begin.elapsed().as_secs_f64();
    println!("{passed} passed, {} failed; {seconds:.0} s", failed.len());
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

fn start(args: &Args) -> Result<Vec<Box<dyn Machine>>> {
    fn boxed<M: Machine + 'static>(machines: Vec<M>) -> Vec<Box<dyn Machine>> {
        machines.into_iter().map(|machine| Box::new(machine) as Box<dyn Machine>).collect()
    }
    match (&args.image, &args.vagrant) {
        (Some(image), None) => qemu::start(args.machines, image, &args.files, &args.dir).map(boxed),
        (None, Some(folder)) => vagrant::connect(folder, &args.files, &args.dir).map(boxed),
        (None, None) | (Some(_), Some(_)) => bail!("either --image or --vagrant"),
    }
}

/// Saves the state of every machine, and prints the end of ovld's log.
fn keep_state(world: &World<'_>, dir: &Path) -> Result<()> {
    let written = world.on_all(|machine| {
        let dir = dir.join(machine.name());
        fs::create_dir_all(&dir)?;
        for (name, script) in STATE {
            fs::write(dir.join(name), machine.run(script)?.text())?;
        }
        machine.run("journalctl -u ovld --no-pager -n 15 -o short-precise").map(|ran| ran.text())
    });
    match written {
        Ok(ends) => {
            for (machine, end) in world.machines.iter().zip(ends) {
                println!("--- ovld on {}\n{end}", machine.name());
            }
            Ok(())
        }
        Err(error) => bail!(error),
    }
}
