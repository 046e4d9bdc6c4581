//! The lab that faults are injected into: three hosts, networks of three kinds, a Service, resolvers.

use std::cell::RefCell;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Spawned, wait_until};
use ovl_tests::resolver::{self, Behaviour, FakeResolver, ResolvConf};
use ovl_tests::{Attached, SOON, attach, create_network, ping_all_pairs, text, wait_clean};

/// The address of each host's resolver.
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A Service with backends, as the lab has it.
pub(crate) const WEB: &str = "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"web\"},\"spec\":{\"type\":\"NodePort\",\
                       \"selector\":{\"app\":\"web\"},\"ports\":[{\"port\":80,\"targetPort\":8080,\"nodePort\":30080}]}}";

/// A small file system, unmounted when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let options = "size=96m,nr_inodes=4000,mode=700";
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "small"]).arg(&at).status()?;
        ensure!(mounted.success(), "mount failed");
        Ok(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The lab and what is in it.
pub(crate) struct World {
    // Before the lab, whose directory has it.
    _disk: SmallDisk,
    pub(crate) lab: Lab,
    /// The workload `a` on h1, on the switched network `blue`.
    pub(crate) a: Attached,
    /// The workload `b` on h2, on the same network.
    pub(crate) b: Attached,
    /// The workloads of the other networks.
    others: Vec<Attached>,
    pub(crate) resolv_conf: ResolvConf,
    /// The resolver of h1.
    pub(crate) resolver: RefCell<Option<FakeResolver>>,
    _resolvers: Vec<FakeResolver>,
    bridge: String,
    vni: u64,
}

impl World {
    /// Builds the lab, and waits until everything works.
    pub(crate) fn build() -> Result<Self> {
        let (config, resolv_conf) = resolver::config(3, &[&RESOLVER.to_string()], "proxy = \"on\"")?;
        let lab = Lab::new(config)?;
        let disk = SmallDisk::mount(lab["h1"].state_dir())?;
        for host in lab.hosts() {
            let clock = host.dir().join("clock");
            host.set_env(&[("OVL_TEST_CLOCK", clock.to_str().context("a path")?)])?;
        }
        let start = |host: &str| FakeResolver::start(&lab[host], RESOLVER, Behaviour::Answers);
        let first = start("h1")?;
        let resolvers = vec![start("h2")?, start("h3")?];
        lab.start_all()?;
        create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd10::/64"])?;
        create_network(&lab, "red", &["--mode", "l3", "--subnet", "10.60.0.0/16"])?;
        create_network(&lab, "sealed", &["--encrypted", "--subnet", "10.99.0.0/24"])?;
        let on =
            |host: &str, name: &str, network: &str, more: &[&str]| attach(&lab[host], name, network, more);
        let a = on("h1", "a", "blue", &[])?;
        let b = on("h2", "b", "blue", &["--label", "app=web"])?;
        let others = vec![
            on("h3", "c", "blue", &[])?,
            on("h1", "ra", "red", &[])?,
            on("h2", "rb", "red", &[])?,
            on("h1", "sa", "sealed", &[])?,
            on("h2", "sb", "sealed", &[])?,
        ];
        let [c, ra, rb, sa, sb] = &others[..] else { unreachable!() };
        for group in [
            vec![a.clone(), b.clone(), c.clone()],
            vec![ra.clone(), rb.clone()],
            vec![sa.clone(), sb.clone()],
        ] {
            ping_all_pairs(&group, SOON)?;
        }
        let h1 = &lab["h1"];
        ovl_tests::service::apply(&lab, h1, WEB)?;
        let network = h1.ctl_json(&["network", "inspect", "blue"])?;
        let bridge = text(&network["bridge"]);
        let vni = network["vni"].as_u64().context("a VNI")?;
        wait_clean(lab.hosts(), SOON)?;
        let resolver = RefCell::new(Some(first));
        Ok(Self { _disk: disk, lab, a, b, others, resolv_conf, resolver, _resolvers: resolvers, bridge, vni })
    }

    pub(crate) fn h1(&self) -> &Host {
        &self.lab["h1"]
    }

    /// Fills in the names and addresses of the lab.
    pub(crate) fn fill(&self, template: &str) -> String {
        let address = |host: &str| self.lab[host].address().map(|it| it.to_string()).unwrap_or_default();
        let mut text = template.to_owned();
        for (name, value) in [
            ("{bridge}", self.bridge.clone()),
            ("{vxlan}", self.bridge.replace("ovb-", "ovx-")),
            ("{vni}", self.vni.to_string()),
            ("{a}", self.a.address()),
            ("{b}", self.b.address()),
            ("{b6}", self.b.addresses().get(1).cloned().unwrap_or_default()),
            ("{a_device}", self.a.device()),
            ("{h1}", address("h1")),
            ("{h2}", address("h2")),
            ("{h3}", address("h3")),
            ("{state}", self.h1().state_dir().display().to_string()),
            ("{dir}", self.lab.dir().display().to_string()),
            ("{pid}", self.h1().pid().map(|pid| pid.to_string()).unwrap_or_default()),
        ] {
            text = text.replace(name, &value);
        }
        text
    }

    /// Replaces the resolver of h1. `None`: there is none.
    pub(crate) fn set_resolver(&self, behaviour: Option<Behaviour>) -> Result<()> {
        // The port must be free before the next one takes it.
        drop(self.resolver.borrow_mut().take());
        if let Some(behaviour) = behaviour {
            *self.resolver.borrow_mut() = Some(FakeResolver::start(self.h1(), RESOLVER, behaviour)?);
        }
        Ok(())
    }

    /// Starts pings between all workloads, many a second. They end when the guards are dropped.
    pub(crate) fn traffic(&self) -> Result<Vec<Spawned>> {
        let [c, ra, rb, sa, sb] = &self.others[..] else { unreachable!() };
        let pairs = [(&self.a, &self.b), (&self.b, c), (ra, rb), (rb, ra), (sa, sb), (sb, sa)];
        let ping = |(from, to): (&Attached, &Attached)| {
            from.workload.spawn(["ping", "-n", "-q", "-i", "0.01", "-s", "1000", &to.address()])
        };
        pairs.into_iter().map(ping).collect()
    }

    /// Attaches and detaches an endpoint on h3.
    pub(crate) fn churn(&self, round: usize) -> Result<()> {
        let name = format!("churn{round}");
        attach(&self.lab["h3"], &name, "blue", &[])?;
        self.lab["h3"].ctl_ok(&["detach", &name])?;
        Ok(())
    }

    /// Opens so many connections of h1 to itself that the kernel can track few more. They are forgotten after some seconds.
    pub(crate) fn fill_connections(&self, to: IpAddr) -> Result<()> {
        let h1 = self.h1();
        h1.exec_ok(["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=8"])?;
        let most: u32 = h1.exec_ok(["sysctl", "-n", "net.netfilter.nf_conntrack_max"])?.trim().parse()?;
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
        let bind = || h1.run(|| UdpSocket::bind(any));
        let sockets: Vec<UdpSocket> = (0..=most / 40_000).map(|_| Ok(bind()??)).collect::<Result<_>>()?;
        for n in 0..most / 100 * 85 {
            let socket = &sockets[(n / 40_000) as usize];
            socket.send_to(b"x", (to, 10_000 + (n % 40_000) as u16))?;
        }
        Ok(())
    }

    /// Waits until a host's daemon is ready, after a restart.
    pub(crate) fn wait_ready(&self, host: &str) -> Result<()> {
        self.lab[host].wait_ready(SOON)?;
        wait_until(SOON, "all hosts to be alive", || self.lab.wait_all_alive(SOON))
    }
}
