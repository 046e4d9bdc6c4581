//! Identities (Ed25519 key pairs), signatures, tunnel keys, and the cluster key.
//!
//! No `Debug` shows a secret. A file with a secret is refused if other users can read it, because the secret must be
//! considered disclosed.

mod cluster;
mod keyfile;
mod verified;

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use data_encoding::BASE64;
use ovl_files::{Damaged, sha256};
use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::record::{
    Domain, MAX_FURTHER, MAX_OTHER_KEYS, NodeRecord, PublicKey, RecordHead, Signature, SignedRecord, is_zone,
    named_by,
};
use ovl_proto::wire::{self, WireError};
use ovl_tunnel::PrivateKey;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use zeroize::Zeroizing;

pub use cluster::{ClusterKey, Keyring};
pub use keyfile::KeyFile;

/// The maximum size of a file with a secret, in bytes.
const MAX_SECRET_FILE: u64 = 4096;

/// The key pair of a host.
pub struct Identity {
    pair: Ed25519KeyPair,
    public: PublicKey,
    id: NodeId,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.id)
    }
}

impl Identity {
    /// Reads the key pair, or creates it if there is no file. An invalid file is never replaced: the host would get
    /// another id.
    ///
    /// # Errors
    ///
    /// [`Damaged`] if the file is invalid, or other users can read it; otherwise it cannot be read or written.
    pub fn load_or_create(path: &Path) -> anyhow::Result<Self> {
        if let Some(document) = read_secret(path)? {
            return Self::from_pkcs8(&document).with_context(|| {
                Damaged(format!(
                    "{}: invalid key pair (the file is truncated or overwritten): restore it, or delete it to make this \
                     a new host",
                    path.display()
                ))
            });
        }
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| {
            anyhow::anyhow!("cannot create a key pair: the kernel returned no random numbers")
        })?;
        ovl_files::create(path, document.as_ref())
            .with_context(|| format!("cannot write {}", path.display()))?;
        // Read it back: if two daemons start at once, the file of the first one counts.
        let Some(document) = read_secret(path)? else { bail!("{} was deleted meanwhile", path.display()) };
        Self::from_pkcs8(&document)
    }

    /// Creates a key pair without a file, for tests.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used, reason = "only for tests, which clippy does not recognise by this cfg")]
    pub fn ephemeral() -> Self {
        Self::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap().as_ref()).unwrap()
    }

    /// Parses the content of a file, for tests.
    #[cfg(test)]
    pub fn from_pkcs8_for_tests(document: &[u8]) -> Self {
        Self::from_pkcs8(document).unwrap()
    }

    /// The id of the host: the hash of the public key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The public key, which verifies the signatures of the host.
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// Signs a body for one purpose.
    pub fn sign(&self, domain: Domain, body: &[u8]) -> Signature {
        let signature = self.pair.sign(&domain.message(body));
        let mut bytes = [0; 64];
        for (to, from) in bytes.iter_mut().zip(signature.as_ref()) {
            *to = *from;
        }
        Signature(bytes)
    }

    /// Encodes and signs the record of the host.
    ///
    /// # Errors
    ///
    /// The record cannot be encoded.
    pub fn sign_record(&self, record: &NodeRecord) -> Result<SignedRecord, WireError> {
        let body = wire::encode_body(record)?;
        let signature = self.sign(Domain::Record, &body);
        Ok(SignedRecord { body, signature })
    }

    fn from_pkcs8(document: &[u8]) -> anyhow::Result<Self> {
        // This also checks that the public key in the file belongs to the private key.
        let pair = Ed25519KeyPair::from_pkcs8(document)
            .map_err(|error| anyhow::anyhow!("invalid Ed25519 key: {error}"))?;
        let public: PublicKey = pair.public_key().as_ref().try_into()?;
        Ok(Self { id: node_id(&public), pair, public })
    }
}

/// The tunnel keys of this host, as stored on disk: one line with the private key, as `wg genkey` writes it, followed
/// by its epoch (omitted if it is 0). During a rotation, a second line has the previous key.
#[derive(Clone)]
pub struct TunnelSecret {
    current: PrivateKey,
    epoch: u32,
    previous: Option<PrivateKey>,
}

impl std::fmt::Debug for TunnelSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TunnelSecret({})", self.public())
    }
}

impl TunnelSecret {
    /// Reads the keys, or creates a key if there is no file.
    ///
    /// # Errors
    ///
    /// [`Damaged`] if the file is invalid, or other users can read it; otherwise it cannot be read or written.
    pub fn load_or_create(path: &Path) -> anyhow::Result<Self> {
        if let Some(text) = read_secret(path)? {
            return Self::from_text(&text).with_context(|| {
                Damaged(format!(
                    "{}: invalid tunnel key: restore the file, or delete it to create a new key, which the other hosts \
                     learn",
                    path.display()
                ))
            });
        }
        let fresh = Self { current: new_private_key()?, epoch: 0, previous: None };
        ovl_files::create(path, fresh.to_text().as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        let Some(text) = read_secret(path)? else { bail!("{} was deleted meanwhile", path.display()) };
        Self::from_text(&text)
    }

    /// Writes the keys to disk.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        ovl_files::replace_shared(path, self.to_text().as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Replaces the current key by a new one.
    ///
    /// # Errors
    ///
    /// The kernel returns no random numbers.
    pub fn with_new_key(&self) -> anyhow::Result<Self> {
        Ok(Self { current: new_private_key()?, ..self.clone() })
    }

    /// Sets the epoch. `before` is the previous epoch if it is still in use; its key is kept as the previous key.
    pub fn with_epoch(&self, epoch: u32, before: Option<&Self>) -> Self {
        Self { current: self.current.clone(), epoch, previous: before.map(|before| before.current.clone()) }
    }

    /// Drops the previous key, at the end of a rotation.
    pub fn without_previous(&self) -> Self {
        Self { previous: None, ..self.clone() }
    }

    /// The public half of the current key.
    pub fn public(&self) -> TunnelKey {
        TunnelKey(ovl_tunnel::public_key(&self.current))
    }

    /// The public half of the previous key; `None` if there is no rotation.
    pub fn previous(&self) -> Option<TunnelKey> {
        self.previous.as_ref().map(|key| TunnelKey(ovl_tunnel::public_key(key)))
    }

    /// The epoch of the current key.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The private keys, for the tunnel devices.
    pub fn private(&self) -> Vec<PrivateKey> {
        std::iter::once(&self.current).chain(&self.previous).cloned().collect()
    }

    fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(128));
        BASE64.encode_append(&self.current.0, &mut text);
        if self.epoch != 0 {
            text.push(' ');
            text.push_str(&self.epoch.to_string());
        }
        text.push('\n');
        if let Some(previous) = &self.previous {
            BASE64.encode_append(&previous.0, &mut text);
            text.push('\n');
        }
        text
    }

    fn from_text(text: &[u8]) -> anyhow::Result<Self> {
        // The errors do not show the text: it may be most of a key.
        let key = |line: &[u8]| {
            let bytes = BASE64.decode(line).ok().map(Zeroizing::new);
            let bytes = bytes.and_then(|bytes| bytes.as_slice().try_into().ok());
            bytes.map(PrivateKey).context("not 32 bytes in base64")
        };
        let mut lines = text.trim_ascii().split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let mut first = lines.next().unwrap_or_default().splitn(2, |byte| *byte == b' ');
        let current = key(first.next().unwrap_or_default())?;
        let epoch = match first.next() {
            Some(epoch) => {
                std::str::from_utf8(epoch)?.parse().context("the epoch after the key is not a number")?
            }
            None => 0,
        };
        let previous = lines.next().map(key).transpose()?;
        if lines.next().is_some() {
            bail!("more than two lines");
        }
        Ok(Self { current, epoch, previous })
    }
}

fn new_private_key() -> anyhow::Result<PrivateKey> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| anyhow::anyhow!("cannot create a tunnel key: the kernel returned no random numbers"))?;
    // Clamping: RFC 7748, section 5.
    let [first, .., last] = &mut bytes;
    *first &= 248;
    *last = *last & 127 | 64;
    Ok(PrivateKey(bytes))
}

/// Whether a signature of a body is valid for a key and a purpose.
pub fn verify(key: &PublicKey, domain: Domain, body: &[u8], signature: &Signature) -> bool {
    let message = domain.message(body);
    let verify = || UnparsedPublicKey::new(&ED25519, key).verify(&message, &signature.0).is_ok();
    verified::is_valid(key, &message, signature, verify)
}

/// The id of the host with a public key.
pub fn node_id(key: &PublicKey) -> NodeId {
    let [a, b, c, d, e, f, g, h, i, j, ..] = sha256(key);
    NodeId([a, b, c, d, e, f, g, h, i, j])
}

/// The reason why a record is invalid.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be decoded.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The id is not the hash of the public key.
    #[error("record of host {0}: the id does not match the public key in the record")]
    Id(NodeId),
    /// The signature is invalid.
    #[error("record of host {0}: invalid signature")]
    Signature(NodeId),
    /// The signature is valid, and a later release wrote what this one must not act on without knowing it.
    #[error("record of host {} ({}): a later release of ovld wrote it, and this one does not know {why}", head.name, head.id)]
    NotUnderstood {
        /// What every release can read.
        head: Box<RecordHead>,
        /// What is not known.
        why: String,
    },
    /// The signature is valid, but a field is not.
    #[error("record of host {0}: {1}")]
    Field(NodeId, &'static str),
}

/// Decodes a record and validates its id, signature and fields.
///
/// # Errors
///
/// The first check that fails.
pub fn open_record(signed: &SignedRecord) -> Result<NodeRecord, RecordError> {
    let head = signed.head()?;
    if node_id(&head.public_key) != head.id {
        return Err(RecordError::Id(head.id));
    }
    if !verify(&head.public_key, Domain::Record, &signed.body, &signed.signature) {
        return Err(RecordError::Signature(head.id));
    }
    checked(head, signed)
}

/// Decodes and checks a record whose signature was verified before, which costs 110 us.
///
/// # Errors
///
/// As [`open_record`], except for the signature and the id.
pub(crate) fn reopen_record(signed: &SignedRecord) -> Result<NodeRecord, RecordError> {
    checked(signed.head()?, signed)
}

/// Decodes a record with this head and validates its fields.
fn checked(head: RecordHead, signed: &SignedRecord) -> Result<NodeRecord, RecordError> {
    let id = head.id;
    if let Some(what) = invalid_head(&head) {
        return Err(RecordError::Field(id, what));
    }
    let record = match signed.record() {
        Ok(record) => record,
        Err(WireError::NotUnderstood(why)) => {
            return Err(RecordError::NotUnderstood { head: Box::new(head), why });
        }
        Err(error) => return Err(error.into()),
    };
    match invalid_field(&record) {
        Some(what) => Err(RecordError::Field(id, what)),
        None => Ok(record),
    }
}

/// Whether a host name is valid: 1 to 63 letters, digits, dots, underscores and hyphens.
pub fn is_node_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Describes the first invalid field of the part of a record that every release can read. `None` if all are valid.
fn invalid_head(head: &RecordHead) -> Option<&'static str> {
    if !is_node_name(&head.name) {
        return Some("invalid name: 1 to 63 letters, digits, '.', '_' and '-' are allowed");
    }
    if !is_host(head.address.ip()) || head.address.port() == 0 {
        return Some("the gossip address is not a host address with a port");
    }
    if named_by(head.address.ip()).is_some_and(|host| host != head.id) {
        return Some("the gossip address names another host");
    }
    if head.version.len() > 32 || !head.version.bytes().all(|b| b.is_ascii_graphic()) {
        return Some("the version is not at most 32 printable ASCII characters");
    }
    (head.wire.oldest > head.wire.newest).then_some("the oldest wire version is above the newest one")
}

/// Describes the first invalid field of the rest of a record. `None` if all are valid.
fn invalid_field(record: &NodeRecord) -> Option<&'static str> {
    if !is_host(record.vtep) {
        return Some("the VTEP is not a host address");
    }
    if record.vxlan_port == 0 {
        return Some("the VXLAN port is 0");
    }
    if record.tunnel.is_some_and(|tunnel| tunnel.port == 0 || tunnel.key.0 == [0; 32]) {
        return Some("the tunnel has no port or no key");
    }
    // Every IPv4 host must accept datagrams of 576 bytes (RFC 791, section 3.1).
    if record.link_mtu < 576 {
        return Some("the link MTU is below 576");
    }
    if record.keys.opens.len() > MAX_OTHER_KEYS {
        return Some("too many cluster keys");
    }
    if record.further.len() > MAX_FURTHER {
        return Some("too many further addresses");
    }
    let is_dialled = |at: &SocketAddr| is_host(at.ip()) && at.port() != 0 && named_by(at.ip()).is_none();
    let all: HashSet<SocketAddr> = record.addresses().collect();
    if !record.further.iter().all(is_dialled) || all.len() != record.further.len() + 1 {
        return Some("a further address is not one of a host with a port, or is there twice");
    }
    if !is_zone(&record.zone) {
        return Some("invalid zone: at most 63 letters, digits, '.', '_' and '-' are allowed");
    }
    None
}

fn is_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

/// Reads a file that only its owner may access. `None` if there is no file. The content is overwritten when it is dropped.
fn read_secret(path: &Path) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    let metadata = file.metadata().with_context(|| format!("cannot inspect {}", path.display()))?;
    if !metadata.is_file() {
        return Err(Damaged(format!("{} is not a regular file", path.display())).into());
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Damaged(format!(
            "{path} can be read or written by other users (mode {mode:04o}): run 'chmod 600 {path}', and create a new \
             key if another user may have read it",
            path = path.display()
        ))
        .into());
    }
    // With its final capacity: a vector that grows leaves copies behind.
    let mut content = Zeroizing::new(Vec::with_capacity(MAX_SECRET_FILE as usize + 1));
    file.take(MAX_SECRET_FILE + 1)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if content.len() as u64 > MAX_SECRET_FILE {
        let text =
            format!("{} is larger than {MAX_SECRET_FILE} bytes, so it is not a key file", path.display());
        return Err(Damaged(text).into());
    }
    Ok(Some(content))
}

/// A valid record of a host, for tests.
#[cfg(any(test, fuzzing))]
pub(crate) fn sample_record(identity: &Identity) -> NodeRecord {
    NodeRecord {
        id: identity.id(),
        public_key: *identity.public_key(),
        name: "alpha".to_owned(),
        generation: 1,
        revision: 1,
        cluster: 0,
        address: ([127, 0, 0, 1], 7940).into(),
        vtep: [127, 0, 0, 1].into(),
        vxlan_port: 4789,
        link_mtu: 1500,
        tunnel: None,
        keys: ovl_proto::record::ClusterKeys::default(),
        presence: ovl_proto::record::Presence::Running,
        version: "0.1.0".to_owned(),
        wire: ovl_proto::record::WireVersions::own(),
        probes: 0,
        not_built: Vec::new(),
        probe_kinds: 0,
        metrics_port: 0,
        zone: String::new(),
        mirrors: false,
        is_node: false,
        relay_port: 0,
        relays: false,
        further: Vec::new(),
        unknown: ovl_proto::wire::fields::Unknown::default(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
