//! The underlay device: follows changes of its MTU and of this host's address.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use ovl_dataplane::device::Device;
use ovl_kernel::own_addresses;
use ovl_proto::record::{NodeRecord, Presence, name_address};
use tokio::time::Instant;

use super::{Node, next_generation, open};
use crate::advertised::Further;
use crate::config::{Config, default_source};
use crate::environment::Environment;
use crate::problems::Code;
use ovl_subsystems::Change;

/// Address changes come in bursts: an address is often deleted before the next one is added.
const SETTLE: Duration = Duration::from_millis(100);
/// Time to wait for an address that is deleted briefly (DHCP, a reload of the network configuration).
const GONE_FOR_GOOD: Duration = Duration::from_secs(2);
/// Interval of the checks of an underlay address on a loopback device: the routes to peers may change.
const FOLLOW_ROUTES: Duration = Duration::from_secs(30);
/// Interval of the checks while the address is missing and there is no other one.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

impl Node {
    /// Returns the VTEP of this host, and those of its peers.
    pub(super) fn underlay_ends(&self) -> (IpAddr, Vec<IpAddr>) {
        let state = self.state.borrow();
        let peers = state.view.nodes.values().filter(|node| node.record.id != state.view.me);
        let own = state.record().map_or(self.config.advertise.ip(), |record| record.vtep);
        (own, peers.map(|node| node.record.vtep).collect())
    }

    /// Watches the underlay device forever.
    pub(super) async fn underlay_loop(self: Rc<Self>) {
        let mut device = None;
        let mut gone_since = None;
        loop {
            let (vtep, peers) = self.underlay_ends();
            let found = self.kernel.underlay(vtep, peers).await;
            let wait = match found {
                Ok(link) => {
                    gone_since = None;
                    self.state.borrow_mut().problems.set(Code::Address, "", None);
                    self.set_link_mtu(link.mtu);
                    self.set_segment(link.prefix);
                    self.set_uplink(&link.device);
                    self.note_underlay_device(&link.device);
                    self.state.borrow_mut().local.underlay.set_by_peers(link.by_peers);
                    device = Some(link.device);
                    match self.follow_nat(vtep).await {
                        Ok(()) => link.by_peers.then_some(FOLLOW_ROUTES),
                        Err(error) => {
                            tracing::warn!(
                                "this host cannot be known as one behind NAT, or as none any more: {error:#}"
                            );
                            Some(LOOK_AGAIN)
                        }
                    }
                }
                Err(_) if gone_since.get_or_insert_with(Instant::now).elapsed() < GONE_FOR_GOOD => {
                    Some(SETTLE)
                }
                Err(_) => match device.as_deref().and_then(|device| self.address_of(device, vtep)) {
                    Some(address) => match self.move_to(address).await {
                        // The new address is looked up as any other: it ends the problem of the old one.
                        Ok(()) => Some(SETTLE),
                        Err(error) => {
                            let sentence = format!("this host's address is {address} now and {error:#}");
                            self.state.borrow_mut().problems.set(Code::Address, "", Some(sentence));
                            Some(LOOK_AGAIN)
                        }
                    },
                    None => {
                        let sentence = format!(
                            "{vtep}, the address of this host in the cluster, is on no device any more: peers cannot \
                             reach it. Give it back, or start ovld with another --advertise"
                        );
                        self.state.borrow_mut().problems.set(Code::Address, "", Some(sentence));
                        Some(LOOK_AGAIN)
                    }
                },
            };
            match wait {
                Some(wait) => {
                    // Either event requires another check.
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.underlay.notified() => {}
                    }
                }
                None => self.underlay.notified().await,
            }
            tokio::time::sleep(SETTLE).await;
        }
    }

    fn set_link_mtu(&self, mtu: u16) {
        if !self.change_record(|record| record.link_mtu = mtu) {
            return;
        }
        self.event("peer", &self.config.node, &format!("the underlay's MTU is {mtu} now"));
        self.gossip().set_link_mtu(mtu);
        self.state.borrow_mut().changed(Change::ThisHost);
        self.work.notify_one();
    }

    fn set_segment(&self, prefix: IpNet) {
        let mut state = self.state.borrow_mut();
        if state.local.underlay.set_segment(prefix) {
            state.changed(Change::ThisHost);
            self.work.notify_one();
        }
    }

    /// Sets the device on which the addresses of LoadBalancers are announced: the configured one, or else the
    /// underlay device.
    fn set_uplink(&self, device: &str) {
        let uplink = self.config.load_balancer_device.or_else(|| Device::new(device));
        let mut state = self.state.borrow_mut();
        if state.subsystems.announcements.set_uplink(uplink) {
            state.changed(Change::Uplink);
            self.work.notify_one();
        }
    }

    /// Returns another address of the device, of the same family, that is neither link-local nor of a
    /// LoadBalancer. `None` if there is none.
    fn address_of(&self, device: &str, old: IpAddr) -> Option<IpAddr> {
        let announced = self.state.borrow().subsystems.announcements.claimed();
        addresses_of(device, old.is_ipv4()).into_iter().find(|address| !announced.contains(address))
    }

    /// Takes that a host to join sees this one at an address, and whether it has knocked there; or that its knock arrived.
    pub(super) fn note_seen(&self, at: Option<(SocketAddr, bool)>) {
        if !self.environment.owns_host() {
            return;
        }
        let own: Vec<IpAddr> = own_addresses().into_iter().flatten().map(|(_, address)| address).collect();
        let fixed = self.config.behind_nat;
        let changed = {
            let reach = &mut self.state.borrow_mut().reach;
            match at {
                Some((at, knocks)) => reach.seen(at, knocks, &own),
                None => reach.knocked(),
            }
            reach.judge(fixed)
        };
        if changed {
            self.underlay.notify_one();
        }
    }

    /// Takes whether others dial this host, where no knock can tell.
    pub(super) fn note_dialled(&self, is_dialled: bool) {
        let fixed = self.config.behind_nat;
        let changed = {
            let reach = &mut self.state.borrow_mut().reach;
            if is_dialled {
                reach.dialled();
            } else {
                reach.had_time();
            }
            reach.judge(fixed)
        };
        if changed {
            self.underlay.notify_one();
        }
    }

    /// Begins a new generation if others know this host as one behind NAT, or as none, or at further addresses, and that is not so any
    /// more.
    async fn follow_nat(&self, vtep: IpAddr) -> anyhow::Result<()> {
        let (known, is) = {
            let state = self.state.borrow();
            (state.record().is_some_and(NodeRecord::is_behind_nat), state.reach.is_behind_nat())
        };
        let listens = self.listen_also.get();
        let main = SocketAddr::new(vtep, self.config.advertise.port());
        let further = further(&self.config, &*self.environment, main, listens.map(|at| at.ip()))?;
        if further.listen != listens {
            let message = match further.listen {
                Some(address) => format!("others can dial it at {address} too"),
                None => "it has no address of the other family any more".to_owned(),
            };
            self.event("peer", &self.config.node, &message);
            self.move_to(vtep).await?;
            return Ok(());
        }
        if known != is {
            let message = match is {
                true => "hosts to join see another address: it is behind NAT",
                false => "it is not behind NAT any more",
            };
            self.event("peer", &self.config.node, message);
            self.move_to(vtep).await?;
            self.detour_turn.notify_one();
        }
        Ok(())
    }

    /// Changes to another address: opens new sockets and begins a new generation. The reconcile loop replaces
    /// the devices.
    async fn move_to(&self, address: IpAddr) -> anyhow::Result<()> {
        let main = SocketAddr::new(address, self.config.advertise.port());
        let before = self.listen_also.get().map(|at| at.ip());
        let further = further(&self.config, &*self.environment, main, before)?;
        let (record, signed, keyring) = {
            let state = self.state.borrow();
            let Some(own) = state.view.own() else { return Ok(()) };
            let mut record = own.record.clone();
            record.generation = next_generation(record.generation, self.wall_ms());
            record.revision = 1;
            let known_as = match state.reach.is_behind_nat() {
                true => name_address(record.id).into(),
                false => address,
            };
            record.address = SocketAddr::new(known_as, record.address.port());
            record.vtep = address;
            record.further = if state.reach.is_behind_nat() { Vec::new() } else { further.published };
            let signed = self.identity.sign_record(&record)?;
            (record, signed, Arc::clone(state.keys.ring()))
        };
        let (gossip, links) = open(
            &self.config,
            (self.environment.transport(), self.environment.wall_clock()),
            &self.identity,
            &keyring,
            (&record, &signed, further.listen),
            self.gossip_events.clone(),
            self.link_events.clone(),
        )
        .await?;
        self.listen_also.set(further.listen);
        let (old_gossip, old_links) = (self.gossip.replace(gossip), self.links.replace(links));
        if self.state.borrow().record().is_some_and(|own| own.vtep != address) {
            self.event("peer", &self.config.node, &format!("follows its address to {address}"));
        }
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            state.view.set_own(record, signed);
            // Changes during the opening of the sockets are announced again below.
            state.changed(Change::ThisHost);
            self.pointed.borrow_mut().clear();
            self.point_links(state);
        }
        // The cluster keys may have changed while the sockets were opened.
        self.use_keys()?;
        self.publish_record(Presence::Running);
        // The owner table starts again with the new generation.
        self.write_table(Vec::new(), Vec::new());
        self.saved().await.map_err(|failed| anyhow::anyhow!(failed.0.message))?;
        self.work.notify_one();
        old_gossip.shutdown().await;
        old_links.shutdown().await;
        Ok(())
    }
}

/// Returns the further addresses of this host, which has this main one. `before` is the one of the other family that was found before.
///
/// # Errors
///
/// Those that are configured are more than this host listens on.
pub(super) fn further(
    config: &Config,
    environment: &dyn Environment,
    main: SocketAddr,
    before: Option<IpAddr>,
) -> anyhow::Result<Further> {
    if !environment.owns_host() {
        return Ok(Further::default());
    }
    let own: Vec<IpAddr> = own_addresses().into_iter().flatten().map(|(_, address)| address).collect();
    match &config.further {
        Some(addresses) => Further::configured(main, addresses, &own),
        None => Ok(Further::found(main, default_source(!main.is_ipv4()), before, &own)),
    }
}

/// Returns the addresses of a device that are of one family and neither link-local nor loopback.
fn addresses_of(device: &str, ipv4: bool) -> Vec<IpAddr> {
    let all = own_addresses().into_iter().flatten();
    all.filter(|(on, address)| on == device && address.is_ipv4() == ipv4)
        .map(|(_, address)| address)
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_loopback(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_loopback(),
        })
        .collect()
}
