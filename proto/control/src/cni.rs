//! What the plugin and ovld agree on beside the request itself: the versions, and the directory
//! where a `DEL` waits for an ovld that is not there.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::request::CniCall;

/// The versions of the CNI specification that are spoken, oldest first.
pub const CNI_VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A `DEL` that ovld could not be told: the content of one file.
///
/// The plugin puts the file in place and then tries ovld once more. ovld listens first and looks
/// into the directory afterwards. So either the one finds the file, or the other a socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniDeleted {
    /// The run of the kernel that it belongs to: with the next one the container is gone anyway.
    pub boot_id: String,
    /// As it came.
    pub call: CniCall,
}

impl CniDeleted {
    /// Where the files are: beside the socket.
    pub fn dir(socket: &Path) -> PathBuf {
        socket.with_file_name("cni-deleted")
    }

    /// The file's name, the same for each `DEL` of one attachment. Nothing for what cannot be one:
    /// no part may be empty, hidden, or lead elsewhere.
    pub fn file_name(network: &str, container_id: &str, ifname: &str) -> Option<String> {
        let parts = [container_id, ifname, network];
        let plain =
            |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', ':', '\0']);
        parts.iter().all(plain).then(|| parts.join(":"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_beside_the_socket() {
        assert_eq!(CniDeleted::dir(Path::new("/run/ovl/ovld.sock")), Path::new("/run/ovl/cni-deleted"));
    }

    #[test]
    fn a_file_name_stays_in_its_directory_and_tells_attachments_apart() {
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
