//! Runs each test in a network namespace of its own, on a new thread.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::{Dataplane, Link, Remote};
use ovl_proto::id::{EndpointId, Mac, NetworkId};
use ovl_subsystems::networks::filter::FilterUnderlay;
use tokio::sync::mpsc;

use crate::{EndpointSpec, HostEnd, KernelEvent, KernelHandle, Netns, Result, open_netns, start};

/// Runs the body on a new thread in a new network namespace with an underlay device `up0`. The worker and all commands
/// that it starts are in that namespace too.
pub(super) fn in_namespace<F: Future<Output = ()>>(body: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        run("ip link set lo up");
        run("ip link add up0 type veth peer name up1");
        run("ip link set up0 addrgenmode none; ip link set up1 addrgenmode none");
        run("ip addr add 192.0.2.1/24 dev up0");
        run("ip addr add 2001:db8:ffff::1/64 dev up0 nodad");
        run("ip link set up0 up");
        run("ip link set up1 up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(body());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command in the namespace of the thread. Returns its output.
pub(super) fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().expect(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) struct Lab {
    pub(super) kernel: KernelHandle,
    pub(super) events: mpsc::Receiver<KernelEvent>,
}

impl Lab {
    pub(super) fn start() -> Self {
        let (sender, events) = mpsc::channel(16);
        Self { kernel: start(sender, Vec::new()).expect("worker"), events }
    }

    pub(super) async fn dump(&self) -> Dataplane {
        self.kernel.dump().await.expect("dump")
    }

    /// Creates the veth pair of an endpoint, without further operations.
    pub(super) async fn create(&self, spec: EndpointSpec) -> Result<String> {
        self.kernel.prepare_and_create(Vec::new(), spec).await.1.map(|made| made.ifname)
    }

    /// Runs a full pass. Returns the operations that it applied.
    pub(super) async fn pass(&self, desired: &Dataplane) -> Vec<Op> {
        let ops = diff(&self.dump().await, desired, true);
        for outcome in self.kernel.apply(ops.clone()).await {
            outcome.result.unwrap_or_else(|error| panic!("{}: {error}", outcome.op));
        }
        ops
    }

    /// Asserts that the plan is empty.
    pub(super) async fn assert_settled(&self, desired: &Dataplane) {
        let left = diff(&self.dump().await, desired, true);
        assert!(left.is_empty(), "left to do: {left:#?}");
    }

    /// Receives events until none has arrived for a while.
    pub(super) async fn events(&mut self) -> Vec<KernelEvent> {
        let mut events = Vec::new();
        while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(150), self.events.recv()).await
        {
            events.push(event);
        }
        events
    }
}

pub(super) const NETWORK: NetworkId = NetworkId([1, 2, 3, 4, 5]);
pub(super) const PORT: u16 = 4789;

pub(super) fn bridge() -> Device {
    Device::bridge(NETWORK)
}

pub(super) fn vxlan() -> Device {
    Device::vxlan(NETWORK)
}

pub(super) fn endpoint(n: u8) -> Device {
    Device::endpoint(EndpointId([9, 9, 9, 9, n]))
}

pub(super) fn mac(n: u32) -> Mac {
    let [a, b, c, d] = n.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

pub(super) fn net(text: &str) -> IpNet {
    text.parse().expect(text)
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

/// The MAC address of a multicast group that the first two remote hosts have joined.
pub(super) const GROUP: Mac = Mac([0x01, 0x00, 0x5e, 0x01, 0x02, 0x03]);

/// The data plane of a network with `remotes` remote endpoints on several hosts.
pub(super) fn desired(local: IpAddr, remotes: u32) -> Dataplane {
    let mut kernel = Dataplane::default();
    let (bridge, vxlan) = (bridge(), vxlan());
    let gateway = Mac::of_gateway(NETWORK);
    kernel.links.insert(bridge, Link::Bridge { mac: gateway, mtu: 1400, up: true, tuned: true });
    let master = Some(bridge);
    kernel.links.insert(
        vxlan,
        Link::Vxlan {
            vni: 4097,
            local,
            port: PORT,
            mtu: 1400,
            master,
            mac: Mac::of_vxlan(NETWORK),
            up: true,
            tuned: true,
            sealed: false,
        },
    );
    kernel.addresses.insert((bridge, net("10.1.0.1/16")));
    kernel.addresses.insert((bridge, net("fd00:1::1/64")));
    for n in 0..remotes {
        let host = (n % 50) as u8 + 2;
        let vtep = match local {
            IpAddr::V4(_) => IpAddr::from([192, 0, 2, host]),
            IpAddr::V6(_) => ip(&format!("2001:db8:ffff::{host}")),
        };
        let remote = Remote { vtep, port: if host == 2 { 4790 } else { PORT } };
        let mac = mac(n);
        kernel.remotes.insert((vxlan, mac), remote);
        kernel.floods.insert((vxlan, remote));
        kernel.groups.extend((n < 2).then_some((vxlan, GROUP, remote)));
        kernel.ports.insert((vxlan, mac));
        let [_, _, a, b] = n.to_be_bytes();
        kernel.neighbours.insert((bridge, IpAddr::from([10, 1, a + 1, b])), mac);
        kernel.neighbours.insert((bridge, ip(&format!("fd00:1::{:x}", n + 0x100))), mac);
    }
    kernel
}

/// The namespace of a container, which exists as long as its process.
pub(super) struct Container(std::process::Child);

impl Container {
    pub(super) fn new() -> Self {
        let container = Self(Command::new("unshare").args(["-n", "sleep", "1000"]).spawn().expect("unshare"));
        let own = std::fs::read_link("/proc/thread-self/ns/net").expect("own");
        while std::fs::read_link(container.path()).expect("its") == own {
            std::thread::sleep(Duration::from_millis(1));
        }
        container
    }

    pub(super) fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    pub(super) fn open(&self) -> Netns {
        open_netns(self.path().as_ref()).expect("namespace")
    }

    pub(super) fn run(&self, line: &str) -> String {
        run(&format!("nsenter --net={} sh -c '{line}'", self.path()))
    }

    /// A spec for an endpoint with an address of each family.
    pub(super) fn spec(&self, n: u8) -> EndpointSpec {
        EndpointSpec {
            device: endpoint(n),
            name: format!("web-{n}"),
            netns: Some(self.open()),
            ifname: None,
            mac: mac(n.into()),
            mtu: 1400,
            host_end: HostEnd::Port(bridge(), false),
            addresses: vec![net(&format!("10.1.0.{n}/16")), net(&format!("fd00:1::{n:x}/64"))],
            resolver: None,
            bandwidth: Default::default(),
            gateways: vec![ip("10.1.0.1"), ip("fd00:1::1")],
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Adds the entries of an endpoint to the data plane.
pub(super) fn add_endpoint(kernel: &mut Dataplane, n: u8) {
    let link = Link::Endpoint { mtu: 1400, master: Some(bridge()), up: true, tuned: true, hairpin: false };
    kernel.links.insert(endpoint(n), link);
    kernel.ports.insert((endpoint(n), mac(n.into())));
    kernel.neighbours.insert((bridge(), ip(&format!("10.1.0.{n}"))), mac(n.into()));
    kernel.neighbours.insert((bridge(), ip(&format!("fd00:1::{n:x}"))), mac(n.into()));
}

/// The underlay for the packet filter: 192.0.2.1 and these members, all with the default port.
pub(super) fn underlay(members: &[&str], has_vxlan: bool) -> FilterUnderlay {
    let at = |address: &str| SocketAddr::new(ip(address), ovl_proto::DEFAULT_VXLAN_PORT);
    FilterUnderlay {
        own: at("192.0.2.1"),
        members: members.iter().map(|member| at(member)).collect(),
        has_vxlan,
    }
}
