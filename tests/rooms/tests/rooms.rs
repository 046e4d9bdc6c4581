//! The rooms of the house and the doors between them: which crate may use which, and that the modules of a crate do
//! not use each other in a circle. `docs/architecture.md` has the picture; this holds the code to it.
#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The crates of the workspace, each with those that it may use. A new crate, or a new door, is one line here.
const MAY_USE: &[(&str, &[&str])] = &[
    ("ovl-proto", &[]),
    ("ovl-control", &["ovl-proto"]),
    ("ovl-manifest", &["ovl-proto"]),
    ("ovl-cluster", &["ovl-proto"]),
    ("ovl-dataplane", &["ovl-proto"]),
    ("ovl-consensus", &["ovl-proto", "ovl-cluster"]),
    // Names decide on a zone, which is a value: records by name, without I/O.
    ("ovl-subsystems", &["ovl-proto", "ovl-manifest", "ovl-cluster", "ovl-dataplane", "ovl-zone"]),
    ("ovl-runtimes", &["ovl-proto", "ovl-control", "ovl-cluster", "ovl-dataplane"]),
    ("ovl-fastpath", &[]),
    ("ovl-kernel", &["ovl-proto", "ovl-dataplane", "ovl-fastpath", "ovl-tunnel"]),
    ("ovl-mesh", &["ovl-proto", "ovl-control", "ovl-files", "ovl-tunnel"]),
    ("ovl-tunnel", &["ovl-udp"]),
    ("ovl-relay", &["ovl-udp"]),
    ("ovl-dns", &["ovl-metrics", "ovl-udp", "ovl-zone"]),
    ("ovl-metrics", &[]),
    ("ovl-udp", &[]),
    ("ovl-zone", &[]),
    ("ovl-corpus", &[]),
    ("ovl-files", &[]),
    (
        "ovld",
        &[
            "ovl-proto",
            "ovl-control",
            "ovl-manifest",
            "ovl-cluster",
            "ovl-consensus",
            "ovl-dataplane",
            "ovl-subsystems",
            "ovl-runtimes",
            "ovl-kernel",
            "ovl-mesh",
            "ovl-files",
            "ovl-tunnel",
            "ovl-relay",
            "ovl-dns",
            "ovl-metrics",
            "ovl-udp",
        ],
    ),
    ("ovlctl", &["ovl-proto", "ovl-control", "ovl-manifest"]),
    ("ovl-cni", &["ovl-proto", "ovl-control"]),
    ("ovl-docker", &["ovl-proto", "ovl-control", "ovl-runtimes"]),
    ("ovl-kube", &["ovl-proto", "ovl-control"]),
    ("netns-lab", &[]),
    ("netns-lab-bench", &["netns-lab", "ovl-tests"]),
    ("ovl-tests", &["netns-lab"]),
    ("ovl-machines", &["netns-lab"]),
    ("ovl-simulation", &[]),
    ("ovl-rooms", &[]),
];

/// What must not be reached, by whatever way: a plugin is started for each call and has to be small, and what touches
/// the kernel knows nothing of clusters.
const MAY_NOT_REACH: &[(&str, &[&str])] = &[
    ("ovl-cni", &["saphyr-parser", "ovl-consensus"]),
    ("ovl-docker", &["saphyr-parser", "ovl-consensus"]),
    ("ovl-kube", &["saphyr-parser", "ovl-consensus"]),
    // What speaks to an API server is in a program of its own.
    ("ovld", &["kube", "k8s-openapi"]),
    ("ovlctl", &["kube", "k8s-openapi"]),
    ("ovl-kernel", &["ovl-cluster", "ovl-subsystems", "ovld"]),
    ("ovl-dataplane", &["ovl-cluster"]),
];

/// A package as `cargo metadata` tells.
#[derive(Debug)]
struct Package {
    name: String,
    id: String,
    dir: PathBuf,
    in_workspace: bool,
    /// What it is built with, each with the features that it asks for; what only tests use is left out.
    asks: Vec<(String, BTreeSet<String>)>,
}

struct Metadata {
    packages: BTreeMap<String, Package>,
    /// By id, those that it is built with; what only tests use is left out.
    uses: BTreeMap<String, BTreeSet<String>>,
}

impl Metadata {
    fn read() -> Self {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let output = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--locked"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let members: BTreeSet<String> =
            all["workspace_members"].as_array().unwrap().iter().map(text).collect();
        let asked = |dep: &Value| {
            (text(&dep["name"]), dep["features"].as_array().unwrap().iter().map(text).collect())
        };
        let package = |it: &Value| Package {
            name: text(&it["name"]),
            id: text(&it["id"]),
            dir: Path::new(it["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned(),
            in_workspace: members.contains(it["id"].as_str().unwrap()),
            asks: it["dependencies"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|dep| dep["kind"] != "dev")
                .map(asked)
                .collect(),
        };
        let is_built = |dep: &Value| {
            dep["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].as_str() != Some("dev"))
        };
        let uses = all["resolve"]["nodes"].as_array().unwrap().iter().map(|node| {
            let deps = node["deps"].as_array().unwrap().iter();
            (text(&node["id"]), deps.filter(|dep| is_built(dep)).map(|dep| text(&dep["pkg"])).collect())
        });
        let packages = all["packages"].as_array().unwrap().iter().map(package);
        Self { packages: packages.map(|it| (it.id.clone(), it)).collect(), uses: uses.collect() }
    }

    fn workspace(&self) -> impl Iterator<Item = &Package> {
        self.packages.values().filter(|package| package.in_workspace)
    }

    fn name(&self, id: &str) -> &str {
        &self.packages[id].name
    }

    /// The shortest way from one package to another, by names.
    fn way(&self, from: &Package, to: &str) -> Option<Vec<&str>> {
        let mut before: BTreeMap<&str, &str> = BTreeMap::new();
        let mut queue = std::collections::VecDeque::from([from.id.as_str()]);
        while let Some(at) = queue.pop_front() {
            if self.name(at) == to {
                let mut way = vec![self.name(at)];
                let mut at = at;
                while let Some(previous) = before.get(at) {
                    at = previous;
                    way.push(self.name(at));
                }
                way.reverse();
                return Some(way);
            }
            for next in &self.uses[at] {
                if next != &from.id && !before.contains_key(next.as_str()) {
                    before.insert(next, at);
                    queue.push_back(next);
                }
            }
        }
        None
    }
}

#[test]
fn crates_use_only_what_the_picture_allows() {
    let metadata = Metadata::read();
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in metadata.workspace() {
        let Some(allowed) = allowed.get(package.name.as_str()) else {
            wrong.push(format!("{} is not in MAY_USE", package.name));
            continue;
        };
        for used in metadata.uses[&package.id].iter().map(|id| &metadata.packages[id]) {
            let name = used.name.as_str();
            if used.in_workspace && !allowed.contains(&name) {
                wrong.push(format!("{} uses {name}", package.name));
            }
        }
    }
    assert!(wrong.is_empty(), "not allowed by MAY_USE:\n{}", wrong.join("\n"));
}

#[test]
fn the_table_itself_has_no_circle() {
    let graph = MAY_USE
        .iter()
        .map(|(name, used)| ((*name).to_owned(), used.iter().map(|used| (*used).to_owned()).collect()))
        .collect();
    assert_eq!(circle(&graph), None);
}

#[test]
fn what_must_stay_apart_is_not_reached_by_a_detour() {
    let metadata = Metadata::read();
    let mut wrong = Vec::new();
    for (name, forbidden) in MAY_NOT_REACH {
        for package in metadata.workspace().filter(|package| package.name == *name) {
            let ways = forbidden.iter().filter_map(|to| metadata.way(package, to));
            wrong.extend(ways.map(|way| way.join(" -> ")));
        }
    }
    assert!(wrong.is_empty(), "reached:\n{}", wrong.join("\n"));
}

/// A dependency of any package would put it into the product too: cargo builds a crate once, with all features that
/// anybody asks for. What only tests ask for is left out of `cargo build`.
#[test]
fn the_product_is_built_without_tokios_paused_clock() {
    let metadata = Metadata::read();
    let asks = |package: &&Package| {
        package.asks.iter().any(|(name, features)| {
            name == "tokio" && (features.contains("test-util") || features.contains("full"))
        })
    };
    let wrong: Vec<&str> = metadata.workspace().filter(asks).map(|package| package.name.as_str()).collect();
    assert!(wrong.is_empty(), "built with tokio's test-util, which belongs to dev-dependencies: {wrong:?}");
}

#[test]
fn modules_do_not_use_each_other_in_a_circle() {
    let metadata = Metadata::read();
    let mut wrong = Vec::new();
    let below_daemon = |package: &&Package| {
        package.dir.components().any(|part| part.as_os_str() == "daemon" || part.as_os_str() == "proto")
    };
    for package in metadata.workspace().filter(below_daemon) {
        let src = package.dir.join("src");
        let top = modules(&src, &[]);
        let below = top
            .keys()
            .map(|name| (format!("{}::{name}", package.name), modules(&src, std::slice::from_ref(name))));
        let below: Vec<(String, Graph)> = below.collect();
        for (name, graph) in std::iter::once((package.name.clone(), top)).chain(below) {
            if let Some(circle) = circle(&graph) {
                wrong.push(format!("{name}: {}", circle.join(" -> ")));
            }
        }
    }
    assert!(wrong.is_empty(), "modules in a circle:\n{}", wrong.join("\n"));
}

#[test]
fn a_circle_is_found_and_named() {
    let graph = |edges: &[(&str, &str)]| {
        let mut graph: Graph = BTreeMap::new();
        for (from, to) in edges {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
            graph.entry((*to).to_owned()).or_default();
        }
        graph
    };
    assert_eq!(circle(&graph(&[("a", "b"), ("a", "c"), ("b", "c")])), None);
    let found = circle(&graph(&[("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")])).unwrap();
    assert_eq!(found.join(" "), "b c d b");

    let module = |path: &[&str]| path.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
    let at = module(&["names", "zone"]);
    let text = "use crate::view::View; // crate::no\nuse super::resolver::X;\nuse super::super::policy;\n\
                use crate::{mtu, local::Local};\nlet x = super::super::super::y;\n\
                #[cfg(test)]\nmod tests { use crate::tests_only; }";
    let used: Vec<String> = used_by(&[], &at, text).into_iter().collect();
    assert_eq!(used, ["local", "mtu", "names", "policy", "view"]);

    let text = "use super::resolver::X;\nuse crate::names::owners::Y;\nuse crate::{names, view};\nuse super::Names;\n\
                let x = super::super::names::marks::z;\nlet y = crate::view::inner::W;";
    let used: Vec<String> = used_by(&module(&["names"]), &at, text).into_iter().collect();
    assert_eq!(used, ["Names", "marks", "owners", "resolver"]);
}

/// What uses what.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// A circle, with its first member at both ends. None if there is none.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    fn walk(
        graph: &Graph,
        at: &str,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        if let Some(start) = path.iter().position(|before| before == at) {
            let mut circle = path[start..].to_vec();
            circle.push(at.to_owned());
            return Some(circle);
        }
        if done.contains(at) {
            return None;
        }
        path.push(at.to_owned());
        let found = graph.get(at)?.iter().find_map(|next| walk(graph, next, path, done));
        path.pop();
        done.insert(at.to_owned());
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|at| walk(graph, at, &mut Vec::new(), &mut done))
}

/// The modules below a module, each with those of them that it uses; without a parent, those at the top of the crate.
/// What is below one counts as its own; what the parent itself holds is everybody's, and tests may use all.
fn modules(src: &Path, parent: &[String]) -> Graph {
    let mut files = Vec::new();
    collect(src, &mut Vec::new(), &mut files);
    files.retain(|(module, _)| module.starts_with(parent));
    let child = |module: &[String]| module.get(parent.len()).cloned();
    let names: BTreeSet<String> = files.iter().filter_map(|(module, _)| child(module)).collect();
    let mut graph: Graph = names.iter().map(|name| (name.clone(), BTreeSet::new())).collect();
    for (module, path) in &files {
        let Some(own) = child(module) else { continue };
        let used = used_by(parent, module, &fs::read_to_string(path).unwrap());
        let others = used.into_iter().filter(|used| *used != own && names.contains(used));
        graph.entry(own.clone()).or_default().extend(others);
    }
    graph
}

/// All files of a crate that are not tests, each with the module that it is.
fn collect(dir: &Path, module: &mut Vec<String>, files: &mut Vec<(Vec<String>, PathBuf)>) {
    let entries = fs::read_dir(dir).unwrap();
    for path in entries.map(|entry| entry.unwrap().path()) {
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        if stem == "tests" || stem.ends_with("_tests") {
            continue;
        }
        let is_own =
            matches!(stem.as_str(), "mod") || (module.is_empty() && matches!(stem.as_str(), "lib" | "main"));
        if path.is_dir() {
            module.push(stem);
            collect(&path, module, files);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut of_file = module.clone();
            of_file.extend((!is_own).then_some(stem));
            files.push((of_file, path));
        }
    }
}

/// What the text of a module names by `crate::` or `super::` of what is in `parent`.
fn used_by(parent: &[String], module: &[String], text: &str) -> BTreeSet<String> {
    // Unit tests are at the end of their files.
    let text = text.split_once("#[cfg(test)]\nmod tests {").map_or(text, |(code, _)| code);
    let code = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    let code = code.collect::<Vec<_>>().join("\n");
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if !follows_a_word(&code, at) {
            used.extend(names_in(parent, &[], &code[at + "crate::".len()..]));
        }
    }
    let mut from = 0;
    while let Some(found) = code[from..].find("super::") {
        let at = from + found;
        let mut rest = &code[at..];
        let mut ups = 0;
        while let Some(after) = rest.strip_prefix("super::") {
            rest = after;
            ups += 1;
        }
        from = code.len() - rest.len();
        if follows_a_word(&code, at) {
            continue;
        }
        if let Some(base) = module.len().checked_sub(ups).and_then(|length| module.get(..length)) {
            used.extend(names_in(parent, base, rest));
        }
    }
    used
}

/// What a path names of what is in `parent`, if it begins in the module `base`.
fn names_in(parent: &[String], base: &[String], path: &str) -> BTreeSet<String> {
    if let Some(name) = base.get(parent.len()) {
        return if base.starts_with(parent) { BTreeSet::from([name.clone()]) } else { BTreeSet::new() };
    }
    let Some(way) = parent.strip_prefix(base) else { return BTreeSet::new() };
    let rest = way.iter().try_fold(path, |rest, name| rest.strip_prefix(name.as_str())?.strip_prefix("::"));
    rest.map(first_names).unwrap_or_default()
}

/// Whether what is at a place of a text is the end of a longer name or path.
fn follows_a_word(text: &str, at: usize) -> bool {
    text[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':')
}

/// The first names of a path, several where it is a list: `{a::b, c}` gives `a` and `c`.
fn first_names(path: &str) -> BTreeSet<String> {
    let word = |text: &str| {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        text[..end].to_owned()
    };
    let Some(list) = path.strip_prefix('{') else { return BTreeSet::from([word(path)]) };
    let (mut depth, mut names, mut fresh) = (0, BTreeSet::new(), true);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => fresh = true,
            c if c.is_whitespace() => {}
            _ if fresh => {
                names.insert(word(&list[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    names
}
