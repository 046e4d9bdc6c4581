//! `pairs`: checks whether every workload reaches every other one.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_lab::{EchoServer, Host, Lab, Workload, wait_until, without_prefix_length};
use serde_json::Value;

const KNOWN_TIMEOUT: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const PORT: u16 = 7777;
const PAYLOAD: &[u8] = b"from one workload to another and back";

/// A workload and the addresses of its endpoint.
struct Party {
    workload: Workload,
    addresses: Vec<String>,
}

/// The result of one workload towards each workload: `None` for itself, otherwise the failures.
type Row = Vec<Option<Vec<String>>>;

pub(crate) fn pairs(lab: &str) -> Result<ExitCode> {
    let lab = Lab::open(lab)?;
    let parties = parties(&lab)?;
    // The servers run until all pairs have been tried.
    let _servers: Vec<EchoServer> =
        parties.iter().map(|party| party.workload.tcp_echo(PORT)).collect::<Result<_>>()?;

    let rows: Vec<Row> = thread::scope(|scope| {
        let tries: Vec<_> = parties.iter().map(|from| scope.spawn(|| try_all(from, &parties))).collect();
        tries.into_iter().map(|each| each.join().unwrap_or_default()).collect()
    });
    print(&parties, &rows);

    let tried = parties.len() * (parties.len() - 1);
    let good = rows.iter().flatten().flatten().filter(|failures| failures.is_empty()).count();
    println!("{good} of {tried} pairs reach each other by ping and TCP");
    Ok(if good == tried { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns all workloads with their addresses, as soon as every daemon knows all their endpoints.
fn parties(lab: &Lab) -> Result<Vec<Party>> {
    let workloads: Vec<Workload> = lab
        .hosts()
        .iter()
        .flat_map(|host| host.workloads().into_iter().map(|name| host.find_workload(&name)))
        .collect::<Result<_>>()?;
    ensure!(
        workloads.len() > 1,
        "pairs need two workloads: netns-lab workload add HOST NAME, then attach them"
    );

    let mut addresses = Vec::new();
    for host in lab.hosts().iter().filter(|host| host.is_running()) {
        let what = format!("{} to know the endpoints of all workloads", host.name());
        addresses = wait_until(KNOWN_TIMEOUT, &what, || addresses_of_all(host, &workloads).map(Some))?;
    }
    ensure!(!addresses.is_empty(), "no daemon is running: netns-lab start HOST");
    let parties = workloads.into_iter().zip(addresses);
    Ok(parties.map(|(workload, addresses)| Party { workload, addresses }).collect())
}

/// Returns the addresses of each workload's endpoint as one host sees them.
fn addresses_of_all(host: &Host, workloads: &[Workload]) -> Result<Vec<Vec<String>>> {
    let endpoints = host.ctl_json(&["endpoints"])?;
    let addresses = workloads.iter().map(|workload| {
        let (name, node) = (workload.name(), workload.host().name());
        addresses_of(&endpoints, name, node)
            .with_context(|| format!("no endpoint {name} with an address on {node}"))
    });
    addresses.collect()
}

fn addresses_of(endpoints: &Value, name: &str, node: &str) -> Option<Vec<String>> {
    let endpoint = endpoints.as_array()?.iter().find(|each| each["name"] == name && each["node"] == node)?;
    let texts = endpoint["addresses"].as_array()?.iter().filter_map(Value::as_str);
    let addresses: Vec<String> = texts.map(|text| without_prefix_length(text).to_owned()).collect();
    (!addresses.is_empty()).then_some(addresses)
}

fn try_all(from: &Party, parties: &[Party]) -> Row {
    let same = |to: &Party| to.workload.netns_name() == from.workload.netns_name();
    parties.iter().map(|to| (!same(to)).then(|| try_one(from, to))).collect()
}

fn try_one(from: &Party, to: &Party) -> Vec<String> {
    let mut failures = Vec::new();
    for address in &to.addresses {
        if !from.workload.ping(address, PING_TIMEOUT) {
            failures.push(format!("no answer to a ping of {address}"));
        }
        match from.workload.tcp_roundtrip(address, PORT, PAYLOAD) {
            Ok(answer) if answer == PAYLOAD => {}
            Ok(_) => failures.push(format!("TCP to {address}: the echo differs from what was sent")),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    failures
}

fn print(parties: &[Party], rows: &[Row]) {
    let label = |party: &Party| format!("{}/{}", party.workload.host().name(), party.workload.name());
    let labels: Vec<String> = parties.iter().map(label).collect();
    let width = labels.iter().map(String::len).max().unwrap_or(0).max("from\\to".len());
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:width$}")).collect();
        println!("  {}", cells.join("  ").trim_end());
    };

    line(&[&["from\\to".to_owned()], labels.as_slice()].concat());
    for (from, row) in labels.iter().zip(rows) {
        let cells = row.iter().map(|cell| match cell {
            None => "-".to_owned(),
            Some(failures) if failures.is_empty() => "ok".to_owned(),
            Some(_) => "FAIL".to_owned(),
        });
        line(&std::iter::once(from.clone()).chain(cells).collect::<Vec<_>>());
    }
    for (from, row) in labels.iter().zip(rows) {
        for (to, failures) in labels.iter().zip(row) {
            for failure in failures.iter().flatten() {
                println!("  {from} -> {to}: {failure}");
            }
        }
    }
}
