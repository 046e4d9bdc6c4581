//! `ovlctl cni`: installs the CNI plugin.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};

use clap::Subcommand;
use ovl_control::{CNI_PLUGIN as PLUGIN, CNI_VERSIONS, Conflist};
use serde::Serialize;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Error, Result};

/// The reference plugin that sets the loopback device up.
const LOOPBACK: &str = "loopback";
/// Path of the plugin in ovl's Debian package.
const PACKAGED: &str = "/usr/lib/cni/ovl-cni";
/// Directories of the reference plugins besides `--bin-dir`: those of Debian's and Fedora's packages.
const REFERENCE_DIRS: [&str; 2] = ["/usr/lib/cni", "/usr/libexec/cni"];
/// The `cniVersion` with which portmap is asked for its versions.
const SAFE_VERSION: &str = "1.0.0";

/// Arguments of `cni`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Install the CNI plugin and a network configuration for container runtimes
    ///
    /// Each file is replaced atomically: a runtime never reads a partial one. ovld need not run, and the
    /// network need not exist yet.
    Install(Install),
}

/// Arguments of `cni install`.
#[derive(Debug, clap::Args)]
struct Install {
    /// Name or id of the network to attach containers to
    #[arg(long, value_name = "NET", default_value = "pods")]
    network: String,
    /// Name of the configuration and of its file [default: the network's name]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// Directory of network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Directory of CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The plugin to install [default: the one next to ovlctl, or the package's]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Let the reference plugin portmap publish ports, later in the chain, and not ovl-cni
    #[arg(long, conflicts_with = "plugins_only")]
    portmap: bool,
    /// A network that pods may choose beside it, by the annotation `ovl.networks`; may be repeated
    #[arg(long = "more-network", value_name = "NET", conflicts_with = "plugins_only")]
    more: Vec<String>,
    /// Install no network configuration: ovl-kube writes it once pods become reachable
    #[arg(long, conflicts_with_all = ["network", "name", "conf_dir"])]
    plugins_only: bool,
}

/// The files that `cni install` wrote.
#[derive(Debug, Serialize)]
struct Installed {
    /// The network configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    conflist: Option<PathBuf>,
    /// The plugin.
    binary: PathBuf,
    /// The reference plugin loopback, if it was missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    loopback: Option<PathBuf>,
}

/// Installs the plugin and its configuration.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Action::Install(install) = args.action;
    let installed = install.run(&context.socket)?;
    context.print(&installed, |Installed { conflist, binary, loopback }| {
        let all = std::iter::once(binary).chain(loopback).chain(conflist);
        all.map(|path| format!("wrote {}\n", path.display())).collect()
    })
}

impl Install {
    fn run(&self, socket: &Path) -> Result<Installed> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => parse_name(&self.network)
                .map_err(|error| Error::Usage(format!("--network: {error}. Add --name")))?,
        };
        let versions = if self.portmap { portmap_versions(&self.bin_dir)? } else { supported_versions() };
        let conflist = self.conf_dir.join(format!("{name}.conflist"));
        let text = format!("{:#}\n", self.conflist(&name, &versions, socket));
        let source = match &self.binary {
            Some(path) => path.clone(),
            None => default_plugin_path()?,
        };
        let plugin = fs::read(&source).map_err(|error| {
            io_error("read the plugin", &source, &error, "Name another file with --binary")
        })?;
        // The configuration comes last: runtimes run the plugins as soon as it exists.
        let binary = self.bin_dir.join(PLUGIN);
        replace_file(&binary, &plugin, 0o755)?;
        let loopback = match loopback_for(&self.bin_dir) {
            Some(source) => {
                let content = fs::read(&source).map_err(|error| {
                    io_error("read the plugin", &source, &error, "Install the reference plugins again")
                })?;
                let loopback = self.bin_dir.join(LOOPBACK);
                replace_file(&loopback, &content, 0o755)?;
                Some(loopback)
            }
            None => None,
        };
        if self.plugins_only {
            return Ok(Installed { conflist: None, binary, loopback });
        }
        replace_file(&conflist, text.as_bytes(), 0o644)?;
        Ok(Installed { conflist: Some(conflist), binary, loopback })
    }

    fn conflist(&self, name: &str, versions: &[&str], socket: &Path) -> Value {
        let (network, portmap) = (self.network.as_str(), self.portmap);
        Conflist { name, network, socket, versions, portmap, more: &self.more }.to_json()
    }
}

/// Returns the reference plugin loopback, if `bin_dir` lacks it: runtimes call it for each pod. `None` if it is there, or not
/// installed on this host.
fn loopback_for(bin_dir: &Path) -> Option<PathBuf> {
    if bin_dir.join(LOOPBACK).exists() {
        return None;
    }
    REFERENCE_DIRS.iter().map(|dir| Path::new(dir).join(LOOPBACK)).find(|path| path.is_file())
}

fn supported_versions() -> Vec<&'static str> {
    CNI_VERSIONS.to_vec()
}

/// Returns the CNI versions that both ovl-cni and the installed portmap support.
fn portmap_versions(bin_dir: &Path) -> Result<Vec<&'static str>> {
    let dirs = std::iter::once(bin_dir).chain(REFERENCE_DIRS.iter().map(Path::new));
    let Some(path) = dirs.map(|dir| dir.join("portmap")).find(|path| path.is_file()) else {
        return Err(Error::Failed(format!(
            "no plugin portmap in {}. Install the reference plugins (Debian: containernetworking-plugins)",
            bin_dir.display()
        )));
    };
    let ask = || -> io::Result<Vec<u8>> {
        let mut child = Command::new(&path)
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(json!({ "cniVersion": SAFE_VERSION }).to_string().as_bytes()) {
                // The plugin may answer without reading its input.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        Ok(child.wait_with_output()?.stdout)
    };
    let answer =
        ask().map_err(|error| io_error("run", &path, &error, "Is it built for this architecture?"))?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    let spoken = answer["supportedVersions"].as_array().map_or(&[][..], Vec::as_slice);
    let both: Vec<_> = supported_versions()
        .into_iter()
        .filter(|version| spoken.iter().any(|each| each == version))
        .collect();
    if both.is_empty() {
        return Err(Error::Failed(format!(
            "{} supports none of the CNI versions that ovl-cni supports ({}). Install newer reference plugins",
            path.display(),
            CNI_VERSIONS.join(", ")
        )));
    }
    Ok(both)
}

fn default_plugin_path() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .map_err(|error| Error::Failed(format!("cannot find the path of ovlctl: {error}. Use --binary")))?;
    let packaged = Path::new(PACKAGED);
    [own.with_file_name(PLUGIN), packaged.to_owned()].into_iter().find(|path| path.is_file()).ok_or_else(
        || {
            let (own, packaged) = (own.display(), packaged.display());
            Error::Failed(format!("found no {PLUGIN}, neither next to {own} nor at {packaged}. Use --binary"))
        },
    )
}

/// Replaces a file atomically, and syncs it to the disk.
fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    // Runtimes ignore files with this extension.
    let beside = dir.join(format!(".{PLUGIN}.{}.new", process::id()));
    let write = || {
        fs::create_dir_all(dir)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&beside, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&beside);
        io_error("write", path, &error, "Run as root, or name another directory with --bin-dir or --conf-dir")
    })
}

fn io_error(what: &str, path: &Path, error: &io::Error, advice: &str) -> Error {
    Error::Failed(format!("cannot {what} {}: {error}. {advice}", path.display()))
}

/// Parses the name of a configuration, which is also its file name. At most 63 characters.
fn parse_name(text: &str) -> std::result::Result<String, String> {
    let fits = text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("a name has at most 63 letters, digits, '-', '_' and '.', and starts with a letter or digit"
            .to_owned())
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::DEFAULT_SOCKET;

    use super::*;

    fn install() -> Install {
        Install {
            network: "pods".into(),
            name: None,
            conf_dir: "/nowhere".into(),
            bin_dir: "/nowhere".into(),
            binary: None,
            portmap: true,
            more: Vec::new(),
            plugins_only: false,
        }
    }

    #[test]
    fn conflist_contains_socket_and_portmap_only_if_configured() {
        let usual = install().conflist("pods", &supported_versions(), Path::new(DEFAULT_SOCKET));
        assert_eq!((&usual["cniVersion"], &usual["cniVersions"]), (&json!("1.0.0"), &json!(CNI_VERSIONS)));
        assert_eq!((&usual["name"], &usual["plugins"][0]["network"]), (&json!("pods"), &json!("pods")));
        assert_eq!(usual["plugins"][0]["socket"], Value::Null);
        assert_eq!(usual["plugins"][0]["moreNetworks"], Value::Null);
        let more = Install { more: vec!["blue".into()], ..install() };
        let more = more.conflist("pods", &supported_versions(), Path::new(DEFAULT_SOCKET));
        assert_eq!(more["plugins"][0]["moreNetworks"], json!(["blue"]));
        let publishes = |list: &Value, at: usize| list["plugins"][at]["capabilities"]["portMappings"].clone();
        assert_eq!((publishes(&usual, 0), publishes(&usual, 1)), (json!(false), json!(true)));
        let other = Install { portmap: false, ..install() }.conflist("a", &["0.4.0"], Path::new("/tmp/s"));
        assert_eq!(
            (&other["cniVersion"], &other["plugins"][0]["socket"]),
            (&json!("0.4.0"), &json!("/tmp/s"))
        );
        assert_eq!((other["plugins"].as_array().map(Vec::len), publishes(&other, 0)), (Some(1), json!(true)));
    }

    #[test]
    fn missing_portmap_is_an_error() {
        let dirs = REFERENCE_DIRS.iter().any(|dir| Path::new(dir).join("portmap").is_file());
        let found = portmap_versions(Path::new("/nowhere"));
        assert_eq!(found.is_ok(), dirs, "{found:?}");
    }
}
