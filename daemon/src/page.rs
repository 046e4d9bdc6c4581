//! The page that shows the cluster to a browser: its files, its API, and who may see it. `docs/page.md` describes it.
//!
//! Nothing here does I/O but for the file of the token. `node::page` answers what [`wanted`] understands.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HOST, HeaderName};
use ovl_proto::resource::Protocol;
use ovl_proto::secret::Secret;
use subtle::ConstantTimeEq as _;

use crate::events::Period;
use crate::web::Asked;

/// Fields of the header of every answer. The page has no script, style or request but its own.
pub(crate) const HEADERS: &[(&str, &str)] = &[
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
];

/// The files of the page: path, media type, content.
const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("../page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("../page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("../page/page.js")),
    ("/icon.svg", "image/svg+xml", include_str!("../page/icon.svg")),
];

/// Maximum length of a value in a query, in bytes: two names of Kubernetes and more.
const MAX_VALUE: usize = 1024;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A file of the page, which says nothing of the cluster.
    File {
        /// The media type.
        content_type: &'static str,
        /// The content.
        content: &'static str,
    },
    /// What the cluster consists of.
    Overview,
    /// What the members say of themselves.
    Reports,
    /// Events of a period.
    Events(Period),
    /// Connections that policies refused on this host.
    Drops,
    /// The verdict of policies on a connection.
    Policy {
        /// The source: an endpoint's name, `NAMESPACE/NAME`, or an address.
        from: String,
        /// The destination, in the same form.
        to: String,
        /// The destination port. `None` for a protocol without ports.
        port: Option<(Protocol, u16)>,
    },
    /// All of it as it changes.
    Stream,
    /// Who talks to whom on all hosts, as it is seen.
    Flows,
}

/// Why a request is not answered: the status, and a sentence.
pub(crate) type Refusal = (StatusCode, Cow<'static, str>);

/// Returns what a request asks for, if its sender may see it. `token` is what it must have sent; `None`: all that reach the
/// server may see the page.
///
/// # Errors
///
/// Why it gets no answer.
pub(crate) fn wanted(asked: &Asked<'_>, token: Option<&Token>) -> Result<Wanted, Refusal> {
    // A site whose name resolves to this host (DNS rebinding) is of the same origin to a browser, but cannot hide its name.
    if !is_this_host(asked.header(HOST)) {
        let sentence =
            "use the name localhost or a loopback address: docs/page.md says how to reach it from elsewhere";
        return Err((StatusCode::MISDIRECTED_REQUEST, sentence.into()));
    }
    if let Some((_, content_type, content)) = FILES.iter().find(|(path, ..)| *path == asked.path) {
        return Ok(Wanted::File { content_type, content });
    }
    let Some(name) = asked.path.strip_prefix("/api/v1/") else {
        return Err((StatusCode::NOT_FOUND, "there are / and the API: docs/page.md".into()));
    };
    // A browser says which site asks. Of another one, even a request whose answer it could not read would cost something.
    if !matches!(asked.header(SEC_FETCH_SITE), "" | "none" | "same-origin") {
        return Err((StatusCode::FORBIDDEN, "other sites may not ask".into()));
    }
    if token.is_some_and(|token| !token.is_in(asked.header(AUTHORIZATION))) {
        let sentence = "the token is wrong or missing: `ovlctl page` on the host prints the address with it";
        return Err((StatusCode::UNAUTHORIZED, sentence.into()));
    }
    api(name, asked.query).map_err(|sentence| match sentence {
        Some(sentence) => (StatusCode::BAD_REQUEST, sentence.into()),
        None => (StatusCode::NOT_FOUND, "no such part of the API: docs/page.md lists them".into()),
    })
}

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Returns what a part of the API stands for.
///
/// # Errors
///
/// What is wrong with the query. `None` if there is no such part.
fn api(name: &str, query: &str) -> Result<Wanted, Option<String>> {
    let mut values = Values::parse(query).map_err(Some)?;
    let wanted = match name {
        "overview" => Wanted::Overview,
        "reports" => Wanted::Reports,
        "drops" => Wanted::Drops,
        "stream" => Wanted::Stream,
        "flows" => Wanted::Flows,
        "events" => Wanted::Events(Period {
            since_ms: values.number("since").map_err(Some)?,
            until_ms: values.number("until").map_err(Some)?,
        }),
        "policy" => {
            let (from, to) = (values.take("from"), values.take("to"));
            let protocol = match values.take("protocol").as_deref() {
                None | Some("TCP") => Protocol::Tcp,
                Some("UDP") => Protocol::Udp,
                Some("SCTP") => Protocol::Sctp,
                Some(_) => return Err(Some("protocol: TCP, UDP or SCTP".to_owned())),
            };
            let port = values.number("port").map_err(Some)?;
            match (from, to) {
                (Some(from), Some(to)) => {
                    Wanted::Policy { from, to, port: port.map(|port: u16| (protocol, port)) }
                }
                _ => return Err(Some("from and to are needed: names of endpoints or addresses".to_owned())),
            }
        }
        _ => return Err(None),
    };
    values.end().map_err(Some)?;
    Ok(wanted)
}

/// The fields of a query.
struct Values(Vec<(String, String)>);

impl Values {
    fn parse(query: &str) -> Result<Self, String> {
        let values: Vec<_> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        match values.iter().find(|(_, value)| value.len() > MAX_VALUE) {
            Some((key, _)) => Err(format!("{key:?} has more than {MAX_VALUE} bytes")),
            None => Ok(Self(values)),
        }
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.0.iter().position(|(each, _)| each == key)?;
        Some(self.0.swap_remove(at).1)
    }

    fn number<T: std::str::FromStr>(&mut self, key: &str) -> Result<Option<T>, String> {
        let Some(text) = self.take(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{key}: {text:?} is not a number in its range"))
    }

    fn end(&self) -> Result<(), String> {
        match self.0.first() {
            Some((key, _)) => Err(format!("{key:?} is not known here, or is given twice")),
            None => Ok(()),
        }
    }
}

/// Whether the `Host` of a request, a name with or without a port, is this host itself.
fn is_this_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// The secret that a browser sends to see the page.
#[derive(Debug)]
pub(crate) struct Token(Secret<String>);

impl Token {
    /// Reads the token, or creates the file with this one if there is none.
    ///
    /// # Errors
    ///
    /// The file cannot be read or created, other users may read it, or it has no token.
    pub(crate) fn load(path: &Path, new: [u8; 32]) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        if !path.try_exists()? {
            let text: String = new.iter().map(|byte| format!("{byte:02x}")).collect();
            ovl_files::create(path, format!("{text}\n").as_bytes())?;
        }
        let mode = fs::metadata(path)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            let path = path.display();
            return Err(invalid(format!(
                "other users may read {path} (mode {mode:04o}): run 'chmod 600 {path}'"
            )));
        }
        let text = fs::read_to_string(path)?.trim_end().to_owned();
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if !(32..=256).contains(&text.len()) || !text.bytes().all(is_part) {
            return Err(invalid(format!(
                "{} must have 32 to 256 letters, digits, '-' and '_' in one line: remove it for a new one",
                path.display()
            )));
        }
        Ok(Self(Secret(text)))
    }

    /// Returns the URL of the page at an authority, with the token as the fragment.
    pub(crate) fn url(&self, authority: impl std::fmt::Display) -> String {
        format!("http://{authority}/#token={}", self.0.0)
    }

    /// Whether the field `Authorization` has this token (RFC 6750, section 2.1). The time does not depend on how much of it
    /// is right.
    fn is_in(&self, authorization: &str) -> bool {
        let given = authorization.strip_prefix("Bearer ").unwrap_or_default();
        given.as_bytes().ct_eq(self.0.0.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderMap, HeaderValue};

    use super::*;

    fn token() -> Token {
        Token(Secret("0123456789abcdef0123456789abcdef".to_owned()))
    }

    fn ask(path: &str, query: &str, headers: &[(HeaderName, &str)]) -> Result<Wanted, Refusal> {
        let mut map = HeaderMap::new();
        map.insert(HOST, HeaderValue::from_static("localhost:9641"));
        for (name, value) in headers {
            map.insert(name, HeaderValue::from_str(value).unwrap());
        }
        wanted(&Asked { path, query, headers: &map }, Some(&token()))
    }

    fn status(result: Result<Wanted, Refusal>) -> u16 {
        result.map_or_else(|(status, _)| status.as_u16(), |_| 200)
    }

    const GOOD: (HeaderName, &str) = (AUTHORIZATION, "Bearer 0123456789abcdef0123456789abcdef");

    #[test]
    fn files_are_for_all_and_the_api_is_for_those_with_the_token() {
        for path in ["/", "/page.js", "/page.css", "/icon.svg"] {
            assert_eq!(status(ask(path, "", &[])), 200, "{path}");
        }
        for part in ["overview", "reports", "events", "drops", "stream", "flows"] {
            let path = format!("/api/v1/{part}");
            assert_eq!(status(ask(&path, "", &[GOOD])), 200, "{path}");
            assert_eq!(status(ask(&path, "", &[])), 401, "{path}");
        }
        for wrong in
            ["0123456789abcdef0123456789abcdef", "Bearer ", "Bearer 0123456789abcdef0123456789abcdeF"]
        {
            assert_eq!(status(ask("/api/v1/overview", "", &[(AUTHORIZATION, wrong)])), 401, "{wrong}");
        }
        // A token in a query would end in logs.
        let query = "token=0123456789abcdef0123456789abcdef";
        assert_eq!(status(ask("/api/v1/overview", query, &[])), 401);
        assert_eq!(status(ask("/api/v1/overview", query, &[GOOD])), 400);
        assert_eq!(status(ask("/api/v2/overview", "", &[GOOD])), 404);
        assert_eq!(status(ask("/api/v1/", "", &[GOOD])), 404);
        assert_eq!(status(ask("/page.js/", "", &[GOOD])), 404);
    }

    #[test]
    fn other_names_and_other_sites_get_nothing() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:9641", "127.9.9.9", "[::1]:9641", "[::1]"] {
            assert_eq!(status(ask("/", "", &[(HOST, host)])), 200, "{host}");
        }
        for host in [
            "",
            ":9641",
            "evil.example:9641",
            "localhost.evil.example",
            "192.0.2.1",
            "[2001:db8::1]:9641",
            "127.0.0.1.evil.example",
            "localhost:9641@evil.example",
            "127.1",
        ] {
            assert_eq!(status(ask("/", "", &[(HOST, host)])), 421, "{host}");
            assert_eq!(status(ask("/api/v1/overview", "", &[(HOST, host), GOOD])), 421, "{host}");
        }
        for (site, expected) in [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)]
        {
            assert_eq!(
                status(ask("/api/v1/overview", "", &[(SEC_FETCH_SITE, site), GOOD])),
                expected,
                "{site}"
            );
        }
    }

    #[test]
    fn queries_are_read_and_wrong_ones_are_named() {
        let of = |part: &str, query: &str| ask(&format!("/api/v1/{part}"), query, &[GOOD]);
        let period = Period { since_ms: Some(5), until_ms: None };
        assert_eq!(of("events", "since=5").unwrap(), Wanted::Events(period));
        let wanted = of("policy", "from=shop%2Fweb&to=db&port=53&protocol=UDP").unwrap();
        let (from, to) = ("shop/web".to_owned(), "db".to_owned());
        assert_eq!(wanted, Wanted::Policy { from, to, port: Some((Protocol::Udp, 53)) });
        let long = format!("from={}&to=db", "x".repeat(2000));
        for (part, query, expected) in [
            ("events", "since=soon", "since"),
            ("events", "since=1&since=2", "twice"),
            ("policy", "from=a", "to"),
            ("policy", "from=a&to=b&port=70000", "port"),
            ("policy", "from=a&to=b&protocol=ICMP", "protocol"),
            ("policy", &long, "1024"),
            ("overview", "x=1", "\"x\""),
        ] {
            let (status, sentence) = of(part, query).unwrap_err();
            assert_eq!(status, StatusCode::BAD_REQUEST);
            assert!(sentence.contains(expected), "{sentence}");
        }
    }

    #[test]
    fn token_is_created_once_and_refused_if_others_may_read_it() {
        let dir = std::env::temp_dir().join(format!("ovl-page-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("ui-token");
        let url = |seed| Token::load(&path, [seed; 32]).unwrap().url("localhost:1");
        assert_eq!(url(1), format!("http://localhost:1/#token={}", "01".repeat(32)));
        assert_eq!(url(2), url(1));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Token::load(&path, [1; 32]).unwrap_err().to_string().contains("chmod 600"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for wrong in ["short", "", &"x y".repeat(20)] {
            fs::write(&path, wrong).unwrap();
            assert!(Token::load(&path, [1; 32]).unwrap_err().to_string().contains("32 to 256"), "{wrong}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
