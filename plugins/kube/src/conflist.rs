//! The network configuration of this node's container runtime. The kubelet says that the node is ready once there is one, so it
//! is written when pods become reachable, and not before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use ovl_control::{ApiReport, CNI_VERSIONS, Conflist, NetworkCreate};
use ovl_proto::object::{Driver, Mode};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::ovld::Connection;
use crate::reports::Heard;

/// How often it is looked whether the file is still there.
const LOOK: Duration = Duration::from_secs(30);
/// The wait after a failure.
const AGAIN: Duration = Duration::from_secs(2);
/// The file beside ovld's socket that says that the configuration was written since the boot: that directory ends with it.
const MARK: &str = "conflist-written";

/// The configuration and the network that it is about.
#[derive(Debug)]
pub(crate) struct Keeper {
    /// The file.
    pub path: PathBuf,
    /// The name of the network of pods.
    pub network: String,
    /// The subnets with which the network is created if there is none. Empty: it is not.
    pub subnets: Vec<IpNet>,
    /// More networks that pods may choose.
    pub more: Vec<String>,
    /// The control socket of ovld.
    pub socket: PathBuf,
}

impl Keeper {
    /// Keeps the file for ever.
    pub(crate) async fn run(self, mut heard: watch::Receiver<Option<Heard>>) {
        if let Err(error) = self.remove_stale() {
            tracing::warn!("{error:#}");
        }
        let mut failed = false;
        loop {
            let report = heard.borrow_and_update().clone().and_then(|heard| heard.report);
            let wait = match self.look(report.as_ref()).await {
                Ok(()) => {
                    failed = false;
                    LOOK
                }
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!("the node does not become ready: {error:#}");
                    }
                    AGAIN
                }
            };
            if let Ok(Err(_)) = timeout(wait, heard.changed()).await {
                return;
            }
        }
    }

    fn mark(&self) -> PathBuf {
        self.socket.with_file_name(MARK)
    }

    /// Deletes a file that is left from before the boot.
    fn remove_stale(&self) -> Result<()> {
        if self.mark().exists() {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("deleting {}", self.path.display()))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Writes the file if pods become reachable. What is written stays: running pods do not depend on ovld, and a node whose
    /// ovld is restarted stays ready.
    async fn look(&self, report: Option<&ApiReport>) -> Result<()> {
        let Some(report) = report.filter(|report| report.unready.is_none()) else { return Ok(()) };
        let mut connection = Connection::open(&self.socket).await?;
        let networks = connection.networks().await?;
        if !networks.iter().any(|network| network.name == self.network) {
            // One host creates it: two that do at once would create two.
            if self.subnets.is_empty() || report.balanced.is_none() {
                anyhow::bail!("there is no network {} yet", self.network);
            }
            connection.create_network(self.create()).await?;
            tracing::info!(network = self.network, "created the network of pods");
        }
        let socket = &self.socket;
        let name = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let conflist = Conflist {
            name: &name,
            network: &self.network,
            socket,
            versions: &CNI_VERSIONS,
            portmap: false,
            more: &self.more,
        };
        let text = format!("{:#}\n", conflist.to_json());
        if fs::read_to_string(&self.path).is_ok_and(|found| found == text) {
            return Ok(());
        }
        replace(&self.path, &text).with_context(|| format!("writing {}", self.path.display()))?;
        fs::write(self.mark(), "").with_context(|| format!("writing {}", self.mark().display()))?;
        tracing::info!(path = %self.path.display(), "wrote the network configuration: pods become reachable");
        Ok(())
    }

    fn create(&self) -> NetworkCreate {
        NetworkCreate {
            name: self.network.clone(),
            driver: Driver::Overlay,
            mode: Mode::L3,
            subnets: self.subnets.clone(),
            vni: None,
            encrypted: false,
            auto_encrypt: false,
            internal: false,
            mtu: None,
            backend: None,
            block_lengths: Vec::new(),
            dns: false,
            external_names: false,
        }
    }
}

/// Replaces a file atomically.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    // Runtimes ignore files with this extension.
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    fs::rename(&beside, path)
}
