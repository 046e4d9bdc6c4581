//! Firewalls of other programs: reads them, and changes them on request, with their own tools. All functions block.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use ovl_dataplane::observed::{Chain, Foreign, Iptables};
use serde_json::Value;

use super::error::{KernelError, Result};
use super::xfrm::has_ipsec_policies;

/// The prefix of the names of ovl's own tables.
const OURS: &str = "ovl";

/// Reads the forward chains of other programs in the network namespace of the calling thread.
///
/// # Errors
///
/// A tool that is installed fails.
pub fn look() -> Result<Foreign> {
    let mut foreign = Foreign { ipsec: has_ipsec_policies(), ..Foreign::default() };
    let chains = match output("nft", &["-j", "list", "chains"]) {
        Ok(text) => serde_json::from_str(&text).unwrap_or(Value::Null),
        // Without nft, only iptables can have rules.
        Err(_) => Value::Null,
    };
    let listed = || chains["nftables"].as_array().into_iter().flatten().map(|entry| &entry["chain"]);
    for chain in listed().filter(|chain| chain["type"] == "filter") {
        let text = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
        let (family, table, name, hook) = (text("family"), text("table"), text("name"), text("hook"));
        let passed: &[&str] = match family.as_str() {
            "ip" | "ip6" | "inet" | "netdev" => &["prerouting", "postrouting", "ingress", "egress"],
            // Frames of switched networks pass these; those of ebtables-nft are among them.
            "bridge" => &["prerouting", "forward", "postrouting"],
            _ => &[],
        };
        if passed.contains(&hook.as_str()) && !table.starts_with(OURS) {
            let text = output("nft", &["-s", "list", "table", &family, &table])?;
            foreign.others.push(Chain { family, table, name, drops: chain["policy"] == "drop", text });
        }
    }
    for chain in listed().filter(|chain| chain["hook"] == "forward") {
        let text = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
        let (family, table, name) = (text("family"), text("table"), text("name"));
        let has_iptables = table == "filter" && name == "FORWARD";
        match family.as_str() {
            "ip" if has_iptables => foreign.iptables.extend(saved("iptables-nft", true)?),
            "ip6" if has_iptables => foreign.iptables.extend(saved("ip6tables-nft", false)?),
            "ip" | "ip6" | "inet" if !table.starts_with(OURS) => {
                let text = output("nft", &["-s", "list", "table", &family, &table])?;
                let drops = chain["policy"] == "drop" || ends_with_drop(&text, &name);
                foreign.chains.push(Chain { family, table, name, drops, text });
            }
            _ => {}
        }
    }
    for (tool, v4, names) in
        [("iptables-legacy", true, "ip_tables_names"), ("ip6tables-legacy", false, "ip6_tables_names")]
    {
        let path = Path::new("/proc/thread-self/net").join(names);
        let in_use =
            std::fs::read_to_string(path).is_ok_and(|names| names.lines().any(|name| name == "filter"));
        if in_use {
            foreign.iptables.extend(saved(tool, v4)?);
        }
    }
    Ok(foreign)
}

/// Runs commands in order, and stops at the first failure.
///
/// # Errors
///
/// A program is not installed or fails.
pub fn run_commands(commands: &[Vec<String>]) -> Result<()> {
    for command in commands {
        if let [program, arguments @ ..] = &command[..] {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            output(program, &arguments)?;
        }
    }
    Ok(())
}

/// Reads the filter table of iptables. `None` if the tool is not installed.
fn saved(tool: &str, v4: bool) -> Result<Option<Iptables>> {
    match output(&format!("{tool}-save"), &["-t", "filter"]) {
        Ok(text) => {
            let lines = text.lines().map(str::to_owned).collect();
            Ok(Some(Iptables { tool: tool.to_owned(), v4, lines }))
        }
        Err(KernelError::MissingProgram(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the last rule of a chain, as `nft` lists it, drops or rejects all packets.
fn ends_with_drop(table: &str, chain: &str) -> bool {
    let begin = format!("chain {chain} {{");
    let mut lines = table.lines().map(str::trim).skip_while(|line| *line != begin);
    let rules = lines.by_ref().take_while(|line| *line != "}");
    rules.last().is_some_and(|last| {
        let rule = last.strip_prefix("counter ").unwrap_or(last);
        rule == "drop" || rule.starts_with("reject")
    })
}

/// Runs a program and returns what it prints.
///
/// # Errors
///
/// The program is not installed or fails.
pub(super) fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let done = Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let done = done.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KernelError::MissingProgram(program.to_owned()),
        _ => KernelError::io(format!("cannot run `{}`", shown()), &error),
    })?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    Err(KernelError::Other(format!("`{}` failed: {}", shown(), why.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_whose_last_rule_drops_everything_is_detected() {
        let table = "table inet firewalld {\n\tchain other {\n\t\tdrop\n\t}\n\tchain filter_FORWARD {\n\t\ttype filter hook \
                     forward priority filter + 10; policy accept;\n\t\tct status dnat accept\n\t\tLAST\n\t}\n}\n";
        for (last, drops) in [
            ("reject with icmpx admin-prohibited", true),
            ("counter drop", true),
            ("ct state invalid drop", false),
            ("accept", false),
        ] {
            assert_eq!(ends_with_drop(&table.replace("LAST", last), "filter_FORWARD"), drops, "{last}");
        }
        assert!(!ends_with_drop(table, "missing"));
        assert!(!ends_with_drop("", ""));
    }
}
