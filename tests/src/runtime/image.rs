//! The two test images, built from a static busybox into one Docker archive that Podman, containerd and Docker load.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use super::{PORT, require_program};

/// Name of the image whose containers serve HTTP on [`super::PORT`].
pub(super) const IMAGE: &str = "localhost/ovl-test:latest";

/// Name of the image of a pod's infrastructure container, which sleeps until it is killed.
pub(super) const PAUSE_IMAGE: &str = "localhost/ovl-pause:latest";

/// Script that runs an HTTP server on a port. Its only page returns the client's address.
const SERVE_SCRIPT: &str = "#!/bin/sh\nexec busybox httpd -f -p \"[::]:$1\" -h /www\n";
const PAGE_SCRIPT: &str = "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n%s' \"$REMOTE_ADDR\"\n";

/// Builds the archive in a directory. Its intermediate files stay there.
pub(super) fn make(dir: &Path) -> Result<PathBuf> {
    let busybox = require_program("busybox", "busybox-static")?;
    let (root, parts) = (dir.join("image-root"), dir.join("image-parts"));
    for each in ["bin", "etc", "proc", "sys", "dev", "run", "tmp", "www/cgi-bin"] {
        fs::create_dir_all(root.join(each))?;
    }
    fs::create_dir_all(&parts)?;
    let copy = root.join("bin/busybox");
    fs::copy(&busybox, &copy).context("cannot copy busybox")?;
    let elf = fs::read(&copy)?;
    ensure!(is_static(&elf), "{} needs shared libraries: apt-get install busybox-static", busybox.display());
    symlink("busybox", root.join("bin/sh"))?;
    for (name, script) in [("bin/serve", SERVE_SCRIPT), ("www/cgi-bin/peer", PAGE_SCRIPT)] {
        let path = root.join(name);
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    tar(&root, &parts.join("layer.tar"), &[".".to_owned()])?;

    let layer = sha256(&fs::read(parts.join("layer.tar"))?);
    let (serve, pause) = (["serve", &PORT.to_string()], ["busybox", "sleep", "2147483647"]);
    let mut manifest = Vec::new();
    let mut names = vec!["manifest.json".to_owned(), "layer.tar".to_owned()];
    for (name, command) in [(IMAGE, &serve[..]), (PAUSE_IMAGE, &pause)] {
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Cmd": command, "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
        })
        .to_string();
        let config_name = format!("{}.json", sha256(config.as_bytes()));
        fs::write(parts.join(&config_name), config)?;
        manifest.push(json!({ "Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"] }));
        names.push(config_name);
    }
    fs::write(parts.join("manifest.json"), Value::from(manifest).to_string())?;
    let archive = dir.join("image.tar");
    tar(&parts, &archive, &names)?;
    Ok(archive)
}

/// Whether a 64-bit ELF program is linked statically: it has no `PT_INTERP` segment.
fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at + length)?;
        Some(bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    };
    let kind = |index: u64| {
        let (start, size) = (number(32, 8)?, number(54, 2)?);
        number(usize::try_from(start + index * size).ok()?, 4)
    };
    number(56, 2).is_some_and(|count| (0..count).all(|index| kind(index).is_some_and(|it| it != PT_INTERP)))
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tar(dir: &Path, archive: &Path, names: &[String]) -> Result<()> {
    let status = Command::new("tar").arg("-C").arg(dir).arg("-cf").arg(archive).args(names).status();
    ensure!(status.context("cannot run tar")?.success(), "cannot create {}", archive.display());
    Ok(())
}
