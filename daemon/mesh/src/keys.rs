//! Who a node is (an Ed25519 key pair), what it signs, and the keys that all nodes of a cluster share.
//!
//! Nothing secret has a `Debug` that shows it, and every file with a secret is refused when others
//! can read it: such a secret must be taken for known.

mod cluster;
mod keyfile;

use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use data_encoding::BASE64;
use ovl_files::{Damaged, sha256};
use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::record::{Domain, MAX_OTHER_KEYS, NodeRecord, PublicKey, Signature, SignedRecord};
use ovl_proto::wire::{self, WireError};
use ovl_tunnel::PrivateKey;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

pub use cluster::{ClusterKey, Keyring};
pub use keyfile::KeyFile;

/// A file with a secret is never larger than this.
const MAX_SECRET_FILE: u64 = 4096;

/// The node's key pair.
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
    /// Reads the key pair, or makes it where there is no file yet. A file that is there and is not
    /// good is an error, and never replaced: the node would become another one.
    pub fn load_or_create(path: &Path) -> anyhow::Result<Self> {
        if let Some(document) = read_secret(path)? {
            return Self::from_pkcs8(&document).with_context(|| {
                Damaged(format!(
                    "{} does not hold this node's key pair (cut short, or overwritten); restore it, or remove \
                     it to make this host a new node",
                    path.display()
                ))
            });
        }
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| anyhow::anyhow!("the kernel gave no random numbers"))?;
        ovl_files::create(path, document.as_ref())
            .with_context(|| format!("cannot write {}", path.display()))?;
        // Read back what is there: if two daemons start at once, the first one's file counts.
        let Some(document) = read_secret(path)? else { bail!("{} vanished", path.display()) };
        Self::from_pkcs8(&document)
    }

    /// One that is kept nowhere, for tests.
    #[cfg(test)]
    pub fn ephemeral() -> Self {
        Self::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap().as_ref()).unwrap()
    }

    /// From the content of a file, for tests.
    #[cfg(test)]
    pub fn from_pkcs8_for_tests(document: &[u8]) -> Self {
        Self::from_pkcs8(document).unwrap()
    }

    /// The hash of the public key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// What checks this node's signatures.
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// Signs for one purpose.
    pub fn sign(&self, domain: Domain, body: &[u8]) -> Signature {
        let signature = self.pair.sign(&domain.message(body));
        let mut bytes = [0; 64];
        for (to, from) in bytes.iter_mut().zip(signature.as_ref()) {
            *to = *from;
        }
        Signature(bytes)
    }

    /// Encodes and signs the node's own record.
    pub fn sign_record(&self, record: &NodeRecord) -> Result<SignedRecord, WireError> {
        let body = wire::encode_body(record)?;
        let signature = self.sign(Domain::Record, &body);
        Ok(SignedRecord { body, signature })
    }

    fn from_pkcs8(document: &[u8]) -> anyhow::Result<Self> {
        // Checks that the public key in the file belongs to the private one.
        let pair = Ed25519KeyPair::from_pkcs8(document)
            .map_err(|error| anyhow::anyhow!("no Ed25519 key: {error}"))?;
        let public: PublicKey = pair.public_key().as_ref().try_into()?;
        Ok(Self { id: node_id(&public), pair, public })
    }
}

/// The private keys of this host's end of the tunnel, as they are on the disk: a line for the key, as `wg genkey`
/// writes it, with the epoch after it (0 is left out); while it moves to that epoch a line for the key before it.
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
    /// Reads the keys, or makes one where there is no file yet. One that is there and is not good is an error.
    pub fn load_or_create(path: &Path) -> anyhow::Result<Self> {
        if let Some(text) = read_secret(path)? {
            return Self::from_text(&text).with_context(|| {
                Damaged(format!(
                    "{} does not hold a tunnel key; restore it, or remove it: the other hosts learn the new one",
                    path.display()
                ))
            });
        }
        let fresh = Self { current: new_private_key()?, epoch: 0, previous: None };
        ovl_files::create(path, fresh.to_text().as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        let Some(text) = read_secret(path)? else { bail!("{} vanished", path.display()) };
        Self::from_text(&text)
    }

    /// Puts them on the disk.
    pub fn keep(&self, path: &Path) -> anyhow::Result<()> {
        ovl_files::replace_shared(path, self.to_text().as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// A new key.
    pub fn renewed(&self) -> anyhow::Result<Self> {
        Ok(Self { current: new_private_key()?, ..self.clone() })
    }

    /// In another epoch; where the one before is still there, its key is kept.
    pub fn moved(&self, epoch: u32, before: Option<&Self>) -> Self {
        Self { current: self.current.clone(), epoch, previous: before.map(|before| before.current.clone()) }
    }

    /// The end of a move.
    pub fn settled(&self) -> Self {
        Self { previous: None, ..self.clone() }
    }

    /// The public half.
    pub fn public(&self) -> TunnelKey {
        TunnelKey(ovl_tunnel::public_key(&self.current))
    }

    /// That of the key before, during a move.
    pub fn previous(&self) -> Option<TunnelKey> {
        self.previous.as_ref().map(|key| TunnelKey(ovl_tunnel::public_key(key)))
    }

    /// The epoch of the current key: whoever moves the tunnel decides when the next one begins.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The private halves, for who opens the tunnel.
    pub fn private(&self) -> Vec<PrivateKey> {
        std::iter::once(&self.current).chain(&self.previous).cloned().collect()
    }

    fn to_text(&self) -> String {
        let line = |key: &PrivateKey| BASE64.encode(&key.0);
        let epoch = if self.epoch == 0 { String::new() } else { format!(" {}", self.epoch) };
        let previous = self.previous.as_ref().map(|key| line(key) + "\n").unwrap_or_default();
        format!("{}{epoch}\n{previous}", line(&self.current))
    }

    fn from_text(text: &[u8]) -> anyhow::Result<Self> {
        // What is wrong with it is not said: it may be most of a key.
        let key = |line: &[u8]| {
            let bytes = BASE64.decode(line).ok().and_then(|bytes| bytes.try_into().ok());
            bytes.map(PrivateKey).context("not 32 bytes in base64")
        };
        let mut lines = text.trim_ascii().split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let mut first = lines.next().unwrap_or_default().splitn(2, |byte| *byte == b' ');
        let current = key(first.next().unwrap_or_default())?;
        let epoch = match first.next() {
            Some(epoch) => std::str::from_utf8(epoch)?.parse().context("no number after the key")?,
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
    SystemRandom::new().fill(&mut bytes).map_err(|_| anyhow::anyhow!("the kernel gave no random numbers"))?;
    // RFC 7748, section 5.
    let [first, .., last] = &mut bytes;
    *first &= 248;
    *last = *last & 127 | 64;
    Ok(PrivateKey(bytes))
}

/// Whether the signature is by that key, over that body, for that purpose.
pub fn verify(key: &PublicKey, domain: Domain, body: &[u8], signature: &Signature) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(&domain.message(body), &signature.0).is_ok()
}

/// The id that belongs to a public key.
pub fn node_id(key: &PublicKey) -> NodeId {
    let [a, b, c, d, e, f, g, h, i, j, ..] = sha256(key);
    NodeId([a, b, c, d, e, f, g, h, i, j])
}

/// Why a node record is not believed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Not a record.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The id is not that of the key.
    #[error("the node id {0} does not belong to the key in the record")]
    Id(NodeId),
    /// Not signed by the key inside.
    #[error("the record of {0} is not signed by its key")]
    Signature(NodeId),
    /// Signed, and nonsense all the same.
    #[error("the record of {0} is not usable: {1}")]
    Field(NodeId, &'static str),
}

/// Decodes a record and checks all that can be checked without knowing anything else.
pub fn open_record(signed: &SignedRecord) -> Result<NodeRecord, RecordError> {
    let record = signed.record()?;
    let id = record.id;
    if node_id(&record.public_key) != id {
        return Err(RecordError::Id(id));
    }
    if !verify(&record.public_key, Domain::Record, &signed.body, &signed.signature) {
        return Err(RecordError::Signature(id));
    }
    match nonsense(&record) {
        Some(what) => Err(RecordError::Field(id, what)),
        None => Ok(record),
    }
}

/// Whether a node may be called so: 1 to 63 letters, digits, dots, underscores and hyphens.
pub fn is_node_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn nonsense(record: &NodeRecord) -> Option<&'static str> {
    if !is_node_name(&record.name) {
        return Some("its name is not 1 to 63 letters, digits, '.', '_' and '-'");
    }
    if !is_host(record.vtep) {
        return Some("its VTEP is not the address of a host");
    }
    if !is_host(record.address.ip()) || record.address.port() == 0 {
        return Some("its gossip address is not that of a host");
    }
    if record.vxlan_port == 0 {
        return Some("its VXLAN port is 0");
    }
    if record.tunnel.is_some_and(|tunnel| tunnel.port == 0 || tunnel.key.0 == [0; 32]) {
        return Some("its end of the tunnel has no port or no key");
    }
    // IPv4 asks of every host that it takes 576 bytes.
    if record.link_mtu < 576 {
        return Some("its link MTU is below 576");
    }
    if record.keys.opens.len() > MAX_OTHER_KEYS {
        return Some("it has too many cluster keys");
    }
    if record.version.len() > 32 || !record.version.bytes().all(|b| b.is_ascii_graphic()) {
        return Some("its version is not short plain text");
    }
    None
}

fn is_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

/// The content of a file that only its owner can read; nothing if there is no such file.
fn read_secret(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    let metadata = file.metadata().with_context(|| format!("cannot inspect {}", path.display()))?;
    if !metadata.is_file() {
        bail!("{} is not a regular file", path.display());
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        bail!(
            "{path} can be read or written by others (mode {mode:04o}): run 'chmod 600 {path}', and make a new key if \
             anybody may have read it",
            path = path.display()
        );
    }
    let mut content = Vec::new();
    file.take(MAX_SECRET_FILE + 1)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if content.len() as u64 > MAX_SECRET_FILE {
        bail!("{} is too large to be a key", path.display());
    }
    Ok(Some(content))
}

#[cfg(test)]
mod tests;
