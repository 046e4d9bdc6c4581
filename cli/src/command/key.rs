//! `ovlctl key`: generates, rotates and shows keys.

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
use crate::text::{TextTable, comma_separated};

/// The kernel's random number generator.
const RANDOM: &str = "/dev/urandom";
/// Maximum number of bytes read from a key file, which is much smaller.
const MAX_FILE: u64 = 4096;
/// Poll interval while a rotation is in progress.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// Time without progress after which the hosts that delay a rotation are printed.
const REPEAT_AFTER: Duration = Duration::from_secs(10);

/// Arguments of `key`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Generate a cluster key and print it: `ovlctl key generate > /etc/ovl/cluster.key`
    ///
    /// Copy the file to all hosts. ovld rejects a key file that users other than its owner can read, so if
    /// standard output is a file, its mode is changed to 0600. ovld need not run.
    Generate,
    /// Rotate this host's tunnel key, or the cluster key of all hosts, without packet loss
    ///
    /// No daemon restarts. The old and the new key are both valid until all live hosts use the new one. Each
    /// host then writes a new cluster key to the key file of its configuration. The command waits for that;
    /// if interrupted, the rotation continues.
    Rotate {
        /// Rotate the cluster key: a file with the new key, as `ovlctl key generate` writes it; - reads
        /// standard input
        #[arg(long, value_name = "NEW")]
        cluster: Option<PathBuf>,
        /// Return as soon as the rotation has started
        #[arg(long)]
        no_wait: bool,
    },
    /// Show the keys of all hosts, and a rotation in progress
    Status,
}

/// Runs a subcommand.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Generate => {
            restrict_output_file().map_err(|error| {
                Error::Failed(format!(
                    "cannot restrict the mode of the output file to its owner: {error}. Write the key to a file that \
                     you own"
                ))
            })?;
            let key = generate().map_err(|error| {
                Error::Failed(format!("cannot read {RANDOM}: {error}. Is /dev mounted in this container?"))
            })?;
            context.print(&json!({ "key": key }), |_| key.clone() + "\n")
        }
        Action::Rotate { cluster, no_wait } => {
            let request = match cluster {
                Some(cluster) => Request::KeyRotateCluster { key: Secret(read_key_file(&cluster)?) },
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
    match context.request(request)? {
        Reply::Keys(status) => Ok(*status),
        _ => Err(Error::unexpected_reply()),
    }
}

/// Returns the progress of a rotation and the hosts that it waits for. `None` if it is complete.
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
    Some((news, comma_separated(waits_for)))
}

/// Prints the progress of a rotation until it is complete.
fn wait(context: &Context, mut status: KeyStatus, progress: Progress) -> Result<KeyStatus> {
    let mut printed: Option<(String, Instant)> = None;
    while let Some((news, who)) = progress(&status) {
        let stuck = printed.as_ref().is_some_and(|(_, at)| at.elapsed() > REPEAT_AFTER);
        if stuck || printed.as_ref().is_none_or(|(last, _)| *last != news) {
            context.note(&if stuck { format!("{news}; waiting for {who}") } else { news.clone() });
            printed = Some((news, Instant::now()));
        }
        std::thread::sleep(POLL_INTERVAL);
        status = keys(context, &Request::KeyStatus).map_err(|error| match error {
            Error::Failed(why) | Error::Usage(why) | Error::Program(why, _) => {
                Error::Failed(format!("{why}. The rotation continues: see `ovlctl key status`"))
            }
        })?;
    }
    Ok(status)
}

/// Returns the progress of a cluster key rotation and the hosts that it waits for.
fn progress(rotation: &KeyRotation) -> (String, String) {
    let KeyRotation { hosts, have, seal, .. } = rotation;
    let news = if have < hosts {
        format!("{have} of {hosts} hosts have the new key")
    } else {
        format!("{seal} of {hosts} hosts use the new key")
    };
    (news, comma_separated(&rotation.waits_for))
}

/// Reads a key file.
///
/// # Errors
///
/// If other users can read or write the file: the new key would not be secret.
fn read_key_file(path: &Path) -> Result<String> {
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
            "{path} is accessible to other users (mode {mode:04o}): generate a new key with \
             'ovlctl key generate > {path}'",
            path = path.display()
        )));
    }
    file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

fn render(status: &KeyStatus) -> String {
    let head = match &status.rotation {
        None => "No rotation in progress.\n".to_owned(),
        Some(rotation) => format!(
            "Rotating to {} since {}: {}. Waiting for {}.\n",
            rotation.key,
            timestamp(rotation.since_ms),
            progress(rotation).0,
            comma_separated(&rotation.waits_for)
        ),
    };
    let hosts = &status.hosts;
    let own = match &status.tunnel_waits_for {
        None => String::new(),
        Some(waits_for) => {
            format!("The tunnel key is being rotated. Waiting for {}.\n", comma_separated(waits_for))
        }
    };
    head + &own
        + &TextTable::new()
            .column(
                "NAME",
                hosts.iter().map(|host| format!("{}{}", host.name, if host.own { " *" } else { "" })),
            )
            .column("STATE", hosts.iter().map(|host| host.state))
            .column("SEALS", hosts.iter().map(|host| host.seals))
            .column("ALSO OPENS", hosts.iter().map(|host| comma_separated(&host.opens)))
            .optional_column("TUNNEL", "-", hosts.iter().map(tunnel))
            .optional_column("NOTE", "", hosts.iter().map(note))
            .render()
}

fn tunnel(host: &HostKeys) -> String {
    host.tunnel.map_or_else(|| "-".to_owned(), |key| key.to_string())
}

fn note(host: &HostKeys) -> &'static str {
    match (host.member, host.tunnel_rotating) {
        (false, _) => "not a member",
        (true, true) => "rotating its tunnel key",
        (true, false) => "",
    }
}

/// Removes the permissions of other users from standard output if it is a file. Shells create it with mode
/// 0644.
fn restrict_output_file() -> io::Result<()> {
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
    fn keys_of_all_hosts_are_shown() {
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
Rotating to 081040g since 1970-01-01T00:00:00.000Z: 1 of 2 hosts have the new key. Waiting for host2.
NAME     STATE  SEALS    ALSO OPENS  NOTE
host1 *  alive  040g208  081040g     -
host2    alive  040g208  -           -
host3    alive  040g208  -           not a member
"
        );
        let done = KeyStatus { rotation: None, tunnel_waits_for: None, hosts: vec![host(1, 2, &[])] };
        assert!(render(&done).starts_with("No rotation in progress.\nNAME "));
    }

    #[test]
    fn generated_keys_differ() {
        let (a, b) = (generate().unwrap(), generate().unwrap());
        assert_eq!((a.len(), &a[43..]), (44, "="));
        assert_ne!(a, b);
    }
}
