//! The cluster objects of this host: networks and Kubernetes objects, as their writers signed them.
//!
//! [`ObjectStore`] owns the objects with their signatures and the clock that stamps new ones. Which write of an object
//! wins is decided by [`ovl_cluster::objects`]; this module decides what is accepted from peers, and what they lack.
//! Begin to read at [`ObjectStore::receive`].

use std::collections::BTreeSet;

use ovl_cluster::networks;
use ovl_cluster::objects::{Full, MAX_OBJECT_BYTES, Objects, Stored};
use ovl_cluster::resources::Resources;
use ovl_manifest::object as manifest;
use ovl_mesh::keys;
use ovl_proto::clock::{Clock, Stamp};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Driver, Network, Object, ObjectKey, SignedObject};
use ovl_proto::record::Domain;
use ovl_proto::resource::{Resource, ResourceKey};
use ovl_subsystems::mtu::min_mtu;

use crate::clocks::{Clocks, in_words, is_void};

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
    /// The clock that stamps new objects.
    clock: Clock,
    /// Digest of the stamps of all objects, for the hints.
    digest: [u8; 32],
}

/// The present.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// Milliseconds since 1970: see [`Clocks::now`].
    pub wall_ms: u64,
    /// See [`Clocks::void_after`].
    pub void_after: Option<u64>,
}

/// An object that a peer asks for, with the stamp of what it has; the default if it has none.
pub(crate) type WantedObject = (ObjectKey, Stamp);

/// Why an object of a peer is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Rejected {
    /// Its stamp is in the future.
    #[error("{key} is stamped {} in the future", in_words(*by_ms))]
    Future {
        /// The object.
        key: ObjectKey,
        /// Its name, as users see it.
        what: String,
        /// How far its stamp is ahead of the present, in milliseconds.
        by_ms: u64,
    },
    /// It was mirrored from an API server, of which this host knows a later state of it. What this host has is to be written
    /// again, with a stamp after this one.
    #[error("{key} is an earlier state of a mirrored object")]
    Earlier {
        /// The object.
        key: ObjectKey,
        /// Its stamp.
        stamp: Stamp,
    },
    /// It is invalid, or there is no room.
    #[error("{0}")]
    Invalid(String),
}

impl ObjectStore {
    /// Creates an empty store. `clock` is that of the last run.
    pub(crate) fn new(clock: Clock) -> Self {
        Self { objects: Objects::default(), clock, digest: [0; 32] }
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

    /// Returns the stamp of a write of the host `writer`: the present, or one step after the stored write of the object if
    /// that is later. `key` is `None` if the write replaces none.
    ///
    /// A stored stamp that a majority considers to be in the future does not count.
    pub(crate) fn stamp(&mut self, clocks: &Clocks, key: Option<&ObjectKey>, writer: NodeId) -> Stamp {
        let stored = key.and_then(|key| self.objects.get(key)).map(|stored| stored.stamp);
        let before = stored.filter(|stamp| !is_void(*stamp, clocks.void_after()));
        let present = match clocks.stamping() {
            Some(present) => present,
            // The clock was never set. The stamp should not lose to all others.
            None => {
                let stored = self.objects.iter().map(|(_, stored)| stored.stamp.wall_ms);
                stored.max().unwrap_or_default().max(self.clock.wall_ms())
            }
        };
        self.clock.tick(present, before.unwrap_or_default(), writer)
    }

    /// Returns up to `most` of the objects that a peer asks for and will refuse, because a majority considers their stamps to
    /// be in the future, each with the stamp of what the peer has.
    pub(crate) fn refused_by(
        &self,
        wanted: &[WantedObject],
        void_after: Option<u64>,
        most: usize,
    ) -> Vec<WantedObject> {
        let refused = wanted.iter().filter(|(key, theirs)| {
            self.objects.get(key).is_some_and(|ours| is_void(ours.stamp, void_after) && *theirs < ours.stamp)
        });
        refused.take(most).cloned().collect()
    }

    /// Returns a stored object that is to be stamped again, and whether it is deleted. The time of its creation is brought
    /// back too. `None` if it is gone.
    pub(crate) fn to_stamp_again(&self, key: &ObjectKey, stamp: Stamp) -> Option<Object> {
        let mut object = self.objects.get(key)?.signed.object().ok()?;
        object.stamp = stamp;
        match &mut object.body {
            Body::Network(network) => network.created = network.created.min(stamp),
            Body::Resource(resource) => {
                let created = &mut resource.meta_mut().creation_timestamp.0;
                *created = (*created).min(stamp);
            }
            // What is not understood is signed again as it is.
            Body::Opaque { .. } => {}
        }
        Some(object)
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
            // The stamp is the latest one, unless the stored one is void.
            changed.extend(self.objects.replace(signed, object, resources)?);
        }
        self.digest = self.objects.digest();
        Ok(changed)
    }

    /// Merges objects of a peer. An object is kept if it is later than the local one. `refused` hears why an object is not
    /// accepted. Returns the Kubernetes objects that changed in `resources`; `None` if nothing was new.
    pub(crate) fn receive(
        &mut self,
        objects: Vec<SignedObject>,
        moment: Moment,
        resources: &mut Resources,
        mut refused: impl FnMut(Rejected),
    ) -> Option<Vec<ResourceKey>> {
        let (mut is_new, mut changed) = (false, Vec::new());
        for signed in objects {
            match self.receive_one(signed, moment, resources) {
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
        moment: Moment,
        resources: &mut Resources,
    ) -> Result<Option<Vec<ResourceKey>>, Rejected> {
        let Moment { wall_ms, void_after } = moment;
        let object = signed.object().map_err(|error| Rejected::Invalid(error.to_string()))?;
        // What is stored with a void stamp is known to this host alone. A peer sends only what it has just written, or what
        // this host lacks, so that is later.
        let is_void_here = |ours: &Stored| is_void(ours.stamp, void_after);
        let ours = self.objects.get(&object.key()).filter(|ours| !is_void_here(ours));
        // A known object, or an old tombstone that this host has deleted and the sender has not, is skipped
        // without a signature check.
        if ours.is_some_and(|ours| ours.stamp >= object.stamp)
            || (ours.is_none() && is_old_tombstone(object.deleted, object.stamp, wall_ms))
        {
            return Ok(None);
        }
        check_object(&signed, &object).map_err(Rejected::Invalid)?;
        object.stamp.check(wall_ms).map_err(|error| Rejected::Future {
            key: object.key(),
            what: name_of(&object),
            by_ms: error.by_ms,
        })?;
        if let (Some(ours), Body::Resource(theirs)) = (ours, &object.body)
            && let (Some(ours), Some(theirs)) = (&ours.source, &theirs.meta().source)
            && theirs.is_before(ours)
        {
            return Err(Rejected::Earlier { key: object.key(), stamp: object.stamp });
        }
        let changed = self.objects.replace(signed, object, resources);
        changed.map(Some).map_err(|full| Rejected::Invalid(full.to_string()))
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

/// Returns the name of an object, as users see it.
fn name_of(object: &Object) -> String {
    match &object.body {
        Body::Network(network) => format!("network {}", network.name),
        Body::Resource(_) | Body::Opaque { .. } => object.key().to_string(),
    }
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

    const AT: Moment = Moment { wall_ms: 1_700_000_000_000, void_after: None };
    const AHEAD_MS: u64 = 3 * MAX_AHEAD_MS;

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
            let stamp = self.clock.tick(wall_ms, Stamp::default(), self.identity.id());
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
        let changed =
            store.receive(vec![signed.clone()], AT, &mut resources, |error| why = Some(error.to_string()));
        (changed.is_some(), why)
    }

    /// A write of a mirrored namespace, stamped this many milliseconds after the others.
    fn mirrored(writer: &mut Writer, later_ms: u64, version: u64, deleted: bool) -> SignedObject {
        use ovl_proto::resource::{Meta, Namespace, Source};
        let source = Source { cluster: "c".to_owned(), version };
        let metadata = Meta { name: "shop".to_owned(), source: Some(Box::new(source)), ..Meta::default() };
        let namespace = Namespace { metadata, unknown: Default::default() };
        let stamp = writer.clock.tick(AT.wall_ms + later_ms, Stamp::default(), writer.identity.id());
        let object = Object { stamp, deleted, body: Body::Resource(Resource::Namespace(namespace)) };
        let body = wire::encode_body(&object).unwrap();
        SignedObject {
            signature: writer.identity.sign(Domain::Object, &body),
            writer_key: *writer.identity.public_key(),
            body,
        }
    }

    #[test]
    fn later_version_of_a_mirrored_object_stays_whenever_it_was_written() {
        let (mut one, mut other) = (Writer::new(), Writer::new());
        let mut store = ObjectStore::new(Clock::default());
        let later = mirrored(&mut one, 0, 7, false);
        assert_eq!(receive(&mut store, &later), (true, None));
        // A mirror that is behind writes after it.
        let mut refusals = Vec::new();
        for (version, deleted) in [(6, false), (5, true)] {
            let behind = mirrored(&mut other, 100 * version, version, deleted);
            let mut resources = Resources::default();
            let changed = store.receive(vec![behind.clone()], AT, &mut resources, |why| refusals.push(why));
            assert_eq!(changed, None);
            let object = behind.object().unwrap();
            assert_eq!(refusals.pop(), Some(Rejected::Earlier { key: object.key(), stamp: object.stamp }));
        }
        assert_eq!(store.signed().next(), Some(&later));
        // The next state is taken, and what was deleted does not come back.
        let deletion = mirrored(&mut other, 1000, 8, true);
        assert_eq!(receive(&mut store, &deletion), (true, None));
        let (taken, why) = receive(&mut store, &mirrored(&mut one, 2000, 7, false));
        assert!(!taken && why.unwrap().contains("earlier state"));
    }

    #[test]
    fn later_write_wins_and_is_taken_once() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let first = writer.write(AT.wall_ms, false, |_| {});
        let second = writer.write(AT.wall_ms, false, |network| network.name = "green".to_owned());
        assert_eq!(receive(&mut store, &first), (true, None));
        let digest = store.digest();
        assert_eq!(receive(&mut store, &first), (false, None));
        assert_eq!(receive(&mut store, &second), (true, None));
        assert_eq!(receive(&mut store, &first), (false, None));
        assert!(store.digest() != digest);
        assert_eq!(store.signed().count(), 1);
    }

    #[test]
    fn object_is_refused_if_it_is_forged_or_at_odds_with_itself() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let good = writer.write(AT.wall_ms, false, |_| {});
        let stranger = Writer::new();
        let forged = SignedObject { writer_key: *stranger.identity.public_key(), ..good.clone() };
        assert!(receive(&mut store, &forged).1.unwrap().contains("not that of its writer"));
        let unsigned = SignedObject { signature: stranger.identity.sign(Domain::Object, &good.body), ..good };
        assert!(receive(&mut store, &unsigned).1.unwrap().contains("not signed by its writer"));
        let ahead = writer.write(AT.wall_ms + 2 * MAX_AHEAD_MS, false, |_| {});
        assert!(receive(&mut store, &ahead).1.is_some(), "its stamp is two days ahead");
        let mut writer = Writer::new();
        let no_vni = writer.write(AT.wall_ms, false, |network| network.vni = 0);
        assert!(receive(&mut store, &no_vni).1.unwrap().contains("VNI 0"));
        let small = writer.write(AT.wall_ms, false, |network| network.mtu = Some(68));
        assert!(receive(&mut store, &small).1.unwrap().contains("MTU"));
        let twice = writer.write(AT.wall_ms, false, |network| {
            let subnet = network.subnets[0];
            network.subnets.push(subnet);
        });
        assert!(receive(&mut store, &twice).1.unwrap().contains("overlaps"));
        let bridge = writer.write(AT.wall_ms, false, |network| network.driver = Driver::Bridge);
        assert!(receive(&mut store, &bridge).1.unwrap().contains("only be its host's own"));
        assert!(store.all().is_empty());
    }

    #[test]
    fn tombstone_goes_when_it_is_old_and_its_network_is_gone() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let dead = writer.write(AT.wall_ms, true, |_| {});
        assert!(receive(&mut store, &dead).0);
        let later = AT.wall_ms + TOMBSTONE_MS;
        assert!(!store.drop_old_tombstones(later, |_| false), "not old yet");
        assert!(!store.drop_old_tombstones(later + 1, |_| true), "its blocks are in use");
        assert!(store.drop_old_tombstones(later + 1, |_| false));
        assert_eq!(store.digest(), ObjectStore::new(Clock::default()).objects.digest());
        // A peer that still has it does not bring it back.
        let (mut resources, at) = (Resources::default(), Moment { wall_ms: later + 1, ..AT });
        assert!(store.receive(vec![dead], at, &mut resources, |why| panic!("{why}")).is_none());
    }

    #[test]
    fn peer_gets_what_it_lacks() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let one = writer.write(AT.wall_ms, false, |_| {});
        let other = writer.write(AT.wall_ms, false, |network| network.id = NetworkId([7; 5]));
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

    /// The clocks of a host whose own clock says `own`, with two others that are right.
    fn clocks(own: u64) -> Clocks {
        Clocks::new(own, [1, 2].map(|n| (NodeId([n; 10]), AT.wall_ms)))
    }

    #[test]
    fn a_write_is_stamped_later_than_the_stored_one_and_not_later_than_others() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let theirs = writer.write(AT.wall_ms + MAX_AHEAD_MS, false, |_| {});
        let (key, stamp) = (theirs.object().unwrap().key(), theirs.object().unwrap().stamp);
        assert_eq!(receive(&mut store, &theirs), (true, None));
        let me = writer.identity.id();
        assert_eq!(store.stamp(&clocks(AT.wall_ms), Some(&key), me), stamp.next(me));
        assert_eq!(store.stamp(&clocks(AT.wall_ms), None, me).wall_ms, AT.wall_ms);
    }

    #[test]
    fn a_clock_that_was_never_set_stamps_after_all_that_is_stored() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let theirs = writer.write(AT.wall_ms, false, |_| {});
        receive(&mut store, &theirs);
        let alone = Clocks::new(5000, []);
        assert!(store.stamp(&alone, None, writer.identity.id()).wall_ms >= AT.wall_ms);
        // With a peer it has the time of that.
        let told = Clocks::new(5000, [(NodeId([1; 10]), AT.wall_ms + 10)]);
        assert_eq!(store.stamp(&told, None, writer.identity.id()).wall_ms, AT.wall_ms + 10);
    }

    #[test]
    fn what_was_stamped_in_the_future_is_stamped_again_and_then_accepted() {
        let mut writer = Writer::new();
        let (mut ours, mut theirs) = (ObjectStore::new(Clock::default()), ObjectStore::new(Clock::default()));
        // They have an earlier write, and ours was made with a clock that was ahead.
        let first = writer.write(AT.wall_ms, false, |_| {});
        receive(&mut theirs, &first);
        let ahead = writer.write(AT.wall_ms + AHEAD_MS, false, |network| network.name = "late".to_owned());
        ours.load(vec![ahead.clone()], &mut Resources::default(), |why| panic!("{why}"));
        let (is_new, why) = receive(&mut theirs, &ahead);
        assert!(!is_new && why.is_some_and(|why| why.contains("3 days in the future")));
        let (right, key, me) = (clocks(AT.wall_ms), ObjectKey::Network(NET), writer.identity.id());
        let wanted = [(key.clone(), first.object().unwrap().stamp)];
        let refused = ours.refused_by(&wanted, right.void_after(), 10);
        assert_eq!(refused.len(), 1);
        for (key, has) in refused {
            let stamp = ours.stamp(&right, Some(&key), me).max(has.next(me));
            let object = ours.to_stamp_again(&key, stamp).unwrap();
            let body = wire::encode_body(&object).unwrap();
            let signed = SignedObject {
                signature: writer.identity.sign(Domain::Object, &body),
                writer_key: *writer.identity.public_key(),
                body,
            };
            ours.write(vec![(signed.clone(), object)], &mut Resources::default()).unwrap();
            assert_eq!(receive(&mut theirs, &signed), (true, None));
        }
        assert_eq!(ours.digest(), theirs.digest());
        assert_eq!(theirs.all().network(NET).unwrap().network.as_ref().unwrap().name, "late");
        let has = theirs.all().get(&key).unwrap().stamp;
        assert!(ours.refused_by(&[(key, has)], right.void_after(), 10).is_empty());
    }

    #[test]
    fn a_peers_write_replaces_one_that_a_majority_considers_to_be_in_the_future() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let ahead = writer.write(AT.wall_ms + AHEAD_MS, false, |_| {});
        store.load(vec![ahead], &mut Resources::default(), |why| panic!("{why}"));
        let mut other = Writer::new();
        let theirs = other.write(AT.wall_ms, false, |_| {});
        // Alone, this host cannot know which of both is right.
        assert_eq!(receive(&mut store, &theirs), (false, None));
        let at = Moment { void_after: clocks(AT.wall_ms + AHEAD_MS).void_after(), ..AT };
        assert!(at.void_after.is_some());
        let changed = store.receive(vec![theirs], at, &mut Resources::default(), |why| panic!("{why}"));
        assert!(changed.is_some());
    }

    #[test]
    fn a_change_of_what_is_stored_with_a_future_stamp_is_not_lost() {
        let mut writer = Writer::new();
        let mut store = ObjectStore::new(Clock::default());
        let ahead = writer.write(AT.wall_ms + AHEAD_MS, false, |_| {});
        store.load(vec![ahead], &mut Resources::default(), |why| panic!("{why}"));
        let (right, key, me) = (clocks(AT.wall_ms), ObjectKey::Network(NET), writer.identity.id());
        let stamp = store.stamp(&right, Some(&key), me);
        assert_eq!(stamp.wall_ms, AT.wall_ms);
        let change = writer.write(AT.wall_ms, false, |network| network.name = "other".to_owned());
        let object = change.object().unwrap();
        store.write(vec![(change, object)], &mut Resources::default()).unwrap();
        assert_eq!(store.all().network(NET).unwrap().network.as_ref().unwrap().name, "other");
    }

    #[test]
    fn messages_are_bounded_in_number_and_size() {
        let small = Writer::new().write(AT.wall_ms, false, |_| {});
        let many = vec![small.clone(); OBJECTS_A_MESSAGE + 1];
        assert_eq!(messages(&many).map(<[_]>::len).collect::<Vec<_>>(), [OBJECTS_A_MESSAGE, 1]);
        let large = SignedObject { body: vec![0; BYTES_A_MESSAGE], ..small };
        assert_eq!(messages(&[large.clone(), large]).map(<[_]>::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(messages(&[]).count(), 0);
    }
}
