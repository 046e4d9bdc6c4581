//! The cluster objects of this host: networks and Kubernetes objects, as their writers signed them.
//!
//! [`ObjectStore`] owns the objects with their signatures and the clock that stamps new ones. Which write of an object
//! wins is decided by [`ovl_cluster::objects`]; this module decides what is accepted from peers, and what they lack.
//! Begin to read at [`ObjectStore::receive`].

use std::collections::BTreeSet;

use ovl_cluster::networks;
use ovl_cluster::objects::{Full, MAX_OBJECT_BYTES, Objects};
use ovl_cluster::resources::Resources;
use ovl_manifest::object as manifest;
use ovl_mesh::keys;
use ovl_proto::clock::{Clock, Stamp};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Driver, Network, Object, ObjectKey, SignedObject};
use ovl_proto::record::Domain;
use ovl_proto::resource::{Resource, ResourceKey};
use ovl_subsystems::mtu::min_mtu;

/// Time in milliseconds for which a tombstone is kept. A host that was away for longer may restore a deleted
/// object.
const TOMBSTONE_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// Maximum number of objects in one message. The receiver checks a signature for each, and its loop is
/// blocked meanwhile.
const OBJECTS_A_MESSAGE: usize = 250;
/// Size of the objects in one message, in bytes, beyond which no further one is added. Even with the largest
/// object as the last one, a message is far below the maximum frame.
const BYTES_A_MESSAGE: usize = 1 << 20;
/// Size of the objects in the answer to one request of a peer, in bytes, beyond which no further one is added. It fits
/// the queue of a stream several times.
const BYTES_AN_ANSWER: usize = 4 << 20;

/// The cluster objects, tombstones included.
pub(crate) struct ObjectStore {
    objects: Objects,
    /// Hybrid logical clock that stamps new objects.
    clock: Clock,
    /// Digest of the stamps of all objects, for the hints.
    digest: [u8; 32],
    /// Whether any peer has sent its objects.
    seen: bool,
}

impl ObjectStore {
    /// Creates an empty store. `clock` is that of the last run.
    pub(crate) fn new(clock: Clock) -> Self {
        Self { objects: Objects::default(), clock, digest: [0; 32], seen: false }
    }

    /// Returns the objects.
    pub(crate) fn all(&self) -> &Objects {
        &self.objects
    }

    /// Returns all objects as their writers signed them.
    pub(crate) fn signed(&self) -> impl Iterator<Item = &SignedObject> {
        self.objects.iter().map(|(_, stored)| &stored.signed)
    }

    /// Returns the clock that stamps new objects, to be saved.
    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// Returns the digest of the stamps of all objects.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Returns the object with this key, and what this release does not know of it. `None` if it is understood or absent.
    pub(crate) fn not_understood<'a>(&'a self, key: &'a ObjectKey) -> Option<(&'a ObjectKey, &'a str)> {
        Some((key, self.objects.get(key)?.opaque.as_deref()?))
    }

    /// Whether any peer has sent its objects.
    pub(crate) fn is_seen(&self) -> bool {
        self.seen
    }

    /// Notes that a peer has no object that this host lacks.
    pub(crate) fn note_seen(&mut self) {
        self.seen = true;
    }

    /// Returns the stamp of a new object of the host `writer`.
    pub(crate) fn stamp(&mut self, wall_ms: u64, writer: NodeId) -> Stamp {
        self.clock.tick(wall_ms, writer)
    }

    /// Stores objects that this host has written: all, or none if there is no room. Returns the Kubernetes objects that
    /// changed in `resources`.
    ///
    /// # Errors
    ///
    /// There is no room.
    pub(crate) fn write(
        &mut self,
        written: Vec<(SignedObject, Object)>,
        resources: &mut Resources,
    ) -> Result<Vec<ResourceKey>, Full> {
        self.objects.has_room(written.iter().map(|(signed, object)| (object.key(), signed)))?;
        let mut changed = Vec::new();
        for (signed, object) in written {
            changed.extend(self.objects.put(signed, object, resources)?.into_iter().flatten());
        }
        self.digest = self.objects.digest();
        Ok(changed)
    }

    /// Merges objects of a peer. An object is kept if it is later than the local one. `wall_ms` is the time since 1970. `refused` hears why an object is
    /// not accepted. Returns the Kubernetes objects that changed in `resources`; `None` if nothing was new.
    pub(crate) fn receive(
        &mut self,
        objects: Vec<SignedObject>,
        wall_ms: u64,
        resources: &mut Resources,
        mut refused: impl FnMut(String),
    ) -> Option<Vec<ResourceKey>> {
        self.seen = true;
        let (mut is_new, mut changed) = (false, Vec::new());
        for signed in objects {
            match self.receive_one(signed, wall_ms, resources) {
                Ok(Some(keys)) => {
                    is_new = true;
                    changed.extend(keys);
                }
                Ok(None) => {}
                Err(why) => refused(why),
            }
        }
        if !is_new {
            return None;
        }
        self.digest = self.objects.digest();
        Some(changed)
    }

    fn receive_one(
        &mut self,
        signed: SignedObject,
        wall_ms: u64,
        resources: &mut Resources,
    ) -> Result<Option<Vec<ResourceKey>>, String> {
        let object = signed.object().map_err(|error| error.to_string())?;
        let ours = self.objects.get(&object.key());
        // A known object, or an old tombstone that this host has deleted and the sender has not, is skipped
        // without a signature check.
        if ours.is_some_and(|ours| ours.stamp >= object.stamp)
            || (ours.is_none() && is_old_tombstone(object.deleted, object.stamp, wall_ms))
        {
            return Ok(None);
        }
        check_object(&signed, &object)?;
        self.clock.observe(object.stamp, wall_ms).map_err(|error| error.to_string())?;
        self.objects.put(signed, object, resources).map_err(|full| full.to_string())
    }

    /// Loads the objects of the state file. `refused` hears why an object is passed over. Returns the Kubernetes objects
    /// that changed in `resources`.
    pub(crate) fn load(
        &mut self,
        objects: Vec<SignedObject>,
        resources: &mut Resources,
        mut refused: impl FnMut(String),
    ) -> Vec<ResourceKey> {
        let mut changed = Vec::new();
        for signed in objects {
            // The stamps are not compared with the clock: it may not be set yet, and this host has accepted
            // these objects before.
            let loaded = signed.object().map_err(|error| error.to_string()).and_then(|object| {
                check_object(&signed, &object)?;
                self.objects.put(signed, object, resources).map_err(|full| full.to_string())
            });
            match loaded {
                Ok(keys) => changed.extend(keys.into_iter().flatten()),
                Err(why) => refused(why),
            }
        }
        self.digest = self.objects.digest();
        changed
    }

    /// Returns the objects with these keys, as many as fit one answer.
    pub(crate) fn signed_of(&self, keys: Vec<ObjectKey>) -> Vec<SignedObject> {
        // Each one once, whatever the peer asks.
        let keys: BTreeSet<ObjectKey> = keys.into_iter().collect();
        let mut bytes = 0;
        let found = keys.iter().filter_map(|key| self.objects.get(key)).take_while(|stored| {
            let before = bytes;
            bytes += stored.signed.body.len();
            before < BYTES_AN_ANSWER
        });
        found.map(|stored| stored.signed.clone()).collect()
    }

    /// Deletes tombstones that all hosts have had time to receive. Those of networks for which `in_use` returns true are
    /// kept. Returns whether any was deleted.
    pub(crate) fn drop_old_tombstones(&mut self, wall_ms: u64, in_use: impl Fn(&NetworkId) -> bool) -> bool {
        let before = self.objects.len();
        self.objects.retain(|key, object| {
            !is_old_tombstone(object.deleted, object.stamp, wall_ms)
                || match key {
                    ObjectKey::Network(id) => in_use(id),
                    ObjectKey::Resource(_) | ObjectKey::Unknown { .. } => false,
                }
        });
        self.digest = self.objects.digest();
        self.objects.len() != before
    }
}

/// Splits objects into parts that fit one message each.
pub(crate) fn messages(objects: &[SignedObject]) -> impl Iterator<Item = &[SignedObject]> {
    let mut rest = objects;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fit = rest.iter().take(OBJECTS_A_MESSAGE).take_while(|signed| {
            let before = bytes;
            bytes += signed.body.len();
            before < BYTES_A_MESSAGE
        });
        let (part, behind) = rest.split_at_checked(fit.count())?;
        rest = behind;
        (!part.is_empty()).then_some(part)
    })
}

fn is_old_tombstone(deleted: bool, stamp: Stamp, wall_ms: u64) -> bool {
    deleted && wall_ms.saturating_sub(stamp.wall_ms) > TOMBSTONE_MS
}

/// Checks the signature and the content of an object.
fn check_object(signed: &SignedObject, object: &Object) -> Result<(), String> {
    if signed.body.len() > MAX_OBJECT_BYTES {
        return Err(Full::Object(signed.body.len()).to_string());
    }
    if keys::node_id(&signed.writer_key) != object.stamp.node {
        return Err(format!("its key is not that of its writer {}", object.stamp.node));
    }
    if !keys::verify(&signed.writer_key, Domain::Object, &signed.body, &signed.signature) {
        return Err(format!("not signed by its writer {}", object.stamp.node));
    }
    match &object.body {
        Body::Network(network) => check_network(network),
        Body::Resource(resource) => check_resource(resource, object.deleted),
        // Kept and passed on, whatever it is. Users see the name.
        Body::Opaque { key: ObjectKey::Resource(ResourceKey { name, .. }), .. } => {
            let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
            if printable(&name.namespace) && printable(&name.name) {
                Ok(())
            } else {
                Err("an object with a name that is none".to_owned())
            }
        }
        Body::Opaque { .. } => Ok(()),
    }
}

/// Checks a Kubernetes object. If it is deleted, only its name matters.
fn check_resource(resource: &Resource, deleted: bool) -> Result<(), String> {
    if deleted {
        return Ok(());
    }
    manifest::check(resource).map_err(|problems| {
        let first = problems.first().map(|it| format!("{} {}", it.field, it.reason)).unwrap_or_default();
        format!("{}: {first}", resource.key())
    })
}

/// Checks the properties of a network that every host relies on.
fn check_network(network: &Network) -> Result<(), String> {
    if !crate::config::is_known_name(&network.name, crate::config::MAX_NAME) {
        return Err("a network with a name that is none".to_owned());
    }
    if network.driver != Driver::Overlay {
        return Err(format!("network {}, which can only be its host's own", network.name));
    }
    if !(1..=networks::MAX_VNI).contains(&network.vni) {
        return Err(format!("network {} with the VNI {}", network.name, network.vni));
    }
    if network.mtu.is_some_and(|mtu| mtu < min_mtu(network)) {
        return Err(format!("network {} with the MTU {:?}", network.name, network.mtu));
    }
    if network.subnets.is_empty() || network.subnets.len() > 16 {
        return Err(format!("network {} with {} subnets", network.name, network.subnets.len()));
    }
    for (index, subnet) in network.subnets.iter().enumerate() {
        let mut before = network.subnets.iter().take(index);
        if let Some(other) = before.find(|other| networks::overlaps(other.prefix, subnet.prefix)) {
            return Err(format!("network {}: {} overlaps {}", network.name, subnet.prefix, other.prefix));
        }
        ovl_cluster::addresses::validate_subnet(subnet.prefix)
            .map_err(|error| format!("{}: {error}", network.name))?;
        if !subnet.prefix.contains(&subnet.gateway)
            || subnet.block_length < subnet.prefix.prefix_len()
            || subnet.block_length > subnet.prefix.max_prefix_len()
        {
            return Err(format!(
                "network {} with the subnet {} at odds with itself",
                network.name, subnet.prefix
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use ovl_mesh::keys::Identity;
    use ovl_proto::wire;

    use ovl_proto::clock::MAX_AHEAD_MS;

    use super::*;
    use crate::world::{NET, switched};

    /// Milliseconds since 1970.
    const AT: u64 = 1_700_000_000_000;

    /// A host that writes networks.
    struct Writer {
        identity: Identity,
        clock: Clock,
    }

    impl Writer {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("ovl-writer-{}-{number}", std::process::id()));
            let identity = Identity::load_or_create(&path).unwrap();
            std::fs::remove_file(path).unwrap();
            Self { identity, clock: Clock::default() }
        }

        fn write(&mut self, wall_ms: u64, deleted: bool, change: impl Fn(&mut Network)) -> SignedObject {
            let mut network = switched().networks[&NET].network.clone();
            change(&mut network);
            let stamp = self.clock.tick(wall_ms, self.identity.id());
            let object = Object { stamp, deleted, body: Body::Network(network) };
            let body = wire::encode_body(&object).unwrap();
            SignedObject {
                signature: self.identity.sign(Domain::Object, &body),
                writer_key: *self.identity.public_key(),
                body,
            }
        }
    }

    /// Gives an object to the store. Returns whether it was new, and why it was refused.
    fn receive(store: &mut ObjectStore, signed: &SignedObject) -> (bool, Option<String>) {
        let (mut resources, mut why) = (Resources::default(), None);
        let changed = store.receive(vec![signed.clone()], AT, &mut resources, |text| why = Some(text));
        (changed.is_some(), why)
    }

    #[test]
    fn later_write_wins_and_is_taken_once() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        assert!(!store.is_seen());
        let first = writer.write(AT, false, |_| {});
        let second = writer.write(AT, false, |network| network.name = "green".to_owned());
        assert_eq!(receive(&mut store, &first), (true, None));
        let digest = store.digest();
        assert_eq!(receive(&mut store, &first), (false, None));
        assert_eq!(receive(&mut store, &second), (true, None));
        assert_eq!(receive(&mut store, &first), (false, None));
        assert!(store.digest() != digest && store.is_seen());
        assert_eq!(store.signed().count(), 1);
    }

    #[test]
    fn object_is_refused_if_it_is_forged_or_at_odds_with_itself() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let good = writer.write(AT, false, |_| {});
        let stranger = Writer::new();
        let forged = SignedObject { writer_key: *stranger.identity.public_key(), ..good.clone() };
        assert!(receive(&mut store, &forged).1.unwrap().contains("not that of its writer"));
        let unsigned = SignedObject { signature: stranger.identity.sign(Domain::Object, &good.body), ..good };
        assert!(receive(&mut store, &unsigned).1.unwrap().contains("not signed by its writer"));
        let ahead = writer.write(AT + 2 * MAX_AHEAD_MS, false, |_| {});
        assert!(receive(&mut store, &ahead).1.is_some(), "its stamp is two days ahead");
        let mut writer = Writer::new();
        let no_vni = writer.write(AT, false, |network| network.vni = 0);
        assert!(receive(&mut store, &no_vni).1.unwrap().contains("VNI 0"));
        let small = writer.write(AT, false, |network| network.mtu = Some(68));
        assert!(receive(&mut store, &small).1.unwrap().contains("MTU"));
        let twice = writer.write(AT, false, |network| {
            let subnet = network.subnets[0];
            network.subnets.push(subnet);
        });
        assert!(receive(&mut store, &twice).1.unwrap().contains("overlaps"));
        let bridge = writer.write(AT, false, |network| network.driver = Driver::Bridge);
        assert!(receive(&mut store, &bridge).1.unwrap().contains("only be its host's own"));
        assert!(store.all().is_empty());
    }

    #[test]
    fn tombstone_goes_when_it_is_old_and_its_network_is_gone() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let dead = writer.write(AT, true, |_| {});
        assert!(receive(&mut store, &dead).0);
        let later = AT + TOMBSTONE_MS;
        assert!(!store.drop_old_tombstones(later, |_| false), "not old yet");
        assert!(!store.drop_old_tombstones(later + 1, |_| true), "its blocks are in use");
        assert!(store.drop_old_tombstones(later + 1, |_| false));
        assert_eq!(store.digest(), ObjectStore::new(Clock::default()).objects.digest());
        // A peer that still has it does not bring it back.
        let (mut resources, at) = (Resources::default(), later + 1);
        assert!(store.receive(vec![dead], at, &mut resources, |why| panic!("{why}")).is_none());
    }

    #[test]
    fn peer_gets_what_it_lacks() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let one = writer.write(AT, false, |_| {});
        let other = writer.write(AT, false, |network| network.id = NetworkId([7; 5]));
        receive(&mut store, &one);
        receive(&mut store, &other);
        let all = store.all();
        assert_eq!(all.index(&[]).len(), 2);
        assert!(all.index(&all.parts()).is_empty());
        let mut behind = ObjectStore::new(Clock::default());
        receive(&mut behind, &one);
        let index = all.index(&behind.all().parts());
        let missing: Vec<_> =
            index.into_iter().filter(|(key, stamp)| behind.all().lacks(key, *stamp)).collect();
        let keys: Vec<ObjectKey> = missing.iter().map(|(key, _)| key.clone()).collect();
        assert_eq!(keys, [other.object().unwrap().key()]);
        assert_eq!(store.signed_of([keys.clone(), keys].concat()), [other], "each once");
    }

    #[test]
    fn write_is_stamped_later_than_all_that_was_seen() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let theirs = writer.write(AT, false, |_| {});
        let stamp = theirs.object().unwrap().stamp;
        receive(&mut store, &theirs);
        assert!(store.stamp(0, writer.identity.id()) > stamp);
    }

    #[test]
    fn messages_are_bounded_in_number_and_size() {
        let small = Writer::new().write(AT, false, |_| {});
        let many = vec![small.clone(); OBJECTS_A_MESSAGE + 1];
        assert_eq!(messages(&many).map(<[_]>::len).collect::<Vec<_>>(), [OBJECTS_A_MESSAGE, 1]);
        let large = SignedObject { body: vec![0; BYTES_A_MESSAGE], ..small };
        assert_eq!(messages(&[large.clone(), large]).map(<[_]>::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(messages(&[]).count(), 0);
    }
}
