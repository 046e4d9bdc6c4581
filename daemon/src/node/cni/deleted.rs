//! Stored `DEL` calls, which came while ovld was not running. The plugin wrote a file for each.
//!
//! ovld carries them out after it has begun to listen and before it answers any request. It does so again before each
//! `ADD` of the same attachment, and periodically, for plugins whose request was interrupted.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use ovl_control::{CniDeleted, CniError};
use ovl_runtimes::cni::{self, Attachment, Call, code, error};

use super::super::{Node, remove_if_there};

/// Time between two checks for stored calls.
const AGAIN: Duration = Duration::from_secs(2);

impl Node {
    /// Carries out stored calls periodically. Runs forever.
    pub(in crate::node) async fn deleted_loop(self: Rc<Self>) {
        loop {
            tokio::time::sleep(AGAIN).await;
            self.carry_out_all_deleted().await;
            self.carry_out_docker().await;
        }
    }

    /// Carries out all stored `DEL` calls. One that fails is kept for the next check.
    pub(in crate::node) async fn carry_out_all_deleted(&self) {
        let dir = CniDeleted::dir(&self.run_dir.socket());
        let files = match fs::read_dir(&dir) {
            Ok(files) => files,
            Err(error) if error.kind() == ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!(%error, dir = %dir.display(), "cannot look for DELs that were remembered");
                return;
            }
        };
        for file in files.flatten() {
            // A hidden file is still being written.
            if file.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let path = file.path();
            let Some(attachment) = self.read_deleted(&path) else {
                if let Err(error) = remove_if_there(&path) {
                    tracing::warn!("{error:#}");
                }
                continue;
            };
            let _alone = self.containers.alone(&attachment.container_id).await;
            // A DEL or an ADD may have carried it out in the meantime.
            if !path.exists() {
                continue;
            }
            match self.cni_take_away(&attachment).await.and_then(|()| self.forget_deleted(&attachment)) {
                Ok(()) => tracing::info!(
                    container = attachment.container_id,
                    ifname = attachment.ifname,
                    network = attachment.network,
                    "carried out a DEL that was remembered"
                ),
                Err(error) => {
                    tracing::warn!("a DEL that was remembered fails: {}: {}", error.msg, error.details)
                }
            }
        }
    }

    /// Carries out the stored `DEL` of one attachment, if there is one. The caller must hold the lock of the
    /// container.
    pub(super) async fn carry_out_deleted(&self, attachment: &Attachment) -> Result<(), CniError> {
        if self.deleted_path(attachment).is_some_and(|path| path.exists()) {
            self.cni_take_away(attachment).await?;
            self.forget_deleted(attachment)?;
        }
        Ok(())
    }

    /// Deletes the file of a `DEL` that was carried out.
    pub(super) fn forget_deleted(&self, attachment: &Attachment) -> Result<(), CniError> {
        let removed = self.deleted_path(attachment).map_or(Ok(()), |path| remove_if_there(&path));
        removed.map_err(|cause| {
            error(code::INTERNAL, "a DEL that is done cannot be forgotten", format!("{cause:#}"))
        })
    }

    /// Returns the path of the file for a stored `DEL`. `None` if the attachment has no valid file name.
    fn deleted_path(&self, attachment: &Attachment) -> Option<PathBuf> {
        let name = CniDeleted::file_name(&attachment.network, &attachment.container_id, &attachment.ifname)?;
        Some(CniDeleted::dir(&self.run_dir.socket()).join(name))
    }

    /// Reads the attachment from a file. `None` if the file is of an earlier boot or invalid.
    fn read_deleted(&self, path: &Path) -> Option<Attachment> {
        match CniDeleted::read(path) {
            Ok(deleted) if deleted.boot_id != self.boot_id => None,
            Ok(deleted) => match cni::parse(&deleted.call) {
                Ok(Call::Del(attachment)) if self.deleted_path(&attachment).as_deref() == Some(path) => {
                    Some(attachment)
                }
                _ => {
                    tracing::warn!(file = %path.display(), "passed over a file that is no DEL of that attachment");
                    None
                }
            },
            Err(error) => {
                tracing::warn!(file = %path.display(), "passed over a DEL that cannot be read: {error}");
                None
            }
        }
    }
}
