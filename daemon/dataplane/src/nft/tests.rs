use std::net::IpAddr;

use super::*;

const MAP: Set = Set::new(
    Table::Services,
    "backends",
    Shape {
        key: &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority],
        data: Data::Fields(&[Type::Ipv4, Type::Port]),
        ranges: false,
    },
);

const RANGES: Set = Set::new(
    Table::Policy,
    "peers",
    Shape { key: &[Type::Ipv6, Type::Protocol, Type::Port], data: Data::Verdict, ranges: true },
);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn definitions_and_elements_are_what_nft_reads() {
    assert_eq!(
        MAP.definition(),
        "\tmap backends {\n\t\ttype ipv4_addr . inet_proto . inet_service . classid : ipv4_addr . inet_service\n\t}\n"
    );
    assert_eq!(
        RANGES.definition(),
        "\tmap peers {\n\t\ttype ipv6_addr . inet_proto . inet_service : verdict\n\t\tflags interval\n\t}\n"
    );
    let key = Key::of(&[Field::Ip(ip("10.0.0.1")), Field::Protocol(6), Field::Port(80), Field::Number(2)]);
    assert_eq!(key.first().len(), 16);
    assert_eq!(key.last(), None);
    let value = Value::of(&[Field::Ip(ip("10.1.0.2")), Field::Port(8080)]);
    assert_eq!(Element { set: MAP, key, value }.to_string(), "10.0.0.1 . tcp . 80 . 0:2 : 10.1.0.2 . 8080");
    let key =
        Key::of(&[Field::Net("fd00:1::/64".parse().unwrap()), Field::Protocol(17), Field::Ports(53, 99)]);
    let value = Value::Verdict(Verdict::Jump("x".into()));
    assert_eq!(Element { set: RANGES, key, value }.to_string(), "fd00:1::/64 . udp . 53-99 : jump x");
}

#[test]
fn elements_are_shared_until_they_change() {
    let mut all = Elements::default();
    let key = |n: u32| Key::of(&[Field::Number(n)]);
    all.insert(&MAP, key(1), Value::None);
    let copy = all.clone();
    all.insert(&MAP, key(2), Value::None);
    assert_eq!((copy.len(), all.len()), (1, 2));
    all.remove(&MAP, &key(1));
    all.remove(&MAP, &key(2));
    assert!(all.is_empty());
    all.merge(copy.clone());
    assert_eq!(all, copy);
    all.forget(Table::Services);
    assert!(all.is_empty());
}
