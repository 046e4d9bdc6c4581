//! Measurement of two paths in alternating rounds, so that drift of the machine affects both.

use anyhow::{Context, Result};
use netns_lab::Netns;
use serde_json::{Value, json};

use super::plan::Plan;
use super::stats::{Samples, round};
use super::stream::{Cores, Path, Speed};

/// The results of both paths, round by round.
#[derive(Default)]
pub(crate) struct Turns {
    overlay: Vec<Speed>,
    hand: Vec<Speed>,
}

impl Turns {
    /// Measures many short rounds: the best of them is more stable than the best of a few long ones.
    pub(crate) fn take(plan: &Plan, overlay: &Path, hand: &Path, cores: Cores) -> Result<Self> {
        let mut turns = Turns::default();
        for turn in 0..plan.turns {
            // Alternate which path goes first.
            if turn % 2 == 0 {
                turns.overlay.push(overlay.run(plan.stream, cores)?);
                turns.hand.push(hand.run(plan.stream, cores)?);
            } else {
                turns.hand.push(hand.run(plan.stream, cores)?);
                turns.overlay.push(overlay.run(plan.stream, cores)?);
            }
        }
        Ok(turns)
    }

    pub(crate) fn overlay_gbit_s(&self) -> Samples {
        gbit_s(&self.overlay)
    }

    pub(crate) fn hand_gbit_s(&self) -> Samples {
        gbit_s(&self.hand)
    }

    pub(crate) fn ratio(&self) -> f64 {
        self.overlay_gbit_s().median() / self.hand_gbit_s().median()
    }

    /// Returns the ratio of the best rounds. Other work on the machine can only slow a round down, to half on
    /// the same core. If it affects one path more than the other, the ratio of medians was 1.19 where the
    /// true ratio is 0.85.
    pub(crate) fn best_ratio(&self) -> f64 {
        self.overlay_gbit_s().max() / self.hand_gbit_s().max()
    }

    pub(crate) fn to_json(&self) -> Value {
        let pairs = self.overlay.iter().zip(&self.hand);
        let ratios = Samples::new(pairs.map(|(ours, theirs)| ours.gbit_s / theirs.gbit_s).collect());
        json!({
            "overlay": to_json(&self.overlay),
            "by_hand": to_json(&self.hand),
            "ratio_of_each_turn": ratios.to_json(),
        })
    }
}

/// Returns the MTU of the interface in a workload.
pub(crate) fn mtu_of(workload: &Netns) -> Result<u64> {
    let link = workload.ip_json(&["link", "show", "eth0"])?;
    link[0]["mtu"].as_u64().with_context(|| format!("no MTU in {link}"))
}

pub(crate) fn gbit_s(runs: &[Speed]) -> Samples {
    Samples::new(runs.iter().map(|run| run.gbit_s).collect())
}

pub(crate) fn to_json(runs: &[Speed]) -> Value {
    json!({
        "gbit_s": runs.iter().map(|run| round(run.gbit_s)).collect::<Vec<_>>(),
        "retransmits": runs.iter().map(|run| run.retransmits).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_ratio_uses_the_best_rounds() {
        let speeds = |all: &[f64]| all.iter().map(|&gbit_s| Speed { gbit_s, retransmits: 0 }).collect();
        let turns = Turns { overlay: speeds(&[9.0, 19.0, 10.0]), hand: speeds(&[20.0, 10.0, 5.0]) };
        assert_eq!((turns.best_ratio(), turns.ratio()), (0.95, 1.0));
    }
}
