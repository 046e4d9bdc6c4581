//! Reads a call of the runtime: environment variables, and a network configuration on standard input.

use std::env;
use std::io::{self, Read as _};
use std::path::PathBuf;

use ovl_control::{CNI_VERSIONS, CniCall, CniCommand, CniError, MAX_REQUEST};
use ovl_proto::DEFAULT_SOCKET;
use serde_json::Value;

/// The maximum length of a configuration. The request to ovld that carries it is somewhat longer.
const MAX_CONFIG: usize = MAX_REQUEST / 2;

/// The specification's "Invalid necessary environment variables".
const ENVIRONMENT: u32 = 4;
/// The specification's "I/O failure".
const IO: u32 = 5;
/// The specification's "Failed to decode content".
const DECODE: u32 = 6;

/// A call of the runtime.
pub(crate) enum Asked {
    /// `VERSION`, with the version of the request.
    Version(String),
    /// Any other command, which ovld handles.
    Call(CniCall),
}

/// Reads the call. An error comes with the configuration, as far as it could be read.
pub(crate) fn read() -> Result<Asked, (Value, CniError)> {
    let wanted = variable("CNI_COMMAND").map_err(|error| (Value::Null, error))?;
    let config = configuration();
    let command = match wanted.as_str() {
        // Answered even without a valid configuration: some runtimes send none.
        "VERSION" => return Ok(Asked::Version(version(&config.unwrap_or_default()).to_owned())),
        "ADD" => CniCommand::Add,
        "DEL" => CniCommand::Del,
        "CHECK" => CniCommand::Check,
        "GC" => CniCommand::Gc,
        "STATUS" => CniCommand::Status,
        "" => {
            let details = "a container runtime sets the variable when it runs this plugin; to manage networks use ovlctl";
            return Err((Value::Null, error(ENVIRONMENT, "CNI_COMMAND is not set", details)));
        }
        other => {
            let details = "expected ADD, DEL, CHECK, GC, STATUS or VERSION".to_owned();
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

/// Returns the version of the response: the requested one if it is supported, else the newest.
pub(crate) fn version(config: &Value) -> &str {
    let [.., newest] = CNI_VERSIONS;
    config["cniVersion"].as_str().filter(|version| CNI_VERSIONS.contains(version)).unwrap_or(newest)
}

/// Returns the control socket.
pub(crate) fn socket(config: &Value) -> PathBuf {
    config["socket"].as_str().filter(|path| !path.is_empty()).unwrap_or(DEFAULT_SOCKET).into()
}

/// Returns an environment variable; empty if it is not set.
fn variable(name: &str) -> Result<String, CniError> {
    env::var_os(name)
        .unwrap_or_default()
        .into_string()
        .map_err(|_| error(ENVIRONMENT, &format!("{name} is not UTF-8"), "the runtime must pass UTF-8"))
}

fn configuration() -> Result<Value, CniError> {
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_CONFIG as u64 + 1).read_to_end(&mut bytes).map_err(|cause| {
        error(IO, "cannot read the network configuration from standard input", &cause.to_string())
    })?;
    if bytes.len() > MAX_CONFIG {
        let details = format!("the limit is {MAX_CONFIG} bytes");
        return Err(error(DECODE, "the network configuration on standard input is too long", &details));
    }
    match serde_json::from_slice(&bytes) {
        Ok(config @ Value::Object(_)) => Ok(config),
        Ok(_) => Err(error(DECODE, "the network configuration on standard input is not a JSON object", "")),
        Err(cause) => {
            Err(error(DECODE, "the network configuration on standard input is not JSON", &cause.to_string()))
        }
    }
}

/// Creates an error of the specification.
pub(crate) fn error(code: u32, msg: &str, details: &str) -> CniError {
    CniError { code, msg: msg.to_owned(), details: details.to_owned() }
}
