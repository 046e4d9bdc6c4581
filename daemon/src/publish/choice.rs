//! Which ports are published: what is valid, which are tried, and which are free. Pure functions.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovl_cluster::view::View;
use ovl_proto::object::Network;
use ovl_proto::publish::{Ports as Range, Publish, Published};
use ovl_subsystems::publish::{MOST_PORTS, MOST_RANGES};

use crate::failed::Failed;

/// Number of ports that are tried if the request names none.
const TRIES: u16 = 256;
/// Range of ephemeral ports if `ip_local_port_range` cannot be read: the kernel's default.
const EPHEMERAL: Range = Range { first: 32_768, last: 60_999 };

/// Checks what can be known before any port is tried. `before` is the number of ranges that the endpoint has already.
///
/// # Errors
///
/// A request is invalid.
pub(super) fn check(network: &Network, before: usize, wishes: &[Publish]) -> Result<(), Failed> {
    let total: u32 = wishes.iter().map(|wish| u32::from(wish.container.count())).sum();
    if before.saturating_add(wishes.len()) > MOST_RANGES || total > MOST_PORTS {
        return Err(Failed::invalid(format!(
            "too many ports: an endpoint has at most {MOST_RANGES} published ranges, and {MOST_PORTS} ports in them"
        )));
    }
    if !wishes.is_empty() && network.internal {
        return Err(Failed::invalid(format!(
            "network {} is internal: nothing reaches it from outside, at a published port neither",
            network.name
        )));
    }
    for wish in wishes {
        if let Some(IpAddr::V6(address)) = wish.address
            && address.is_unicast_link_local()
        {
            return Err(Failed::invalid(format!(
                "{address} is a link-local address, and the kernel forwards nothing that is sent to one: publish the port at \
                 another address of this host"
            )));
        }
        let ports = [Some(wish.container), wish.host];
        let fits = |ports: &Range| ports.first > 0 && ports.first <= ports.last;
        let same = wish
            .host
            .is_none_or(|host| wish.container.count() == 1 || host.count() == wish.container.count());
        if !same || !ports.iter().flatten().all(fits) {
            return Err(Failed::invalid("ports of the host and of the endpoint that do not fit together"));
        }
        let has = |v4: bool| network.subnets.iter().any(|subnet| subnet.prefix.addr().is_ipv4() == v4);
        if let Some(address) = wish.address
            && !has(address.is_ipv4())
        {
            return Err(Failed::invalid(format!(
                "network {} has no addresses of {address}'s family to send its packets to",
                network.name
            )));
        }
    }
    Ok(())
}

/// Returns what is published if a wish gets the host's ports from `host` on.
pub(super) fn at(wish: Publish, host: u16) -> Published {
    let Publish { address, container, transport, .. } = wish;
    Published { transport, address, host, container: container.first, count: container.count() }
}

/// Returns the first ports of the ranges that are tried for a wish, in this order. `random` chooses the first of those
/// that the request does not name.
pub(super) fn candidates(wish: Publish, ephemeral: Range, random: u16) -> Vec<u16> {
    let count = wish.container.count();
    match wish.host {
        Some(host) if host.count() == count => vec![host.first],
        Some(host) => (host.first..=host.last).collect(),
        None => unnamed(count, ephemeral, random),
    }
}

/// Returns the range of ephemeral ports, from the text of `net.ipv4.ip_local_port_range` if it could be read.
pub(super) fn ephemeral(sysctl: Option<&str>) -> Range {
    let range = sysctl.and_then(|text| {
        let mut ports = text.split_ascii_whitespace().map(str::parse);
        Some(Range { first: ports.next()?.ok()?, last: ports.next()?.ok()? })
    });
    range.filter(|range| range.count() > 0).unwrap_or(EPHEMERAL)
}

/// Returns first ports of ranges of `count` ports, from a random start.
fn unnamed(count: u16, Range { first, last }: Range, random: u16) -> Vec<u16> {
    let last = last.saturating_sub(count.saturating_sub(1));
    let Some(choices) = last.checked_sub(first).map(|more| u32::from(more) + 1) else { return Vec::new() };
    let begin = u32::from(random);
    let step = u32::from(count.max(1));
    (0..u32::from(TRIES).min(choices))
        .filter_map(|at| u16::try_from(u32::from(first) + (begin + at * step) % choices).ok())
        .collect()
}

/// Checks that no endpoint of this host has published one of these ports, and that none is reserved. `reserved` has the
/// names and ports of requests in flight, `before` the ports of the same request.
///
/// # Errors
///
/// Who has published the port, or is about to.
pub(super) fn check_free(
    view: &View,
    reserved: &BTreeMap<u64, (String, Vec<Published>)>,
    published: Published,
    before: &[Published],
) -> Result<(), Failed> {
    let transport = published.transport;
    let conflict = |others: &[Published]| others.iter().find_map(|other| published.conflict_with(*other));
    if let Some(port) = conflict(before) {
        return Err(Failed::invalid(format!("port {port}/{transport} is asked for twice")));
    }
    let mut own = view.own().into_iter().flat_map(|own| own.table.endpoints());
    if let Some((endpoint, port)) = own.find_map(|own| Some((own, conflict(&own.publish)?))) {
        let network = view.networks.get(&endpoint.network);
        let network =
            network.map_or_else(|| endpoint.network.to_string(), |found| found.network.name.clone());
        return Err(Failed::conflict(format!(
            "port {port}/{transport} is published for endpoint {} on network {network} already",
            endpoint.name
        )));
    }
    match reserved.values().find_map(|(name, others)| Some((name, conflict(others)?))) {
        Some((name, port)) => Err(Failed::conflict(format!(
            "port {port}/{transport} is being published for endpoint {name} at this moment"
        ))),
        None => Ok(()),
    }
}

/// Says why a wish cannot be met. `first` is why its first candidate was not free; `None` if there was no candidate.
pub(super) fn none_free(wish: Publish, first: Option<Failed>) -> Failed {
    let Publish { host, container, transport, .. } = wish;
    match (host, first) {
        (Some(host), Some(failed)) if host.count() != container.count() => Failed::conflict(format!(
            "none of the ports {host}/{transport} is free: {}, and so on",
            failed.0.message
        )),
        (_, Some(failed)) => failed,
        (_, None) => Failed::exhausted(format!(
            "no {} ports in a row are free for {transport}: name some",
            container.count()
        )),
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::publish::Transport;
    use ovl_proto::table::{Endpoint, Entry};

    use super::*;
    use crate::world::{NET, endpoint, give, switched};

    fn wish(text: &str) -> Publish {
        text.parse().unwrap()
    }

    fn message<T>(result: Result<T, Failed>) -> String {
        result.err().map(|failed| failed.0.message).unwrap_or_default()
    }

    #[test]
    fn ports_must_fit_the_network_and_each_other() {
        let view = switched();
        let network = view.networks[&NET].network.clone();
        let refused = |text: &str| message(check(&network, 0, &[wish(text)]));
        assert_eq!(refused("8080:80"), "");
        assert_eq!(refused("8080-8081:80-81"), "");
        assert!(refused("[::1]:8080:80").contains("no addresses of ::1's family"));
        assert!(refused("[fe80::1]:8080:80").contains("link-local"));
        let unequal = Publish { host: Some(Range { first: 1, last: 3 }), ..wish("80-81") };
        assert!(message(check(&network, 0, &[unequal])).contains("do not fit together"));
        let zero = Publish { container: Range { first: 0, last: 1 }, ..wish("80") };
        assert!(message(check(&network, 0, &[zero])).contains("do not fit together"));

        let internal = Network { internal: true, ..network.clone() };
        assert!(message(check(&internal, 0, &[wish("80")])).contains("is internal"));
        assert_eq!(message(check(&internal, 0, &[])), "");

        assert_eq!(message(check(&network, MOST_RANGES - 1, &[wish("80")])), "");
        assert!(message(check(&network, MOST_RANGES, &[wish("80")])).contains("too many ports"));
        assert!(message(check(&network, 0, &[wish("1-16385")])).contains("too many ports"));
    }

    #[test]
    fn named_ports_are_tried_in_their_order() {
        let range = Range { first: 100, last: 102 };
        assert_eq!(candidates(wish("8080:80"), range, 7), [8080]);
        assert_eq!(candidates(wish("8080-8082:80-82"), range, 7), [8080]);
        let any_of = Publish { host: Some(Range { first: 8080, last: 8082 }), ..wish("80") };
        assert_eq!(candidates(any_of, range, 7), [8080, 8081, 8082]);
    }

    #[test]
    fn unnamed_ports_are_each_tried_once_from_a_random_start() {
        let range = Range { first: 100, last: 102 };
        assert_eq!(candidates(wish("80"), range, 0), [100, 101, 102]);
        assert_eq!(candidates(wish("80"), range, 5), [102, 100, 101]);
        // The last port of a range must be ephemeral too.
        assert_eq!(candidates(wish("80-81"), range, 0), [100, 100]);
        assert!(candidates(wish("80-89"), range, 0).is_empty());
        let most = candidates(wish("80"), EPHEMERAL, u16::MAX);
        assert_eq!(most.len(), usize::from(TRIES));
        assert!(most.iter().all(|port| (EPHEMERAL.first..=EPHEMERAL.last).contains(port)));
        assert_eq!(candidates(wish("80"), Range { first: 65_535, last: 65_535 }, 9), [65_535]);
    }

    #[test]
    fn ephemeral_range_is_the_kernels() {
        assert_eq!(ephemeral(Some("1024\t2047\n")), Range { first: 1024, last: 2047 });
        for wrong in [None, Some(""), Some("9"), Some("9 x"), Some("9 8")] {
            assert_eq!(ephemeral(wrong), EPHEMERAL, "{wrong:?}");
        }
    }

    #[test]
    fn port_belongs_to_who_has_it_published_or_reserved() {
        let mut view = switched();
        let Entry::Endpoint(own) = endpoint(1, "10.9.0.9/24") else { panic!() };
        let taken = at(wish("8080:80"), 8080);
        give(&mut view, 1, vec![Entry::Endpoint(Endpoint { publish: vec![taken], ..own })]);
        let Entry::Endpoint(far) = endpoint(2, "10.9.0.17/24") else { panic!() };
        give(&mut view, 2, vec![Entry::Endpoint(Endpoint { publish: vec![at(wish("9:9"), 9)], ..far })]);
        let reserved = BTreeMap::from([(1, ("new".to_owned(), vec![at(wish("7000:70"), 7000)]))]);
        let free = |text: &str, port, before: &[Published]| {
            message(check_free(&view, &reserved, at(wish(text), port), before))
        };
        assert_eq!(
            free("8080:1", 8080, &[]),
            "port 8080/tcp is published for endpoint w1 on network blue already"
        );
        assert_eq!(free("8080:1/udp", 8080, &[]), "");
        assert_eq!(free("8079-8081:1-3", 8079, &[]).split(' ').nth(1), Some("8080/tcp"));
        assert_eq!(
            free("7000:1", 7000, &[]),
            "port 7000/tcp is being published for endpoint new at this moment"
        );
        assert_eq!(free("9:9", 9, &[]), "", "ports of another host are its own affair");
        assert_eq!(free("5:5", 5, &[at(wish("5:6"), 5)]), "port 5/tcp is asked for twice");
    }

    #[test]
    fn refusal_says_what_was_wrong_with_the_first() {
        let first = || Some(Failed::conflict("port 80/tcp is in use"));
        let any_of = Publish { host: Some(Range { first: 80, last: 81 }), ..wish("80") };
        assert_eq!(
            none_free(any_of, first()).0.message,
            "none of the ports 80-81/tcp is free: port 80/tcp is in use, and so on"
        );
        assert_eq!(none_free(wish("80:80"), first()).0.message, "port 80/tcp is in use");
        let udp = Publish { transport: Transport::Udp, ..wish("80-89") };
        assert_eq!(none_free(udp, None).0.message, "no 10 ports in a row are free for udp: name some");
    }
}
