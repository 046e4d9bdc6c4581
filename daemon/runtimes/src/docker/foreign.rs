//! Options of Docker's own network drivers, which compose files and tools pass to all drivers: they are carried out,
//! harmless, or refused because the network would not keep what they promise.
//!
//! The module owns no state. Begin to read at [`set`].

const BRIDGE: &str = "com.docker.network.bridge.";
const OVERLAY: &str = "com.docker.network.driver.overlay.";
const NETWORK: &str = "com.docker.network.";

/// Applies one `-o KEY=VALUE` whose key begins with `com.docker.`. `vni` is what the options before say of the VNI.
///
/// # Errors
///
/// A message for the user if ovl does not do what the option promises, or if the value is not valid.
pub(super) fn set(vni: &mut Option<u32>, key: &str, value: &str) -> Result<(), String> {
    let refuse = |advice: &str| Err(format!("-o {key}={value} is not supported: {advice}"));
    // As the bridge driver parses it.
    let is_on = || match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("-o {key}={value}: expected true or false")),
    };
    if let Some(option) = key.strip_prefix(BRIDGE) {
        return match option {
            // Names of the bridge, and of the only network that ovl is never used for.
            "name" | "default_bridge" => Ok(()),
            "enable_ip_masquerade" if !is_on()? => refuse(
                "ovl masquerades what endpoints send out of the cluster. Use --internal for a network without a way out",
            ),
            "enable_icc" if !is_on()? => refuse(
                "the endpoints of a network reach each other. Apply a NetworkPolicy that isolates them, or use several \
                 networks",
            ),
            "inhibit_ipv4" if is_on()? => {
                refuse("the bridge has the gateway's address. Omit the option, or use ovl.mode=l3")
            }
            "enable_ip_masquerade" | "enable_icc" | "inhibit_ipv4" => Ok(()),
            "host_binding_ipv4" | "host_binding_ipv6" if matches!(value, "" | "0.0.0.0" | "::") => Ok(()),
            "host_binding_ipv4" | "host_binding_ipv6" => refuse(
                "the ports would be published on all addresses of the host. Give the address with each port, as in \
                 127.0.0.1:8080:80",
            ),
            "gateway_mode_ipv4" | "gateway_mode_ipv6" if matches!(value, "" | "nat") => Ok(()),
            "gateway_mode_ipv4" | "gateway_mode_ipv6" => refuse(
                "networks of ovl have the gateway mode nat: ports are published, and others are closed to the outside. Use \
                 --internal for a network without a way out",
            ),
            "trusted_host_interfaces" if value.is_empty() => Ok(()),
            "trusted_host_interfaces" => {
                refuse("no device of the host has direct access to endpoints' ports. Publish the ports")
            }
            _ => {
                refuse("ovl does not know this option of the bridge driver, and cannot keep what it promises")
            }
        };
    }
    if let Some(option) = key.strip_prefix(OVERLAY) {
        return match option {
            "vxlanid_list" => {
                let given = value.trim().parse().map_err(|_| {
                    format!("-o {key}={value}: expected one number, because a network of ovl has one VNI")
                })?;
                if vni.is_some_and(|other| other != given) {
                    return refuse("ovl.vni gives another VNI");
                }
                *vni = Some(given);
                Ok(())
            }
            _ => refuse(
                "ovl does not know this option of the overlay driver, and cannot keep what it promises",
            ),
        };
    }
    match key.strip_prefix(NETWORK) {
        // The Engine itself acts on these. Interfaces of containers are called `eth0`, `eth1` and so on.
        Some("enable_ipv4" | "enable_ipv6" | "container_iface_prefix" | "container_interface_prefix") => {
            Ok(())
        }
        Some("host_ipv4" | "host_ipv6") if value.is_empty() => Ok(()),
        Some("host_ipv4" | "host_ipv6") => {
            refuse("what endpoints send out of the cluster has the address of the device that it leaves by")
        }
        // Options of other systems, which no driver of this one acts on.
        Some(option) if option.starts_with("windowsshim.") => Ok(()),
        Some(_) => refuse("ovl does not know this option, and cannot keep what it promises"),
        // Labels of tools.
        None => Ok(()),
    }
}
