//! Multicast groups of endpoints: bridges report them, and members answer when they are asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use ovl_dataplane::device::Device;

use super::lab::{Container, Lab, add_endpoint, desired, endpoint, in_namespace, ip, run};
use crate::KernelEvent;

const GROUP4: &str = "239.1.2.3";
const GROUP6: &str = "ff15::7";

/// Sockets in a container that have joined a group of each family.
fn join(container: &Container, address: &str) -> [UdpSocket; 2] {
    let (namespace, address) = (File::open(container.path()).unwrap(), address.parse::<Ipv4Addr>().unwrap());
    let inside = move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let index = if_nametoindex("eth0").unwrap();
        let sockets = ["0.0.0.0:0", "[::]:0"].map(|any| UdpSocket::bind(any).unwrap());
        sockets[0].join_multicast_v4(&GROUP4.parse().unwrap(), &address).unwrap();
        sockets[1].join_multicast_v6(&GROUP6.parse().unwrap(), index).unwrap();
        sockets
    };
    std::thread::spawn(inside).join().unwrap()
}

/// Waits until an endpoint has exactly these groups.
async fn wait_groups(lab: &Lab, device: Device, wanted: &[&str]) {
    let wanted: BTreeSet<IpAddr> = wanted.iter().map(|group| ip(group)).collect();
    wait_until(lab, device, |groups| *groups == wanted).await;
}

async fn wait_until(lab: &Lab, device: Device, done: impl Fn(&BTreeSet<IpAddr>) -> bool) {
    let groups = async || {
        let all: BTreeMap<Device, BTreeSet<IpAddr>> = lab.kernel.groups().await.expect("groups");
        all.get(&device).cloned().unwrap_or_default()
    };
    for _ in 0..600 {
        // The worker reads notifications when it is woken.
        if done(&groups().await) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", groups().await);
}

#[test]
fn groups_are_reported_and_asked_for() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = desired(ip("192.0.2.1"), 2);
        lab.pass(&wanted).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        add_endpoint(&mut wanted, 30);
        lab.pass(&wanted).await;
        lab.events().await;
        let device = endpoint(30);
        wait_groups(&lab, device, &[]).await;
        let sockets = join(&container, "10.1.0.30");
        wait_groups(&lab, device, &[GROUP4, GROUP6]).await;
        assert!(lab.events().await.contains(&KernelEvent::Groups));
        lab.assert_settled(&wanted).await;

        // A port that was away knows nothing. The bridge asks for IPv4 itself. A member may say a second time that it has
        // joined, so IPv6 may be there too.
        run(&format!("ip link set {device} nomaster"));
        wait_groups(&lab, device, &[]).await;
        lab.pass(&wanted).await;
        wait_until(&lab, device, |groups| groups.contains(&ip(GROUP4))).await;
        lab.kernel.ask_for_members(vec![device]).await.expect("ask");
        wait_groups(&lab, device, &[GROUP4, GROUP6]).await;

        // A full dump finds the same, and members that leave are gone.
        lab.dump().await;
        wait_groups(&lab, device, &[GROUP4, GROUP6]).await;
        drop(sockets);
        wait_groups(&lab, device, &[]).await;
        assert!(lab.events().await.contains(&KernelEvent::Groups));

        // The groups of a deleted endpoint are gone with it.
        let _sockets = join(&container, "10.1.0.30");
        wait_groups(&lab, device, &[GROUP4, GROUP6]).await;
        lab.kernel.delete_links(vec![device]).await.expect("deleted");
        wait_groups(&lab, device, &[]).await;
    });
}
