//! Traffic between endpoints whose way changes and comes back.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{Attached, Connection, Flow, SOON, ping_all_pairs};

/// The length of what a connection carries, in bytes, so that packets as long as the path allows have to pass.
const MUCH: usize = 300 * 1024;

/// A connection and a flow of datagrams between the first two endpoints of each network.
#[derive(Debug)]
pub struct Traffic<'a> {
    networks: Vec<&'a [Attached]>,
    connections: Vec<Connection>,
    flows: Vec<Flow>,
}

impl<'a> Traffic<'a> {
    /// Starts it.
    pub fn start(networks: &[&'a [Attached]]) -> Result<Self> {
        let networks = networks.to_vec();
        let connections =
            networks.iter().map(|all| Connection::open(&all[0], &all[1], SOON)).collect::<Result<_>>()?;
        let mut traffic = Self { networks, connections, flows: Vec::new() };
        traffic.carry()?;
        traffic.watch()?;
        Ok(traffic)
    }

    /// Starts the flows anew.
    pub fn watch(&mut self) -> Result<()> {
        self.flows = self.networks.iter().map(|all| Flow::start(&all[0], &all[1])).collect::<Result<_>>()?;
        Ok(())
    }

    /// Fails if traffic does not pass now, or replies were missing for as long as `most` after `what`.
    pub fn ensure_turned(&mut self, what: &str, most: Duration) -> Result<()> {
        self.carry()?;
        self.networks.iter().try_for_each(|all| ping_all_pairs(all, SOON))?;
        let gaps: Vec<Duration> =
            self.flows.drain(..).map(|flow| Ok(flow.finish()?.longest_gap())).collect::<Result<_>>()?;
        println!("no replies for {gaps:?} after {what}");
        ensure!(gaps.iter().all(|gap| *gap < most), "no replies for {gaps:?} after {what}");
        Ok(())
    }

    /// Fails if traffic does not pass now, or a datagram was lost since the flows were started.
    pub fn ensure_none_lost(&mut self) -> Result<()> {
        self.carry()?;
        self.flows.drain(..).try_for_each(Flow::finish_without_loss)
    }

    fn carry(&mut self) -> Result<()> {
        self.connections.iter_mut().try_for_each(|each| each.echo(MUCH).map(drop))
    }
}
