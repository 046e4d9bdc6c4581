//! The faults, at least two of each kind. `docs/doctor.md` lists them.

mod injected;

use std::time::Duration;

use anyhow::Result;
use netns_lab::Netns;

use self::injected::{
    ambiguous, ambiguous_alias, few_files, foreign_vxlan, freeze, full_table, full_table_v6, kill_daemon,
    misspelt, no_backends, no_resolver, node_port, node_port_udp, other_mac, other_release,
    other_wire_version, own_clock, peer_clock, second_owner, silent_resolver, slow_resolver, take_vxlan_port,
    take_vxlan_port_v6, too_few_files, unplug, unready, without_nft, wrong_port,
};
use crate::world::World;

/// Undoes a fault.
pub(crate) type Undo<'a> = Box<dyn FnOnce() -> Result<()> + 'a>;

/// A fault, and what `ovlctl doctor` on h1 says of it.
pub(crate) struct Fault {
    pub(crate) kind: &'static str,
    pub(crate) what: &'static str,
    /// The code of the finding.
    pub(crate) code: &'static str,
    /// What its object or cause contains.
    pub(crate) names: &'static str,
    /// Time in which it must be named.
    pub(crate) within: Duration,
    /// Whether the injection takes seconds, such as a restart of ovld, so the time counts from its end.
    pub(crate) is_long: bool,
    inject: Inject,
}

/// How a fault is injected and undone. Shell commands have the placeholders of [`World::fill`].
enum Inject {
    /// Shell commands on h1.
    Host(&'static str, &'static str),
    /// Shell commands in the workload `a`.
    Workload(&'static str, &'static str),
    /// Shell commands on the switch.
    Switch(&'static str, &'static str),
    /// A shell script on h1 that runs until the fault is undone.
    Loop(&'static str),
    /// A shell script in the workload `a` that runs until the fault is undone.
    Program(&'static str),
    /// Anything else.
    Call(fn(&World) -> Result<Undo<'_>>),
}

impl Fault {
    /// Injects the fault. Returns how it is undone.
    pub(crate) fn inject<'a>(&self, world: &'a World) -> Result<Undo<'a>> {
        let shell = |netns: &'a Netns, inject: &str, undo: &str| -> Result<Undo<'a>> {
            let undo = world.fill(undo);
            run(netns, &world.fill(inject))?;
            Ok(Box::new(move || run(netns, &undo)))
        };
        match self.inject {
            Inject::Host(inject, undo) => shell(world.h1(), inject, undo),
            Inject::Workload(inject, undo) => shell(&world.a.workload, inject, undo),
            Inject::Switch(inject, undo) => {
                let switch = world.lab.switch();
                run(&switch, &world.fill(inject))?;
                let undo = world.fill(undo);
                Ok(Box::new(move || run(&switch, &undo)))
            }
            Inject::Loop(script) | Inject::Program(script) => {
                let netns: &Netns =
                    if matches!(self.inject, Inject::Loop(_)) { world.h1() } else { &world.a.workload };
                let guard = netns.spawn(["sh", "-c", &world.fill(script)])?;
                Ok(Box::new(move || {
                    drop(guard);
                    Ok(())
                }))
            }
            Inject::Call(call) => call(world),
        }
    }
}

fn run(netns: &Netns, script: &str) -> Result<()> {
    netns.exec_ok(["sh", "-e", "-c", script]).map(drop)
}

const fn fault(
    kind: &'static str,
    what: &'static str,
    code: &'static str,
    names: &'static str,
    inject: Inject,
) -> Fault {
    Fault { kind, what, code, names, within: Duration::from_secs(5), is_long: false, inject }
}

/// A fault whose injection takes seconds.
const fn long_fault(
    kind: &'static str,
    what: &'static str,
    code: &'static str,
    names: &'static str,
    inject: Inject,
) -> Fault {
    Fault { is_long: true, ..fault(kind, what, code, names, inject) }
}

use Inject::{Call, Host, Loop, Program, Switch, Workload};

pub(crate) const FAULTS: &[Fault] = &[
    fault(
        "routes",
        "a more specific route sends packets for an endpoint elsewhere",
        "OVL-E047",
        "{b}",
        Host("ip route add {b}/32 dev eth0", "ip route del {b}/32 dev eth0"),
    ),
    fault(
        "routes",
        "a rule looks packets for a network up in another table",
        "OVL-E047",
        "leave by eth0",
        Host(
            "ip route add default dev eth0 table 77; ip rule add to 10.1.0.0/24 table 77",
            "ip rule del to 10.1.0.0/24 table 77; ip route flush table 77",
        ),
    ),
    fault(
        "routes",
        "a blackhole route for an endpoint",
        "OVL-E047",
        "{b} have no route",
        Host("ip route add blackhole {b}/32", "ip route del blackhole {b}/32"),
    ),
    fault(
        "routes",
        "an IPv6 route sends packets for an endpoint elsewhere",
        "OVL-E047",
        "{b6}",
        Host("ip -6 route add {b6}/128 dev eth0", "ip -6 route del {b6}/128 dev eth0"),
    ),
    fault(
        "drift that returns",
        "a script turns forwarding off again and again",
        "OVL-E019",
        "ip_forward",
        Loop("while :; do sysctl -qw net.ipv4.ip_forward=0; sleep 0.3; done"),
    ),
    fault(
        "drift that returns",
        "a script deletes a neighbour again and again",
        "OVL-E019",
        "{b}",
        Loop("while :; do ip neigh del {b} dev {bridge} 2>/dev/null; sleep 0.3; done"),
    ),
    fault(
        "VXLAN device",
        "another device has the VNI of a network",
        "OVL-E086",
        "vx9",
        Host(
            "printf 'link del {vxlan}\\nlink add vx9 type vxlan id {vni} dstport 4789 local {h1}\\n' | ip -batch -",
            "ip link del vx9",
        ),
    ),
    long_fault(
        "VXLAN device",
        "a VXLAN device of another program takes all VNIs of the port",
        "OVL-E086",
        "vx8",
        Call(foreign_vxlan),
    ),
    long_fault(
        "UDP port taken",
        "a program has the UDP port of VXLAN",
        "OVL-E086",
        "UDP 4789",
        Call(take_vxlan_port),
    ),
    long_fault(
        "UDP port taken",
        "a program has the UDP port of VXLAN over IPv6 and IPv4",
        "OVL-E086",
        "UDP 4789",
        Call(take_vxlan_port_v6),
    ),
    fault(
        "UDP port blocked",
        "the network drops VXLAN to another host",
        "OVL-E034",
        "h2",
        Switch(
            "nft 'table bridge group { chain forward { type filter hook forward priority 0; iifname h1 oifname h2 udp dport 4789 drop; }; }'",
            "nft delete table bridge group",
        ),
    ),
    fault(
        "UDP port blocked",
        "the network drops VXLAN from another host",
        "OVL-E034",
        "h3",
        Switch(
            "nft 'table bridge group { chain forward { type filter hook forward priority 0; iifname h3 oifname h1 udp dport 4789 drop; }; }'",
            "nft delete table bridge group",
        ),
    ),
    fault(
        "UDP port blocked",
        "a rule of nftables on the host drops VXLAN",
        "OVL-E062",
        "chain inet mine in",
        Host(
            "nft 'table inet mine { chain in { type filter hook input priority 0; udp dport 4789 drop; }; }'",
            "nft delete table inet mine",
        ),
    ),
    fault(
        "UDP port blocked",
        "a rule of iptables on the host drops gossip",
        "OVL-E062",
        "7940",
        Host(
            "iptables -A INPUT -p udp --dport 7940 -j DROP",
            "iptables -D INPUT -p udp --dport 7940 -j DROP",
        ),
    ),
    fault(
        "UDP port blocked",
        "a rule drops what the host sends in VXLAN",
        "OVL-E062",
        "chain inet mine out",
        Host(
            "nft 'table inet mine { chain out { type filter hook output priority 0; udp dport { 53535, 4789 } drop; }; }'",
            "nft delete table inet mine",
        ),
    ),
    fault(
        "forwarding",
        "the underlay device does not forward",
        "OVL-E088",
        "eth0",
        Host("sysctl -qw net.ipv4.conf.eth0.forwarding=0", "sysctl -qw net.ipv4.conf.eth0.forwarding=1"),
    ),
    fault(
        "forwarding",
        "the bridge of a network does not forward",
        "OVL-E088",
        "{bridge}",
        Host(
            "sysctl -qw net.ipv4.conf.{bridge}.forwarding=0",
            "sysctl -qw net.ipv4.conf.{bridge}.forwarding=1",
        ),
    ),
    fault(
        "source validation",
        "strict rp_filter of a device, and a way back by another one",
        "OVL-E080",
        "rp_filter",
        Host(
            "ip link add d0 type bridge; ip link set d0 up; sysctl -qw net.ipv4.conf.eth0.rp_filter=1; ip route add {h2}/32 dev d0",
            "ip link del d0; sysctl -qw net.ipv4.conf.eth0.rp_filter=0",
        ),
    ),
    fault(
        "source validation",
        "strict rp_filter of all devices, and a way back by another one",
        "OVL-E080",
        "h3",
        Host(
            "ip link add d0 type bridge; ip link set d0 up; sysctl -qw net.ipv4.conf.all.rp_filter=1; ip route add {h3}/32 dev d0",
            "ip link del d0; sysctl -qw net.ipv4.conf.all.rp_filter=0",
        ),
    ),
    fault(
        "firewall manager",
        "iptables drops forwarded packets",
        "OVL-E062",
        "the chain FORWARD of iptables",
        Host("iptables -P FORWARD DROP", "iptables -P FORWARD ACCEPT"),
    ),
    fault(
        "firewall manager",
        "a table of nftables drops forwarded packets",
        "OVL-E062",
        "inet strict",
        Host(
            "nft 'table inet strict { chain forward { type filter hook forward priority 0; policy drop; ct state established accept; }; }'",
            "nft delete table inet strict",
        ),
    ),
    fault(
        "firewall manager",
        "rules as firewalld has them reject forwarded packets",
        "OVL-E062",
        "firewalld",
        Host(
            "nft 'table inet firewalld { chain filter_FORWARD { type filter hook forward priority 10; reject with icmpx admin-prohibited; }; }'",
            "nft delete table inet firewalld",
        ),
    ),
    fault(
        "Docker",
        "a rule of DOCKER-USER drops a subnet",
        "OVL-E062",
        "10.1.0.0/24",
        Host(
            "iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -d 10.1.0.0/24 -j DROP",
            "iptables -F DOCKER-USER; iptables -D FORWARD -j DOCKER-USER; iptables -X DOCKER-USER",
        ),
    ),
    fault(
        "Docker",
        "IPv6 is dropped by the policy of FORWARD, and there is no DOCKER-USER",
        "OVL-E062",
        "ip6tables",
        Host("ip6tables -P FORWARD DROP", "ip6tables -P FORWARD ACCEPT"),
    ),
    fault(
        "traffic control",
        "packets on a VXLAN device are limited",
        "OVL-E100",
        "{vxlan}",
        Host(
            "tc qdisc add dev {vxlan} root tbf rate 1mbit burst 16kb latency 50ms",
            "tc qdisc del dev {vxlan} root",
        ),
    ),
    fault(
        "traffic control",
        "packets on a bridge are limited",
        "OVL-E100",
        "{bridge}",
        Host(
            "tc qdisc add dev {bridge} root tbf rate 1mbit burst 16kb latency 50ms",
            "tc qdisc del dev {bridge} root",
        ),
    ),
    fault(
        "leftovers",
        "a device with a name of ovl",
        "OVL-E048",
        "ovt-1",
        Host("ip link add ovt-1 type bridge", "ip link del ovt-1"),
    ),
    fault(
        "leftovers",
        "a table with a name of ovl",
        "OVL-E048",
        "ovl-old",
        Host("nft add table inet ovl-old", "nft delete table inet ovl-old"),
    ),
    fault(
        "leftovers",
        "a route of ovl in another table",
        "OVL-E048",
        "10.77.0.0/16",
        Host("ip route add 10.77.0.0/16 dev eth0 table 99 proto 79", "ip route flush table 99"),
    ),
    fault(
        "duplicate address",
        "a machine has the address of this host",
        "OVL-E089",
        "{h1}",
        Switch(
            "ip link add dup0 type veth peer name dup1; ip link set dup0 master br0 up; ip link set dup1 up; ip addr add {h1}/24 dev dup1",
            "ip link del dup0",
        ),
    ),
    fault(
        "duplicate address",
        "a member has the address of this host too",
        "OVL-E089",
        "{h1}",
        Call(second_owner),
    ),
    fault(
        "interface of a workload",
        "it is down",
        "OVL-E049",
        "eth0 is down",
        Workload("ip link set eth0 down", "ip link set eth0 up"),
    ),
    fault(
        "interface of a workload",
        "its address is gone",
        "OVL-E049",
        "{a}",
        Workload("ip addr del {a}/24 dev eth0", "ip addr add {a}/24 dev eth0"),
    ),
    fault(
        "interface of a workload",
        "it was renamed",
        "OVL-E049",
        "not in its namespace",
        Workload(
            "ip link set eth0 down; ip link set eth0 name lan0; ip link set lan0 up",
            "ip link set lan0 down; ip link set lan0 name eth0; ip link set eth0 up",
        ),
    ),
    fault(
        "interface of a workload",
        "it has another MAC address",
        "OVL-E045",
        "02:99:99:99:99:99",
        Call(other_mac),
    ),
    fault(
        "MTU",
        "a workload has a larger MTU than its network",
        "OVL-E049",
        "MTU of 9000",
        Workload("ip link set eth0 mtu 9000", "ip link set eth0 mtu 1450"),
    ),
    Fault {
        within: Duration::from_secs(20),
        ..fault(
            "MTU",
            "the network loses large VXLAN packets",
            "OVL-E035",
            "h2",
            Switch(
                "nft 'table bridge narrow { chain forward { type filter hook forward priority 0; iifname h1 oifname h2 udp dport 4789 ip length > 1300 drop; }; }'",
                "nft delete table bridge narrow",
            ),
        )
    },
    fault("Services", "a selector matches nothing", "OVL-E066", "app=nothing", Call(no_backends)),
    fault("Services", "no backend is ready", "OVL-E066", "none of its 1 backends is ready", Call(unready)),
    fault(
        "Services",
        "targetPort names a port that no backend has",
        "OVL-E066",
        "default/other",
        Call(wrong_port),
    ),
    fault("node ports", "a program listens at a node port, over TCP", "OVL-E068", "30080", Call(node_port)),
    fault(
        "node ports",
        "a program listens at a node port, over UDP",
        "OVL-E068",
        "UDP 30081",
        Call(node_port_udp),
    ),
    fault(
        "kube-proxy",
        "rules of kube-proxy in iptables",
        "OVL-E092",
        "KUBE-FORWARD",
        Host("iptables -N KUBE-FORWARD", "iptables -X KUBE-FORWARD"),
    ),
    fault(
        "kube-proxy",
        "rules of kube-proxy in nftables",
        "OVL-E092",
        "kube-proxy",
        Host("nft 'table ip kube-proxy { chain services { }; }'", "nft delete table ip kube-proxy"),
    ),
    fault("resolver", "the resolver of the host is down", "OVL-E071", "127.0.0.1:53", Call(no_resolver)),
    fault(
        "resolver",
        "the resolver of the host is silent",
        "OVL-E071",
        "127.0.0.1:53",
        Call(silent_resolver),
    ),
    fault("resolver", "the resolver of the host is slow", "OVL-E075", "127.0.0.1:53", Call(slow_resolver)),
    fault("resolver", "a line of resolv.conf is misspelt", "OVL-E073", "nameservr", Call(misspelt)),
    fault(
        "search lists",
        "a workload asks another resolver with ndots:5",
        "OVL-E076",
        "ndots:5",
        Program(
            "printf 'nameserver 192.0.2.53\\nsearch a.test b.test c.test\\noptions ndots:5\\n' > {dir}/r1; exec unshare -m sh -c 'mount --make-rprivate /; mount --bind {dir}/r1 /etc/resolv.conf; exec sleep 100'",
        ),
    ),
    fault(
        "search lists",
        "a workload asks another resolver with ndots:2 and a domain",
        "OVL-E076",
        "ndots:2",
        Program(
            "printf 'nameserver 192.0.2.53\\ndomain corp.test\\noptions timeout:1 ndots:2\\n' > {dir}/r2; exec unshare -m sh -c 'mount --make-rprivate /; mount --bind {dir}/r2 /etc/resolv.conf; exec sleep 100'",
        ),
    ),
    fault("names", "an endpoint is called as another one in full", "OVL-E074", "b.blue", Call(ambiguous)),
    fault(
        "names",
        "an alias is the full name of another endpoint",
        "OVL-E074",
        "c.blue",
        Call(ambiguous_alias),
    ),
    fault(
        "features",
        "IPv6 is off on the host",
        "OVL-E087",
        "net.ipv6.conf.all.disable_ipv6",
        Host("sysctl -qw net.ipv6.conf.all.disable_ipv6=1", "sysctl -qw net.ipv6.conf.all.disable_ipv6=0"),
    ),
    long_fault("features", "nft is not installed", "OVL-E087", "nft", Call(without_nft)),
    fault("hosts", "the daemon of a member is killed", "OVL-E001", "h3", Call(kill_daemon)),
    fault("hosts", "the cable of a member is out", "OVL-E001", "h3", Call(unplug)),
    fault("hosts", "the daemon of a member hangs", "OVL-E001", "h2", Call(freeze)),
    fault("clocks", "the clock of this host is ahead", "OVL-E016", "ahead", Call(own_clock)),
    fault("clocks", "the clock of another host is behind", "OVL-E017", "h3", Call(peer_clock)),
    fault(
        "disk",
        "the file system is nearly full",
        "OVL-E085",
        "MiB left",
        Host("dd if=/dev/zero of={state}/ballast bs=1M count=48 2>/dev/null", "rm {state}/ballast"),
    ),
    fault(
        "disk",
        "the file system has room for few files",
        "OVL-E085",
        "files",
        Host("mkdir {state}/many; cd {state}/many; seq 3300 | xargs touch", "rm -r {state}/many"),
    ),
    fault(
        "open files",
        "the limit of open files is nearly reached",
        "OVL-E084",
        "open files",
        Call(few_files),
    ),
    fault(
        "open files",
        "a tenth of the limit of open files is left",
        "OVL-E084",
        "open files",
        Call(too_few_files),
    ),
    long_fault(
        "connection tracking",
        "IPv4 connections fill the table",
        "OVL-E083",
        "nf_conntrack_max",
        Call(full_table),
    ),
    long_fault(
        "connection tracking",
        "IPv6 connections fill the table",
        "OVL-E083",
        "nf_conntrack_max",
        Call(full_table_v6),
    ),
    long_fault("versions", "a member runs another release", "OVL-E003", "9.9.9", Call(other_release)),
    long_fault(
        "versions",
        "a member speaks another wire version",
        "OVL-E029",
        "h3",
        Call(other_wire_version),
    ),
    fault(
        "address ranges",
        "a device of the host has an address in a network",
        "OVL-E044",
        "red",
        Host("ip addr add 10.60.3.1/24 dev eth0", "ip addr del 10.60.3.1/24 dev eth0"),
    ),
    fault(
        "address ranges",
        "another device of the host is in a network",
        "OVL-E044",
        "sealed",
        Host(
            "ip link add d1 type bridge; ip addr add 10.99.0.77/24 dev d1; ip link set d1 up",
            "ip link del d1",
        ),
    ),
];
