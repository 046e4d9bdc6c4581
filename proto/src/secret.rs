//! A wrapper for secrets that keeps them out of logs.

use serde::{Deserialize, Serialize};

/// A secret that travels over an encrypted stream or the control socket. Its `Debug` output hides the value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret<T>(pub T);

impl<T> std::fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_the_secret_and_json_contains_it() {
        let secret = Secret("xyzzy".to_owned());
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"xyzzy\"");
    }
}
