//! `ovlctl sandbox`

use std::collections::BTreeMap;

use clap::Subcommand;
use ovl_control::{Reply, Request, SandboxCreate, SandboxInfo};
use ovl_proto::publish::Publish;

use super::attach::{label, warn};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{Table, list};

/// Arguments of `sandbox`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a network namespace that programs can join, and that outlives them and ovld
    Create(CreateArgs),
    /// Show this host's sandboxes
    #[command(visible_alias = "list")]
    Ls,
    /// Remove a sandbox that no process is in
    #[command(visible_alias = "remove")]
    Rm {
        /// Its name
        name: String,
        /// Also while processes are inside: they go on, without networks
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// Unique on this host; of its endpoints too
    name: String,
    /// A network to join, by name or id, as eth0, eth1 and so on; or `host`, or `none` [default: none]
    #[arg(long = "network", value_name = "NET")]
    networks: Vec<String>,
    /// The Kubernetes namespace of its endpoints [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
    /// What selectors match of its endpoints; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Lead a port of this host to one of the sandbox's, as for `attach`; may be repeated
    #[arg(long, value_name = "PORT")]
    publish: Vec<Publish>,
}

/// Carries a subcommand out.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Create(args) => {
            let Reply::Sandbox(sandbox) = context.ask(&Request::SandboxCreate(args.request()))? else {
                return Err(Error::unexpected_reply());
            };
            warn(&sandbox.warnings);
            context.print(&*sandbox, |sandbox| render(std::slice::from_ref(sandbox)))
        }
        Action::Ls => {
            let Reply::Sandboxes(sandboxes) = context.ask(&Request::SandboxLs)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&sandboxes, |sandboxes| render(sandboxes))
        }
        Action::Rm { name, force } => context.ask_done(&Request::SandboxRm { name, force }),
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
    Table::new()
        .column("NAME", sandboxes.iter().map(|sandbox| &sandbox.name))
        .column("NETWORKS", sandboxes.iter().map(|sandbox| list(&sandbox.networks)))
        .column("ADDRESSES", sandboxes.iter().map(|sandbox| list(&sandbox.addresses)))
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
    fn everything_given_is_asked_for() {
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
    fn sandboxes_are_rows() {
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
