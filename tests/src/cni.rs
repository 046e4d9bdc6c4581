//! Runs CNI plugins as libcni does: `ADD` in the order of the list, each with the previous result, and `DEL` in reverse
//! order.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, Netns, Workload, find_binary, wait_until, without_prefix_length};
use serde_json::{Map, Value, json};

use crate::{SOON, assert_contains, endpoints, rows, text, wait_clean};

/// Directory of the reference plugins, from Debian's package containernetworking-plugins.
const REFERENCE_DIR: &str = "/usr/lib/cni";

/// A CNI network configuration list.
#[derive(Debug, Clone)]
pub struct Conflist {
    /// Network name.
    pub name: String,
    /// CNI specification version.
    pub version: String,
    /// Configuration of each plugin, as in the file.
    pub plugins: Vec<Value>,
}

/// A container, as a runtime describes it to plugins.
#[derive(Debug, Clone)]
pub struct Container {
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// `runtimeConfig` by capability, passed to plugins that declare the capability.
    pub capabilities: Map<String, Value>,
}

/// Exit status and output of a plugin.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginOutput {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// JSON on standard output; null if it printed nothing.
    pub printed: Value,
}

impl PluginOutput {
    /// Returns its result, or an error if it failed.
    pub fn result(self) -> Result<Value> {
        ensure!(self.code == Some(0), "the plugin failed: {}", self.printed);
        Ok(self.printed)
    }

    /// Returns the code and text of its error. Fails if the plugin succeeded.
    pub fn error(self) -> Result<(u64, String)> {
        ensure!(self.code != Some(0), "the plugin succeeded: {}", self.printed);
        let code = self.printed["code"].as_u64().with_context(|| format!("no code in {}", self.printed))?;
        ensure!(self.printed["cniVersion"].is_string(), "no cniVersion in {}", self.printed);
        let say = |key: &str| self.printed[key].as_str().unwrap_or_default();
        Ok((code, format!("{}: {}", say("msg"), say("details"))))
    }
}

impl Container {
    /// A container in a workload's namespace, with the interface `eth0`.
    pub fn for_workload(workload: &Workload) -> Self {
        Self::new(&format!("{}-container", workload.name()), workload.path_str())
    }

    /// A container with this ID and namespace, and the interface `eth0`.
    pub fn new(id: &str, netns: &str) -> Self {
        Self {
            id: id.to_owned(),
            netns: netns.to_owned(),
            ifname: "eth0".to_owned(),
            args: String::new(),
            capabilities: Map::new(),
        }
    }

    /// The same container with another interface.
    pub fn interface(&self, ifname: &str) -> Self {
        Self { ifname: ifname.to_owned(), ..self.clone() }
    }

    /// The same container with these `CNI_ARGS`.
    pub fn args(&self, args: &str) -> Self {
        Self { args: args.to_owned(), ..self.clone() }
    }

    /// Adds the content of a capability.
    pub fn capability(mut self, name: &str, content: Value) -> Self {
        self.capabilities.insert(name.to_owned(), content);
        self
    }

    /// The same container without a namespace, as in containerd's last `DEL`.
    pub fn without_netns(&self) -> Self {
        Self { netns: String::new(), ..self.clone() }
    }
}

impl Conflist {
    /// A list of only the ovl plugin, for a host's daemon.
    pub fn new(host: &Host, network: &str) -> Self {
        let socket = host.socket();
        let plugin = json!({ "type": "ovl-cni", "network": network, "socket": socket.to_string_lossy() });
        Self { name: network.to_owned(), version: "1.1.0".to_owned(), plugins: vec![plugin] }
    }

    /// Reads a list from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let file = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let list: Value = serde_json::from_str(&file)?;
        let plugins = list["plugins"].as_array().context("no plugins")?.clone();
        Ok(Self { name: text(&list["name"]), version: text(&list["cniVersion"]), plugins })
    }

    /// Sets the CNI version.
    pub fn with_version(mut self, version: &str) -> Self {
        self.version = version.to_owned();
        self
    }

    /// Sets the network name.
    pub fn with_name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Sets a key in the configuration of each ovl plugin.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        for plugin in self.plugins.iter_mut().filter(|plugin| plugin["type"] == "ovl-cni") {
            plugin[key] = value.clone();
        }
        self
    }

    /// Appends a plugin.
    pub fn with_last(mut self, plugin: Value) -> Self {
        self.plugins.push(plugin);
        self
    }

    /// Prepends a plugin.
    pub fn with_first(mut self, plugin: Value) -> Self {
        self.plugins.insert(0, plugin);
        self
    }

    /// Attaches a container, and returns the last plugin's result. A failed `ADD` is not rolled back: as with a
    /// runtime, a `DEL` does that.
    pub fn add(&self, host: &Host, container: &Container) -> Result<Value> {
        let mut result = None;
        for plugin in &self.plugins {
            let ran = self.call(host, plugin, "ADD", container, result.as_ref())?;
            result = Some(ran.result().with_context(|| format!("ADD of {}", plugin["type"]))?);
        }
        result.context("a list without plugins")
    }

    /// Detaches a container, with the result of [`add`](Self::add) if the runtime still has it.
    pub fn del(&self, host: &Host, container: &Container, result: Option<&Value>) -> Result<()> {
        for plugin in self.plugins.iter().rev() {
            let ran = self.call(host, plugin, "DEL", container, result)?;
            let printed = ran.result().with_context(|| format!("DEL of {}", plugin["type"]))?;
            ensure!(printed.is_null(), "a DEL printed {printed}");
        }
        Ok(())
    }

    /// Runs `CHECK` with the result of [`add`](Self::add).
    pub fn check(&self, host: &Host, container: &Container, result: &Value) -> Result<()> {
        for plugin in &self.plugins {
            let ran = self.call(host, plugin, "CHECK", container, Some(result))?;
            ran.result().with_context(|| format!("CHECK of {}", plugin["type"]))?;
        }
        Ok(())
    }

    /// Calls the ovl plugin once, and returns its output whether or not it succeeded.
    pub fn call_ovl(&self, host: &Host, command: &str, container: &Container) -> Result<PluginOutput> {
        let plugin = self
            .plugins
            .iter()
            .find(|plugin| plugin["type"] == "ovl-cni")
            .context("the list has no ovl-cni")?;
        self.call(host, plugin, command, container, None)
    }

    /// Calls one plugin once.
    pub fn call(
        &self,
        host: &Host,
        plugin: &Value,
        command: &str,
        container: &Container,
        previous: Option<&Value>,
    ) -> Result<PluginOutput> {
        let mut config = plugin.clone();
        config["cniVersion"] = self.version.as_str().into();
        config["name"] = self.name.as_str().into();
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let declared = plugin["capabilities"].as_object();
        let wanted = |(name, _): &(&String, &Value)| {
            declared.is_some_and(|declared| declared.get(*name) == Some(&Value::Bool(true)))
        };
        let runtime: Map<String, Value> = container
            .capabilities
            .iter()
            .filter(wanted)
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime.is_empty() {
            config["runtimeConfig"] = Value::Object(runtime);
        }
        let mut program = plugin_command(&text(&plugin["type"]))?;
        program
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &container.id)
            .env("CNI_NETNS", &container.netns)
            .env("CNI_IFNAME", &container.ifname)
            .env("CNI_ARGS", &container.args);
        run(host, program, config.to_string().as_bytes())
    }
}

/// Returns a command for a plugin, whose environment has only `PATH` and `CNI_PATH`.
pub fn plugin_command(kind: &str) -> Result<Command> {
    let path = match kind {
        "ovl-cni" => binary()?,
        reference => Path::new(REFERENCE_DIR).join(reference),
    };
    ensure!(path.is_file(), "no plugin {}: apt-get install containernetworking-plugins", path.display());
    let mut command = Command::new(&path);
    // iptables and tc are in /usr/sbin, which is not in an ordinary user's PATH.
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_PATH", REFERENCE_DIR);
    Ok(command)
}

/// Returns the path of the ovl plugin: `$OVL_CNI`, or the one in the build directory.
pub fn binary() -> Result<PathBuf> {
    match std::env::var_os("OVL_CNI") {
        Some(path) => Ok(path.into()),
        None => find_binary("ovl-cni"),
    }
}

/// Runs a plugin in a host's namespace, with this on its standard input.
pub fn run(host: &Host, mut command: Command, input: &[u8]) -> Result<PluginOutput> {
    let output = host.run(move || -> Result<_> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin may exit without reading its input.
            let _ = stdin.write_all(input);
        }
        Ok(child.wait_with_output()?)
    })??;
    let text = String::from_utf8_lossy(&output.stdout);
    let printed = match text.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?,
    };
    if output.status.code().is_none() {
        bail!("the plugin was ended by a signal: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(PluginOutput { code: output.status.code(), printed })
}

/// Interfaces in a workload, except its loopback.
pub fn interfaces(workload: &Workload) -> Result<BTreeSet<String>> {
    // A detached interface is renamed, and deleted later.
    Ok(links(workload)?.filter(|name| name != "lo" && !name.starts_with("ovd-")).collect())
}

fn links(netns: &Netns) -> Result<impl Iterator<Item = String>> {
    let links = netns.ip_json(&["link", "show"])?;
    let names: Vec<String> =
        links.as_array().into_iter().flatten().map(|link| text(&link["ifname"])).collect();
    Ok(names.into_iter())
}

/// Addresses in a result, without prefix lengths.
pub fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| without_prefix_length(&text(&ip["address"])).to_owned()).collect()
}

/// Waits until a host has no endpoint, device, file or address of any attachment left.
pub fn wait_nothing_left(host: &Host) -> Result<()> {
    wait_until(SOON, "no endpoint, device or file to be left", || {
        let endpoints = endpoints(host)?;
        let devices: Vec<String> = links(host)?.filter(|name| name.starts_with("ove-")).collect();
        let kept = fs::read_dir(host.run_dir().join("endpoints"))?.count();
        let remembered = fs::read_dir(host.run_dir().join("cni-deleted")).map_or(0, Iterator::count);
        let used: u64 = rows(host, &["subnets"])?.iter().filter_map(|row| row["used"].as_u64()).sum();
        ensure!(
            endpoints.is_empty() && devices.is_empty() && (kept, remembered, used) == (0, 0, 0),
            "{endpoints:?} {devices:?} {kept} files, {remembered} DELs, {used} addresses"
        );
        Ok(())
    })?;
    wait_clean(std::slice::from_ref(host), SOON)
}

/// Fails unless a plugin failed with this code and its error contains these parts.
#[track_caller]
pub fn assert_refused(ran: PluginOutput, code: u64, parts: &[&str]) {
    let error = ran.error().unwrap_or_else(|error| (0, format!("{error:#}")));
    assert_eq!(error.0, code, "{}", error.1);
    assert_contains(&error.1, parts);
}
