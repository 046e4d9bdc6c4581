//! The cluster key on the disk: the file that the configuration names, and beside it, while the key is
//! being rotated and until that file has the new one, a copy of all keys in the state directory.
//!
//! The copy counts as long as the file holds one of its keys, or the one that it held when the copy was
//! written. Otherwise somebody has put another key into the file, and means it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use ovl_files::{Damaged, remove_if_present, replace_shared, sha256};
use ovl_proto::id::ClusterKeyId;
use ovl_proto::secret::Secret;
use ovl_proto::wire;
use serde::{Deserialize, Serialize};

use super::{ClusterKey, Keyring, read_secret};

const MAGIC: &[u8] = b"ovl keys 1\n";

/// Where the cluster key is kept.
#[derive(Debug)]
pub struct KeyFile {
    /// As the configuration names it.
    path: PathBuf,
    copy: PathBuf,
    /// What the file held when it was last seen to be in order.
    held: ClusterKeyId,
}

#[derive(Serialize, Deserialize)]
struct Copy {
    held: ClusterKeyId,
    /// The one that seals first.
    keys: Vec<Secret<[u8; 32]>>,
}

impl KeyFile {
    /// The keys to start with.
    pub fn load(path: PathBuf, copy: PathBuf) -> Result<(Self, Keyring)> {
        let key = ClusterKey::read(&path)?;
        let file = Self { held: key.id(), path, copy };
        let Some(kept) = file.read_copy()? else { return Ok((file, Keyring::new(key, Vec::new()))) };
        let mut keys = kept.keys.into_iter().map(|bytes| ClusterKey::new(bytes.0));
        let kept_keys = keys.next().map(|first| Keyring::new(first, keys.collect()));
        match kept_keys {
            Some(ring) if kept.held == key.id() || ring.get(key.id()).is_some() => Ok((file, ring)),
            _ => {
                tracing::warn!(
                    "{} holds another key than before: it counts, and the keys of the last rotation are dropped",
                    file.path.display()
                );
                file.remove_copy()?;
                Ok((file, Keyring::new(key, Vec::new())))
            }
        }
    }

    /// Puts the keys on the disk: a restart from now on comes up with them.
    pub fn keep(&self, ring: &Keyring) -> Result<()> {
        let copy = Copy { held: self.held, keys: ring.all().map(ClusterKey::secret).collect() };
        let body = wire::encode_stored(&copy)?;
        replace_shared(&self.copy, &[MAGIC, &sha256(&body), &body].concat())
            .with_context(|| format!("writing {}", self.copy.display()))
    }

    /// Gives the file the key that seals, and removes the copy. The error says what to do.
    pub fn settle(&mut self, ring: &Keyring) -> Result<()> {
        let key = ring.sealing();
        let path = self.path.display();
        if ClusterKey::read(&self.path)? != *key {
            // What is behind a link is replaced, and not the link.
            let target = fs::canonicalize(&self.path).with_context(|| format!("looking for {path}"))?;
            let metadata = fs::metadata(&target).with_context(|| format!("inspecting {path}"))?;
            let held = ClusterKey::read(&self.path)?.id();
            if held != self.held && ring.get(held).is_none() {
                bail!("{path} was given a key that is not the cluster's");
            }
            if metadata.uid() != nix::unistd::geteuid().as_raw() {
                bail!("{path} belongs to user {}, and is left alone", metadata.uid());
            }
            if metadata.permissions().mode() & 0o200 == 0 {
                bail!("{path} is read-only (mode {:04o})", metadata.permissions().mode() & 0o7777);
            }
            replace_shared(&target, key.to_text().0.as_bytes()).with_context(|| format!("writing {path}"))?;
        }
        self.held = key.id();
        self.remove_copy()
    }

    /// Whether there is a copy, and so something to settle.
    pub fn has_copy(&self) -> bool {
        self.copy.exists()
    }

    fn remove_copy(&self) -> Result<()> {
        remove_if_present(&self.copy).with_context(|| format!("removing {}", self.copy.display()))
    }

    fn read_copy(&self) -> Result<Option<Copy>> {
        let Some(content) = read_secret(&self.copy)? else { return Ok(None) };
        let decode = || -> Option<Copy> {
            let (sum, body) = content.strip_prefix(MAGIC)?.split_at_checked(32)?;
            if sha256(body) != sum {
                return None;
            }
            wire::decode_stored(body).ok()
        };
        match decode() {
            Some(copy) => Ok(Some(copy)),
            None => Err(Damaged(format!(
                "{} is damaged, which holds the cluster's keys while they are being rotated. See `ovlctl key status` \
                 on another host: put the key that is in use there into {}, and remove the damaged file",
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

    /// A directory with a key file that holds key 1.
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

        /// What a daemon that is started now comes up with.
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
    fn a_start_in_any_phase_comes_up_with_the_right_keys() {
        let dir = Dir::new("phases");
        let (mut file, ring) = dir.load();
        assert_eq!(dir.ring(), [id(1)]);
        let ring = ring.opening_too(key(2));
        file.keep(&ring).unwrap();
        assert_eq!(dir.ring(), [id(1), id(2)]);
        let ring = ring.sealing_with(id(2)).unwrap();
        file.keep(&ring).unwrap();
        assert_eq!(dir.ring(), [id(2), id(1)]);
        let ring = ring.alone();
        file.keep(&ring).unwrap();
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(1)));
        file.settle(&ring).unwrap();
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(2)));
        assert!(!file.has_copy());
        assert_eq!(fs::metadata(dir.file()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn a_file_that_cannot_be_replaced_waits_and_one_that_somebody_wrote_counts() {
        let dir = Dir::new("readonly");
        let (mut file, ring) = dir.load();
        let ring = ring.opening_too(key(2)).sealing_with(id(2)).unwrap().alone();
        file.keep(&ring).unwrap();
        fs::set_permissions(dir.file(), fs::Permissions::from_mode(0o400)).unwrap();
        assert!(file.settle(&ring).unwrap_err().to_string().contains("read-only"));
        assert_eq!((dir.ring(), dir.in_file()), (vec![id(2)], id(1)));
        // By hand, as the problem says.
        dir.put(2);
        fs::set_permissions(dir.file(), fs::Permissions::from_mode(0o400)).unwrap();
        file.settle(&ring).unwrap();
        assert!(!file.has_copy());
        // A key that neither of them ever had is what somebody wants.
        file.keep(&ring).unwrap();
        dir.put(3);
        assert!(file.settle(&ring).unwrap_err().to_string().contains("not the cluster's"));
        assert_eq!(dir.ring(), [id(3)]);
        assert!(!file.has_copy());
    }

    #[test]
    fn a_link_stays_a_link_and_damage_is_named() {
        let dir = Dir::new("link");
        let real = dir.0.join("real");
        fs::rename(dir.file(), &real).unwrap();
        std::os::unix::fs::symlink(&real, dir.file()).unwrap();
        let (mut file, ring) = dir.load();
        let ring = ring.opening_too(key(2)).sealing_with(id(2)).unwrap().alone();
        file.keep(&ring).unwrap();
        file.settle(&ring).unwrap();
        assert!(fs::symlink_metadata(dir.file()).unwrap().is_symlink());
        assert_eq!(ClusterKey::read(&real).unwrap().id(), id(2));
        replace_shared(&dir.0.join("cluster-keys"), b"garbage").unwrap();
        let error = KeyFile::load(dir.file(), dir.0.join("cluster-keys")).unwrap_err().to_string();
        assert!(error.contains("cluster-keys is damaged"), "{error}");
    }
}
