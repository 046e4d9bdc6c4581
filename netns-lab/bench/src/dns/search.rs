//! `search`: the number of queries for an external name by a client with a search list.

use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Netns};
use serde_json::json;

use super::super::Bench;
use super::super::cluster::Cluster;
use super::super::report::{Bar, Figure, Row};

/// Address of the upstream resolver.
const UPSTREAM: &str = "127.0.0.2";
const CLUSTER_DNS: &str = "10.96.0.10";
const LOOK_AROUND: Duration = Duration::from_millis(50);

/// Files that are deleted on drop.
struct Files {
    upstream: PathBuf,
    /// Directory that `ip netns exec` mounts over /etc.
    inside: PathBuf,
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.upstream);
        let _ = fs::remove_dir_all(&self.inside);
    }
}

/// Measures the figure of this module.
pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let mut files = Files {
        upstream: std::env::temp_dir().join(format!("ovl-bench-{}.conf", std::process::id())),
        inside: PathBuf::new(),
    };
    fs::write(&files.upstream, format!("nameserver {UPSTREAM}\n"))?;
    let toml = format!("resolv_conf = \"{}\"\n", files.upstream.display());
    let cluster = Cluster::start(bench.lab_with(1, &toml)?)?;
    let host = cluster.host(0)?;
    let (workload, _) = cluster.workload(0, "asks")?;
    let name = workload.netns_name();
    files.inside = PathBuf::from("/etc/netns").join(name);
    fs::create_dir_all(&files.inside)?;
    let search = "search default.svc.cluster.local svc.cluster.local cluster.local";
    fs::write(
        files.inside.join("resolv.conf"),
        format!("nameserver {CLUSTER_DNS}\n{search}\noptions ndots:5\n"),
    )?;
    let socket = host.run(|| UdpSocket::bind((UPSTREAM, 53)))?.context("an upstream resolver")?;
    socket.set_read_timeout(Some(LOOK_AROUND))?;
    let (asked, ending) = (AtomicUsize::new(0), AtomicBool::new(false));
    let answered = thread::scope(|scope| {
        scope.spawn(|| answer_all(&socket, &asked, &ending));
        let result = look_up(host, &workload, name);
        ending.store(true, Ordering::Relaxed);
        result
    })?;
    Ok(Figure {
        setup: "1 host; a pod's resolv.conf with three search domains and ndots:5; the C library looks up the IPv4 \
                address of api.example.org"
            .to_owned(),
        rows: vec![
            Row::with_bar(
                "queries to the upstream resolver",
                asked.into_inner() as f64,
                "",
                Bar::AtMost(1.0),
            ),
            Row::with_bar("queries of the pod", answered, "", Bar::AtMost(1.0)),
        ],
        notes: Vec::new(),
        details: json!({}),
    })
}

/// Resolves the name in the workload, and returns the number of queries.
fn look_up(host: &Host, workload: &Netns, name: &str) -> Result<f64> {
    let count = || -> Result<f64> {
        let metrics = host.ctl_ok(&["metrics"])?;
        let lines = metrics.lines().filter(|line| line.starts_with("ovl_dns_queries_total{"));
        lines.map(|line| Ok(line.rsplit(' ').next().context("a number")?.parse::<f64>()?)).sum()
    };
    let before = count()?;
    let found = host.exec_ok(["ip", "netns", "exec", name, "getent", "ahostsv4", "api.example.org"])?;
    ensure!(found.starts_with("192.0.2.7 "), "{}: {found}", workload.path_str());
    Ok(count()? - before)
}

/// Answers every query with one address.
fn answer_all(socket: &UdpSocket, asked: &AtomicUsize, ending: &AtomicBool) {
    let mut buffer = [0; 1024];
    while !ending.load(Ordering::Relaxed) {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        asked.fetch_add(1, Ordering::Relaxed);
        let query = &buffer[..length];
        let Some(zero) = query.iter().skip(12).position(|byte| *byte == 0) else { continue };
        let Some(question) = query.get(12..12 + zero + 5) else { continue };
        let head = [&query[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]].concat();
        let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7];
        let _ = socket.send_to(&[&head[..], question, &record].concat(), from);
    }
}
