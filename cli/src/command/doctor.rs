//! `ovlctl doctor`: checks what commonly breaks, on this host or on all.

use std::fmt::Write as _;
use std::process::ExitCode;

use ovl_control::{Check, CheckResult, Diagnosis, Finding, HostDiagnosis, Reply, Request, Severity};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, plural, printable};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ask all members of the cluster, and name those that do not answer
    #[arg(long)]
    all_hosts: bool,
}

/// Prints the checks and findings to standard output. Exit status 1 if there are findings, or a host did not answer.
pub(crate) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    let Reply::Doctor(diagnosis) = context.request(&Request::Doctor { all_hosts: args.all_hosts })? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&*diagnosis, render)?;
    Ok(if diagnosis.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    for host in &diagnosis.hosts {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&of_host(host));
    }
    for host in &diagnosis.unanswered {
        let _ = write!(text, "\n{}: no answer: see `ovlctl peers`\n", printable(host));
    }
    text
}

fn of_host(host: &HostDiagnosis) -> String {
    let summary = match host.findings.len() as u64 {
        0 => "healthy".to_owned(),
        count => plural(count, "finding"),
    };
    let mut text = format!(
        "{}: {summary}, {} in {} ms\n",
        printable(&host.host),
        plural(host.checks.len() as u64, "check"),
        host.took_ms
    );
    let table = TextTable::new()
        .column("GROUP", host.checks.iter().map(|check| &check.group))
        .column("CHECK", host.checks.iter().map(|check| &check.check))
        .column("RESULT", host.checks.iter().map(result))
        .optional_column("REMARK", "", host.checks.iter().map(|check| &check.detail));
    text.push_str(&table.render());
    for Finding { code, severity, group, check, object, cause, fix } in &host.findings {
        let severity = match severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let about = if object.is_empty() { String::new() } else { format!(": {}", printable(object)) };
        let _ = write!(text, "\n{code} {severity}, {} {}{about}\n", printable(group), printable(check));
        let _ = writeln!(text, "  cause: {}", printable(cause));
        if !fix.is_empty() {
            let _ = writeln!(text, "  fix:   {}", printable(fix));
        }
    }
    text
}

fn result(check: &Check) -> &'static str {
    match check.result {
        CheckResult::Ok => "ok",
        CheckResult::Unknown => "unknown",
        CheckResult::Warning => "warning",
        CheckResult::Error => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, findings: Vec<Finding>) -> HostDiagnosis {
        let check = |check: &str, result, detail: &str| Check {
            group: "host".to_owned(),
            check: check.to_owned(),
            result,
            detail: detail.to_owned(),
        };
        let result = if findings.is_empty() { CheckResult::Ok } else { CheckResult::Error };
        let checks = vec![check("address", result, ""), check("disk", CheckResult::Ok, "")];
        HostDiagnosis { host: name.to_owned(), took_ms: 612, checks, findings }
    }

    #[test]
    fn healthy_host_shows_its_checks_alone() {
        let diagnosis =
            Diagnosis { healthy: true, hosts: vec![host("h1", Vec::new())], unanswered: Vec::new() };
        assert_eq!(
            render(&diagnosis),
            "h1: healthy, 2 checks in 612 ms\nGROUP  CHECK    RESULT\nhost   address  ok\nhost   disk     ok\n"
        );
    }

    #[test]
    fn finding_has_code_object_cause_and_fix_without_control_characters() {
        let finding = Finding {
            code: "OVL-E089".to_owned(),
            severity: Severity::Error,
            group: "host".to_owned(),
            check: "address".to_owned(),
            object: "192.0.2.1".to_owned(),
            cause: "another machine\u{1b}[2J has it".to_owned(),
            fix: "give it another one".to_owned(),
        };
        let hosts = vec![host("h1", vec![finding])];
        let text = render(&Diagnosis { healthy: false, hosts, unanswered: vec!["h2".to_owned()] });
        assert!(
            text.ends_with(
                "\nOVL-E089 error, host address: 192.0.2.1\n  cause: another machine\\u{1b}[2J has it\n  fix:   give it another one\n\nh2: no answer: see `ovlctl peers`\n"
            ),
            "{text}"
        );
    }
}
