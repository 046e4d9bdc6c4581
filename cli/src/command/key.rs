//! `ovlctl key`

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Subcommand;
use data_encoding::BASE64;
use ovl_control::{HostKeys, KeyRotation, KeyStatus, Reply, Request};
use ovl_proto::clock::timestamp;
use ovl_proto::secret::Secret;
use serde_json::json;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{Table, list};

/// Where the kernel's random generator is a file; this process is too short-lived to want more.
const RANDOM: &str = "/dev/urandom";
/// A file with a key is much smaller.
const MAX_FILE: u64 = 4096;
/// Between two looks at a rotation.
const LOOK: Duration = Duration::from_millis(300);
/// A rotation that does not move is told anew after this time.
const TELL_AGAIN: Duration = Duration::from_secs(10);

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
    /// Give the same file to all hosts. ovld takes none that others than its owner can read, so this makes the file that
    /// it writes to one of mode 0600. ovld is not asked.
    Generate,
    /// Change this host's tunnel key, or the cluster key on all hosts, without losing a packet
    ///
    /// No host is restarted. Old and new key are valid side by side until all live hosts use the new one;
    /// a new cluster key is then in the file that each host's configuration names. Waits for that; when
    /// interrupted, the rotation goes on.
    Rotate {
        /// The cluster key: a file with the new one, as `ovlctl key generate` writes it; - reads standard
        /// input
        #[arg(long, value_name = "NEW")]
        cluster: Option<PathBuf>,
        /// Return as soon as the rotation has begun
        #[arg(long)]
        no_wait: bool,
    },
    /// Show which host has which keys, and a rotation that is under way
    Status,
}

/// Makes, asks and prints.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Generate => {
            close_output_to_others().map_err(|error| {
                Error::Failed(format!(
                    "cannot keep others from reading the file that the key would be written to: {error}. Write it to a file \
                     of your own"
                ))
            })?;
            let key = generate().map_err(|error| {
                Error::Failed(format!("cannot read {RANDOM}: {error}. Is /dev mounted in this container?"))
            })?;
            context.print(&json!({ "key": key }), |_| key.clone() + "\n")
        }
        Action::Rotate { cluster, no_wait } => {
            let request = match cluster {
                Some(cluster) => Request::KeyRotateCluster { key: Secret(read(&cluster)?) },
                None => Request::KeyRotateTunnel,
            };
            let is_tunnel = request == Request::KeyRotateTunnel;
            let mut status = keys(context, &request)?;
            if !no_wait {
                status = wait(context, status, if is_tunnel { tunnel_progress } else { cluster_progress })?;
            }
            context.print(&status, render)
        }
        Action::Status => context.print(&keys(context, &Request::KeyStatus)?, render),
    }
}

fn keys(context: &Context, request: &Request) -> Result<KeyStatus> {
    match context.ask(request)? {
        Reply::Keys(status) => Ok(*status),
        _ => Err(Error::unexpected_reply()),
    }
}

/// How far a rotation is, and who holds it up; none when it is done.
type Progress = fn(&KeyStatus) -> Option<(String, String)>;

fn cluster_progress(status: &KeyStatus) -> Option<(String, String)> {
    status.rotation.as_ref().map(progress)
}

fn tunnel_progress(status: &KeyStatus) -> Option<(String, String)> {
    let waits_for = status.tunnel_waits_for.as_ref()?;
    let news = match waits_for.len() {
        0 => "all hosts use the new tunnel key".to_owned(),
        1 => "1 host does not use the new tunnel key yet".to_owned(),
        many => format!("{many} hosts do not use the new tunnel key yet"),
    };
    Some((news, list(waits_for)))
}

/// Tells how far it is until it is done.
fn wait(context: &Context, mut status: KeyStatus, progress: Progress) -> Result<KeyStatus> {
    let mut said: Option<(String, Instant)> = None;
    while let Some((news, who)) = progress(&status) {
        let stuck = said.as_ref().is_some_and(|(_, at)| at.elapsed() > TELL_AGAIN);
        if stuck || said.as_ref().is_none_or(|(last, _)| *last != news) {
            context.say(&if stuck { format!("{news}; waiting for {who}") } else { news.clone() });
            said = Some((news, Instant::now()));
        }
        std::thread::sleep(LOOK);
        status = keys(context, &Request::KeyStatus).map_err(|error| match error {
            Error::Failed(why) | Error::Usage(why) => {
                Error::Failed(format!("{why}. The rotation goes on: see `ovlctl key status`"))
            }
        })?;
    }
    Ok(status)
}

/// How far it is, and who holds it up.
fn progress(rotation: &KeyRotation) -> (String, String) {
    let KeyRotation { hosts, have, seal, .. } = rotation;
    let news = if have < hosts {
        format!("{have} of {hosts} hosts have the new key")
    } else {
        format!("{seal} of {hosts} hosts use the new key")
    };
    (news, list(&rotation.waits_for))
}

/// The content of a key file. Others must not be able to read it: the new key would be known.
fn read(path: &Path) -> Result<String> {
    let failed = |error: io::Error| Error::Failed(format!("cannot read {}: {error}", path.display()));
    let mut text = String::new();
    if path == Path::new("-") {
        io::stdin().take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
        return Ok(text);
    }
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::Failed(format!(
            "{path} can be read or written by others (mode {mode:04o}): make another key with \
             'ovlctl key generate > {path}'",
            path = path.display()
        )));
    }
    file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

fn render(status: &KeyStatus) -> String {
    let head = match &status.rotation {
        None => "No rotation is under way.\n".to_owned(),
        Some(rotation) => format!(
            "Changing to {} since {}: {}. Waiting for {}.\n",
            rotation.key,
            timestamp(rotation.since_ms),
            progress(rotation).0,
            list(&rotation.waits_for)
        ),
    };
    let hosts = &status.hosts;
    let own = match &status.tunnel_waits_for {
        None => String::new(),
        Some(waits_for) => format!("The tunnel moves to other keys. Waiting for {}.\n", list(waits_for)),
    };
    head + &own
        + &Table::new()
            .column(
                "NAME",
                hosts.iter().map(|host| format!("{}{}", host.name, if host.own { " *" } else { "" })),
            )
            .column("STATE", hosts.iter().map(|host| host.state))
            .column("SEALS", hosts.iter().map(|host| host.seals))
            .column("ALSO OPENS", hosts.iter().map(|host| list(&host.opens)))
            .unusual("TUNNEL", "-", hosts.iter().map(tunnel))
            .unusual("NOTE", "", hosts.iter().map(note))
            .render()
}

fn tunnel(host: &HostKeys) -> String {
    host.tunnel.map_or_else(|| "-".to_owned(), |key| key.to_string())
}

fn note(host: &HostKeys) -> &'static str {
    match (host.member, host.tunnel_rotating) {
        (false, _) => "not a member",
        (true, true) => "its tunnel moves",
        (true, false) => "",
    }
}

/// Takes the rights of others from standard output, if it is a file: a shell opens it with mode 0644.
fn close_output_to_others() -> io::Result<()> {
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let metadata = output.metadata()?;
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_file() && mode & 0o077 != 0 {
        output.set_permissions(Permissions::from_mode(mode & 0o700))?;
    }
    Ok(())
}

fn generate() -> io::Result<String> {
    let mut key = [0; 32];
    File::open(RANDOM)?.read_exact(&mut key)?;
    Ok(BASE64.encode(&key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(number: u8, seals: u8, opens: &[u8]) -> HostKeys {
        let key = |n: u8| ovl_proto::id::ClusterKeyId([n; 4]);
        HostKeys {
            name: format!("host{number}"),
            id: "0410c3g8kt7o2s00".parse().unwrap(),
            state: ovl_control::PeerState::Alive,
            member: number != 3,
            seals: key(seals),
            opens: opens.iter().copied().map(key).collect(),
            tunnel: None,
            tunnel_rotating: false,
            own: number == 1,
        }
    }

    #[test]
    fn who_has_which_key() {
        let rotation = KeyRotation {
            key: ovl_proto::id::ClusterKeyId([2; 4]),
            since_ms: 0,
            hosts: 2,
            have: 1,
            seal: 0,
            majority: true,
            waits_for: vec!["host2".into()],
        };
        let hosts = vec![host(1, 1, &[2]), host(2, 1, &[]), host(3, 1, &[])];
        assert_eq!(
            render(&KeyStatus { rotation: Some(rotation), tunnel_waits_for: None, hosts }),
            "\
Changing to 081040g since 1970-01-01T00:00:00.000Z: 1 of 2 hosts have the new key. Waiting for host2.
NAME     STATE  SEALS    ALSO OPENS  NOTE
host1 *  alive  040g208  081040g     -
host2    alive  040g208  -           -
host3    alive  040g208  -           not a member
"
        );
        let done = KeyStatus { rotation: None, tunnel_waits_for: None, hosts: vec![host(1, 2, &[])] };
        assert!(render(&done).starts_with("No rotation is under way.\nNAME "));
    }

    #[test]
    fn two_keys_differ() {
        let (a, b) = (generate().unwrap(), generate().unwrap());
        assert_eq!((a.len(), &a[43..]), (44, "="));
        assert_ne!(a, b);
    }
}
