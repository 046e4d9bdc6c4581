//! The errors of this crate. Their texts are shown to users.

use std::io;
use std::net::IpAddr;

use ovl_dataplane::device::Device;

/// The reason why a request to the kernel failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The kernel rejected a request.
    #[error("{action}: {}{}", io::Error::from_raw_os_error(*errno), reason.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused {
        /// The action that failed, or the operation.
        action: String,
        /// The error number.
        errno: i32,
        /// The text of the kernel's extended acknowledgement.
        reason: Option<String>,
    },
    /// A device has a name of ovl, but was not created by ovl.
    #[error("device {0} exists and was not created by ovl: rename or delete it")]
    Foreign(Device),
    /// The device does not exist.
    #[error("device {0} does not exist")]
    NoDevice(Device),
    /// The device to be created exists.
    #[error("device {0} already exists")]
    DeviceExists(Device),
    /// An interface name that the kernel does not accept.
    #[error("invalid interface name '{0}': 1 to 15 bytes without '/', ':', '%' and white space are needed")]
    InvalidInterfaceName(String),
    /// The kernel lacks a feature: its module is not installed, or must not be loaded.
    #[error("this kernel has no {feature}: install or allow its module `{module}`")]
    MissingFeature {
        /// The feature.
        feature: &'static str,
        /// The kernel module of the feature.
        module: &'static str,
    },
    /// The kernel has no WireGuard.
    #[error("this kernel has no WireGuard: install its module `wireguard`, or set `tunnel = \"userspace\"`")]
    NoWireguard,
    /// Another program has bound a UDP port that ovl needs.
    #[error(
        "UDP port {port} of {purpose} is in use by another program (`ss -ulnp sport = :{port}` shows it): stop that program, or set another {setting}"
    )]
    UdpPortInUse {
        /// The port.
        port: u16,
        /// What ovl needs the port for.
        purpose: &'static str,
        /// The setting of ovld that changes the port.
        setting: &'static str,
    },
    /// A tunnel address that is not IPv6.
    #[error("{0} is not a tunnel address: tunnel addresses are IPv6")]
    NotTunnelAddress(IpAddr),
    /// A program that is not installed.
    #[error("program {0} is not installed: install the package {package}", package = package(.0))]
    MissingProgram(String),
    /// A run of `nft` that failed, or could not be started.
    #[error("{0}")]
    Nft(String),
    /// Any other error.
    #[error("{0}")]
    Other(String),
    /// The kernel worker has exited.
    #[error("the kernel worker has exited: restart ovld")]
    Stopped,
}

/// The package that contains a program.
fn package(program: &str) -> &str {
    match program {
        "nft" => "nftables",
        "firewall-cmd" => "firewalld",
        _ if program.starts_with("iptables") || program.starts_with("ip6tables") => "iptables",
        _ => program,
    }
}

/// The result type of this crate.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

impl KernelError {
    /// An I/O error of a failed action.
    pub(super) fn io(action: impl Into<String>, error: &io::Error) -> Self {
        let action = action.into();
        match error.raw_os_error() {
            Some(errno) => Self::Refused { action, errno, reason: None },
            None => Self::Other(format!("{action}: {error}")),
        }
    }
}
