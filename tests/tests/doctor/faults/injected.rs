//! Faults that take more than a line of shell.

use std::fs;
use std::net::{IpAddr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::Signal;
use ovl_tests::resolver::Behaviour;
use ovl_tests::{SOON, service};

use super::{Undo, run};
use crate::world::{RESOLVER, WEB, World};

/// Deletes the VXLAN devices of h1 while its daemon is down, does something, and starts the daemon.
fn without_vxlan<T>(world: &World, take: impl FnOnce() -> Result<T>) -> Result<T> {
    let h1 = world.h1();
    h1.stop()?;
    run(
        h1,
        "for device in $(ip -o link | grep -o 'ovx-[^:@ ]*' | sort -u); do ip link del $device || true; done",
    )?;
    let taken = take()?;
    h1.start()?;
    world.wait_ready("h1")?;
    Ok(taken)
}

pub(super) fn foreign_vxlan(world: &World) -> Result<Undo<'_>> {
    let h1 = world.h1();
    without_vxlan(world, || run(h1, "ip link add vx8 type vxlan external dstport 4789; ip link set vx8 up"))?;
    Ok(Box::new(move || run(h1, "ip link del vx8")))
}

pub(super) fn take_vxlan_port(world: &World) -> Result<Undo<'_>> {
    let socket = without_vxlan(world, || Ok(world.h1().run(|| UdpSocket::bind("0.0.0.0:4789"))??))?;
    Ok(Box::new(move || {
        drop(socket);
        Ok(())
    }))
}

pub(super) fn take_vxlan_port_v6(world: &World) -> Result<Undo<'_>> {
    let socket = without_vxlan(world, || Ok(world.h1().run(|| UdpSocket::bind("[::]:4789"))??))?;
    Ok(Box::new(move || {
        drop(socket);
        Ok(())
    }))
}

pub(super) fn second_owner(world: &World) -> Result<Undo<'_>> {
    let (h3, address) = (&world.lab["h3"], world.fill("{h1}"));
    run(h3, &format!("ip addr add {address}/32 dev eth0"))?;
    Ok(Box::new(move || run(h3, &format!("ip addr del {address}/32 dev eth0"))))
}

pub(super) fn other_mac(world: &World) -> Result<Undo<'_>> {
    let workload = &world.a.workload;
    let set = |mac: &str| run(workload, &format!("ip link set eth0 address {mac}"));
    set("02:99:99:99:99:99")?;
    let mac = world.a.mac();
    Ok(Box::new(move || run(workload, &format!("ip link set eth0 address {mac}"))))
}

/// A Service `other` with a part of its specification.
fn other_service(world: &World, spec: &str) -> Result<()> {
    let manifest = format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"other\"}},\"spec\":{{{spec}}}}}"
    );
    service::apply(&world.lab, world.h1(), &manifest).map(drop)
}

fn delete_other(world: &World) -> Undo<'_> {
    Box::new(move || world.h1().ctl_ok(&["delete", "svc", "other"]).map(drop))
}

pub(super) fn no_backends(world: &World) -> Result<Undo<'_>> {
    other_service(world, "\"selector\":{\"app\":\"nothing\"},\"ports\":[{\"port\":80}]")?;
    Ok(delete_other(world))
}

pub(super) fn wrong_port(world: &World) -> Result<Undo<'_>> {
    other_service(
        world,
        "\"selector\":{\"app\":\"web\"},\"ports\":[{\"port\":80,\"targetPort\":\"missing\"}]",
    )?;
    Ok(delete_other(world))
}

pub(super) fn unready(world: &World) -> Result<Undo<'_>> {
    let h2 = &world.lab["h2"];
    h2.ctl_ok(&["endpoint", "unready", "b"])?;
    Ok(Box::new(move || h2.ctl_ok(&["endpoint", "ready", "b"]).map(drop)))
}

pub(super) fn node_port(world: &World) -> Result<Undo<'_>> {
    let listener = world.h1().run(|| TcpListener::bind("0.0.0.0:30080"))??;
    Ok(Box::new(move || {
        drop(listener);
        Ok(())
    }))
}

pub(super) fn node_port_udp(world: &World) -> Result<Undo<'_>> {
    let more = "{\"port\":80,\"targetPort\":8080,\"nodePort\":30080,\"name\":\"a\"},\
                {\"port\":81,\"targetPort\":8081,\"nodePort\":30081,\"protocol\":\"UDP\",\"name\":\"b\"}";
    let both = WEB.replace("{\"port\":80,\"targetPort\":8080,\"nodePort\":30080}", more);
    ensure!(both != WEB, "the Service has other ports");
    service::apply(&world.lab, world.h1(), &both)?;
    let socket = world.h1().run(|| UdpSocket::bind("0.0.0.0:30081"))??;
    Ok(Box::new(move || {
        drop(socket);
        service::apply(&world.lab, world.h1(), WEB).map(drop)
    }))
}

fn with_resolver(world: &World, behaviour: Option<Behaviour>) -> Result<Undo<'_>> {
    world.set_resolver(behaviour)?;
    Ok(Box::new(move || world.set_resolver(Some(Behaviour::Answers))))
}

pub(super) fn no_resolver(world: &World) -> Result<Undo<'_>> {
    with_resolver(world, None)
}

pub(super) fn silent_resolver(world: &World) -> Result<Undo<'_>> {
    with_resolver(world, Some(Behaviour::Silent))
}

pub(super) fn slow_resolver(world: &World) -> Result<Undo<'_>> {
    with_resolver(world, Some(Behaviour::Delayed(Duration::from_millis(700))))
}

pub(super) fn misspelt(world: &World) -> Result<Undo<'_>> {
    world.resolv_conf.write(format!("nameserver {RESOLVER}\nnameservr 192.0.2.1\n").as_bytes())?;
    Ok(Box::new(move || world.resolv_conf.set(&[&RESOLVER.to_string()])))
}

pub(super) fn ambiguous(world: &World) -> Result<Undo<'_>> {
    attached_as(world, "b.blue", &[])
}

pub(super) fn ambiguous_alias(world: &World) -> Result<Undo<'_>> {
    attached_as(world, "odd", &["--alias", "c.blue"])
}

/// Attaches an endpoint to the network `red` on h1.
fn attached_as<'a>(world: &'a World, name: &'static str, more: &[&str]) -> Result<Undo<'a>> {
    let workload = world.h1().workload("odd")?;
    let args = [&["attach", name, "--network", "red", "--netns", workload.path_str()], more].concat();
    world.h1().ctl_ok(&args)?;
    Ok(Box::new(move || {
        world.h1().ctl_ok(&["detach", name])?;
        workload.destroy()
    }))
}

/// Restarts the daemon of a host with further variables, and again without them when it is undone.
fn restarted_with<'a>(world: &'a World, host: &'static str, more: &[(&str, &str)]) -> Result<Undo<'a>> {
    let clock = world.lab[host].dir().join("clock");
    let clock = clock.to_str().context("a path")?.to_owned();
    let set = move |more: &[(&str, &str)]| -> Result<()> {
        let all = [&[("OVL_TEST_CLOCK", &*clock)], more].concat();
        world.lab[host].set_env(&all)?;
        world.lab[host].restart()
    };
    set(more)?;
    Ok(Box::new(move || {
        set(&[])?;
        world.wait_ready(host)
    }))
}

pub(super) fn without_nft(world: &World) -> Result<Undo<'_>> {
    // All programs but one.
    let dir = world.lab.dir().join("bin");
    fs::create_dir_all(&dir)?;
    for place in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        for entry in fs::read_dir(place)?.flatten() {
            let name = entry.file_name();
            let to = dir.join(&name);
            if name != "nft"
                && !to.exists()
                && entry.metadata().is_ok_and(|it| it.permissions().mode() & 0o111 != 0)
            {
                std::os::unix::fs::symlink(entry.path(), to).ok();
            }
        }
    }
    let undo = restarted_with(world, "h1", &[("PATH", dir.to_str().context("a path")?)])?;
    world.h1().wait_ready(SOON)?;
    Ok(undo)
}

pub(super) fn kill_daemon(world: &World) -> Result<Undo<'_>> {
    world.lab["h3"].kill9()?;
    Ok(Box::new(move || {
        world.lab["h3"].start()?;
        world.wait_ready("h3")
    }))
}

pub(super) fn unplug(world: &World) -> Result<Undo<'_>> {
    world.lab["h3"].link_down()?;
    Ok(Box::new(move || world.lab["h3"].link_up()))
}

pub(super) fn freeze(world: &World) -> Result<Undo<'_>> {
    world.lab["h2"].signal(Signal::SIGSTOP)?;
    Ok(Box::new(move || world.lab["h2"].signal(Signal::SIGCONT)))
}

/// Sets the clock of a host wrong by this many days.
fn clock<'a>(world: &'a World, host: &'static str, days: i64) -> Result<Undo<'a>> {
    let file = world.lab[host].dir().join("clock");
    fs::write(&file, (days * 24 * 3600 * 1000).to_string())?;
    Ok(Box::new(move || Ok(fs::write(file, "0")?)))
}

pub(super) fn own_clock(world: &World) -> Result<Undo<'_>> {
    clock(world, "h1", 3)
}

pub(super) fn peer_clock(world: &World) -> Result<Undo<'_>> {
    clock(world, "h3", -5)
}

/// Limits the number of open files of h1's daemon to a share of those that it has, in percent.
fn limit_files(world: &World, share: usize) -> Result<Undo<'_>> {
    let pid = world.h1().pid().context("no daemon")?.to_string();
    let open = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let limit = |count: usize| -> Result<()> {
        let arguments = ["--pid", &pid, &format!("--nofile={count}:4096")];
        ensure!(Command::new("prlimit").args(arguments).status()?.success(), "prlimit failed");
        Ok(())
    };
    limit(open * share / 100)?;
    let pid = pid.clone();
    Ok(Box::new(move || {
        let arguments = ["--pid", &pid, "--nofile=4096:4096"];
        ensure!(Command::new("prlimit").args(arguments).status()?.success(), "prlimit failed");
        Ok(())
    }))
}

pub(super) fn few_files(world: &World) -> Result<Undo<'_>> {
    // The diagnosis itself needs some.
    limit_files(world, 120)
}

pub(super) fn too_few_files(world: &World) -> Result<Undo<'_>> {
    limit_files(world, 112)
}

pub(super) fn full_table(world: &World) -> Result<Undo<'_>> {
    filled(world, world.h1().address()?)
}

pub(super) fn full_table_v6(world: &World) -> Result<Undo<'_>> {
    filled(world, Ipv6Addr::LOCALHOST.into())
}

fn filled(world: &World, to: IpAddr) -> Result<Undo<'_>> {
    world.fill_connections(to)?;
    Ok(Box::new(move || run(world.h1(), "sysctl -qw net.netfilter.nf_conntrack_udp_timeout=30")))
}

pub(super) fn other_release(world: &World) -> Result<Undo<'_>> {
    let undo = restarted_with(world, "h3", &[("OVL_TEST_VERSION", "9.9.9")])?;
    world.wait_ready("h3")?;
    Ok(undo)
}

pub(super) fn other_wire_version(world: &World) -> Result<Undo<'_>> {
    restarted_with(world, "h3", &[("OVL_TEST_WIRE_VERSION", "9")])
}
