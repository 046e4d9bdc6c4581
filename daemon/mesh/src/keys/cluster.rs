//! The cluster key: whoever has it may gossip. Every use derives a key of its own from it.

use std::path::Path;

use anyhow::{Context, bail};
use data_encoding::BASE64;
use ovl_files::sha256;
use ovl_proto::id::ClusterKeyId;
use ovl_proto::record::{ClusterKeys, MAX_OTHER_KEYS};
use ovl_proto::secret::Secret;
use ring::hmac;

use super::read_secret;

/// 32 secret bytes that all nodes of a cluster share.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey {
    bytes: [u8; 32],
    id: ClusterKeyId,
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

impl ClusterKey {
    /// Reads a key as `wg genkey` and `ovlctl key generate` write it: 44 characters of base 64.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let Some(content) = read_secret(path)? else {
            bail!("there is no cluster key at {}: make one with 'ovlctl key generate'", path.display())
        };
        Self::parse(&content).with_context(|| format!("{} does not hold a cluster key", path.display()))
    }

    /// The content of such a file. The error shows nothing of it.
    pub fn parse(content: &[u8]) -> anyhow::Result<Self> {
        let text = content.strip_suffix(b"\n").unwrap_or(content);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let bytes = decode_base64(text).context(
            "44 characters of base 64 are expected, as 'ovlctl key generate' and 'wg genkey' write them",
        )?;
        if bytes == [0; 32] {
            bail!("the key is all zeroes");
        }
        Ok(Self::new(bytes))
    }

    /// The content of a file with this key.
    pub fn to_text(&self) -> Secret<String> {
        Secret(BASE64.encode(&self.bytes) + "\n")
    }

    /// The key itself, to be kept or handed to a member.
    pub fn secret(&self) -> Secret<[u8; 32]> {
        Secret(self.bytes)
    }

    /// A key that everybody knows: `--insecure` runs the same code, and protects nothing.
    pub fn insecure() -> Self {
        Self::new(sha256(b"ovl insecure: everybody knows this key"))
    }

    /// From the bytes themselves.
    pub fn new(bytes: [u8; 32]) -> Self {
        let [a, b, c, d, ..] = hkdf(&bytes, b"", b"ovl key id v1");
        Self { bytes, id: ClusterKeyId([a, b, c, d]) }
    }

    /// What names the key on the wire, and tells nothing about it.
    pub fn id(&self) -> ClusterKeyId {
        self.id
    }

    /// A key for one purpose.
    pub fn derive(&self, salt: &[u8], purpose: &[u8]) -> [u8; 32] {
        hkdf(&self.bytes, salt, purpose)
    }
}

/// The keys that are in use; more than one while they are being rotated.
#[derive(Debug, Clone)]
pub struct Keyring {
    first: ClusterKey,
    others: Vec<ClusterKey>,
}

impl Keyring {
    /// The first key seals, and all of them open.
    pub fn new(first: ClusterKey, others: Vec<ClusterKey>) -> Self {
        Self { first, others }
    }

    /// The key for what this node sends.
    pub fn sealing(&self) -> &ClusterKey {
        &self.first
    }

    /// All keys, the one that seals first.
    pub fn all(&self) -> impl Iterator<Item = &ClusterKey> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// All keys of that id: ids are short, so two keys may share one.
    pub fn opening(&self, id: ClusterKeyId) -> impl Iterator<Item = &ClusterKey> {
        self.all().filter(move |key| key.id == id)
    }

    /// The key of that id.
    pub fn get(&self, id: ClusterKeyId) -> Option<&ClusterKey> {
        self.opening(id).next()
    }

    /// What the node's record says of it.
    pub fn ids(&self) -> ClusterKeys {
        ClusterKeys { seals: self.first.id, opens: self.others.iter().map(|key| key.id).collect() }
    }

    /// One that opens with this key too. Where there are too many the oldest of the others goes: it is
    /// left over from a rotation that the rest of the cluster has long finished.
    pub fn opening_too(&self, key: ClusterKey) -> Self {
        let mut others = self.others.clone();
        others.push(key);
        others.drain(..others.len().saturating_sub(MAX_OTHER_KEYS));
        Self::new(self.first.clone(), others)
    }

    /// One that seals with that one of its keys, and still opens with all.
    pub fn sealing_with(&self, id: ClusterKeyId) -> Option<Self> {
        let first = self.get(id)?.clone();
        let others = self.all().filter(|key| key.id != id).cloned().collect();
        Some(Self::new(first, others))
    }

    /// One without that key, which is not the one that seals.
    pub fn without(&self, id: ClusterKeyId) -> Self {
        Self::new(self.first.clone(), self.others.iter().filter(|key| key.id != id).cloned().collect())
    }

    /// One without all keys but the one that seals.
    pub fn alone(&self) -> Self {
        Self::new(self.first.clone(), Vec::new())
    }
}

/// HKDF-SHA256 (RFC 5869) for 32 bytes, which take one round: with nothing that could fail.
fn hkdf(secret: &[u8], salt: &[u8], info: &[u8]) -> [u8; 32] {
    let extracted = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), secret);
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, extracted.as_ref()));
    context.update(info);
    context.update(&[1]);
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(context.sign().as_ref()) {
        *to = *from;
    }
    out
}

/// Standard base 64 of exactly 32 bytes.
fn decode_base64(text: &[u8]) -> anyhow::Result<[u8; 32]> {
    let bytes = BASE64.decode(text).map_err(|_| anyhow::anyhow!("{} bytes that are not it", text.len()))?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| anyhow::anyhow!("it is {length} bytes in place of 32"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn hkdf_is_the_one_of_the_rfc() {
        // RFC 5869, test case 1: the first 32 of its 42 bytes.
        let salt: Vec<u8> = (0..=0x0c).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let expected = [
            0x3c, 0xb2, 0x5f, 0x25, 0xfa, 0xac, 0xd5, 0x7a, 0x90, 0x43, 0x4f, 0x64, 0xd0, 0x36, 0x2f, 0x2a,
            0x2d, 0x2d, 0x0a, 0x90, 0xcf, 0x1a, 0x5a, 0x4c, 0x5d, 0xb0, 0x2d, 0x56, 0xec, 0xc4, 0xc5, 0xbf,
        ];
        assert_eq!(hkdf(&[0x0b; 22], &salt, &info), expected);
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
    fn key_files_are_checked() {
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
    fn the_first_key_seals_and_all_open() {
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
        assert!(more.get(old.id()).is_none(), "the oldest one made room");
        assert_eq!(format!("{ring:?}"), "Keyring { first: ClusterKey(..), others: [ClusterKey(..)] }");
    }
}
