//! An interpreter of nftables rules that is sufficient for the first packet of a connection in `inet ovl-policy`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_dataplane::nft::{Field, Key, Skeleton, Table, Value};
use ovl_dataplane::state::Dataplane;

/// The elements of sets that end by themselves, by the name of their set.
pub(crate) type Told = BTreeSet<(String, IpAddr)>;

/// The first packet of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
}

/// Whether the table accepts a packet. Without a table, it is accepted. `told` are the elements of sets that end by themselves.
pub(crate) fn passes(dataplane: &Dataplane, told: &Told, packet: &Packet) -> bool {
    let Some(skeleton) = dataplane.tables.get(&Table::Policy) else { return true };
    let mut run = Run { dataplane, skeleton, told, packet, priority: 0 };
    run.chain("forward") != Verdict::Drop
}

/// The result of a chain or a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    /// Return to the calling chain.
    Return,
    /// Continue with the next rule.
    Next,
}

struct Run<'a> {
    dataplane: &'a Dataplane,
    skeleton: &'a Skeleton,
    told: &'a Told,
    packet: &'a Packet,
    priority: u32,
}

impl Run<'_> {
    fn chain(&mut self, name: &str) -> Verdict {
        let chain = self.skeleton.chains.iter().find(|chain| chain.name == name);
        for rule in &chain.unwrap_or_else(|| panic!("no chain {name}")).rules {
            let words: Vec<&str> = rule.split(' ').filter(|word| *word != ".").collect();
            match self.rule(&words) {
                Verdict::Next => {}
                end => return end,
            }
        }
        Verdict::Return
    }

    fn rule(&mut self, words: &[&str]) -> Verdict {
        match words {
            [] => Verdict::Next,
            ["accept"] => Verdict::Accept,
            ["drop"] => Verdict::Drop,
            ["return"] => Verdict::Return,
            // The packet begins a new connection, is a valid first packet, and has no mark.
            ["ct", "state" | "mark", ..] | ["tcp", "flags", ..] => Verdict::Next,
            ["update", _, "{", rest @ ..] => {
                let end = rest.iter().position(|word| *word == "}").unwrap();
                self.rule(&rest[end + 1..])
            }
            ["goto", chain] => match self.chain(chain) {
                Verdict::Next => Verdict::Return,
                end => end,
            },
            ["jump", chain] => match self.chain(chain) {
                Verdict::Return => Verdict::Next,
                end => end,
            },
            ["meta", "priority", "set", "0"] => Verdict::Next,
            ["meta", "priority", "set", handle, "return"] => {
                self.priority = number_of(handle);
                Verdict::Return
            }
            ["meta", "priority", handle, "return"] => {
                self.given(self.priority == number_of(handle), &["return"])
            }
            // This rule is for the bridge table and has no verdict.
            ["iifname", _, "oifname", _, "ct", "status", "dnat", "meta", "mark", "set", ..] => Verdict::Next,
            ["meta", "priority", "set", "ct", way, family, "saddr", "map", map, rest @ ..] => {
                let found = self.address(way, family).and_then(|at| self.look_up(map, &[Field::Ip(at)]));
                let Some(Value::Data(bytes)) = found else { return Verdict::Next };
                self.priority = u32::from_ne_bytes((&*bytes).try_into().unwrap());
                self.rule(rest)
            }
            ["meta", "priority", "vmap", "{", rest @ ..] => {
                let own = format!("{:x}:{:x}", self.priority >> 16, self.priority & 0xffff);
                match rest.iter().position(|word| *word == own) {
                    Some(at) => self.rule(&[rest[at + 2], rest[at + 3].trim_end_matches(',')]),
                    None => Verdict::Next,
                }
            }
            ["meta", "nfproto", family, rest @ ..] => {
                self.given((*family == "ipv4") == self.packet.from.is_ipv4(), rest)
            }
            ["meta", "l4proto", "!=", "{", a, b, c, "}", rest @ ..] => {
                let among =
                    [a, b, c].iter().any(|word| number(word.trim_end_matches(',')) == self.packet.protocol);
                self.given(!among, rest)
            }
            ["meta", "l4proto", protocol, rest @ ..] => {
                self.given(number(protocol) == self.packet.protocol, rest)
            }
            ["ct", "reply", "proto-src", rest @ ..] => {
                let (ports, rest) = values(rest);
                let fits = ports.iter().any(|ports| {
                    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
                    let range = first.parse().unwrap()..=last.parse::<u16>().unwrap();
                    range.contains(&self.packet.port)
                });
                self.given(fits, rest)
            }
            ["ct", "reply", family, "saddr", "ct", "reply", "proto-src", set, rest @ ..] => {
                let fields =
                    self.address("reply", family).map(|at| [Field::Ip(at), Field::Port(self.packet.port)]);
                self.given(fields.is_some_and(|key| self.look_up(set, &key).is_some()), rest)
            }
            ["ct", one, family, "saddr", "ct", other, _, "saddr", set, rest @ ..] => {
                let both = self.address(one, family).zip(self.address(other, family));
                let found =
                    both.is_some_and(|(a, b)| self.look_up(set, &[Field::Ip(a), Field::Ip(b)]).is_some());
                self.given(found, rest)
            }
            ["ct", way, family, "saddr", rest @ ..] => {
                let Some(at) = self.address(way, family) else { return Verdict::Next };
                let (all, rest) = values(rest);
                let fits = all.iter().any(|what| match (what.strip_prefix('@'), what.split_once('-')) {
                    (Some(_), _) => self.look_up(what, &[Field::Ip(at)]).is_some(),
                    (None, Some((first, last))) => {
                        let [first, last] = [first, last].map(|end| end.parse::<IpAddr>().unwrap());
                        (first..=last).contains(&at)
                    }
                    (None, None) => match what.parse::<IpNet>() {
                        Ok(net) => net.contains(&at),
                        Err(_) => what.parse::<IpAddr>().unwrap() == at,
                    },
                });
                self.given(fits, rest)
            }
            // No packet of these tests is neighbour discovery.
            ["ip6", "hoplimit", "255", "icmpv6", ..] => Verdict::Next,
            other => panic!("not known here: {other:?}"),
        }
    }

    fn given(&mut self, fits: bool, rest: &[&str]) -> Verdict {
        if fits { self.rule(rest) } else { Verdict::Next }
    }

    fn address(&self, way: &str, family: &str) -> Option<IpAddr> {
        let at = match way {
            "original" => self.packet.from,
            _ => self.packet.to,
        };
        Some(at).filter(|at| at.is_ipv4() == (family == "ip"))
    }

    fn look_up(&self, name: &str, key: &[Field<'_>]) -> Option<Value> {
        let name = name.trim_start_matches('@');
        if let ([Field::Ip(at)], true) = (key, name.starts_with("name.")) {
            assert!(self.skeleton.objects.iter().any(|object| object.name == name), "no set {name}");
            return self.told.contains(&(name.to_owned(), *at)).then_some(Value::None);
        }
        let set = self.skeleton.sets.iter().find(|set| set.name == name);
        let set = set.unwrap_or_else(|| panic!("no set {name}"));
        self.dataplane.elements.of(set)?.get(&Key::of(key)).cloned()
    }
}

/// Splits off one value, or the values between braces.
fn values<'a, 'w>(words: &'a [&'w str]) -> (Vec<&'w str>, &'a [&'w str]) {
    match words {
        ["{", rest @ ..] => {
            let end = rest.iter().position(|word| *word == "}").unwrap();
            (rest[..end].iter().map(|word| word.trim_end_matches(',')).collect(), &rest[end + 1..])
        }
        [one, rest @ ..] => (vec![*one], rest),
        [] => panic!("no value"),
    }
}

/// Reads a number as nft writes priorities.
fn number_of(handle: &str) -> u32 {
    let (high, low) = handle.split_once(':').unwrap();
    let part = |text| u32::from_str_radix(text, 16).unwrap();
    part(high) << 16 | part(low)
}

fn number(protocol: &str) -> u8 {
    match protocol {
        "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        other => panic!("{other}"),
    }
}
