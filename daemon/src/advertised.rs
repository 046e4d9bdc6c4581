//! The addresses at which other hosts can dial this one, beside the main one.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};

/// Further addresses of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Further {
    /// What other hosts are told.
    pub published: Vec<SocketAddr>,
    /// Where this host listens besides: an address of its own of the other family.
    pub listen: Option<SocketAddr>,
    /// Whether one of them is not its own, so that something forwards what is sent there: others can dial this host.
    pub is_forwarded: bool,
}

impl Further {
    /// The configured addresses. `own` are those of this host.
    ///
    /// # Errors
    ///
    /// A second one is of a family of which this host listens on another one.
    pub(crate) fn configured(main: SocketAddr, addresses: &[SocketAddr], own: &[IpAddr]) -> Result<Self> {
        let mut further = Self { published: addresses.to_vec(), ..Self::default() };
        for address in addresses {
            if !own.contains(&address.ip()) {
                further.is_forwarded = true;
            } else if address.is_ipv4() == main.is_ipv4() || further.listen.is_some() {
                bail!(
                    "advertise: {address} is a further address of this host of that family: it listens on one of IPv4 and one of \
                     IPv6. Give the one that others should use"
                );
            } else {
                further.listen = Some(*address);
            }
        }
        Ok(further)
    }

    /// The address of the other family that `chosen` is the default one of. The one before stays while this host has it.
    pub(crate) fn found(
        main: SocketAddr,
        chosen: Option<IpAddr>,
        before: Option<IpAddr>,
        own: &[IpAddr],
    ) -> Self {
        let is_good = |address: &IpAddr| {
            let is_local = match address {
                IpAddr::V4(v4) => v4.is_link_local() || v4.is_loopback() || v4.is_unspecified(),
                IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_loopback() || v6.is_unspecified(),
            };
            !is_local && address.is_ipv4() != main.is_ipv4() && own.contains(address)
        };
        // One on loopback is for tests on this host alone.
        let is_reached = !main.ip().is_loopback();
        let found = before.filter(is_good).or(chosen.filter(is_good)).filter(|_| is_reached);
        let listen = found.map(|address| SocketAddr::new(address, main.port()));
        Self { published: listen.into_iter().collect(), listen, is_forwarded: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn own(all: &[&str]) -> Vec<IpAddr> {
        all.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn own_address_of_the_other_family_is_listened_on_and_others_are_forwarded() {
        let (main, own) = (at("10.0.0.1:7940"), own(&["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"]));
        let all = [at("203.0.113.1:4000"), at("[fd00::1]:7940")];
        let further = Further::configured(main, &all, &own).unwrap();
        assert_eq!(
            further,
            Further { published: all.to_vec(), listen: Some(at("[fd00::1]:7940")), is_forwarded: true }
        );
        assert_eq!(Further::configured(main, &[], &own).unwrap(), Further::default());
        for bad in [&[at("10.0.0.2:7940")][..], &[at("[fd00::1]:7940"), at("[fd00::2]:7940")]] {
            assert!(Further::configured(main, bad, &own).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn default_address_of_the_other_family_is_found_and_kept() {
        let main = at("10.0.0.1:7940");
        let found = |chosen: &str, before: Option<&str>, own: &[IpAddr]| {
            let before = before.map(|text| text.parse().unwrap());
            Further::found(main, Some(chosen.parse().unwrap()), before, own).listen
        };
        let all = own(&["10.0.0.1", "fd00::1", "fd00::2", "fe80::1"]);
        assert_eq!(found("fd00::1", None, &all), Some(at("[fd00::1]:7940")));
        assert_eq!(found("fd00::1", Some("fd00::2"), &all), Some(at("[fd00::2]:7940")));
        assert_eq!(found("fd00::1", Some("fd00::3"), &all), Some(at("[fd00::1]:7940")));
        for none in ["10.0.0.1", "fe80::1", "fd00::3"] {
            assert_eq!(found(none, None, &all), None, "{none}");
        }
        let chosen = "fd00::1".parse().ok();
        assert_eq!(Further::found(at("127.0.0.1:7940"), chosen, None, &all), Further::default());
        assert_eq!(
            Further::found(at("[fd00::1]:7940"), Some([10, 0, 0, 1].into()), None, &all).listen,
            Some(main)
        );
    }
}
