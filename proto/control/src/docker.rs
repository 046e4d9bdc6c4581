//! What `ovl-docker` and ovld agree on beside the requests: the directory where calls that take
//! something away wait for an ovld that is not there.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::request::DockerCall;

/// Calls that wait. There is one file for each thing that is to go; the plugin writes it, and ovld
/// looks for it when it starts and from time to time.
#[derive(Debug)]
pub struct DockerDeleted;

impl DockerDeleted {
    /// Where the files are: beside the socket.
    pub fn dir(socket: &Path) -> PathBuf {
        socket.with_file_name("docker-deleted")
    }

    /// Puts a call where ovld finds it, whole or not at all. `key` is the file's name.
    pub fn keep(socket: &Path, key: &str, call: &DockerCall) -> io::Result<()> {
        let dir = Self::dir(socket);
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        // Hidden, so that ovld does not take it before it is whole.
        let beside = dir.join(format!(".{key}"));
        let bytes = serde_json::to_vec(call)?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?
            .write_all(&bytes)?;
        fs::rename(&beside, dir.join(key))
    }

    /// The calls that wait, with their files. What cannot be read comes as an error.
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
                let call = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
                calls.push((path, call));
            }
        }
        // Endpoints go before their networks.
        calls.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_wait_are_found_once_they_are_whole() {
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
