//! Reads what the host has besides ovl, for a diagnosis: devices, queueing disciplines, routes, tables, sockets, counters.
//!
//! Nothing here changes anything, and nothing is judged. All functions block, and read the network namespace of the calling
//! thread. Begin to read at [`survey`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{self, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWROUTE};
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{BASE_TABLE, Table};
use ovl_dataplane::state::PROTOCOL;
use ovl_proto::id::Mac;
use serde_json::Value;

use super::attribute::{attributes, ip, text, u8_at, u32_at};
use super::error::Result;
use super::link::LinkView;
use super::message::{TRAFFIC_CONTROL, traffic_control};
use super::socket::{Batch, Route};
use super::{dump, foreign, sysctl};

/// What a survey looks up.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Sysctls to read.
    pub sysctls: BTreeSet<String>,
    /// Settings of each device to read, such as `net.ipv4.conf.DEVICE.forwarding`: the parts before and after the device.
    pub of_devices: Vec<(&'static str, &'static str)>,
    /// Addresses whose output interfaces are looked up.
    pub leads_to: BTreeSet<IpAddr>,
    /// Ports whose sockets are looked up.
    pub ports: BTreeSet<u16>,
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// The devices by name.
    pub devices: BTreeMap<String, SurveyedDevice>,
    /// The queueing disciplines: the device and the kind, such as `netem`.
    pub disciplines: BTreeSet<(String, String)>,
    /// The sysctls that exist.
    pub sysctls: BTreeMap<String, String>,
    /// The output interface to each address. `None` if there is no route.
    pub leads_to: BTreeMap<IpAddr, Option<String>>,
    /// Routes with ovl's protocol that are in another table than ovl's, as `ip route` takes them.
    pub stray_routes: BTreeSet<String>,
    /// The nftables tables: family and name. `None` if they cannot be listed.
    pub tables: Option<BTreeSet<(String, String)>>,
    /// The nftables chains of other programs.
    pub chains: Vec<SurveyedChain>,
    /// Sockets of other programs at the wanted ports.
    pub sockets: Vec<BoundSocket>,
    /// The neighbour tables: `arp_cache` and `ndisc_cache`.
    pub neighbours: BTreeMap<&'static str, NeighbourUse>,
}

/// A device of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SurveyedDevice {
    /// Whether ovl created it, including the host interfaces of endpoints that are being deleted.
    pub by_ovl: bool,
    /// Whether it is up.
    pub up: bool,
    /// The MTU, in bytes.
    pub mtu: u32,
    /// The MAC address, if it has one.
    pub mac: Option<Mac>,
    /// The index.
    pub index: u32,
    /// The VNI and UDP port of a VXLAN device. The VNI is `None` if it takes all.
    pub vxlan: Option<(Option<u32>, u16)>,
}

/// A chain of another program's nftables table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SurveyedChain {
    /// `ip`, `ip6`, `inet`, `bridge` or `netdev`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub name: String,
    /// The hook of a base chain, such as `input`. Empty for other chains.
    pub hook: String,
    /// The rules, as `nft` prints them. Only for base chains at `input`, `output`, `prerouting` and `forward`, and for chains
    /// of tables with one.
    pub rules: Vec<String>,
}

/// A socket of another program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundSocket {
    /// Whether it is one of UDP, or one of TCP that listens.
    pub udp: bool,
    /// The port.
    pub port: u16,
    /// The name and the id of a process that has it.
    pub owner: (String, u32),
}

/// How full a neighbour table is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NeighbourUse {
    /// The number of entries.
    pub entries: u64,
    /// How often an entry could not be added since boot.
    pub refused: u64,
}

/// Reads the host.
///
/// # Errors
///
/// The kernel refuses a dump.
pub fn survey(wanted: &Wanted) -> Result<Survey> {
    let mut route = Route::open()?;
    let mut survey = Survey::default();
    let names = devices(&mut route, &mut survey)?;
    disciplines(&mut route, &names, &mut survey)?;
    for address in &wanted.leads_to {
        let index = dump::output_interface(&mut route, *address)?;
        let name = index.and_then(|index| names.get(&index).cloned());
        survey.leads_to.insert(*address, name);
    }
    survey.stray_routes = stray_routes(&mut route, &names)?;
    let per_device = wanted.of_devices.iter().flat_map(|(before, after)| {
        // As for sysctl(8), a dot in the name of a device is written as a slash.
        survey.devices.keys().map(move |name| format!("{before}{}{after}", name.replace('.', "/")))
    });
    let sysctls: Vec<String> = wanted.sysctls.iter().cloned().chain(per_device).collect();
    survey.sysctls =
        sysctls.into_iter().filter_map(|name| Some((name.clone(), sysctl::read(&name)?))).collect();
    nftables(&mut survey);
    survey.sockets = sockets(&wanted.ports);
    for table in ["arp_cache", "ndisc_cache"] {
        if let Ok(text) = fs::read_to_string(format!("/proc/thread-self/net/stat/{table}")) {
            survey.neighbours.insert(table, neighbour_use(&text));
        }
    }
    Ok(survey)
}

fn devices(route: &mut Route, survey: &mut Survey) -> Result<BTreeMap<u32, String>> {
    let dump = dump::all_links(route)?;
    let mut names = BTreeMap::new();
    for message in dump.messages().filter(|message| message.kind == RTM_NEWLINK) {
        let Some(view) = LinkView::parse(message.payload) else { continue };
        let device = SurveyedDevice {
            by_ovl: view.ours().is_some() || view.is_doomed(),
            up: view.up,
            mtu: view.mtu,
            mac: view.mac,
            index: view.index,
            vxlan: view.vxlan(),
        };
        names.insert(view.index, view.name.to_owned());
        survey.devices.insert(view.name.to_owned(), device);
    }
    Ok(names)
}

fn disciplines(route: &mut Route, names: &BTreeMap<u32, String>, survey: &mut Survey) -> Result<()> {
    let mut batch = Batch::default();
    batch.push_built(libc::RTM_GETQDISC, 0, &traffic_control(0, 0, 0, 0));
    // A kernel without traffic control has none.
    let Ok(dump) = route.dump_built(batch)? else { return Ok(()) };
    for message in dump.messages().filter(|message| message.kind == RTM_NEWQDISC) {
        let kind = attributes(message.payload, TRAFFIC_CONTROL).find(|(kind, _)| *kind == libc::TCA_KIND);
        if let Some(name) = u32_at(message.payload, 4).and_then(|index| names.get(&index))
            && let Some((_, kind)) = kind
        {
            survey.disciplines.insert((name.clone(), text(kind).to_owned()));
        }
    }
    Ok(())
}

/// Lists the routes with ovl's protocol in other tables than the main one.
fn stray_routes(route: &mut Route, names: &BTreeMap<u32, String>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWROUTE) {
            found.extend(stray_route(message.payload, names));
        }
    }
    Ok(found)
}

fn stray_route(payload: &[u8], names: &BTreeMap<u32, String>) -> Option<String> {
    if u8_at(payload, 5)? != PROTOCOL {
        return None;
    }
    let mut table = u32::from(u8_at(payload, 4)?);
    let (mut to, mut device) = (None, None);
    for (kind, value) in attributes(payload, 12) {
        match kind {
            libc::RTA_DST => to = ip(value),
            libc::RTA_OIF => device = u32_at(value, 0).and_then(|index| names.get(&index)),
            libc::RTA_TABLE => table = u32_at(value, 0)?,
            _ => {}
        }
    }
    // The kernel adds routes to the addresses that ovl gives its devices, to the local table.
    if table == u32::from(libc::RT_TABLE_MAIN) || table == u32::from(libc::RT_TABLE_LOCAL) {
        return None;
    }
    let to = to.map_or_else(|| "default".to_owned(), |to| format!("{to}/{}", payload.get(1).unwrap_or(&0)));
    let device = device.map_or_else(String::new, |device| format!(" dev {device}"));
    Some(format!("{to}{device} table {table}"))
}

/// Lists tables and chains by `nft`. Without it there are none.
fn nftables(survey: &mut Survey) {
    let Ok(listed) = foreign::output("nft", &["-j", "list", "chains"]) else { return };
    let Ok(Value::Object(listed)) = serde_json::from_str(&listed) else { return };
    let entries = listed.get("nftables").and_then(Value::as_array);
    let mut tables = BTreeSet::new();
    let mut watched = BTreeSet::new();
    for chain in entries.into_iter().flatten().filter_map(|entry| entry.get("chain")) {
        let of = |key: &str| chain.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (family, table, hook) = (of("family"), of("table"), of("hook"));
        tables.insert((family.clone(), table.clone()));
        if is_own(&family, &table) {
            continue;
        }
        if matches!(&*hook, "input" | "output" | "prerouting" | "forward" | "ingress") {
            watched.insert((family.clone(), table.clone()));
        }
        survey.chains.push(SurveyedChain { family, table, name: of("name"), hook, rules: Vec::new() });
    }
    // A table without chains is not among these.
    if let Ok(text) = foreign::output("nft", &["list", "tables"]) {
        tables.extend(text.lines().filter_map(|line| {
            let mut words = line.strip_prefix("table ")?.split(' ');
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        }));
    }
    for (family, table) in watched {
        let Ok(text) = foreign::output("nft", &["-s", "-n", "list", "table", &family, &table]) else {
            continue;
        };
        for chain in survey.chains.iter_mut().filter(|it| it.family == family && it.table == table) {
            chain.rules = rules(&text, &chain.name);
        }
    }
    survey.tables = Some(tables);
}

/// Whether a table is one that ovl has today.
pub fn is_own(family: &str, table: &str) -> bool {
    (family, table) == ("inet", BASE_TABLE)
        || Table::ALL
            .into_iter()
            .chain([Table::Sources])
            .any(|own| (own.family(), own.name()) == (family, table))
}

/// Returns the rules of a chain in a table as `nft` lists it.
fn rules(table: &str, chain: &str) -> Vec<String> {
    let begin = format!("chain {chain} {{");
    let lines = table.lines().map(str::trim).skip_while(|line| *line != begin).skip(1);
    let rules = lines.take_while(|line| *line != "}").filter(|line| !line.is_empty());
    rules.map(str::to_owned).collect()
}

/// Lists the sockets of other processes at these ports.
fn sockets(ports: &BTreeSet<u16>) -> Vec<BoundSocket> {
    if ports.is_empty() {
        return Vec::new();
    }
    let own: BTreeSet<u64> = own_sockets().collect();
    let mut bound = BTreeMap::new();
    for (file, udp) in [("udp", true), ("udp6", true), ("tcp", false), ("tcp6", false)] {
        let Ok(text) = fs::read_to_string(format!("/proc/thread-self/net/{file}")) else { continue };
        let all = text.lines().skip(1).filter_map(|line| bound_socket(line, udp));
        // Sockets of the kernel, such as those of VXLAN, have no inode.
        let others = all.filter(|(port, inode)| ports.contains(port) && *inode != 0 && !own.contains(inode));
        bound.extend(others.map(|(port, inode)| (inode, (udp, port))));
    }
    let owners = owners(&bound);
    let owned = bound.into_iter().filter_map(|(inode, (udp, port))| {
        Some(BoundSocket { udp, port, owner: owners.get(&inode)?.clone() })
    });
    owned.collect()
}

/// Parses the port and the inode in a line of `/proc/net/udp` or `/proc/net/tcp`. `None` for a connection.
fn bound_socket(line: &str, udp: bool) -> Option<(u16, u64)> {
    const LISTEN: &str = "0A";
    let mut words = line.split_whitespace();
    let local = words.nth(1)?;
    let state = words.nth(1)?;
    if !udp && state != LISTEN {
        return None;
    }
    let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    Some((port, words.nth(5)?.parse().ok()?))
}

fn own_sockets() -> impl Iterator<Item = u64> {
    let files = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    files.filter_map(|file| socket_inode(fs::read_link(file.path()).ok()?.to_str()?))
}

fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Finds the processes that have sockets with these inodes.
fn owners<T>(wanted: &BTreeMap<u64, T>) -> BTreeMap<u64, (String, u32)> {
    let mut found = BTreeMap::new();
    if wanted.is_empty() {
        return found;
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        for file in files.flatten() {
            let link = fs::read_link(file.path()).ok();
            let inode = link.as_deref().and_then(|link| link.to_str()).and_then(socket_inode);
            if let Some(inode) = inode.filter(|inode| wanted.contains_key(inode)) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.insert(inode, (name.trim().to_owned(), pid));
            }
        }
    }
    found
}

/// Returns the MAC address of each device that has one, by its index.
///
/// # Errors
///
/// The kernel refuses a dump.
pub fn macs() -> Result<BTreeMap<u32, Mac>> {
    let dump = dump::all_links(&mut Route::open()?)?;
    let links = dump.messages().filter(|message| message.kind == RTM_NEWLINK);
    Ok(links
        .filter_map(|it| LinkView::parse(it.payload))
        .filter_map(|it| Some((it.index, it.mac?)))
        .collect())
}

/// Parses `/proc/net/stat/arp_cache`: a header, then a line of hexadecimal numbers for each processor. The number of entries
/// is the same in each.
fn neighbour_use(text: &str) -> NeighbourUse {
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let at = |name: &str| header.iter().position(|word| *word == name);
    let (entries, refused) = (at("entries"), at("table_fulls"));
    let number =
        |line: &str, at: Option<usize>| u64::from_str_radix(line.split_whitespace().nth(at?)?, 16).ok();
    let mut found = NeighbourUse::default();
    for line in lines {
        found.entries = found.entries.max(number(line, entries).unwrap_or(0));
        found.refused += number(line, refused).unwrap_or(0);
    }
    found
}

/// Whether the device of this name could be one of ovl.
pub fn has_own_name(name: &str) -> bool {
    Device::new(name).is_some_and(|device| device.role().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_parsed_and_connections_are_not() {
        let line = "  12: 00000000:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0";
        assert_eq!(bound_socket(line, true), Some((4789, 4711)));
        assert_eq!(bound_socket(line, false), None);
        let listens = line.replace(" 07 ", " 0A ");
        assert_eq!(bound_socket(&listens, false), Some((4789, 4711)));
        for broken in ["", "x", "1: 2", "1: 00:GGGG 0 07 0 0 0 0 0 0"] {
            assert_eq!(bound_socket(broken, true), None, "{broken}");
        }
    }

    #[test]
    fn neighbour_statistics_are_summed_over_processors() {
        let text = "entries  allocs   destroys table_fulls\n0000000a  00000001 00000002 00000003\n0000000a  0 0 00000004\n";
        assert_eq!(neighbour_use(text), NeighbourUse { entries: 10, refused: 7 });
        assert_eq!(neighbour_use(""), NeighbourUse::default());
    }

    #[test]
    fn rules_are_those_of_one_chain() {
        let table = "table inet mine {\n\tchain a {\n\t\taccept\n\t}\n\n\tchain b {\n\t\ttype filter hook input priority 0; policy drop;\n\t\tudp dport 4789 drop\n\t}\n}\n";
        assert_eq!(
            rules(table, "b"),
            ["type filter hook input priority 0; policy drop;", "udp dport 4789 drop"]
        );
        assert!(rules(table, "c").is_empty());
    }

    #[test]
    fn own_tables_are_known() {
        assert!(is_own("inet", "ovl") && is_own("bridge", "ovl-guard") && is_own("inet", "ovl-sources"));
        assert!(!is_own("inet", "ovl-old") && !is_own("ip", "ovl"));
    }

    #[test]
    fn this_host_is_read() {
        let wanted = Wanted {
            of_devices: vec![("net.ipv4.conf.", ".forwarding")],
            leads_to: BTreeSet::from(["127.0.0.1".parse().unwrap()]),
            ..Wanted::default()
        };
        let survey = survey(&wanted).unwrap();
        assert!(survey.devices.contains_key("lo"));
        assert_eq!(survey.leads_to.values().next().unwrap().as_deref(), Some("lo"));
        assert!(survey.sysctls.contains_key("net.ipv4.conf.lo.forwarding"));
    }
}
