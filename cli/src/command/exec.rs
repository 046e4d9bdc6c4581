//! `ovlctl exec` and `ovlctl shell`: runs a program of the host in the network namespace of an endpoint.
//!
//! Only the network is the workload's: files, users and processes are the host's. The program replaces ovlctl, so its exit
//! status and signals are its own.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use ovl_control::{Netns, Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};

/// The program of `shell` if `SHELL` is not set.
const DEFAULT_SHELL: &str = "/bin/sh";
/// What programs read to find resolvers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Which endpoint.
#[derive(Debug, clap::Args)]
struct Target {
    /// The endpoint's name
    #[arg(value_name = "ENDPOINT")]
    name: String,
    /// The network, if workloads on several have that name
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// The endpoint's Kubernetes namespace [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
}

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    target: Target,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Arguments of `shell`.
#[derive(Debug, clap::Args)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    target: Target,
}

/// Runs a program in the namespace of an endpoint. Returns only if that fails.
pub(crate) fn exec(context: &Context, args: ExecArgs) -> Result<Infallible> {
    // clap requires one word at least.
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Error::Usage("name a program after `--`".to_owned()));
    };
    run(context, args.target, program, arguments)
}

/// Runs the user's shell in the namespace of an endpoint. Returns only if that fails.
pub(crate) fn shell(context: &Context, args: ShellArgs) -> Result<Infallible> {
    let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
    run(context, args.target, &shell.unwrap_or_else(|| DEFAULT_SHELL.into()), &[])
}

fn run(context: &Context, target: Target, program: &OsStr, arguments: &[OsString]) -> Result<Infallible> {
    let Target { name, network, namespace } = target;
    let request = Request::EndpointNetns { name: name.clone(), network, namespace };
    let Reply::Netns(netns) = context.request(&request)? else { return Err(Error::unexpected_reply()) };
    enter(&netns)?;
    let error = Command::new(program).args(arguments).env("OVL_ENDPOINT", &name).exec();
    let shown = program.to_string_lossy();
    // The statuses of shells.
    Err(match error.kind() {
        io::ErrorKind::NotFound => Error::Program(format!("there is no program {shown} on this host"), 127),
        _ => Error::Program(format!("cannot run {shown}: {error}"), 126),
    })
}

/// Enters the network namespace, and a mount namespace of its own in which names are resolved as in the workload and
/// `/sys/class/net` has its devices.
fn enter(netns: &Netns) -> Result<()> {
    let path = netns.path.display();
    let denied = |what: &str, error: nix::errno::Errno| match error {
        nix::errno::Errno::EPERM => Error::Failed(format!("cannot {what}: this needs root, try sudo")),
        error => Error::Failed(format!("cannot {what}: {error}")),
    };
    let file = File::open(&netns.path)
        .map_err(|error| Error::Failed(format!("cannot open the namespace {path}: {error}")))?;
    // The path may lead to another workload's namespace since ovld looked.
    if file.metadata().map(|found| found.ino()).ok() != Some(netns.inode) {
        return Err(Error::Failed(format!(
            "{path} is not the namespace of that endpoint any more: try again"
        )));
    }
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| denied(&format!("enter {path}"), error))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| denied("make a mount namespace", error))?;
    // Nothing of what follows is seen by the host.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(|error| denied("make mounts private", error))?;
    show_devices();
    if let Err(error) = use_resolver(&netns.resolv_conf) {
        // Not eprintln!: it panics if standard error is closed.
        let _ = writeln!(io::stderr(), "ovlctl: names are resolved as on the host: {error}");
    }
    Ok(())
}

/// Mounts `/sys` anew. Where that is not possible, `/sys/class/net` has the host's devices.
fn show_devices() {
    let _ = umount2("/sys", MntFlags::MNT_DETACH);
    let _ = mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>);
}

/// Mounts a file with this content over `/etc/resolv.conf`.
fn use_resolver(text: &str) -> io::Result<()> {
    let name = format!("/run/.ovl-exec-{}", std::process::id());
    let path = Path::new(&name);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    let mounted = file.write_all(text.as_bytes()).and_then(|()| {
        mount(Some(path), RESOLV_CONF, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(Into::into)
    });
    // The mount keeps the file.
    fs::remove_file(path)?;
    mounted
}
