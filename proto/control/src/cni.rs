//! What `ovl-cni` and ovld share in addition to the request: the supported versions, and the directory in which the
//! plugin stores a `DEL` while ovld is unavailable.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::request::CniCall;
use crate::stored;

/// The supported versions of the CNI specification, oldest first.
pub const CNI_VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

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
