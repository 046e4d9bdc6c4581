//! Each line of the table in `docs/security.md` names the tests that hold it, and they exist.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Adds the names of the tests in a folder: functions behind an attribute that ends in `test]`.
fn collect(folder: &Path, tests: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                collect(&path, tests);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[") {
                    is_test |= line.ends_with("test]") || line.contains("::test(");
                } else if let Some((_, name)) = line.split_once("fn ").filter(|_| is_test) {
                    tests.extend(name.split('(').next().map(str::to_owned));
                    is_test = false;
                }
            }
        }
    }
}

#[test]
fn every_line_of_the_security_table_is_held_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut tests = BTreeSet::new();
    for folder in ["cli", "daemon", "netns-lab", "plugins", "proto", "tests"] {
        collect(&root.join(folder), &mut tests);
    }
    let text = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let section = text.split("## Who may do what").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut lines = 0;
    for line in section.lines().filter(|line| line.starts_with('|')).skip(2) {
        let cells: Vec<&str> = line.split('|').collect();
        let [_, _, _, _, held, _] = cells.as_slice() else { panic!("not four cells: {line}") };
        let names: Vec<&str> = held.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test: {line}");
        for name in names {
            assert!(tests.contains(name), "there is no test {name}: {line}");
        }
        lines += 1;
    }
    assert!(lines > 20, "only {lines} lines");
}
