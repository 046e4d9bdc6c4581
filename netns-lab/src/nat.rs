//! Kinds of address translation (NAT) that a host can be behind, and presets of them.
//!
//! The terms are those of RFC 4787: *mapping* is the choice of the outer port for a datagram that leaves, *filtering* is which
//! datagrams from outside reach a mapped port. The old names of kinds (full cone and so on) are of RFC 3489.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::addresses::Underlay;

/// What a mapping or a filter depends on (RFC 4787, sections 4.1 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Behavior {
    /// On the inner address and port only.
    EndpointIndependent,
    /// On the address of the other end too.
    AddressDependent,
    /// On the address and the port of the other end too.
    AddressAndPortDependent,
}

/// What a NAT box does. TCP connections and pings pass outwards only, whatever the kind. IPv6 is filtered in the same way and
/// not translated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    /// The mapping of UDP.
    pub mapping: Behavior,
    /// The filtering of UDP.
    pub filtering: Behavior,
    /// Whether hosts behind the box reach one another through its outer address.
    pub hairpin: bool,
    /// Whether a mapping has the inner port if it is free. Otherwise its port is random.
    pub keeps_ports: bool,
    /// Whether UDP passes at all.
    pub udp: bool,
    /// How long a mapping lives without an outgoing datagram, and connection tracking without any, in whole seconds.
    pub lifetime: Duration,
    /// Whether IPv4 addresses are translated. Otherwise the box is a stateful firewall.
    pub translates: bool,
}

/// The minimum of RFC 4787, requirement 5.
const LIFETIME: Duration = Duration::from_secs(120);

/// Lifetime of mappings of the preset `short`: less than the usual intervals of keep-alives.
const SHORT_LIFETIME: Duration = Duration::from_secs(5);

impl Nat {
    /// Translates IPv4 without hairpinning, to random ports, with mappings that live for two minutes.
    pub const fn new(mapping: Behavior, filtering: Behavior) -> Self {
        Nat {
            mapping,
            filtering,
            hairpin: false,
            keeps_ports: false,
            udp: true,
            lifetime: LIFETIME,
            translates: true,
        }
    }

    /// Adds hairpinning.
    pub const fn hairpin(mut self) -> Self {
        self.hairpin = true;
        self
    }

    /// Returns what two boxes do in a row, seen from outside: the more dependent mapping and filtering.
    fn behind(&self, outer: &Nat) -> Self {
        Nat {
            mapping: self.mapping.max(outer.mapping),
            filtering: self.filtering.max(outer.filtering),
            hairpin: outer.hairpin,
            keeps_ports: self.keeps_ports && outer.keeps_ports,
            udp: self.udp && outer.udp,
            lifetime: self.lifetime.min(outer.lifetime),
            translates: self.translates || outer.translates,
        }
    }

    /// Returns whether what a host behind the other box sends to the endpoint that a third one sees reaches the host behind this
    /// one, which sends to the endpoint that the third one sees of the other box.
    fn admits(&self, sender: &Nat) -> bool {
        let is_predictable = |nat: &Nat| nat.mapping == Behavior::EndpointIndependent;
        match self.filtering {
            Behavior::EndpointIndependent => true,
            // What it sends leaves from another port, which is open for the other box.
            _ if !is_predictable(self) => false,
            Behavior::AddressDependent => true,
            Behavior::AddressAndPortDependent => is_predictable(sender),
        }
    }

    const fn keeps_ports(mut self) -> Self {
        self.keeps_ports = true;
        self
    }

    const fn without_udp(mut self) -> Self {
        self.udp = false;
        self
    }

    /// Sets the lifetime of mappings, in whole seconds.
    pub const fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    const fn without_translation(mut self) -> Self {
        self.translates = false;
        self
    }
}

/// How a host is connected to the underlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// To the switch, with addresses of these families.
    Switch(Underlay),
    /// Through a NAT box of its own, which other hosts can share.
    Nat(Nat),
    /// Through a NAT box of its own and a carrier's behind it. Hosts behind carriers of the same kind share one.
    Carrier {
        /// The inner box.
        home: Nat,
        /// The outer box.
        carrier: Nat,
    },
    /// Through the NAT box of another host, in the same LAN.
    With(String),
}

impl Access {
    /// On the switch, with all address families of the underlay.
    pub const PUBLIC: Access = Access::Switch(Underlay::Dual);
}

impl Access {
    /// Returns whether UDP can pass directly between two hosts over IPv4, if both send to the endpoint at which a third one sees
    /// the other, and answer where they hear it from. Behind one carrier its hairpinning is needed too. `false` for hosts that
    /// share the box of another one, whose kind is not known here.
    pub fn allows_direct(&self, other: &Access) -> bool {
        let (Some(one), Some(two)) = (self.seen_from_outside(), other.seen_from_outside()) else {
            return false;
        };
        let share_carrier = match (self, other) {
            (Access::Carrier { carrier: one, .. }, Access::Carrier { carrier: two, .. }) => one == two,
            _ => false,
        };
        one.udp && two.udp && (one.admits(&two) || two.admits(&one)) && (!share_carrier || one.hairpin)
    }

    /// Returns all boxes as one. `None` if they are those of another host, or there is no IPv4.
    fn seen_from_outside(&self) -> Option<Nat> {
        match self {
            Access::Switch(families) => families.has_v4().then(|| {
                Nat::new(Behavior::EndpointIndependent, Behavior::EndpointIndependent).without_translation()
            }),
            Access::Nat(nat) => Some(nat.clone()),
            Access::Carrier { home, carrier } => Some(home.behind(carrier)),
            Access::With(_) => None,
        }
    }
}

impl Default for Access {
    fn default() -> Self {
        Access::PUBLIC
    }
}

/// Parses the name of a preset, `none` for no NAT, or the name of a host whose NAT box is to be shared.
impl FromStr for Access {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(Access::PUBLIC);
        }
        if let Some(preset) = PRESETS.iter().find(|preset| preset.name == text) {
            return Ok(preset.access.clone());
        }
        if text.strip_prefix('h').is_some_and(|number| number.parse::<u8>().is_ok()) {
            return Ok(Access::With(text.to_owned()));
        }
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        bail!(
            "no NAT preset {text}: use none, the name of a host to share its NAT box, or one of {}",
            names.join(", ")
        )
    }
}

/// The name of a preset, the host whose box is shared, or `custom`.
impl Display for Access {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        if let Access::With(host) = self {
            return write!(out, "with {host}");
        }
        out.write_str(
            PRESETS.iter().find(|preset| preset.access == *self).map_or("custom", |preset| preset.name),
        )
    }
}

/// A named kind of access.
#[derive(Clone, Debug)]
pub struct Preset {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// What it stands for.
    pub access: Access,
}

use Behavior::{
    AddressAndPortDependent as PORT, AddressDependent as ADDRESS, EndpointIndependent as INDEPENDENT,
};

/// The NAT box of a typical home: Linux with masquerading.
const HOME: Nat = Nat::new(INDEPENDENT, PORT).keeps_ports();

const fn preset(name: &'static str, about: &'static str, access: Access) -> Preset {
    Preset { name, about, access }
}

const PRESETS: &[Preset] = &[
    preset("public", "no NAT: the host is on the switch", Access::PUBLIC),
    preset("v4-only", "no NAT, no IPv6 address (underlay dual)", Access::Switch(Underlay::V4)),
    preset("v6-only", "no NAT, no IPv4 address (underlay dual)", Access::Switch(Underlay::V6)),
    preset(
        "firewall",
        "no translation, public addresses behind a stateful firewall",
        Access::Nat(HOME.without_translation()),
    ),
    preset(
        "full-cone",
        "one outer port for all destinations, reachable from anywhere",
        Access::Nat(Nat::new(INDEPENDENT, INDEPENDENT)),
    ),
    preset(
        "full-cone-hairpin",
        "full-cone, and hosts behind it reach one another through its outer address",
        Access::Nat(Nat::new(INDEPENDENT, INDEPENDENT).hairpin()),
    ),
    preset(
        "restricted",
        "one outer port for all destinations, reachable from addresses that were sent to",
        Access::Nat(Nat::new(INDEPENDENT, ADDRESS)),
    ),
    preset(
        "port-restricted",
        "one outer port for all destinations (the inner one if free), reachable from addresses and ports that were sent to",
        Access::Nat(HOME),
    ),
    preset(
        "port-restricted-hairpin",
        "port-restricted, and hosts behind it reach one another through its outer address",
        Access::Nat(HOME.hairpin()),
    ),
    preset(
        "address-dependent",
        "an outer port for each destination address, reachable from addresses that were sent to",
        Access::Nat(Nat::new(ADDRESS, ADDRESS)),
    ),
    preset(
        "symmetric",
        "an outer port for each destination address and port, reachable from there only",
        Access::Nat(Nat::new(PORT, PORT)),
    ),
    preset(
        "cgn",
        "port-restricted behind a carrier-grade NAT as RFC 6888 wants it: full-cone with hairpinning, shared by all such hosts",
        Access::Carrier { home: HOME, carrier: Nat::new(INDEPENDENT, INDEPENDENT).hairpin() },
    ),
    preset(
        "cgn-symmetric",
        "port-restricted behind a symmetric carrier-grade NAT, shared by all such hosts",
        Access::Carrier { home: HOME, carrier: Nat::new(PORT, PORT) },
    ),
    preset(
        "udp-blocked",
        "port-restricted, but UDP does not pass; TCP does outwards",
        Access::Nat(HOME.without_udp()),
    ),
    preset(
        "short",
        "port-restricted, and mappings are forgotten after 5 s without traffic",
        Access::Nat(HOME.lifetime(SHORT_LIFETIME)),
    ),
];

/// Returns all presets.
pub fn presets() -> &'static [Preset] {
    PRESETS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_preset_is_parsed_and_shown_by_its_name() {
        for preset in PRESETS {
            let access: Access = preset.name.parse().unwrap();
            assert_eq!(access.to_string(), preset.name, "two presets with the same meaning");
        }
        assert_eq!("none".parse::<Access>().unwrap(), Access::PUBLIC);
        assert_eq!("h12".parse::<Access>().unwrap().to_string(), "with h12");
        assert!("cone".parse::<Access>().unwrap_err().to_string().contains("full-cone"));
    }
}
