//! `ovlctl attach`: attaches a network namespace to a network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process;

use clap::ArgGroup;
use ipnet::IpNet;
use ovl_control::{Attach, EndpointInfo, NetnsRef, Reply, Request};
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::Mac;
use ovl_proto::publish::Publish;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, optional};

/// Directory of the namespaces that `ip netns add` creates.
const NETNS_DIR: &str = "/run/netns";

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("where").args(["netns", "pid"]).required(true))]
pub(crate) struct Args {
    /// The endpoint's name, unique on its network
    name: String,
    /// The network's name or id
    #[arg(long, value_name = "NET")]
    network: String,
    /// The namespace: a path, or a name that `ip netns list` shows
    #[arg(long, value_name = "PATH", value_parser = parse_netns)]
    netns: Option<PathBuf>,
    /// The namespace of the process with this id
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// Use this address; at most one for IPv4 and one for IPv6 [default: a free one of each family]
    #[arg(long = "ip", value_name = "ADDR")]
    addresses: Vec<IpAddr>,
    /// The interface's MAC address [default: derived from the address]
    #[arg(long, value_parser = parse_unicast_mac)]
    mac: Option<Mac>,
    /// The interface's name [default: the first free one of eth0, eth1, ...]
    #[arg(long, value_name = "IF")]
    ifname: Option<String>,
    /// An additional DNS name of the endpoint; may be repeated
    #[arg(long = "alias", value_name = "A")]
    aliases: Vec<String>,
    /// The endpoint's Kubernetes namespace [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
    /// A label for selectors to match; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Publish a port of the endpoint on this host: [ADDR:][HOST[-END]:]CONTAINER[-END][/tcp|udp|sctp]; may
    /// be repeated
    #[arg(long, value_name = "PORT")]
    publish: Vec<Publish>,
    /// Receive no Service connections until `ovlctl endpoint ready`
    #[arg(long)]
    not_ready: bool,
    /// An address or prefix that the endpoint may send from beside its own addresses; may be repeated
    #[arg(long = "allow-address", value_name = "CIDR", value_parser = parse_prefix)]
    allowed: Vec<IpNet>,
    /// A MAC address that the endpoint may send from beside its own; may be repeated
    #[arg(long = "allow-mac", value_name = "MAC", value_parser = parse_unicast_mac)]
    allowed_macs: Vec<Mac>,
}

/// Attaches the endpoint and prints it.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Reply::Endpoint(endpoint) = context.request(&Request::Attach(Box::new(args.request()?)))? else {
        return Err(Error::unexpected_reply());
    };
    print_warnings(&endpoint.warnings);
    context.print(&*endpoint, render)
}

impl Args {
    fn request(self) -> Result<Attach> {
        let netns = match (self.netns, self.pid) {
            (Some(path), _) => NetnsRef::Path(path),
            (None, Some(pid)) => NetnsRef::Pid(pid),
            (None, None) => {
                return Err(Error::Usage("missing --netns or --pid. Give one of them".to_owned()));
            }
        };
        Ok(Attach {
            name: self.name,
            network: self.network,
            netns,
            addresses: self.addresses,
            mac: self.mac,
            ifname: self.ifname,
            aliases: self.aliases,
            namespace: self.namespace,
            labels: BTreeMap::from_iter(self.labels),
            publish: self.publish,
            not_ready: self.not_ready,
            allowed: self.allowed,
            allowed_macs: self.allowed_macs,
            pod: None,
            bandwidth: Bandwidth::default(),
        })
    }
}

/// Parses `--netns` into a path that refers to the same file in ovld's process.
fn parse_netns(text: &str) -> std::result::Result<PathBuf, String> {
    if matches!(text, "" | "." | "..") {
        return Err("not a namespace: give a path, or a name that `ip netns list` shows".to_owned());
    }
    if !text.contains('/') {
        return Ok(Path::new(NETNS_DIR).join(text));
    }
    // In ovld, "self" would be ovld. This process waits for the reply, so its id stays valid until then.
    for own in ["/proc/self/", "/proc/thread-self/"] {
        if let Some(rest) = text.strip_prefix(own) {
            return Ok(format!("/proc/{}/{rest}", process::id()).into());
        }
    }
    std::path::absolute(text).map_err(|error| error.to_string())
}

/// Parses an address, or a prefix without bits behind its length.
fn parse_prefix(text: &str) -> std::result::Result<IpNet, String> {
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let prefix = parsed.ok_or("expected an address or a prefix like 10.1.0.0/28")?;
    if prefix.addr() == prefix.network() {
        Ok(prefix)
    } else {
        Err(format!("{text} has bits behind its length: did you mean {}?", prefix.trunc()))
    }
}

fn parse_unicast_mac(text: &str) -> std::result::Result<Mac, String> {
    let mac: Mac = text.parse().map_err(|_| "expected a MAC address like 02:42:0a:01:00:05".to_owned())?;
    if mac.is_unicast() {
        Ok(mac)
    } else {
        Err("the MAC address of an interface must be unicast and not zero".to_owned())
    }
}

/// Parses `--label`.
pub(crate) fn parse_label(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE, for example app=shop".to_owned()),
    }
}

/// Prints the warnings of a successful request.
pub(crate) fn print_warnings(warnings: &[String]) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

fn render(endpoint: &EndpointInfo) -> String {
    let one = |cell: String| std::iter::once(cell);
    TextTable::new()
        .column("NAME", one(endpoint.name.clone()))
        .column("ADDRESSES", one(comma_separated(&endpoint.addresses)))
        .column("MAC", one(endpoint.mac.to_string()))
        .column("IFNAME", one(optional(endpoint.ifname.as_ref())))
        .column("DEVICE", one(optional(endpoint.device.as_ref())))
        .render()
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches};
    use ovl_control::EndpointState;

    use super::*;

    fn request(line: &str) -> Attach {
        let command = Args::augment_args(clap::Command::new("attach"));
        let matches = command.try_get_matches_from(line.split_whitespace()).unwrap();
        Args::from_arg_matches(&matches).unwrap().request().unwrap()
    }

    #[test]
    fn request_contains_all_options() {
        let line = "attach web --network blue --pid 7 --ip 10.1.0.9 --ip fd00::9 --mac 02:00:00:00:00:01 \
                    --ifname e0 --alias b --alias c --namespace shop --label app=a=b --label tier= --not-ready \
                    --publish 8080:80 --publish [::1]:53:53/udp --allow-address 10.1.0.200 \
                    --allow-address fd00:9::/64 --allow-mac 00:00:5e:00:01:07";
        let expected = Attach {
            name: "web".into(),
            network: "blue".into(),
            netns: NetnsRef::Pid(7),
            addresses: vec!["10.1.0.9".parse().unwrap(), "fd00::9".parse().unwrap()],
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            ifname: Some("e0".into()),
            aliases: vec!["b".into(), "c".into()],
            namespace: Some("shop".into()),
            labels: [("app".into(), "a=b".into()), ("tier".into(), String::new())].into(),
            publish: vec!["8080:80".parse().unwrap(), "[::1]:53:53/udp".parse().unwrap()],
            not_ready: true,
            allowed: vec!["10.1.0.200/32".parse().unwrap(), "fd00:9::/64".parse().unwrap()],
            allowed_macs: vec![Mac([0, 0, 0x5e, 0, 1, 7])],
            pod: None,
            bandwidth: Bandwidth::default(),
        };
        assert_eq!(request(line), expected);
    }

    #[test]
    fn netns_is_resolved_to_a_path_valid_in_ovld() {
        let here = std::env::current_dir().unwrap();
        let own = format!("/proc/{}/ns/net", process::id());
        for (given, meant) in [
            ("blue", PathBuf::from("/run/netns/blue")),
            ("/run/netns/blue", "/run/netns/blue".into()),
            ("./blue", here.join("blue")),
            ("ns/blue", here.join("ns/blue")),
            ("/proc/7/ns/net", "/proc/7/ns/net".into()),
            ("/proc/self/ns/net", own.clone().into()),
            ("/proc/thread-self/ns/net", own.into()),
        ] {
            assert_eq!(parse_netns(given), Ok(meant));
        }
    }

    #[test]
    fn new_endpoint_is_rendered_as_one_row() {
        let endpoint = EndpointInfo {
            name: "web".into(),
            namespace: "default".into(),
            network: "blue".into(),
            node: "host1".into(),
            mac: Mac([2, 0, 10, 1, 0, 2]),
            addresses: vec!["10.1.0.2/16".parse().unwrap()],
            aliases: Vec::new(),
            labels: BTreeMap::new(),
            state: EndpointState::Ready,
            ifname: Some("eth0".into()),
            device: Some("ove-1a2b3c4d".into()),
            publish: Vec::new(),
            warnings: Vec::new(),
            ready: true,
            allowed: Vec::new(),
            allowed_macs: Vec::new(),
            refused: None,
            pod: None,
            undecided: Vec::new(),
        };
        assert_eq!(
            render(&endpoint),
            "\
NAME  ADDRESSES    MAC                IFNAME  DEVICE
web   10.1.0.2/16  02:00:0a:01:00:02  eth0    ove-1a2b3c4d
"
        );
    }
}
