//! Atomic replacement of files: the new content is written to a temporary file with mode 0600, which is then renamed.
//!
//! After a crash the file has its old content or its new content.

#![warn(missing_docs)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The error about a damaged file whose content must not be lost. The text names the file and says what to do.
///
/// A restart finds the same file, so a service manager should not try one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Damaged(pub String);

/// The durability of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The write waits for the disk: the new content survives a power failure once the call returns.
    Synced,
    /// The new content survives the process, but not a power failure: for files in the run directory.
    Unsynced,
}

/// Replaces a file that only this daemon writes.
///
/// The temporary file is `path` with the extension `new`. One that a killed daemon left is overwritten.
///
/// # Errors
///
/// An I/O error; the file then has its old content, or its new one if the directory could not be synced.
pub fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    put(&path.with_extension("new"), path, content, durability, rename)
}

/// Replaces and syncs a file that several daemons of a host may write at the same time.
///
/// # Errors
///
/// As [`replace`].
pub fn replace_shared(path: &Path, content: &[u8]) -> io::Result<()> {
    put(&own_temporary(path), path, content, Durability::Synced, rename)
}

/// Creates and syncs a file. A file that exists, or that another process creates meanwhile, is kept.
///
/// # Errors
///
/// An I/O error; there is then no file, unless the directory could not be synced.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    // A hard link, not a rename: it does not replace an existing file.
    put(&own_temporary(path), path, content, Durability::Synced, |temporary, path| {
        let linked = match fs::hard_link(temporary, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            result => result,
        };
        fs::remove_file(temporary)?;
        linked
    })
}

/// Deletes a file. An absent file is no error.
///
/// # Errors
///
/// Any other I/O error.
pub fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the paths of the files in a directory, in the order of their names and not in that of the file system.
///
/// # Errors
///
/// The directory cannot be read.
pub fn sorted(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = paths.collect::<io::Result<Vec<_>>>()?;
    paths.sort_unstable();
    Ok(paths)
}

/// Computes SHA-256, which is the checksum in the header of state files.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    out
}

/// The path of a temporary file in the same directory that no other process uses.
fn own_temporary(path: &Path) -> PathBuf {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    PathBuf::from(temporary)
}

fn rename(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::rename(temporary, path).inspect_err(|_| drop(fs::remove_file(temporary)))
}

/// Writes the temporary file, moves it to `path` by `put`, and syncs the file and its directory if requested.
fn put(
    temporary: &Path,
    path: &Path,
    content: &[u8],
    durability: Durability,
    put: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    // A killed daemon may have left it. It is created again, so that its mode is 0600.
    remove_if_present(temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    let sync = |file: &File| match durability {
        Durability::Synced => file.sync_all(),
        Durability::Unsynced => Ok(()),
    };
    if let Err(error) = file.write_all(content).and_then(|()| sync(&file)) {
        fs::remove_file(temporary)?;
        return Err(error);
    }
    put(temporary, path)?;
    if durability == Durability::Unsynced {
        return Ok(());
    }
    // The new directory entry is durable only after its directory is synced.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    sync(&File::open(directory)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A directory that is deleted after the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("ovl-files-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(&self.0).unwrap();
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn replace_leaves_one_private_file_with_the_new_content() {
        let dir = Dir::new("replace");
        let path = dir.0.join("state");
        // A temporary file of a killed daemon, readable by all users.
        fs::write(dir.0.join("state.new"), "half").unwrap();
        for durability in [Durability::Synced, Durability::Unsynced] {
            replace(&path, format!("{durability:?}").as_bytes(), durability).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{durability:?}"));
            assert_eq!((mode(&path), dir.names()), (0o600, vec!["state".to_owned()]));
        }
        replace_shared(&path, b"shared").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"shared");
        assert_eq!((mode(&path), dir.names()), (0o600, vec!["state".to_owned()]));
    }

    #[test]
    fn failed_replace_keeps_the_old_content_and_deletes_the_temporary_file() {
        let dir = Dir::new("failed");
        let path = dir.0.join("state");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("content"), "old").unwrap();
        assert!(replace(&path, b"new", Durability::Synced).is_err());
        assert_eq!(fs::read_to_string(path.join("content")).unwrap(), "old");
        assert_eq!(dir.names(), ["state"]);
    }

    #[test]
    fn create_keeps_an_existing_file() {
        let dir = Dir::new("create");
        let path = dir.0.join("identity");
        create(&path, b"first").unwrap();
        create(&path, b"second").unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"first".to_vec(), 0o600));
        assert_eq!(dir.names(), ["identity"]);
        remove_if_present(&path).unwrap();
        remove_if_present(&path).unwrap();
        assert!(dir.names().is_empty());
    }
}
