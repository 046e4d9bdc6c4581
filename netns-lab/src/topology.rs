//! Which host is behind which NAT box, and the addresses and routes of each: decisions about the state, without effects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};

use crate::addresses::{
    CARRIER_GATEWAY, GATEWAY_V6, LAN_GATEWAY, MOST_HOSTS, Underlay, carrier_v4, lan_v4, router_v6,
    underlay_v4, underlay_v6,
};
use crate::nat::{Access, Nat};
use crate::ruleset::{LAN, WAN};
use crate::state::{BoxState, HostState, LabState};

/// Name of the host's side of its link.
pub(crate) const NIC: &str = "eth0";

/// The most carriers' boxes: their underlay addresses are above those of hosts.
const MOST_CARRIERS: u8 = 4;

/// An address, a route or a proxied neighbour of a namespace, as the words of `ip`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    object: &'static str,
    words: String,
}

impl Setting {
    /// Returns whether it is of this device.
    pub(crate) fn is_on(&self, device: &str) -> bool {
        self.words.split(' ').skip_while(|word| *word != "dev").nth(1) == Some(device)
    }

    fn address(address: IpAddr, prefix: u8, device: &str) -> Self {
        let options = match (address, prefix) {
            (IpAddr::V4(_), 32) => "",
            (IpAddr::V4(_), _) => "brd + ",
            (IpAddr::V6(_), _) => "nodad ",
        };
        Setting { object: "addr", words: format!("{address}/{prefix} {options}dev {device}") }
    }

    fn route(words: String) -> Self {
        Setting { object: "route", words }
    }

    fn proxy(address: IpAddr) -> Self {
        Setting { object: "neigh", words: format!("proxy {address} dev {WAN}") }
    }

    fn add(&self) -> String {
        format!("{} add {}", self.object, self.words)
    }

    fn delete(&self) -> String {
        // `ip addr del` knows no options of `add`.
        format!("{} del {}", self.object, self.words.replace("brd + ", "").replace("nodad ", ""))
    }
}

/// Returns the `ip` batch lines that lead from old settings to new ones. Routes depend on addresses and go first; the kernel
/// may delete them with an address, so they are added again if anything changes.
pub(crate) fn change(old: &[Setting], new: &[Setting]) -> (Vec<String>, Vec<String>) {
    if old == new {
        return (Vec::new(), Vec::new());
    }
    let stays =
        |setting: &&Setting, others: &[Setting]| setting.object != "route" && others.contains(setting);
    let deleted = old.iter().rev().filter(|setting| !stays(setting, new)).map(Setting::delete).collect();
    let added = new.iter().filter(|setting| !stays(setting, old)).map(Setting::add).collect();
    (deleted, added)
}

impl LabState {
    pub(crate) fn find_box(&self, name: &str) -> Option<&BoxState> {
        self.boxes.iter().find(|each| each.name == name)
    }

    /// Returns the boxes between a host and the switch, the host's first.
    pub(crate) fn boxes_of(&self, host: &HostState) -> Vec<&BoxState> {
        let first = host.behind.as_deref().and_then(|name| self.find_box(name));
        std::iter::successors(first, |each| each.uplink.as_deref().and_then(|name| self.find_box(name)))
            .collect()
    }

    /// Returns the name of the switch's port that a host's frames come from: its own or that of its outermost box.
    pub(crate) fn port_of<'a>(&'a self, host: &'a HostState) -> &'a str {
        self.boxes_of(host).last().map_or(&host.name, |outermost| &outermost.name)
    }

    /// Returns the addresses at which the other hosts see a host.
    pub(crate) fn outer_addresses(&self, host: &HostState) -> Vec<IpAddr> {
        let boxes = self.boxes_of(host);
        let v4 = boxes.iter().rev().find_map(|each| each.outer_v4()).or(host.v4);
        [v4.map(IpAddr::V4), host.v6.map(IpAddr::V6)].into_iter().flatten().collect()
    }

    /// Returns the address through which a host joins the cluster: of the first host on the switch, in a family that both
    /// have. `None` for that host itself.
    pub(crate) fn join_address(&self, host: &HostState) -> Result<Option<IpAddr>> {
        let Some(first) = self.first_public().or(self.hosts.first()).filter(|first| first.name != host.name)
        else {
            return Ok(None);
        };
        let advertised = first.address()?;
        let shared = |address: &IpAddr| if address.is_ipv4() { host.v4.is_some() } else { host.v6.is_some() };
        let addresses = [Some(advertised), first.v4.map(IpAddr::V4), first.v6.map(IpAddr::V6)];
        Ok(Some(addresses.into_iter().flatten().find(shared).unwrap_or(advertised)))
    }

    /// Connects a host in another way. It gets the address that its number has there.
    pub(crate) fn connect(&mut self, name: &str, access: &Access) -> Result<()> {
        let index = self.hosts.iter().position(|host| host.name == name);
        let index = index.with_context(|| format!("no host {name} in lab {}", self.name))?;
        let number = self.hosts[index].number;
        let own_box = format!("n{number}");
        let guest = self.hosts.iter().find(|host| host.access == Access::With(name.to_owned()));
        let behind = match access {
            Access::Nat(_) | Access::Carrier { .. } => Some(own_box),
            Access::Switch(_) | Access::With(_) => {
                if let Some(guest) = guest {
                    bail!(
                        "{} is behind the NAT box of {name}: connect {} in another way first",
                        guest.name,
                        guest.name
                    );
                }
                match access {
                    Access::With(owner) => Some(self.shared_box(name, owner)?),
                    _ => None,
                }
            }
        };
        if let Access::Switch(families) = access {
            let (has_v4, has_v6) = (self.underlay.has_v4(), self.underlay.has_v6());
            ensure!(
                has_v4 && families.has_v4() || has_v6 && families.has_v6(),
                "{name} would have no address, because the underlay has one address family: create the lab with --underlay dual"
            );
        }
        let host = &mut self.hosts[index];
        host.access = access.clone();
        host.behind = behind;
        host.advertise = None;
        self.derive_boxes()?;
        self.number_hosts();
        Ok(())
    }

    fn shared_box(&self, name: &str, owner: &str) -> Result<String> {
        ensure!(owner != name, "{name} cannot be behind its own NAT box twice: use a preset");
        let host = self.hosts.iter().find(|host| host.name == owner);
        let host = host.with_context(|| format!("no host {owner} in lab {}", self.name))?;
        match (&host.access, &host.behind) {
            (Access::Nat(_) | Access::Carrier { .. }, Some(own)) => Ok(own.clone()),
            _ => {
                bail!("{owner} has no NAT box of its own to share: use `netns-lab nat {owner} PRESET` first")
            }
        }
    }

    /// Computes the boxes that the hosts' accesses ask for. Boxes that stay keep their addresses.
    fn derive_boxes(&mut self) -> Result<()> {
        let mut carriers: Vec<BoxState> = Vec::new();
        let mut own = Vec::new();
        for host in &self.hosts {
            let (nat, uplink) = match &host.access {
                Access::Switch(_) | Access::With(_) => continue,
                Access::Nat(nat) => (nat, None),
                Access::Carrier { home, carrier } => (home, Some(self.carrier(&mut carriers, carrier)?)),
            };
            let outer = match uplink {
                Some(_) => carrier_v4(host.number),
                None => underlay_v4(host.number),
            };
            own.push(self.keep(BoxState {
                name: format!("n{}", host.number),
                number: host.number,
                nat: nat.clone(),
                uplink,
                v4: Some(outer),
            }));
        }
        self.boxes = carriers;
        self.boxes.extend(own);
        if self.underlay.has_v4() {
            // A box that does not translate leaves its host the address, but needs one for its ARP requests.
            for at in 0..self.boxes.len() {
                if self.boxes[at].v4.is_none() {
                    self.boxes[at].v4 = Some(underlay_v4(self.free_number(MOST_HOSTS)?));
                }
            }
        }
        Ok(())
    }

    /// Returns the name of the carrier's box of that kind, which is added if there is none.
    fn carrier(&self, carriers: &mut Vec<BoxState>, nat: &Nat) -> Result<String> {
        if let Some(found) = carriers.iter().find(|each| each.nat == *nat) {
            return Ok(found.name.clone());
        }
        let is_free = |number: &u8| {
            let name = format!("c{number}");
            !carriers.iter().any(|each| each.name == name)
                && self.find_box(&name).is_none_or(|each| each.nat == *nat)
        };
        // One that has this kind already comes before a free name.
        let existing = self.boxes.iter().find(|each| each.name.starts_with('c') && each.nat == *nat);
        let number = existing.map(|each| each.number - MOST_HOSTS).or((1..=MOST_CARRIERS).find(is_free));
        let number = number.with_context(|| format!("more than {MOST_CARRIERS} kinds of carriers"))?;
        let name = format!("c{number}");
        carriers.push(self.keep(BoxState {
            name: name.clone(),
            number: MOST_HOSTS + number,
            nat: nat.clone(),
            uplink: None,
            v4: Some(underlay_v4(MOST_HOSTS + number)),
        }));
        Ok(name)
    }

    /// Gives a box the address that it has already, and none yet if it does not translate.
    fn keep(&self, mut new: BoxState) -> BoxState {
        let same = |old: &&BoxState| old.uplink == new.uplink && old.nat.translates == new.nat.translates;
        match self.find_box(&new.name).filter(same) {
            Some(old) => new.v4 = old.v4,
            None => new.v4 = new.v4.filter(|_| self.underlay.has_v4() && new.nat.translates),
        }
        new
    }

    /// Sets the addresses of hosts that are not where their access wants them. An address of the underlay may have been
    /// renumbered, and stays.
    fn number_hosts(&mut self) {
        let (has_v4, has_v6) = (self.underlay.has_v4(), self.underlay.has_v6());
        let boxes = self.boxes.clone();
        for host in &mut self.hosts {
            let families = match host.access {
                Access::Switch(families) => families,
                Access::Nat(_) | Access::Carrier { .. } | Access::With(_) => Underlay::Dual,
            };
            let gateway = host.behind.as_deref().and_then(|name| boxes.iter().find(|each| each.name == name));
            let number = host.number;
            host.v4 = (has_v4 && families.has_v4()).then(|| {
                let inside = gateway.is_some_and(|gateway| gateway.nat.translates);
                let current = host.v4.filter(|address| is_underlay_v4(*address) && !inside);
                current.unwrap_or_else(|| if inside { lan_v4(number) } else { underlay_v4(number) })
            });
            host.v6 = (has_v6 && families.has_v6()).then(|| host.v6.unwrap_or_else(|| underlay_v6(number)));
        }
    }

    /// Gives a host other outer addresses, in all families: its own, or that of the outermost box that translates, which
    /// other hosts behind it get too.
    pub(crate) fn renumber(&mut self, index: usize) -> Result<()> {
        let names: Vec<String> =
            self.boxes_of(&self.hosts[index]).iter().map(|each| each.name.clone()).collect();
        let current = self.outer_addresses(&self.hosts[index]);
        let current =
            current.first().with_context(|| format!("{} has no address", self.hosts[index].name))?;
        let current = match *current {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => (1..=MOST_HOSTS).find(|number| underlay_v6(*number) == v6).unwrap_or(0),
        };
        let number = self.free_number(current)?;
        let outermost = names
            .iter()
            .rev()
            .find_map(|name| self.boxes.iter().position(|each| each.name == *name && each.nat.translates));
        let host = &mut self.hosts[index];
        let v4 = outermost.map_or(&mut host.v4, |at| &mut self.boxes[at].v4);
        *v4 = v4.map(|_| underlay_v4(number));
        host.v6 = host.v6.map(|_| underlay_v6(number));
        host.advertise = None;
        Ok(())
    }

    /// Returns the next number of an underlay address that is neither used nor some host's first one.
    fn free_number(&self, after: u8) -> Result<u8> {
        let v4: Vec<Ipv4Addr> = self.hosts.iter().filter_map(|host| host.v4).collect();
        let v6: Vec<Ipv6Addr> = self.hosts.iter().filter_map(|host| host.v6).collect();
        let is_free = |number: &u8| {
            let (four, six) = (underlay_v4(*number), underlay_v6(*number));
            !self.hosts.iter().any(|host| host.number == *number)
                && !v4.contains(&four)
                && !v6.contains(&six)
                && !self.boxes.iter().any(|each| each.v4 == Some(four))
        };
        let above = (1..=MOST_HOSTS).filter(|number| *number > after);
        let below = (1..=MOST_HOSTS).filter(|number| *number <= after);
        above.chain(below).find(is_free).context("no free address on the underlay")
    }

    /// Returns the addresses and routes of a host.
    pub(crate) fn host_settings(&self, host: &HostState) -> Vec<Setting> {
        let Some(gateway) = host.behind.as_deref().and_then(|name| self.find_box(name)) else {
            return [host.v4.map(|v4| on_link(v4.into(), NIC)), host.v6.map(|v6| on_link(v6.into(), NIC))]
                .into_iter()
                .flatten()
                .collect();
        };
        let mut settings = Vec::new();
        if let Some(v4) = host.v4 {
            // The prefix of an address that is not translated is on the other side of the box.
            let prefix = if gateway.nat.translates { 24 } else { 32 };
            settings.push(Setting::address(v4.into(), prefix, NIC));
            settings.push(Setting::route(format!("default via {LAN_GATEWAY} dev {NIC} onlink")));
        }
        if let Some(v6) = host.v6 {
            settings.push(Setting::address(v6.into(), 128, NIC));
            settings.push(Setting::route(format!("default via {GATEWAY_V6} dev {NIC}")));
        }
        settings
    }

    /// Returns the addresses, routes and proxied neighbours of a box.
    pub(crate) fn box_settings(&self, of: &BoxState) -> Vec<Setting> {
        let is_carrier = self.boxes.iter().any(|each| each.uplink.as_ref() == Some(&of.name));
        let mut settings = vec![Setting::address(GATEWAY_V6.into(), 64, LAN)];
        if self.underlay.has_v4() {
            let gateway = if is_carrier { CARRIER_GATEWAY } else { LAN_GATEWAY };
            settings.push(Setting::address(gateway.into(), 24, LAN));
            settings.extend(of.v4.map(|v4| on_link(v4.into(), WAN)));
            if of.uplink.is_some() {
                settings.push(Setting::route(format!("default via {CARRIER_GATEWAY} dev {WAN}")));
            }
        }
        if self.underlay.has_v6() {
            let own = router_v6(of.number);
            if of.uplink.is_some() {
                // The rest of the prefix is behind the uplink.
                settings.push(Setting::address(own.into(), 128, WAN));
                settings.push(Setting::route(format!("default via {GATEWAY_V6} dev {WAN}")));
            } else {
                settings.push(on_link(own.into(), WAN));
            }
        }
        for address in self.forwarded_by(of) {
            settings.push(Setting::route(format!("{address} dev {LAN}")));
            settings.push(Setting::proxy(address));
        }
        settings
    }

    /// Returns the addresses behind a box that it does not translate, and answers for on its outer side.
    fn forwarded_by(&self, of: &BoxState) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for host in &self.hosts {
            let boxes = self.boxes_of(host);
            let Some(at) = boxes.iter().position(|each| each.name == of.name) else { continue };
            let through = &boxes[..=at];
            let v4 = host.v4.filter(|_| through.iter().all(|each| !each.nat.translates));
            addresses.extend([v4.map(IpAddr::V4), host.v6.map(IpAddr::V6)].into_iter().flatten());
        }
        addresses
    }
}

/// The setting of an address whose prefix is on the link.
pub(crate) fn on_link(address: IpAddr, device: &str) -> Setting {
    Setting::address(address, if address.is_ipv4() { 24 } else { 64 }, device)
}

fn is_underlay_v4(address: Ipv4Addr) -> bool {
    address.octets()[..3] == underlay_v4(0).octets()[..3]
}
