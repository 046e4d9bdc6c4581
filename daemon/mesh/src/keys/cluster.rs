//! The cluster key, which authorizes a host to gossip. Each use derives a key of its own from it.

use std::path::Path;

use anyhow::{Context, bail};
use data_encoding::BASE64;
use ovl_files::sha256;
use ovl_proto::id::ClusterKeyId;
use ovl_proto::record::{ClusterKeys, MAX_OTHER_KEYS};
use ovl_proto::secret::Secret;
use ring::hmac;
use zeroize::{Zeroize as _, Zeroizing};

use super::read_secret;

/// The cluster key: 32 secret bytes that all hosts of a cluster share. They are overwritten when it is dropped.
#[derive(Clone)]
pub struct ClusterKey {
    bytes: Zeroizing<[u8; 32]>,
    id: ClusterKeyId,
    /// Derived once, because there are dozens of probes a second.
    probes: hmac::Key,
}

impl PartialEq for ClusterKey {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for ClusterKey {}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

impl ClusterKey {
    /// Reads a key file as `wg genkey` and `ovlctl key generate` write it: 44 characters of base64.
    ///
    /// # Errors
    ///
    /// The file is absent, invalid, or accessible to other users.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let Some(content) = read_secret(path)? else {
            bail!("no cluster key at {}: create one with 'ovlctl key generate'", path.display())
        };
        Self::parse(&content).with_context(|| format!("{}: invalid cluster key", path.display()))
    }

    /// Parses the content of a key file.
    ///
    /// # Errors
    ///
    /// The content is not a key. The error does not show the content.
    pub fn parse(content: &[u8]) -> anyhow::Result<Self> {
        let text = content.strip_suffix(b"\n").unwrap_or(content);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let bytes = decode_base64(text).context(
            "expected 44 characters of base64, as 'ovlctl key generate' and 'wg genkey' write them",
        )?;
        if *bytes == [0; 32] {
            bail!("the key is all zeroes");
        }
        Ok(Self::new(*bytes))
    }

    /// Formats the key as the content of a key file.
    pub fn to_text(&self) -> Secret<String> {
        Secret(BASE64.encode(&*self.bytes) + "\n")
    }

    /// The bytes of the key, to be stored or sent to a member.
    pub fn secret(&self) -> Secret<[u8; 32]> {
        Secret(*self.bytes)
    }

    /// The public key of `--insecure`: the same code runs, without protection.
    pub fn insecure() -> Self {
        Self::new(sha256(b"ovl insecure: everybody knows this key"))
    }

    /// Creates a key from its bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        let bytes = Zeroizing::new(bytes);
        let [a, b, c, d, ..] = *hkdf(&*bytes, b"", b"ovl key id v1");
        let probes = hmac::Key::new(hmac::HMAC_SHA256, &*hkdf(&*bytes, b"", b"ovl path probe v1"));
        Self { bytes, id: ClusterKeyId([a, b, c, d]), probes }
    }

    /// The public id of the key, which is derived from it and does not disclose it.
    pub fn id(&self) -> ClusterKeyId {
        self.id
    }

    /// A hash of the key, of which no second key is ever found. Unlike the id, it identifies the key to a host that
    /// knows only the hash.
    pub fn commitment(&self) -> [u8; 16] {
        let mut commitment = [0; 16];
        let whole = hkdf(&*self.bytes, b"", b"ovl key commitment v1");
        commitment.iter_mut().zip(whole.iter()).for_each(|(to, from)| *to = *from);
        commitment
    }

    /// The key that authenticates path probes.
    pub fn probes(&self) -> &hmac::Key {
        &self.probes
    }

    /// Derives a key for one purpose.
    pub fn derive(&self, salt: &[u8], purpose: &[u8]) -> Zeroizing<[u8; 32]> {
        hkdf(&*self.bytes, salt, purpose)
    }
}

/// The cluster keys in use: more than one during a rotation.
#[derive(Debug, Clone)]
pub struct Keyring {
    first: ClusterKey,
    others: Vec<ClusterKey>,
}

impl Keyring {
    /// Creates a keyring. The first key seals, and all keys open.
    pub fn new(first: ClusterKey, others: Vec<ClusterKey>) -> Self {
        Self { first, others }
    }

    /// The key that seals.
    pub fn sealing(&self) -> &ClusterKey {
        &self.first
    }

    /// All keys, the one that seals first.
    pub fn all(&self) -> impl Iterator<Item = &ClusterKey> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// The keys with an id. Ids are short, so two keys may have the same.
    pub fn opening(&self, id: ClusterKeyId) -> impl Iterator<Item = &ClusterKey> {
        self.all().filter(move |key| key.id == id)
    }

    /// The first key with an id; `None` if there is none.
    pub fn get(&self, id: ClusterKeyId) -> Option<&ClusterKey> {
        self.opening(id).next()
    }

    /// The ids of the keys, for the record of the host.
    pub fn ids(&self) -> ClusterKeys {
        ClusterKeys { seals: self.first.id, opens: self.others.iter().map(|key| key.id).collect() }
    }

    /// Adds a key that opens. If there are too many, the oldest is dropped: it is left from a rotation that the rest of
    /// the cluster finished long ago.
    pub fn opening_too(&self, key: ClusterKey) -> Self {
        let mut others = self.others.clone();
        others.push(key);
        others.drain(..others.len().saturating_sub(MAX_OTHER_KEYS));
        Self::new(self.first.clone(), others)
    }

    /// Selects another of its keys as the one that seals. All keys still open. `None` if it has no such key.
    pub fn sealing_with(&self, id: ClusterKeyId) -> Option<Self> {
        let first = self.get(id)?.clone();
        let others = self.all().filter(|key| key.id != id).cloned().collect();
        Some(Self::new(first, others))
    }

    /// Drops a key that does not seal.
    pub fn without(&self, id: ClusterKeyId) -> Self {
        Self::new(self.first.clone(), self.others.iter().filter(|key| key.id != id).cloned().collect())
    }

    /// Drops all keys except the one that seals.
    pub fn alone(&self) -> Self {
        Self::new(self.first.clone(), Vec::new())
    }
}

/// HKDF-SHA256 (RFC 5869) with an output of 32 bytes: one round of the expansion, which cannot fail.
fn hkdf(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let extracted = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), secret);
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, extracted.as_ref()));
    context.update(info);
    context.update(&[1]);
    let mut out = Zeroizing::new([0; 32]);
    for (to, from) in out.iter_mut().zip(context.sign().as_ref()) {
        *to = *from;
    }
    out
}

/// Decodes standard base64 of exactly 32 bytes.
fn decode_base64(text: &[u8]) -> anyhow::Result<Zeroizing<[u8; 32]>> {
    let mut bytes =
        BASE64.decode(text).map_err(|_| anyhow::anyhow!("the {} bytes are not base64", text.len()))?;
    let decoded = <[u8; 32]>::try_from(bytes.as_slice());
    let length = bytes.len();
    bytes.zeroize();
    decoded.map(Zeroizing::new).map_err(|_| anyhow::anyhow!("the key has {length} bytes, not 32"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn hkdf_matches_the_test_vector_of_the_rfc() {
        // RFC 5869, test case 1: the first 32 of its 42 bytes.
        let salt: Vec<u8> = (0..=0x0c).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let expected = [
            0x3c, 0xb2, 0x5f, 0x25, 0xfa, 0xac, 0xd5, 0x7a, 0x90, 0x43, 0x4f, 0x64, 0xd0, 0x36, 0x2f, 0x2a,
            0x2d, 0x2d, 0x0a, 0x90, 0xcf, 0x1a, 0x5a, 0x4c, 0x5d, 0xb0, 0x2d, 0x56, 0xec, 0xc4, 0xc5, 0xbf,
        ];
        assert_eq!(*hkdf(&[0x0b; 22], &salt, &info), expected);
    }

    #[test]
    fn base64_is_strict() {
        let text = b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let expected: Vec<u8> = (0..32).collect();
        assert_eq!(decode_base64(text).unwrap().to_vec(), expected);
        for bad in [
            &b""[..],
            b"=",
            &text[..43],
            &text[1..],
            b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9=",
            b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-=",
            b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8==",
        ] {
            assert!(decode_base64(bad).is_err());
        }
    }

    #[test]
    fn key_files_are_validated() {
        let dir = std::env::temp_dir().join(format!("ovl-key-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("key");
        let write = |content: &str, mode: u32| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        assert!(ClusterKey::read(&path).unwrap_err().to_string().contains("key generate"));
        let good = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n";
        write(good, 0o644);
        assert!(ClusterKey::read(&path).unwrap_err().to_string().contains("chmod 600"));
        write(good, 0o400);
        let key = ClusterKey::read(&path);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_ne!(key.unwrap().id(), ClusterKey::insecure().id());
        for bad in ["", "\n", &good[..40], "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", &"A".repeat(5000)]
        {
            write(bad, 0o600);
            assert!(ClusterKey::read(&path).is_err());
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn first_key_seals_and_all_keys_open() {
        let (old, new) = (ClusterKey::new([1; 32]), ClusterKey::new([2; 32]));
        let ring = Keyring::new(new.clone(), vec![old.clone()]);
        assert_eq!(ring.sealing().id(), new.id());
        assert_eq!(ring.opening(old.id()).count(), 1);
        assert_eq!(ring.opening(ClusterKey::insecure().id()).count(), 0);
        assert_eq!(ring.ids(), ClusterKeys { seals: new.id(), opens: vec![old.id()] });
        assert_eq!(ring.sealing_with(old.id()).unwrap().ids().seals, old.id());
        assert_eq!(ring.alone().ids().opens, []);
        let more = ring.opening_too(ClusterKey::new([3; 32])).opening_too(ClusterKey::new([4; 32]));
        assert_eq!((more.sealing().id(), more.all().count()), (new.id(), 1 + MAX_OTHER_KEYS));
        assert!(more.get(old.id()).is_none(), "the oldest key is dropped");
        assert_eq!(format!("{ring:?}"), "Keyring { first: ClusterKey(..), others: [ClusterKey(..)] }");
    }
}
