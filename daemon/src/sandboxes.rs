//! Sandboxes of this host: network namespaces that outlive the programs in them and this daemon.
//!
//! [`Sandboxes`] owns which exist, which a request is making or removing, and their files in the run directory. Begin
//! to read at [`Sandboxes::take`].

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use ovl_files::{Durability, remove_if_present, replace};
use ovl_kernel::{NetnsCookie, Process};
use ovl_proto::id::{EndpointId, NetworkId};
use serde::{Deserialize, Serialize};

use crate::failed::Failed;

/// Maximum number of processes that an error lists.
const NAMED: usize = 10;
/// Maximum number of networks of a sandbox. More interfaces are of no use.
const MAX_NETWORKS: usize = 32;

/// What a sandbox is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Joined {
    /// The host's own namespace under another name.
    Host,
    /// These networks, in the order of its interfaces. If there are none, it has only a loopback interface.
    Networks(Vec<NetworkId>),
}

/// A sandbox of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sandbox {
    /// Its name, and that of the file at which the namespace is mounted.
    pub name: String,
    /// What it is connected to.
    pub joined: Joined,
    /// Identifies the namespace, independent of what is mounted at its path.
    pub cookie: NetnsCookie,
    /// Its endpoints, in the order of its interfaces.
    pub endpoints: Vec<EndpointId>,
}

/// A sandbox in the run directory. It is valid during one boot of the kernel.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    sandbox: Sandbox,
}

/// The sandboxes of this host.
#[derive(Debug)]
pub(crate) struct Sandboxes {
    /// The directory with a file for each sandbox.
    dir: PathBuf,
    all: RefCell<BTreeMap<String, Sandbox>>,
    /// Names of sandboxes that are being created or deleted.
    busy: RefCell<BTreeSet<String>>,
}

/// A lock on the name of a sandbox, released when dropped.
pub(crate) struct Busy<'a> {
    sandboxes: &'a Sandboxes,
    name: String,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.sandboxes.busy.borrow_mut().remove(&self.name);
    }
}

impl Sandboxes {
    /// Knows no sandbox yet. `dir` has their files.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, all: RefCell::default(), busy: RefCell::default() }
    }

    /// Locks a name, whether there is such a sandbox or not.
    ///
    /// # Errors
    ///
    /// Another request has the name.
    pub(crate) fn take(&self, name: &str) -> Result<Busy<'_>, Failed> {
        if !self.busy.borrow_mut().insert(name.to_owned()) {
            return Err(Failed::conflict(format!(
                "sandbox {name} is being made or removed at this moment: try again"
            )));
        }
        Ok(Busy { sandboxes: self, name: name.to_owned() })
    }

    /// Returns the sandbox with a name. `None` if there is none.
    pub(crate) fn get(&self, name: &str) -> Option<Sandbox> {
        self.all.borrow().get(name).cloned()
    }

    /// Returns all sandboxes by name.
    pub(crate) fn all(&self) -> Vec<Sandbox> {
        self.all.borrow().values().cloned().collect()
    }

    /// Adds a sandbox that is complete.
    pub(crate) fn add(&self, sandbox: Sandbox) {
        self.all.borrow_mut().insert(sandbox.name.clone(), sandbox);
    }

    /// Writes the file of a sandbox. It is valid during the boot of the kernel with this id.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn keep(&self, boot_id: &str, sandbox: &Sandbox) -> anyhow::Result<()> {
        let kept = Kept { boot_id: boot_id.to_owned(), sandbox: sandbox.clone() };
        let path = self.file(&sandbox.name);
        replace(&path, &serde_json::to_vec(&kept)?, Durability::Unsynced)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Forgets a sandbox and removes its file. Returns whether it was complete.
    ///
    /// # Errors
    ///
    /// The file cannot be removed.
    pub(crate) fn forget(&self, name: &str) -> anyhow::Result<bool> {
        remove(&self.file(name))?;
        Ok(self.all.borrow_mut().remove(name).is_some())
    }

    /// Reads the sandboxes that the last run of this boot saved. Deletes files of an earlier boot. A damaged file is
    /// moved away. Returns a sentence for each of these, with its path.
    ///
    /// # Errors
    ///
    /// The directory cannot be read, or a file cannot be moved or removed.
    pub(crate) fn read(&self, boot_id: &str) -> anyhow::Result<Vec<(String, String)>> {
        let mut damaged = Vec::new();
        for file in fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok()) {
                Some(kept) if kept.boot_id == boot_id => self.add(kept.sandbox),
                Some(_) => remove(&path)?,
                None => {
                    let aside = path.with_extension("damaged");
                    fs::rename(&path, &aside).with_context(|| format!("setting {} aside", path.display()))?;
                    let sentence = format!(
                        "the file of a sandbox is damaged and was set aside as {}: ovld no longer knows the sandbox; \
                         its endpoints are in `ovlctl endpoints`, its namespace in `ip netns`",
                        aside.display()
                    );
                    damaged.push((path.display().to_string(), sentence));
                }
            }
        }
        Ok(damaged)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

/// Deletes a file if it exists.
fn remove(path: &Path) -> anyhow::Result<()> {
    remove_if_present(path).with_context(|| format!("removing {}", path.display()))
}

/// The word for the host's own namespace in place of networks.
pub(crate) const HOST: &str = "host";
/// The word for no network.
pub(crate) const NONE: &str = "none";

/// Meaning of the networks of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'a> {
    /// The host's own namespace.
    Host,
    /// These networks, by name or id.
    Networks(&'a [String]),
}

/// Parses the networks of a request. An empty list means the same as `none`, since a network must be named
/// explicitly.
pub(crate) fn wanted(networks: &[String]) -> Result<Wanted<'_>, String> {
    match networks {
        [] => Ok(Wanted::Networks(&[])),
        [one] if one == NONE => Ok(Wanted::Networks(&[])),
        [one] if one == HOST => Ok(Wanted::Host),
        several if several.len() > MAX_NETWORKS => {
            Err(format!("a sandbox joins at most {MAX_NETWORKS} networks, and {} are given", several.len()))
        }
        several => match several.iter().find(|name| *name == NONE || *name == HOST) {
            Some(word) => Err(format!(
                "'{word}' goes with no other network; one that is really called {word} is given by its id"
            )),
            None => Ok(Wanted::Networks(several)),
        },
    }
}

/// Formats the error that a sandbox with processes is not deleted.
pub(crate) fn refusal(name: &str, inside: &BTreeSet<Process>) -> String {
    let count = inside.len();
    let mut list: Vec<String> = inside
        .iter()
        .take(NAMED)
        .map(|process| format!("{} ({})", process.pid, process.command.escape_default()))
        .collect();
    if count > NAMED {
        list.push(format!("{} more", count - NAMED));
    }
    let (are, them) = if count == 1 { ("a process is", "it") } else { ("processes are", "them") };
    format!(
        "{are} in sandbox {name}: {}; end {them}, or remove it with --force, which leaves {them} without networks",
        list.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn networks_or_one_of_two_words() {
        assert_eq!(wanted(&[]), Ok(Wanted::Networks(&[])));
        assert_eq!(wanted(&names(&["none"])), Ok(Wanted::Networks(&[])));
        assert_eq!(wanted(&names(&["host"])), Ok(Wanted::Host));
        let two = names(&["blue", "red"]);
        assert_eq!(wanted(&two), Ok(Wanted::Networks(&two)));
        for wrong in [["blue", "host"], ["none", "blue"], ["host", "none"], ["host", "host"]] {
            assert!(wanted(&names(&wrong)).is_err(), "{wrong:?}");
        }
        assert!(wanted(&vec!["blue".to_owned(); MAX_NETWORKS + 1]).is_err());
    }

    #[test]
    fn a_refusal_names_some_of_the_processes() {
        let process = |pid| Process { pid, command: "ngin\nx".to_owned() };
        assert_eq!(
            refusal("web", &BTreeSet::from([process(7)])),
            "a process is in sandbox web: 7 (ngin\\nx); end it, or remove it with --force, which leaves it without \
             networks"
        );
        let many = refusal("web", &(1..=12).map(process).collect());
        assert!(many.contains("10 (ngin\\nx), 2 more; end them") && !many.contains("11 ("), "{many}");
    }

    /// A directory that is deleted when dropped.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ovl-sandboxes-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn sandbox(name: &str) -> Sandbox {
        let cookie = serde_json::from_str("7").unwrap();
        Sandbox { name: name.to_owned(), joined: Joined::Host, cookie, endpoints: Vec::new() }
    }

    #[test]
    fn one_request_at_a_time_has_a_name() {
        let sandboxes = Sandboxes::new(PathBuf::new());
        let busy = sandboxes.take("web").unwrap();
        assert!(sandboxes.take("db").is_ok());
        assert!(sandboxes.take("web").err().unwrap().0.message.contains("at this moment"));
        drop(busy);
        assert!(sandboxes.take("web").is_ok());
    }

    #[test]
    fn sandboxes_of_this_boot_are_read_again() {
        let dir = Dir::new("read");
        let sandboxes = Sandboxes::new(dir.0.clone());
        sandboxes.keep("now", &sandbox("web")).unwrap();
        sandboxes.keep("before", &sandbox("old")).unwrap();
        fs::write(dir.0.join("bad.json"), "{").unwrap();
        assert!(sandboxes.get("web").is_none(), "it is not complete");
        let damaged = sandboxes.read("now").unwrap();
        assert!(damaged.len() == 1 && damaged[0].0.ends_with("bad.json"), "{damaged:?}");
        assert_eq!(sandboxes.all(), [sandbox("web")]);
        assert!(!dir.0.join("old.json").exists() && dir.0.join("bad.damaged").exists());
        assert!(sandboxes.forget("web").unwrap() && !sandboxes.forget("web").unwrap());
        assert!(!dir.0.join("web.json").exists());
    }
}
