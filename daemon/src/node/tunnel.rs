//! Watches the tunnel, and saves and publishes its keys. [`crate::encryption`] measures and decides.

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::{KeyStatus, PeerState};
use ovl_mesh::keys::TunnelSecret;
use ovl_proto::id::NodeId;
use ovl_subsystems::Change;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::local::epochs;
use tokio::time::Instant;

use super::{Failed, Node};
use crate::encryption::{self, Move};

/// Interval of the probes of each peer. Probes also keep sessions up, so that the first packet need not wait
/// for a handshake.
const EVERY: Duration = Duration::from_secs(3);
/// Interval of the checks while a peer does not answer.
const IN_DOUBT: Duration = Duration::from_secs(1);
/// Interval of the checks during a rotation.
const SOON: Duration = Duration::from_millis(250);
/// Time limit for the answer to a probe. A later answer counts as lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

impl Node {
    /// Watches the tunnel forever.
    pub(super) async fn tunnel_loop(self: Rc<Self>) {
        let mut probed: Option<Instant> = None;
        loop {
            self.look_at_tunnel().await;
            self.settle_tunnel();
            self.follow_tunnel().await;
            if probed.is_none_or(|at| at.elapsed() >= EVERY) {
                probed = Some(Instant::now());
                let cluster = self.state.borrow().view.alloc.origin();
                for (id, address) in self.tunnel.borrow().targets(cluster) {
                    let node = Rc::clone(&self);
                    tokio::task::spawn_local(async move { node.probe_tunnel(id, address).await });
                }
            }
            let pause = match encryption::is_moving(&self.state.borrow().view) {
                true => SOON,
                false if self.tunnel.borrow().is_in_doubt() => IN_DOUBT,
                false => EVERY,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.tunnel_turn.notified() => {}
            }
        }
    }

    /// Changes to the key epoch that a peer has changed to.
    async fn follow_tunnel(&self) {
        let Some(to) = encryption::to_follow(&self.state.borrow().view) else { return };
        let before = self.tunnel.borrow().secret().clone();
        if let Err(failed) = self.move_tunnel(moved(&before, before.clone(), to)).await {
            let sentence = failed.0.message;
            tracing::warn!("the tunnel cannot follow to another epoch: {sentence}");
        }
    }

    /// Saves the tunnel keys with their epoch, and then publishes them.
    async fn move_tunnel(&self, secret: TunnelSecret) -> Result<(), Failed> {
        let io = |error: anyhow::Error| Failed::unavailable(format!("{error:#}"));
        secret.save(&self.config.state_dir.join("tunnel.key")).map_err(io)?;
        for key in secret.private() {
            self.kernel.learn_key(key).await.map_err(Failed::from)?;
        }
        self.state.borrow_mut().local.key_epochs.set_own_previous(secret.previous());
        self.change_record(|record| {
            if let Some(end) = &mut record.tunnel {
                (end.key, end.epoch, end.rotating) =
                    (secret.public(), secret.epoch(), secret.previous().is_some());
                end.port = epochs::port_in(self.config.tunnel_port, end.epoch);
            }
        });
        self.tunnel.borrow_mut().set_secret(secret);
        self.state.borrow_mut().changed(Change::Tunnel);
        self.work.notify_one();
        self.tunnel_turn.notify_one();
        Ok(())
    }

    /// Asks the kernel worker for the state of each WireGuard peer.
    pub(super) async fn look_at_tunnel(&self) {
        let wanted = encryption::kind(&self.state.borrow().view).is_some();
        let ends = match wanted {
            true => self.kernel.tunnels().await,
            false => Ok(Vec::new()),
        };
        let ends = ends.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot ask how the tunnel does");
            Vec::new()
        });
        let mut watch = self.tunnel.borrow_mut();
        let (sessions, quiet) = watch.hear(&ends);
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let before = tunnel::peer_routes(&state.view, &state.local.key_epochs);
        state.local.key_epochs.set_sessions(sessions, quiet);
        if tunnel::peer_routes(&state.view, &state.local.key_epochs) != before {
            state.changed(Change::Tunnel);
            self.work.notify_one();
        }
        watch.measure(&ends, &state.view, &state.local.key_epochs);
    }

    /// Rotates the tunnel key of this host, for `ovlctl key rotate`. Returns when the new key is saved and
    /// published. The peers follow without further requests.
    pub(super) async fn rotate_tunnel_key(&self) -> Result<KeyStatus, Failed> {
        let to = encryption::rotation(&self.state.borrow().view)?;
        let before = self.tunnel.borrow().secret().clone();
        let fresh = before.with_new_key().map_err(|error| Failed::unavailable(format!("{error:#}")))?;
        let moved = moved(&before, fresh, to);
        let key = moved.public();
        self.move_tunnel(moved).await?;
        self.event("key", &key.to_string(), "this host has a new tunnel key, by request");
        self.key_status()
    }

    /// Ends the rotation of the tunnel key and deletes the previous key, when no host uses that any more.
    fn settle_tunnel(&self) {
        {
            let state = self.state.borrow();
            if !encryption::is_settled(&state.view, &state.local.key_epochs) {
                return;
            }
        }
        let settled = self.tunnel.borrow().secret().without_previous();
        if let Err(error) = settled.save(&self.config.state_dir.join("tunnel.key")) {
            tracing::warn!("the old key of the tunnel cannot be given up: {error:#}");
            return;
        }
        self.tunnel.borrow_mut().set_secret(settled);
        self.state.borrow_mut().local.key_epochs.set_own_previous(None);
        self.change_record(|record| {
            if let Some(end) = &mut record.tunnel {
                end.rotating = false;
            }
        });
        self.event("key", "", "the tunnel has moved: all hosts use the new keys");
        self.state.borrow_mut().changed(Change::Tunnel);
        self.work.notify_one();
    }

    async fn probe_tunnel(&self, id: NodeId, address: IpAddr) {
        let start = Instant::now();
        let answered = self.prober.probe(address, ANSWER_WITHIN).await;
        let took = answered.then(|| start.elapsed());
        let is_alive =
            self.state.borrow().view.nodes.get(&id).is_some_and(|node| node.state == PeerState::Alive);
        self.tunnel.borrow_mut().probed(id, start, took, is_alive);
    }
}

/// Returns `fresh` after a move. `before` are the keys until now.
fn moved(before: &TunnelSecret, fresh: TunnelSecret, Move { epoch, keeps_previous }: Move) -> TunnelSecret {
    match epoch {
        Some(epoch) => fresh.with_epoch(epoch, Some(before).filter(|_| keeps_previous)),
        None => fresh,
    }
}
