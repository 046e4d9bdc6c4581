//! The manifests of `packaging/kubernetes`: strictly of the API's types, and the Helm chart renders to the same.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use ovl_manifest::yaml;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/kubernetes")
}

/// Returns the documents of a file, or of all files of a directory.
fn documents(path: &Path) -> Vec<Value> {
    let mut paths = vec![path.to_owned()];
    if path.is_dir() {
        paths = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
    }
    paths.iter().flat_map(|path| parse(&fs::read_to_string(path).unwrap())).collect()
}

fn parse(text: &str) -> Vec<Value> {
    yaml::read(text).unwrap().into_iter().map(|document| document.value).collect()
}

/// Reads an object, and fails if it has a field that the type has not: what is written again is the same.
fn strict<T: DeserializeOwned + Serialize>(value: &Value) -> T {
    let read: T =
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error} in {value:#}"));
    assert_eq!(serde_json::to_value(&read).unwrap(), *value);
    read
}

fn daemon_set(value: &Value) -> DaemonSet {
    let set: DaemonSet = strict(value);
    let spec = set.spec.clone().unwrap();
    let pod = spec.template.spec.unwrap();
    assert_eq!(spec.template.metadata.unwrap().labels, spec.selector.match_labels);
    assert_eq!(
        (pod.host_network, pod.priority_class_name.as_deref()),
        (Some(true), Some("system-node-critical"))
    );
    let volumes: Vec<String> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
    for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
        for mount in container.volume_mounts.iter().flatten() {
            assert!(volumes.contains(&mount.name), "{} of {}", mount.name, container.name);
        }
    }
    set
}

#[test]
fn manifests_are_strictly_of_the_types_of_the_api() {
    let mut kinds = Vec::new();
    for value in documents(&packaging().join("manifests")) {
        let kind = value["kind"].as_str().unwrap().to_owned();
        match kind.as_str() {
            "ServiceAccount" => drop(strict::<ServiceAccount>(&value)),
            "ClusterRole" => drop(strict::<ClusterRole>(&value)),
            "ClusterRoleBinding" => drop(strict::<ClusterRoleBinding>(&value)),
            "Role" => drop(strict::<Role>(&value)),
            "RoleBinding" => drop(strict::<RoleBinding>(&value)),
            "ConfigMap" => drop(strict::<ConfigMap>(&value)),
            "DaemonSet" => {
                let set = daemon_set(&value);
                let update = set.spec.unwrap().update_strategy.unwrap();
                assert_eq!(update.type_.as_deref(), Some("RollingUpdate"));
            }
            other => panic!("{other}"),
        }
        kinds.push(kind);
    }
    kinds.sort();
    let all = [
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ];
    assert_eq!(kinds, all);
    let uninstall = documents(&packaging().join("uninstall.yaml"));
    assert_eq!(uninstall.len(), 1);
    daemon_set(&uninstall[0]);
}

/// The values of a chart, each by its path.
fn values(value: &Value, path: &str, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| values(value, &format!("{path}.{name}"), into));
        }
        Value::String(text) => drop(into.insert(path.to_owned(), text.clone())),
        other => panic!("{path} is {other}"),
    }
}

/// Renders a template that has values and their indentation, and nothing else.
fn render(template: &str, values: &BTreeMap<String, String>) -> String {
    let mut parts = template.split("{{");
    let mut text = parts.next().unwrap().to_owned();
    for part in parts {
        let (expression, rest) = part.split_once("}}").unwrap();
        let mut words = expression.split('|').map(str::trim);
        let path = words.next().unwrap();
        let mut value = values.get(path).unwrap_or_else(|| panic!("no value {path}")).clone();
        for function in words {
            let spaces: usize = function.strip_prefix("indent ").unwrap().parse().unwrap();
            let lines = value.split('\n').map(|line| format!("{:spaces$}{line}", ""));
            value = lines.collect::<Vec<_>>().join("\n");
        }
        text += &value;
        text += rest;
    }
    text
}

#[test]
fn helm_chart_renders_to_the_manifests() {
    let chart = packaging().join("chart");
    let mut all = BTreeMap::new();
    values(&documents(&chart.join("values.yaml"))[0], ".Values", &mut all);
    let mut templates: Vec<PathBuf> =
        fs::read_dir(chart.join("templates")).unwrap().map(|entry| entry.unwrap().path()).collect();
    templates.sort();
    let rendered: Vec<Value> =
        templates.iter().flat_map(|path| parse(&render(&fs::read_to_string(path).unwrap(), &all))).collect();
    let mut manifests = documents(&packaging().join("manifests"));
    // A line without content, where more lines of the configuration would be.
    for map in manifests.iter_mut().filter(|value| value["kind"] == "ConfigMap") {
        let toml = map["data"]["ovld.toml"].as_str().unwrap().to_owned();
        map["data"]["ovld.toml"] = toml.trim_end().into();
    }
    let trimmed = rendered.into_iter().map(|mut value| {
        if let Some(toml) = value.pointer_mut("/data/ovld.toml") {
            *toml = toml.as_str().unwrap().trim_end().into();
        }
        value
    });
    assert_eq!(trimmed.collect::<Vec<_>>(), manifests);
    // More lines become part of the file.
    all.insert(
        ".Values.config".to_owned(),
        "load_balancer_pool = [\"192.0.2.0/28\"]\nzone = \"a\"".to_owned(),
    );
    let config = render(&fs::read_to_string(chart.join("templates/config.yaml")).unwrap(), &all);
    let toml = parse(&config)[0]["data"]["ovld.toml"].as_str().unwrap().to_owned();
    assert!(
        toml.ends_with(
            "[\"10.96.0.0/12\", \"kubernetes\"]\nload_balancer_pool = [\"192.0.2.0/28\"]\nzone = \"a\"\n"
        ),
        "{toml}"
    );
}

#[test]
fn image_has_one_name() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = documents(&packaging().join("chart/Chart.yaml"));
    assert_eq!((&chart[0]["version"], &chart[0]["appVersion"]), (&version.into(), &version.into()));
    for value in documents(&packaging().join("manifests"))
        .into_iter()
        .chain(documents(&packaging().join("uninstall.yaml")))
    {
        let images = value.to_string().matches("\"image\":").count();
        assert_eq!(value.to_string().matches(&format!("\"image\":\"ovl:{version}\"")).count(), images);
    }
}
