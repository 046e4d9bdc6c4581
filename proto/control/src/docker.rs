//! The directory in which `ovl-docker` stores deletions while ovld is unavailable.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::request::DockerCall;
use crate::stored;

/// Access to stored deletions, one file for each network or endpoint. The plugin writes a file, and ovld reads it at
/// startup and periodically.
#[derive(Debug)]
pub struct DockerDeleted;

impl DockerDeleted {
    /// Returns the directory of the files, next to the socket.
    pub fn dir(socket: &Path) -> PathBuf {
        socket.with_file_name("docker-deleted")
    }

    /// Stores a call for ovld atomically. `key` is the file name.
    ///
    /// # Errors
    ///
    /// If the file cannot be written or renamed.
    pub fn keep(socket: &Path, key: &str, call: &DockerCall) -> io::Result<()> {
        stored::write(&Self::dir(socket).join(key), call)
    }

    /// Returns the stored calls with their files. An unreadable file is returned as an error.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read.
    pub fn all(socket: &Path) -> io::Result<Vec<(PathBuf, io::Result<DockerCall>)>> {
        let entries = match fs::read_dir(Self::dir(socket)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut calls = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if !hidden {
                let call = stored::read(&path);
                calls.push((path, call));
            }
        }
        // By file name, so that endpoints precede their networks.
        calls.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_stored_calls_are_found() {
        let dir = std::env::temp_dir().join(format!("ovl-docker-deleted-{}", std::process::id()));
        let socket = dir.join("ovld.sock");
        assert!(DockerDeleted::all(&socket).unwrap().is_empty());
        let call =
            |method: &str| DockerCall { method: method.to_owned(), body: serde_json::json!({ "a": 1 }) };
        DockerDeleted::keep(&socket, "network-1", &call("N")).unwrap();
        DockerDeleted::keep(&socket, "endpoint-1", &call("E")).unwrap();
        DockerDeleted::keep(&socket, "endpoint-1", &call("E")).unwrap();
        fs::write(DockerDeleted::dir(&socket).join(".endpoint-2"), "{").unwrap();
        fs::write(DockerDeleted::dir(&socket).join("endpoint-3"), "{").unwrap();
        let all = DockerDeleted::all(&socket).unwrap();
        let found: Vec<_> =
            all.iter().map(|(_, read)| read.as_ref().ok().map(|call| call.method.as_str())).collect();
        assert_eq!(found, [Some("E"), None, Some("N")]);
        fs::remove_dir_all(&dir).unwrap();
    }
}
