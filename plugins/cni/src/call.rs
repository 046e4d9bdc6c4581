//! What the runtime hands over: environment variables and a network configuration on standard
//! input.

use std::env;
use std::io::{self, Read as _};
use std::path::PathBuf;

use ovl_control::{CNI_VERSIONS, CniCall, CniCommand, CniError, MAX_REQUEST};
use ovl_proto::DEFAULT_SOCKET;
use serde_json::Value;

/// The longest configuration: the request that carries it is somewhat longer.
const MAX_CONFIG: usize = MAX_REQUEST / 2;

/// "Invalid necessary environment variables".
const ENVIRONMENT: u32 = 4;
/// "I/O failure".
const IO: u32 = 5;
/// "Failed to decode content".
const DECODE: u32 = 6;

/// What is wanted.
pub(crate) enum Asked {
    /// `VERSION`, and the version that it was asked in.
    Version(String),
    /// Anything else: ovld's to do.
    Call(CniCall),
}

/// Reads it all; with an error, also the configuration, as far as there is one.
pub(crate) fn read() -> Result<Asked, (Value, CniError)> {
    let wanted = variable("CNI_COMMAND").map_err(|error| (Value::Null, error))?;
    let config = configuration();
    let command = match wanted.as_str() {
        // Answered whatever comes with it: some runtimes send nothing.
        "VERSION" => return Ok(Asked::Version(version(&config.unwrap_or_default()).to_owned())),
        "ADD" => CniCommand::Add,
        "DEL" => CniCommand::Del,
        "CHECK" => CniCommand::Check,
        "GC" => CniCommand::Gc,
        "STATUS" => CniCommand::Status,
        "" => {
            let details =
                "a container runtime runs this plugin and sets the variable; for people there is ovlctl";
            return Err((Value::Null, error(ENVIRONMENT, "CNI_COMMAND is not set", details)));
        }
        other => {
            let details = "it is none of ADD, DEL, CHECK, GC, STATUS and VERSION".to_owned();
            let msg = format!("CNI_COMMAND is {other:?}");
            return Err((config.unwrap_or_default(), CniError { code: ENVIRONMENT, msg, details }));
        }
    };
    let config = config.map_err(|error| (Value::Null, error))?;
    let call = || {
        Ok(CniCall {
            command,
            container_id: variable("CNI_CONTAINERID")?,
            netns: variable("CNI_NETNS")?,
            ifname: variable("CNI_IFNAME")?,
            args: variable("CNI_ARGS")?,
            path: variable("CNI_PATH")?,
            config: config.clone(),
        })
    };
    call().map(Asked::Call).map_err(|error| (config, error))
}

/// The version to answer in: the one asked for, where we speak it.
pub(crate) fn version(config: &Value) -> &str {
    let [.., newest] = CNI_VERSIONS;
    config["cniVersion"].as_str().filter(|version| CNI_VERSIONS.contains(version)).unwrap_or(newest)
}

/// Where ovld listens.
pub(crate) fn socket(config: &Value) -> PathBuf {
    config["socket"].as_str().filter(|path| !path.is_empty()).unwrap_or(DEFAULT_SOCKET).into()
}

/// Empty where it is not set.
fn variable(name: &str) -> Result<String, CniError> {
    env::var_os(name).unwrap_or_default().into_string().map_err(|_| {
        error(
            ENVIRONMENT,
            &format!("{name} is not UTF-8"),
            "the runtime passes something that cannot be a name",
        )
    })
}

fn configuration() -> Result<Value, CniError> {
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_CONFIG as u64 + 1).read_to_end(&mut bytes).map_err(|cause| {
        error(IO, "cannot read the network configuration from standard input", &cause.to_string())
    })?;
    if bytes.len() > MAX_CONFIG {
        let details = format!("it is longer than {MAX_CONFIG} bytes");
        return Err(error(DECODE, "the network configuration on standard input is too long", &details));
    }
    match serde_json::from_slice(&bytes) {
        Ok(config @ Value::Object(_)) => Ok(config),
        Ok(_) => Err(error(DECODE, "the network configuration on standard input is no JSON object", "")),
        Err(cause) => {
            Err(error(DECODE, "the network configuration on standard input is no JSON", &cause.to_string()))
        }
    }
}

/// An error as the specification has them.
pub(crate) fn error(code: u32, msg: &str, details: &str) -> CniError {
    CniError { code, msg: msg.to_owned(), details: details.to_owned() }
}
