//! Manifests from files, directories and standard input.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use ovl_control::Document;
use ovl_manifest::object::{Item, items};
use ovl_manifest::yaml::{self as manifest, MAX_FILE};

use crate::error::{Error, Result};

/// Maximum depth of nested directories.
const MAX_DEPTH: usize = 16;

/// Reads the objects of all paths in their order, the files of a directory sorted by name.
pub(super) fn read(paths: &[PathBuf], recursive: bool) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            documents.extend(parse("standard input", &read_bounded(io::stdin().lock(), "standard input")?)?);
            continue;
        }
        let mut files = Vec::new();
        if path.is_dir() {
            walk(path, if recursive { MAX_DEPTH } else { 0 }, &mut files)?;
        } else {
            files.push(path.clone());
        }
        for file in files {
            let name = file.display().to_string();
            let opened = fs::File::open(&file).map_err(|error| read_error(&name, &error))?;
            documents.extend(parse(&name, &read_bounded(opened, &name)?)?);
        }
    }
    Ok(documents)
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let name = folder.display().to_string();
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let mut paths: Vec<PathBuf> =
        entries.map_err(|error| read_error(&name, &error))?.into_iter().map(|entry| entry.path()).collect();
    paths.sort_unstable();
    for path in paths {
        let is_manifest = path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|extension| matches!(extension, "yaml" | "yml" | "json"));
        if path.is_dir() && depth > 0 {
            walk(&path, depth - 1, files)?;
        } else if path.is_file() && is_manifest {
            files.push(path);
        }
    }
    Ok(())
}

fn read_bounded(from: impl io::Read, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    let most = MAX_FILE as u64;
    let length = from.take(most + 1).read_to_end(&mut bytes).map_err(|error| read_error(name, &error))?;
    if length as u64 > most {
        return Err(Error::Failed(format!("{name} is larger than {} MiB", MAX_FILE >> 20)));
    }
    manifest::decode(bytes).map_err(|error| unreadable(name, &error))
}

fn read_error(name: &str, error: &io::Error) -> Error {
    Error::Failed(format!("cannot read {name}: {error}"))
}

fn unreadable(name: &str, error: &manifest::Unreadable) -> Error {
    Error::Failed(format!("nothing was changed: {name}: {error}"))
}

fn parse(name: &str, text: &str) -> Result<Vec<Document>> {
    let documents = manifest::read(text).map_err(|error| unreadable(name, &error))?;
    let mut all = Vec::new();
    for manifest::FileDocument { line, items: lines, value } in documents {
        for Item { path: within, index, value } in items(value) {
            let line = index.and_then(|index| lines.get(index)).copied().unwrap_or(line);
            all.push(Document { file: name.to_owned(), line, within, value });
        }
    }
    Ok(all)
}
