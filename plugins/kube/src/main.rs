//! `ovl-kube` makes a Kubernetes API server one more source of what an ovl cluster knows. One runs beside each ovld whose
//! host is a node. It decides nothing about networks: it hands on to ovld what the API server has.
//!
//! * The pods of this node: labels, named ports, phase, readiness. Each host follows its own.
//! * The cluster's objects: Namespaces, Nodes, policies, Services, EndpointSlices. One host mirrors them for all; ovld says
//!   whose turn it is.
//!
//! It writes back what the API server expects of a network: the addresses of LoadBalancers, Events about objects that are not
//! in force, and the condition NetworkUnavailable of this host's Node.
//!
//! | module | content |
//! | --- | --- |
//! | [`watcher`] | lists and watches one kind at the API server |
//! | [`position`] | what a watcher does next: decisions, without I/O |
//! | [`kind`], [`status`] | the kinds, and what of an object is handed on |
//! | [`store`] | what the API server has, and what of that ovld was not told yet: without I/O |
//! | [`feeder`] | tells ovld, and tells it again |
//! | [`ovld`] | requests to ovld |
//! | [`reports`] | the connection by which ovld says what is to be said to the API server |
//! | [`conflist`] | the network configuration of the container runtime |
//! | [`members`] | the hosts through which ovld joins, and which Nodes there are |
//! | [`balance`], [`refusals`], [`condition`] | what is to be written: decisions, without I/O |
//! | [`writer`], [`node`] | write it: statuses and Events, and the Node's condition |
//! | [`turn`] | the connection that says that this program runs, and hears whose turn it is |

mod balance;
mod condition;
mod conflist;
mod feeder;
mod kind;
mod members;
mod node;
mod ovld;
mod position;
mod recorded;
mod refusals;
mod reports;
mod status;
mod store;
mod turn;
mod watcher;
mod writer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser};
use futures_util::future::OptionFuture;
use ipnet::IpNet;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use ovl_proto::resource::Kind;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::conflist::Keeper;
use crate::feeder::{Feeder, Feeds, Surroundings};
use crate::turn::Turns;
use crate::writer::Writer;

/// How many items of a watcher wait at most to be handed on, and how many things to be written.
const QUEUE: usize = 1000;

/// Makes a Kubernetes API server one more source of what an ovl cluster knows: hands on to ovld the pods of this node, and
/// on one host the Services, EndpointSlices, Namespaces and NetworkPolicies of the cluster.
#[derive(Debug, Parser)]
#[command(name = "ovl-kube", version, long_version = ovl_proto::VERSION)]
struct Args {
    /// The name of this host's Node object; by default the host's name
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// The file that says where the API server is and with which credentials; by default $KUBECONFIG or
    /// ~/.kube/config, or in a pod its service account
    #[arg(long, value_name = "PATH")]
    kubeconfig: Option<PathBuf>,
    /// The control socket of ovld
    #[arg(long, value_name = "PATH", env = "OVL_SOCKET", default_value = ovl_proto::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The network configuration of the container runtime, written once pods become reachable; by default it is not written
    #[arg(long, value_name = "PATH")]
    conflist: Option<PathBuf>,
    /// The network that pods are attached to
    #[arg(long, value_name = "NET", default_value = "pods", requires = "conflist")]
    network: String,
    /// Create that network, routed and with this subnet, if there is none; may be repeated
    #[arg(long = "subnet", value_name = "CIDR", requires = "conflist")]
    subnets: Vec<IpNet>,
    /// A network that pods may choose beside it, by the annotation `ovl.networks`; may be repeated
    #[arg(long = "more-network", value_name = "NET", requires = "conflist")]
    more: Vec<String>,
    /// How much to log
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: tracing::Level,
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
    tracing_subscriber::fmt().with_max_level(args.log).with_writer(std::io::stderr).without_time().init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.context("starting").and_then(|runtime| runtime.block_on(run(args))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovl-kube: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<()> {
    let node = match args.node {
        Some(node) => node,
        None => {
            host_name().context("reading the host's name: give the name of its Node object with --node")?
        }
    };
    let client = client(args.kubeconfig).await?;
    let mut terminated = signal(SignalKind::terminate()).context("waiting for signals")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("waiting for signals")?;

    // Nothing is known before the first list.
    let (pod_troubles, own) = watch::channel(vec![(Kind::Pod, "not listed yet".to_owned())]);
    let (tell, items) = mpsc::channel(QUEUE);
    let selector = format!("spec.nodeName={node}");
    let watcher = watcher::follow(client.clone(), Kind::Pod, Some(selector), tell);
    let (say, says) = mpsc::channel(QUEUE);
    let (hear, heard) = watch::channel(None);
    let (write_trouble, writes) = watch::channel(None);
    let surroundings = Surroundings { socket: args.socket.clone(), heard: heard.clone(), say };
    let feeder = Feeder::new(Feeds::Pods, &[Kind::Pod], surroundings.clone(), pod_troubles).run(items);
    let joins = members::join(client.clone(), node.clone(), args.socket.clone(), heard.clone());
    let keeper = args.conflist.map(|path| {
        let (network, subnets, socket) = (args.network, args.subnets, args.socket.clone());
        Keeper { path, network, subnets, more: args.more, socket }
    });
    let conflist = OptionFuture::from(keeper.map(|keeper| keeper.run(heard.clone())));
    let condition = node::keep(client.clone(), node.clone(), args.socket.clone(), heard);
    let reports = reports::listen(args.socket, hear);
    let writer = Writer::new(client.clone(), node.clone(), write_trouble).run(says);
    let turns = Turns::new(client, surroundings, own, writes).run();
    tracing::info!(node, "follows the API server");
    tokio::select! {
        () = watcher => {}
        () = feeder => {}
        () = turns => {}
        () = reports => {}
        () = joins => {}
        Some(()) = conflist => {}
        () = condition => {}
        () = writer => {}
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    Ok(())
}

/// Returns the client of the API server.
async fn client(kubeconfig: Option<PathBuf>) -> Result<Client> {
    let config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(&path).with_context(|| format!("reading {}", path.display()))?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config.with_context(|| format!("using {}", path.display()))?
        }
        None => Config::infer().await.context(
            "no API server is configured: give a kubeconfig file with --kubeconfig, or run in a pod with a service account",
        )?,
    };
    Client::try_from(config).context("preparing the client of the API server")
}

fn host_name() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}
