//! The page of ovld in a real browser: what it shows, keys, both colour schemes, and who may see it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use netns_lab::{Host, Lab, LabConfig, Netns, Signal, wait_until};
use ovl_tests::browser::Browser;
use ovl_tests::policy::ONLY_API;
use ovl_tests::routed::attach_many;
use ovl_tests::service::apply;
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ctl_error, ping_all_pairs, rows, wait_clean,
    wait_no_problem, wait_problem,
};
use serde_json::{Value, json};

const AT: &str = "ui_listen = \"127.0.0.1:9641\"\n";
/// Keys of WebDriver.
const ENTER: char = '\u{e007}';
const ESCAPE: char = '\u{e00c}';
const RIGHT: char = '\u{e014}';

fn lab_with_page(hosts: usize) -> Lab {
    let lab = Lab::new(LabConfig::hosts(hosts)).unwrap();
    lab.hosts().iter().for_each(|host| host.set_config(AT).unwrap());
    lab.start_all().unwrap();
    lab
}

/// Reads a URL with curl, and returns the status, the header and the body.
fn get(from: &Netns, arguments: &[&str]) -> Result<(u64, String)> {
    let all = [&["curl", "-sS", "-i", "--max-time", "5", "-w", "\n%{http_code}"], arguments].concat();
    let output = from.exec_ok(all)?;
    let (body, status) = output.rsplit_once('\n').context("no status")?;
    Ok((status.trim().parse()?, body.to_owned()))
}

/// The URL of the page with the token, and the token.
fn address(host: &Host) -> (String, String) {
    let url = wait_until(SOON, "the address of the page", || host.ctl_ok(&["page"]).map(Some))
        .unwrap()
        .trim()
        .to_owned();
    let token = url.rsplit_once('=').unwrap().1.to_owned();
    (url, token)
}

/// Saves a picture below the target directory, for `docs/`.
fn save(browser: &Browser<'_>, host: &Host, name: &str) {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let picture = browser.screenshot().unwrap();
    host.exec_input(["sh", "-c", &format!("base64 -d > {}", path.display())], Some(&picture)).unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    assert!((5_000..150_000).contains(&size), "{size}");
}

#[test]
fn cluster_is_shown_searched_and_asked_in_a_browser_by_keys_alone() {
    let lab = lab_with_page(3);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.2.0.0/24", "--encrypted"]).unwrap();
    let mut all = Vec::new();
    for (n, host) in lab.hosts().iter().enumerate() {
        for name in ["web", "api"] {
            let label = format!("app={name}");
            all.push(attach(host, &format!("{name}{n}"), "blue", &["--label", &label]).unwrap());
        }
        attach(host, &format!("db{n}"), "red", &[]).unwrap();
    }
    ping_all_pairs(&all, SOON).unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": 8080 }] },
    });
    apply(&lab, h1, &service.to_string()).unwrap();
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": "closed", "namespace": "default" },
        "spec": { "podSelector": { "matchLabels": { "app": "api" } }, "policyTypes": ["Ingress"] },
    });
    apply(&lab, h1, &policy.to_string()).unwrap();
    // The whole cluster is seen from any member.
    let (url, token) = address(h2);
    let browser = Browser::start(h2).unwrap();
    browser.open(&url).unwrap();
    browser
        .wait_text("#summary", &["seen from h2", "3 of 3 hosts alive", "9 endpoints", "2 networks"])
        .unwrap();
    browser.wait_value("document.querySelectorAll('.chip').length", &json!(9)).unwrap();
    browser.wait_text("#hosts", &["h1", "h3", "blue", "red", "web0", "db2"]).unwrap();
    // The token is neither in the address nor in the text.
    assert_eq!(browser.value("location.href").unwrap(), json!("http://127.0.0.1:9641/"));
    assert_eq!(
        browser.value(&format!("document.documentElement.outerHTML.includes('{token}')")).unwrap(),
        json!(false)
    );
    save(&browser, h2, "page-light.png");
    let dark = json!({ "features": [{ "name": "prefers-color-scheme", "value": "dark" }] });
    browser.devtools("Emulation.setEmulatedMedia", dark).unwrap();
    browser.wait_value("getComputedStyle(document.body).backgroundColor", &json!("rgb(20, 23, 26)")).unwrap();
    save(&browser, h2, "page-dark.png");

    // Search, then details of the only endpoint that is left, and back.
    browser.press("/api1").unwrap();
    browser.wait_value("document.querySelectorAll('.chip').length", &json!(1)).unwrap();
    browser.value("document.querySelector('.chip').focus()").unwrap();
    browser.press(&ENTER.to_string()).unwrap();
    browser.wait_text("#detail", &["default/api1", "app=api", "10.1.0.", "fd01::"]).unwrap();
    browser.press(&ESCAPE.to_string()).unwrap();
    browser.wait_value("document.activeElement.dataset.key", &json!("default/api1 blue")).unwrap();
    browser.value("document.getElementById('search').focus()").unwrap();
    browser.press(&ESCAPE.to_string()).unwrap();
    browser.wait_value("document.querySelectorAll('.chip').length", &json!(9)).unwrap();
    // Arrows move on the map.
    browser.value("document.querySelector('.chip').focus()").unwrap();
    browser.press(&RIGHT.to_string()).unwrap();
    browser
        .wait_value("[...document.querySelectorAll('.chip')].indexOf(document.activeElement)", &json!(1))
        .unwrap();

    // The paths of each pair, as each host sees them.
    browser.value("document.activeElement.blur()").unwrap();
    browser.press("2").unwrap();
    wait_until(SOON, "all paths to work", || {
        let good = browser.value("document.querySelectorAll('#matrix td.good').length")?;
        anyhow::ensure!(good == json!(6), "{good}");
        Ok(())
    })
    .unwrap();
    browser.wait_text("#matrix", &["vxlan", "ms", "wireguard"]).unwrap();
    browser.press("3").unwrap();
    browser.wait_text("#endpoint-table", &["web0", "db2", "ready", "B/s"]).unwrap();
    browser.press("4").unwrap();
    browser.wait_text("#service-table", &["web", "80/TCP", "web0", "web2", "3 of 3"]).unwrap();

    // The policy question, by keys alone: what refuses, and what lets pass.
    browser.press("6").unwrap();
    browser.value("document.getElementById('from').focus()").unwrap();
    browser.press(&format!("web0\u{e004}api1\u{e004}5432{ENTER}")).unwrap();
    browser.wait_text("#verdicts", &["may not reach", "default/closed"]).unwrap();
    // What comes back is text.
    let markup = "<img src=x onerror=window.hit=1>";
    browser.value(&format!("document.getElementById('from').value = {markup:?}")).unwrap();
    browser.value("document.getElementById('from').focus()").unwrap();
    browser.press(&ENTER.to_string()).unwrap();
    browser.wait_text("#verdicts", &[markup]).unwrap();
    assert_eq!(browser.value("document.querySelectorAll('img').length").unwrap(), json!(0));
    assert_eq!(browser.value("typeof window.hit").unwrap(), json!("undefined"));

    // Events, live and of the past.
    browser.value("document.activeElement.blur()").unwrap();
    browser.press("8").unwrap();
    browser.wait_text("#event-table", &["web1", "attached"]).unwrap();
    attach(h2, "later", "blue", &[]).unwrap();
    browser.wait_text("#event-table", &["later"]).unwrap();
    let slide =
        "(u => { u.value = 0; u.dispatchEvent(new Event('input')); })(document.getElementById('until'))";
    browser.value(slide).unwrap();
    wait_until(SOON, "the slider to take the latest event away", || {
        let text = browser.value("document.getElementById('event-table').innerText")?;
        anyhow::ensure!(!text.as_str().unwrap_or_default().contains("later"), "{text}");
        Ok(())
    })
    .unwrap();
    browser.press("1").unwrap();
    browser.wait_value("document.querySelectorAll('.chip').length", &json!(10)).unwrap();

    // What another host says of itself is text too, whatever it says.
    let release = "<img/src=x/onerror=hit=1>";
    lab["h3"].set_env(&[("OVL_TEST_VERSION", release)]).unwrap();
    lab["h3"].restart().unwrap();
    browser.wait_text("#hosts", &[release]).unwrap();
    assert_eq!(browser.value("document.querySelectorAll('img').length").unwrap(), json!(0));
    assert_eq!(browser.value("typeof window.hit").unwrap(), json!("undefined"));

    // A problem of another host.
    lab.loss_udp_port(100.0, 4789).unwrap();
    browser.press("5").unwrap();
    browser.wait_text("#problem-list", &["OVL-E034", "h1", "h3"]).unwrap();
    browser.press("2").unwrap();
    browser.wait_text("#matrix .error", &["broken"]).unwrap();
}

/// Attaches so many endpoints to a network of two hosts, half of them on each.
fn lab_with_endpoints(count: usize) -> netns_lab::Lab {
    let lab = lab_with_page(2);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/16"]).unwrap();
    thread::scope(|scope| {
        let attach =
            |host: &'_ netns_lab::Host| attach_many(host, &format!("{}-", host.name()), count / 2, "blue");
        let each: Vec<_> =
            lab.hosts().iter().map(|host| scope.spawn(move || attach(host).map(drop))).collect();
        each.into_iter().for_each(|each| each.join().unwrap().unwrap());
    });
    wait_until(Duration::from_secs(60), "all endpoints", || {
        let known = rows(&lab["h1"], &["endpoints"])?.len();
        anyhow::ensure!(known == count, "{known}");
        Ok(())
    })
    .unwrap();
    lab
}

#[test]
#[ignore = "a measurement"]
fn first_paint_with_a_thousand_endpoints() {
    let lab = lab_with_endpoints(1000);
    let (url, _) = address(&lab["h1"]);
    let browser = Browser::start(&lab["h1"]).unwrap();
    for _ in 0..10 {
        browser.open(&url).unwrap();
        browser.wait_value("document.querySelectorAll('.chip').length", &json!(1000)).unwrap();
        let times = browser.value(
            "[performance.getEntriesByName('first-contentful-paint')[0].startTime, \
             performance.getEntriesByName('map')[0].startTime]",
        );
        let times = times.unwrap();
        println!("first paint {} ms, the whole map {} ms", times[0], times[1]);
    }
}

#[test]
fn long_lists_are_shown_in_parts_and_without_those_that_make_most_traffic() {
    let lab = lab_with_endpoints(260);
    let h1 = &lab["h1"];
    let (url, _) = address(h1);
    let browser = Browser::start(h1).unwrap();
    browser.open(&url).unwrap();
    browser.wait_value("document.querySelectorAll('.chip').length", &json!(260)).unwrap();
    // A view with more rows than are shown at once.
    browser.press("3").unwrap();
    browser.wait_value("document.querySelectorAll('#endpoint-table tbody tr').length", &json!(200)).unwrap();
    browser.value("document.getElementById('more').click()").unwrap();
    browser.wait_value("document.querySelectorAll('#endpoint-table tbody tr').length", &json!(260)).unwrap();
    // Those that make most of the traffic can be left out.
    let target = h1.find_workload("h1-1").unwrap();
    let name = target.netns_name().to_owned();
    let reached = h1.ctl_json(&["endpoints"]).unwrap();
    let other = reached.as_array().unwrap().iter().find(|each| each["name"] == "h2-7").unwrap();
    let to = other["addresses"][0].as_str().unwrap().split('/').next().unwrap().to_owned();
    let _pings = h1.spawn(["ip", "netns", "exec", &name, "ping", "-i", "0.02", "-q", &to]).unwrap();
    browser.press("1").unwrap();
    let choose = "(c => { c.value = 'only'; c.dispatchEvent(new Event('input')); })(document.getElementById('chatty'))";
    browser.value(choose).unwrap();
    browser.wait_text(".chips", &["h1-1", "h2-7"]).unwrap();
    browser.value(&choose.replace("only", "hide")).unwrap();
    wait_until(SOON, "the chatty ones to be gone", || {
        let names = browser.value("[...document.querySelectorAll('.chip')].map(e => e.textContent)")?;
        let names = names.as_array().context("no names")?.clone();
        anyhow::ensure!(!names.is_empty() && !names.contains(&json!("h1-1")), "{}", names.len());
        Ok(())
    })
    .unwrap();
}

/// Opens an event stream, and returns the beginning of the answer and the connection, of which nothing else is read.
fn open_stream(host: &Host, token: &str, part: &str) -> (String, TcpStream) {
    let stream = host.run(|| TcpStream::connect("127.0.0.1:9641")).unwrap().unwrap();
    let head =
        format!("GET /api/v1/{part} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n");
    (&stream).write_all(head.as_bytes()).unwrap();
    let mut line = [0; 12];
    (&stream).read_exact(&mut line).unwrap();
    (String::from_utf8_lossy(&line).into_owned(), stream)
}

/// How many watches of flows count on a host.
fn watches(host: &Host) -> Result<usize> {
    let tables = host.exec_ok(["nft", "list", "tables"])?;
    Ok(tables.lines().filter(|line| line.contains("table inet ovl-trace-flows-")).count())
}

fn wait_watches(hosts: &[Host], expected: usize) {
    wait_until(SOON, &format!("{expected} watches of flows"), || {
        for host in hosts {
            let found = watches(host)?;
            anyhow::ensure!(found == expected, "{}: {found}", host.name());
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn flows_of_all_hosts_are_shown_live_while_a_browser_watches() {
    let lab = lab_with_page(3);
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let web = attach(h2, "web", "blue", &["--label", "app=web"]).unwrap();
    let api = attach(h3, "api", "blue", &["--label", "app=api"]).unwrap();
    let other = attach(h3, "other", "blue", &[]).unwrap();
    let _server = web.workload.tcp_echo(80).unwrap();
    apply(&lab, h1, ONLY_API).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let (url, token) = address(h1);
    let browser = Browser::start(h1).unwrap();
    browser.open(&url).unwrap();
    browser.wait_text("#summary", &["3 of 3 hosts alive"]).unwrap();
    wait_watches(lab.hosts(), 0);
    browser.press("9").unwrap();
    wait_watches(lab.hosts(), 1);
    // Other clients of the page share what is counted.
    let more = [0; 2].map(|_| open_stream(h1, &token, "flows"));
    assert!(more.iter().all(|(status, _)| status == "HTTP/1.1 200"));
    wait_watches(lab.hosts(), 1);
    drop(more);

    wait_until(SOON, "the flows in the table", || {
        for address in web.addresses() {
            api.workload.tcp_roundtrip(&address, 80, b"hello")?;
            anyhow::ensure!(other.workload.tcp_roundtrip(&address, 80, b"hello").is_err());
        }
        let text = browser.value("document.getElementById('flow-table').innerText")?;
        let text = text.as_str().unwrap_or_default();
        let parts = [
            "default/api (",
            "default/web (",
            "80/TCP\tpassed\th2, h3\t",
            "ingress rule 1",
            "default/other (",
            "80/TCP\tdropped\th2\t",
            "no ingress rule of default/only-api lets it pass",
            "fd01::",
        ];
        for part in parts {
            anyhow::ensure!(text.contains(part), "{part:?} is not in {text}");
        }
        Ok(())
    })
    .unwrap();
    save(&browser, h1, "page-flows.png");
    let choose = |id: &str, value: &str| {
        format!(
            "(c => {{ c.value = '{value}'; c.dispatchEvent(new Event('input')); }})(document.getElementById('{id}'))"
        )
    };
    let shown = |browser: &Browser<'_>| {
        let text = browser.value("document.getElementById('flow-table').innerText").unwrap();
        text.as_str().unwrap_or_default().to_owned()
    };
    browser.value(&choose("verdict", "dropped")).unwrap();
    let text = shown(&browser);
    assert!(text.contains("default/other") && !text.contains("default/api ("), "{text}");
    browser.value(&choose("verdict", "")).unwrap();
    // Those of endpoints that make most of the traffic can be left out.
    let hidden = format!(
        "(() => {{ state.rates = new Map([['default/api blue', {{ packets: 99 }}]]); {}; \
         return document.getElementById('flow-table').innerText; }})()",
        choose("flow-chatty", "hide")
    );
    let text = browser.value(&hidden).unwrap();
    let text = text.as_str().unwrap().to_owned();
    assert!(text.contains("default/other") && !text.contains("default/api ("), "{text}");
    browser.value(&choose("flow-chatty", "")).unwrap();

    // A host that hangs is named.
    h3.signal(Signal::SIGSTOP).unwrap();
    browser.wait_text("#flow-notes", &["h3: ", "does not answer"]).unwrap();
    h3.signal(Signal::SIGCONT).unwrap();

    // What hosts say is text, and more than is kept is left out.
    let markup = "<img src=x onerror=window.hit=1>";
    let flow = format!(
        "{{ from: '10.9.9.9', from_name: '{markup}', to: '10.9.9.8', protocol: '{markup}', port, verdict: 'dropped', \
         opened: 0, closed: 0, dropped: 9000, why: '{markup}', policies: ['{markup}'] }}"
    );
    let many = format!(
        "takeFlows({{ host: '{markup}', time_ms: 1, flows: [...Array(3000).keys()].map((port) => ({flow})), error: undefined }})"
    );
    browser.value(&many).unwrap();
    browser.wait_text("#flow-table", &[markup]).unwrap();
    browser.wait_text("#flow-notes", &[markup, "more than are shown", "200 of 2000 flows"]).unwrap();
    assert_eq!(browser.value("document.querySelectorAll('img').length").unwrap(), json!(0));
    assert_eq!(browser.value("typeof window.hit").unwrap(), json!("undefined"));
    assert_eq!(
        browser.value("document.querySelectorAll('#flow-table tbody tr').length").unwrap(),
        json!(200)
    );

    // Nothing is counted any more once the view is left, nor while the page is closed.
    browser.press("1").unwrap();
    wait_watches(lab.hosts(), 0);
    browser.press("9").unwrap();
    wait_watches(lab.hosts(), 1);
    drop(browser);
    wait_watches(lab.hosts(), 0);
}

#[test]
fn clients_that_take_nothing_are_disconnected_and_changes_reach_all_others() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let h1 = &lab["h1"];
    h1.set_config(AT).unwrap();
    // Little waits in the kernel for a client.
    for buffer in ["net.ipv4.tcp_wmem=4096 8192 8192", "net.ipv4.tcp_rmem=4096 8192 8192"] {
        h1.exec_ok(["sysctl", "-qw", buffer]).unwrap();
    }
    lab.start_all().unwrap();
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    attach_many(h1, "w-", 40, "blue").unwrap();
    let (_, token) = address(h1);
    let open = |part: &str| open_stream(h1, &token, part);
    // All places are taken by clients that do not read on.
    let silent: Vec<_> = (0..16).map(|n| open(if n % 2 == 0 { "stream" } else { "flows" })).collect();
    assert!(silent.iter().all(|(status, _)| status == "HTTP/1.1 200"));
    assert_eq!(open("stream").0, "HTTP/1.1 503");
    // Those of the first kind fill what waits for them, and are disconnected ten seconds later.
    let connections = || -> Result<usize> {
        let all = h1.exec_ok(["ss", "-Htn", "state", "established", "sport = :9641"])?;
        Ok(all.lines().count())
    };
    wait_until(Duration::from_secs(60), "the clients to be disconnected", || {
        let left = connections()?;
        anyhow::ensure!(left <= 8, "{left}");
        Ok(())
    })
    .unwrap();
    drop(silent);

    // Each change reaches each client, whenever it comes.
    let (_, own) = address(h1);
    let header = format!("Authorization: Bearer {own}");
    let url = "http://127.0.0.1:9641/api/v1/stream";
    let readers: Vec<_> = (0..4)
        .map(|n| {
            // They look at different moments.
            thread::sleep(Duration::from_millis(300 * n));
            h1.spawn(["curl", "-sN", "-H", &header, url]).unwrap()
        })
        .collect();
    for round in 0..6 {
        let (mark, ready) = if round % 2 == 0 { ("unready", false) } else { ("ready", true) };
        h1.ctl_ok(&["endpoint", mark, "w-1"]).unwrap();
        wait_until(SOON, "all clients to see the readiness", || {
            for reader in &readers {
                let text = reader.stdout();
                let last = text.rsplit("event: overview\ndata: ").next().unwrap_or_default();
                let last = last.lines().next().unwrap_or_default();
                let overview: Value = serde_json::from_str(last)?;
                let all = overview["endpoints"].as_array().context("no endpoints")?;
                let found = all.iter().find(|each| each["name"] == "w-1").context("no w-1")?;
                anyhow::ensure!(found["ready"] == ready, "{found}");
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn page_is_for_those_with_the_token_on_this_host_alone() {
    let lab = lab_with_page(2);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (_, token) = address(h1);
    let own = format!("Authorization: Bearer {token}");
    let url = |path: &str| format!("http://127.0.0.1:9641{path}");
    let (status, page) = get(h1, &[&url("/")]).unwrap();
    assert_eq!(status, 200);
    assert_contains(
        &page,
        &["content-security-policy: default-src 'none'; script-src 'self'", "nosniff", "no-store"],
    );
    for part in ["overview", "reports", "events", "drops", "policy?from=a&to=b", "stream", "flows"] {
        let path = url(&format!("/api/v1/{part}"));
        assert_eq!(get(h1, &[&path]).unwrap().0, 401, "{part}");
        assert_eq!(get(h1, &["-H", &format!("{own}x"), &path]).unwrap().0, 401, "{part}");
    }
    let (status, overview) = get(h1, &["-H", &own, &url("/api/v1/overview")]).unwrap();
    assert_eq!(status, 200);
    assert_contains(&overview, &["\"node\":\"h1\"", "\"h2\"", "content-type: application/json"]);
    // Under another name, as a site would come whose name resolves to this address.
    assert_eq!(get(h1, &["-H", &own, "-H", "Host: evil.example", &url("/api/v1/overview")]).unwrap().0, 421);
    assert_eq!(get(h1, &["-H", &own, "-X", "POST", "-d", "x", &url("/api/v1/overview")]).unwrap().0, 405);
    let long = format!("X-Long: {}", "x".repeat(20_000));
    // The connection may be reset before the answer is read.
    assert!(get(h1, &["-H", &long, &url("/")]).map_or(true, |(status, _)| status == 431));
    // Not from another host, and the token is in no log.
    let from_h2 = format!("http://{}:9641/", h1.address().unwrap());
    assert!(get(h2, &[&from_h2]).is_err());
    let mode = h1.exec_ok(["stat", "-c", "%a", h1.state_dir().join("ui-token").to_str().unwrap()]).unwrap();
    assert_eq!(mode.trim(), "600");
    assert!(!h1.log().contains(&token));

    // Streams have places of their own, and clients that do not read keep no others out.
    let open = || open_stream(h1, &token, "stream");
    let streams: Vec<_> = (0..16).map(|_| open()).collect();
    assert!(streams.iter().all(|(status, _)| status == "HTTP/1.1 200"), "{:?}", streams[15]);
    assert_eq!(open().0, "HTTP/1.1 503");
    assert_eq!(get(h1, &["-H", &own, &url("/api/v1/overview")]).unwrap().0, 200);
    drop(streams);
    wait_until(SOON, "a place for a stream", || {
        anyhow::ensure!(open().0 == "HTTP/1.1 200");
        Ok(())
    })
    .unwrap();

    // The token of another file, which others must not be able to read.
    let file = lab.dir().join("token");
    std::fs::write(&file, "0123456789abcdef0123456789abcdef\n").unwrap();
    h1.exec_ok(["chmod", "644", file.to_str().unwrap()]).unwrap();
    let with_file = format!("{AT}ui_token_file = {:?}\n", file.to_str().unwrap());
    h1.set_config(&with_file).unwrap();
    h1.restart().unwrap();
    wait_problem(h1, &["the page is not served", "chmod 600"], SOON).unwrap();
    assert_contains(&ctl_error(h1, &["page"]).unwrap(), &["ovlctl status"]);
    h1.exec_ok(["chmod", "600", file.to_str().unwrap()]).unwrap();
    wait_no_problem(h1, SOON).unwrap();
    assert_contains(&h1.ctl_ok(&["page"]).unwrap(), &["http://127.0.0.1:9641/#token=0123456789abcdef"]);
}

#[test]
fn page_at_a_socket_is_for_root_alone_and_a_host_without_one_says_so() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let at = std::env::temp_dir().join(format!("ovl-page-{}", std::process::id()));
    let h1 = &lab["h1"];
    h1.set_config(&format!("ui_listen = \"unix:{}\"\n", at.display())).unwrap();
    lab.start_all().unwrap();
    let path = at.to_str().unwrap();
    assert_eq!(h1.ctl_ok(&["page"]).unwrap().trim(), path);
    let overview = wait_until(SOON, "the page", || {
        let (status, overview) = get(h1, &["--unix-socket", path, "http://localhost/api/v1/overview"])?;
        anyhow::ensure!(status == 200, "{status}");
        Ok(Some(overview))
    })
    .unwrap();
    assert_contains(&overview, &["\"node\":\"h1\""]);
    assert_eq!(h1.exec_ok(["stat", "-c", "%a", path]).unwrap().trim(), "600");
    let value: Value = h1.ctl_json(&["page"]).unwrap();
    assert_eq!(value, json!({ "unix": path }));
    h1.set_config("").unwrap();
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    assert_contains(&ctl_error(h1, &["page"]).unwrap(), &["no page is served", "ui_listen"]);
    std::fs::remove_file(&at).unwrap();
}
