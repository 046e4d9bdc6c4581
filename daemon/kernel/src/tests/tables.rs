//! Tables with elements: skeletons and elements of each kind, changes by other programs, and many elements at once.

use std::sync::Arc;
use std::time::Instant;

use ovl_dataplane::nft::{
    Chain, Data, Field, Key, Object, Set, Shape, Skeleton, Table, Type, Value, Verdict,
};
use ovl_dataplane::op::{NftOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::Mac;

use super::lab::{Lab, in_namespace, ip, net, run};
use crate::{Goal, KernelEvent, TimedChange, TimedElement};

const T: Table = Table::Services;

const fn set(name: &'static str, key: &'static [Type], data: Data, ranges: bool) -> Set {
    Set::new(T, name, Shape { key, data, ranges })
}

const PORTS: Set = set("ports", &[Type::Port], Data::None, false);
const MACS: Set = set("macs", &[Type::Mac], Data::None, false);
const RANGES: Set = set("ranges", &[Type::Port], Data::None, true);
const NETS: Set = set("nets", &[Type::Ipv6], Data::Verdict, true);
const PEERS: Set = set("peers", &[Type::Ipv4, Type::Protocol, Type::Port], Data::Verdict, true);
const BACKENDS: Set = set(
    "backends",
    &[Type::Ipv4, Type::Protocol, Type::Port, Type::Priority],
    Data::Fields(&[Type::Ipv4, Type::Port]),
    false,
);
const MARKS: Set = set("marks", &[Type::Device, Type::Ipv6], Data::Fields(&[Type::Mark]), false);

fn chain(name: &str, rules: &[&str]) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules: rules.iter().map(|rule| (*rule).to_owned()).collect() }
}

fn skeleton() -> Skeleton {
    let hook = Some("type filter hook input priority 0; policy accept;".to_owned());
    let affinity =
        "type ipv4_addr . inet_service : ipv4_addr; flags dynamic,timeout; timeout 60s;".to_owned();
    Skeleton {
        sets: vec![PORTS, MACS, RANGES, NETS, PEERS, BACKENDS, MARKS],
        objects: vec![
            Object { kind: "counter", name: "seen".to_owned(), body: String::new() },
            Object { kind: "map", name: "affinity".to_owned(), body: affinity },
        ],
        chains: vec![
            chain("x", &["counter name seen", "tcp dport { 1, 2 } counter accept"]),
            chain("y", &["return"]),
            chain("n", &["dnat ip to ip daddr . meta l4proto . th dport . meta priority map @backends"]),
            Chain { hook, ..chain("input", &["ip6 saddr vmap @nets", "jump x"]) },
        ],
    }
}

fn verdict(chain: &'static str) -> Value {
    Value::Verdict(Verdict::Jump(chain.into()))
}

fn wanted() -> Dataplane {
    let mut kernel = Dataplane::default();
    kernel.tables.insert(T, Arc::new(skeleton()));
    let all = &mut kernel.elements;
    for port in [0, 80, 443, u16::MAX] {
        all.insert(&PORTS, Key::of(&[Field::Port(port)]), Value::None);
    }
    all.insert(&MACS, Key::of(&[Field::Mac(Mac([2, 0, 0, 0, 0, 9]))]), Value::None);
    for (first, last) in [(0, 9), (10, 10), (80, 99), (60_000, u16::MAX)] {
        all.insert(&RANGES, Key::of(&[Field::Ports(first, last)]), Value::None);
    }
    for prefix in ["::/16", "fd00::/64", "fd00:0:0:1::/64", "fd01::7/128", "ffff::/16"] {
        all.insert(&NETS, Key::of(&[Field::Net(net(prefix))]), verdict("x"));
    }
    let drop = Value::Verdict(Verdict::Drop);
    for (prefix, first, last, value) in [
        ("10.0.0.0/8", 1, u16::MAX, verdict("x")),
        ("192.0.2.7/32", 53, 53, drop.clone()),
        ("192.0.2.8/32", 53, 99, drop),
        ("192.0.2.9/32", 53, 53, Value::Verdict(Verdict::Goto("y".into()))),
    ] {
        let key = Key::of(&[Field::Net(net(prefix)), Field::Protocol(17), Field::Ports(first, last)]);
        all.insert(&PEERS, key, value);
    }
    for slot in 0..3 {
        let key =
            Key::of(&[Field::Ip(ip("10.9.0.1")), Field::Protocol(6), Field::Port(80), Field::Number(slot)]);
        all.insert(&BACKENDS, key, Value::of(&[Field::Ip(ip("10.1.0.2")), Field::Port(8080)]));
    }
    let key = Key::of(&[Field::Device("ovb-x"), Field::Ip(ip("fd00::1"))]);
    all.insert(&MARKS, key, Value::of(&[Field::Number(0x4000)]));
    kernel
}

/// The events about tables. Other events are ignored, because devices may still be coming up.
async fn noticed(lab: &mut Lab) -> Vec<KernelEvent> {
    lab.events().await.into_iter().filter(|event| *event != KernelEvent::Underlay).collect()
}

/// Dumps the tables of ovl.
async fn dumped(lab: &Lab, wanted: &Dataplane) -> Dataplane {
    let goal = |desired| Goal {
        desired,
        prune: true,
        ignored: Default::default(),
        expected: Default::default(),
        apply: false,
    };
    let left = lab.kernel.reconcile(goal(wanted.clone())).await.expect("dump");
    assert!(left.outcomes.is_empty(), "left to do: {:#?}", left.outcomes);
    let Dataplane { tables, elements, .. } = lab.dump().await;
    Dataplane { tables, elements, ..Dataplane::default() }
}

/// Runs a full pass. Returns the applied operations as text.
async fn repair(lab: &Lab, wanted: &Dataplane) -> Vec<String> {
    let goal = Goal {
        desired: wanted.clone(),
        prune: true,
        ignored: Default::default(),
        expected: Default::default(),
        apply: true,
    };
    let mut done = Vec::new();
    for outcome in lab.kernel.reconcile(goal).await.expect("pass").outcomes {
        outcome.result.unwrap_or_else(|error| panic!("{}: {error}", outcome.op));
        done.push(outcome.op.to_string());
    }
    done
}

#[test]
fn elements_of_every_kind_are_written_changed_and_deleted() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = wanted();
        lab.pass(&wanted).await;
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        assert_eq!(noticed(&mut lab).await, [], "ovld made this change");
        // nft lists the wanted elements.
        let listing = run("nft list table inet ovl-services");
        for line in [
            "elements = { 0-9, 10, 80-99, 60000-65535 }",
            "10.9.0.1 . tcp . 80 . 0:2 : 10.1.0.2 . 8080",
            "10.0.0.0/8 . udp . 1-65535 : jump x",
            "192.0.2.7 . udp . 53 : drop",
            "fd00::/64 : jump x",
            "\"ovb-x\" . fd00::1 : 0x00004000",
            "02:00:00:00:00:09",
        ] {
            assert!(listing.contains(line), "{line}\n{listing}");
        }
        // nft accepts the text of each operation.
        let key = Key::of(&[Field::Net(net("10.0.0.0/8")), Field::Protocol(17), Field::Ports(1, u16::MAX)]);
        let value = wanted.elements.insert(&PEERS, key.clone(), verdict("y"));
        let ops = repair(&lab, &wanted).await;
        assert_eq!(
            ops,
            [
                "nft delete element inet ovl-services peers '{ 10.0.0.0/8 . udp . 1-65535 }'",
                "nft add element inet ovl-services peers '{ 10.0.0.0/8 . udp . 1-65535 : jump y }'"
            ]
        );
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        wanted.elements.insert(&PEERS, key, value.expect("there"));
        let undo = [ops[0].clone(), ops[1].replace("jump y", "jump x")];
        undo.iter().for_each(|line| drop(run(line)));
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        wanted.elements = Default::default();
        repair(&lab, &wanted).await;
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        repair(&lab, &Dataplane::default()).await;
        assert!(!run("nft list tables").contains("ovl-services"));
        lab.kernel.remove_filter().await.expect("an absent object is no error");
    });
}

#[test]
fn skeleton_changes_keep_elements() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = wanted();
        lab.pass(&wanted).await;
        let skeleton = |change: &dyn Fn(&mut Skeleton)| {
            let mut skeleton = skeleton();
            change(&mut skeleton);
            Arc::new(skeleton)
        };
        // Rules and chains change. Elements are kept, also those that packets have added.
        run("nft 'add element inet ovl-services affinity { 10.0.0.1 . 80 : 10.0.0.2 }'");
        let more = skeleton(&|s| {
            s.chains[1].rules.push("accept".to_owned());
            s.chains.push(chain("z", &["jump y"]));
        });
        for next in [more, skeleton(&|_| ())] {
            wanted.tables.insert(T, next);
            assert_eq!(repair(&lab, &wanted).await, ["nft -f - # table inet ovl-services"]);
            assert_eq!(dumped(&lab, &wanted).await, wanted);
        }
        assert!(!run("nft list table inet ovl-services").contains("chain z"));
        assert!(run("nft list map inet ovl-services affinity").contains("10.0.0.1 . 80"));
        // A chain is deleted once no element refers to it. A set is deleted with its elements.
        wanted.tables.insert(T, skeleton(&|s| drop(s.chains.remove(1))));
        let key = Key::of(&[Field::Ip(ip("192.0.2.9")), Field::Protocol(17), Field::Port(53)]);
        wanted.elements.remove(&PEERS, &key).expect("there");
        repair(&lab, &wanted).await;
        assert!(!run("nft list table inet ovl-services").contains("chain y"));
        assert!(run("nft list map inet ovl-services affinity").contains("10.0.0.1 . 80"));
        wanted.tables.insert(T, skeleton(&|s| s.sets.retain(|set| *set != MARKS)));
        wanted.elements.set(&MARKS, Default::default());
        repair(&lab, &wanted).await;
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        assert!(!run("nft list table inet ovl-services").contains("map marks"));
        // Another hook: the table is created again, with its elements, in one transaction.
        let hook = Some("type filter hook input priority 7; policy accept;".to_owned());
        wanted.tables.insert(
            T,
            skeleton(&|s| {
                s.sets.retain(|set| *set != MARKS);
                s.chains.iter_mut().for_each(|chain| {
                    if chain.name == "input" {
                        chain.hook.clone_from(&hook)
                    }
                });
            }),
        );
        assert_eq!(repair(&lab, &wanted).await, ["nft -f - # table inet ovl-services"]);
        assert_eq!(dumped(&lab, &wanted).await, wanted);
    });
}

#[test]
fn changes_of_tables_by_others_are_noticed_and_repaired() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let wanted = wanted();
        lab.pass(&wanted).await;
        lab.dump().await;
        for line in [
            "nft flush ruleset",
            "nft delete table inet ovl-services",
            "nft flush chain inet ovl-services x",
            "nft insert rule inet ovl-services input accept",
            "nft flush set inet ovl-services ports",
            "nft 'delete element inet ovl-services ranges { 80-99 }'",
            "nft 'add element inet ovl-services nets { fd02::/64 : drop }'",
            "nft 'delete element inet ovl-services peers { 192.0.2.7 . udp . 53 }; add element inet ovl-services peers { 192.0.2.7 . udp . 53 : accept }'",
            "nft add chain inet ovl-services theirs",
            "nft 'add set inet ovl-services theirs { type ipv4_addr; }'",
            "nft 'add table inet ovl-services { flags dormant; }'",
        ] {
            run(line);
            assert_eq!(noticed(&mut lab).await, [KernelEvent::FilterChanged], "{line}");
            assert!(!repair(&lab, &wanted).await.is_empty(), "{line}");
            assert_eq!(dumped(&lab, &wanted).await, wanted, "{line}");
            assert_eq!(noticed(&mut lab).await, [], "{line}");
        }
        assert!(!run("nft list table inet ovl-services").contains("theirs"));
        // Elements that packets add are not drift.
        run("nft 'add element inet ovl-services affinity { 10.0.0.1 . 80 : 10.0.0.2 }'");
        assert!(repair(&lab, &wanted).await.is_empty());
    });
}

/// Elements that end by themselves: another end takes the place of the first one, one that has ended is no error, and a new
/// process finds them, also after it has written the table.
#[test]
fn elements_that_end_are_put_deleted_and_found_again() {
    const KEY: [u8; 4] = [192, 0, 2, 7];
    in_namespace(async || {
        let named = |set: &str, key: [u8; 4], left_ms| TimedElement {
            set: set.to_owned(),
            key: key.into(),
            left_ms,
            comment: "www.ovl.test".to_owned(),
        };
        let mut skeleton = skeleton();
        for name in ["name.a", "name.b"] {
            let body = "type ipv4_addr; size 3; flags timeout".to_owned();
            skeleton.objects.push(Object { kind: "set", name: name.to_owned(), body });
        }
        let mut wanted = wanted();
        wanted.tables.insert(T, Arc::new(skeleton));
        let mut lab = Lab::start();
        lab.pass(&wanted).await;
        let put = |set: &str, key, left| TimedChange::Put(named(set, key, left));
        let many =
            vec![put("name.a", KEY, 60_000), put("name.a", [192, 0, 2, 8], 1), put("name.b", KEY, 50_000)];
        lab.kernel.change_timed(T, many).await.unwrap();
        let listed = run("nft list set inet ovl-services name.a");
        assert!(
            listed.contains("192.0.2.7 timeout 1m expires") && listed.contains("\"www.ovl.test\""),
            "{listed}"
        );
        let again = vec![
            put("name.a", KEY, 600_000),
            TimedChange::Delete("name.a".to_owned(), [192, 0, 2, 8].into()),
        ];
        lab.kernel.change_timed(T, again).await.unwrap();
        assert_eq!(noticed(&mut lab).await, [], "ovld's own changes are no drift");
        let found = async |lab: &Lab| {
            let mut found = lab.kernel.timed(T, "name.".to_owned()).await.unwrap();
            found.sort_by(|a, b| a.set.cmp(&b.set));
            found
        };
        let all = found(&lab).await;
        assert_eq!(all.len(), 2, "{all:?}");
        assert!((590_000..=600_000).contains(&all[0].left_ms) && all[1].left_ms <= 50_000, "{all:?}");
        assert_eq!((&*all[0].comment, &*all[0].key), ("www.ovl.test", &KEY[..]));
        // A full set refuses, and the other one is changed.
        let full = (1..=4).map(|n| put("name.a", [10, 0, 0, n], 60_000)).chain([put(
            "name.b",
            [10, 0, 0, 1],
            60_000,
        )]);
        assert!(lab.kernel.change_timed(T, full.collect()).await.is_err());
        assert_eq!(found(&lab).await.len(), 3);
        // A new process.
        let lab = Lab::start();
        assert_eq!(found(&lab).await.len(), 3);
        repair(&lab, &wanted).await;
        assert_eq!(found(&lab).await.len(), 3);
        assert!(lab.kernel.timed(Table::Divert, "name.".to_owned()).await.unwrap().is_empty());
    });
}

#[test]
fn new_process_adopts_existing_tables() {
    in_namespace(async || {
        let wanted = wanted();
        Lab::start().pass(&wanted).await;
        let lab = Lab::start();
        assert_eq!(
            repair(&lab, &wanted).await,
            ["nft -f - # table inet ovl-services"],
            "the rules are written again, and the elements stay"
        );
        assert_eq!(dumped(&lab, &wanted).await, wanted);
        // Sets of another shape, as another version may have created.
        run("nft delete table inet ovl-services; nft add table inet ovl-services");
        run("nft add set inet ovl-services ports '{ type ipv4_addr; }'");
        run("nft add element inet ovl-services ports '{ 10.0.0.1 }'");
        let lab = Lab::start();
        repair(&lab, &wanted).await;
        assert_eq!(dumped(&lab, &wanted).await, wanted);
    });
}

#[test]
fn refused_change_is_reported_and_affects_no_other_table() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = wanted();
        const OTHER: Set =
            Set::new(Table::Divert, "ports", Shape { key: &[Type::Port], data: Data::None, ranges: false });
        let bridge = Skeleton { sets: vec![OTHER], chains: vec![chain("x", &[])], ..Skeleton::default() };
        wanted.tables.insert(Table::Divert, Arc::new(bridge));
        lab.pass(&wanted).await;
        let key = Key::of(&[Field::Port(7)]);
        wanted.elements.insert(&OTHER, key, Value::None);
        let good = wanted.clone();
        let key = Key::of(&[Field::Ip(ip("192.0.2.9")), Field::Protocol(17), Field::Port(53)]);
        wanted.elements.insert(&PEERS, key, verdict("nowhere"));
        let ops = ovl_dataplane::diff::diff(&lab.dump().await, &wanted, true);
        let outcomes = lab.kernel.apply(ops).await;
        let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.result.is_err()).collect();
        assert_eq!((outcomes.len(), failed.len()), (3, 2), "both halves of the change");
        let error = failed[0].result.as_ref().unwrap_err().to_string();
        assert!(error.contains("cannot change elements of inet ovl-services"), "{error}");
        assert_eq!(dumped(&lab, &good).await, good);
        let text = Skeleton { chains: vec![chain("x", &["nonsense"])], ..Skeleton::default() };
        let outcome =
            lab.kernel.apply(vec![Op::Nft(NftOp::SetTable(Table::Policy, Arc::new(text)))]).await.remove(0);
        let error = outcome.result.unwrap_err().to_string();
        assert!(error.contains("nonsense"), "{error}");
    });
}

/// Several tables are one run of `nft`, which takes all or none of them.
#[test]
fn refused_table_affects_no_other_one_of_its_batch() {
    in_namespace(async || {
        let lab = Lab::start();
        let batch = |rule: &str| {
            let skeleton = Skeleton { chains: vec![chain("x", &[rule])], ..Skeleton::default() };
            let set = |table| Op::Nft(NftOp::SetTable(table, Arc::new(skeleton.clone())));
            [Table::Divert, Table::Publish].map(set)
        };
        let [divert, publish] = batch("return");
        let [_, refused] = batch("nonsense");
        let results = |outcomes: Vec<crate::Outcome>| -> Vec<bool> {
            outcomes.into_iter().map(|outcome| outcome.result.is_ok()).collect()
        };
        assert_eq!(results(lab.kernel.apply(vec![divert.clone(), refused]).await), [true, false]);
        assert_eq!(results(lab.kernel.apply(vec![divert, publish]).await), [true, true]);
        let tables = lab.dump().await.tables;
        assert!(tables.keys().eq([Table::Divert, Table::Publish].iter()), "{tables:?}");
    });
}

#[test]
fn many_elements_are_changed_at_once() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = wanted();
        lab.pass(&wanted).await;
        for service in 0..10_000_u32 {
            let [_, _, a, b] = service.to_be_bytes();
            for slot in 0..3 {
                let at = Field::Ip([10, 96, a, b].into());
                let key = Key::of(&[at, Field::Protocol(6), Field::Port(80), Field::Number(slot)]);
                let to = Value::of(&[Field::Ip([10, 1, a, b].into()), Field::Port(8080)]);
                wanted.elements.insert(&BACKENDS, key, to);
            }
            let key = Key::of(&[Field::Ip([10, 96, a, b].into()), Field::Protocol(6), Field::Port(80)]);
            wanted.elements.insert(&PEERS_FLAT, key, verdict("x"));
        }
        let mut more = skeleton();
        more.sets.push(PEERS_FLAT);
        wanted.tables.insert(T, Arc::new(more));
        let start = Instant::now();
        let ops = ovl_dataplane::diff::diff(&lab.dump().await, &wanted, true);
        println!("{} operations: {:?}", ops.len(), start.elapsed());
        let start = Instant::now();
        for outcome in lab.kernel.apply(ops).await {
            outcome.result.expect("set");
        }
        println!("set: {:?}", start.elapsed());
        assert_eq!(noticed(&mut lab).await, [], "ovld made all changes");
        let start = Instant::now();
        assert_eq!(lab.dump().await.elements, wanted.elements);
        println!("a dump: {:?}", start.elapsed());
        let key = Key::of(&[
            Field::Ip([10, 96, 1, 1].into()),
            Field::Protocol(6),
            Field::Port(80),
            Field::Number(2),
        ]);
        for _ in 0..3 {
            let start = Instant::now();
            lab.kernel
                .apply(vec![Op::Nft(NftOp::DeleteElement(BACKENDS, key.clone()))])
                .await
                .remove(0)
                .result
                .expect("one");
            println!("one: {:?}", start.elapsed());
        }
        let other = Lab::start();
        let start = Instant::now();
        let done = repair(&other, &wanted).await;
        println!("{} operations by another run: {:?}", done.len(), start.elapsed());
        assert_eq!(done.len(), 2, "the rules, and the deleted element");
    });
}

const PEERS_FLAT: Set = set("flat", &[Type::Ipv4, Type::Protocol, Type::Port], Data::Verdict, false);
