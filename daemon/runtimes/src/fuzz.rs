//! Runs arbitrary bytes through what parses calls of container runtimes, for the fuzzer in `tests/fuzz` and for property
//! tests.

use ovl_control::{CniCall, CniCommand};
use serde_json::Value;

use crate::{cni, docker};

/// Parses a call of a CNI runtime: a byte that selects the command, the value of `CNI_ARGS`, a zero byte, and the network
/// configuration.
pub fn cni(bytes: &[u8]) {
    const COMMANDS: [CniCommand; 5] =
        [CniCommand::Add, CniCommand::Del, CniCommand::Check, CniCommand::Gc, CniCommand::Status];
    let Some((command, rest)) = bytes.split_first() else { return };
    let mut parts = rest.splitn(2, |byte| *byte == 0);
    let args = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let Ok(config) = serde_json::from_slice(parts.next().unwrap_or_default()) else { return };
    let command = COMMANDS.into_iter().cycle().nth(usize::from(*command)).unwrap_or(CniCommand::Add);
    let call = CniCall {
        command,
        container_id: "c1".to_owned(),
        netns: "/run/netns/c1".to_owned(),
        ifname: "eth0".to_owned(),
        args,
        path: String::new(),
        config,
    };
    if let Err(error) = cni::parse(&call) {
        assert!(error.code != 0 && !error.msg.is_empty());
    }
}

/// Parses a call of a Docker Engine: a byte that selects the method, and the body.
pub fn docker(bytes: &[u8]) {
    const METHODS: [&str; 10] = [
        "IpamDriver.RequestPool",
        "IpamDriver.RequestAddress",
        "IpamDriver.ReleaseAddress",
        "NetworkDriver.CreateNetwork",
        "NetworkDriver.DeleteNetwork",
        "NetworkDriver.CreateEndpoint",
        "NetworkDriver.Join",
        "NetworkDriver.ProgramExternalConnectivity",
        "NetworkDriver.EndpointOperInfo",
        "NetworkDriver.Unknown",
    ];
    let Some((method, body)) = bytes.split_first() else { return };
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return };
    let method = METHODS.into_iter().cycle().nth(usize::from(*method)).unwrap_or_default();
    match docker::parse(method, &body) {
        Ok(call) => {
            let _ = (docker::later(&call), docker::always(&call));
        }
        Err(message) => assert!(!message.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::cni(&bytes);
            super::docker(&bytes);
        }
    }

    #[test]
    fn corpora_pass() {
        ovl_corpus::replay("cni", super::cni);
        ovl_corpus::replay("docker", super::docker);
    }
}
