//! Reference layouts of the same Services: input for `iptables-restore` and `nft` after the layouts of
//! kube-proxy, and hand-written flat nft maps.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};

/// A Service at port 80 of an address, with its three endpoints.
pub(super) struct Reference {
    pub(super) address: Ipv4Addr,
    pub(super) endpoints: [SocketAddrV4; 3],
}

/// A reference layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// kube-proxy's mode `iptables`: a chain for each Service and endpoint, and one chain that lists all
    /// Services.
    Iptables,
    /// kube-proxy's mode `nftables`: the same chains, found through a verdict map.
    Nft,
    /// Hand-written flat maps.
    ByHand,
}

impl Layout {
    pub(super) const ALL: [Self; 3] = [Self::Iptables, Self::Nft, Self::ByHand];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Iptables => "kube-proxy's iptables layout",
            Self::Nft => "kube-proxy's nft layout",
            Self::ByHand => "hand-written nft maps",
        }
    }

    /// Returns the command that loads the text.
    pub(super) fn loader(self) -> &'static [&'static str] {
        match self {
            Self::Iptables => &["iptables-legacy-restore", "--noflush"],
            Self::Nft | Self::ByHand => &["nft", "-f", "-"],
        }
    }

    /// Renders all Services.
    pub(super) fn whole(self, services: &[Reference]) -> String {
        match self {
            Self::Iptables => iptables(services),
            Self::Nft => nft(services),
            Self::ByHand => by_hand(services),
        }
    }

    /// Renders the change that adds an endpoint to an existing Service, or removes it again.
    pub(super) fn one_more(
        self,
        number: usize,
        service: &Reference,
        more: SocketAddrV4,
        add: bool,
    ) -> String {
        let Reference { address, endpoints } = service;
        let mut all = endpoints.to_vec();
        all.extend(add.then_some(more));
        match self {
            Self::Iptables => {
                let mut text = "*nat\n".to_owned();
                writeln!(text, ":KUBE-SVC-{number:06} - [0:0]\n:KUBE-SEP-{number:06}-3 - [0:0]").ok();
                iptables_service(&mut text, number, &all);
                if add {
                    iptables_endpoint(&mut text, number, 3, more);
                } else {
                    writeln!(text, "-X KUBE-SEP-{number:06}-3").ok();
                }
                text + "COMMIT\n"
            }
            Self::Nft => {
                let mut text = format!(
                    "add chain ip kube-proxy endpoint-{number}-3\nflush chain ip kube-proxy service-{number}\n"
                );
                nft_service(&mut text, number, all.len());
                if add {
                    nft_endpoint(&mut text, number, 3, more);
                } else {
                    writeln!(text, "delete chain ip kube-proxy endpoint-{number}-3").ok();
                }
                text
            }
            Self::ByHand => {
                let (was, is) = if add { (3, 4) } else { (4, 3) };
                let verb = if add { "add" } else { "delete" };
                format!(
                    "delete element ip by-hand counts {{ {address} . 80 : {was} }}\n\
                     add element ip by-hand counts {{ {address} . 80 : {is} }}\n\
                     {verb} element ip by-hand backends {{ {address} . 80 . 3 : {} . {} }}\n",
                    more.ip(),
                    more.port()
                )
            }
        }
    }
}

fn iptables(services: &[Reference]) -> String {
    let mut text = "*nat\n:KUBE-SERVICES - [0:0]\n".to_owned();
    for number in 0..services.len() {
        writeln!(text, ":KUBE-SVC-{number:06} - [0:0]").ok();
        for n in 0..3 {
            writeln!(text, ":KUBE-SEP-{number:06}-{n} - [0:0]").ok();
        }
    }
    text += "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n";
    for (number, Reference { address, endpoints }) in services.iter().enumerate() {
        writeln!(
            text,
            "-A KUBE-SERVICES -d {address}/32 -p tcp -m comment --comment \"default/s{number} cluster IP\" -m tcp \
             --dport 80 -j KUBE-SVC-{number:06}"
        )
        .ok();
        iptables_service(&mut text, number, endpoints);
        for (n, endpoint) in endpoints.iter().enumerate() {
            iptables_endpoint(&mut text, number, n, *endpoint);
        }
    }
    text + "COMMIT\n"
}

fn iptables_service(text: &mut String, number: usize, endpoints: &[SocketAddrV4]) {
    for (n, endpoint) in endpoints.iter().enumerate() {
        let left = endpoints.len() - n;
        let chance = if left == 1 {
            String::new()
        } else {
            format!(" -m statistic --mode random --probability {:.10}", 1.0 / left as f64)
        };
        writeln!(
            text,
            "-A KUBE-SVC-{number:06} -m comment --comment \"default/s{number} -> {endpoint}\"{chance} -j \
             KUBE-SEP-{number:06}-{n}"
        )
        .ok();
    }
}

fn iptables_endpoint(text: &mut String, number: usize, n: usize, endpoint: SocketAddrV4) {
    writeln!(
        text,
        "-A KUBE-SEP-{number:06}-{n} -p tcp -m comment --comment \"default/s{number}\" -m tcp -j DNAT \
         --to-destination {endpoint}"
    )
    .ok();
}

fn nft(services: &[Reference]) -> String {
    let mut text = "add table ip kube-proxy\n\
        add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat; }\n\
        add chain ip kube-proxy services\n\
        add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
        add rule ip kube-proxy nat-prerouting jump services\n\
        add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips\n"
        .to_owned();
    for (number, Reference { address, endpoints }) in services.iter().enumerate() {
        writeln!(text, "add chain ip kube-proxy service-{number}").ok();
        for (n, endpoint) in endpoints.iter().enumerate() {
            writeln!(text, "add chain ip kube-proxy endpoint-{number}-{n}").ok();
            nft_endpoint(&mut text, number, n, *endpoint);
        }
        nft_service(&mut text, number, endpoints.len());
        writeln!(
            text,
            "add element ip kube-proxy service-ips {{ {address} . tcp . 80 : goto service-{number} }}"
        )
        .ok();
    }
    text
}

fn nft_service(text: &mut String, number: usize, count: usize) {
    let all: Vec<String> = (0..count).map(|n| format!("{n} : goto endpoint-{number}-{n}")).collect();
    writeln!(
        text,
        "add rule ip kube-proxy service-{number} numgen random mod {count} vmap {{ {} }}",
        all.join(", ")
    )
    .ok();
}

fn nft_endpoint(text: &mut String, number: usize, n: usize, endpoint: SocketAddrV4) {
    writeln!(text, "add rule ip kube-proxy endpoint-{number}-{n} meta l4proto tcp dnat to {endpoint}").ok();
}

fn by_hand(services: &[Reference]) -> String {
    let mut text = "add table ip by-hand\n\
        add map ip by-hand counts { type ipv4_addr . inet_service : mark; }\n\
        add map ip by-hand backends { type ipv4_addr . inet_service . mark : ipv4_addr . inet_service; }\n\
        add chain ip by-hand pick { type nat hook prerouting priority dstnat; }\n\
        add rule ip by-hand pick meta mark set ip daddr . tcp dport map @counts\n\
        add rule ip by-hand pick meta mark vmap { 3 : jump three, 4 : jump four }\n"
        .to_owned();
    let of = |name: &str, count: u32| {
        format!(
            "add chain ip by-hand {name}\nadd rule ip by-hand {name} meta mark set numgen random mod {count} dnat ip to \
             ip daddr . tcp dport . meta mark map @backends\n"
        )
    };
    // Chains must precede the rule that refers to them.
    let at = text.find("add rule").unwrap_or(text.len());
    text.insert_str(at, &(of("three", 3) + &of("four", 4)));
    let mut elements = |map: &str, all: Vec<String>| {
        for some in all.chunks(1000) {
            writeln!(text, "add element ip by-hand {map} {{ {} }}", some.join(", ")).ok();
        }
    };
    elements("counts", services.iter().map(|it| format!("{} . 80 : 3", it.address)).collect());
    let backends = services.iter().flat_map(|Reference { address, endpoints }| {
        endpoints
            .iter()
            .enumerate()
            .map(move |(n, to)| format!("{address} . 80 . {n} : {} . {}", to.ip(), to.port()))
    });
    elements("backends", backends.collect());
    text
}
