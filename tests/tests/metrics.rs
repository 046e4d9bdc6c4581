//! Metrics over HTTP, with a real Prometheus: service discovery, dashboard, alerts.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Spawned, wait_until};
use ovl_tests::cni::{Conflist, Container};
use ovl_tests::service::apply;
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ping_all_pairs, problems, start_lab_with, strings, text,
    wait_no_problem, wait_problem,
};
use serde_json::{Value, json};

/// How long Prometheus and ovld may take until something is known to the former.
const SCRAPED: Duration = Duration::from_secs(60);

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus")
}

fn lab_with_metrics(hosts: usize) -> Lab {
    let mut config = LabConfig::hosts(hosts);
    config.config = "metrics_listen = \"0.0.0.0:9640\"\nfast_path = \"auto\"\n".to_owned();
    start_lab_with(config).unwrap()
}

/// Reads a URL with curl, and returns the status and the body.
fn get(from: &Netns, arguments: &[&str]) -> Result<(u64, String)> {
    let all = [&["curl", "-sS", "--max-time", "5", "-w", "\n%{http_code}"], arguments].concat();
    let output = from.exec_ok(all)?;
    let (body, status) = output.rsplit_once('\n').context("no status")?;
    Ok((status.trim().parse()?, body.to_owned()))
}

/// A Prometheus in the namespace of a host, which scrapes all hosts every second. Its alerts fire without delay.
struct Prometheus<'a> {
    host: &'a Host,
    _process: Spawned,
}

impl<'a> Prometheus<'a> {
    fn start(host: &'a Host) -> Result<Self> {
        let dir = host.dir().join("prometheus");
        fs::create_dir_all(&dir)?;
        let packaged = fs::read_to_string(packaging().join("prometheus.yml"))?;
        let address = host.address()?;
        let discovery = format!("http://{address}:9640/targets\n        refresh_interval: 1s");
        let config = packaged.replace("http://192.0.2.10:9640/targets", &discovery);
        ensure!(config != packaged, "{packaged}");
        fs::write(
            dir.join("prometheus.yml"),
            format!("global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n{config}"),
        )?;
        let alerts = fs::read_to_string(packaging().join("alerts.yml"))?;
        let at_once: Vec<&str> = alerts.lines().filter(|line| !line.trim().starts_with("for: ")).collect();
        fs::write(dir.join("alerts.yml"), at_once.join("\n"))?;
        let process = host.spawn([
            "prometheus".to_owned(),
            format!("--config.file={}/prometheus.yml", dir.display()),
            format!("--storage.tsdb.path={}/data", dir.display()),
            "--web.listen-address=127.0.0.1:9090".to_owned(),
        ])?;
        Ok(Self { host, _process: process })
    }

    /// Returns the result of an API call.
    fn api(&self, path: &str, query: Option<&str>) -> Result<Value> {
        let url = format!("http://127.0.0.1:9090/api/v1/{path}");
        let query = query.map(|query| format!("query={query}"));
        let mut arguments = vec!["-G", &url];
        if let Some(query) = &query {
            arguments.extend(["--data-urlencode", query]);
        }
        let (status, body) = get(self.host, &arguments)?;
        ensure!(status == 200, "{path}: {status} {body}");
        let answer: Value = serde_json::from_str(&body)?;
        Ok(answer["data"].clone())
    }

    /// Returns the samples of an instant query.
    fn query(&self, query: &str) -> Result<Vec<Value>> {
        let data = self.api("query", Some(query))?;
        Ok(data["result"].as_array().context("no result")?.clone())
    }

    /// Returns the names of the alerts that fire.
    fn firing(&self) -> Result<BTreeSet<String>> {
        let data = self.api("alerts", None)?;
        let alerts = data["alerts"].as_array().context("no alerts")?;
        Ok(alerts.iter().map(|alert| text(&alert["labels"]["alertname"])).collect())
    }
}

/// The queries of the dashboard, with the title of their panels.
fn dashboard() -> Vec<(String, String)> {
    let file = fs::read_to_string(packaging().join("dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&file).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let queries = panels.iter().flat_map(|panel| {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        let title = text(&panel["title"]);
        targets.into_iter().map(move |target| (title.clone(), text(&target["expr"])))
    });
    queries.map(|(title, expr)| (title, expr.replace("$__rate_interval", "10s"))).collect()
}

/// The names of ovl's metrics in a text, without the suffixes of histograms.
fn names_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c)).filter(|word| word.starts_with("ovl_"));
    let stem = |word: &str| {
        let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
        histogram.filter(|stem| stem.ends_with("_seconds")).unwrap_or(word).to_owned()
    };
    words.map(stem).collect()
}

/// Makes something of everything that is measured: an encrypted and a plain network, a policy that refuses, a call of a
/// container runtime, a name that is asked of the world, a repair.
fn make_traffic(lab: &Lab) {
    create_network(lab, "secret", &["--subnet", "10.77.0.0/24", "--encrypted"]).unwrap();
    create_network(lab, "plain", &["--subnet", "10.78.0.0/24"]).unwrap();
    let all: Vec<_> = lab
        .hosts()
        .iter()
        .flat_map(|host| ["secret", "plain"].map(|network| (host, network)))
        .map(|(host, network)| {
            let name = format!("{network}-{}", host.name());
            attach(host, &name, network, &["--label", &format!("app={name}")]).unwrap()
        })
        .collect();
    let (secret, plain): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|attached| attached.workload.name().starts_with("secret"));
    ping_all_pairs(&secret, SOON).unwrap();
    ping_all_pairs(&plain, SOON).unwrap();
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": "closed", "namespace": "default" },
        "spec": { "podSelector": { "matchLabels": { "app": "plain-h2" } }, "policyTypes": ["Ingress"] },
    });
    apply(lab, &lab["h1"], &policy.to_string()).unwrap();
    wait_until(SOON, "a refused packet", || {
        plain[0].workload.exec(["ping", "-c1", "-W1", &plain[1].address()])?;
        let metrics = lab["h2"].ctl_ok(&["metrics"])?;
        anyhow::Ok(metrics.contains("ovl_policy_refused_packets_total{"))
    })
    .unwrap();
    let container = lab["h1"].workload("container").unwrap();
    Conflist::new(&lab["h1"], "plain").add(&lab["h1"], &Container::for_workload(&container)).unwrap();
    // Somebody takes an entry away, and ovld puts it back.
    let entries = lab["h1"].exec_ok(["bridge", "fdb", "show"]).unwrap();
    let entry = entries.lines().find(|line| line.contains("dev ovx-") && line.contains(" dst ")).unwrap();
    let words: Vec<&str> = entry.split_whitespace().collect();
    let at = |word: &str| words[words.iter().position(|each| *each == word).unwrap() + 1];
    lab["h1"]
        .exec_ok(["bridge", "fdb", "del", words[0], "dev", at("dev"), "dst", at("dst"), "self"])
        .unwrap();
    wait_until(SOON, "the repair", || {
        let metrics = lab["h1"].ctl_ok(&["metrics"])?;
        anyhow::Ok(metrics.contains("ovl_reconcile_repairs_total{kind=\"fdb\"}"))
    })
    .unwrap();
}

#[test]
fn prometheus_scrapes_all_hosts_and_the_dashboard_and_alerts_have_data() {
    let lab = lab_with_metrics(3);
    make_traffic(&lab);
    let prometheus = Prometheus::start(&lab["h1"]).unwrap();
    wait_until(SCRAPED, "three hosts to be scraped", || {
        let up = prometheus.query("up{job=\"ovl\"} == 1")?;
        let hosts: BTreeSet<String> = up.iter().map(|sample| text(&sample["metric"]["host"])).collect();
        ensure!(hosts == ["h1", "h2", "h3"].map(str::to_owned).into(), "{hosts:?}");
        Ok(())
    })
    .unwrap();
    let queries = dashboard();
    assert!(queries.len() > 20, "{queries:?}");
    for (title, query) in &queries {
        wait_until(SCRAPED, &format!("data of the panel {title}: {query}"), || {
            anyhow::Ok(!prometheus.query(query)?.is_empty())
        })
        .unwrap();
    }
    wait_until(SCRAPED, "no alert", || {
        let firing = prometheus.firing()?;
        ensure!(firing.is_empty(), "{firing:?}");
        Ok(())
    })
    .unwrap();
    lab.loss_udp_port(100.0, 4789).unwrap();
    let expected = ["OvlNotReady", "OvlPathBroken", "OvlProblem"].map(str::to_owned).into();
    wait_until(SCRAPED, "the alerts of a blocked port", || {
        let firing = prometheus.firing()?;
        ensure!(firing == expected, "{firing:?}");
        Ok(())
    })
    .unwrap();
    // What alerts and the document name exists, and what exists is in the document.
    let data = prometheus.api("label/__name__/values", None).unwrap();
    let scraped = names_in(&strings(&data).join(" "));
    let alerts = names_in(&fs::read_to_string(packaging().join("alerts.yml")).unwrap());
    assert!(alerts.is_subset(&scraped), "{:?}", alerts.difference(&scraped));
    let document = fs::read_to_string(packaging().join("../../docs/metrics.md")).unwrap();
    let documented = names_in(&document);
    assert!(scraped.is_subset(&documented), "not documented: {:?}", scraped.difference(&documented));
    assert!(documented.is_subset(&scraped), "not scraped: {:?}", documented.difference(&scraped));
    lab.clear_faults().unwrap();
    lab["h3"].kill9().unwrap();
    let expected = ["OvlDown", "OvlMajorityAtRisk", "OvlPeerDown"].map(str::to_owned).into();
    wait_until(SCRAPED, "the alerts of a dead daemon", || {
        let firing = prometheus.firing()?;
        ensure!(firing == expected, "{firing:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn metrics_and_alerts_pass_the_checks_of_promtool() {
    let lab = lab_with_metrics(1);
    create_network(&lab, "plain", &["--subnet", "10.78.0.0/24"]).unwrap();
    attach(&lab["h1"], "web", "plain", &[]).unwrap();
    let page = lab["h1"].ctl_ok(&["metrics"]).unwrap();
    let remarks = lab["h1"].exec_input(["promtool", "check", "metrics"], Some(&page)).unwrap();
    assert_eq!(remarks, "");
    let alerts = packaging().join("alerts_test.yml");
    let tested = lab["h1"].exec_ok(["promtool", "test", "rules", alerts.to_str().unwrap()]).unwrap();
    assert_contains(&tested, &["SUCCESS"]);
    let rules = fs::read_to_string(packaging().join("alerts.yml")).unwrap();
    let tests = fs::read_to_string(&alerts).unwrap();
    let names: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        assert!(tests.contains(&format!("  - name: {name}\n")), "no test of {name}");
    }
}

#[test]
fn metrics_are_served_in_both_formats_and_nothing_else_is() {
    let lab = lab_with_metrics(2);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let url = |path: &str| format!("http://{}:9640{path}", h1.address().unwrap());
    let open = "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    let (status, page) = get(h2, &["-i", "-H", open, &url("/metrics")]).unwrap();
    assert_eq!(status, 200);
    assert_contains(&page, &["application/openmetrics-text; version=1.0.0", "ovl_ready 1\n", "\n# EOF\n"]);
    let (status, page) = get(h2, &["-i", &url("/metrics")]).unwrap();
    assert_eq!(status, 200);
    assert_contains(&page, &["text/plain; version=0.0.4", "# TYPE ovl_gossip_sent_total counter\n"]);
    assert!(!page.contains("# EOF"), "{page}");
    let (status, targets) = get(h2, &[&url("/targets")]).unwrap();
    let targets: Value = serde_json::from_str(&targets).unwrap();
    let expected: Vec<Value> = [h1, h2]
        .map(|host| json!({ "targets": [format!("{}:9640", host.address().unwrap())], "labels": { "host": host.name() } }))
        .into();
    let listed = targets.as_array().unwrap();
    assert!(
        status == 200 && listed.len() == 2 && expected.iter().all(|each| listed.contains(each)),
        "{targets}"
    );
    assert_eq!(get(h2, &[&url("/")]).unwrap().0, 404);
    assert_eq!(get(h2, &[&url("/metrics/../ovld.toml"), "--path-as-is"]).unwrap().0, 404);
    assert_eq!(get(h2, &["-X", "POST", "-d", "x", &url("/metrics")]).unwrap().0, 405);
    assert_eq!(get(h2, &["-I", &url("/metrics")]).unwrap().0, 200);
    // Clients that open connections and say nothing do not keep others out for long.
    let at = (h1.address().unwrap(), 9640);
    let idle: Vec<_> = (0..200)
        .map(|_| h2.run(|| std::net::TcpStream::connect_timeout(&at.into(), SOON)).unwrap().unwrap())
        .collect();
    wait_until(SCRAPED, "an answer beside idle clients", || {
        anyhow::Ok(get(h2, &[&url("/metrics")])?.0 == 200)
    })
    .unwrap();
    drop(idle);
}

#[test]
fn socket_of_metrics_is_for_root_alone_and_a_taken_one_is_a_problem() {
    let mut config = LabConfig::hosts(1);
    let at = std::env::temp_dir().join(format!("ovl-metrics-{}", std::process::id()));
    config.config = format!("metrics_listen = \"unix:{}\"\n", at.display());
    let other = std::os::unix::net::UnixListener::bind(&at).unwrap();
    let lab = start_lab_with(config).unwrap();
    let h1 = &lab["h1"];
    let path = at.to_str().unwrap();
    wait_problem(h1, &["the metrics are not served", path, "metrics_listen"], SOON).unwrap();
    // The other program ends without removing its socket.
    drop(other);
    wait_no_problem(h1, SOON).unwrap();
    assert_eq!(problems(h1).unwrap(), Vec::<String>::new());
    let (status, page) = get(h1, &["--unix-socket", path, "http://ovl/metrics"]).unwrap();
    assert!(status == 200 && page.contains("ovl_ready 1\n"), "{page}");
    assert_eq!(h1.exec_ok(["stat", "-c", "%a", path]).unwrap().trim(), "600");
    // It is taken over after a kill, and no host tells others of it.
    h1.kill9().unwrap();
    h1.restart().unwrap();
    wait_until(SOON, "metrics after a restart", || {
        let (status, targets) = get(h1, &["--unix-socket", path, "http://ovl/targets"])?;
        ensure!((status, targets.as_str()) == (200, "[]"), "{status} {targets}");
        Ok(())
    })
    .unwrap();
    drop(lab);
    fs::remove_file(&at).unwrap();
}
