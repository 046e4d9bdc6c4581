//! A holder of the cluster key that is no member lies about the allocation map, in the protocol of the daemons.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, Lab, wait_until};
use ovl_mesh::keys::{ClusterKey, Identity, Keyring};
use ovl_mesh::streams::{StreamEvent, Streams, StreamsConfig};
use ovl_mesh::transport::HostTransport;
use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Change, Decision, Proof, Statement, Vote};
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::WireVersions;
use ovl_proto::record::{ClusterKeys, Domain, NodeRecord, Presence};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use ovl_proto::wire::fields::Unknown;
use ovl_tests::{SOON, attach, create_network, peer, ping_all_pairs, start_lab, text, wait_problem};
use tokio::sync::mpsc;

/// The address of the liar on the underlay.
const ADDRESS: &str = "192.168.77.250";
/// The port of streams.
const PORT: u16 = 7940;

/// A host that speaks the protocol of streams and runs no daemon.
struct Liar {
    identity: Arc<Identity>,
    streams: Streams,
    events: mpsc::Receiver<StreamEvent>,
    hosts: BTreeMap<NodeId, SocketAddr>,
    /// The hosts to which its streams are connected.
    up: BTreeSet<NodeId>,
    /// Whether a host sent it a cluster key.
    has_new_key: bool,
    /// Whether a host took part in a trace for it.
    was_traced: bool,
}

impl Liar {
    /// Connects to hosts, and waits until they have connected to it.
    async fn connect(identity: &Path, key: &Path, hosts: &BTreeMap<NodeId, SocketAddr>) -> Result<Self> {
        let identity = Arc::new(Identity::load_or_create(identity)?);
        let key = ClusterKey::read(key)?;
        let listen = SocketAddr::new(ADDRESS.parse()?, PORT);
        let record = identity.sign_record(&NodeRecord {
            id: identity.id(),
            public_key: *identity.public_key(),
            name: "liar".to_owned(),
            // Later than that of the daemon whose identity it may have.
            generation: u64::from(u32::MAX) * 2,
            revision: 1,
            cluster: 0,
            address: listen,
            vtep: listen.ip(),
            vxlan_port: 4789,
            link_mtu: 1500,
            tunnel: None,
            keys: ClusterKeys { seals: key.id(), opens: Vec::new() },
            presence: Presence::Running,
            version: "0".to_owned(),
            wire: WireVersions::own(),
            probes: 0,
            not_built: Vec::new(),
            probe_kinds: 0,
            metrics_port: 0,
            zone: String::new(),
            mirrors: false,
            is_node: false,
            relay_port: 0,
            relays: false,
            further: Vec::new(),
            unknown: Unknown::default(),
        })?;
        let config = StreamsConfig {
            listen,
            listen_also: None,
            identity: Arc::clone(&identity),
            keyring: Arc::new(Keyring::new(key, Vec::new())),
            record,
            transport: Arc::new(HostTransport::default()),
            behind_nat: false,
        };
        let (tell, events) = mpsc::channel(1024);
        let streams = Streams::start(config, tell).await?;
        streams.set_peers(hosts.clone());
        let mut liar = Self {
            identity,
            streams,
            events,
            hosts: hosts.clone(),
            up: BTreeSet::new(),
            has_new_key: false,
            was_traced: false,
        };
        while liar.up.len() < hosts.len() {
            liar.event().await?;
        }
        Ok(liar)
    }

    async fn event(&mut self) -> Result<StreamEvent> {
        let event = tokio::time::timeout(SOON, self.events.recv()).await?.context("streams ended")?;
        match &event {
            StreamEvent::Message { message: Message::ClusterKey(_), .. } => self.has_new_key = true,
            StreamEvent::Message {
                message: Message::TraceReply { .. } | Message::TimeReply { .. } | Message::CaptureBatch { .. },
                ..
            } => self.was_traced = true,
            StreamEvent::Up(host) => drop(self.up.insert(*host)),
            StreamEvent::Down(host) => drop(self.up.remove(host)),
            _ => {}
        }
        Ok(event)
    }

    fn say(&self, to: NodeId, message: AllocMessage) -> Result<()> {
        ensure!(self.streams.send(to, &Message::Alloc(message)), "no stream to {to}");
        Ok(())
    }

    /// Closes the streams to all hosts, and connects again.
    async fn connect_again(&mut self) -> Result<()> {
        self.streams.set_peers(BTreeMap::new());
        while !self.up.is_empty() {
            self.event().await?;
        }
        self.streams.set_peers(self.hosts.clone());
        Ok(())
    }

    /// Asks a host for its map. The answer comes after the host has read everything that was sent before.
    async fn map_of(&mut self, host: NodeId) -> Result<Decision> {
        let end = Instant::now() + SOON;
        let (mut asked, mut connected) = (None, Instant::now());
        while Instant::now() < end {
            // With each change of the map, hosts disconnect from those that were taken out.
            if connected.elapsed() > Duration::from_secs(3) {
                self.connect_again().await?;
                connected = Instant::now();
            }
            // The host answers on its own stream to this one, which may not be up yet.
            if asked.is_none_or(|at: Instant| at.elapsed() > Duration::from_millis(300)) {
                self.streams.send(host, &Message::Alloc(AllocMessage::Ask { known: 0 }));
                asked = Some(Instant::now());
            }
            let next = tokio::time::timeout(Duration::from_millis(100), self.event()).await;
            if let Ok(event) = next
                && let StreamEvent::Message {
                    from, message: Message::Alloc(AllocMessage::Learn(map)), ..
                } = event?
                && from == host
            {
                return Ok(*map);
            }
        }
        bail!("{host} does not answer")
    }

    /// Forges a map in which only this host is a member and holds everything.
    fn forge(&self, known: &Decision, version: u64) -> Decision {
        let me = self.identity.id();
        let map = AllocMap {
            version,
            members: BTreeSet::from([me]),
            previous_members: known.map.members.clone(),
            blocks: known.map.blocks.keys().map(|block| (*block, me)).collect(),
            ..known.map.clone()
        };
        let statement = Statement {
            cluster: map.cluster,
            version,
            ballot: Ballot { counter: known.proof.statement.ballot.counter + 1, node: me },
            members: map.members.clone(),
            map: [0; 32],
            unknown: Unknown::default(),
        };
        let signature = self.identity.sign(Domain::Map, &wire::encode_body(&statement).unwrap_or_default());
        let mut votes = known.proof.votes.clone();
        votes.push(Vote { key: *self.identity.public_key(), signature });
        Decision {
            map,
            proof: Proof { statement, votes },
            history: vec![known.proof.clone()],
            recoveries: Vec::new(),
        }
    }

    /// Tells a host every lie about the map, and returns the map that the host has then.
    async fn lie_to(&mut self, host: NodeId) -> Result<AllocMap> {
        let known = self.map_of(host).await?;
        let me = self.identity.id();
        for version in [known.map.version + 1, u64::MAX] {
            let forged = self.forge(&known, version);
            let ballot = Ballot { counter: 1 << 40, node: me };
            for ballot in
                [ballot, Ballot { counter: ballot.counter, node: host }, known.proof.statement.ballot]
            {
                let learned = Some(Box::new(forged.clone()));
                self.say(host, AllocMessage::Promise { ballot, accepted: None, learned })?;
                let accepted = Some((ballot, forged.map.clone()));
                self.say(host, AllocMessage::Promise { ballot, accepted, learned: None })?;
            }
            self.say(host, AllocMessage::Learn(Box::new(forged.clone())))?;
            self.say(host, AllocMessage::Prepare { ballot, known: known.map.version })?;
            self.say(host, AllocMessage::Accept { ballot, map: forged.map })?;
        }
        Ok(self.map_of(host).await?.map)
    }
}

fn id(host: &Host) -> Result<NodeId> {
    Ok(text(&host.ctl_json(&["status"])?["id"]).parse()?)
}

fn addresses(hosts: &[&Host]) -> Result<BTreeMap<NodeId, SocketAddr>> {
    hosts.iter().map(|host| Ok((id(host)?, SocketAddr::new(host.address()?, PORT)))).collect()
}

/// Runs a task on the switch of the underlay, which gets the address of the liar.
fn on_the_underlay<T: Send>(lab: &Lab, task: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    let switch = lab.switch();
    if !switch.exec_ok(["ip", "addr"])?.contains(ADDRESS) {
        switch.exec_ok(["ip", "addr", "add", &format!("{ADDRESS}/24"), "dev", "br0"])?;
    }
    switch.run(|| -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(task())
    })?
}

fn lab_key(lab: &Lab) -> PathBuf {
    lab.dir().join("cluster.key")
}

#[test]
fn lies_of_a_key_holder_about_the_map_change_nothing() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let mut all =
        vec![attach(&lab["h1"], "a", "blue", &[]).unwrap(), attach(&lab["h2"], "b", "blue", &[]).unwrap()];
    let hosts: Vec<&Host> = lab.hosts().iter().collect();
    let addresses = addresses(&hosts).unwrap();
    let members: BTreeSet<NodeId> = addresses.keys().copied().collect();
    let file = lab.dir().join("liar");
    on_the_underlay(&lab, async || {
        let mut liar = Liar::connect(&file, &lab_key(&lab), &addresses).await?;
        for host in &members {
            let map = liar.lie_to(*host).await?;
            ensure!(map.members == members, "{host} believes {map:?}");
            ensure!(map.version < 100 && map.blocks.values().all(|owner| members.contains(owner)), "{map:?}");
        }
        Ok(())
    })
    .unwrap();
    // Agreement goes on: h3 claims its first block, after a restart too.
    all.push(attach(&lab["h3"], "c", "blue", &[]).unwrap());
    lab["h1"].restart().unwrap();
    lab["h1"].wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    attach(&lab["h1"], "d", "red", &[]).unwrap();
    ping_all_pairs(&all, SOON).unwrap();
    for host in &hosts {
        assert_eq!(host.ctl_json(&["status"]).unwrap()["members"], 3);
    }
}

#[test]
fn host_that_is_no_member_gets_no_part_of_a_trace() {
    let lab = start_lab(2).unwrap();
    let hosts: Vec<&Host> = lab.hosts().iter().collect();
    let addresses = addresses(&hosts).unwrap();
    let file = lab.dir().join("liar");
    let was_traced = on_the_underlay(&lab, async || {
        let mut liar = Liar::connect(&file, &lab_key(&lab), &addresses).await?;
        for host in addresses.keys() {
            // A member gets an error at once: nothing is watched.
            let ask = "{\"Collect\":{\"cookie\":2}}".to_owned();
            ensure!(liar.streams.send(*host, &Message::TraceAsk { id: 7, ask }), "no stream to {host}");
            // A member gets the time, and a batch that says why nothing is captured.
            for message in
                [Message::TimeRequest { id: 8 }, Message::CaptureStart { id: 9, ask: "{}".to_owned() }]
            {
                ensure!(liar.streams.send(*host, &message), "no stream to {host}");
            }
            // The second answer follows all that the host had to say before.
            liar.map_of(*host).await?;
            liar.map_of(*host).await?;
        }
        Ok(liar.was_traced)
    })
    .unwrap();
    assert!(!was_traced);
}

#[test]
fn forgotten_host_cannot_put_itself_back_and_is_not_given_the_next_key() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    let stolen = h3.state_dir().join("identity");
    let thief = id(h3).unwrap();
    h3.kill9().unwrap();
    h3.link_down().unwrap();
    for host in [h1, h2] {
        wait_until(SOON, "h3 to be dead", || -> Result<bool> { Ok(peer(host, "h3")?["state"] == "dead") })
            .unwrap();
    }
    let addresses = addresses(&[h1, h2]).unwrap();
    let members: BTreeSet<NodeId> = addresses.keys().copied().collect();
    h1.ctl_ok(&["peers", "forget", "h3"]).unwrap();
    let new = lab.dir().join("new.key");
    std::fs::write(&new, h1.ctl_ok(&["key", "generate"]).unwrap()).unwrap();
    std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let has_new_key = on_the_underlay(&lab, async || {
        let mut liar = Liar::connect(&stolen, &lab_key(&lab), &addresses).await?;
        ensure!(liar.identity.id() == thief);
        for host in &members {
            liar.say(*host, AllocMessage::Request { id: 1, change: Change::Admit(thief) })?;
            let map = liar.lie_to(*host).await?;
            ensure!(map.members == members && map.banned.contains(&thief), "{host} believes {map:?}");
        }
        // The documented answer to a stolen disk.
        h1.ctl_ok(&["key", "rotate", "--cluster", new.to_str().context("a path")?])?;
        for host in &members {
            liar.say(*host, AllocMessage::Request { id: 2, change: Change::Admit(thief) }).ok();
        }
        let before: ClusterKeyId = ClusterKey::read(&lab_key(&lab))?.id();
        let done = || -> Result<bool> {
            let status = h1.ctl_json(&["key", "status"])?;
            Ok(status["rotation"].is_null() && !status.to_string().contains(&format!("\"{before}\"")))
        };
        wait_until(SOON, "h1 and h2 to have only the new key", done).ok();
        while let Ok(event) = liar.events.try_recv() {
            if let StreamEvent::Message { message: Message::ClusterKey(_), .. } = event {
                liar.has_new_key = true;
            }
        }
        Ok(liar.has_new_key)
    })
    .unwrap();
    assert!(!has_new_key, "the thief was given the new key");
    for host in [h1, h2] {
        assert_eq!(host.ctl_json(&["status"]).unwrap()["members"], 2);
    }
}

/// Kills h3 and takes it out of the cluster. Its link is down afterwards.
fn forget_h3(lab: &Lab) -> Result<()> {
    let (h1, h3) = (&lab["h1"], &lab["h3"]);
    h3.kill9()?;
    h3.link_down()?;
    wait_until(SOON, "h3 to be dead", || -> Result<bool> { Ok(peer(h1, "h3")?["state"] == "dead") })?;
    h1.ctl_ok(&["peers", "forget", "h3"])?;
    Ok(())
}

#[test]
fn forgotten_host_returns_after_it_is_admitted_again() {
    let lab = start_lab(3).unwrap();
    let (h1, h3) = (&lab["h1"], &lab["h3"]);
    forget_h3(&lab).unwrap();
    h3.link_up().unwrap();
    h3.start().unwrap();
    let problem = wait_problem(h3, &["not admitted", "peers forget"], SOON).unwrap();
    let advice = format!("ovlctl peers admit {}", id(h3).unwrap());
    assert!(problem.contains(&advice), "{problem}");
    assert_eq!(h1.ctl_json(&["status"]).unwrap()["members"], 2);
    h1.ctl_ok(&["peers", "admit", "h3"]).unwrap();
    h3.wait_ready(SOON).unwrap();
    wait_until(SOON, "three members", || -> Result<bool> { Ok(h1.ctl_json(&["status"])?["members"] == 3) })
        .unwrap();
}

#[test]
fn forgotten_host_can_be_admitted_by_name_before_it_is_heard_from() {
    let lab = start_lab(3).unwrap();
    let (h1, h3) = (&lab["h1"], &lab["h3"]);
    forget_h3(&lab).unwrap();
    std::thread::scope(|scope| {
        let admit = scope.spawn(|| h1.ctl_ok(&["peers", "admit", "h3"]).map(drop));
        h3.link_up().unwrap();
        h3.start().unwrap();
        admit.join().unwrap().unwrap();
    });
    h3.wait_ready(SOON).unwrap();
}
