//! Endpoints of this host: what is known of them besides their entries in the owner table, their files in the run
//! directory, and the names, devices and MAC addresses that attaches in flight have reserved.
//!
//! [`LocalEndpoints`] owns that. What an endpoint has in the kernel is decided by [`ovl_subsystems::endpoints`]. Begin
//! to read at [`LocalEndpoints::reserve_name`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use ovl_dataplane::device::Device;
use ovl_files::{Durability, remove_if_present, replace};
use ovl_proto::id::{EndpointId, Mac, NetworkId};
use ovl_proto::table::{Endpoint, canonical_name};
use ovl_runtimes::cni::Attachment;
use ovl_runtimes::docker::EngineEndpoint;
use serde::{Deserialize, Serialize};

/// The full name of an endpoint: network, Kubernetes namespace and name.
pub(crate) type FullName = (NetworkId, String, String);

/// State of an endpoint of this host besides its entry in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalEndpoint {
    /// Name of the interface inside the namespace.
    pub ifname: String,
    /// Attachment of a container runtime. `None` if none requested the endpoint.
    pub cni: Option<Attachment>,
    /// The interface of the attachment with which this one was made and goes: the runtime does not know of this one. `None`
    /// if the runtime does.
    pub beside: Option<String>,
    /// Endpoint of a Docker Engine. `None` if no Engine requested it. The Engine moves the container
    /// interface into a namespace and back.
    pub docker: Option<EngineEndpoint>,
    /// Path at which the namespace was found.
    pub netns: PathBuf,
    /// Inode of the namespace. Endpoints in the same namespace have the same inode.
    pub inode: u64,
}

/// The file of an endpoint in the run directory, from which a restarted daemon restores it. It is valid until the
/// host reboots.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    endpoint: Endpoint,
    ifname: String,
    #[serde(default)]
    cni: Option<Attachment>,
    #[serde(default)]
    beside: Option<String>,
    #[serde(default)]
    docker: Option<EngineEndpoint>,
    netns: PathBuf,
    #[serde(default)]
    inode: u64,
}

/// What the files of the last run say.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    /// The endpoints of this boot.
    pub endpoints: Vec<(Endpoint, LocalEndpoint)>,
    /// A sentence for each damaged file, with its path.
    pub damaged: Vec<(String, String)>,
}

/// The endpoints of this host.
#[derive(Debug)]
pub(crate) struct LocalEndpoints {
    /// The directory with a file for each endpoint.
    dir: PathBuf,
    all: BTreeMap<EndpointId, LocalEndpoint>,
    /// Names that are reserved, in their canonical form.
    names: BTreeSet<FullName>,
    /// MAC addresses that are chosen and not yet in the table.
    macs: BTreeSet<(NetworkId, Mac)>,
    /// Devices that are being created. No full pass may delete them.
    devices: BTreeSet<Device>,
    /// Devices whose peer interfaces changed and are about to be looked at.
    looked_at: BTreeSet<Device>,
}

impl LocalEndpoints {
    /// Knows no endpoint yet. `dir` has their files.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            all: BTreeMap::new(),
            names: BTreeSet::new(),
            macs: BTreeSet::new(),
            devices: BTreeSet::new(),
            looked_at: BTreeSet::new(),
        }
    }

    /// Notes that the peer interface of a device is about to be looked at. Returns false if it is noted already.
    pub(crate) fn begin_look(&mut self, device: Device) -> bool {
        self.looked_at.insert(device)
    }

    /// Ends what [`Self::begin_look`] began.
    pub(crate) fn end_look(&mut self, device: Device) {
        self.looked_at.remove(&device);
    }

    /// Returns the state of an endpoint. `None` if this host has none with this id.
    pub(crate) fn get(&self, id: EndpointId) -> Option<&LocalEndpoint> {
        self.all.get(&id)
    }

    /// Returns all endpoints.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (EndpointId, &LocalEndpoint)> {
        self.all.iter().map(|(id, local)| (*id, local))
    }

    /// Returns the first endpoint that fits. `None` if none does.
    pub(crate) fn find(&self, fits: impl Fn(&LocalEndpoint) -> bool) -> Option<EndpointId> {
        self.iter().find(|(_, local)| fits(local)).map(|(id, _)| id)
    }

    /// Adds an endpoint.
    pub(crate) fn add(&mut self, id: EndpointId, local: LocalEndpoint) {
        self.all.insert(id, local);
    }

    /// Forgets an endpoint. Its file stays: see [`Self::forget_file`].
    pub(crate) fn remove(&mut self, id: EndpointId) {
        self.all.remove(&id);
    }

    /// Reserves a name. Returns whether it was free of reservations.
    pub(crate) fn reserve_name(&mut self, name: &FullName) -> bool {
        self.names.insert(canonical(name))
    }

    /// Whether a name is reserved.
    pub(crate) fn is_name_reserved(&self, name: &FullName) -> bool {
        self.names.contains(&canonical(name))
    }

    /// Ends the reservation of a name.
    pub(crate) fn release_name(&mut self, name: &FullName) {
        self.names.remove(&canonical(name));
    }

    /// Reserves a device. Returns whether it was free of reservations.
    pub(crate) fn reserve_device(&mut self, device: Device) -> bool {
        self.devices.insert(device)
    }

    /// Returns the devices that are being created.
    pub(crate) fn reserved_devices(&self) -> &BTreeSet<Device> {
        &self.devices
    }

    /// Ends the reservation of a device.
    pub(crate) fn release_device(&mut self, device: Device) {
        self.devices.remove(&device);
    }

    /// Reserves a MAC address. Returns whether it was free of reservations.
    pub(crate) fn reserve_mac(&mut self, network: NetworkId, mac: Mac) -> bool {
        self.macs.insert((network, mac))
    }

    /// Ends the reservation of a MAC address.
    pub(crate) fn release_mac(&mut self, network: NetworkId, mac: Mac) {
        self.macs.remove(&(network, mac));
    }

    /// Writes the file of an endpoint. It is valid during the boot of the kernel with this id.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn keep(
        &self,
        boot_id: &str,
        endpoint: &Endpoint,
        local: &LocalEndpoint,
    ) -> anyhow::Result<()> {
        let LocalEndpoint { ifname, netns, inode, cni, beside, docker } = local.clone();
        let (boot_id, path) = (boot_id.to_owned(), self.file(endpoint.id));
        let kept = Kept { boot_id, endpoint: endpoint.clone(), ifname, netns, inode, cni, beside, docker };
        replace(&path, &serde_json::to_vec(&kept)?, Durability::Unsynced)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Deletes the file of an endpoint if it exists.
    ///
    /// # Errors
    ///
    /// The file cannot be removed.
    pub(crate) fn forget_file(&self, id: EndpointId) -> anyhow::Result<()> {
        remove(&self.file(id))
    }

    /// Reads the endpoints that the last run stored. Files of an earlier boot are deleted, because the kernel no longer
    /// has their interfaces. A damaged file is moved away.
    ///
    /// # Errors
    ///
    /// The directory cannot be read, or a file cannot be moved or removed.
    pub(crate) fn read(&self, boot_id: &str) -> anyhow::Result<Restored> {
        let mut restored = Restored::default();
        let files = ovl_files::sorted(&self.dir);
        for path in files.with_context(|| format!("reading {}", self.dir.display()))? {
            match path.extension().and_then(OsStr::to_str) {
                Some("json") => {}
                // The previous run was killed while it wrote this file.
                Some("new") => {
                    remove(&path)?;
                    continue;
                }
                Some(_) | None => continue,
            }
            match fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok()) {
                Some(kept) if kept.boot_id == boot_id => {
                    let Kept { endpoint, ifname, netns, inode, cni, beside, docker, .. } = kept;
                    let local = LocalEndpoint { ifname, cni, beside, docker, netns, inode };
                    restored.endpoints.push((endpoint, local));
                }
                Some(_) => remove(&path)?,
                None => {
                    let aside = path.with_extension("damaged");
                    fs::rename(&path, &aside).with_context(|| format!("setting {} aside", path.display()))?;
                    let sentence = format!(
                        "the file of an endpoint is damaged and was set aside as {}; the endpoint's interface goes, \
                         attach it again",
                        aside.display()
                    );
                    restored.damaged.push((path.display().to_string(), sentence));
                }
            }
        }
        Ok(restored)
    }

    fn file(&self, id: EndpointId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

fn canonical((network, namespace, name): &FullName) -> FullName {
    (*network, namespace.clone(), canonical_name(name))
}

/// Deletes a file if it exists.
fn remove(path: &Path) -> anyhow::Result<()> {
    remove_if_present(path).with_context(|| format!("removing {}", path.display()))
}

impl LocalEndpoint {
    /// Returns the key of the attachment that the runtime knows: its own, or that of the one with which it was made. `None`
    /// if no runtime requested it.
    pub(crate) fn known_attachment(&self) -> Option<Attachment> {
        let cni = self.cni.clone()?;
        Some(match &self.beside {
            Some(ifname) => Attachment { ifname: ifname.clone(), ..cni },
            None => cni,
        })
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::table::Entry;

    use super::*;
    use crate::world::{NET, endpoint};

    fn local(ifname: &str) -> LocalEndpoint {
        LocalEndpoint {
            ifname: ifname.to_owned(),
            cni: None,
            beside: None,
            docker: None,
            netns: "/n".into(),
            inode: 7,
        }
    }

    #[test]
    fn reservations_are_exclusive_until_they_are_released() {
        let mut endpoints = LocalEndpoints::new(PathBuf::new());
        let name = (NET, "default".to_owned(), "web".to_owned());
        assert!(endpoints.reserve_name(&name) && !endpoints.reserve_name(&name));
        assert!(endpoints.is_name_reserved(&name));
        let other_case = (NET, "default".to_owned(), "WEB".to_owned());
        assert!(!endpoints.reserve_name(&other_case));
        endpoints.release_name(&name);
        assert!(!endpoints.is_name_reserved(&name));
        let device = Device::endpoint(EndpointId([1; 5]));
        assert!(endpoints.reserve_device(device) && !endpoints.reserve_device(device));
        assert!(endpoints.reserved_devices().contains(&device));
        endpoints.release_device(device);
        assert!(endpoints.reserved_devices().is_empty());
        let mac = Mac::of_gateway(NET);
        assert!(endpoints.reserve_mac(NET, mac) && !endpoints.reserve_mac(NET, mac));
        endpoints.release_mac(NET, mac);
        assert!(endpoints.reserve_mac(NET, mac));
    }

    #[test]
    fn endpoints_of_this_boot_are_read_again() {
        let dir = std::env::temp_dir().join(format!("ovl-endpoints-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut endpoints = LocalEndpoints::new(dir.clone());
        let Entry::Endpoint(web) = endpoint(1, "10.9.0.9/24") else { panic!() };
        let Entry::Endpoint(old) = endpoint(2, "10.9.0.10/24") else { panic!() };
        endpoints.keep("now", &web, &local("eth0")).unwrap();
        endpoints.keep("before", &old, &local("eth0")).unwrap();
        fs::write(dir.join("half.new"), "{").unwrap();
        fs::write(dir.join("bad.json"), "{").unwrap();
        let Restored { endpoints: restored, damaged } = endpoints.read("now").unwrap();
        assert_eq!(restored, [(web.clone(), local("eth0"))]);
        assert!(damaged.len() == 1 && damaged[0].0.ends_with("bad.json"), "{damaged:?}");
        let mut left: Vec<_> = fs::read_dir(&dir).unwrap().map(|file| file.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [std::ffi::OsString::from(format!("{}.json", web.id)), "bad.damaged".into()]);

        endpoints.add(web.id, local("eth0"));
        assert_eq!(endpoints.find(|local| local.inode == 7), Some(web.id));
        endpoints.remove(web.id);
        endpoints.forget_file(web.id).unwrap();
        endpoints.forget_file(web.id).unwrap();
        assert!(endpoints.get(web.id).is_none() && endpoints.iter().next().is_none());
        fs::remove_dir_all(dir).unwrap();
    }
}
