//! `ovl-docker`, the network and IPAM plugin of Docker Engines (libnetwork's remote protocols over
//! HTTP on a Unix socket). It decides nothing: each call becomes one request to ovld.
//!
//! It is a process of its own because an Engine repeats a call to a plugin that is away for 15
//! seconds, and waits as long when it starts. This one is always there: it answers within seconds
//! while ovld is started anew or down, and what the Engine takes away meanwhile it keeps for ovld.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`plugin`] | the socket, HTTP |
//! | [`ovld`] | the way to ovld, and what is done without it |
//! | [`engine`] | the names of containers, which the Engine tells no plugin: it is asked for them |

mod engine;
mod ovld;
mod plugin;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

use crate::engine::Engine;
use crate::ovld::Ovld;

/// The Docker Engine plugin of ovl: networks of the cluster for containers of this host's Engine.
#[derive(Debug, Parser)]
#[command(name = "ovl-docker", version, long_version = ovl_proto::VERSION)]
struct Args {
    /// Where the Engine looks for plugins; the file's name is the driver's
    #[arg(long, value_name = "PATH", default_value = "/run/docker/plugins/ovl.sock")]
    listen: PathBuf,
    /// The control socket of ovld
    #[arg(long, value_name = "PATH", env = "OVL_SOCKET", default_value = ovl_proto::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The Engine's own socket, to ask for containers' names; `none`: not to ask
    #[arg(long, value_name = "PATH", default_value = "/run/docker.sock")]
    engine: PathBuf,
    /// Print the manual page, for packages
    #[arg(long, hide = true, exclusive = true)]
    man: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.man {
        let printed = clap_mangen::Man::new(Args::command()).section("8").render(&mut std::io::stdout());
        return printed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let engine = (args.engine.as_os_str() != "none").then(|| Engine::new(args.engine));
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ovl-docker: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(plugin::serve(&args.listen, Ovld::new(args.socket), engine)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovl-docker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
