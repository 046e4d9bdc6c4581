//! `ovlctl endpoints`: lists the endpoints of all hosts.

use ovl_control::{EndpointInfo, Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, yes_no};

/// Arguments of `endpoints`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only endpoints on the network of this name
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// Only endpoints on the host of this name
    #[arg(long)]
    node: Option<String>,
}

/// Requests the endpoints and prints those that match.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    let Reply::Endpoints(mut endpoints) = context.request(&Request::Endpoints)? else {
        return Err(Error::unexpected_reply());
    };
    endpoints.retain(|endpoint| args.matches(endpoint));
    context.print(&endpoints, |endpoints| render(endpoints))
}

impl Args {
    fn matches(&self, endpoint: &EndpointInfo) -> bool {
        self.network.as_ref().is_none_or(|network| *network == endpoint.network)
            && self.node.as_ref().is_none_or(|node| *node == endpoint.node)
    }
}

fn render(endpoints: &[EndpointInfo]) -> String {
    TextTable::new()
        .column("NAME", endpoints.iter().map(|endpoint| &endpoint.name))
        .optional_column("NAMESPACE", "default", endpoints.iter().map(|endpoint| &endpoint.namespace))
        .column("NETWORK", endpoints.iter().map(|endpoint| &endpoint.network))
        .column("NODE", endpoints.iter().map(|endpoint| &endpoint.node))
        .column("ADDRESSES", endpoints.iter().map(|endpoint| comma_separated(&endpoint.addresses)))
        .column("MAC", endpoints.iter().map(|endpoint| endpoint.mac))
        .column("STATE", endpoints.iter().map(|endpoint| endpoint.state))
        .optional_column("POD", "", endpoints.iter().map(pod))
        .optional_column("UNDECIDED", "", endpoints.iter().map(|endpoint| endpoint.undecided.join(",")))
        .optional_column("READY", "yes", endpoints.iter().map(|endpoint| yes_no(endpoint.ready)))
        .optional_column("REFUSED", "", endpoints.iter().map(refused))
        .optional_column("ALIASES", "", endpoints.iter().map(|endpoint| comma_separated(&endpoint.aliases)))
        .optional_column("PUBLISH", "", endpoints.iter().map(|endpoint| comma_separated(&endpoint.publish)))
        .render()
}

/// The name of the endpoint's pod if it differs from its own, with a note if another endpoint stands for the pod.
fn pod(endpoint: &EndpointInfo) -> String {
    match &endpoint.pod {
        Some(pod) if !pod.current => format!("{} (replaced)", pod.name),
        Some(pod) if pod.name != endpoint.name => pod.name.clone(),
        Some(_) | None => String::new(),
    }
}

/// The number of refused frames. Empty if there are none, or if this host does not count them.
fn refused(endpoint: &EndpointInfo) -> String {
    endpoint.refused.filter(|count| *count > 0).map_or_else(String::new, |count| count.to_string())
}

#[cfg(test)]
mod tests {
    use ovl_control::{EndpointState, PodInfo};

    use super::*;

    fn endpoint(name: &str, number: u8) -> EndpointInfo {
        EndpointInfo {
            name: name.into(),
            namespace: "default".into(),
            network: "blue".into(),
            node: format!("host{number}"),
            mac: format!("02:00:0a:01:00:{number:02x}").parse().unwrap(),
            addresses: vec![format!("10.1.0.{number}/16").parse().unwrap()],
            aliases: Vec::new(),
            labels: [("app".to_owned(), "shop".to_owned())].into(),
            state: EndpointState::Ready,
            ifname: None,
            device: None,
            publish: Vec::new(),
            warnings: Vec::new(),
            ready: true,
            allowed: Vec::new(),
            allowed_macs: Vec::new(),
            refused: None,
            pod: None,
            undecided: Vec::new(),
        }
    }

    #[test]
    fn optional_columns_are_omitted() {
        let suspended = EndpointInfo { state: EndpointState::Suspended, ..endpoint("db", 3) };
        assert_eq!(
            render(&[endpoint("web", 2), suspended]),
            "\
NAME  NETWORK  NODE   ADDRESSES    MAC                STATE
web   blue     host2  10.1.0.2/16  02:00:0a:01:00:02  ready
db    blue     host3  10.1.0.3/16  02:00:0a:01:00:03  suspended
"
        );
    }

    #[test]
    fn optional_columns_are_shown_if_an_endpoint_needs_them() {
        let mut pod = endpoint("web", 2);
        pod.namespace = "shop".into();
        pod.aliases = vec!["www".into(), "front".into()];
        pod.refused = Some(7);
        pod.addresses.push("fd00::2/64".parse().unwrap());
        let identity = PodInfo { name: "web".into(), uid: "u".into(), current: false };
        pod.pod = Some(identity.clone());
        let mut again = endpoint("web-0badcafe00", 3);
        again.pod = Some(PodInfo { current: true, ..identity });
        again.undecided = vec!["ingress".into(), "egress".into()];
        assert_eq!(
            render(&[pod, again]),
            "\
NAME            NAMESPACE  NETWORK  NODE   ADDRESSES               MAC                STATE  POD             UNDECIDED       REFUSED  ALIASES
web             shop       blue     host2  10.1.0.2/16,fd00::2/64  02:00:0a:01:00:02  ready  web (replaced)  -               7        www,front
web-0badcafe00  default    blue     host3  10.1.0.3/16             02:00:0a:01:00:03  ready  web             ingress,egress  -        -
"
        );
    }

    #[test]
    fn all_filters_must_match() {
        let args = |network: Option<&str>, node: Option<&str>| Args {
            network: network.map(str::to_owned),
            node: node.map(str::to_owned),
        };
        let web = endpoint("web", 2);
        assert!(args(None, None).matches(&web));
        assert!(args(Some("blue"), Some("host2")).matches(&web));
        assert!(!args(Some("blue"), Some("host3")).matches(&web));
        assert!(!args(Some("red"), None).matches(&web));
    }
}
