//! `ovlctl sandbox`: manages sandboxes.

use std::collections::BTreeMap;

use clap::Subcommand;
use ovl_control::{Reply, Request, SandboxCreate, SandboxInfo};
use ovl_proto::publish::Publish;

use super::attach::{parse_label, print_warnings};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated};

/// Arguments of `sandbox`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a network namespace that outlives the processes in it and ovld
    Create(CreateArgs),
    /// List the sandboxes of this host
    #[command(visible_alias = "list")]
    Ls,
    /// Remove a sandbox that contains no processes
    #[command(visible_alias = "remove")]
    Rm {
        /// Name of the sandbox
        name: String,
        /// Remove it even if processes are inside; they continue without networks
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// Name of the sandbox and of its endpoints, unique on this host
    name: String,
    /// Name or id of a network to attach as eth0, eth1 and so on; or `host`, or `none` [default: none]
    #[arg(long = "network", value_name = "NET")]
    networks: Vec<String>,
    /// The endpoints' Kubernetes namespace [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
    /// A label of the endpoints for selectors to match; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Publish a port of the sandbox on this host, as for `attach`; may be repeated
    #[arg(long, value_name = "PORT")]
    publish: Vec<Publish>,
}

/// Runs a subcommand.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Create(args) => {
            let Reply::Sandbox(sandbox) = context.request(&Request::SandboxCreate(args.request()))? else {
                return Err(Error::unexpected_reply());
            };
            print_warnings(&sandbox.warnings);
            context.print(&*sandbox, |sandbox| render(std::slice::from_ref(sandbox)))
        }
        Action::Ls => {
            let Reply::Sandboxes(sandboxes) = context.request(&Request::SandboxLs)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&sandboxes, |sandboxes| render(sandboxes))
        }
        Action::Rm { name, force } => context.request_done(&Request::SandboxRm { name, force }),
    }
}

impl CreateArgs {
    fn request(self) -> SandboxCreate {
        SandboxCreate {
            name: self.name,
            networks: self.networks,
            namespace: self.namespace,
            labels: BTreeMap::from_iter(self.labels),
            publish: self.publish,
        }
    }
}

fn render(sandboxes: &[SandboxInfo]) -> String {
    TextTable::new()
        .column("NAME", sandboxes.iter().map(|sandbox| &sandbox.name))
        .column("NETWORKS", sandboxes.iter().map(|sandbox| comma_separated(&sandbox.networks)))
        .column("ADDRESSES", sandboxes.iter().map(|sandbox| comma_separated(&sandbox.addresses)))
        .column("PROCESSES", sandboxes.iter().map(|sandbox| sandbox.processes.len()))
        .column("NETNS", sandboxes.iter().map(|sandbox| sandbox.netns.display()))
        .render()
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches};

    use super::*;

    fn action(line: &str) -> Action {
        let command = Args::augment_args(clap::Command::new("sandbox"));
        let matches = command.try_get_matches_from(line.split_whitespace()).unwrap();
        Args::from_arg_matches(&matches).unwrap().action
    }

    #[test]
    fn request_contains_all_options() {
        let line = "sandbox create web --network blue --network red --namespace shop --label app=a=b --publish 8080:80";
        let Action::Create(args) = action(line) else { panic!("{line}") };
        let expected = SandboxCreate {
            name: "web".into(),
            networks: vec!["blue".into(), "red".into()],
            namespace: Some("shop".into()),
            labels: [("app".into(), "a=b".into())].into(),
            publish: vec!["8080:80".parse().unwrap()],
        };
        assert_eq!(args.request(), expected);
        for (line, forced) in [("sandbox rm web", false), ("sandbox remove web --force", true)] {
            let Action::Rm { name, force } = action(line) else { panic!("{line}") };
            assert_eq!((name.as_str(), force), ("web", forced));
        }
    }

    #[test]
    fn sandboxes_are_rendered_as_rows() {
        let sandbox = |name: &str, networks: &[&str], addresses: &[&str], processes: &[u32]| SandboxInfo {
            name: name.into(),
            netns: format!("/run/netns/{name}").into(),
            networks: networks.iter().map(|&name| name.to_owned()).collect(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            processes: processes.to_vec(),
            warnings: Vec::new(),
        };
        assert_eq!(
            render(&[
                sandbox("lone", &["none"], &[], &[]),
                sandbox("web", &["blue", "red"], &["10.1.0.2/16", "fd00::2/64"], &[7, 9]),
            ]),
            "\
NAME  NETWORKS  ADDRESSES               PROCESSES  NETNS
lone  none      -                       0          /run/netns/lone
web   blue,red  10.1.0.2/16,fd00::2/64  2          /run/netns/web
"
        );
    }
}
