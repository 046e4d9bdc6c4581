//! Lifecycle of the daemon: start, periodic work, and the ways to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use ovl_cluster::view::Node as Known;
use ovl_control::{PeerState, Reply, Request};
use ovl_dataplane::op::{FastOp, Op, RouteOp};
use ovl_dataplane::state::Dataplane;
use ovl_proto::alloc::Change;
use ovl_proto::id::{ClusterKeyId, NetworkId, NodeId};
use ovl_proto::record::{ClusterKeys, Presence};
use ovl_proto::table::Entry;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, JoinSet, spawn_local};
use tokio::time::{MissedTickBehavior, interval};

use super::clocks::note_step;
use super::{Failed, Inbox, Node, Stop};
use crate::config::Config;
use crate::control::{self, Answers as _};
use crate::environment::Environment;
use crate::problems::Code;

/// Interval of the periodic work.
const TICK: Duration = Duration::from_millis(200);
/// Time in milliseconds after which a daemon that has not received everything that peers announce treats its
/// picture as complete.
const CATCH_UP_MS: u64 = 30_000;

/// Runs the daemon until it is told to stop.
///
/// # Errors
///
/// The daemon cannot start, one of its tasks exited, or its state was not saved.
pub(crate) async fn run(config: Config, environment: Rc<dyn Environment>) -> Result<()> {
    let Daemon { node, mut tasks } = Daemon::start(config, environment).await?;
    notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(node = %node.config.node, id = %node.identity.id(), address = %node.config.advertise, "ovld is up");

    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => node.stop.set(Some(Stop::Restart)),
        _ = interrupt.recv() => node.stop.set(Some(Stop::Restart)),
        () = node.stopping.notified() => {}
        ended = tasks.join_next() => {
            anyhow::bail!("a task of the daemon ended, which none should: {ended:?}");
        }
    }
    notify(&[sd_notify::NotifyState::Stopping]);
    let result = node.end().await;
    // The reply to the request that stops the daemon is written by a task. The socket is closed with the
    // process, and a client that reads until the end receives the reply before that.
    tasks.shutdown().await;
    super::remove_if_there(&node.run_dir.socket())?;
    result
}

/// A running daemon. Its tasks run on the `LocalSet` that started it and end with it.
pub struct Daemon {
    node: Rc<Node>,
    tasks: JoinSet<()>,
}

/// A snapshot of what a daemon knows, for the invariants of tests.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// Id of this host.
    pub id: NodeId,
    /// Desired data plane.
    pub desired: Dataplane,
    /// Entries of each host's owner table.
    pub tables: BTreeMap<NodeId, Vec<Entry>>,
    /// Members of the cluster.
    pub members: BTreeSet<NodeId>,
    /// Version of the allocation map.
    pub version: u64,
    /// Names of the cluster's networks, by id.
    pub networks: BTreeMap<NetworkId, String>,
    /// Cluster keys of this host.
    pub keys: ClusterKeys,
    /// Cluster key that the members last agreed on. `None` before the first rotation.
    pub agreed_key: Option<ClusterKeyId>,
}

impl Daemon {
    /// Starts a daemon on the current `LocalSet`.
    ///
    /// # Errors
    ///
    /// The state directory cannot be read or written, a socket cannot be opened, or the kernel cannot be
    /// reached.
    pub async fn start(config: Config, environment: Rc<dyn Environment>) -> Result<Self> {
        let owns_host = environment.owns_host();
        let (node, inbox) = Node::boot(config, environment).await?;
        let listener = owns_host.then(|| control::listen(&node.run_dir.socket())).transpose()?;
        let tasks = start_tasks(&node, inbox, listener).await;
        Ok(Self { node, tasks })
    }

    /// Answers a request, as the control socket does.
    pub fn answer(&self, request: Request) -> impl Future<Output = Reply> + use<> {
        let node = Rc::clone(&self.node);
        async move { node.answer(request, Vec::new()).await }
    }

    /// Returns a snapshot of what the daemon knows.
    pub fn inspect(&self) -> Inspection {
        let desired = self.node.desired();
        let state = self.node.state.borrow();
        let table = |(id, node): (&NodeId, &Known)| (*id, node.table.entries().cloned().collect());
        Inspection {
            id: state.view.me,
            desired,
            tables: state.view.nodes.iter().map(table).collect(),
            members: state.view.alloc.members.iter().copied().collect(),
            version: state.view.alloc.version,
            networks: state
                .view
                .networks
                .iter()
                .map(|(id, found)| (*id, found.network.name.clone()))
                .collect(),
            keys: state.keys.ring().ids(),
            agreed_key: state.view.alloc.key.map(|key| key.id),
        }
    }

    /// Waits until one of the daemon's tasks exits, which is always an error. `None` if there are no tasks.
    pub async fn failed(&mut self) -> Option<Result<(), JoinError>> {
        self.tasks.join_next().await
    }

    /// Stops the daemon as SIGTERM does.
    ///
    /// # Errors
    ///
    /// The state was not saved.
    pub async fn stop(self) -> Result<()> {
        let Self { node, mut tasks } = self;
        node.stop.set(Some(Stop::Restart));
        let result = node.end().await;
        tasks.shutdown().await;
        result
    }
}

async fn start_tasks(node: &Rc<Node>, inbox: Inbox, listener: Option<UnixListener>) -> JoinSet<()> {
    // This must happen before the socket is created. A plugin that finds no socket leaves a file, which is
    // processed here. A plugin that finds the socket is answered afterwards.
    node.carry_out_all_deleted().await;
    node.carry_out_docker().await;
    let Inbox { mut gossip, mut links, mut kernel, saved, told } = inbox;
    let mut tasks = JoinSet::new();
    if let Some(listener) = listener {
        tasks.spawn_local(control::serve(Rc::clone(node), listener));
    }
    tasks.spawn_local(Rc::clone(node).save_loop(saved));
    tasks.spawn_local(Rc::clone(node).reconcile_loop());
    tasks.spawn_local(Rc::clone(node).told_loop(told));
    tasks.spawn_local(Rc::clone(node).admission_loop());
    tasks.spawn_local(Rc::clone(node).underlay_loop());
    tasks.spawn_local(Rc::clone(node).ranges_loop());
    tasks.spawn_local(Rc::clone(node).claim_loop());
    tasks.spawn_local(Rc::clone(node).detour_loop());
    if node.environment.owns_host() {
        tasks.spawn_local(Rc::clone(node).tcp_loop());
        tasks.spawn_local(Rc::clone(node).web_loop());
        tasks.spawn_local(Rc::clone(node).page_loop());
        tasks.spawn_local(Rc::clone(node).limits_loop());
    }
    tasks.spawn_local(Rc::clone(node).firewall_loop());
    tasks.spawn_local(Rc::clone(node).key_loop());
    tasks.spawn_local(Rc::clone(node).tick_loop());
    tasks.spawn_local(Rc::clone(node).tunnel_loop());
    tasks.spawn_local(Rc::clone(node).path_loop());
    tasks.spawn_local(Rc::clone(node).path_receive_loop());
    tasks.spawn_local(Rc::clone(node).direct_receive_loop());
    tasks.spawn_local(Rc::clone(node).offload_receive_loop());
    tasks.spawn_local(Rc::clone(node).deleted_loop());
    let (on_gossip, on_links, on_kernel) = (Rc::clone(node), Rc::clone(node), Rc::clone(node));
    tasks.spawn_local(async move {
        while let Some(event) = gossip.recv().await {
            on_gossip.on_gossip(event);
        }
    });
    tasks.spawn_local(async move {
        while let Some(event) = links.recv().await {
            on_links.on_link(event);
        }
    });
    tasks.spawn_local(async move {
        while let Some(event) = kernel.recv().await {
            on_kernel.on_kernel(event);
        }
    });
    tasks
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "no service manager to notify");
    }
}

/// Another daemon runs with this host's identity and was started first. A restart would not help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct StoodAside(String);

impl Node {
    fn clash_sentence(&self) -> String {
        let state = self.state.borrow();
        state.problems.get(Code::IdentityClash, &state.view.me.to_string()).unwrap_or_default().to_owned()
    }

    async fn tick_loop(self: Rc<Self>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = 0u64;
        loop {
            ticks.tick().await;
            count += 1;
            self.judge_all(&mut self.state.borrow_mut());
            self.probe_silent();
            self.wake_detours();
            self.tick_alloc();
            self.ask_later_map();
            self.check_caught_up();
            self.ask_missing_objects();
            note_step(&mut self.state.borrow_mut());
            self.tell_groups();
            self.ask_for_members();
            if count.is_multiple_of(5) {
                self.judge_clocks();
                self.look_for_recoveries(count.is_multiple_of(10));
                let node = Rc::clone(&self);
                spawn_local(async move { node.announce_again().await });
                self.pull_missing();
                self.expire_leases();
                self.collect_docker();
                self.end_clashes();
                self.report_to_api(&self.state.borrow());
                self.drop_forgotten(&mut self.state.borrow_mut());
                // A table that is not cached when the daemon is killed is unknown after a start without peers. Each file has a
                // whole table, of a host that may change it many times a second.
                if let Err(error) = self.cache_tables() {
                    tracing::warn!("{error:#}");
                }
                notify(&[sd_notify::NotifyState::Watchdog]);
            }
            if count.is_multiple_of(25) {
                self.forget_deleted_nodes();
            }
            if count.is_multiple_of(10) {
                self.retry_ports();
                self.answer_health();
            }
            if count.is_multiple_of(300) {
                self.forget_long_dead();
                self.drop_old_tombstones();
                self.mend_services();
                // The time when each host was last alive survives a restart only in the state file.
                self.save_soon();
            }
        }
    }

    /// Checks whether gossip has caught up: all that live peers announce has arrived. Nothing is removed from
    /// the kernel before that.
    fn check_caught_up(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if state.phase.is_caught_up() || !state.is_member() {
            return;
        }
        let settled = state.other_members().all(|id| state.has_arrived(id));
        let is_alive = |id| state.view.nodes.get(&id).is_some_and(|node| node.state == PeerState::Alive);
        let alone = !state.other_members().any(is_alive);
        let no_others = state.other_members().next().is_none();
        let done = settled && (!alone || no_others || state.now() > 5_000);
        if done || state.now() > CATCH_UP_MS {
            tracing::info!(complete = done, "gossip has caught up");
            state.phase.catch_up();
            state.reconcile.ask_full();
            self.work.notify_one();
            self.membership.notify_waiters();
            drop(guard);
            // There may be a pool that was not configured before.
            self.mend_services();
        }
    }

    /// Waits until gossip has caught up, or this host is not a member. Before that, the cluster may have
    /// forgotten this host without its knowledge, and the addresses of its blocks may belong to other hosts.
    pub(super) async fn settled(&self) {
        loop {
            let settled = self.membership.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            {
                let state = self.state.borrow();
                if state.phase.is_caught_up() || !state.is_member() {
                    return;
                }
            }
            settled.await;
        }
    }

    /// Withdraws this host from the cluster, for `ovlctl leave` and `teardown`. The daemon stops afterwards.
    ///
    /// # Errors
    ///
    /// A teardown cannot remove all kernel objects. The daemon then continues to run.
    pub(super) async fn leave(self: &Rc<Self>, how: Stop) -> Result<(), Failed> {
        let (me, alone) = {
            let mut state = self.state.borrow_mut();
            state.phase.leave();
            // Another host has to announce the addresses of LoadBalancers.
            state.subsystems.announcements.set_uplink(None);
            (state.view.me, state.view.alloc.members.len() <= 1 || !state.is_member())
        };
        if !alone && let Err(failed) = self.change(Change::Forget(me)).await {
            // The host is withdrawn nevertheless. It keeps its blocks until the other hosts forget it.
            tracing::warn!(error = failed.0.message, "the cluster cannot be asked to forget this host");
        }
        if let Err(failed) = self.stop_announcing().await {
            tracing::warn!(error = failed.0.message, "addresses of LoadBalancers stay on this host");
        }
        if how == Stop::Teardown
            && let Err(failed) = self.remove_all().await
        {
            // The daemon keeps running, so that the request can be repeated.
            self.state.borrow_mut().phase.stay();
            self.use_fast_path(true);
            self.underlay.notify_one();
            self.recompute_networks();
            return Err(failed);
        }
        self.stop.set(Some(how));
        let node = Rc::clone(self);
        spawn_local(async move {
            // Let the reply be sent first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            node.stopping.notify_one();
        });
        Ok(())
    }

    /// Removes all kernel objects of ovl and all files about endpoints.
    async fn remove_all(&self) -> Result<(), Failed> {
        self.close_firewalls().await?;
        self.remove_sandboxes().await?;
        let ids: Vec<_> = self.state.borrow().own_endpoints().map(|endpoint| endpoint.id).collect();
        self.withdraw(&ids, "detached by teardown")?;
        // The reconcile loop must not create again what is removed here.
        {
            let mut state = self.state.borrow_mut();
            state.view.clear();
            state.workloads.clear();
            state.subsystems.all().into_iter().for_each(|subsystem| subsystem.withdraw());
        }
        self.use_fast_path(false);
        let found = self.kernel.dump().await.map_err(Failed::from)?;
        // Programs of the fast path, and some routes, are not removed with a device.
        let fast = found.fast.host.map(|_| Op::Fast(FastOp::Unload));
        let routes = found.routes.keys().map(|to| Op::Route(RouteOp::Delete(*to)));
        for outcome in self.kernel.apply(fast.into_iter().chain(routes).collect()).await {
            outcome.result.map_err(Failed::from)?;
        }
        self.kernel.delete_links(found.links.keys().copied().collect()).await.map_err(Failed::from)?;
        self.kernel.sweep().await.map_err(Failed::from)?;
        self.kernel.remove_filter().await.map_err(Failed::from)
    }

    /// Announces the stop to peers and saves the state, within two seconds.
    ///
    /// # Errors
    ///
    /// The state was not saved, or the daemon stops because of another one with its identity.
    async fn end(self: &Rc<Self>) -> Result<()> {
        let how = self.stop.get().unwrap_or(Stop::Restart);
        tracing::info!(?how, "ovld ends");
        self.state.borrow_mut().phase.leave();
        let presence = match how {
            Stop::Restart => Presence::Restarting,
            Stop::Leave | Stop::Teardown => Presence::Left,
            // An announcement would be made in the name of the other daemon.
            Stop::Aside => return Err(StoodAside(self.clash_sentence()).into()),
        };
        self.publish_record(presence);
        let signed = self.state.borrow().view.own_signed().clone();
        let announcing = self.gossip().announce(signed);
        if tokio::time::timeout(Duration::from_millis(500), announcing).await.is_err() {
            tracing::warn!("peers could not be told in time; they notice by themselves");
        }
        if let Err(error) = self.cache_tables() {
            tracing::warn!("{error:#}");
        }
        // Needed only if no other daemon is started on this host. Otherwise, that one would remove them.
        let swept = tokio::time::timeout(Duration::from_millis(500), self.kernel.sweep()).await;
        if let Ok(Err(error)) = swept {
            tracing::warn!(%error, "interfaces of endpoints that are gone are left over");
        }
        // An earlier release reads the state file only without a journal. The writer saves the state, because it may be
        // writing the same file now.
        self.state.borrow_mut().save.whole();
        match tokio::time::timeout(Duration::from_secs(1), self.saved()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(failed)) => anyhow::bail!("{}", failed.0.message),
            Err(_) => anyhow::bail!("the state was not saved in time; the last one that was stands"),
        }
    }
}
