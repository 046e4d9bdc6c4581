//! `ovlctl key`

use std::fs::File;
use std::io::{self, Read};

use clap::Subcommand;
use serde_json::json;

use crate::context::Context;
use crate::error::{Error, Result};

/// Where the kernel's random generator is a file; this process is too short-lived to want more.
const RANDOM: &str = "/dev/urandom";

/// Arguments of `key`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print a fresh key, and nothing else: `ovlctl key generate > /etc/ovl/cluster.key`
    ///
    /// Give the same file to all hosts, readable by root alone. ovld is not asked.
    Generate,
}

/// Makes and prints.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    match args.action {
        Action::Generate => {
            let key = generate().map_err(|error| {
                Error::Failed(format!("cannot read {RANDOM}: {error}. Is /dev mounted in this container?"))
            })?;
            context.print(&json!({ "key": key }), |_| key.clone() + "\n")
        }
    }
}

fn generate() -> io::Result<String> {
    let mut key = [0; 32];
    File::open(RANDOM)?.read_exact(&mut key)?;
    Ok(base64(&key))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            // n bytes fill n + 1 digits.
            let digit = ALPHABET[bits >> (18 - 6 * place) & 63];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn two_keys_differ() {
        let (a, b) = (generate().unwrap(), generate().unwrap());
        assert_eq!((a.len(), &a[43..]), (44, "="));
        assert_ne!(a, b);
    }
}
