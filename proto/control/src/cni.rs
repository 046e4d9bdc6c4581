//! What `ovl-cni` and ovld share in addition to the request: the supported versions, and the directory in which the
//! plugin stores a `DEL` while ovld is unavailable.

use std::io;
use std::path::{Path, PathBuf};

use ovl_proto::DEFAULT_SOCKET;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::request::CniCall;
use crate::stored;

/// The supported versions of the CNI specification, oldest first.
pub const CNI_VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The plugin's file name, and the `type` in configurations.
pub const CNI_PLUGIN: &str = "ovl-cni";
/// The `cniVersion` for older runtimes, which do not know `cniVersions`.
const SAFE_VERSION: &str = "1.0.0";

/// A network configuration that makes container runtimes call `ovl-cni`.
#[derive(Debug, Clone, Copy)]
pub struct Conflist<'a> {
    /// The name of the configuration.
    pub name: &'a str,
    /// The name or id of ovl's network.
    pub network: &'a str,
    /// The control socket of ovld.
    pub socket: &'a Path,
    /// The versions of the specification, oldest first.
    pub versions: &'a [&'a str],
    /// Whether the reference plugin portmap publishes ports, later in the chain, and not `ovl-cni`.
    pub portmap: bool,
    /// More networks that pods may choose by the annotation `ovl.networks`.
    pub more: &'a [String],
}

impl Conflist<'_> {
    /// Returns the configuration as JSON.
    pub fn to_json(&self) -> Value {
        let mut plugin = json!({
            "type": CNI_PLUGIN,
            "network": self.network,
            "capabilities": {
                "bandwidth": true,
                "dns": true,
                "io.kubernetes.cri.pod-annotations": true,
                "ips": true,
                "mac": true,
                // Published by one plugin of the chain.
                "portMappings": !self.portmap,
            },
        });
        if self.socket != Path::new(DEFAULT_SOCKET) {
            plugin["socket"] = self.socket.to_string_lossy().into();
        }
        if !self.more.is_empty() {
            plugin["moreNetworks"] = self.more.into();
        }
        let mut plugins = vec![plugin];
        if self.portmap {
            plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
        }
        let newest = self.versions.iter().find(|version| **version == SAFE_VERSION).or(self.versions.last());
        json!({
            "cniVersion": newest.unwrap_or(&SAFE_VERSION),
            "cniVersions": self.versions,
            "name": self.name,
            "plugins": plugins,
        })
    }
}

/// A stored `DEL`, the content of one file.
///
/// The plugin writes the file and then tries ovld once more. ovld first listens and then reads the directory. So
/// either ovld finds the file, or the plugin finds the socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniDeleted {
    /// The boot id of the kernel. After a reboot the container no longer exists.
    pub boot_id: String,
    /// The unmodified call.
    pub call: CniCall,
}

impl CniDeleted {
    /// Returns the directory of the files, next to the socket.
    pub fn dir(socket: &Path) -> PathBuf {
        socket.with_file_name("cni-deleted")
    }

    /// Returns the file name, which is the same for each `DEL` of one attachment.
    ///
    /// `None` if a part is empty, starts with a dot, or contains a separator, because it would name another file.
    pub fn file_name(network: &str, container_id: &str, ifname: &str) -> Option<String> {
        let parts = [container_id, ifname, network];
        let plain =
            |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', ':', '\0']);
        parts.iter().all(plain).then(|| parts.join(":"))
    }

    /// Stores the `DEL` for ovld atomically, in a file of [`Self::dir`].
    ///
    /// # Errors
    ///
    /// If the file cannot be written or renamed.
    pub fn keep(&self, path: &Path) -> io::Result<()> {
        stored::write(path, self)
    }

    /// Reads a stored `DEL`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is not a `DEL`.
    pub fn read(path: &Path) -> io::Result<Self> {
        stored::read(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_next_to_the_socket() {
        assert_eq!(CniDeleted::dir(Path::new("/run/ovl/ovld.sock")), Path::new("/run/ovl/cni-deleted"));
    }

    #[test]
    fn file_name_is_unique_and_stays_in_its_directory() {
        let name = CniDeleted::file_name;
        assert_eq!(name("pods", "c1", "eth0").as_deref(), Some("c1:eth0:pods"));
        for (network, container, ifname) in [
            ("", "c", "e"),
            ("n", "", "e"),
            ("n", "c", ""),
            ("n", "../c", "e"),
            ("n", ".c", "e"),
            ("a:b", "c", "e"),
        ] {
            assert_eq!(name(network, container, ifname), None, "{network} {container} {ifname}");
        }
    }
}
