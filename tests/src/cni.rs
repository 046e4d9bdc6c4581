//! Runs plugins as container runtimes do (libcni): a list of them on each `ADD`, each with the result
//! of the one before; backwards on `DEL`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, Netns, Workload, find_binary, wait_until, without_prefix_length};
use serde_json::{Map, Value, json};

use crate::{SOON, assert_says, endpoints, rows, text, wait_clean};

/// Where Debian's package containernetworking-plugins has the reference plugins.
const REFERENCE_DIR: &str = "/usr/lib/cni";

/// A list of plugins.
#[derive(Debug, Clone)]
pub struct Conflist {
    /// Its name.
    pub name: String,
    /// The version of the specification.
    pub version: String,
    /// What each is told, as it stands in the file.
    pub plugins: Vec<Value>,
}

/// A container, as a runtime knows it.
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
    /// What plugins get as `runtimeConfig` that declare the capability.
    pub capabilities: Map<String, Value>,
}

/// What a plugin did.
#[derive(Debug, Clone, PartialEq)]
pub struct Ran {
    /// Its exit status.
    pub code: Option<i32>,
    /// What it printed; null where that was nothing.
    pub printed: Value,
}

impl Ran {
    /// Its result; an error if that is what it printed.
    pub fn result(self) -> Result<Value> {
        ensure!(self.code == Some(0), "the plugin failed: {}", self.printed);
        Ok(self.printed)
    }

    /// The code of its error, and all that it says.
    pub fn error(self) -> Result<(u64, String)> {
        ensure!(self.code != Some(0), "the plugin succeeded: {}", self.printed);
        let code = self.printed["code"].as_u64().with_context(|| format!("no code in {}", self.printed))?;
        ensure!(self.printed["cniVersion"].is_string(), "no cniVersion in {}", self.printed);
        let say = |key: &str| self.printed[key].as_str().unwrap_or_default();
        Ok((code, format!("{}: {}", say("msg"), say("details"))))
    }
}

impl Container {
    /// One whose namespace is a workload's, with an interface `eth0`.
    pub fn of(workload: &Workload) -> Self {
        Self::new(&format!("{}-container", workload.name()), workload.path_str())
    }

    /// One of this id.
    pub fn new(id: &str, netns: &str) -> Self {
        Self {
            id: id.to_owned(),
            netns: netns.to_owned(),
            ifname: "eth0".to_owned(),
            args: String::new(),
            capabilities: Map::new(),
        }
    }

    /// The same container's other interface.
    pub fn interface(&self, ifname: &str) -> Self {
        Self { ifname: ifname.to_owned(), ..self.clone() }
    }

    /// With these arguments.
    pub fn args(&self, args: &str) -> Self {
        Self { args: args.to_owned(), ..self.clone() }
    }

    /// With a capability's content.
    pub fn capability(mut self, name: &str, content: Value) -> Self {
        self.capabilities.insert(name.to_owned(), content);
        self
    }

    /// As containerd calls at last, when the namespace is gone.
    pub fn without_netns(&self) -> Self {
        Self { netns: String::new(), ..self.clone() }
    }
}

impl Conflist {
    /// Our plugin alone, for a host's daemon.
    pub fn new(host: &Host, network: &str) -> Self {
        let socket = host.socket();
        let plugin = json!({ "type": "ovl-cni", "network": network, "socket": socket.to_string_lossy() });
        Self { name: network.to_owned(), version: "1.1.0".to_owned(), plugins: vec![plugin] }
    }

    /// What a file has.
    pub fn read(path: &Path) -> Result<Self> {
        let file = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let list: Value = serde_json::from_str(&file)?;
        let plugins = list["plugins"].as_array().context("no plugins")?.clone();
        Ok(Self { name: text(&list["name"]), version: text(&list["cniVersion"]), plugins })
    }

    /// In another version.
    pub fn version(mut self, version: &str) -> Self {
        self.version = version.to_owned();
        self
    }

    /// Under another name.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// With one more key for each plugin of ours.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        for plugin in self.plugins.iter_mut().filter(|plugin| plugin["type"] == "ovl-cni") {
            plugin[key] = value.clone();
        }
        self
    }

    /// With another plugin at the end.
    pub fn then(mut self, plugin: Value) -> Self {
        self.plugins.push(plugin);
        self
    }

    /// With another plugin at the beginning.
    pub fn after(mut self, plugin: Value) -> Self {
        self.plugins.insert(0, plugin);
        self
    }

    /// Attaches a container, and gives the last plugin's result. After an error nothing is taken back:
    /// that is for a `DEL`, as with a runtime.
    pub fn add(&self, host: &Host, container: &Container) -> Result<Value> {
        let mut result = None;
        for plugin in &self.plugins {
            let ran = self.call(host, plugin, "ADD", container, result.as_ref())?;
            result = Some(ran.result().with_context(|| format!("ADD of {}", plugin["type"]))?);
        }
        result.context("a list without plugins")
    }

    /// Detaches it; with the result of `add`, if the runtime still has it.
    pub fn del(&self, host: &Host, container: &Container, result: Option<&Value>) -> Result<()> {
        for plugin in self.plugins.iter().rev() {
            let ran = self.call(host, plugin, "DEL", container, result)?;
            let printed = ran.result().with_context(|| format!("DEL of {}", plugin["type"]))?;
            ensure!(printed.is_null(), "a DEL printed {printed}");
        }
        Ok(())
    }

    /// Compares it with the result of `add`.
    pub fn check(&self, host: &Host, container: &Container, result: &Value) -> Result<()> {
        for plugin in &self.plugins {
            let ran = self.call(host, plugin, "CHECK", container, Some(result))?;
            ran.result().with_context(|| format!("CHECK of {}", plugin["type"]))?;
        }
        Ok(())
    }

    /// One call of our plugin, whatever comes of it.
    pub fn ask(&self, host: &Host, command: &str, container: &Container) -> Result<Ran> {
        let ours = self.plugins.iter().find(|plugin| plugin["type"] == "ovl-cni").context("not our list")?;
        self.call(host, ours, command, container, None)
    }

    /// One call of one plugin.
    pub fn call(
        &self,
        host: &Host,
        plugin: &Value,
        command: &str,
        container: &Container,
        previous: Option<&Value>,
    ) -> Result<Ran> {
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

/// A plugin with nothing in its environment but where others are.
pub fn plugin_command(kind: &str) -> Result<Command> {
    let path = match kind {
        "ovl-cni" => binary()?,
        reference => Path::new(REFERENCE_DIR).join(reference),
    };
    ensure!(path.is_file(), "no plugin {}: apt-get install containernetworking-plugins", path.display());
    let mut command = Command::new(&path);
    // iptables and tc are where an ordinary user's PATH does not lead.
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_PATH", REFERENCE_DIR);
    Ok(command)
}

/// Our plugin: `$OVL_CNI`, or the one that was built.
pub fn binary() -> Result<PathBuf> {
    match std::env::var_os("OVL_CNI") {
        Some(path) => Ok(path.into()),
        None => find_binary("ovl-cni"),
    }
}

/// Runs a plugin in a host's namespace, with this on its standard input.
pub fn run(host: &Host, mut command: Command, input: &[u8]) -> Result<Ran> {
    let output = host.run(move || -> Result<_> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read is told nothing.
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
    Ok(Ran { code: output.status.code(), printed })
}

/// The interfaces in a workload, its loopback aside.
pub fn interfaces(workload: &Workload) -> Result<BTreeSet<String>> {
    // What was taken away has another name until it is swept.
    Ok(links(workload)?.filter(|name| name != "lo" && !name.starts_with("ovd-")).collect())
}

fn links(netns: &Netns) -> Result<impl Iterator<Item = String>> {
    let links = netns.ip_json(&["link", "show"])?;
    let names: Vec<String> =
        links.as_array().into_iter().flatten().map(|link| text(&link["ifname"])).collect();
    Ok(names.into_iter())
}

/// The addresses that a result tells, without their lengths.
pub fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.map(|ip| without_prefix_length(&text(&ip["address"])).to_owned()).collect()
}

/// Waits until nothing is left of any attachment, on this host or in its tables.
pub fn wait_nothing_left(host: &Host) -> Result<()> {
    wait_until(SOON, "no endpoint, device or file left", || {
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

/// Fails unless a plugin failed with this code and says this.
#[track_caller]
pub fn assert_refused(ran: Ran, code: u64, parts: &[&str]) {
    let error = ran.error().unwrap_or_else(|error| (0, format!("{error:#}")));
    assert_eq!(error.0, code, "{}", error.1);
    assert_says(&error.1, parts);
}
