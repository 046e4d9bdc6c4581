//! Logging of ovld: to the journal with levels and fields, or to standard error.

use std::fmt::{Debug, Write as _};
use std::io::{self, IsTerminal as _};
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

/// Socket at which journald receives messages in its native protocol.
const SOCKET: &str = "/run/systemd/journal/socket";
/// Prefix of ovld's field names in the journal.
const PREFIX: &str = "OVL_";

/// Installs the subscriber for log messages. Must be called only once.
pub(crate) fn init(level: tracing::Level) {
    match Journal::connect() {
        Some(journal) => {
            tracing_subscriber::registry().with(journal).with(LevelFilter::from_level(level)).init();
        }
        None => tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .init(),
    }
}

/// The journal. Each message is a datagram of fields.
struct Journal(UnixDatagram);

impl Journal {
    /// Connects to the journal. `None` if there is no journal, or standard error does not lead to it.
    fn connect() -> Option<Self> {
        // See JOURNAL_STREAM in systemd.exec(5): the variable may be inherited while standard error is
        // redirected.
        let stderr = nix::sys::stat::fstat(io::stderr()).ok()?;
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        if stream != format!("{}:{}", stderr.st_dev, stderr.st_ino) {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SOCKET).ok()?;
        // If the journal does not keep up, messages are lost. It must not block the daemon.
        socket.set_nonblocking(true).ok()?;
        Some(Self(socket))
    }
}

impl<S: tracing::Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut entry = Entry::default();
        event.record(&mut entry);
        let priority = priority(*event.metadata().level());
        let sent = self.0.send(&entry.datagram(priority));
        if sent.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock) {
            // The message is too large, or the journal was restarted. Standard error leads to the journal
            // too, with the level as a prefix of the line.
            eprintln!("<{priority}>{}", entry.text());
        }
    }
}

/// Returns the syslog priority of a level.
fn priority(level: tracing::Level) -> u8 {
    match level {
        tracing::Level::ERROR => 3,
        tracing::Level::WARN => 4,
        tracing::Level::INFO => 6,
        tracing::Level::DEBUG | tracing::Level::TRACE => 7,
    }
}

/// One log message with its fields.
#[derive(Default)]
struct Entry {
    message: String,
    /// Name, value for machines, and value for people.
    fields: Vec<(&'static str, String, String)>,
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            name => self.fields.push((name, value.clone(), value)),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.fields.push((name, value.to_owned(), format!("{value:?}"))),
        }
    }
}

impl Entry {
    /// Formats the message followed by its fields.
    fn text(&self) -> String {
        let mut text = self.message.clone();
        for (name, _, shown) in &self.fields {
            // Writing into a string cannot fail.
            let _ = write!(text, " {name}={shown}");
        }
        text
    }

    /// Encodes the message in systemd's "Native Journal Protocol".
    fn datagram(&self, priority: u8) -> Vec<u8> {
        let mut datagram = format!("PRIORITY={priority}\nSYSLOG_IDENTIFIER=ovld\n").into_bytes();
        let mut put = |name: &str, value: &str| {
            datagram.extend(name.as_bytes());
            if value.contains('\n') {
                datagram.push(b'\n');
                datagram.extend((value.len() as u64).to_le_bytes());
            } else {
                datagram.push(b'=');
            }
            datagram.extend(value.as_bytes());
            datagram.push(b'\n');
        };
        put("MESSAGE", &self.text());
        for (name, value, _) in &self.fields {
            let name: String = name
                .chars()
                .map(|each| if each.is_ascii_alphanumeric() { each.to_ascii_uppercase() } else { '_' })
                .collect();
            put(&format!("{PREFIX}{name}"), value);
        }
        datagram
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A layer that keeps the datagrams that would be sent.
    struct Kept(Arc<Mutex<Vec<Vec<u8>>>>);

    impl<S: tracing::Subscriber> Layer<S> for Kept {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            let mut entry = Entry::default();
            event.record(&mut entry);
            self.0.lock().unwrap().push(entry.datagram(priority(*event.metadata().level())));
        }
    }

    #[test]
    fn a_message_has_its_level_and_fields_for_people_and_for_programs() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Kept(Arc::clone(&kept)));
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(peer = %"b", error = "no way", tries = 3, "cannot reach it");
            tracing::info!("two\nlines");
        });
        let said = kept.lock().unwrap().clone();
        let first = "PRIORITY=4\nSYSLOG_IDENTIFIER=ovld\nMESSAGE=cannot reach it peer=b error=\"no way\" tries=3\n\
                     OVL_PEER=b\nOVL_ERROR=no way\nOVL_TRIES=3\n";
        assert_eq!(String::from_utf8_lossy(&said[0]), first);
        // A line of a message must not be taken for a field.
        let second = b"PRIORITY=6\nSYSLOG_IDENTIFIER=ovld\nMESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\n";
        assert_eq!(said[1], second);
    }
}
