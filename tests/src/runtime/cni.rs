//! The CNI configuration and plugins of a runtime on a host, and a record of the plugin's calls.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Home, NETWORK};

/// What the conflist calls our plugin.
const PLUGIN: &str = "ovl-cni";

/// Where the calls are written down, in a runtime's directory.
pub(super) const RECORD: &str = "cni-calls";

/// What a runtime is told to use.
#[derive(Debug)]
pub struct Cni {
    /// Where the conflist is.
    pub conf_dir: PathBuf,
    /// Where all plugins are.
    pub bin_dir: PathBuf,
    record: PathBuf,
}

/// One call of the plugin, as the runtime made it.
#[derive(Debug)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// What was on its standard input.
    pub config: Value,
    /// Whether it ended with status 0.
    pub succeeded: bool,
    /// What it wrote on its standard output.
    pub answer: Value,
}

/// Stands in the plugin's place, calls it, and writes down what it was asked and what it answered.
const RECORDER: &str = r#"#!/bin/sh
input=$(cat)
answer=$(printf '%s' "$input" | PLUGIN)
status=$?
printf '{"command":"%s","container":"%s","netns":"%s","args":"%s","config":%s,"status":%s,"answer":%s}\n' \
    "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_ARGS" "${input:-null}" $status "${answer:-null}" \
    >> RECORD
printf '%s' "$answer"
exit $status
"#;

impl Cni {
    /// Installs the reference plugins, and ours as a person does it.
    pub(super) fn install(home: &Home) -> Result<Self> {
        let cni = Cni {
            conf_dir: home.dir.join("net.d"),
            bin_dir: home.dir.join("cni"),
            record: home.dir.join(RECORD),
        };
        fs::create_dir(&cni.bin_dir).with_context(|| format!("cannot make {}", cni.bin_dir.display()))?;
        for name in ["loopback", "portmap"] {
            let plugin = super::need(name, "containernetworking-plugins")?;
            symlink(plugin, cni.bin_dir.join(name))?;
        }
        let (conf_dir, bin_dir) = (home.path("net.d"), home.path("cni"));
        let dirs = ["--conf-dir", &conf_dir, "--bin-dir", &bin_dir];
        home.host.ctl_ok(&[&["cni", "install", "--network", NETWORK, "--portmap"], &dirs[..]].concat())?;
        cni.put_recorder(home)?;
        Ok(cni)
    }

    fn put_recorder(&self, home: &Home) -> Result<()> {
        let (place, plugin) = (self.bin_dir.join(PLUGIN), home.path(PLUGIN));
        fs::rename(&place, &plugin).with_context(|| format!("no plugin at {}", place.display()))?;
        let script = RECORDER.replace("RECORD", &self.record.to_string_lossy()).replace("PLUGIN", &plugin);
        fs::write(&place, script)?;
        Ok(fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?)
    }

    /// All calls of the plugin but those for its versions, the first one first.
    pub fn calls(&self) -> Result<Vec<Call>> {
        let text = if self.record.exists() { fs::read_to_string(&self.record)? } else { String::new() };
        let mut calls = Vec::new();
        // One after the other, of any number of lines each.
        for call in serde_json::Deserializer::from_str(&text).into_iter() {
            let mut call: Value = call.with_context(|| format!("{} has:\n{text}", self.record.display()))?;
            let text = |name: &str| crate::text(&call[name]);
            let (command, container) = (text("command"), text("container"));
            let (netns, args) = (text("netns"), text("args"));
            let (config, answer) = (call["config"].take(), call["answer"].take());
            if command != "VERSION" {
                let succeeded = call["status"] == 0;
                calls.push(Call { command, container, netns, args, config, succeeded, answer });
            }
        }
        Ok(calls)
    }
}
