//! CNI configuration and plugins of a runtime on a host, and a record of the plugin calls.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{NETWORK, RuntimeDir};

/// File name of the ovl plugin, as in the conflist.
const PLUGIN: &str = "ovl-cni";

/// File in a runtime's directory that records the plugin calls.
pub(super) const RECORD: &str = "cni-calls";

/// CNI directories that a runtime is configured with.
#[derive(Debug)]
pub struct Cni {
    /// Directory of the conflist.
    pub conf_dir: PathBuf,
    /// Directory of the plugins.
    pub bin_dir: PathBuf,
    record: PathBuf,
}

/// One recorded call of the plugin by the runtime.
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
    /// Configuration on the plugin's standard input.
    pub config: Value,
    /// Whether the plugin exited with status 0.
    pub succeeded: bool,
    /// What the plugin printed on standard output.
    pub answer: Value,
}

/// Wrapper script that is installed under the plugin's name, calls the plugin, and records its input and output.
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
    /// Installs reference plugins, and the ovl plugin with `ovlctl cni install`. `more` are more options for that.
    pub(super) fn install(home: &RuntimeDir, more: &[&str]) -> Result<Self> {
        let cni = Cni {
            conf_dir: home.dir.join("net.d"),
            bin_dir: home.dir.join("cni"),
            record: home.dir.join(RECORD),
        };
        fs::create_dir(&cni.bin_dir).with_context(|| format!("cannot create {}", cni.bin_dir.display()))?;
        for name in ["loopback", "portmap"] {
            let plugin = super::require_program(name, "containernetworking-plugins")?;
            symlink(plugin, cni.bin_dir.join(name))?;
        }
        let (conf_dir, bin_dir) = (home.path("net.d"), home.path("cni"));
        let dirs = ["--conf-dir", &conf_dir, "--bin-dir", &bin_dir];
        home.host.ctl_ok(&[&["cni", "install", "--network", NETWORK], &dirs[..], more].concat())?;
        cni.put_recorder(home)?;
        Ok(cni)
    }

    fn put_recorder(&self, home: &RuntimeDir) -> Result<()> {
        let (installed, plugin) = (self.bin_dir.join(PLUGIN), home.path(PLUGIN));
        fs::rename(&installed, &plugin).with_context(|| format!("no plugin at {}", installed.display()))?;
        let script = RECORDER.replace("RECORD", &self.record.to_string_lossy()).replace("PLUGIN", &plugin);
        fs::write(&installed, script)?;
        Ok(fs::set_permissions(&installed, fs::Permissions::from_mode(0o755))?)
    }

    /// Returns all calls of the plugin except `VERSION`, oldest first.
    pub fn calls(&self) -> Result<Vec<Call>> {
        let text = if self.record.exists() { fs::read_to_string(&self.record)? } else { String::new() };
        let mut calls = Vec::new();
        // The record is a sequence of JSON documents, each of any number of lines.
        for call in serde_json::Deserializer::from_str(&text).into_iter() {
            let mut call: Value =
                call.with_context(|| format!("{} contains:\n{text}", self.record.display()))?;
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
