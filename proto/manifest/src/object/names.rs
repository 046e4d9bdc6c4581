//! The syntax of names in Kubernetes.
//!
//! The API server bounds a label that stands alone by 63 characters, but the labels of a subdomain name only by the whole
//! name's 253. So a valid name of a Pod, a slice or a policy need not be a valid name in DNS.

pub(crate) const LABEL: &str =
    "not a DNS label: at most 63 lower-case letters, digits and '-', a letter or digit first and last";
pub(crate) const SUBDOMAIN: &str = "not a subdomain name: at most 253 lower-case letters, digits, '-' and '.', each part between dots begins \
     and ends with a letter or digit";
pub(crate) const LABEL_KEY: &str = "not a label key: at most 63 letters, digits, '-', '_' and '.', a letter or \
     digit first and last, optionally after a subdomain name and a '/'";
pub(crate) const LABEL_VALUE: &str =
    "not a label value: at most 63 letters, digits, '-', '_' and '.', a letter or digit first and last";
pub(crate) const PORT_NAME: &str = "not a port name: at most 15 lower-case letters, digits and '-', at least one letter, no '-' first, last or twice in a row";
pub(crate) const DOMAIN_NAME: &str =
    "not a domain name such as www.example.com, or *.example.com for all names below one";

/// Whether a text is a domain name of at least two labels, or one with a wildcard for labels on the left, as the peers of
/// ClusterNetworkPolicies have them. The API's pattern lets some more characters begin a label than one would expect (`A-z`).
pub(crate) fn is_domain_name(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        let begins = label.starts_with(|c: char| c.is_ascii_alphanumeric() || "[\\]^_`".contains(c));
        let ends = label.len() == 1 || label.ends_with(|c: char| c.is_ascii_alphanumeric());
        let mut others = label.chars().skip(1);
        begins
            && ends
            && label.len() <= 63
            && others.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    };
    name.len() <= 253 && name.contains('.') && name.split('.').all(is_label)
}

/// Whether a name is a DNS-1123 label.
pub(crate) fn is_label(name: &str) -> bool {
    name.len() <= 63 && is_part(name)
}

/// Whether a name is a DNS-1123 subdomain as the API server checks it: its parts may be longer than labels of DNS.
pub(crate) fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_part)
}

/// Whether a text has the characters of a DNS-1123 label, whatever its length.
fn is_part(text: &str) -> bool {
    is_framed(text, |c| c.is_ascii_lowercase() || c.is_ascii_digit(), |c| c == '-')
}

pub(crate) fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(is_subdomain) && !name.is_empty() && is_label_value(name)
}

pub(crate) fn is_label_value(value: &str) -> bool {
    value.is_empty()
        || value.len() <= 63
            && is_framed(value, |c| c.is_ascii_alphanumeric(), |c| matches!(c, '-' | '_' | '.'))
}

/// Whether a name is an IANA service name (RFC 6335, section 5.1) in lower case.
pub(crate) fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && is_label(name)
        && !name.contains("--")
        && name.contains(|c: char| c.is_ascii_lowercase())
}

/// Whether a name is not empty, has `outer` characters first and last, and only `outer` or `inner` ones between them.
fn is_framed(name: &str, outer: impl Fn(char) -> bool, inner: impl Fn(char) -> bool) -> bool {
    name.starts_with(&outer) && name.ends_with(&outer) && name.chars().all(|c| outer(c) || inner(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_names_are_those_of_the_api() {
        for good in ["a.b", "*.a.b", "www.Example.com.", "_dmarc.x.y", "a_b-c.d0", "0.1"] {
            assert!(is_domain_name(good), "{good}");
        }
        let long = format!("{}.b", "a".repeat(64));
        for bad in ["", "a", "*.com", "*", "a.*.b", "*a.b.c", "a..b", "-a.b", "a-.b", "a.b..", "a b.c", &long]
        {
            assert!(!is_domain_name(bad), "{bad}");
        }
    }
}
