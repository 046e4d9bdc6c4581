//! The cluster key: whoever has it may gossip. Every use derives a key of its own from it.

use std::path::Path;

use anyhow::{Context, bail};
use ring::hmac;

use super::{read_secret, sha256};

/// Tells receivers which key of theirs a frame is sealed with.
pub(crate) type KeyId = [u8; 4];

/// 32 secret bytes that all nodes of a cluster share.
#[derive(Clone)]
pub(crate) struct ClusterKey {
    bytes: [u8; 32],
    id: KeyId,
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

impl ClusterKey {
    /// Reads a key as `wg genkey` and `ovlctl key generate` write it: 44 characters of base 64.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let Some(content) = read_secret(path)? else {
            bail!("there is no cluster key at {}: make one with 'ovlctl key generate'", path.display())
        };
        let text = content.strip_suffix(b"\n").unwrap_or(&content);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let bytes = decode_base64(text).with_context(|| {
            format!(
                "{} does not hold a cluster key: 44 characters of base 64 are expected, as 'ovlctl key generate' and \
                 'wg genkey' write them",
                path.display()
            )
        })?;
        if bytes == [0; 32] {
            bail!("the cluster key in {} is all zeroes", path.display());
        }
        Ok(Self::new(bytes))
    }

    /// A key that everybody knows: `--insecure` runs the same code, and protects nothing.
    pub(crate) fn insecure() -> Self {
        Self::new(sha256(b"ovl insecure: everybody knows this key"))
    }

    /// From the bytes themselves.
    pub(crate) fn new(bytes: [u8; 32]) -> Self {
        let [a, b, c, d, ..] = hkdf(&bytes, b"", b"ovl key id v1");
        Self { bytes, id: [a, b, c, d] }
    }

    /// What names the key on the wire, and tells nothing about it.
    pub(crate) fn id(&self) -> KeyId {
        self.id
    }

    /// A key for one purpose.
    pub(crate) fn derive(&self, salt: &[u8], purpose: &[u8]) -> [u8; 32] {
        hkdf(&self.bytes, salt, purpose)
    }
}

/// The keys that are in use; more than one while they are being rotated.
#[derive(Debug, Clone)]
pub(crate) struct Keyring {
    first: ClusterKey,
    others: Vec<ClusterKey>,
}

impl Keyring {
    /// The first key seals, and all of them open.
    pub(crate) fn new(first: ClusterKey, others: Vec<ClusterKey>) -> Self {
        Self { first, others }
    }

    /// The key for what this node sends.
    pub(crate) fn sealing(&self) -> &ClusterKey {
        &self.first
    }

    /// All keys of that id: ids are short, so two keys may share one.
    pub(crate) fn opening(&self, id: KeyId) -> impl Iterator<Item = &ClusterKey> {
        std::iter::once(&self.first).chain(&self.others).filter(move |key| key.id == id)
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
    let Some((b"=", digits)) = text.split_last().map(|(last, rest)| (std::slice::from_ref(last), rest))
    else {
        bail!("{} characters, and no '=' at the end", text.len())
    };
    if digits.len() != 43 {
        bail!("{} characters in place of 44", text.len());
    }
    let mut out = [0_u8; 32];
    let mut bytes = out.iter_mut();
    let (mut bits, mut count) = (0_u32, 0_u32);
    for &digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("a character that is not base 64"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            if let Some(byte) = bytes.next() {
                *byte = (bits >> count) as u8;
            }
            bits &= (1 << count) - 1;
        }
    }
    if bits != 0 {
        bail!("bits left over at the end");
    }
    Ok(out)
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
        assert_eq!(format!("{ring:?}"), "Keyring { first: ClusterKey(..), others: [ClusterKey(..)] }");
    }
}
