//! `ovlctl dns`: explains the answer to a DNS query.

use ovl_control::{DnsAnswer, DnsQuestion, Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::TextTable;

/// Arguments of `dns`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The name to resolve, or an address for a reverse lookup
    #[arg(required_unless_present = "resolv_conf", conflicts_with = "resolv_conf")]
    name: Option<String>,
    /// Query as this endpoint of this host [default: the host itself]
    #[arg(long, value_name = "ENDPOINT")]
    from: Option<String>,
    /// The network of that endpoint, if its name exists on several
    #[arg(long, value_name = "NET", requires = "from")]
    network: Option<String>,
    /// Record type: A, AAAA, PTR, ...
    #[arg(long = "type", value_name = "TYPE", default_value = "A")]
    kind: String,
    /// Print the resolv.conf for the endpoint
    #[arg(long, requires = "from")]
    resolv_conf: bool,
}

/// Sends the query and prints the answer.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    if let (true, Some(endpoint)) = (args.resolv_conf, &args.from) {
        let request = Request::ResolvConf { endpoint: endpoint.clone(), network: args.network };
        let Reply::Text(text) = context.request(&request)? else { return Err(Error::unexpected_reply()) };
        return context.print(&text, |text| text.clone());
    }
    let name = args.name.unwrap_or_default();
    let question = DnsQuestion { name, kind: args.kind, from: args.from, network: args.network };
    let Reply::Dns(answer) = context.request(&Request::Dns(question))? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&*answer, render)
}

fn render(answer: &DnsAnswer) -> String {
    let mut text = format!("{} {} for {}: {}\n", answer.name, answer.kind, answer.from, answer.status);
    if !answer.answers.is_empty() {
        let records = &answer.answers;
        text += &TextTable::new()
            .column("NAME", records.iter().map(|record| &record.name))
            .column("TTL", records.iter().map(|record| record.ttl))
            .column("TYPE", records.iter().map(|record| &record.kind))
            .column("DATA", records.iter().map(|record| &record.data))
            .render();
    }
    text + &format!("because: {}\n", answer.why)
}

#[cfg(test)]
mod tests {
    use ovl_control::DnsRecord;

    use super::*;

    #[test]
    fn answer_is_rendered_with_its_reason() {
        let mut answer = DnsAnswer {
            name: "web".into(),
            kind: "A".into(),
            from: "api".into(),
            status: "NOERROR".into(),
            answers: vec![DnsRecord {
                name: "web".into(),
                kind: "A".into(),
                ttl: 5,
                data: "10.1.0.2".into(),
            }],
            why: "on network blue: web on a".into(),
        };
        assert_eq!(
            render(&answer),
            "\
web A for api: NOERROR
NAME  TTL  TYPE  DATA
web   5    A     10.1.0.2
because: on network blue: web on a
"
        );
        answer.answers.clear();
        assert_eq!(render(&answer), "web A for api: NOERROR\nbecause: on network blue: web on a\n");
    }
}
