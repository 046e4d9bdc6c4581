//! The node: the state of the daemon, and the tasks that keep the state, the peers and the kernel in
//! agreement.
//!
//! Everything runs on one thread. A task borrows the state, decides, and releases it before it awaits
//! anything. It learns from the kernel, a peer or the disk only by awaiting.

mod addresses;
mod admission;
mod admitted;
mod alloc;
mod apply;
mod asking;
mod attach;
mod capture;
mod clocks;
mod cni;
mod detach;
mod detours;
mod docker;
mod doctor;
mod fast_path;
mod firewall;
mod flows;
mod guard;
mod ingress;
mod inside;
mod keys;
mod kubernetes;
mod lifecycle;
mod limits;
mod metrics;
mod multicast;
mod names;
mod netcheck;
mod netns;
mod network;
mod newer;
mod nodes;
mod objects;
mod overview;
mod page;
mod paths;
mod peers;
mod policy;
mod publish;
mod ranges;
mod reach;
mod ready;
mod reconcile;
mod recover;
mod requests;
mod reservations;
mod routed;
mod sandbox;
mod saving;
mod state;
mod tables;
mod tcp_paths;
mod trace;
mod tunnel;
mod underlay;
mod verify;
mod votes;

use std::cell::{Cell, OnceCell, Ref, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use ovl_consensus::Replica as Allocator;
use ovl_control::Event;
use ovl_dataplane::device::Device;
use ovl_dns::ResolvConfWatcher;
use ovl_files::Damaged;
use ovl_kernel::{KernelEvent, KernelHandle, PathSocket, Prober};
use ovl_mesh::gossip::{Gossip, GossipConfig, GossipEvent, Hints, WallClock};
use ovl_mesh::keys::{ClusterKey, Identity, KeyFile, Keyring, RecordError, TunnelSecret, open_record};
use ovl_mesh::streams::{StreamEvent, Streams, StreamsConfig};
use ovl_mesh::transport::Transport;
use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, Presence, SignedRecord, WireVersions, name_address, probe_kinds};
use ovl_proto::wire::fields::Unknown;
use ovl_relay::Relay;
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::ranges::HostRanges;
use tokio::sync::{Notify, mpsc};

use self::state::{RunDir, State};
use crate::addresses::Addresses;
use crate::admitted::AdmittedNames;
use crate::asked::Asked;
use crate::capture::Captures;
use crate::clashes::Clashes;
use crate::clocks::{LastWall, RefusedObjects};
use crate::config::{Config, OWN_DOMAIN};
use crate::detours::Detours;
use crate::encryption::{self, Tunnel};
use crate::endpoints::LocalEndpoints;
use crate::engines::Engines;
use crate::environment::Environment;
use crate::events::Events;
use crate::exchange::Exchanges;
use crate::failed::Failed;
use crate::firewall::Firewalls;
use crate::flows::FlowFollowers;
use crate::health::HealthAnswers;
use crate::kubernetes::Kubernetes;
use crate::metrics::Measured;
use crate::modes::DnsMode;
use crate::multicast::Multicast;
use crate::names::Resolver;
use crate::networks::Bridges;
use crate::objects::ObjectStore;
use crate::page::Token;
use crate::paths::{Carrier, PathFaults, Paths};
use crate::peers::Peers;
use crate::phase::Phase;
use crate::picture::Picture;
use crate::ports::Ports;
use crate::problems::{Code, Problems};
use crate::progress::Progress;
use crate::publish::PublishedPorts;
use crate::reach::Reach;
use crate::sandboxes::Sandboxes;
use crate::saving::{Save, Uncached};
use crate::store;
use crate::tcp_paths::TcpPaths;
use crate::trace::Traces;
use crate::workloads::Workloads;
use ovl_subsystems::{Settings, Subsystems};

/// Reason why the daemon stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Stop for a restart: peers keep this host's entries, and the kernel continues to forward.
    Restart,
    /// Leave the cluster.
    Leave,
    /// Leave the cluster and remove all kernel objects of ovl.
    Teardown,
    /// Stop because another daemon with this identity was started first.
    Aside,
}

/// The local host: its state, its sockets and its connection to the kernel.
pub(crate) struct Node {
    config: Config,
    environment: Rc<dyn Environment>,
    run_dir: RunDir,
    boot_id: String,
    identity: Arc<Identity>,
    kernel: KernelHandle,
    prober: Prober,
    /// The socket of path probes. `None` if this host sends none.
    path_socket: Option<PathSocket>,
    /// Paths to other hosts in VXLAN.
    paths: RefCell<Paths>,
    /// Paths to other hosts by direct routes.
    direct_paths: RefCell<Paths>,
    /// Published ports of this host.
    published: PublishedPorts,
    /// Answers to health checks of Services.
    health: HealthAnswers,
    gossip: RefCell<Gossip>,
    links: RefCell<Streams>,
    gossip_events: mpsc::Sender<GossipEvent>,
    link_events: mpsc::Sender<StreamEvent>,
    writer: store::Writer,
    state: RefCell<State>,
    /// Calls of container runtimes that are in flight.
    containers: cni::Containers,
    /// The resolver.
    resolver: Resolver,
    /// Sandboxes of this host.
    sandboxes: Sandboxes,
    /// Keys and measurements of the tunnel.
    tunnel: RefCell<Tunnel>,
    /// Peers and addresses that gossip and streams were last given.
    pointed: RefCell<BTreeMap<NodeId, SocketAddr>>,
    /// The address of the other family on which this host listens. `None` if it has none.
    listen_also: Cell<Option<SocketAddr>>,
    /// Recent events.
    events: Events,
    /// Durations for metrics.
    measured: RefCell<Measured>,
    /// What a browser must send to see the page. `None` if nothing, or if the page is not served.
    page_token: RefCell<Option<Rc<Token>>>,
    /// Wakes the reconcile loop.
    work: Notify,
    /// The number of those who look at packets in the stack.
    fast_watchers: Rc<Cell<u32>>,
    /// Wakes the task that saves the state.
    saver: Notify,
    /// Signals that the allocation map names another cluster key, or that the keys of a host changed.
    keys: Notify,
    key_turn: tokio::sync::Mutex<()>,
    /// Ensures that manifests are applied one request at a time.
    applying: tokio::sync::Mutex<()>,
    /// Ensures that one check of this host's connection runs at a time.
    netchecks: tokio::sync::Mutex<()>,
    /// Firewalls of other programs.
    firewalls: Firewalls,
    /// Signals that a tunnel key or a key epoch changed.
    tunnel_turn: Notify,
    /// Wakes the loop of detours.
    detour_turn: Notify,
    /// What passes sealed datagrams on. Absent until its port is open.
    relay: OnceCell<Relay>,
    /// TCP paths to hosts to which UDP is blocked.
    tcp: RefCell<tcp_paths::Running>,
    /// Wakes the loop of TCP paths.
    tcp_turn: Arc<Notify>,
    /// Signals that the allocation map changed, or that gossip has caught up.
    membership: Notify,
    /// Signals that the allocation map or the networks changed, so this host may need a block of a routed
    /// network.
    routed: Notify,
    /// Signals that the underlay device or its addresses changed.
    underlay: Notify,
    /// Notified when a link, an address or a default route of the host changes.
    ranges: Notify,
    /// Reads the resolvers of this host.
    resolv_conf: RefCell<ResolvConfWatcher>,
    /// How to stop. `None` while the daemon is to run.
    stop: Cell<Option<Stop>>,
    stopping: Notify,
}

/// Receivers of the events that a node handles.
struct Inbox {
    gossip: mpsc::Receiver<GossipEvent>,
    links: mpsc::Receiver<StreamEvent>,
    kernel: mpsc::Receiver<KernelEvent>,
    saved: mpsc::UnboundedReceiver<(u64, Result<()>)>,
    told: mpsc::Receiver<ovl_dns::Told>,
}

/// Capacity of each event channel. When the channel of streams is full, streams are slowed down.
const INBOX: usize = 256;

impl Node {
    /// Reads the state directory, opens the sockets, and adopts the objects that are in the kernel.
    async fn boot(mut config: Config, environment: Rc<dyn Environment>) -> Result<(Rc<Self>, Inbox)> {
        let disk = environment.disk();
        let state_path = config.state_dir.join("state");
        let saved = store::read(&state_path)?;
        let identity_path = config.state_dir.join("identity");
        match (&saved, identity_path.exists()) {
            // A state without a generation was left by a first start that was interrupted.
            (Some(state), false) if state.generation > 0 => return Err(Damaged(format!(
                "{} is missing while {} is there: restore it from a backup, or remove the whole directory to begin \
                 anew under another identity",
                identity_path.display(),
                state_path.display()
            ))
            .into()),
            (None, true) => return Err(Damaged(format!(
                "the state file {} is missing while {} is there, and to start without it could hand out addresses \
                 twice. Restore it from a backup; or, if this host is to begin anew, run `ovlctl peers forget` for it \
                 on another host, then remove the whole directory and start again",
                state_path.display(),
                identity_path.display()
            ))
            .into()),
            // The state is written first, so that an identity never exists without a state.
            (None, false) => store::write(&state_path, &store::State::default(), &disk)?,
            (Some(_), _) => {}
        }
        let identity = Arc::new(Identity::load_or_create(&identity_path)?);
        let saved = saved.unwrap_or_default();
        let (key_file, keyring) = match &config.cluster_key {
            Some(path) => {
                let (file, ring) = KeyFile::load(path.clone(), config.state_dir.join("cluster-keys"))?;
                (Some(file), Arc::new(ring))
            }
            None => (None, Arc::new(Keyring::new(ClusterKey::insecure(), Vec::new()))),
        };
        let run_dir = RunDir(config.run_dir.clone());
        for dir in [run_dir.endpoints(), run_dir.sandboxes(), run_dir.tables()] {
            crate::private_dir(&dir)?;
        }
        let (kernel_tell, kernel_events) = mpsc::channel(INBOX);
        let secret = TunnelSecret::load_or_create(&config.state_dir.join("tunnel.key"))?;
        let kernel = environment.start_kernel(kernel_tell, &secret).context("opening netlink")?;
        let (end, missing) = encryption::choose(&config, &secret, &kernel).await;
        let peers =
            saved.peers.iter().filter_map(|(signed, _)| Some(open_record(signed).ok()?.vtep)).collect();
        let link = kernel.underlay(config.advertise.ip(), peers).await.with_context(|| {
            format!(
                "{} is not an address of this host: give one that is with --advertise",
                config.advertise.ip()
            )
        })?;
        let path_socket = environment.path_socket(config.advertise.port()).unwrap_or_else(|error| {
            tracing::warn!(%error, "the paths to other hosts are not probed");
            None
        });
        let me = identity.id();
        let further = underlay::further(&config, &*environment, config.advertise, None)?;
        // What is forwarded to this host can be dialled, whatever hosts to join see of what it sends.
        config.behind_nat = config.behind_nat.or(further.is_forwarded.then_some(false));
        let behind_nat = config.behind_nat.unwrap_or(saved.behind_nat);
        let record = NodeRecord {
            id: identity.id(),
            public_key: *identity.public_key(),
            name: config.node.clone(),
            generation: next_generation(saved.generation, environment.wall_ms()),
            revision: 1,
            cluster: saved.alloc.as_ref().map_or(0, |alloc| alloc.learned.cluster),
            address: match behind_nat {
                true => SocketAddr::new(name_address(me).into(), config.advertise.port()),
                false => config.advertise,
            },
            vtep: config.advertise.ip(),
            vxlan_port: config.vxlan_port,
            link_mtu: link.mtu,
            tunnel: end,
            keys: keyring.ids(),
            presence: Presence::Running,
            version: release(),
            wire: WireVersions::own(),
            probes: if path_socket.is_some() { crate::paths::frame::VERSION } else { 0 },
            not_built: Vec::new(),
            probe_kinds: path_socket.as_ref().map_or(0, |socket| {
                probe_kinds::DIRECT | if socket.has_offload() { probe_kinds::OFFLOAD } else { 0 }
            }),
            metrics_port: config
                .metrics_listen
                .as_ref()
                .map_or(0, |listen| listen.port_at(config.advertise.ip())),
            zone: config.zone.clone(),
            mirrors: false,
            is_node: config.join_nodes,
            relay_port: config.relay_port,
            relays: config.relay.is_on() && config.relay_port != 0,
            further: if behind_nat { Vec::new() } else { further.published },
            unknown: Unknown::default().played(),
        };
        let signed = identity.sign_record(&record)?;
        let keys = crate::keys::Keys::new(Arc::clone(&keyring), key_file);
        let mut state = first_state(&config, &environment, &identity, (&record, &signed), &saved, keys);
        state.local.key_epochs.set_own_previous(secret.previous());
        // Routes in use depend on it. A full pass without it would delete them.
        state.local.underlay.set_segment(link.prefix);
        state.local.underlay.set_by_peers(link.by_peers);
        state
            .subsystems
            .announcements
            .set_uplink(config.load_balancer_device.or_else(|| Device::new(&link.device)));
        let (gossip_tell, gossip_events) = mpsc::channel(INBOX);
        let (link_tell, link_events) = mpsc::channel(INBOX);
        let (gossip, links) = open(
            &config,
            (environment.transport(), environment.wall_clock()),
            &identity,
            &keyring,
            (&record, &signed, further.listen),
            gossip_tell.clone(),
            link_tell.clone(),
        )
        .await?;
        let (saved_tell, saved_events) = mpsc::unbounded_channel();
        let zone = state.subsystems.names.zone().clone();
        let (told_tell, told) = mpsc::channel(INBOX);
        let (resolver, unnamed) = Resolver::start(&config, environment.owns_host(), zone, told_tell);
        state.problems.set(Code::ResolverDown, "", unnamed);
        let resolv_conf = Resolver::upstream_servers(&config);
        let sandbox_dir = run_dir.sandboxes();
        let ports = Ports::start().context("starting the thread for published ports")?;
        let node = Rc::new(Self {
            boot_id: environment.boot_id()?,
            run_dir,
            identity,
            kernel,
            path_socket,
            paths: RefCell::new(Paths::new(me, Carrier::Vxlan)),
            direct_paths: RefCell::new(Paths::new(me, Carrier::Direct)),
            prober: environment.prober().context("opening a socket for ICMP")?,
            published: PublishedPorts::new(ports.clone(), Rc::clone(&environment)),
            health: HealthAnswers::new(ports),
            gossip: RefCell::new(gossip),
            links: RefCell::new(links),
            gossip_events: gossip_tell,
            link_events: link_tell,
            writer: store::Writer::start(state_path.clone(), saved_tell, disk.clone())?,
            state: RefCell::new(state),
            containers: cni::Containers::default(),
            sandboxes: Sandboxes::new(sandbox_dir),
            resolver,
            tunnel: RefCell::new(Tunnel::new(secret, missing)),
            pointed: RefCell::default(),
            listen_also: Cell::new(further.listen),
            events: match environment.owns_host() {
                true => Events::in_dir(&config.state_dir).context("starting the thread for events")?,
                false => Events::in_memory(),
            },
            measured: RefCell::default(),
            page_token: RefCell::default(),
            work: Notify::new(),
            fast_watchers: Rc::default(),
            saver: Notify::new(),
            keys: Notify::new(),
            key_turn: tokio::sync::Mutex::default(),
            applying: tokio::sync::Mutex::default(),
            netchecks: tokio::sync::Mutex::default(),
            firewalls: Firewalls::new(environment.owns_host()),
            tunnel_turn: Notify::new(),
            detour_turn: Notify::new(),
            relay: OnceCell::new(),
            tcp: RefCell::default(),
            tcp_turn: Arc::default(),
            membership: Notify::new(),
            routed: Notify::new(),
            underlay: Notify::new(),
            ranges: Notify::new(),
            resolv_conf: RefCell::new(resolv_conf),
            stop: Cell::new(None),
            stopping: Notify::new(),
            config,
            environment,
        });
        node.recall(saved);
        // The generation must be on the disk before any peer learns of it.
        store::write(&state_path, &node.snapshot(), &disk)?;
        node.adopt().await?;
        Ok((
            node,
            Inbox {
                gossip: gossip_events,
                links: link_events,
                kernel: kernel_events,
                saved: saved_events,
                told,
            },
        ))
    }

    /// Restores the peers, objects and tables of the last run.
    fn recall(&self, saved: store::State) {
        // The time in which this host was down does not count as silence of its peers.
        let off = self.wall_ms().saturating_sub(saved.saved_ms);
        for (signed, last_alive_ms) in saved.peers {
            match open_record(&signed) {
                Ok(record) => {
                    let id = record.id;
                    self.take_record(record, signed);
                    self.state.borrow_mut().peers.recall(id, last_alive_ms.saturating_add(off));
                    self.note_proved(id);
                }
                Err(RecordError::NotUnderstood { head, why }) => self.take_unread_record(*head, signed, why),
                Err(error) => tracing::error!(%error, "passed over a host of the state file"),
            }
        }
        self.load_objects(saved.objects);
        self.read_cached_tables();
        let bootstrap = {
            let state = self.state.borrow();
            self.config.bootstrap && state.allocator.map().cluster == 0
        };
        if bootstrap {
            let mut state = self.state.borrow_mut();
            let cluster = u64::from_le_bytes(self.random()).max(1);
            tracing::info!(cluster, "began a new cluster");
            // The state is written before anything is sent: see `boot`.
            let output = state.allocator.bootstrap(cluster);
            debug_assert!(output.send.is_empty());
            let map = state.allocator.map().clone();
            state.view.learn(map);
        }
        self.recompute_networks();
    }

    /// Adopts what the last run left in the kernel, and withdraws endpoints whose interfaces are gone.
    async fn adopt(&self) -> Result<()> {
        if self.environment.owns_host() {
            self.remove_left_traces().await;
        }
        self.observe_connections().await;
        self.observe_resolvers();
        let kept = self.read_kept()?;
        self.remove_unfinished(&kept).await;
        let leases: Vec<_> = {
            let state = self.state.borrow();
            let lent = state.addresses.lent();
            lent.map(|(network, address, to)| ovl_proto::table::Entry::Lease { network, address, to })
                .collect()
        };
        let held = self.state.borrow().engines.held();
        let entries =
            kept.into_iter().map(ovl_proto::table::Entry::Endpoint).chain(leases).chain(held).collect();
        self.write_table(entries, Vec::new());
        self.hold_ports_again();
        // A removed network stays in service while it has endpoints, and the adopted endpoints count.
        self.recompute_networks();
        self.refresh_all_names();
        self.refuse_networks();
        self.adopt_admitted().await;
        self.look_at_fast_path().await;
        self.full_pass().await;
        self.admit_again().await;
        self.read_sandboxes()?;
        if let Err(failed) = self.living_sandboxes().await {
            tracing::error!(error = failed.0.message, "cannot look after sandboxes");
        }
        self.publish_record(Presence::Running);
        Ok(())
    }

    /// Returns the wall-clock time in milliseconds since 1970.
    fn wall_ms(&self) -> u64 {
        self.environment.wall_ms()
    }

    fn random<const N: usize>(&self) -> [u8; N] {
        random(&*self.environment)
    }

    fn gossip(&self) -> Ref<'_, Gossip> {
        self.gossip.borrow()
    }

    fn links(&self) -> Ref<'_, Streams> {
        self.links.borrow()
    }

    /// Gives gossip the hints of this host, so that peers notice which state they miss.
    fn publish_hints(&self, state: &State) {
        let table = state.view.own().map(|own| own.table.revision()).unwrap_or_default();
        self.gossip().set_hints(Hints {
            table,
            objects: state.objects.digest(),
            alloc: state.view.alloc.version,
        });
    }

    /// Publishes this host's presence and cluster in its record.
    fn publish_record(&self, presence: Presence) {
        let cluster = self.state.borrow().view.alloc.cluster;
        self.change_record(|record| {
            record.cluster = cluster;
            record.presence = presence;
        });
    }

    /// Raises the generation of this host's record above `last` if necessary. The owner table then starts
    /// again with the new generation.
    fn renew_generation(&self, last: u64) {
        if self.state.borrow().record().is_some_and(|record| record.generation > last) {
            return;
        }
        self.change_record(|record| {
            // The revision goes on: in gossip, it orders the records of one run of the daemon.
            record.generation = next_generation(record.generation.max(last), self.wall_ms());
        });
        self.write_table(Vec::new(), Vec::new());
        self.save_soon();
    }

    /// Changes this host's record, signs it, and gives it to gossip and streams. Returns whether the record
    /// changed.
    fn change_record(&self, change: impl FnOnce(&mut NodeRecord)) -> bool {
        let signed = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let Some(own) = state.record() else { return false };
            let mut record = own.clone();
            change(&mut record);
            if record == *own {
                return false;
            }
            record.revision += 1;
            let signed = match self.identity.sign_record(&record) {
                Ok(signed) => signed,
                Err(error) => {
                    tracing::error!(%error, "cannot sign our record");
                    return false;
                }
            };
            state.view.set_own(record, signed.clone());
            signed
        };
        self.gossip().set_record(signed.clone());
        self.links().set_record(signed);
        true
    }

    /// Records an event.
    fn event(&self, kind: &str, object: &str, message: &str) {
        tracing::info!(kind, object, "{message}");
        self.events.push(Event {
            time_ms: self.wall_ms(),
            kind: kind.to_owned(),
            object: object.to_owned(),
            message: message.to_owned(),
        });
    }
}

/// Opens the sockets of gossip and streams at the address of the record.
async fn open(
    config: &Config,
    (transport, wall_clock): (Arc<dyn Transport>, WallClock),
    identity: &Arc<Identity>,
    keyring: &Arc<Keyring>,
    (record, signed, listen_also): (&NodeRecord, &SignedRecord, Option<SocketAddr>),
    gossip: mpsc::Sender<GossipEvent>,
    links: mpsc::Sender<StreamEvent>,
) -> Result<(Gossip, Streams)> {
    let listen = SocketAddr::new(record.vtep, record.address.port());
    let taken = || {
        format!(
            "listening on {}: is another daemon using the port? `ss -lnup sport = :{}` shows it",
            listen,
            listen.port()
        )
    };
    let links_config = StreamsConfig {
        listen,
        listen_also,
        identity: Arc::clone(identity),
        keyring: Arc::clone(keyring),
        record: signed.clone(),
        transport: Arc::clone(&transport),
        behind_nat: record.is_behind_nat(),
    };
    let links = Streams::start(links_config, links).await.with_context(taken)?;
    let gossip_config = GossipConfig {
        listen,
        listen_also,
        identity: Arc::clone(identity),
        keyring: Arc::clone(keyring),
        record: signed.clone(),
        hints: Hints::default(),
        join: config.join.clone(),
        interval: config.gossip_interval,
        transport,
        wall_clock,
    };
    let gossip = Gossip::start(gossip_config, gossip).await.with_context(taken)?;
    gossip.set_link_mtu(record.link_mtu);
    Ok((gossip, links))
}

fn first_state(
    config: &Config,
    environment: &Rc<dyn Environment>,
    identity: &Arc<Identity>,
    (record, signed): (&NodeRecord, &SignedRecord),
    saved: &store::State,
    keys: crate::keys::Keys,
) -> State {
    let me = record.id;
    let durable = saved.alloc.clone().unwrap_or_default();
    let alloc = durable.learned.clone();
    let first = || u64::from_le_bytes(random(&**environment));
    State {
        view: Picture::new(record.clone(), signed.clone(), alloc),
        local: Local::default(),
        host_ranges: HostRanges::default(),
        peers: Peers::default(),
        clashes: Clashes::default(),
        objects: ObjectStore::new(saved.clock),
        exchanges: Exchanges::new(me),
        refused_objects: RefusedObjects::default(),
        wall: LastWall::default(),
        bridges: Bridges::new(saved.bridges.iter().cloned()),
        kubernetes: Kubernetes::default(),
        admitted: AdmittedNames::default(),
        workloads: Workloads::default(),
        subsystems: Subsystems::new(Settings {
            generation: u32::from_le_bytes(random(&**environment)),
            masquerade: config.masquerade,
            own_domain: OWN_DOMAIN.to_owned(),
            cluster_domain: config.cluster_domain.clone(),
            walk_search_lists: config.walk_search_lists,
            cluster_dns: config.ranges.dns_addresses().collect(),
            ranges: config.ranges.clone(),
            without_policies: !config.policy.is_on(),
            without_names: config.dns == DnsMode::Off,
            without_services: !config.proxy.translates(false),
        }),
        keys,
        allocator: Allocator::new(
            me,
            Rc::new(votes::Signer::new(Arc::clone(identity))),
            durable,
            u64::from_le_bytes(random(&**environment)),
        ),
        maps: crate::maps::Maps::default(),
        leases: Asked::new(first()),
        questions: asking::Questions::new(first()),
        addresses: Addresses::new(saved.leases.iter().copied()),
        endpoints: LocalEndpoints::new(RunDir(config.run_dir.clone()).endpoints()),
        engines: Engines::new(&saved.docker),
        multicast: Multicast::default(),
        traces: Traces::new(first()),
        captures: Captures::new(first()),
        flow_followers: FlowFollowers::new(first()),
        reconcile: Progress::new(),
        phase: Phase::default(),
        detours: Detours::default(),
        reach: Reach::new(record.is_behind_nat()),
        tcp: TcpPaths::default(),
        path_faults: PathFaults::default(),
        problems: Problems::default(),
        newer: crate::newer::Newer::default(),
        save: Save::new(saved.unknown.clone().played()),
        uncached: Uncached::default(),
        clock: state::RunClock::start(Rc::clone(environment)),
    }
}

/// Returns the release of this daemon.
///
/// Debug builds take another one from the variable `OVL_TEST_VERSION`, so that tests can play one.
fn release() -> String {
    #[cfg(debug_assertions)]
    if let Ok(played) = std::env::var("OVL_TEST_VERSION") {
        return played;
    }
    env!("CARGO_PKG_VERSION").to_owned()
}

/// Returns a generation that is higher than that of any earlier run, even if the state directory is an old
/// copy.
fn next_generation(last: u64, wall_ms: u64) -> u64 {
    (last + 1).max(wall_ms / 1000)
}

fn random<const N: usize>(environment: &dyn Environment) -> [u8; N] {
    let mut bytes = [0; N];
    environment.fill_random(&mut bytes);
    bytes
}

/// Deletes a file if it exists.
fn remove_if_there(path: &Path) -> Result<()> {
    ovl_files::remove_if_present(path).with_context(|| format!("removing {}", path.display()))
}

pub use lifecycle::{Daemon, Inspection};
pub(crate) use lifecycle::{StoodAside, run};
