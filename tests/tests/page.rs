//! The page of ovld in a real browser: what it shows, keys, both colour schemes, and who may see it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use netns_lab::{Host, Lab, LabConfig, Netns, wait_until};
use ovl_tests::browser::Browser;
use ovl_tests::routed::attach_many;
use ovl_tests::service::apply;
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ctl_error, ping_all_pairs, rows, wait_no_problem,
    wait_problem,
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
    for part in ["overview", "reports", "events", "drops", "policy?from=a&to=b", "stream"] {
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
    let open = || {
        let stream = h1.run(|| TcpStream::connect("127.0.0.1:9641")).unwrap().unwrap();
        let head = format!("GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n{own}\r\n\r\n");
        (&stream).write_all(head.as_bytes()).unwrap();
        let mut line = [0; 12];
        (&stream).read_exact(&mut line).unwrap();
        (String::from_utf8_lossy(&line).into_owned(), stream)
    };
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
