//! `status`: shows the hosts of a lab.

use anyhow::Result;
use netns_lab::{Access, Host, Lab};

use super::nat::describe_addresses;

const HEADINGS: [&str; 7] = ["HOST", "ADDRESS", "NAT", "PID", "OVLD", "LINK", "WORKLOADS"];

pub(crate) fn status(name: &str) -> Result<()> {
    print(&Lab::open(name)?);
    Ok(())
}

pub(crate) fn print(lab: &Lab) {
    let headings = HEADINGS.map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(headings).chain(lab.hosts().iter().map(row)).collect();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| {
                let width = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
                format!("{cell:width$}")
            })
            .collect();
        println!("{}", cells.join("  ").trim_end());
    }
    println!("faults: {}", lab.faults());
    println!("files:  {}", lab.dir().display());
    if let Some(owner) = lab.owner_pid() {
        println!("owner:  process {owner}");
    }
}

fn row(host: &Host) -> [String; 7] {
    let access = host.access();
    let pid = host.pid();
    let running = match (host.is_present(), pid) {
        (false, _) => "host lost",
        (true, Some(_)) => "running",
        (true, None) => "not running",
    };
    let (mtu, port_mtu) = host.mtus();
    let mut link = format!("{} mtu {mtu}", if host.is_link_up() { "up" } else { "down" });
    if port_mtu != mtu {
        link += &format!(" (switch {port_mtu})");
    }
    let workloads = host.workloads();
    [
        host.name().to_owned(),
        describe_addresses(host),
        if access == Access::PUBLIC { "-".to_owned() } else { access.to_string() },
        pid.map_or("-".to_owned(), |pid| pid.to_string()),
        running.to_owned(),
        link,
        if workloads.is_empty() { "-".to_owned() } else { workloads.join(",") },
    ]
}
