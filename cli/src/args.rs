//! The global options and the list of commands.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, Parser, Subcommand, ValueEnum};
use ovl_proto::DEFAULT_SOCKET;

use crate::command::resource::jsonpath::{self, Template};
use crate::command::{
    attach, bugreport, capture, cni, completions, detach, dns, doctor, endpoint, endpoints, events, exec,
    fdb, flows, key, lifecycle, man, metrics, netcheck, network, page, peers, plan, policy, recover,
    resource, routes, sandbox, status, subnets, top, trace, verify,
};
use crate::context::Context;
use crate::error::{Error, Result};

/// Help heading that separates the global options from a command's own.
const GLOBAL: &str = "Global options";

/// Command-line client of ovl, a multi-host overlay network for containers.
#[derive(Debug, Parser)]
#[command(name = "ovlctl", version, long_version = ovl_proto::VERSION)]
#[command(after_help = "Exit status: 0 success, 1 failure, 2 usage error.")]
pub(crate) struct Cli {
    /// Path of ovld's Unix socket
    #[arg(long, value_name = "PATH", env = "OVL_SOCKET", default_value = DEFAULT_SOCKET)]
    #[arg(global = true, help_heading = GLOBAL)]
    socket: PathBuf,
    /// Output format; `get` also has `jsonpath=TEMPLATE`
    #[arg(short, long, global = true, value_parser = FormatParser, default_value = "table", help_heading = GLOBAL)]
    output: Format,
    /// How long to wait until this host is admitted and knows the others' state [default: 10, as far as needed]
    #[arg(long, value_name = "SECONDS", global = true, value_parser = clap::value_parser!(u16).range(..=3600))]
    #[arg(help_heading = GLOBAL)]
    timeout: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

/// Output format of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    // No doc comments on the values: they would make every command's --help a page longer.
    Table,
    // A table with all columns, including those that have the default value in every row.
    Wide,
    Json,
    Yaml,
}

/// The value of `--output`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Format {
    /// A format of every command.
    Any(Output),
    /// A format of commands about Kubernetes objects alone.
    Objects(ObjectFormat),
}

/// An output format of commands about Kubernetes objects.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ObjectFormat {
    /// One `KIND/NAME` in each line.
    Name,
    /// A template that is filled in from the manifests. Only for `get`.
    JsonPath(Template),
}

/// Parses the value of `--output`.
#[derive(Debug, Clone)]
struct FormatParser;

impl TypedValueParser for FormatParser {
    type Value = Format;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> std::result::Result<Format, clap::Error> {
        let text = value.to_string_lossy();
        if let Some(template) = text.strip_prefix("jsonpath=") {
            return jsonpath::parse(template).map(ObjectFormat::JsonPath).map(Format::Objects).map_err(
                |error| {
                    clap::Error::raw(
                        ErrorKind::ValueValidation,
                        format!("invalid jsonpath template: {error}\n"),
                    )
                    .with_cmd(command)
                },
            );
        }
        if text == "name" {
            return Ok(Format::Objects(ObjectFormat::Name));
        }
        EnumValueParser::<Output>::new().parse_ref(command, arg, value).map(Format::Any)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let formats = Output::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        Some(Box::new(formats.chain([PossibleValue::new("name")])))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the state of this host's daemon and its problems
    Status,
    /// List the hosts of the cluster, or remove a dead one
    Peers(peers::Args),
    /// Withdraw this host from the cluster and stop the daemon
    Leave,
    /// Leave the cluster and delete every device, route and rule that ovl created on this host
    Teardown(lifecycle::TeardownArgs),
    /// Continue a cluster whose majority is lost for good, or answer such a recovery of other hosts
    Recover(recover::Args),
    /// List the address blocks and the hosts that hold them
    Subnets,
    /// List the forwarding database entries of ovl's devices
    Fdb,
    /// List the routes and addresses of ovl's devices
    Routes,
    /// Show the pending kernel changes as commands
    Plan,
    /// Compare the kernel with the desired state; exit status 1 if they differ
    Verify,
    /// Check what commonly breaks, and say what to do; exit status 1 if something was found
    Doctor(doctor::Args),
    /// Check this host's connection to others: NAT, what is blocked; exit status 1 if something is
    Netcheck,
    /// Show recent events
    Events(events::Args),
    /// Show hosts, endpoints and networks with what passes them, live; q quits
    Top(top::Args),
    /// Print the address of the page that shows the cluster in a browser
    Page,
    /// Print the daemon's metrics in the Prometheus text format
    Metrics,
    /// Write an archive for fault diagnosis: states, rules and logs of this host, without keys
    Bugreport(bugreport::Args),
    /// Manage networks
    Network(network::Args),
    /// Attach a network namespace to a network
    Attach(attach::Args),
    /// Detach an endpoint and delete its interface
    Detach(detach::Args),
    /// List the endpoints of all hosts
    Endpoints(endpoints::Args),
    /// Run a program of this host in the network namespace of an endpoint
    Exec(exec::ExecArgs),
    /// Run a shell in the network namespace of an endpoint
    Shell(exec::ShellArgs),
    /// Follow a packet from one end to the other; exit status 1 if it does not arrive
    Trace(trace::Args),
    /// Capture packets of an endpoint, a network, a Service or a pair of hosts, on all hosts that see them
    Capture(Box<capture::Args>),
    /// Show who talks to whom on this host, and which network policies decide
    Flows(flows::Args),
    /// Show the answer to a DNS query, and the reason for it
    Dns(dns::Args),
    /// Mark an endpoint as ready or not ready for Services
    Endpoint(endpoint::Args),
    /// Create or update Kubernetes objects from manifests
    Apply(resource::ApplyArgs),
    /// Create Kubernetes objects from manifests; fails if one exists
    Create(resource::ApplyArgs),
    /// Set or remove labels of Kubernetes objects
    Label(resource::LabelArgs),
    /// List Kubernetes objects
    Get(resource::GetArgs),
    /// Show the details of Kubernetes objects and their effects
    Describe(resource::GetArgs),
    /// Delete Kubernetes objects
    Delete(resource::DeleteArgs),
    /// Compare manifests with the cluster; exit status 1 if they differ
    Diff(resource::DiffArgs),
    /// Manage sandboxes: network namespaces that outlive the processes in them
    Sandbox(sandbox::Args),
    /// List network policies, explain a verdict, show refused connections
    Policy(policy::Args),
    /// Set up container runtimes
    Cni(cni::Args),
    /// Generate a cluster key, rotate keys, show the keys of all hosts
    Key(key::Args),
    /// Print a shell completion script
    Completions(completions::Args),
    /// Write the manual pages to a directory
    Man(man::Args),
}

impl Command {
    /// Fails if the command does not have an output format of objects.
    fn check(&self, format: &ObjectFormat) -> Result<()> {
        match (self, format) {
            (Self::Get(_), _)
            | (Self::Apply(_) | Self::Create(_) | Self::Label(_) | Self::Delete(_), ObjectFormat::Name) => {
                Ok(())
            }
            (_, ObjectFormat::Name) => {
                Err(Error::Usage("`-o name` is only for get, apply, create, label and delete".to_owned()))
            }
            (_, ObjectFormat::JsonPath(_)) => Err(Error::Usage("`-o jsonpath` is only for get".to_owned())),
        }
    }
}

impl Cli {
    /// Runs the command.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let (output, objects) = match self.output {
            Format::Any(output) => (output, None),
            Format::Objects(format) => {
                self.command.check(&format)?;
                (Output::Table, Some(format))
            }
        };
        let context = Context { socket: self.socket, output, objects, ready_within_s: self.timeout };
        match self.command {
            // These commands report their result through the exit status.
            Command::Verify => return verify::run(&context),
            Command::Doctor(args) => return doctor::run(&context, &args),
            Command::Netcheck => return netcheck::run(&context),
            Command::Trace(args) => return trace::run(&context, args),
            Command::Flows(args) => return flows::run(&context, &args),
            Command::Diff(args) => return resource::diff(&context, &args),
            // These are replaced by the program.
            Command::Exec(args) => exec::exec(&context, args).map(|never| match never {}),
            Command::Shell(args) => exec::shell(&context, args).map(|never| match never {}),
            Command::Status => status::run(&context),
            Command::Peers(args) => peers::run(&context, args),
            Command::Leave => lifecycle::leave(&context),
            Command::Teardown(args) => lifecycle::teardown(&context, &args),
            Command::Recover(args) => recover::run(&context, &args),
            Command::Subnets => subnets::run(&context),
            Command::Fdb => fdb::run(&context),
            Command::Routes => routes::run(&context),
            Command::Plan => plan::run(&context),
            Command::Events(args) => events::run(&context, &args),
            Command::Top(args) => top::run(&context, &args),
            Command::Page => page::run(&context),
            Command::Metrics => metrics::run(&context),
            Command::Bugreport(args) => bugreport::run(&context, &args),
            Command::Network(args) => network::run(&context, args),
            Command::Attach(args) => attach::run(&context, args),
            Command::Detach(args) => detach::run(&context, args),
            Command::Endpoints(args) => endpoints::run(&context, &args),
            Command::Capture(args) => capture::run(&context, *args),
            Command::Dns(args) => dns::run(&context, args),
            Command::Endpoint(args) => endpoint::run(&context, args),
            Command::Apply(args) => resource::apply(&context, &args, false),
            Command::Create(args) => resource::apply(&context, &args, true),
            Command::Label(args) => resource::label(&context, &args),
            Command::Get(args) => resource::get(&context, &args),
            Command::Describe(args) => resource::describe(&context, &args),
            Command::Delete(args) => resource::delete(&context, &args),
            Command::Sandbox(args) => sandbox::run(&context, args),
            Command::Policy(args) => policy::run(&context, args),
            Command::Cni(args) => cni::run(&context, args),
            Command::Key(args) => key::run(&context, args),
            Command::Completions(args) => completions::run(&context, &args),
            Command::Man(args) => man::run(&context, &args),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> std::result::Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn clap_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_are_accepted_before_and_after_the_command() {
        for line in [
            "ovlctl -o json --socket /tmp/s status",
            "ovlctl status --socket /tmp/s --output json",
            "ovlctl --socket=/tmp/s status -ojson",
        ] {
            let cli = parse(line).expect(line);
            assert_eq!(
                (cli.socket, cli.output),
                (PathBuf::from("/tmp/s"), Format::Any(Output::Json)),
                "{line}"
            );
        }
    }

    #[test]
    fn documented_command_lines_are_accepted() {
        for line in [
            "peers",
            "peers forget host2",
            "peers admit host2",
            "leave",
            "teardown --yes",
            "recover --from-majority-loss",
            "recover --from-majority-loss --dry-run",
            "recover --from-majority-loss --yes --lost 2",
            "recover --accept --yes",
            "recover --reject",
            "subnets",
            "fdb",
            "routes",
            "plan",
            "verify",
            "doctor",
            "doctor --all-hosts -o json",
            "netcheck",
            "netcheck -o json",
            "events --follow",
            "events --since 03:10 --until 03:20",
            "events --since 10m -f",
            "bugreport",
            "bugreport --file - --config /tmp/ovld.toml",
            "exec web -- ping -c 1 10.1.0.9",
            "exec --network blue --namespace shop web -- sh -c true",
            "shell web --network blue",
            "metrics",
            "network create blue",
            "network create blue --driver overlay --mode l2 --subnet 10.1.0.0/16 --subnet fd00::/64 --vni 7 --encrypted --internal --mtu 1400",
            "network ls",
            "network list",
            "network inspect blue",
            "network update blue --subnet 10.0.0.0/8",
            "network update blue --mtu 0",
            "network rm blue",
            "network remove blue",
            "attach a --network blue --netns x",
            "attach a --network blue --pid 7 --ip 10.1.0.9 --ip fd00::9 --mac 02:00:00:00:00:01 --ifname e0 --alias b --alias c --namespace ns --label k=v --label l=",
            "detach a --network blue --namespace ns",
            "endpoints --network blue --node host1",
            "policy ls",
            "policy list",
            "policy explain web db:5432",
            "policy explain shop/web shop/db:5432/udp",
            "policy explain 10.1.0.9 [fd00::9]:53/UDP",
            "policy explain web db",
            "policy drops --follow",
            "trace web db",
            "trace shop/web db:5432 --no-probe",
            "trace host [fd00::9]:53/UDP",
            "endpoint ready web -n shop",
            "endpoint unready web --namespace shop --network blue",
            "apply -f a.yaml -f - --dry-run --lenient -n shop",
            "apply -f a.yaml --validate=warn --strict",
            "apply -f a.yaml --validate",
            "diff -f a.yaml --validate=false",
            "apply -R -f dir",
            "apply -f dir --dry-run=server -o name",
            "create -f a.yaml --dry-run=client",
            "get svc web db -o name",
            "get svc/web netpol/db --ignore-not-found",
            "get svc -l app=web,tier!=back -A",
            "get svc -o jsonpath={.items[*].metadata.name}",
            "delete svc,netpol --all -n shop",
            "delete svc -l app --ignore-not-found",
            "label svc web app=web old- --overwrite",
            "label svc/web app=web -n shop",
            "get svc",
            "get pods web -n shop -o yaml",
            "get svc,netpol -A -o wide",
            "get svc/web",
            "describe svc web",
            "delete svc web other -n shop",
            "delete svc/web",
            "delete -f a.yaml",
            "diff -f a.yaml",
            "cni install",
            "cni install --network blue --name k8s --conf-dir /a --bin-dir /b --binary /c --portmap",
            "key generate",
            "key rotate",
            "key rotate --cluster new.key",
            "key rotate --cluster - --no-wait",
            "key status",
            "top",
            "top endpoints --interval 5",
            "top --once -o json",
            "page",
            "completions bash",
            "man /a",
        ] {
            if let Err(error) = parse(&format!("ovlctl {line}")) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn invalid_command_lines_are_rejected() {
        for line in [
            "",
            "stauts",
            "status now",
            "-o xml status",
            "apply",
            "apply -f a.yaml --validate=maybe",
            "apply -f a.yaml --validate=warn --lenient",
            "get",
            "get svc -A -n shop",
            "delete",
            "delete svc web -f a.yaml",
            "delete -f a.yaml --all",
            "delete svc --all -l app=web",
            "delete svc web -l app=web",
            "get svc web -l app=web",
            "get svc -l =web",
            "get svc -o jsonpath={.items",
            "apply -f a.yaml --dry-run=maybe",
            "create",
            "label svc",
            "diff",
            "endpoint",
            "endpoint ready",
            "--socket",
            "peers forget",
            "recover",
            "recover --yes",
            "recover --accept --reject",
            "recover --accept --dry-run",
            "recover --accept --lost 2",
            "network",
            "network create",
            "network create blue --driver carrier-pigeon",
            "network create blue --mode l7",
            "network create blue --vni 0",
            "network create blue --vni 16777216",
            "network create blue --mtu 65536",
            "network update blue",
            "attach a --network blue",
            "attach a --netns x",
            "attach a --network blue --netns x --pid 7",
            "attach a --network blue --pid 0",
            "attach a --network blue --pid 7 --ip 10.1.0.9/16",
            "attach a --network blue --pid 7 --mac 01:00:00:00:00:01",
            "attach a --network blue --pid 7 --mac 02:00",
            "attach a --network blue --pid 7 --label k",
            "attach a --network blue --pid 7 --label =v",
            "attach a --network blue --netns ..",
            "detach",
            "policy",
            "policy explain web",
            "policy explain web db:0",
            "policy explain web db:80/icmp",
            "cni",
            "cni install --name a/b",
            "key",
            "key rotate --cluster",
            "top processes",
            "top --interval 0",
            "completions tcl",
        ] {
            assert!(parse(&format!("ovlctl {line}")).is_err(), "{line}");
        }
    }
}
