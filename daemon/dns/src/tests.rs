use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::cache::{Cache, Question};
use crate::fuzz;
use crate::message::{is_answer, parse_answer, records};
use crate::wire::{Query, RecordType, question};
use ovl_zone::Name;

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::message(&bytes);
    }

    /// A valid message with some changed bytes gets further than random bytes.
    #[test]
    fn a_changed_query_never_panics(
        changes in proptest::collection::vec((0usize..48, any::<u8>()), 0..6),
        kind in any::<u16>(),
        edns in any::<Option<bool>>(),
    ) {
        let name = Name::parse("web.blue").unwrap();
        let mut message = question(7, &name, RecordType(kind), 0, edns);
        for (at, value) in changes {
            if let Some(byte) = message.get_mut(at) {
                *byte = value;
            }
        }
        fuzz::message(&message);
    }

    #[test]
    fn names_survive_a_round_trip(labels in proptest::collection::vec("[a-z0-9_-]{1,20}", 1..8)) {
        let text = labels.join(".");
        let name = Name::parse(&text).unwrap();
        prop_assert_eq!(name.to_string(), text);
        let message = question(1, &name, RecordType::A, 0, Some(false));
        let query = Query::read(&message).unwrap();
        prop_assert!(query.name == name && query.edns.is_some());
    }

    #[test]
    fn reverse_names_survive_a_round_trip(v4 in any::<[u8; 4]>(), v6 in any::<[u8; 16]>()) {
        for address in [std::net::IpAddr::from(v4), std::net::IpAddr::from(v6)] {
            prop_assert_eq!(Name::reverse_of(address).reversed(), Some(address));
        }
    }
}

/// An answer with a question, a CNAME record, an A record and an OPT record.
fn answer(ttls: [u32; 2]) -> Vec<u8> {
    let mut message = question(9, &Name::parse("a.example").unwrap(), RecordType::A, 0, None);
    message[2] |= 0x80;
    message[7] = 2;
    message[11] = 1;
    message.extend_from_slice(&[0xc0, 12, 0, 5, 0, 1]);
    message.extend_from_slice(&ttls[0].to_be_bytes());
    message.extend_from_slice(&[0, 4, 1, b'b', 0xc0, 14]);
    message.extend_from_slice(&[1, b'b', 0xc0, 14, 0, 1, 0, 1]);
    message.extend_from_slice(&ttls[1].to_be_bytes());
    message.extend_from_slice(&[0, 4, 192, 0, 2, 1]);
    message.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    message
}

#[test]
fn an_answer_is_cached_for_its_shortest_ttl() {
    let message = answer([300, 60]);
    let name = Name::parse("a.example").unwrap();
    assert!(is_answer(&message, 9, &name, RecordType::A));
    assert!(!is_answer(&message, 8, &name, RecordType::A));
    assert!(!is_answer(&message, 9, &Name::parse("b.example").unwrap(), RecordType::A));
    assert!(!is_answer(&message, 9, &name, RecordType::AAAA));
    let parts = parse_answer(&message).unwrap();
    assert_eq!((parts.ttl, parts.end, parts.additional), (Some(60), message.len() - 11, 0));
    let mut cache = Cache::default();
    let question = Question::new(&name, RecordType::A, false, false);
    let start = Instant::now();
    cache.put(&question, &message[..parts.end], &parts, start);
    let kept = cache.get(&question, start + Duration::from_secs(25)).unwrap();
    let ttls: Vec<u32> = records(&kept).unwrap().1.iter().map(|record| record.ttl).collect();
    assert_eq!(ttls, [275, 35]);
    assert!(cache.get(&question, start + Duration::from_secs(61)).is_none());
    assert!(cache.get(&Question::new(&name, RecordType::A, true, false), start).is_none());
}

#[test]
fn uncacheable_answers_are_not_cached() {
    let (name, now) = (Name::parse("a.example").unwrap(), Instant::now());
    let question = Question::new(&name, RecordType::A, false, false);
    let keeps = |message: &[u8]| {
        let mut cache = Cache::default();
        cache.put(&question, message, &parse_answer(message).unwrap(), now);
        cache.get(&question, now).is_some()
    };
    assert!(keeps(&answer([5, 5])));
    assert!(!keeps(&answer([5, 0])));
    // A TTL above 2^31 counts as zero (RFC 2181, section 8).
    assert!(!keeps(&answer([5, u32::MAX])));
    let mut cut = answer([5, 5]);
    cut[2] |= 2;
    assert!(!keeps(&cut));
    // A failure, and a negative answer without SOA record (RFC 2308, section 5).
    for rcode in [2, 3] {
        let mut failed = question_message(&name);
        failed[3] |= rcode;
        assert!(!keeps(&failed));
    }
}

fn question_message(name: &Name) -> Vec<u8> {
    let mut message = question(9, name, RecordType::A, 0, None);
    message[2] |= 0x80;
    message
}

#[test]
fn the_cache_is_bounded_and_keeps_used_entries() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    let message = answer([300, 300]);
    let parts = parse_answer(&message).unwrap();
    let name = |i: usize| Name::parse(&format!("n{i}.example")).unwrap();
    let used = Question::new(&name(0), RecordType::A, false, false);
    for i in 0..40_000 {
        cache.put(&Question::new(&name(i), RecordType::A, false, false), &message, &parts, now);
        assert!(cache.get(&used, now).is_some(), "{i}");
    }
    assert!(cache.len() <= 10_000);
}

mod search_lists {
    use std::collections::HashMap;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use crate::answer::{Outcome, Target, Transport, answer};
    use crate::message::{compose_alias_answer, records};
    use crate::wire::{Query, RecordType, question};
    use ovl_zone::Client;
    use ovl_zone::Name;
    use ovl_zone::{ClientContext, OtherRecords, Records, Zone};

    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// Services `db` in `shop` and `api` in `prod`, an external one in `shop`, and a client in `shop`.
    fn zone(walks: bool) -> Zone {
        let mut zone = Zone::new(None);
        zone.begin_cluster(name("cluster.local"), walks);
        for (full, last) in [("db.shop.svc.cluster.local", 50), ("api.prod.svc.cluster.local", 51)] {
            let v4 = [Ipv4Addr::new(10, 96, 0, last)].into();
            zone.set_cluster(&name(full), Records { v4, ..Records::default() });
        }
        for (from, to) in [
            ("ext.shop.svc.cluster.local", "db.example.org"),
            ("ext2.shop.svc.cluster.local", "ext.shop.svc.cluster.local"),
            ("in1.shop.svc.cluster.local", "api.prod.svc.cluster.local"),
            ("in2.shop.svc.cluster.local", "in1.shop.svc.cluster.local"),
            ("lost.shop.svc.cluster.local", "no.prod.svc.cluster.local"),
            ("path.shop.svc.cluster.local", "api.example.org.shop.svc.cluster.local"),
            ("loop.shop.svc.cluster.local", "loop2.shop.svc.cluster.local"),
            ("loop2.shop.svc.cluster.local", "loop.shop.svc.cluster.local"),
        ] {
            let alias = Some(name(to).into());
            zone.set_cluster(&name(from), OtherRecords { alias, ..OtherRecords::default() }.into());
        }
        let services = vec![(5432, name("db.shop.svc.cluster.local").into())];
        let srv = OtherRecords { services, ..OtherRecords::default() };
        zone.set_cluster(&name("_pg._tcp.db.shop.svc.cluster.local"), srv.into());
        let unready = Records { unready: true, ..Records::default() };
        zone.set_cluster(&name("late.shop.svc.cluster.local"), unready);
        let context = ClientContext {
            networks: Arc::from([]),
            search: Some(name("shop.svc")),
            external: true,
            watched: Arc::from([]),
        };
        zone.set_clients(HashMap::from([(CLIENT, context)]));
        zone
    }

    /// Returns the answer as text.
    fn ask(zone: &Zone, text: &str, kind: RecordType) -> String {
        let message = question(1, &name(text), kind, 0, None);
        let mut buffer = [0; 2000];
        match answer(zone, Client::Endpoint(CLIENT), Transport::Udp, &message, &mut buffer, 0) {
            Outcome::Answer(length) => {
                let (rcode, records) = records(&buffer[..length]).unwrap();
                let data: Vec<String> = records.iter().map(|record| record.data.to_string()).collect();
                format!("{rcode} {}", data.join(" ")).trim_end().to_owned()
            }
            Outcome::Alias(target) => match *target {
                Target { name, walk: Some(_) } => format!("asks for {name}, walking"),
                Target { name, walk: None } => format!("asks for {name}"),
            },
            Outcome::Forward => "asks as it is".to_owned(),
            Outcome::Ignore => "ignores".to_owned(),
        }
    }

    #[test]
    fn the_first_step_of_a_search_list_gets_the_final_answer() {
        let on = zone(true);
        for (text, expected) in [
            // An existing name wins.
            ("db.shop.svc.cluster.local", "NOERROR 10.96.0.50"),
            // api.prod: found at the second step.
            ("api.prod.shop.svc.cluster.local", "NOERROR api.prod.svc.cluster.local 10.96.0.51"),
            // db.shop.svc: found at the third step.
            ("db.shop.svc.shop.svc.cluster.local", "NOERROR db.shop.svc.cluster.local 10.96.0.50"),
            // A full name has fewer than five dots too: found at the last step.
            (
                "db.shop.svc.cluster.local.shop.svc.cluster.local",
                "NOERROR db.shop.svc.cluster.local 10.96.0.50",
            ),
            ("no.shop.svc.cluster.local.shop.svc.cluster.local", "NXDOMAIN"),
            // A name of another domain.
            ("api.example.org.shop.svc.cluster.local", "asks for api.example.org, walking"),
            ("example.org", "asks as it is"),
            // A name below a Service.
            ("no.db.shop.svc.cluster.local", "NXDOMAIN"),
            ("a.b.db.shop.svc.cluster.local", "NXDOMAIN"),
            // A headless Service without ready endpoints: it does not exist and is not forwarded.
            ("late.shop.svc.cluster.local", "NXDOMAIN"),
            ("late.shop.shop.svc.cluster.local", "NXDOMAIN"),
            ("pod.late.shop.svc.cluster.local", "NXDOMAIN"),
            // One label, the search list of another namespace, and later steps.
            ("api.shop.svc.cluster.local", "NXDOMAIN"),
            ("api.example.org.prod.svc.cluster.local", "NXDOMAIN"),
            ("api.example.org.svc.cluster.local", "NXDOMAIN"),
            ("api.example.org.cluster.local", "NXDOMAIN"),
            // An external Service.
            ("ext.shop.svc.cluster.local", "asks for db.example.org"),
            ("ext.shop.shop.svc.cluster.local", "asks for db.example.org, walking"),
        ] {
            assert_eq!(ask(&on, text, RecordType::A), expected, "{text}");
        }
        assert_eq!(ask(&on, "ext.shop.svc.cluster.local", RecordType::CNAME), "NOERROR db.example.org");
        assert_eq!(
            ask(&on, "_pg._tcp.db.shop.svc.cluster.local", RecordType::SRV),
            "NOERROR 0 1 5432 db.shop.svc.cluster.local"
        );
        let off = zone(false);
        assert_eq!(ask(&off, "api.example.org.shop.svc.cluster.local", RecordType::A), "NXDOMAIN");
        assert_eq!(ask(&off, "db.shop.svc.cluster.local", RecordType::A), "NOERROR 10.96.0.50");
    }

    /// No name below the cluster domain is ever asked of others.
    #[test]
    fn aliases_in_a_row_are_followed_in_the_zone() {
        let zone = zone(true);
        let (one, two) = ("api.prod.svc.cluster.local", "in1.shop.svc.cluster.local");
        let walked = ".svc.cluster.local.shop.svc.cluster.local";
        for (text, expected) in [
            ("in1.shop.svc.cluster.local".to_owned(), format!("NOERROR {one} 10.96.0.51")),
            ("in2.shop.svc.cluster.local".to_owned(), format!("NOERROR {two} {one} 10.96.0.51")),
            // The search list ends at an alias.
            (format!("in1.shop{walked}"), format!("NOERROR {two} {one} 10.96.0.51")),
            (
                format!("in2.shop{walked}"),
                format!("NOERROR in2.shop.svc.cluster.local {two} {one} 10.96.0.51"),
            ),
            (format!("ext2.shop{walked}"), "asks for db.example.org, walking".to_owned()),
            ("ext2.shop.svc.cluster.local".to_owned(), "asks for db.example.org".to_owned()),
            // The target does not exist, and is no name of a client's search list.
            (format!("lost.shop{walked}"), "NXDOMAIN".to_owned()),
            ("path.shop.svc.cluster.local".to_owned(), "NXDOMAIN".to_owned()),
            ("loop.shop.svc.cluster.local".to_owned(), "SERVFAIL".to_owned()),
            (format!("loop.shop{walked}"), "SERVFAIL".to_owned()),
        ] {
            assert_eq!(ask(&zone, &text, RecordType::A), expected, "{text}");
        }
        assert_eq!(ask(&zone, "in2.shop.svc.cluster.local", RecordType::CNAME), format!("NOERROR {two}"));
        assert_eq!(ask(&zone, "in2.shop.svc.cluster.local", RecordType::TXT), format!("NOERROR {two} {one}"));
    }

    #[test]
    fn an_upstream_answer_gets_a_cname_record() {
        let message = question(1, &name("a.example.shop.svc.cluster.local"), RecordType::A, 0, None);
        let query = Query::read(&message).unwrap();
        let target = Target { name: name("a.example"), walk: Some(name("cluster.local")) };
        let said = compose_alias_answer(&message, &query, &target, &super::answer([60, 60])).unwrap();
        let (_, records) = records(&said).unwrap();
        let lines: Vec<String> =
            records.iter().map(|record| format!("{} {} {}", record.name, record.kind, record.data)).collect();
        assert_eq!(
            lines,
            [
                "a.example.shop.svc.cluster.local CNAME a.example",
                "a.example CNAME b.example",
                "b.example A 192.0.2.1"
            ]
        );
    }

    #[test]
    fn a_client_on_internal_networks_alone_gets_no_external_names() {
        let mut zone = zone(true);
        let context = ClientContext {
            networks: Arc::from([]),
            search: Some(name("shop.svc")),
            external: false,
            watched: Arc::from([]),
        };
        zone.set_clients(HashMap::from([(CLIENT, context)]));
        for (text, expected) in [
            ("db.shop.svc.cluster.local", "NOERROR 10.96.0.50"),
            ("api.prod.shop.svc.cluster.local", "NOERROR api.prod.svc.cluster.local 10.96.0.51"),
            ("secret.example.org", "REFUSED"),
            // The client goes on with its search list after NXDOMAIN.
            ("api.example.org.shop.svc.cluster.local", "NXDOMAIN"),
            ("ext.shop.svc.cluster.local", "REFUSED"),
            ("ext.shop.shop.svc.cluster.local", "NXDOMAIN"),
        ] {
            let answer = ask(&zone, text, RecordType::A);
            assert!(answer.starts_with(expected), "{text}: {answer}");
        }
        assert_eq!(ask(&zone, "ext.shop.svc.cluster.local", RecordType::CNAME), "NOERROR db.example.org");
    }
}

/// What a client is told of names that it is watched for, and the patterns of such names.
mod told {
    use std::collections::HashMap;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use ovl_zone::{Client, ClientContext, Name, NamePattern, OtherRecords, Records, Zone};
    use proptest::prelude::*;

    use crate::answer::{Outcome, Target, Transport, answer};
    use crate::message::compose_alias_answer;
    use crate::told::{Found, Recent, find};
    use crate::wire::{Query, RecordType, question};

    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    const ASKER: Client = Client::Endpoint(CLIENT);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn pattern(text: &str) -> NamePattern {
        NamePattern::parse(text).unwrap()
    }

    fn wire(text: &str) -> Vec<u8> {
        [name(text).as_bytes(), &[0]].concat()
    }

    /// An answer with these records: owner, time to live, and a target or the last byte of an address.
    fn said(asked: &str, records: &[(&str, u32, Result<&str, u8>)]) -> Vec<u8> {
        let mut message = question(9, &name(asked), RecordType::A, 0, None);
        message[2] |= 0x80;
        message[7] = records.len() as u8;
        for (owner, ttl, data) in records {
            message.extend_from_slice(&wire(owner));
            let (kind, data) = match data {
                Ok(target) => (5, wire(target)),
                Err(last) => (1, vec![192, 0, 2, *last]),
            };
            message.extend_from_slice(&[0, kind, 0, 1]);
            message.extend_from_slice(&ttl.to_be_bytes());
            message.extend_from_slice(&(data.len() as u16).to_be_bytes());
            message.extend_from_slice(&data);
        }
        message
    }

    /// A zone with a client that is watched for these names, on a network with an endpoint `www.ovl.test`.
    fn zone(watched: &[&str]) -> Zone {
        let mut zone = Zone::new(Some(name("ovl.internal")));
        zone.begin_cluster(name("cluster.local"), true);
        zone.set_network(1, name("blue"), Vec::new());
        for text in ["www.trap.test", "db"] {
            zone.set(
                1,
                &name(text),
                Records { v4: [Ipv4Addr::new(10, 0, 0, 3)].into(), ..Records::default() },
            );
        }
        let alias = Some(name("www.ovl.test").into());
        let external = OtherRecords { alias, ..OtherRecords::default() };
        zone.set_cluster(&name("ext.shop.svc.cluster.local"), external.into());
        let v4 = [Ipv4Addr::new(10, 0, 0, 4)].into();
        zone.set_cluster(&name("db.shop.svc.cluster.local"), Records { v4, ..Records::default() });
        let watched = watched.iter().map(|text| pattern(text)).collect();
        let context = ClientContext {
            networks: Arc::from([1]),
            search: Some(name("shop.svc")),
            external: true,
            watched,
        };
        zone.set_clients(HashMap::from([(CLIENT, context)]));
        zone
    }

    fn addresses(found: Option<Found>) -> Vec<(IpAddr, u32)> {
        found.map(|found| found.addresses).unwrap_or_default()
    }

    fn at(last: u8, ttl: u32) -> (IpAddr, u32) {
        ([192, 0, 2, last].into(), ttl)
    }

    /// What an answer of another resolver tells.
    fn forwarded(watched: &[&str], asked: &str, records: &[(&str, u32, Result<&str, u8>)]) -> Option<Found> {
        find(&zone(watched), ASKER, &name(asked), None, false, &said(asked, records))
    }

    #[test]
    fn addresses_are_those_at_the_end_of_the_chain_with_its_shortest_time() {
        let chain: &[(&str, u32, Result<&str, u8>)] = &[
            // In any order, and with records that the chain does not lead to.
            ("c.other.test", 60, Err(7)),
            ("b.other.test", 30, Ok("C.other.test")),
            ("c.other.test", 20, Err(8)),
            ("x.other.test", 600, Err(9)),
            ("www.ovl.test", 90, Ok("b.other.test")),
        ];
        let found = forwarded(&["*.ovl.test", "www.ovl.test"], "WWW.ovl.test", chain).unwrap();
        assert_eq!(found.name, "www.ovl.test");
        assert_eq!(found.patterns, [pattern("*.ovl.test"), pattern("www.ovl.test")]);
        assert_eq!(found.addresses, [at(7, 30), at(8, 20)]);
        assert_eq!(forwarded(&["c.other.test"], "www.ovl.test", chain), None, "another resolver's word");
        // Nothing to reach.
        assert_eq!(
            forwarded(&["www.ovl.test"], "www.ovl.test", &[("www.ovl.test", 5, Ok("lost.test"))]),
            None
        );
        let endless: &[_] = &[("a.ovl.test", 5, Ok("b.ovl.test")), ("b.ovl.test", 5, Ok("a.ovl.test"))];
        assert_eq!(forwarded(&["a.ovl.test"], "a.ovl.test", endless), None);
        // A time with the upper bit set is none.
        let strange = forwarded(&["a.ovl.test"], "a.ovl.test", &[("a.ovl.test", u32::MAX, Err(1))]);
        assert_eq!(addresses(strange), [at(1, 0)]);
        assert_eq!(forwarded(&[], "a.ovl.test", &[("a.ovl.test", 5, Err(1))]), None);
    }

    #[test]
    fn names_that_ovl_gives_in_place_of_the_asked_one_count() {
        let ask = |watched: &[&str], asked: &str| {
            let zone = zone(watched);
            let message = question(1, &name(asked), RecordType::A, 0, None);
            let mut buffer = [0; 2000];
            match answer(&zone, ASKER, Transport::Tcp, &message, &mut buffer, 0) {
                Outcome::Answer(length) => find(&zone, ASKER, &name(asked), None, true, &buffer[..length]),
                Outcome::Alias(target) => {
                    let Target { name: to, .. } = *target;
                    let to = to.to_string();
                    let upstream = said(&to, &[(&to, 60, Err(7))]);
                    let query = Query::read(&message).unwrap();
                    let whole = compose_alias_answer(&message, &query, &target, &upstream).unwrap();
                    find(&zone, ASKER, &name(asked), Some(&target), false, &whole)
                }
                other => panic!("{other:?}"),
            }
        };
        let told = |watched: &str, asked: &str| addresses(ask(&[watched], asked)).len();
        for (watched, asked, count) in [
            // An external Service is both.
            ("www.ovl.test", "ext.shop.svc.cluster.local", 1),
            ("*.cluster.local", "ext.shop.svc.cluster.local", 1),
            // The steps of a search list are no names of what it ends at.
            ("api.ovl.test", "api.ovl.test.shop.svc.cluster.local", 1),
            ("*.cluster.local", "api.ovl.test.shop.svc.cluster.local", 0),
            ("*.svc.cluster.local", "db.shop.svc.shop.svc.cluster.local", 1),
            ("*.shop.svc.shop.svc.cluster.local", "db.shop.svc.shop.svc.cluster.local", 0),
            // Names of the zone. What an endpoint is called is no name in the DNS.
            ("db.shop.svc.cluster.local", "db.shop.svc.cluster.local", 1),
            ("*.blue.ovl.internal", "db.blue.ovl.internal", 1),
            ("db.blue", "db.blue", 0),
            ("www.trap.test", "www.trap.test", 0),
        ] {
            assert_eq!(told(watched, asked), count, "{watched}: {asked}");
        }
    }

    #[test]
    fn the_same_is_told_again_after_a_second() {
        let found = |ttl, last| Found {
            name: "www.ovl.test".to_owned(),
            patterns: vec![pattern("www.ovl.test")],
            addresses: vec![at(1, ttl), at(last, ttl)],
        };
        let (mut recent, start) = (Recent::default(), Instant::now());
        assert!(!recent.has(&found(5, 2), start));
        recent.note(&found(5, 2), start);
        let mut rotated = found(4, 2);
        rotated.addresses.reverse();
        assert!(recent.has(&rotated, start));
        assert!(!recent.has(&found(5, 3), start), "another address");
        assert!(!recent.has(&found(5, 2), start + Duration::from_secs(1)));
    }

    fn labels() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[a-cA-C]{1,2}", 1..5)
    }

    proptest! {
        /// A pattern matches what the API says, by a comparison of lists of labels.
        #[test]
        fn patterns_match_whole_labels(of in labels(), asked in labels(), wild in any::<bool>(), dots in any::<[bool; 2]>()) {
            let lower = |labels: &[String]| labels.iter().map(|label| label.to_lowercase()).collect::<Vec<_>>();
            let text = |labels: &[String], dot: bool| labels.join(".") + if dot { "." } else { "" };
            let pattern = format!("{}{}", if wild { "*." } else { "" }, text(&of, dots[0]));
            let expected = match wild {
                false => lower(&of) == lower(&asked),
                true => asked.len() > of.len() && lower(&asked).ends_with(&lower(&of)),
            };
            let asked = name(&text(&asked, dots[1]));
            let pattern = NamePattern::parse(&pattern).unwrap();
            prop_assert_eq!(pattern.matches(&asked), expected, "{} {}", pattern, asked);
            prop_assert_eq!(NamePattern::parse(&pattern.to_string()), Some(pattern));
        }

        /// What is read of any answer is one of its records, and nothing panics.
        #[test]
        fn any_answer_is_read(bytes in prop::collection::vec(any::<u8>(), 0..300), asked in labels()) {
            let asked = name(&asked.join("."));
            let mut message = question(1, &asked, RecordType::A, 0, None);
            message[2] |= 0x80;
            message[7] = 3;
            message.extend_from_slice(&bytes);
            let watched = [asked.to_string(), "*.a".to_owned(), "*.b".to_owned()];
            let watched: Vec<&str> = watched.iter().map(String::as_str).collect();
            if let Some(found) = find(&zone(&watched), ASKER, &asked, None, false, &message) {
                prop_assert!(found.addresses.len() <= 3 && !found.patterns.is_empty());
            }
        }
    }

    #[test]
    fn patterns_that_match_no_name_are_none() {
        for text in ["", "*", "*.", "a..b", "a.*.b", "*.*.b", "a*.b", &format!("{}.b", "a".repeat(64))] {
            assert_eq!(NamePattern::parse(text), None, "{text}");
        }
    }
}
