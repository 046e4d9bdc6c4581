//! The cluster key on disk: the key file that the configuration names, and during a rotation, until the key file has
//! the new key, a copy of all keys in the state directory.
//!
//! The copy is valid as long as the key file contains one of its keys, or the key that it contained when the copy was
//! written. Otherwise an administrator has put another key into the key file, which then takes precedence.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use ovl_files::{Damaged, remove_if_present, replace_shared, sha256};
use ovl_proto::id::ClusterKeyId;
use ovl_proto::secret::Secret;
use ovl_proto::wire;

use super::{ClusterKey, Keyring, read_secret};

const MAGIC: &[u8] = b"ovl keys 2\n";

/// The files with the cluster key.
#[derive(Debug)]
pub struct KeyFile {
    /// The key file, which the configuration names.
    path: PathBuf,
    /// The copy in the state directory.
    copy: PathBuf,
    /// The key in the key file when it was last known to be current.
    held: ClusterKeyId,
    /// Whether there may be a copy. Asked once a second, so the disk is not.
    copied: bool,
}

struct KeyringCopy {
    held: ClusterKeyId,
    /// The keys, with the one that seals first.
    keys: Vec<Secret<[u8; 32]>>,
}

ovl_proto::fields! { KeyringCopy { 1 held, 2 keys } }

impl KeyFile {
    /// Reads the keys at the start of the daemon.
    ///
    /// # Errors
    ///
    /// The key file is absent or invalid, or the copy is [`Damaged`].
    pub fn load(path: PathBuf, copy: PathBuf) -> Result<(Self, Keyring)> {
        let key = ClusterKey::read(&path)?;
        let mut file = Self { held: key.id(), path, copy, copied: true };
        let Some(saved) = file.read_copy()? else {
            file.copied = false;
            return Ok((file, Keyring::new(key, Vec::new())));
        };
        let mut keys = saved.keys.into_iter().map(|bytes| ClusterKey::new(bytes.0));
        let kept_keys = keys.next().map(|first| Keyring::new(first, keys.collect()));
        match kept_keys {
            Some(ring) if saved.held == key.id() || ring.get(key.id()).is_some() => Ok((file, ring)),
            _ => {
                tracing::warn!(
                    "{} contains a key that is not of the last rotation: it is used, and the keys of the rotation are dropped",
                    file.path.display()
                );
                file.remove_copy()?;
                Ok((file, Keyring::new(key, Vec::new())))
            }
        }
    }

    /// Writes the keys to the copy, so that a restart uses them.
    ///
    /// # Errors
    ///
    /// The copy cannot be written.
    pub fn save(&mut self, ring: &Keyring) -> Result<()> {
        self.copied = true;
        let copy = KeyringCopy { held: self.held, keys: ring.all().map(ClusterKey::secret).collect() };
        let body = wire::encode_stored(&copy)?;
        replace_shared(&self.copy, &[MAGIC, &sha256(&body), &body].concat())
            .with_context(|| format!("cannot write {}", self.copy.display()))
    }

    /// Writes the key that seals to the key file, and deletes the copy.
    ///
    /// # Errors
    ///
    /// The key file cannot be replaced: it has an unknown key, another owner, or is read-only.
    pub fn settle(&mut self, ring: &Keyring) -> Result<()> {
        let key = ring.sealing();
        let path = self.path.display();
        if ClusterKey::read(&self.path)? != *key {
            // The target of a symbolic link is replaced, not the link.
            let target = fs::canonicalize(&self.path).with_context(|| format!("cannot resolve {path}"))?;
            let metadata = fs::metadata(&target).with_context(|| format!("cannot inspect {path}"))?;
            let held = ClusterKey::read(&self.path)?.id();
            if held != self.held && ring.get(held).is_none() {
                bail!("{path} contains a key that is not the cluster's");
            }
            if metadata.uid() != nix::unistd::geteuid().as_raw() {
                bail!("{path} is owned by user {}, not by the user of ovld", metadata.uid());
            }
            if metadata.permissions().mode() & 0o200 == 0 {
                bail!("{path} is read-only (mode {:04o})", metadata.permissions().mode() & 0o7777);
            }
            replace_shared(&target, key.to_text().0.as_bytes())
                .with_context(|| format!("cannot write {path}"))?;
        }
        self.held = key.id();
        self.remove_copy()
    }

    /// Whether there is a copy, so that [`Self::settle`] must be called.
    pub fn has_copy(&self) -> bool {
        self.copied
    }

    fn remove_copy(&mut self) -> Result<()> {
        remove_if_present(&self.copy).with_context(|| format!("cannot delete {}", self.copy.display()))?;
        self.copied = false;
        Ok(())
    }

    fn read_copy(&self) -> Result<Option<KeyringCopy>> {
        let Some(content) = read_secret(&self.copy)? else { return Ok(None) };
        let decode = || -> Option<KeyringCopy> {
            let (sum, body) = content.strip_prefix(MAGIC)?.split_at_checked(32)?;
            if sha256(body) != sum {
                return None;
            }
            wire::decode_stored(body).ok()
        };
        match decode() {
            Some(copy) => Ok(Some(copy)),
            None => Err(Damaged(format!(
                "{} is damaged: it contains the cluster keys during a rotation. Put the key that is in use on another \
                 host (`ovlctl key status`) into {}, and delete the damaged file",
                self.copy.display(),
                self.path.display()
            ))
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with a key file that contains key 1.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("ovl-keyfile-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            let dir = Self(dir);
            dir.put(1);
            dir
        }

        fn file(&self) -> PathBuf {
            self.0.join("cluster.key")
        }

        fn put(&self, n: u8) {
            replace_shared(&self.file(), key(n).to_text().0.as_bytes()).unwrap();
        }

        /// The keys with which a daemon would start.
        fn load(&self) -> (KeyFile, Keyring) {
            KeyFile::load(self.file(), self.0.join("cluster-keys")).unwrap()
        }

        fn ring(&self) -> Vec<ClusterKeyId> {
            self.load().1.all().map(ClusterKey::id).collect()
        }

        fn in_file(&self) -> ClusterKeyId {
            ClusterKey::read(&self.file()).unwrap().id()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn key(n: u8) -> ClusterKey {
        ClusterKey::new([n; 32])
    }

    fn id(n: u8) -> ClusterKeyId {
        key(n).id()
    }

    #[test]
    fn start_in_any_phase_of_a_rotation_has_the_right_keys() {
        let dir = Dir::new("phases");
        let (mut file, ring) = dir.load();
        assert_eq!(dir.ring(), [id(1)]);
        let ring = ring.opening_too(key(2));
        file.save(&ring).unwrap();
        assert_eq!(dir.ring(), [id(1), id(2)]);
        let ring = ring.sealing_with(id(2)).unwrap();
        file.save(&ring).unwrap();
        assert_eq!(dir.ring(), [id(2), id(1)]);
        let ring = ring.alone();
        file.save(&ring).unwrap();
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(1)));
        file.settle(&ring).unwrap();
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(2)));
        assert!(!file.has_copy());
        assert_eq!(fs::metadata(dir.file()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn read_only_key_file_is_kept_and_a_new_key_in_it_takes_precedence() {
        let dir = Dir::new("readonly");
        let (mut file, ring) = dir.load();
        let ring = ring.opening_too(key(2)).sealing_with(id(2)).unwrap().alone();
        file.save(&ring).unwrap();
        fs::set_permissions(dir.file(), fs::Permissions::from_mode(0o400)).unwrap();
        assert!(file.settle(&ring).unwrap_err().to_string().contains("read-only"));
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(1)));
        // By hand, as the error says.
        dir.put(2);
        fs::set_permissions(dir.file(), fs::Permissions::from_mode(0o400)).unwrap();
        file.settle(&ring).unwrap();
        assert!(!file.has_copy());
        // A key that neither file ever contained takes precedence.
        file.save(&ring).unwrap();
        dir.put(3);
        assert!(file.settle(&ring).unwrap_err().to_string().contains("not the cluster's"));
        assert_eq!(dir.ring(), [id(3)]);
        assert!(!dir.0.join("cluster-keys").exists());
    }

    #[test]
    fn symbolic_link_is_kept_and_error_names_the_damaged_copy() {
        let dir = Dir::new("link");
        let real = dir.0.join("real");
        fs::rename(dir.file(), &real).unwrap();
        std::os::unix::fs::symlink(&real, dir.file()).unwrap();
        let (mut file, ring) = dir.load();
        let ring = ring.opening_too(key(2)).sealing_with(id(2)).unwrap().alone();
        file.save(&ring).unwrap();
        file.settle(&ring).unwrap();
        assert!(fs::symlink_metadata(dir.file()).unwrap().is_symlink());
        assert_eq!(ClusterKey::read(&real).unwrap().id(), id(2));
        replace_shared(&dir.0.join("cluster-keys"), b"garbage").unwrap();
        let error = KeyFile::load(dir.file(), dir.0.join("cluster-keys")).unwrap_err().to_string();
        assert!(error.contains("cluster-keys is damaged"), "{error}");
    }
}
