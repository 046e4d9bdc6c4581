//! Other people's firewalls: read, and changed where the caller says so, by their own programs. All of it
//! may take a while, and blocks.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use ovl_dataplane::observed::{Chain, Foreign, Iptables};
use serde_json::Value;

use super::error::{KernelError, Result};

/// Names of our own tables begin so.
const OURS: &str = "ovl";

/// What is there, in the network namespace of the calling thread.
pub fn look() -> Result<Foreign> {
    let mut foreign = Foreign::default();
    let chains = match output("nft", &["-j", "list", "chains"]) {
        Ok(text) => serde_json::from_str(&text).unwrap_or(Value::Null),
        // Without nft, whatever there is is iptables' own.
        Err(_) => Value::Null,
    };
    let listed = chains["nftables"].as_array().into_iter().flatten().map(|entry| &entry["chain"]);
    for chain in listed.filter(|chain| chain["hook"] == "forward") {
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

/// Runs these commands, one after the other, until one fails.
pub fn run_all(commands: &[Vec<String>]) -> Result<()> {
    for command in commands {
        if let [program, arguments @ ..] = &command[..] {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            output(program, &arguments)?;
        }
    }
    Ok(())
}

/// The filter table of iptables; nothing without the program.
fn saved(tool: &str, v4: bool) -> Result<Option<Iptables>> {
    match output(&format!("{tool}-save"), &["-t", "filter"]) {
        Ok(text) => {
            let lines = text.lines().map(str::to_owned).collect();
            Ok(Some(Iptables { tool: tool.to_owned(), v4, lines }))
        }
        Err(KernelError::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the last rule of a chain, as `nft` lists it, is for all packets, and lets none pass.
fn ends_with_drop(table: &str, chain: &str) -> bool {
    let begin = format!("chain {chain} {{");
    let mut lines = table.lines().map(str::trim).skip_while(|line| *line != begin);
    let rules = lines.by_ref().take_while(|line| *line != "}");
    rules.last().is_some_and(|last| {
        let rule = last.strip_prefix("counter ").unwrap_or(last);
        rule == "drop" || rule.starts_with("reject")
    })
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let done = Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let done = done.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KernelError::Missing(program.to_owned()),
        _ => KernelError::io(shown(), &error),
    })?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    Err(KernelError::Other(format!("{}: {}", shown(), why.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_that_refuses_in_the_end_is_told_from_one_that_does_not() {
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
