//! `partition`, `cut`, `heal` and `loss`: inject and remove faults.

use anyhow::{Context as _, Result};

use super::open_to_change;

pub(crate) fn partition(lab: &str, groups: &[String]) -> Result<()> {
    let lab = open_to_change(lab)?;
    let groups: Vec<Vec<&str>> = groups.iter().map(|group| group.split(',').collect()).collect();
    let groups: Vec<&[&str]> = groups.iter().map(Vec::as_slice).collect();
    lab.partition(&groups)?;
    println!("faults: {}", lab.faults());
    Ok(())
}

pub(crate) fn cut(lab: &str, pairs: &[String], one_way: bool) -> Result<()> {
    let lab = open_to_change(lab)?;
    let pairs: Result<Vec<(&str, &str)>> = pairs
        .iter()
        .map(|pair| pair.split_once(',').with_context(|| format!("{pair} is no pair of hosts: h1,h2")))
        .collect();
    lab.cut(&pairs?, one_way)?;
    println!("faults: {}", lab.faults());
    Ok(())
}

pub(crate) fn heal(lab: &str) -> Result<()> {
    let lab = open_to_change(lab)?;
    lab.heal()?;
    println!("faults: {}", lab.faults());
    Ok(())
}

pub(crate) fn loss(lab: &str, percent: f64, udp_port: Option<u16>) -> Result<()> {
    let lab = open_to_change(lab)?;
    match udp_port {
        Some(port) => lab.loss_udp_port(percent, port)?,
        None => lab.loss(percent)?,
    }
    println!("faults: {}", lab.faults());
    Ok(())
}
