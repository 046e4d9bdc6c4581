//! `ovl-docker`, the network and IPAM plugin of Docker Engines (libnetwork's remote protocols over HTTP on a Unix
//! socket). It makes no decisions: each call becomes one request to ovld.
//!
//! It is a separate process because an Engine repeats a call to an unavailable plugin for 15 seconds, and waits as
//! long when it starts. This plugin is always available: it responds within seconds while ovld restarts or is down,
//! and stores deletions for ovld meanwhile.
//!
//! | module | content |
//! | --- | --- |
//! | [`plugin`] | the plugin's socket, HTTP |
//! | [`ovld`] | requests to ovld, and what happens while it is unavailable |
//! | [`engine`] | queries to the Engine for the names of containers, which no call contains |

mod engine;
mod ovld;
mod plugin;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

use crate::engine::Engine;
use crate::ovld::Ovld;

/// The Docker Engine plugin of ovl: connects containers of this host's Engine to networks of the cluster.
#[derive(Debug, Parser)]
#[command(name = "ovl-docker", version, long_version = ovl_proto::VERSION)]
struct Args {
    /// The socket where the Engine looks for plugins; its file name is the driver's name
    #[arg(long, value_name = "PATH", default_value = "/run/docker/plugins/ovl.sock")]
    listen: PathBuf,
    /// The control socket of ovld
    #[arg(long, value_name = "PATH", env = "OVL_SOCKET", default_value = ovl_proto::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The socket of the Engine's API, for the names of containers; `none`: do not query it
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
