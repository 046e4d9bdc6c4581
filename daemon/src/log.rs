//! Where ovld's messages go: into the journal with their levels and fields, or to standard error.

use std::fmt::{Debug, Write as _};
use std::io::{self, IsTerminal as _};
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

/// Where journald listens for messages in its own form.
const SOCKET: &str = "/run/systemd/journal/socket";
/// What the names of our fields begin with in the journal.
const PREFIX: &str = "OVL_";

/// To be called once.
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

/// The journal, where a message is a datagram of fields.
struct Journal(UnixDatagram);

impl Journal {
    /// None where standard error goes elsewhere, or there is no journal.
    fn connect() -> Option<Self> {
        // What systemd.exec(5) says of JOURNAL_STREAM: others may have inherited it, and write elsewhere.
        let stderr = nix::sys::stat::fstat(io::stderr()).ok()?;
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        if stream != format!("{}:{}", stderr.st_dev, stderr.st_ino) {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SOCKET).ok()?;
        // A journal that does not keep up loses messages; it must not hold the daemon up.
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
            // Too large, or another journal than before. This way ends there too, with the level in front of the line.
            eprintln!("<{priority}>{}", entry.text());
        }
    }
}

/// Syslog's number.
fn priority(level: tracing::Level) -> u8 {
    match level {
        tracing::Level::ERROR => 3,
        tracing::Level::WARN => 4,
        tracing::Level::INFO => 6,
        tracing::Level::DEBUG | tracing::Level::TRACE => 7,
    }
}

/// What is said at once.
#[derive(Default)]
struct Entry {
    message: String,
    /// Name, value for machines, value as people read it.
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
    /// The message, and its fields behind it.
    fn text(&self) -> String {
        let mut text = self.message.clone();
        for (name, _, shown) in &self.fields {
            // Writing into a string cannot fail.
            let _ = write!(text, " {name}={shown}");
        }
        text
    }

    /// The form that systemd's "Native Journal Protocol" describes.
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

    /// Keeps what would be sent.
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
        // No line of a message can be taken for a field.
        let second = b"PRIORITY=6\nSYSLOG_IDENTIFIER=ovld\nMESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\n";
        assert_eq!(said[1], second);
    }
}
