//! Kubernetes objects: distribution to all hosts, also through partitions and restarts, and their effect on endpoints.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::service::apply;
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ctl_error, ensure_status, peer, problems, rows, start_lab,
    start_lab_with, text,
};
use serde_json::Value;

const SHOP: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: named, port: 81, targetPort: side}
---
# Nothing here.
---
apiVersion: v1
kind: List
items:
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: db-allow-api-only, namespace: shop}
  spec:
    podSelector: {matchLabels: {app: db}}
    ingress:
    - from: [{podSelector: {matchLabels: {app: api}}}]
      ports: [{port: 5432}]
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: ext-1, namespace: shop, labels: {kubernetes.io/service-name: ext}}
  addressType: IPv4
  endpoints: [{addresses: [192.0.2.9]}]
  ports: [{port: 443}]
";

/// Writes a file in the directory of the lab, and returns its path.
fn file(lab: &Lab, name: &str, content: &str) -> Result<String> {
    let path = lab.dir().join(name);
    fs::write(&path, content)?;
    Ok(path.display().to_string())
}

/// One object, as a host shows it.
fn get(host: &Host, kind: &str, name: &str, namespace: &str) -> Result<Value> {
    host.ctl_json(&["get", kind, name, "-n", namespace])
}

/// All objects of a host.
fn all(host: &Host) -> Result<Vec<Value>> {
    let found = host.ctl_json(&["get", "ns,pods,svc,endpointslices,netpol", "-A"])?;
    Ok(found["items"].as_array().cloned().unwrap_or_default())
}

/// Waits until these hosts have the same objects, `count` of them, and returns them.
fn wait_same(hosts: &[&Host], count: usize, timeout: Duration) -> Result<Vec<Value>> {
    wait_until(timeout, &format!("the same {count} objects on all hosts"), || {
        let lists = hosts.iter().map(|host| all(host)).collect::<Result<Vec<_>>>()?;
        for (host, list) in hosts.iter().zip(&lists) {
            ensure!(list.len() == count, "{} on {}", list.len(), host.name());
            ensure!(*list == lists[0], "{} differs from {}", host.name(), hosts[0].name());
        }
        Ok(lists.into_iter().next())
    })
}

/// `ADDRESS:PORT` of each ready backend of a Service, as a host shows them.
fn backends(host: &Host, service: &str, namespace: &str) -> Result<Vec<String>> {
    let found = get(host, "endpoints", service, namespace)?;
    let ports = found["ports"].as_array().cloned().unwrap_or_default();
    let each = ports.iter().flat_map(|port| port["backends"].as_array().cloned().unwrap_or_default());
    let ready = each.filter(|backend| backend["ready"] == true);
    let mut all: Vec<String> =
        ready.map(|backend| format!("{}:{}", text(&backend["address"]), backend["port"])).collect();
    all.sort();
    Ok(all)
}

fn wait_backends(hosts: &[&Host], service: &str, expected: &[String]) -> Result<()> {
    let mut expected: Vec<&String> = expected.iter().collect();
    expected.sort_unstable();
    for host in hosts {
        wait_until(SOON, &format!("{} to show the backends {expected:?} of {service}", host.name()), || {
            let found = backends(host, service, "shop")?;
            ensure!(found.iter().eq(expected.iter().copied()), "{found:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn objects_are_applied_changed_and_deleted_on_all_hosts() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    let path = file(&lab, "shop.yaml", SHOP).unwrap();
    assert_eq!(
        h1.ctl_ok(&["apply", "-f", &path, "--dry-run"]).unwrap().lines().next(),
        Some("namespace/shop created (dry run)")
    );
    assert!(all(h1).unwrap().is_empty());
    assert_eq!(
        h1.ctl_ok(&["apply", "-f", &path]).unwrap(),
        "\
namespace/shop created
service/web created
networkpolicy.networking.k8s.io/db-allow-api-only created
endpointslice.discovery.k8s.io/ext-1 created
"
    );
    let seen = wait_same(&[h1, h2, h3], 4, SOON).unwrap();
    // Applied again on another host, nothing changes, not even what was assigned automatically.
    let again = h2.ctl_ok(&["apply", "-f", &path]).unwrap();
    assert_eq!(again.lines().filter(|line| line.ends_with(" unchanged")).count(), 4, "{again}");
    assert_eq!(all(h2).unwrap(), seen);

    let service = get(h3, "svc", "web", "shop").unwrap();
    let ip = text(&service["spec"]["clusterIP"]);
    assert!(ip.starts_with("10.96."), "{service}");
    let port = service["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!((30_000..=32_767).contains(&port), "{service}");
    let table = h3.ctl_ok(&["get", "svc", "-A"]).unwrap();
    assert_contains(&table, &["NAMESPACE", "CLUSTER-IP", "NodePort", &ip, &format!("80:{port}/TCP")]);
    // Shown objects can be applied again, on another host.
    let shown = h3.ctl_ok(&["get", "svc,netpol,endpointslices,ns", "-A", "-o", "yaml"]).unwrap();
    let shown = file(&lab, "shown.yaml", &shown).unwrap();
    let again = h1.ctl_ok(&["apply", "-f", &shown]).unwrap();
    assert_eq!(again.lines().filter(|line| line.ends_with(" unchanged")).count(), 4, "{again}");

    let changed = file(&lab, "changed.yaml", &SHOP.replace("port: 5432", "port: 5433")).unwrap();
    let diff = h2.ctl(&["diff", "-f", &changed]).unwrap();
    ensure_status(&diff, &["diff"], 1).unwrap();
    assert_contains(&diff.stdout, &["-    - port: 5432", "+    - port: 5433", "shop/db-allow-api-only"]);
    ensure_status(&h2.ctl(&["diff", "-f", &path]).unwrap(), &["diff"], 0).unwrap();
    assert_contains(
        &h2.ctl_ok(&["apply", "-f", &changed]).unwrap(),
        &["networkpolicy.networking.k8s.io/db-allow-api-only configured", "service/web unchanged"],
    );
    wait_until(SOON, "h3 to show the change", || -> Result<bool> {
        let policy = get(h3, "netpol", "db-allow-api-only", "shop")?;
        Ok(policy["spec"]["ingress"][0]["ports"][0]["port"] == 5433)
    })
    .unwrap();
    assert_contains(
        &h3.ctl_ok(&["describe", "netpol", "db-allow-api-only", "-n", "shop"]).unwrap(),
        &["Selects:", "app=db", "port: 5433"],
    );

    // Deletion by name and by file; a second one reports that there is no such object.
    let deleted = h3.ctl_ok(&["delete", "svc", "web", "-n", "shop"]).unwrap();
    assert_eq!(deleted, "service \"web\" deleted\n");
    assert_eq!(h3.ctl_ok(&["delete", "svc/web", "-n", "shop"]).unwrap(), "service \"web\" not found\n");
    wait_same(&[h1, h2, h3], 3, SOON).unwrap();
    assert_contains(
        &ctl_error(h1, &["get", "svc", "web", "-n", "shop"]).unwrap(),
        &["service \"web\" not found"],
    );
    h2.ctl_ok(&["delete", "-f", &path]).unwrap();
    wait_same(&[h1, h2, h3], 0, SOON).unwrap();
    // Through a restart of all hosts at once, deleted objects stay deleted and the others stay.
    apply(&lab, h1, SHOP).unwrap();
    h1.ctl_ok(&["delete", "netpol", "db-allow-api-only", "-n", "shop"]).unwrap();
    let before = wait_same(&[h1, h2, h3], 3, SOON).unwrap();
    for host in lab.hosts() {
        host.kill9().unwrap();
    }
    lab.start_all().unwrap();
    assert_eq!(wait_same(&[h1, h2, h3], 3, SOON).unwrap(), before);
}

#[test]
fn services_have_the_endpoints_that_they_select_as_backends() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    create_network(&lab, "demo", &["--subnet", "10.1.0.0/24"]).unwrap();
    apply(&lab, h1, SHOP).unwrap();
    let all = [h1, h2, h3];
    wait_same(&all, 4, SOON).unwrap();
    let shop = ["--namespace", "shop"];
    let a = attach(h1, "a", "demo", &[&shop[..], &["--label", "app=web"]].concat()).unwrap();
    let b = attach(h2, "b", "demo", &[&shop[..], &["--label", "app=web", "--not-ready"]].concat()).unwrap();
    let c = attach(h3, "c", "demo", &shop).unwrap();
    let at = |attached: &ovl_tests::Attached, port: u16| format!("{}:{port}", attached.address());
    // An endpoint of another namespace, one that is not ready, and one without the labels are not backends.
    attach(h1, "d", "demo", &["--label", "app=web"]).unwrap();
    wait_backends(&all, "web", &[at(&a, 8080)]).unwrap();
    h2.ctl_ok(&["endpoint", "ready", "b", "-n", "shop"]).unwrap();
    wait_backends(&all, "web", &[at(&a, 8080), at(&b, 8080)]).unwrap();
    assert_contains(&ctl_error(h1, &["endpoint", "unready", "b", "-n", "shop"]).unwrap(), &["on host h2"]);

    // A Pod adds its labels and named ports to the endpoint of its name.
    let pod = "\
apiVersion: v1
kind: Pod
metadata: {name: c, namespace: shop, labels: {app: web}}
spec:
  containers: [{name: main, ports: [{name: side, containerPort: 9000}]}]
";
    apply(&lab, h1, pod).unwrap();
    wait_backends(&all, "web", &[at(&a, 8080), at(&b, 8080), at(&c, 8080), at(&c, 9000)]).unwrap();
    let listed = h2.ctl_ok(&["get", "pods", "-n", "shop", "-o", "wide"]).unwrap();
    assert_contains(&listed, &["1/1", &c.address(), "h3", "app=web"]);
    let described = h2.ctl_ok(&["describe", "svc", "web", "-n", "shop"]).unwrap();
    assert_contains(&described, &["Port http 80/TCP:", &format!("{} a on h1", at(&a, 8080)), &at(&c, 9000)]);
    let endpoint = rows(h1, &["endpoints"]).unwrap().into_iter().find(|row| row["name"] == "c").unwrap();
    assert_eq!(endpoint["labels"]["app"], "web");

    h2.ctl_ok(&["endpoint", "unready", "b", "-n", "shop"]).unwrap();
    wait_backends(&all, "web", &[at(&a, 8080), at(&c, 8080), at(&c, 9000)]).unwrap();
    // The readiness of an endpoint survives a restart of the daemon.
    h2.kill9().unwrap();
    h2.start().unwrap();
    h2.wait_ready(SOON).unwrap();
    wait_backends(&all, "web", &[at(&a, 8080), at(&c, 8080), at(&c, 9000)]).unwrap();

    // Endpoints of a failed host are no backends.
    h3.destroy().unwrap();
    wait_backends(&[h1, h2], "web", &[at(&a, 8080)]).unwrap();
    h1.ctl_ok(&["detach", "a", "--namespace", "shop"]).unwrap();
    wait_backends(&[h1, h2], "web", &[]).unwrap();
    // EndpointSlices add backends that are not endpoints of the cluster.
    let external = "\
apiVersion: v1
kind: Service
metadata: {name: ext, namespace: shop}
spec: {ports: [{port: 8443}]}
";
    apply(&lab, h2, external).unwrap();
    wait_backends(&[h1, h2], "ext", &["192.0.2.9:443".to_owned()]).unwrap();
}

#[test]
fn invalid_manifest_changes_nothing_and_the_error_names_the_place() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    let service = |name: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]{more}}}\n---\n"
        )
    };
    let good = service("good", "");
    for (content, parts) in [
        (
            format!("{good}{}", service("Bad", "")),
            vec!["manifest.yaml:6: Service Bad: metadata.name: not a DNS label"],
        ),
        (
            format!("{good}{}", service("bad", ", clusterIP: 10.0.0.1")),
            vec!["manifest.yaml:6: Service bad: ", "not in the service_range"],
        ),
        (
            format!("{good}---\n{}", service("bad", ", colour: red, selector: {a: 'x y'}")),
            vec!["Service bad: spec.colour: is not a known field", "spec.selector.a: not a label value"],
        ),
        (format!("{good}a: 1\na: 2\n"), vec!["line", "duplicate key a"]),
        (format!("{good}b: [1\n"), vec!["manifest.yaml: line"]),
        (format!("{good}just text\n"), vec!["manifest.yaml:6: not an object"]),
        ("---\n".to_owned(), vec!["contain no objects"]),
        (
            format!(
                "kind: List\napiVersion: v1\nitems:\n- {}",
                service("ok", "").replace('\n', "\n  ") + "\n- {kind: X}\n"
            ),
            vec!["manifest.yaml"],
        ),
        (
            format!(
                "{good}{}{}",
                service("p", ", type: NodePort").replace("port: 80", "port: 80, nodePort: 30500"),
                service("q", ", type: NodePort").replace("port: 80", "port: 80, nodePort: 30500")
            ),
            vec!["Service q: spec.ports[0].nodePort: node port 30500 is in use by Service default/p"],
        ),
    ] {
        let path = file(&lab, "manifest.yaml", &content).unwrap();
        let error = ctl_error(h1, &["apply", "-f", &path]).unwrap();
        assert_contains(
            &error,
            &[&["manifest.yaml"], parts.as_slice()].concat()
                [usize::from(parts[0].starts_with("contain no objects"))..],
        );
        assert!(all(h1).unwrap().is_empty(), "{content}");
    }
    assert_contains(
        &ctl_error(h1, &["apply", "-f", "/nowhere.yaml"]).unwrap(),
        &["cannot read /nowhere.yaml"],
    );
    // With --lenient, an unknown field is a warning, and the rest is applied.
    let path = file(&lab, "manifest.yaml", &service("odd", ", colour: red")).unwrap();
    let output = h1.ctl(&["apply", "-f", &path, "--lenient"]).unwrap();
    ensure_status(&output, &["apply"], 0).unwrap();
    assert_contains(
        &output.stderr,
        &["warning: ", "manifest.yaml:1: Service odd: spec.colour: is not a known field"],
    );
    assert_eq!(output.stdout, "service/odd created\n");
    // The last of two manifests of one object counts.
    let twice = service("twice", "") + &service("twice", ", selector: {app: last}");
    let path = file(&lab, "manifest.yaml", &twice).unwrap();
    let output = h1.ctl(&["apply", "-f", &path]).unwrap();
    ensure_status(&output, &["apply"], 0).unwrap();
    assert_eq!(output.stdout, "service/twice created\n");
    assert_contains(&output.stderr, &["Service twice: replaces the same object at", "manifest.yaml:1"]);
    assert_eq!(get(h1, "svc", "twice", "default").unwrap()["spec"]["selector"]["app"], "last");
    // A directory stands for its files, sorted by name.
    let folder = lab.dir().join("folder");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("b.yml"), service("b", "")).unwrap();
    fs::write(
        folder.join("a.json"),
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"clusterIP":"None"}}"#,
    )
    .unwrap();
    fs::write(folder.join("ignored.txt"), "x: [").unwrap();
    let done = h1.ctl_ok(&["apply", "-f", &folder.display().to_string()]).unwrap();
    assert_eq!(done, "service/a created\nservice/b created\n");
    // An alias bomb is refused.
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..30 {
        writeln!(bomb, "a{n}: &a{n} [{}]", vec![format!("*a{}", n - 1); 10].join(", ")).unwrap();
    }
    let path = file(&lab, "bomb.yaml", &bomb).unwrap();
    assert_contains(
        &ctl_error(h1, &["apply", "-f", &path]).unwrap(),
        &["bomb.yaml: line", "including copies by aliases"],
    );
}

#[test]
fn objects_of_other_kinds_are_passed_over() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    let mixed = "\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}, ownerReferences: [{kind: ReplicaSet, name: web}]}
spec: {containers: [{name: c, image: example/web}]}
status: {phase: Failed, podIP: 192.0.2.7}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: web}
";
    let path = file(&lab, "mixed.yaml", mixed).unwrap();
    let applied = h1.ctl(&["apply", "-f", &path]).unwrap();
    ensure_status(&applied, &["apply"], 0).unwrap();
    assert_eq!(applied.stdout, "service/web created\npod/web-1 created\n");
    assert_contains(
        &applied.stderr,
        &[
            "Pod (1 object): ignored spec.containers[].image: ovl runs no containers",
            "metadata.ownerReferences",
            "passed over 2 objects that ovl does not act on: 1 apps/v1 Deployment, 1 v1 ConfigMap",
        ],
    );
    // A Pod that has failed is no backend.
    assert_eq!(backends(h1, "web", "default").unwrap(), Vec::<String>::new());
    let error = ctl_error(h1, &["apply", "-f", &path, "--strict"]).unwrap();
    assert_contains(&error, &["mixed.yaml:12: Deployment web: kind: ovl does not act on apps/v1 Deployment"]);
    // A policy of another kind would be without effect.
    let policy = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\n";
    let foreign = file(&lab, "foreign.yaml", policy).unwrap();
    let error = ctl_error(h1, &["apply", "-f", &foreign]).unwrap();
    assert_contains(&error, &["ovl does not enforce cilium.io/v2 CiliumNetworkPolicy"]);
    let deleted = h1.ctl(&["delete", "-f", &foreign, "-f", &path]).unwrap();
    ensure_status(&deleted, &["delete"], 0).unwrap();
    assert_eq!(deleted.stdout, "service \"web\" deleted\npod \"web-1\" deleted\n");
    assert_contains(&deleted.stderr, &["passed over 3 objects"]);
}

#[test]
fn objects_are_created_labelled_selected_and_deleted_as_with_kubectl() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
        )
    };
    let path = file(&lab, "two.yaml", &(service("a") + &service("b"))).unwrap();
    assert_eq!(h1.ctl_ok(&["create", "-f", &path, "-o", "name"]).unwrap(), "service/a\nservice/b\n");
    let error = ctl_error(h1, &["create", "-f", &path]).unwrap();
    assert_contains(&error, &["Service a: already exists: use `ovlctl apply`", "Service b: already exists"]);

    assert_eq!(
        h1.ctl_ok(&["label", "svc", "a", "b", "app=web"]).unwrap(),
        "service/a labeled\nservice/b labeled\n"
    );
    assert_eq!(h1.ctl_ok(&["label", "svc/b", "app=web"]).unwrap(), "service/b not labeled\n");
    assert_contains(&ctl_error(h1, &["label", "svc/b", "app=db"]).unwrap(), &["use --overwrite"]);
    h1.ctl_ok(&["label", "svc/b", "app=db", "--overwrite"]).unwrap();
    let names = |args: &[&str]| h1.ctl_ok(&[&["get", "svc", "-o", "name"], args].concat()).unwrap();
    assert_eq!(names(&["-l", "app=web"]), "service/a\n");
    assert_eq!(names(&["-l", "app!=web"]), "service/b\n");
    assert_eq!(names(&["b", "a"]), "service/b\nservice/a\n");
    assert_eq!(names(&["a", "c", "--ignore-not-found"]), "service/a\n");
    let found = h1.ctl(&["get", "svc", "a", "c", "-o", "name"]).unwrap();
    ensure_status(&found, &["get"], 1).unwrap();
    assert_eq!(found.stdout, "service/a\n");
    assert_contains(&found.stderr, &["service \"c\" not found"]);
    let template = "jsonpath={range .items[*]}{.metadata.name}={.spec.ports[0].port};{end}";
    assert_eq!(h1.ctl_ok(&["get", "svc", "-o", template]).unwrap(), "a=80;b=80;");

    assert_eq!(h1.ctl_ok(&["delete", "svc", "-l", "app=db"]).unwrap(), "service \"b\" deleted\n");
    assert_eq!(h1.ctl_ok(&["delete", "svc", "b", "--ignore-not-found"]).unwrap(), "");
    let dry = h1.ctl_ok(&["delete", "svc,netpol", "--all", "--dry-run=server"]).unwrap();
    assert_eq!(dry, "service \"a\" deleted (dry run)\n");
    h1.ctl_ok(&["delete", "svc,netpol", "--all"]).unwrap();
    assert!(all(h1).unwrap().is_empty());
    let built = h1.ctl(&["apply", "-k", "."]).unwrap();
    ensure_status(&built, &["apply"], 2).unwrap();
    assert_contains(&built.stderr, &["kubectl kustomize . | ovlctl apply -f -"]);
}

#[test]
fn late_joiner_and_both_sides_of_a_partition_converge() {
    let lab = start_lab_with(LabConfig {
        config: "load_balancer_pool = ['192.168.77.192/29']\n".to_owned(),
        ..LabConfig::hosts(4)
    })
    .unwrap();
    let (h1, h2, h3, h4) = (&lab["h1"], &lab["h2"], &lab["h3"], &lab["h4"]);
    // Without its state, h4 joins as a new host.
    h4.ctl_ok(&["leave"]).unwrap();
    h4.wait_exit(SOON).unwrap();
    fs::remove_dir_all(h4.state_dir()).unwrap();
    let node_port = |name: &str, port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
             spec: {{type: LoadBalancer, clusterIP: 10.96.7.7, ports: [{{port: 80, nodePort: {port}}}]}}\n"
        )
    };
    apply(&lab, h1, SHOP).unwrap();
    wait_same(&[h1, h2, h3], 4, SOON).unwrap();
    lab.partition(&[&["h1", "h2", "h4"], &["h3"]]).unwrap();
    wait_until(SOON, "h3 to be cut off", || -> Result<bool> { Ok(peer(h3, "h1")?["state"] == "dead") })
        .unwrap();
    wait_until(SOON, "h1 to be cut off from h3", || -> Result<bool> {
        Ok(peer(h1, "h3")?["state"] == "dead")
    })
    .unwrap();
    // Both sides claim one address and one port, and change one object; one side deletes an object.
    apply(&lab, h1, &node_port("older", 30_777)).unwrap();
    apply(&lab, h3, &node_port("younger", 30_777)).unwrap();
    apply(&lab, h1, &SHOP.replace("5432", "1111")).unwrap();
    apply(&lab, h3, &SHOP.replace("5432", "2222")).unwrap();
    h1.ctl_ok(&["delete", "endpointslice", "ext-1", "-n", "shop"]).unwrap();
    let first = get(h1, "svc", "older", "default").unwrap();
    assert_eq!(first["spec"]["clusterIP"], "10.96.7.7");
    assert_eq!(get(h3, "svc", "younger", "default").unwrap()["spec"]["clusterIP"], "10.96.7.7");
    lab.heal().unwrap();
    wait_same(&[h1, h2, h3], 5, SOON).unwrap();
    wait_until(SOON, "the younger Service to get another address", || {
        let service = get(h2, "svc", "younger", "default")?;
        ensure!(service["spec"]["clusterIP"].is_string(), "{service}");
        ensure!(service["spec"]["ports"][0]["nodePort"].is_number(), "{service}");
        Ok(())
    })
    .unwrap();
    h4.start().unwrap();
    h4.wait_ready(SOON).unwrap();
    let objects = wait_same(&[h1, h2, h3, h4], 5, SOON).unwrap();
    let claimed = |path: &str| {
        let each: Vec<String> =
            objects.iter().filter_map(|it| it.pointer(path)).map(ToString::to_string).collect();
        let different: BTreeSet<&String> = each.iter().collect();
        assert_eq!(different.len(), each.len(), "{path}: {each:?}");
        each.len()
    };
    assert_eq!(claimed("/spec/clusterIP"), 3);
    assert_eq!(claimed("/status/loadBalancer/ingress/0/ip"), 2);
    assert_eq!(claimed("/spec/ports/0/nodePort"), 3);
    let older = get(h4, "svc", "older", "default").unwrap();
    assert_eq!(older["spec"]["clusterIP"], "10.96.7.7");
    assert_eq!(older["spec"]["ports"][0]["nodePort"], 30_777);
    // The later write won, as a whole.
    let policy = get(h4, "netpol", "db-allow-api-only", "shop").unwrap();
    assert_eq!(policy["spec"]["ingress"][0]["ports"][0]["port"], 2222);
    assert!(problems(h4).unwrap().is_empty());
}

#[test]
fn ten_thousand_objects_are_applied_and_reach_all_hosts() {
    const TIMEOUT: Duration = Duration::from_secs(120);
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    let mut manifest = String::new();
    for n in 0..5000 {
        write!(
            manifest,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: n{}, labels: {{n: \"{n}\"}}}}\n\
             spec: {{selector: {{app: a{n}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n\
             ---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}, namespace: n{}, labels: {{app: a{n}}}}}\n\
             spec: {{containers: [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]}}\n",
            n % 10,
            n % 10
        )
        .unwrap();
    }
    let path = file(&lab, "many.yaml", &manifest).unwrap();
    let run = |args: &[&str]| {
        let output = h1.ctl_spawn(args).unwrap().finish(TIMEOUT).unwrap();
        ensure_status(&output, args, 0).unwrap();
        output.stdout
    };
    let done = run(&["apply", "-f", &path]);
    assert_eq!(done.lines().filter(|line| line.ends_with(" created")).count(), 10_000);
    let counted =
        |host: &Host| -> Result<usize> { Ok(rows_of(host, "svc")?.len() + rows_of(host, "pods")?.len()) };
    for host in [h2, h3] {
        // Wait for the last object first, because listing all objects is expensive.
        wait_until(TIMEOUT, &format!("{} to have the last objects", host.name()), || {
            get(host, "svc", "s4999", "n9").and(get(host, "pod", "p4999", "n9")).map(drop)
        })
        .unwrap();
        wait_until(TIMEOUT, &format!("{} to have all objects", host.name()), || -> Result<bool> {
            Ok(counted(host)? == 10_000)
        })
        .unwrap();
    }
    let addresses: BTreeSet<String> =
        rows_of(h2, "svc").unwrap().iter().map(|it| text(&it["spec"]["clusterIP"])).collect();
    assert_eq!(addresses.len(), 5000);
    // Applying the same again writes nothing, and one Service among many gets its backend at once.
    let again = run(&["apply", "-f", &path]);
    assert_eq!(again.lines().filter(|line| line.ends_with(" unchanged")).count(), 10_000);
    create_network(&lab, "demo", &["--subnet", "10.1.0.0/24"]).unwrap();
    let endpoint = attach(h3, "p4321", "demo", &["--namespace", "n1"]).unwrap();
    let expected = vec![format!("{}:8080", endpoint.address())];
    wait_until(SOON, "h1 to show the endpoint as a backend", || {
        let found = backends(h1, "s4321", "n1")?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
    .unwrap();
    run(&["delete", "-f", &path]);
    for host in lab.hosts() {
        wait_until(TIMEOUT, &format!("{} to have no objects", host.name()), || -> Result<bool> {
            Ok(counted(host)? == 0)
        })
        .unwrap();
    }
}

fn rows_of(host: &Host, kind: &str) -> Result<Vec<Value>> {
    let found = host.ctl_json(&["get", kind, "-A"])?;
    Ok(found["items"].as_array().cloned().unwrap_or_default())
}
