//! Files that are replaced as a whole, and never changed in place: written beside, renamed, mode 0600.
//!
//! After a crash such a file has its old content or its new content.

#![warn(missing_docs)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A file whose content must not be lost is damaged. The text names the file and says what to do.
///
/// A restart finds the same file, so a service manager should not try one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Damaged(pub String);

/// Whether a write waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The new content outlives a power failure once the call returns.
    Synced,
    /// The new content outlives the process, not a power failure: for files that end with the kernel.
    Unsynced,
}

/// Replaces a file that only this daemon writes.
///
/// The new content is first in `path` with the extension `new`. One that a killed daemon left there is overwritten.
///
/// # Errors
///
/// An I/O error; the file then has its old content, or its new one if the directory could not be synced.
pub fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    put(&path.with_extension("new"), path, content, durability, rename)
}

/// Replaces a file that several daemons of a host may write at the same time, and syncs it.
///
/// # Errors
///
/// As [`replace`].
pub fn replace_shared(path: &Path, content: &[u8]) -> io::Result<()> {
    put(&own_temporary(path), path, content, Durability::Synced, rename)
}

/// Creates a file and syncs it. A file that is already there, or that somebody creates meanwhile, is kept.
///
/// # Errors
///
/// An I/O error; there is then no file, unless the directory could not be synced.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    // A link, and not a rename: it does not replace what is there.
    put(&own_temporary(path), path, content, Durability::Synced, |temporary, path| {
        let linked = match fs::hard_link(temporary, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            result => result,
        };
        fs::remove_file(temporary)?;
        linked
    })
}

/// Removes a file; it is no error if it is absent.
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

/// SHA-256, the checksum in the head of state files.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    out
}

/// A name beside `path` that no other process uses.
fn own_temporary(path: &Path) -> PathBuf {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    PathBuf::from(temporary)
}

fn rename(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::rename(temporary, path).inspect_err(|_| drop(fs::remove_file(temporary)))
}

/// Writes `temporary`, has it put into the place of `path`, and syncs both it and the directory if asked to.
fn put(
    temporary: &Path,
    path: &Path,
    content: &[u8],
    durability: Durability,
    put: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    // Left behind by a daemon that was killed here. A file made anew has mode 0600, whoever made the old one.
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
    // The new name is on the disk only with its directory.
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

    /// A directory that goes with the test.
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
        // What a killed daemon left, readable by all.
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
    fn a_failed_replace_keeps_the_old_content_and_leaves_nothing_beside() {
        let dir = Dir::new("failed");
        let path = dir.0.join("state");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("content"), "old").unwrap();
        assert!(replace(&path, b"new", Durability::Synced).is_err());
        assert_eq!(fs::read_to_string(path.join("content")).unwrap(), "old");
        assert_eq!(dir.names(), ["state"]);
    }

    #[test]
    fn create_keeps_what_is_there() {
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
