//! Finds the process that has bound a port, from the kernel's socket tables and the open files of processes.

use std::fs;

use ovl_proto::publish::Transport;

/// Returns the process that has bound a port, as `NAME (process ID)`. `None` if the port is free by now, or
/// if ovld may not inspect the process.
pub(super) fn of(transport: Transport, port: u16) -> Option<String> {
    let tables = match transport {
        Transport::Tcp => ["tcp", "tcp6"],
        Transport::Udp => ["udp", "udp6"],
        Transport::Sctp => return None,
    };
    let inodes: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok())
        .flat_map(|table| inodes(&table, port))
        .collect();
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit())).find_map(|pid| {
        let opened = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        let has = opened.filter_map(|file| fs::read_link(file.path()).ok()).any(|target| {
            target.to_str().is_some_and(|target| {
                inodes.iter().any(|inode| target.strip_prefix("socket:[") == Some(&format!("{inode}]")))
            })
        });
        let name = has.then(|| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default())?;
        Some(format!("{} (process {pid})", name.trim_end().escape_default()))
    })
}

/// Returns the inodes of the sockets that are bound to a port, without those of single connections. The table
/// has the format of `/proc/net/tcp`: the local and remote addresses are in the second and third column, the
/// inode is in the tenth.
fn inodes(table: &str, port: u16) -> Vec<String> {
    let rows = table.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    rows.filter(|columns| {
        let port_of = |column: usize| {
            let (_, port) = columns.get(column)?.rsplit_once(':')?;
            u16::from_str_radix(port, 16).ok()
        };
        port_of(1) == Some(port) && port_of(2) == Some(0)
    })
    .filter_map(|columns| columns.get(9).map(|&inode| inode.to_owned()))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = of(Transport::Tcp, port).unwrap();
        assert!(found.ends_with(&format!("(process {})", std::process::id())), "{found}");
        assert_eq!(of(Transport::Udp, port), None);
    }

    #[test]
    fn a_table_that_is_none_holds_nothing() {
        assert_eq!(inodes("", 80), Vec::<String>::new());
        assert_eq!(inodes("header\n1: x:0050\n\n2: 0:0050 0:zz 1", 80), Vec::<String>::new());
    }
}
