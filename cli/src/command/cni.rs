//! `ovlctl cni`

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};

use clap::Subcommand;
use ovl_control::CNI_VERSIONS;
use ovl_proto::DEFAULT_SOCKET;
use serde::Serialize;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Error, Result};

/// What runtimes call us by.
const PLUGIN: &str = "ovl-cni";
/// Where our package has it.
const PACKAGED: &str = "/usr/lib/cni/ovl-cni";
/// Where else the reference plugins are: Debian's and Fedora's packages.
const REFERENCE_DIRS: [&str; 2] = ["/usr/lib/cni", "/usr/libexec/cni"];
/// For runtimes that know no list of versions, and are older than the latest one.
const SAFE_VERSION: &str = "1.0.0";

/// Arguments of `cni`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Install the plugin and a network configuration where container runtimes look for them
    ///
    /// Both are replaced at once, or not at all: a runtime never sees half of one. ovld is not asked,
    /// and need not run; the network need not be there yet.
    Install(Install),
}

/// Arguments of `cni install`.
#[derive(Debug, clap::Args)]
struct Install {
    /// The network that containers are attached to: its name or id
    #[arg(long, value_name = "NET", default_value = "pods")]
    network: String,
    /// The configuration's name, and that of its file [default: the network's]
    #[arg(long, value_parser = name)]
    name: Option<String>,
    /// Where the configuration goes
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Where the plugin goes
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The plugin [default: the one beside ovlctl, or the package's]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Chain the reference plugin portmap, which publishes ports
    #[arg(long)]
    portmap: bool,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Installed {
    /// The network configuration.
    conflist: PathBuf,
    /// The plugin.
    binary: PathBuf,
}

/// Installs.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Action::Install(install) = args.action;
    let installed = install.run(&context.socket)?;
    context.print(&installed, |Installed { conflist, binary }| {
        format!("wrote {}\nwrote {}\n", binary.display(), conflist.display())
    })
}

impl Install {
    fn run(&self, socket: &Path) -> Result<Installed> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => name(&self.network)
                .map_err(|error| Error::Usage(format!("--network: {error}. Give a --name too")))?,
        };
        let versions = if self.portmap { portmap_versions(&self.bin_dir)? } else { ours() };
        let conflist = self.conf_dir.join(format!("{name}.conflist"));
        let text = format!("{:#}\n", self.conflist(&name, &versions, socket));
        let source = match &self.binary {
            Some(path) => path.clone(),
            None => beside_ovlctl()?,
        };
        let plugin = fs::read(&source)
            .map_err(|error| failed("read the plugin", &source, &error, "--binary names another file"))?;
        // The configuration last: from then on runtimes run the plugin.
        let binary = self.bin_dir.join(PLUGIN);
        replace(&binary, &plugin, 0o755)?;
        replace(&conflist, text.as_bytes(), 0o644)?;
        Ok(Installed { conflist, binary })
    }

    fn conflist(&self, name: &str, versions: &[&str], socket: &Path) -> Value {
        let mut plugin = json!({
            "type": PLUGIN,
            "network": self.network,
            "capabilities": { "dns": true, "io.kubernetes.cri.pod-annotations": true, "ips": true, "mac": true },
        });
        if socket != Path::new(DEFAULT_SOCKET) {
            plugin["socket"] = socket.to_string_lossy().into();
        }
        let mut plugins = vec![plugin];
        if self.portmap {
            plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
        }
        let newest = versions.iter().find(|version| **version == SAFE_VERSION).or(versions.last());
        json!({
            "cniVersion": newest.unwrap_or(&SAFE_VERSION),
            "cniVersions": versions,
            "name": name,
            "plugins": plugins,
        })
    }
}

fn ours() -> Vec<&'static str> {
    CNI_VERSIONS.to_vec()
}

/// Those of ours that the installed portmap speaks too.
fn portmap_versions(bin_dir: &Path) -> Result<Vec<&'static str>> {
    let dirs = std::iter::once(bin_dir).chain(REFERENCE_DIRS.iter().map(Path::new));
    let Some(path) = dirs.map(|dir| dir.join("portmap")).find(|path| path.is_file()) else {
        return Err(Error::Failed(format!(
            "there is no plugin portmap in {}. Install the reference plugins (Debian: containernetworking-plugins)",
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
                // It may answer without reading.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written?,
            }
        }
        Ok(child.wait_with_output()?.stdout)
    };
    let answer = ask().map_err(|error| failed("run", &path, &error, "Is it a plugin for this machine?"))?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    let spoken = answer["supportedVersions"].as_array().map_or(&[][..], Vec::as_slice);
    let both: Vec<_> =
        ours().into_iter().filter(|version| spoken.iter().any(|each| each == version)).collect();
    if both.is_empty() {
        return Err(Error::Failed(format!(
            "{} speaks no version of CNI that ovl-cni speaks ({}). Install newer reference plugins",
            path.display(),
            CNI_VERSIONS.join(", ")
        )));
    }
    Ok(both)
}

fn beside_ovlctl() -> Result<PathBuf> {
    let own = std::env::current_exe()
        .map_err(|error| Error::Failed(format!("cannot tell where ovlctl is: {error}. Use --binary")))?;
    let packaged = Path::new(PACKAGED);
    [own.with_file_name(PLUGIN), packaged.to_owned()].into_iter().find(|path| path.is_file()).ok_or_else(
        || {
            let (own, packaged) = (own.display(), packaged.display());
            Error::Failed(format!("there is no {PLUGIN} beside {own}, and no {packaged}. Use --binary"))
        },
    )
}

/// Puts a file in place as a whole, and to the disk.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    // Runtimes take files of some endings only: not this one.
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
        failed("write", path, &error, "Run as root, or name another directory with --bin-dir and --conf-dir")
    })
}

fn failed(what: &str, path: &Path, error: &io::Error, advice: &str) -> Error {
    Error::Failed(format!("cannot {what} {}: {error}. {advice}", path.display()))
}

/// A configuration's name, as CNI has them; it also is a file's.
fn name(text: &str) -> std::result::Result<String, String> {
    let fits = text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("letters, digits, '-', '_' and '.', at most 63, a letter or digit first".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install() -> Install {
        Install {
            network: "pods".into(),
            name: None,
            conf_dir: "/nowhere".into(),
            bin_dir: "/nowhere".into(),
            binary: None,
            portmap: true,
        }
    }

    #[test]
    fn a_conflist_names_what_is_not_usual() {
        let usual = install().conflist("pods", &ours(), Path::new(DEFAULT_SOCKET));
        assert_eq!((&usual["cniVersion"], &usual["cniVersions"]), (&json!("1.0.0"), &json!(CNI_VERSIONS)));
        assert_eq!((&usual["name"], &usual["plugins"][0]["network"]), (&json!("pods"), &json!("pods")));
        assert_eq!(usual["plugins"][0]["socket"], Value::Null);
        assert_eq!(usual["plugins"][1]["capabilities"], json!({ "portMappings": true }));
        let other = Install { portmap: false, ..install() }.conflist("a", &["0.4.0"], Path::new("/tmp/s"));
        assert_eq!(
            (&other["cniVersion"], &other["plugins"][0]["socket"]),
            (&json!("0.4.0"), &json!("/tmp/s"))
        );
        assert_eq!(other["plugins"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_portmap_that_is_not_there_is_missed() {
        let dirs = REFERENCE_DIRS.iter().any(|dir| Path::new(dir).join("portmap").is_file());
        let found = portmap_versions(Path::new("/nowhere"));
        assert_eq!(found.is_ok(), dirs, "{found:?}");
    }
}
