//! A lab in the kernel as a whole: its creation, and the change from one topology of NAT boxes to another.

use anyhow::{Context, Result};

use crate::conntrack;
use crate::netns::Netns;
use crate::ruleset::{self, LAN, WAN};
use crate::state::{BoxState, HostState, LabState};
use crate::switch::{
    self, Socket, box_namespace, enable_ipv6, host_namespace, host_socket, plain_bridges, set_sysctl,
};
use crate::tool::ip_batch;
use crate::topology::{self, NIC};

/// Creates the switch, the boxes and all hosts of a lab.
pub(crate) fn build(lab: &LabState) -> Result<()> {
    switch::build_switch(lab)?;
    for each in &lab.boxes {
        create_namespace(lab, each)?;
        plug(lab, each)?;
        configure(None, lab, each)?;
    }
    switch::build_hosts(lab)
}

/// Changes boxes and hosts from an old topology to a new one. Hosts keep their interfaces: a cable is plugged in elsewhere.
pub(crate) fn change(old: &LabState, new: &LabState) -> Result<()> {
    for each in new.boxes.iter().filter(|each| old.find_box(&each.name).is_none()) {
        create_namespace(new, each)?;
    }
    let mut changed: Vec<&HostState> = Vec::new();
    for (before, after) in old.hosts.iter().zip(&new.hosts).filter(|(_, after)| after.present) {
        if before.behind != after.behind {
            replug(old, new, before)?;
        }
        if before.behind != after.behind || old.host_settings(before) != new.host_settings(after) {
            changed.push(after);
        }
    }
    // Inner boxes are the last ones, and end on the outer ones.
    for each in old.boxes.iter().rev() {
        let kept = new.find_box(&each.name);
        if kept.is_none_or(|kept| kept.uplink != each.uplink) {
            unplug(old, each)?;
        }
        if kept.is_none() {
            switch::remove_namespaces(&[box_namespace(&old.name, &each.name)])?;
        }
    }
    for each in &new.boxes {
        if old.find_box(&each.name).is_none_or(|before| before.uplink != each.uplink) {
            plug(new, each)?;
        }
    }
    new.boxes.iter().try_for_each(|each| configure(Some(old), new, each))?;
    for (before, after) in old.hosts.iter().zip(&new.hosts).filter(|(_, after)| after.present) {
        let lines = topology::change(&old.host_settings(before), &new.host_settings(after));
        apply(&host_namespace(&new.name, &after.name), lines)?;
    }
    switch::wait_connected(new, &changed)?;
    let is_replugged = old.hosts.iter().zip(&new.hosts).any(|(before, after)| before.behind != after.behind);
    if is_replugged || old.boxes != new.boxes { forget_neighbours(new) } else { Ok(()) }
}

/// Deletes the mappings of a box, and all other connections that it tracks.
pub(crate) fn forget(lab: &LabState, of: &BoxState) -> Result<()> {
    let netns = Netns::new(box_namespace(&lab.name, &of.name));
    netns
        .exec_input(["nft", "-f", "-"], Some(&ruleset::script(&of.nat, of.outer_v4())))
        .context("NAT boxes need the kernel's NFT_NAT and NFT_CT (modprobe -a nft_nat nft_ct)")?;
    netns.run(|| -> Result<()> {
        // Connection tracking must not remember what the box forgets.
        let seconds = of.nat.lifetime.as_secs().max(1).to_string();
        for name in ["udp_timeout", "udp_timeout_stream"] {
            set_sysctl(&format!("net/netfilter/nf_conntrack_{name}"), &seconds)?;
        }
        conntrack::flush()
    })?
}

fn create_namespace(lab: &LabState, of: &BoxState) -> Result<()> {
    let namespace = box_namespace(&lab.name, &of.name);
    switch::add_namespaces(std::slice::from_ref(&namespace))?;
    Netns::new(namespace.clone()).run(|| -> Result<()> {
        plain_bridges()?;
        enable_ipv6()?;
        set_sysctl("net/ipv4/ip_forward", "1")?;
        set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
        set_sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        // A hairpinned packet leaves as it came: that is no reason to tell its sender a shorter way.
        set_sysctl("net/ipv4/conf/all/send_redirects", "0")?;
        set_sysctl("net/ipv4/conf/default/send_redirects", "0")?;
        // A connection that the box does not know is not taken for a new one, as when a box was switched off and on.
        set_sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")
    })??;
    ip_batch(
        Some(&namespace),
        &["link set lo up".to_owned(), switch::bridge_line(LAN), format!("link set {LAN} up")],
    )
}

/// Connects a box with its uplink.
fn plug(lab: &LabState, of: &BoxState) -> Result<()> {
    let (name, namespace) = (&of.name, box_namespace(&lab.name, &of.name));
    let uplink = Socket::of(&lab.name, of.uplink.as_deref());
    let mac = format!("02:4c:4e:00:01:{:02x}", of.number);
    let mtu = lab.mtu;
    ip_batch(
        Some(&uplink.namespace),
        &[
            format!(
                "link add {name} mtu {mtu} type veth peer name {WAN} address {mac} mtu {mtu} netns {namespace}"
            ),
            uplink.plug_line(name, true),
        ],
    )?;
    Netns::new(namespace.clone()).run(|| -> Result<()> {
        set_sysctl(&format!("net/ipv6/conf/{WAN}/proxy_ndp"), "1")?;
        // Otherwise proxied neighbours answer after a random time of up to 0.8 s.
        set_sysctl(&format!("net/ipv4/neigh/{WAN}/proxy_delay"), "0")?;
        set_sysctl(&format!("net/ipv6/neigh/{WAN}/proxy_delay"), "0")
    })??;
    ip_batch(Some(&namespace), &[format!("link set {WAN} up")])?;
    switch::wait_forwarding(&uplink, &[name.as_str()])?;
    switch::wait_ready(namespace, WAN)
}

fn unplug(lab: &LabState, of: &BoxState) -> Result<()> {
    let uplink = Socket::of(&lab.name, of.uplink.as_deref());
    ip_batch(Some(&uplink.namespace), &[format!("link del {}", of.name)])
}

/// Moves a host's end of the cable in the old topology to where it belongs in the new one.
fn replug(old: &LabState, new: &LabState, host: &HostState) -> Result<()> {
    let from = host_socket(old, host);
    let Some(after) = new.hosts.iter().find(|each| each.name == host.name) else { return Ok(()) };
    let to = host_socket(new, after);
    ip_batch(Some(&from.namespace), &[format!("link set {} netns {}", host.name, to.namespace)])?;
    ip_batch(Some(&to.namespace), &[to.plug_line(&host.name, host.link_up)])
}

/// Gives a box its addresses, routes and rules, as far as they differ from the old ones.
fn configure(old: Option<&LabState>, new: &LabState, of: &BoxState) -> Result<()> {
    let before = old.and_then(|old| old.find_box(&of.name).map(|each| (old, each)));
    let mut settings = before.map(|(old, each)| old.box_settings(each)).unwrap_or_default();
    if before.is_some_and(|(_, each)| each.uplink != of.uplink) {
        // What its old cable had is gone with it.
        settings.retain(|setting| !setting.is_on(WAN));
    }
    let lines = topology::change(&settings, &new.box_settings(of));
    apply(&box_namespace(&new.name, &of.name), lines)?;
    if before.is_some_and(|(_, each)| each == of) { Ok(()) } else { forget(new, of) }
}

/// Applies the `ip` batch lines that delete settings, and those that add some.
fn apply(namespace: &str, (deleted, added): (Vec<String>, Vec<String>)) -> Result<()> {
    for line in deleted {
        // A route may be gone: the kernel deletes it with an address. What matters fails when it is added.
        ip_batch(Some(namespace), &[line]).ok();
    }
    ip_batch(Some(namespace), &added)
}

/// Makes all hosts and boxes look up their neighbours again: an address may have another one's MAC address now.
fn forget_neighbours(lab: &LabState) -> Result<()> {
    let hosts = lab.hosts.iter().filter(|host| host.present);
    let devices = hosts.map(|host| (host_namespace(&lab.name, &host.name), NIC)).chain(
        lab.boxes
            .iter()
            .flat_map(|each| [WAN, LAN].map(|device| (box_namespace(&lab.name, &each.name), device))),
    );
    for (namespace, device) in devices {
        ip_batch(Some(&namespace), &[format!("neigh flush dev {device}")])?;
    }
    Ok(())
}
