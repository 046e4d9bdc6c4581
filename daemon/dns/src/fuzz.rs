//! Runs arbitrary bytes through all message parsers, for the fuzzer in `tests/fuzz` and for a property test.

use ovl_zone::{Client, ClientContext, Name, NamePattern, Records, Zone};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::answer::{Outcome, Transport, answer};
use crate::cache::{Cache, Question};
use crate::wire::{Query, RecordType};

const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

/// Creates a zone with one name on one network: `web` on `blue`.
pub fn zone() -> Zone {
    let mut zone = Zone::new(Name::parse("ovl.internal"));
    let subnets = "10.0.0.0/24".parse().into_iter().collect();
    zone.set_network(1, Name::parse("blue").unwrap_or(Name::ROOT), subnets);
    if let Some(web) = Name::parse("web") {
        let v4 = [Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)].into();
        zone.set(1, &web, Records { v4, ..Records::default() });
        zone.set(1, &Name::reverse_of(FROM), Records { names: [web.into()].into(), ..Records::default() });
    }
    let context = ClientContext {
        networks: Arc::from([1]),
        search: Name::parse("default.svc"),
        external: true,
        watched: NamePattern::parse("*.blue").into_iter().collect(),
    };
    zone.set_clients(HashMap::from([(FROM, context)]));
    zone
}

/// Answers, parses and caches a message.
pub fn message(bytes: &[u8]) {
    let zone = zone();
    let mut buffer = vec![0; 70_000];
    for (client, transport) in [
        (Client::Endpoint(FROM), Transport::Udp),
        (Client::Endpoint(FROM), Transport::Tcp),
        (Client::Host, Transport::Udp),
    ] {
        if let Outcome::Answer(length) = answer(&zone, client, transport, bytes, &mut buffer, 1) {
            assert!(length >= 12 && length <= buffer.len());
            if transport == Transport::Udp {
                assert!(length <= 1232);
            }
            // The answer must be valid.
            let said = buffer.get(..length).unwrap_or_default();
            assert!(crate::message::parse_answer(said).is_some());
            assert!(crate::message::records(said).is_some());
        }
    }
    let _ = crate::message::records(bytes);
    let asked = Name::parse("web.blue").unwrap_or(Name::ROOT);
    for is_own in [true, false] {
        let _ = crate::told::find(&zone, Client::Endpoint(FROM), &asked, None, is_own, bytes);
    }
    if let Some(fitting) = crate::message::fitting(bytes, 512) {
        assert!(fitting.end <= bytes.len().min(512));
    }
    if let Some(parts) = crate::message::parse_answer(bytes) {
        assert!(parts.end <= bytes.len());
        let mut cache = Cache::default();
        let question = Question::new(&Name::ROOT, RecordType::A, false, false);
        let now = std::time::Instant::now();
        cache.put(&question, bytes, &parts, now);
        let _ = cache.get(&question, now);
    }
    if let Ok(query) = Query::read(bytes) {
        assert!(query.end <= bytes.len());
        let _ = crate::answer::empty_response(bytes, &query, crate::wire::Rcode::SERVER_FAILURE);
    }
}

/// Parses a resolv.conf.
pub fn resolv_conf(bytes: &[u8]) {
    let _ = crate::resolv::parse(bytes);
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpora_pass() {
        ovl_corpus::replay("dns", super::message);
        ovl_corpus::replay("resolv", super::resolv_conf);
    }
}
